"""One loss at one point: its value, gradient, and products with its Hessian."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.checks import check_count, check_options
from geomwatch.distributed import Ranks
from geomwatch.double_backward import gradients, lacks_second_derivative, product
from geomwatch.errors import UsageError
from geomwatch.finite_difference import FiniteDifference, NotSmoothError
from geomwatch.gauss_newton import GaussNewton, outputs_noted
from geomwatch.padding import padding_mask
from geomwatch.replay import LossFn as LossFn
from geomwatch.replay import Replay
from geomwatch.vectors import Layout

_SMALLEST_PART = 16  # items

Product = Callable[[Tensor], Tensor]  # (D,) -> (D,)


class Objective:
    """The loss of `model` on a window of batches, as a deterministic function of the weights.

    L(w) = sum_b n_b loss_fn(model, b) / sum_b n_b over the batches b of the window and, where the
    model trains on several, over `ranks`. n_b are the items of a batch, or what
    `loss_fn.weight(b)` says if there is such a thing (the tokens that a loss averages over, say).
    A context manager: inside, the model is isolated (see `isolation`) and every evaluation replays
    one random state, so dropout draws the same masks again, other ones for each batch.

    Products are with the Hessian, by double backward, H v = grad(<grad L, v>) (Pearlmutter 1994).
    For one batch the graph of the gradient is built once and kept: a product then costs 1.2-2.2
    training steps. For several it is built anew for each batch and product (about 3), so that
    memory stays that of one batch. Where an operation has no second derivative, `hvp="auto"` goes
    over to differences of gradients, in float32 where the loss is smooth, in float64 where it has
    kinks. `operator="ggn"` makes them those with the Gauss-Newton matrix (see `gauss_newton`).

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
        operator: str = "hessian",
        hvp: str = "auto",
        precision: str = "float32",
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        check_options(loss_fn, mode=mode, operator=operator, hvp=hvp, precision=precision)
        self.layout = layout or Layout.of(model)
        self.hvps = 0
        self.items = sum(batches.items(batch) for batch in window)
        if micro_batch is not None:
            check_count("micro_batch", micro_batch, 1)
            window = [p for batch in window for p in batches.chunks(batch, micro_batch)]
        self._replay = Replay(model, loss_fn, window, layout=self.layout, also=also)
        self._ranks = ranks or Ranks()
        if self.items == 0 and self._ranks.size == 1:
            raise UsageError(f"window must hold items, got {len(window)} batches without any.")
        self._mode, self._operator, self._hvp, self._precision = mode, operator, hvp, precision
        self._dtype = dtype or (self.layout.dtype if precision == "float32" else None)
        self._stack = contextlib.ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._total = 0.0  # weight of the window, on all ranks
        self._loss: float | None = None
        self._gradient: Tensor | None = None
        self._product: Product | None = None  # of a single batch, from a graph that is kept
        self._difference: FiniteDifference | None = None
        self._fallback = ""  # why it is not double backward
        self._graphless = False  # the gradient could not be had with its graph
        self._still: Tensor | None = None  # (D,), 0 on embedding rows for padding

    def __enter__(self) -> Objective:
        self._reset()
        self._total = self._ranks.total(self._replay.weight())
        if self._total == 0:
            raise UsageError("window must hold items, got none on any rank.")
        autocast = self._precision == "training"
        opened = self._replay.opened(self._mode, autocast=autocast, dtype=self._dtype)
        modules = self._stack.enter_context(opened).modules
        self._still = padding_mask(modules, self.layout)
        return self

    def __exit__(self, *exception: object) -> None:
        self._product = None
        self._stack.close()

    @property
    def how(self) -> dict[str, str | int | float | bool]:
        """How the numbers are obtained: operator, backend, dtype, mode and items."""
        backend = "double_backward" if self._difference is None else "finite_difference"
        facts: dict[str, str | int | float | bool] = {
            "operator": self._operator,
            "backend": backend,
            "dtype": str(self._replay.leaves.params[0].dtype).removeprefix("torch."),
            "precision": self._precision,
            "mode": self._mode,
            "items": self.items,
        }
        if self._ranks.size > 1:
            facts["ranks"] = self._ranks.size
        return facts | ({"fallback": self._fallback} if self._fallback else {})

    @property
    def changed_objects(self) -> list[str]:
        """Python state that the loss changed and that can't be put back."""
        return self._replay.changed_objects()

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
            self._product = None

            def part() -> tuple[Tensor, Tensor]:
                losses, total = self.layout.number(), self.layout.zeros()
                for share, batch in self._sweep():
                    loss, flat = self._differentiate_once(batch)
                    losses.add_(loss.detach(), alpha=share)
                    total.add_(flat.to(total), alpha=share)
                return losses, total

            loss, self._gradient = self._ranks.sum(part)
            self._loss = float(loss)
        return self._gradient

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v, H the Hessian of L, or G v. One HVP.

        Rows that an Embedding keeps still for padding are left out of H.

        Raises:
            NotSmoothError: there is no double backward, and differences do not agree either.
            UsageError: `operator="ggn"` does not fit the loss.
        """  # (D,) -> (D,)
        self.hvps += 1
        if self._still is None:
            return self._times(v)
        return self._still * self._times(self._still * v)

    def _times(self, v: Tensor) -> Tensor:
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
        def part() -> tuple[Tensor]:
            total = torch.zeros_like(v)
            if self._product is not None:
                total.add_(self._product(v).to(v), alpha=self._replay.weight() / self._total)
                return (total,)
            for share, batch in self._sweep():
                product_with, _, _ = self._build(batch)
                total.add_(product_with(v).to(v), alpha=share)
                self._product = product_with if self._keeps_graph else None
            return (total,)

        return self._ranks.sum(part)[0]

    def _use_differences(self, reason: str) -> None:
        if self._operator == "ggn":
            raise UsageError(
                'operator="ggn" needs double backward, which is not to be had here '
                f'({reason}). Use operator="hessian".'
            )
        self._fallback = reason
        norm = float(self.gradient().norm())
        self._difference = FiniteDifference(self._gradient_at, norm, self._replay.leaves.dtype)
        self._product = None

    def _by_differences(self, v: Tensor) -> Tensor:
        assert self._difference is not None
        try:
            return self._difference(v.to(self._replay.leaves.dtype)).to(v)
        except NotSmoothError:
            # A part leaves the model to the objective it belongs to.
            if self._replay.is_recast or self._is_part:
                raise
        # A step of 1e-6 of the gradient crosses no kink, and float64 can resolve it.
        self._product = None
        with self._ranks.together():
            self._replay.recast(torch.float64)
        self._use_differences(self._fallback)
        return self._difference(v.to(torch.float64)).to(v)

    def loss_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement); the weights are back when it returns. One forward pass."""

        def part() -> tuple[Tensor]:
            total = self.layout.number()
            # With its graph, since a loss may differentiate itself (as in a gradient penalty).
            for share, batch in self._sweep():
                total.add_(self._replay.evaluate(batch).detach(), alpha=share)
            return (total,)

        with self._replay.displaced(displacement):
            return float(self._ranks.sum(part)[0])

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient at w + displacement. One forward and backward pass."""  # (D,)
        return self._gradient_at(displacement).to(displacement)

    def _gradient_at(self, displacement: Tensor) -> Tensor:
        """Return it in the precision it is computed in: differences need all of it."""
        leaves = self._replay.leaves

        def part() -> tuple[Tensor]:
            total = torch.zeros_like(displacement, dtype=leaves.dtype)
            for share, batch in self._sweep():
                loss = self._replay.evaluate(batch)
                total.add_(leaves.flatten(gradients(loss, leaves, create_graph=False)), alpha=share)
            return (total,)

        with self._replay.displaced(displacement):
            return self._ranks.sum(part)[0]

    def part(self, share: int) -> Objective | None:
        """Return the same loss on the first 1/`share` of the items, for use inside this block.

        A coarse stand-in at 1/`share` of the cost, never a number to report. None where the
        window has several batches or too few items.
        """
        window = self._replay.window
        fits = len(window) == 1 and self.items >= _SMALLEST_PART * share
        if not self._ranks.all(fits):
            return None
        return self._on(batches.head(window[0], self.items // share), self._ranks)

    def pieces(self, count: int, rng: torch.Generator) -> list[Objective]:
        """Return the same loss on each micro-batch: those of the window, or `count` random ones.

        For the spread of their gradients, inside this block and on this rank. Empty where there
        are not two items for each.
        """
        window = self._replay.window
        if len(window) > 1:
            return [self._on(batch) for batch in window]
        if self.items < 2 * count:
            return []
        return [self._on(piece) for piece in batches.cut(window[0], count, rng)]

    def _on(self, batch: Any, ranks: Ranks | None = None) -> Objective:
        part = copy.copy(self)
        part._reset()
        part._replay, part._still, part._is_part = self._replay.on(batch), self._still, True
        part.items, part.hvps, part._ranks = batches.items(batch), 0, ranks or Ranks()
        part._total = part._ranks.total(part._replay.weight())
        self._product = None  # as in _sweep, which the part does on its own
        return part

    def is_finite(self) -> bool:
        """Tell whether loss and gradient are finite, so that curvature has a meaning."""
        # NaN and Inf reach the norm, which is 20 times faster than to ask each element.
        return math.isfinite(self.loss()) and math.isfinite(float(self.gradient().norm()))

    @property
    def _keeps_graph(self) -> bool:
        wanted = self._hvp != "finite_difference" and not self._graphless
        return len(self._replay.window) == 1 and wanted

    def _sweep(self) -> Iterator[tuple[float, Any]]:
        # The graph that is kept shares the buffers and weights that a forward pass may change.
        self._product = None
        for weight, batch in self._replay.sweep():
            if weight > 0:  # a rank may be without items
                yield weight / self._total, batch

    def _build(self, batch: Any) -> tuple[Product, Tensor, Tensor]:
        """Evaluate with a graph; return the product it allows, the loss and its gradient."""
        leaves = self._replay.leaves
        if self._operator == "ggn":
            with outputs_noted(self._replay.model) as outputs:
                loss = self._replay.evaluate(batch)
            matrix = GaussNewton(loss, outputs, leaves)
            return matrix, loss, leaves.flatten(matrix.gradient)
        loss = self._replay.evaluate(batch)
        graph = gradients(loss, leaves, create_graph=True)
        return lambda v: product(graph, leaves, v), loss, leaves.flatten(graph)

    def _differentiate_once(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Keep the graph if there is one; lacking it is for `hvp` to report."""
        if self._keeps_graph and self._operator == "hessian":
            try:
                self._product, loss, gradient = self._build(batch)
                return loss, gradient
            except RuntimeError as error:
                if not lacks_second_derivative(error):
                    raise
                self._graphless = True
        loss = self._replay.evaluate(batch)
        leaves = self._replay.leaves
        return loss, leaves.flatten(gradients(loss, leaves, create_graph=False))
