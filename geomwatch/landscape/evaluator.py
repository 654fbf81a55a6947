"""The loss of a model wherever its weights are put, by forward passes alone."""

from __future__ import annotations

import contextlib
import logging
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.curvature.checks import check_loss_fn, explain_device
from geomwatch.curvature.cutting import Cutter
from geomwatch.curvature.micro_batches import check_micro_batches
from geomwatch.curvature.settings import LossFn, Settings
from geomwatch.curvature.subject import Subject
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.isolation.isolation import isolate
from geomwatch.isolation.precision import recast
from geomwatch.isolation.reach import captured_by, generators_in
from geomwatch.isolation.signals import users
from geomwatch.isolation.snapshot import Snapshot
from geomwatch.isolation.undo import later, until_here
from geomwatch.landscape.data import Batches
from geomwatch.landscape.provenance import same
from geomwatch.landscape.states import tensors_of
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import Layout

logger = logging.getLogger("geomwatch")

_FEW, _SAME = 4, 1e-4  # items that tell whether a loss needs a graph, and how alike it is then


class Evaluator:
    """L(w) = sum_b n_b loss_fn(model, b) / sum_b n_b wherever `place` puts w; see `evaluating`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Batches,
        how: Settings,
        layout: Layout,
        snapshot: Snapshot,
        cast: torch.dtype | None,
        cutter: Cutter,
    ) -> None:
        self.layout = layout  # of the parameters, or of their stand-ins at another precision
        self._model, self._loss_fn, self._data = model, loss_fn, data
        self._how, self._snapshot, self._cast = how, snapshot, cast
        self._passes, self._items = 0, 0.0  # in all, and of the last one
        weigh = getattr(loss_fn, "weight", None)
        self._weigh: Callable[[Any], float] | None = weigh if callable(weigh) else None
        self._cutter = cutter
        self._graph = False
        self._graph = self._needs_graph()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensors that a state_dict names."""
        return tensors_of(self._model.state_dict(keep_vars=True))

    @property
    def facts(self) -> dict[str, Any]:
        """What was spent, on how many items, and at which precision."""
        return {
            "items": self._items,
            "passes": self._passes,
            "precision": self._how.precision,
            "dtype": str(self.layout.params[0].dtype).removeprefix("torch."),
        }

    def loss(self, place: Callable[[], None]) -> float:
        """Return L where `place` puts the weights, from the same random state each time.

        One forward pass over the batches. Not finite where the loss is not.
        """
        self.restore()
        place()
        self._passes += 1
        losses, weights = [], []
        for batch in self._data:
            for part in self._cutter.window([batch], self._how.micro_batch, self._weigh, None):
                weights.append(part.weight)
                losses.append(part.factor * self.evaluate(part.batch))
        self._items = sum(weights)
        if not self._items > 0:
            raise UsageError(f"batches must hold items, got {len(weights)} batches without any.")
        values: list[float] = torch.stack(losses).tolist()  # one transfer
        return sum(w * x for w, x in zip(weights, values, strict=True) if w) / self._items

    def restore(self) -> None:
        """Put back weights, buffers and random state."""
        self._snapshot.restore()

    def evaluate(self, batch: Any) -> Tensor:
        """Return the loss of one batch where the weights are now, without a graph."""
        with torch.set_grad_enabled(self._graph):
            return self.differentiable(batch).detach()

    def differentiable(self, batch: Any) -> Tensor:
        """Return the loss of one batch, with a graph where grad is enabled."""
        try:
            loss = users(self._loss_fn, self._model, batches.fresh_copy(batch, self._cast))
        except Exception as error:  # explained where it can be, and passed on
            self._data.explain(error)
            if isinstance(error, RuntimeError):
                explain_device(error, batch, self.layout.device)
            raise
        return _scalar(loss, self.layout.device)

    def mover(self, vectors: Sequence[Tensor]) -> Callable[[Sequence[float]], None]:
        """Return a function of coordinates a that moves the weights by sum_i a_i v_i.

        In place and term by term: no vector of size D is made for it.
        """
        pieces = [self.layout.unflatten(v) for v in vectors]

        def move(coordinates: Sequence[float]) -> None:
            for a, piece in zip(coordinates, pieces, strict=True):
                for p, v in zip(self.layout.params, piece, strict=True):
                    if a:
                        p.data.add_(v, alpha=a)

        return move

    def _needs_graph(self) -> bool:
        """Tell whether the loss is another one without a graph, on a few items.

        It fails where it differentiates itself, as a gradient penalty does; it differs where code
        asks whether grad is enabled.
        """
        first = self._data.first()
        few = self._cutter.head(first, _FEW)
        try:
            with_graph = self._replayed(few, graph=True)
        except Exception:  # it insists on the whole batch
            return False
        try:
            without, again = (self._replayed(few, graph=False) for _ in range(2))
        except RuntimeError:
            return True
        return same(without, again) and not same(without, with_graph, _SAME)

    def _replayed(self, batch: Any, *, graph: bool) -> float:
        self.restore()
        with torch.set_grad_enabled(graph):
            return float(self.differentiable(batch).detach())


