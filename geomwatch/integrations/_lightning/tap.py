"""What a LightningModule is asked for in each step, seen by standing around two of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from geomwatch.curvature import batches
from geomwatch.integrations._host.tap import Method, Tap
from geomwatch.isolation.isolation import is_probing
from geomwatch.isolation.random_state import RandomState
from geomwatch.sinks.log import logger


class StepCall:
    """A call of training_step, kept so that it can be made again with the same outcome."""

    __slots__ = ("_marks", "batch", "is_copy", "loss", "random", "rest", "turn")

    def __init__(self, batch: Any, rest: Sequence[Any] = (), *, copied: bool, turn: int) -> None:
        self.is_copy, self.turn = copied, turn
        try:
            self._marks = [(t, _version(t)) for t in batches.tensors(batch)]
            self.batch = batches.fresh_copy(batch) if copied else batches.shell(batch)
        except Exception:  # an odd batch, of which a probe will say what is wrong
            self._marks, self.batch = [], batch
        self.rest = tuple(rest)  # batch_idx, where it is taken
        self.random = RandomState()
        self.loss: Tensor | None = None  # what it returned, before Lightning divides it

    @property
    def writes_its_batch(self) -> bool:
        """Whether a tensor of the batch has been changed in place since."""
        return any(_version(tensor) != version for tensor, version in self._marks)

    @property
    def is_spoilt(self) -> bool:
        """Whether the batch is not the one that training_step was given."""
        return self.writes_its_batch and not self.is_copy

    def forget_marks(self) -> None:
        """Let go of the original's tensors."""
        self._marks = []


class StepTap(Tap):
    """Notes each training_step, and tells when the gradient is complete.

    It stands around `training_step` and `configure_gradient_clipping`. Under automatic optimisation
    Lightning calls the latter before each step, clipping or not, and after all other hooks. Whoever
    wants to be told overrides the three methods at the end.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        super().__init__()
        self._trainer = trainer
        self.training_step: Method = module.training_step
        self.present: StepCall | None = None  # of this batch, or the last one
        self._turn = 0  # batches so far
        self._copying = True  # until a window has shown that training_step leaves its batch alone
        self._told = False
        self.stand_around(module, "training_step", self._around_step)
        self.stand_around(module, "configure_gradient_clipping", self._around_clip)

    def close(self) -> None:
        """Leave the module as it was."""
        super().close()
        self.present = None

    def next_batch(self) -> None:
        """Note that another batch begins."""
        self._turn += 1
        self.present = None

    def settle(self, window: Sequence[StepCall]) -> bool:
        """Tell whether the batches of a window are those that training_step was given.

        Copying them costs memory, so it is left off while nobody writes to them.
        """
        spoilt = any(call.is_spoilt for call in window)
        self._copying = any(call.writes_its_batch for call in window)
        for call in window:
            call.forget_marks()
        if spoilt and not self._told:
            self._told = True
            logger.warning(
                "training_step has changed its batch in place, so that a probe would see another "
                "one. This step is not measured; from now on batches are copied before."
            )
        return not spoilt

    def _around_step(self, original: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        # a validation_step may well call training_step
        if not self._trainer.training or is_probing():
            return original(*args, **kwargs)
        batch, *rest = (*args, *kwargs.values())
        call = self.present = StepCall(batch, rest, copied=self._copying, turn=self._turn)
        output = original(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor):
            call.loss = loss.detach()
            self.trained_on(call)
        return output

    def _around_clip(self, original: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        optimizer = args[0] if args else kwargs["optimizer"]
        norm = self.gradient_complete(optimizer)
        result = original(*args, **kwargs)
        self.stepping(optimizer, norm)
        return result

    def trained_on(self, call: StepCall) -> None:
        """Hear of a training_step that has returned a loss."""

    def gradient_complete(self, optimizer: Any) -> Tensor | None:
        """Hear that all hooks have run, clipping has not; return the norm of the gradient."""

    def stepping(self, optimizer: Any, norm: Tensor | None) -> None:
        """Hear that the step comes next, and the norm that its gradient had before clipping."""


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
