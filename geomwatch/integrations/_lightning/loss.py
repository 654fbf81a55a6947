"""The loss of a training_step, computed again: no log, no metric, no step of an optimizer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.integrations._host.check import SAME, Difference, check_against_training
from geomwatch.integrations._host.loss import HostLoss, MicroBatch
from geomwatch.integrations._host.tap import replaced, silence
from geomwatch.integrations._lightning.host import prepared
from geomwatch.integrations._lightning.names import dummy_logger, host_of
from geomwatch.integrations._lightning.tap import StepCall
from geomwatch.isolation.reach import captured_by
from geomwatch.monitoring.fixed_window import fixed_window
from geomwatch.parallel.ranks import Ranks
from geomwatch.sinks.log import logger

_REMEDY = (
    "Pass GeomwatchCallback(loss_fn=...), a function (module, batch) -> the loss alone, or give "
    "the module a method geometry_loss(batch)."
)
_MUTED = ("log", "log_dict", "print")


_LOSS_TOLERANCE = 1e-2  # relative; a forward pass may move a spectral norm's vectors a little
_ANGLE_TOLERANCE = 5e-2  # between directions


class StepLoss(HostLoss):
    """loss_fn(module, batch) on the micro-batches of a Trainer.

    training_step is called as in training, with its batch and batch_idx, inside the Trainer's
    precision plugin.
    """

    __slots__ = ("_dtype", "_rest", "_step", "_trainer")

    def __init__(
        self, trainer: Any, module: nn.Module, step: Callable[..., Any], given: LossFn | None
    ) -> None:
        super().__init__(given)
        self._trainer, self._step = trainer, step
        self._dtype = _dtype(module)
        self._rest = _rest_of(step)

    def evaluate(
        self, module: nn.Module, batch: Any, call: StepCall | None, share: float
    ) -> Tensor:
        """Return the loss of a batch, or of a share of it.

        Raises:
            UsageError: evaluating it steps an optimizer, calls manual_backward or gives no loss.
        """
        with quiet(self._trainer, module), self._precision(module):
            if self.given is not None:
                return self.given(module, batch)
            return _loss_in(self._step(batch, *(self._rest if call is None else call.rest)))

    def micro_batches(self, calls: Sequence[StepCall]) -> list[MicroBatch]:
        """Return the batches of a window as this loss knows them."""
        return [self.micro_batch(call.batch, call) for call in calls]

    def prepared(self, source: Any) -> DataLoader[Any]:
        """Return the user's own batch, or a loader's, as the training loop would treat them."""
        given = [prepared(self._trainer, batch) for batch in fixed_window(source)]
        data: Any = [self.micro_batch(batch) for batch in given]
        return DataLoader(data, batch_size=None)

    def isolates(self) -> list[object]:
        """Return what evaluating the loss may change beside the module."""
        carried = [] if self.given is None else captured_by(self.given)
        return [self._trainer, *carried]

    @contextlib.contextmanager
    def _precision(self, module: nn.Module) -> Iterator[None]:
        """Enter the precision plugin, without its default dtype where a probe has its own."""
        wanted = torch.get_default_dtype()
        with self._trainer.precision_plugin.train_step_context():
            if _dtype(module) != self._dtype:
                torch.set_default_dtype(wanted)  # which the plugin's context puts back
            yield


def check_window(
    module: nn.Module,
    loss_fn: HostLoss,
    window: Sequence[MicroBatch],
    params: Sequence[Tensor],
    ranks: Ranks,
) -> None:
    """Compare a window, whose losses are known, with what training has made of it.

    Raises:
        UsageError: training_step gives another loss, steps an optimizer or exchanges tensors
            between ranks.
    """
    check_against_training(
        module,
        loss_fn,
        window,
        sum(float(micro.call.loss) for micro in window) / len(window),
        params=params,
        ranks=ranks,
        tolerance=_LOSS_TOLERANCE,
        refuse=_refuse,
        judge_angle=_judge_angle,
    )


def _refuse(found: Difference) -> NoReturn:
    where = "" if found.is_here else "here, but not on another rank, "
    raise UsageError(
        f"training_step must give the same loss when it is evaluated again, got {found.loss:.6g} "
        f"where {found.trained:.6g} is trained on, {where}{SAME}: it depends on what it changes "
        "itself (a counter, a queue) or on chance of its own. Curvature of another loss would be "
        "measured. Pass GeomwatchCallback(loss_fn=...), a function (module, batch) -> loss, or "
        "give the module a method geometry_loss(batch)."
    )


def _judge_angle(angle: float) -> None:
    if angle > _ANGLE_TOLERANCE:
        logger.warning(
            "the gradient that is stepped with lies %.0f%% apart from that of the loss, %s: a "
            "hook, a callback or the module's own backward() changes it. Curvature is measured of "
            "the loss alone.",
            100 * angle,
            SAME,
        )


@contextlib.contextmanager
def quiet(trainer: Any, module: nn.Module) -> Iterator[None]:
    """Keep logs, prints and metrics of the module's to this rank, and refuse to step."""
    with contextlib.ExitStack() as stack:
        kind = host_of(trainer).LightningModule
        for part in module.modules():
            if isinstance(part, kind):
                for name in _MUTED:
                    stack.enter_context(replaced(part, name, silence))
                stack.enter_context(replaced(part, "manual_backward", _refuse_backward))
            for name, state in _metric_states(part):
                stack.enter_context(replaced(part, name, state.clone()))
        for stepper in _steppers(trainer, module):
            stack.enter_context(replaced(stepper, "step", _refuse_step))
        if trainer.world_size > 1:
            gather = functools.partial(_as_if_alike, trainer.world_size)
            stack.enter_context(replaced(trainer.strategy, "all_gather", gather))
        loggers = trainer.loggers
        trainer.loggers = [dummy_logger(trainer) for _ in loggers]
        stack.callback(setattr, trainer, "loggers", loggers)
        yield


def _metric_states(part: Any) -> list[tuple[str, Tensor]]:
    """The states of a torchmetrics metric; a probe's snapshot copies no large ones itself."""
    states = [(name, vars(part).get(name)) for name in vars(part).get("_defaults", ())]
    return [(name, state) for name, state in states if isinstance(state, Tensor)]


def _steppers(trainer: Any, module: Any) -> list[Any]:
    """The optimizers, bare and as Lightning wraps them, and the schedulers."""
    wrapped = module.optimizers()
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    wrappers = wrapped if isinstance(wrapped, list) else [wrapped]
    return [*trainer.optimizers, *wrappers, *schedulers]


def _as_if_alike(ranks: int, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Gather without asking anybody, as if each rank had what this one has.

    Metrics do no worse for it. A loss that needs it comes out otherwise than in training, which is
    found out before the first probe.
    """
    return torch.stack([tensor] * ranks)


def _refuse_step(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "the loss must be evaluated again without stepping, got a call of step() of an optimizer "
        f"or a scheduler in it. {_REMEDY}"
    )


def _refuse_backward(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "the loss must be evaluated again without a backward pass, got a call of manual_backward() "
        f"in it. {_REMEDY}"
    )


def _loss_in(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise UsageTypeError(
            "training_step must return its loss, or a dict with it as 'loss', when it is evaluated "
            f"again on the same batch, got {type(loss).__name__}. {_REMEDY}"
        )
    return loss


def _rest_of(step: Callable[..., Any]) -> Sequence[Any]:
    """What training_step takes beside a batch that no training step had: a batch_idx of 0."""
    try:
        inspect.signature(step).bind(None, 0)
    except TypeError:
        return ()
    return (0,)


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The precision of the parameters, as far as one tells for all."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
