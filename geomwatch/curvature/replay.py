"""The loss of a window of batches, evaluated again and again from one state of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.curvature.batches import Part
from geomwatch.curvature.checks import (
    check_loss,
    explain_device,
    takes_the_model_for_outputs,
    took_the_model_for_outputs,
)
from geomwatch.curvature.double_backward import gradients
from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageError, WithheldError
from geomwatch.isolation.isolation import isolate
from geomwatch.isolation.outside import Outside
from geomwatch.isolation.precision import recast
from geomwatch.isolation.reach import captured_by
from geomwatch.isolation.signals import handle_signals, users
from geomwatch.isolation.snapshot import Snapshot
from geomwatch.isolation.sync_norm import alone, is_synchronised, shared
from geomwatch.isolation.undo import later, swap, until_here
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.fsdp import is_sharded, reshard, unshard
from geomwatch.vectors.layout import Layout


class Replay:
    """A loss_fn on the batches of a window, each time from the same weights and random state.

    Used while `opened`. `leaves` are what is differentiated: the parameters, or stand-ins at
    another precision. `kept` is what the last evaluation has built on buffers and weights that the
    next one may change, and is dropped by it.
    """

    second_order = True  # what has no second derivative is switched to what has one
    obstacle = ""  # why differences have no meaning, and so no products
    why_differences = "asked for"  # where hvp="finite_difference"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Part],
        *,
        layout: Layout,
        also: Sequence[object] = (),
        ranks: Ranks | None = None,
        outside: Outside | None = None,
    ) -> None:
        self.window = list(window)
        self.leaves = self.layout = layout
        self._model, self._loss_fn = model, loss_fn
        self._also, self._outside = also, outside or Outside()
        self.ranks = ranks or Ranks()
        self.kept: Callable[[Tensor], Tensor] | None = None
        self.total = 0.0  # weight of the window, on all ranks
        self._snapshot: Snapshot | None = None
        self._cast: torch.dtype | None = None  # of the batches, with stand-ins
        self._displacement: Tensor | None = None
        self._recasting = contextlib.ExitStack()
        self._before: tuple[Snapshot, Layout, torch.dtype | None] | None = None

    def open(self, mode: str, *, autocast: bool, dtype: torch.dtype | None) -> Snapshot:
        """Isolate the model until the block around ends; returns what is put back."""
        self.leaves, self._cast = self.layout, None
        self._weigh_window()
        if is_sharded(self.layout.params):
            reshard(list(self._model.modules()))
        later(self._shut)
        window = [part.batch for part in self.window]
        drawn = self._outside.generators(self._model, self._loss_fn, self._also, window)
        self._snapshot = isolate(
            self._model,
            self.layout.params,
            others=[*self._also, *captured_by(self._loss_fn), *drawn],
            draws=self._outside.draws,
            mode=mode,
            autocast=autocast,
            second_order=self.second_order,
        )
        swap(nn.SyncBatchNorm, "forward", alone)  # unless all ranks evaluate: see `_shared`
        self._prepare(dtype)
        return self._snapshot

    def _shut(self) -> None:
        self._snapshot = self.kept = None

    def _prepare(self, dtype: torch.dtype | None) -> None:
        """Make the leaves such as can be differentiated twice, at a precision."""
        if is_sharded(self.layout.params):
            self._unshard()
        if dtype is not None and any(p.dtype.to_real() != dtype for p in self.leaves.params):
            self.recast(dtype)

    @property
    def ranks_of_a_piece(self) -> Ranks:
        """The ranks that evaluate a micro-batch: this one alone, unless a norm needs the others."""
        return self.ranks if is_synchronised(self._model.modules()) else Ranks()

    @property
    def model(self) -> nn.Module:
        """The model that loss_fn is called with."""
        return self._model

    @property
    def can_recast(self) -> bool:
        """Whether there is a higher precision to go over to."""
        return self._cast != torch.float64

    def recast(self, dtype: torch.dtype) -> None:
        """Go on at another precision."""
        assert self._snapshot is not None
        self._before = self._snapshot, self.leaves, self._cast
        self._recasting = until_here()
        stand_in = recast(self._snapshot.modules, dtype)
        # of the present leaves: they may be stand-ins already, at float32 for bfloat16
        params = tuple(stand_in(p) for p in self.leaves.params)
        self.leaves, self._cast = Layout(self.layout.names, params), dtype
        # Each evaluation is to start from the stand-ins, the end of the probe is not.
        self._snapshot = self._snapshot.anew()

    def _unshard(self) -> None:
        assert self._snapshot is not None
        stand_in = unshard(self._snapshot.modules)
        self.leaves = Layout(self.layout.names, tuple(map(stand_in, self.layout.params)))
        self._snapshot = self._snapshot.anew()

    def undo_recast(self) -> None:
        """Go back to the precision before the last `recast`."""
        self._recasting.close()
        if self._before is not None:
            self._snapshot, self.leaves, self._cast = self._before

    def normalizes_batches(self) -> bool:
        """Tell whether the loss of a batch is no mean over its items, because of a BatchNorm."""
        return bool(self._norms_by_batch())

    def batch_statistics(self) -> str:
        """Say whose batches a BatchNorm takes its statistics from, if there are several ranks."""
        norms = self._norms_by_batch()
        if self.ranks.size == 1 or not norms:
            return ""
        alone = any(not is_synchronised([norm]) for norm in norms)
        return "of each rank's own batch" if alone else "of the batches of all ranks"

    def _norms_by_batch(self) -> list[nn.Module]:
        assert self._snapshot is not None
        norms = [
            m for m in self._snapshot.modules if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        return [m for m in norms if m.training or m.running_mean is None]

    def on(self, part: Part, ranks: Ranks | None = None) -> Replay:
        """Return the same loss on another batch, for use while this one is opened."""
        other = type(self)(self._model, self._loss_fn, [part], layout=self.layout, ranks=ranks)
        other._snapshot, other.leaves, other._cast = self._snapshot, self.leaves, self._cast
        other._weigh_window()
        self.kept = None
        return other

    def _weigh_window(self) -> None:
        self.total = self.ranks.total(sum(part.weight for part in self.window))
        if self.total == 0:
            raise UsageError(f"window must hold items, got {len(self.window)} batches without any.")
        if self.ranks.size > 1 and is_synchronised(self._model.modules()):
            weighing = sum(part.weight > 0 for part in self.window)
            counts = self.ranks.each(weighing)
            if len(set(counts)) > 1:
                raise WithheldError(
                    "a SyncBatchNorm waits for all ranks, so that each needs as many batches, got "
                    f"{', '.join(f'{count:g}' for count in counts)}"
                )

    def changed_objects(self) -> list[str]:
        """Name Python state that the loss changed and that can't be put back."""
        return self._snapshot.changed_objects() if self._snapshot else []

    def mean(self, of: Callable[[Part], tuple[Tensor, ...]], *totals: Tensor) -> tuple[Tensor, ...]:
        """Return the weighted mean of what `of` returns for each batch, over all ranks.

        Its tensors are summed up in `totals`, which hold zeros. State runs on through the window,
        as in training.
        """

        def own() -> tuple[Tensor, ...]:
            self.start()
            for part in self.window:
                share = part.weight / self.total
                if share > 0:  # a rank may be without items
                    with self._shared(share):
                        found = of(part)
                    for total, x in zip(totals, found, strict=True):
                        total.add_(x.detach().to(total), alpha=share)
            return totals

        return self.ranks.sum(own)

    def mean_of_kept(self, v: Tensor, total: Tensor) -> Tensor:
        """Return the mean of `kept(v)`, of a window of one batch, without another evaluation."""

        def own() -> tuple[Tensor]:
            assert self.kept is not None
            handle_signals()
            share = self.window[0].weight / self.total
            with self._shared(share):
                return (total.add_(self.kept(v).to(total), alpha=share),)

        return self.ranks.sum(own)[0]

    @contextlib.contextmanager
    def _shared(self, share: float) -> Iterator[None]:
        """Let norms see the batches that the other ranks evaluate at this moment."""
        with until_here():
            if self.ranks.size > 1:
                # Not in a variable of this thread: a backward pass on a GPU, which may evaluate
                # checkpointed layers again, has threads of its own.
                swap(nn.SyncBatchNorm, "forward", shared(share))
            yield

    def start(self) -> None:
        """Go back to the state that every evaluation of the window starts from."""
        if self._snapshot is None:
            raise RuntimeError("an Objective is used inside its `with` block only")
        handle_signals()
        self.kept = None
        self._snapshot.start()
        if self._displacement is not None:
            pieces = self.leaves.unflatten(self._displacement)
            for p, piece in zip(self.leaves.params, pieces, strict=True):
                p.data.add_(piece)

    def evaluate(self, part: Part) -> Tensor:
        """Return the loss of one batch, a scalar with its graph."""
        try:
            loss = users(self._loss_fn, self._model, batches.fresh_copy(part.batch, self._cast))
        except RuntimeError as error:
            explain_device(error, part.batch, self.layout.device)
            raise
        except (TypeError, AttributeError) as error:
            if takes_the_model_for_outputs(error, self._model):
                raise took_the_model_for_outputs(error, self._loss_fn) from error
            raise
        loss = check_loss(loss)
        return loss if part.factor == 1 else part.factor * loss

    def gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient of a loss that `evaluate` has returned."""  # (D,)
        return self.leaves.flatten(gradients(loss, self.leaves, create_graph=False))

    def differentiates_once(self) -> bool:
        """Tell whether a plain backward works, on this rank. One gradient of its first batch."""
        try:
            self.start()
            part = next(part for part in self.window if part.weight > 0)
            with self._shared(1.0):
                self.gradient(self.evaluate(part))
        except Exception:  # for whoever has met one before to report
            return False
        return True

    @contextlib.contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """Evaluate at w + displacement; the weights are back afterwards."""
        assert self._snapshot is not None
        with until_here():
            # by copy: adding and subtracting would leave rounding behind
            later(self._snapshot.restore)
            later(partial(setattr, self, "_displacement", None))
            self._displacement = displacement
            yield