@contextlib.contextmanager
def evaluating(
    model: nn.Module,
    loss_fn: LossFn,
    data: object,
    how: Settings,
    layout: Layout | None = None,
) -> Iterator[Evaluator]:
    """Isolate the model and evaluate its loss at other weights; all is put back at the end.

    The world is that of a probe (see `isolation`), also when it is left by a KeyboardInterrupt.
    Holds one copy of weights and buffers, another one at `precision` "float32" of narrower weights.
    `layout` are the trainable parameters that will be moved; without it all of them are, and the
    frozen ones too. Of `how` precision, mode, micro_batch and also count.
    """
    check_loss_fn(loss_fn)
    given = Batches(data)
    drawn = generators_in(model, loss_fn, how.also)
    others = [*how.also, *captured_by(loss_fn), *given.generators, *drawn]
    with until_here():
        if layout is None:
            layout = _everything(model)
        subject = Subject(model, loss_fn, layout, how, Ranks())
        if how.micro_batch is not None:
            check_micro_batches(subject, given.first())
        autocast = how.precision == "training"
        snapshot = isolate(model, layout.params, others=others, mode=how.mode, autocast=autocast)
        cast = None
        if not autocast and any(p.dtype != layout.dtype for p in layout.params):
            cast = layout.dtype
            stand_in = recast(snapshot.modules, cast)
            layout = Layout(layout.names, tuple(stand_in(p) for p in layout.params))
            snapshot = snapshot.anew()
        yield Evaluator(model, loss_fn, given, how, layout, snapshot, cast, subject.cutter)
        for name in snapshot.changed_objects():
            logger.warning(
                "evaluating the loss changes %s, which can't be put back. Pass a loss_fn= that "
                "leaves it alone, or name its owner in also=(...).",
                name,
            )


def _everything(model: nn.Module) -> Layout:
    """Lay out all parameters, and put back frozen ones, which a snapshot leaves out when large."""
    named = dict(model.named_parameters())
    if not named:
        raise UsageError(f"model must have parameters, got {type(model).__name__} without any.")
    frozen = [(p, p.detach().clone()) for p in named.values() if not p.requires_grad]

    def put_back() -> None:
        for p, values in frozen:
            p.data.copy_(values)

    later(put_back)
    return Layout(tuple(named), tuple(named.values()))


def _scalar(loss: object, device: torch.device) -> Tensor:
    if isinstance(loss, numbers.Real):  # an error rate, say
        return torch.tensor(float(loss), device=device)
    if not isinstance(loss, Tensor):
        raise UsageTypeError(
            f"loss_fn must return a scalar tensor or a number, got {type(loss).__name__} {loss!r}."
        )
    if loss.numel() != 1:
        raise UsageError(
            f"loss_fn must return a scalar tensor, got shape {tuple(loss.shape)}. "
            "Reduce it the way you train on it, for example loss.mean()."
        )
    return loss.reshape(())
