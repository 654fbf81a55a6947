"""The loss of a window of batches, evaluated again and again from one state of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.checks import check_loss, explain_device
from geomwatch.isolation import captured_by, isolated
from geomwatch.recast import recast
from geomwatch.snapshot import Snapshot
from geomwatch.vectors import Layout

LossFn: TypeAlias = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar


class Replay:
    """A loss_fn on the batches of a window, each time from the same weights and random state.

    Used while `opened`. `leaves` are what is differentiated: the parameters, or stand-ins at
    another precision.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Any],
        *,
        layout: Layout,
        also: nn.Module | Sequence[object] = (),
    ) -> None:
        self.window = list(window)
        self.leaves = self._layout = layout
        self._model, self._loss_fn = model, loss_fn
        used = [also] if isinstance(also, nn.Module) else also
        self._others = [*used, *captured_by(loss_fn)]
        self._weigh: Callable[[Any], float] = getattr(loss_fn, "weight", batches.items)
        self._stack = contextlib.ExitStack()
        self._snapshot: Snapshot | None = None
        self._cast: torch.dtype | None = None  # of the batches, with stand-ins
        self._displacement: Tensor | None = None

    @contextlib.contextmanager
    def opened(self, mode: str, *, autocast: bool, dtype: torch.dtype | None) -> Iterator[Snapshot]:
        """Isolate the model; yields what is put back."""
        self.leaves, self._cast = self._layout, None
        with contextlib.ExitStack() as self._stack:
            self._snapshot = self._stack.enter_context(
                isolated(
                    self._model,
                    self._layout.params,
                    others=self._others,
                    mode=mode,
                    autocast=autocast,
                )
            )
            if dtype is not None and any(p.dtype != dtype for p in self._layout.params):
                self.recast(dtype)
            try:
                yield self._snapshot
            finally:
                self._snapshot = None

    @property
    def model(self) -> nn.Module:
        """The model that loss_fn is called with."""
        return self._model

    @property
    def is_recast(self) -> bool:
        """Whether the leaves are stand-ins in float64."""
        return self._cast == torch.float64

    def recast(self, dtype: torch.dtype) -> None:
        """Go on at another precision."""
        assert self._snapshot is not None
        stand_in = self._stack.enter_context(recast(self._snapshot.modules, dtype))
        # of the present leaves: they may be stand-ins already, at float32 for bfloat16
        params = tuple(stand_in(p) for p in self.leaves.params)
        self.leaves, self._cast = Layout(self._layout.names, params), dtype
        # Each evaluation is to start from the stand-ins, the end of the probe is not.
        self._snapshot = Snapshot([self._model, *self._others])

    def on(self, batch: Any) -> Replay:
        """Return the same loss on another batch, for use while this one is opened."""
        other = Replay(self._model, self._loss_fn, [batch], layout=self._layout)
        other._snapshot, other.leaves, other._cast = self._snapshot, self.leaves, self._cast
        return other

    def weight(self) -> float:
        """Return what the window counts for: its items, or what `loss_fn.weight` says."""
        return sum(float(self._weigh(batch)) for batch in self.window)

    def changed_objects(self) -> list[str]:
        """Name Python state that the loss changed and that can't be put back."""
        return self._snapshot.changed_objects() if self._snapshot else []

    def sweep(self) -> Iterator[tuple[float, Any]]:
        """Yield each batch with its weight; state runs on through the window, as in training."""
        if self._snapshot is None:
            raise RuntimeError("an Objective is used inside its `with` block only")
        self._snapshot.restore()
        if self._displacement is not None:
            pieces = self.leaves.unflatten(self._displacement)
            for p, piece in zip(self.leaves.params, pieces, strict=True):
                p.data.add_(piece)
        for batch in self.window:
            yield float(self._weigh(batch)), batch

    def evaluate(self, batch: Any) -> Tensor:
        """Return the loss of one batch, a scalar with its graph."""
        try:
            loss = self._loss_fn(self._model, batches.fresh_copy(batch, self._cast))
        except RuntimeError as error:
            explain_device(error, batch, self._layout.device)
            raise
        return check_loss(loss)

    @contextlib.contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """Evaluate at w + displacement; the weights are back afterwards."""
        assert self._snapshot is not None
        self._displacement = displacement
        try:
            yield
        finally:
            self._displacement = None
            # by copy: adding and subtracting would leave rounding behind
            self._snapshot.restore()
