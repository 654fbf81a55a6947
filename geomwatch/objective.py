"""One loss on one batch at one point: its value, gradient and Hessian-vector products."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.checks import check_loss, check_options, explain_device, find_once_differentiable
from geomwatch.errors import UsageError
from geomwatch.isolation import captured_by, isolated
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
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Any],
        *,
        layout: Layout | None = None,
        mode: str = "train",
        also: nn.Module | Sequence[object] = (),
    ) -> None:
        check_options(loss_fn, mode)
        self.layout = layout or Layout.of(model)
        self.hvps = 0
        self.items = sum(batches.items(batch) for batch in window)
        if self.items == 0:
            raise UsageError(f"window must hold items, got {len(window)} batches without any.")
        self._model = model
        self._loss_fn = loss_fn
        self._window = list(window)
        self._mode = mode
        used = [also] if isinstance(also, nn.Module) else also
        self._others = [*used, *captured_by(loss_fn)]
        self._stack = contextlib.ExitStack()
        self._snapshot: Snapshot | None = None
        self._graph: list[Tensor] | None = None  # d loss / d param with graph, of a single batch
        self._loss: float | None = None
        self._gradient: Tensor | None = None
        self._displacement: Tensor | None = None
        self._obstacle: str | None = None  # to a second derivative

    def __enter__(self) -> Objective:
        self._loss = self._gradient = None
        self._snapshot = self._stack.enter_context(
            isolated(self._model, self.layout.params, others=self._others, mode=self._mode)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._graph = self._snapshot = None
        self._stack.close()

    @property
    def how(self) -> dict[str, str | int | float | bool]:
        """How the numbers are obtained: backend, dtype, mode and items."""
        return {
            "backend": "double_backward",
            "dtype": str(self.layout.dtype).removeprefix("torch."),
            "mode": self._mode,
            "items": self.items,
        }

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
                loss, graph = self._differentiate(batch, create_graph=self._keeps_graph)
                losses.append(weight * loss.detach())
                total.add_(self.layout.flatten(graph), alpha=weight)
                self._graph = graph if self._keeps_graph else None
            self._loss = sum(torch.stack(losses).tolist())
            self._gradient = total
        return self._gradient

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, H the Hessian of L. One HVP."""  # (D,) -> (D,)
        self.hvps += 1
        if self._graph is not None:
            return self._differentiate_again(self._graph, v)
        total = torch.zeros_like(v)
        for weight, batch in self._sweep():
            _, graph = self._differentiate(batch, create_graph=True)
            total.add_(self._differentiate_again(graph, v), alpha=weight)
            self._graph = graph if self._keeps_graph else None
        return total

    def loss_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement); the weights are back when it returns. One forward pass."""
        with self._displaced(displacement):
            # With its graph, since a loss may differentiate itself (as in a gradient penalty).
            losses = [weight * self._evaluate(batch).detach() for weight, batch in self._sweep()]
            total: float = sum(torch.stack(losses).tolist())
            return total

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient at w + displacement. One forward and backward pass."""  # (D,)
        with self._displaced(displacement):
            total = torch.zeros_like(displacement)
            for weight, batch in self._sweep():
                _, gradient = self._differentiate(batch, create_graph=False)
                total.add_(self.layout.flatten(gradient), alpha=weight)
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
        piece = batches.head(self._window[0], self.items // share)
        part = Objective(self._model, self._loss_fn, [piece], layout=self.layout, mode=self._mode)
        part._snapshot = self._snapshot
        self._graph = None  # as in _sweep, which the part does on its own
        return part

    def is_finite(self) -> bool:
        """Tell whether loss and gradient are finite, so that curvature has a meaning."""
        # NaN and Inf reach the norm, which is 20 times faster than to ask each element.
        return math.isfinite(self.loss()) and math.isfinite(float(self.gradient().norm()))

    @property
    def _keeps_graph(self) -> bool:
        return len(self._window) == 1

    def _sweep(self) -> Iterator[tuple[float, Any]]:
        """Yield each batch with its weight; state runs on through the window, as in training."""
        if self._snapshot is None:
            raise RuntimeError("an Objective is used inside its `with` block only")
        # The graph that is kept shares the buffers and weights that a forward pass may change.
        self._graph = None
        self._snapshot.restore()
        if self._displacement is not None:
            for p, piece in zip(
                self.layout.params, self.layout.unflatten(self._displacement), strict=True
            ):
                p.data.add_(piece)
        for batch in self._window:
            yield batches.items(batch) / self.items, batch

    def _differentiate(self, batch: Any, *, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        loss = self._evaluate(batch)
        params = self.layout.params
        found = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        if all(g is None for g in found):
            raise UsageError(
                "loss_fn must return a loss that depends on the model's parameters, got one that "
                f"depends on none of the {len(params)} measured. Use the model it is called with."
            )
        if create_graph:
            self._obstacle = find_once_differentiable(loss, found)
        gradients = zip(params, found, strict=True)
        return loss, [torch.zeros_like(p) if g is None else g for p, g in gradients]

    def _differentiate_again(self, graph: Sequence[Tensor], v: Tensor) -> Tensor:
        if self._obstacle is not None:
            raise RuntimeError(
                f"{self._obstacle} in the loss has no second derivative: its backward is marked "
                "once_differentiable. Write that backward with differentiable operations."
            )
        # A gradient without grad_fn is constant in the parameters: its rows of H are zero.
        rows = [
            (g, piece)
            for g, piece in zip(graph, self.layout.unflatten(v), strict=True)
            if g.requires_grad
        ]
        if not rows:
            return torch.zeros_like(v)
        outputs, pieces = zip(*rows, strict=True)
        hv = torch.autograd.grad(
            outputs, self.layout.params, pieces, retain_graph=True, materialize_grads=True
        )
        return self.layout.flatten(hv)

    def _evaluate(self, batch: Any) -> Tensor:
        try:
            loss = self._loss_fn(self._model, batches.fresh_copy(batch))
        except RuntimeError as error:
            explain_device(error, batch, self.layout.device)
            raise
        return check_loss(loss)
