"""One loss on one batch at one point: its value, gradient and Hessian-vector products."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.checks import check_count, check_loss, check_options, explain_device
from geomwatch.double_backward import gradients, lacks_second_derivative, product
from geomwatch.errors import UsageError
from geomwatch.finite_difference import FiniteDifference, NotSmoothError
from geomwatch.isolation import captured_by, isolated
from geomwatch.recast import recast
from geomwatch.snapshot import Snapshot
from geomwatch.vectors import Layout

_SMALLEST_PART = 16  # items

LossFn: TypeAlias = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar


class Objective:
    """The loss of `model` on a window of batches, as a deterministic function of the weights.

    L(w) = sum_b n_b loss_fn(model, b) / sum_b n_b over the batches b of the window, n_b their
    items. A context manager: inside, the model is isolated (see `isolation`) and every evaluation
    replays one random state, so dropout draws the same masks again, other ones for each batch.

    HVPs are double backward, H v = grad(<grad L, v>) (Pearlmutter 1994). For one batch the graph
    of the gradient is built once and kept: an HVP then costs 1.2-2.2 training steps. For several
    it is built anew for each batch and HVP (about 3), so that memory stays that of one batch.
    Where an operation has no second derivative, `hvp="auto"` goes over to differences of
    gradients, in float32 where the loss is smooth, in float64 where it has kinks.

    `micro_batch` cuts the batches further, so that memory is that of so many items.

    Everything is computed at `dtype`, by default that of the parameters, but at least float32, and
    without autocast; `precision="training"` leaves both as they are in training.
    """

    _is_part = False  # of another objective, in whose block it is used

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Any],
        *,
        layout: Layout | None = None,
        mode: str = "train",
        also: nn.Module | Sequence[object] = (),
        hvp: str = "auto",
        precision: str = "float32",
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(loss_fn, mode, hvp, precision)
        self.layout = layout or Layout.of(model)
        self.hvps = 0
        self.items = sum(batches.items(batch) for batch in window)
        if self.items == 0:
            raise UsageError(f"window must hold items, got {len(window)} batches without any.")
        self._model = model
        self._loss_fn = loss_fn
        self._window = list(window)
        if micro_batch is not None:
            check_count("micro_batch", micro_batch, 1)
            self._window = [p for batch in window for p in batches.chunks(batch, micro_batch)]
        self._mode = mode
        used = [also] if isinstance(also, nn.Module) else also
        self._others = [*used, *captured_by(loss_fn)]
        self._stack = contextlib.ExitStack()
        self._snapshot: Snapshot | None = None
        self._graph: list[Tensor] | None = None  # d loss / d param with graph, of a single batch
        self._loss: float | None = None
        self._gradient: Tensor | None = None
        self._displacement: Tensor | None = None
        self._hvp = hvp
        self._precision = precision
        self._dtype = dtype or (self.layout.dtype if precision == "float32" else None)
        self._leaves = self.layout  # what is differentiated: the parameters, or their stand-ins
        self._cast: torch.dtype | None = None  # of the batches, with stand-ins
        self._difference: FiniteDifference | None = None
        self._still: Tensor | None = None  # (D,), 0 on embedding rows for padding
        self._fallback = ""  # why it is not double backward
        self._graphless = False  # the gradient could not be had with its graph

    def __enter__(self) -> Objective:
        self._loss = self._gradient = self._difference = self._cast = None
        self._leaves, self._fallback, self._graphless = self.layout, "", False
        self._snapshot = self._stack.enter_context(
            isolated(
                self._model,
                self.layout.params,
                others=self._others,
                mode=self._mode,
                autocast=self._precision == "training",
            )
        )
        self._still = _padding_mask(self._snapshot.modules, self.layout)
        if self._dtype is not None and any(p.dtype != self._dtype for p in self.layout.params):
            self._recast(self._dtype)
        return self

    def __exit__(self, *exception: object) -> None:
        self._graph = self._snapshot = None
        self._stack.close()

    @property
    def how(self) -> dict[str, str | int | float | bool]:
        """How the numbers are obtained: backend, dtype, mode and items."""
        backend = "double_backward" if self._difference is None else "finite_difference"
        facts: dict[str, str | int | float | bool] = {
            "backend": backend,
            "dtype": str(self._leaves.params[0].dtype).removeprefix("torch."),
            "precision": self._precision,
            "mode": self._mode,
            "items": self.items,
        }
        return facts | ({"fallback": self._fallback} if self._fallback else {})

    @property
    def changed_objects(self) -> list[str]:
        """Python state that the loss changed and that can't be put back."""
        return self._snapshot.changed_objects() if self._snapshot else []

    def loss(self) -> float:
        """Return L(w). Costs a forward and a backward pass, shared with `gradient`."""
        if self._loss is None:
            self.gradient()
        assert self._loss is not None
        return self._loss

    def gradient(self) -> Tensor:
        """Return the gradient of L.

        Raises:
            UsageError: the loss is no scalar tensor that depends on the parameters.
        """  # (D,)
        if self._gradient is None:
            losses = []
            total = torch.zeros(self.layout.dim, dtype=self.layout.dtype, device=self.layout.device)
            for weight, batch in self._sweep():
                loss, graph = self._differentiate_once(batch)
                losses.append(weight * loss.detach())
                total.add_(self._flatten(graph), alpha=weight)
                self._graph = graph if self._keeps_graph else None
            self._loss = sum(torch.stack(losses).tolist())
            self._gradient = total
        return self._gradient

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, H the Hessian of L. One HVP.

        Rows that an Embedding keeps still for padding are left out of H: their gradient is zeroed
        on the way, so that their part of the Jacobian is not symmetric.

        Raises:
            NotSmoothError: there is no double backward, and differences do not agree either.
        """  # (D,) -> (D,)
        self.hvps += 1
        if self._still is None:
            return self._product(v)
        return self._still * self._product(self._still * v)

    def _product(self, v: Tensor) -> Tensor:
        if self._difference is None and self._hvp == "finite_difference":
            self._use_differences("asked for")
        if self._difference is None:
            try:
                return self._double_backward(v)
            except RuntimeError as error:
                if self._hvp != "auto" or not lacks_second_derivative(error):
                    raise
                self._use_differences(f"no double backward: {error}")
        return self._by_differences(v)

    def _double_backward(self, v: Tensor) -> Tensor:
        if self._graph is not None:
            return product(self._graph, self._leaves, v).to(v)
        total = torch.zeros_like(v)
        for weight, batch in self._sweep():
            _, graph = self._differentiate(batch, create_graph=True)
            total.add_(product(graph, self._leaves, v), alpha=weight)
            self._graph = graph if self._keeps_graph else None
        return total

    def _use_differences(self, reason: str) -> None:
        self._fallback = reason
        norm = float(self.gradient().norm())
        self._difference = FiniteDifference(self._gradient_at, norm, self._leaves.dtype)
        self._graph = None

    def _by_differences(self, v: Tensor) -> Tensor:
        assert self._difference is not None
        try:
            return self._difference(v.to(self._leaves.dtype)).to(v)
        except NotSmoothError:
            # A part leaves the model to the objective it belongs to.
            if self._leaves.dtype == torch.float64 or self._is_part:
                raise
        # A step of 1e-6 of the gradient crosses no kink, and float64 can resolve it.
        self._recast(torch.float64)
        self._use_differences(self._fallback)
        return self._difference(v.to(torch.float64)).to(v)

    def _recast(self, dtype: torch.dtype) -> None:
        assert self._snapshot is not None
        stand_in = self._stack.enter_context(recast(self._snapshot.modules, dtype))
        # of the present leaves: they may be stand-ins already, at float32 for bfloat16
        params = tuple(stand_in(p) for p in self._leaves.params)
        self._leaves, self._cast = Layout(self.layout.names, params), dtype
        self._graph = None
        # Each evaluation is to start from the stand-ins, the end of the probe is not.
        self._snapshot = Snapshot([self._model, *self._others])

    def loss_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement); the weights are back when it returns. One forward pass."""
        with self._displaced(displacement):
            # With its graph, since a loss may differentiate itself (as in a gradient penalty).
            losses = [weight * self._evaluate(batch).detach() for weight, batch in self._sweep()]
            total: float = sum(torch.stack(losses).tolist())
            return total

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient at w + displacement. One forward and backward pass."""  # (D,)
        return self._gradient_at(displacement).to(displacement)

    def _gradient_at(self, displacement: Tensor) -> Tensor:
        """Return it in the precision it is computed in: differences need all of it."""
        with self._displaced(displacement):
            total = torch.zeros_like(displacement, dtype=self._leaves.dtype)
            for weight, batch in self._sweep():
                _, gradient = self._differentiate(batch, create_graph=False)
                total.add_(self._leaves.flatten(gradient), alpha=weight)
            return total

    @contextlib.contextmanager
    def _displaced(self, displacement: Tensor) -> Iterator[None]:
        assert self._snapshot is not None
        self._displacement = displacement
        try:
            yield
        finally:
            self._displacement = None
            self._snapshot.restore()  # by copy: adding and subtracting would leave rounding behind

    def part(self, share: int) -> Objective | None:
        """Return the same loss on the first 1/`share` of the items, for use inside this block.

        A coarse stand-in at 1/`share` of the cost, never a number to report. None where the
        window has several batches or too few items.
        """
        if len(self._window) != 1 or self.items < _SMALLEST_PART * share:
            return None
        return self._on(batches.head(self._window[0], self.items // share))

    def pieces(self, count: int, rng: torch.Generator) -> list[Objective]:
        """Return the same loss on each micro-batch: those of the window, or `count` random ones.

        For the spread of their gradients, inside this block. Empty where there are not two items
        for each.
        """
        if len(self._window) > 1:
            return [self._on(batch) for batch in self._window]
        if self.items < 2 * count:
            return []
        return [self._on(piece) for piece in batches.cut(self._window[0], count, rng)]

    def _on(self, batch: Any) -> Objective:
        part = Objective(self._model, self._loss_fn, [batch], layout=self.layout, mode=self._mode)
        part._snapshot, part._leaves, part._cast = self._snapshot, self._leaves, self._cast
        part._hvp, part._still, part._is_part = self._hvp, self._still, True
        self._graph = None  # as in _sweep, which the part does on its own
        return part

    def is_finite(self) -> bool:
        """Tell whether loss and gradient are finite, so that curvature has a meaning."""
        # NaN and Inf reach the norm, which is 20 times faster than to ask each element.
        return math.isfinite(self.loss()) and math.isfinite(float(self.gradient().norm()))

    @property
    def _keeps_graph(self) -> bool:
        wanted = self._hvp != "finite_difference" and not self._graphless
        return len(self._window) == 1 and wanted

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._leaves.flatten(tensors).to(self.layout.dtype)

    def _sweep(self) -> Iterator[tuple[float, Any]]:
        """Yield each batch with its weight; state runs on through the window, as in training."""
        if self._snapshot is None:
            raise RuntimeError("an Objective is used inside its `with` block only")
        # The graph that is kept shares the buffers and weights that a forward pass may change.
        self._graph = None
        self._snapshot.restore()
        if self._displacement is not None:
            pieces = self._leaves.unflatten(self._displacement)
            for p, piece in zip(self._leaves.params, pieces, strict=True):
                p.data.add_(piece)
        for batch in self._window:
            yield batches.items(batch) / self.items, batch

    def _differentiate(self, batch: Any, *, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        loss = self._evaluate(batch)
        return loss, gradients(loss, self._leaves, create_graph=create_graph)

    def _differentiate_once(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Build the gradient's graph if it will be kept; lacking one is for `hvp` to report."""
        if self._keeps_graph:
            try:
                return self._differentiate(batch, create_graph=True)
            except RuntimeError as error:
                if not lacks_second_derivative(error):
                    raise
                self._graphless = True
        return self._differentiate(batch, create_graph=False)

    def _evaluate(self, batch: Any) -> Tensor:
        try:
            loss = self._loss_fn(self._model, batches.fresh_copy(batch, self._cast))
        except RuntimeError as error:
            explain_device(error, batch, self.layout.device)
            raise
        return check_loss(loss)


def _padding_mask(modules: Sequence[nn.Module], layout: Layout) -> Tensor | None:
    """Return 0 on the rows of embeddings that stand for padding, 1 elsewhere; None without any."""
    rows = {
        id(m.weight): m.padding_idx
        for m in modules
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }
    if not any(id(p) in rows for p in layout.params):
        return None
    parts = []
    for p in layout.params:
        part = torch.ones_like(p, dtype=layout.dtype)
        if id(p) in rows:
            part[rows[id(p)]] = 0
        parts.append(part)
    return layout.flatten(parts)
