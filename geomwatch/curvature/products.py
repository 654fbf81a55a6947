"""Products with the Hessian of a loss, by whatever way there is to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from geomwatch.curvature.double_backward import DoubleBackwardError, gradients, product
from geomwatch.curvature.finite_difference import FiniteDifference, NotSmoothError, OneSided
from geomwatch.curvature.gauss_newton import GaussNewton, outputs_noted
from geomwatch.curvature.replay import Replay
from geomwatch.errors import NoCurvatureError, UsageError

Product = Callable[[Tensor], Tensor]  # (D,) -> (D,)
RANDOM = "random"  # a direction that is neither the gradient's nor a Krylov vector of it


class Products:
    """The gradient of the loss that a Replay evaluates, and H v or G v.

    "one_sided": by one difference a product from the gradient at w. Else double backward; where an
    operation has no second derivative, central differences of gradients at the precision of the
    leaves, and where those find kinks in float64. That is told by what happens, not by what is
    said: whatever error double backward ends with, a plain backward does without.
    """

    def __init__(
        self,
        replay: Replay,
        *,
        operator: str,
        hvp: str,
        is_part: bool,
        once: bool,
        bends: dict[str, float] | None = None,
    ) -> None:
        self._replay = replay
        self._operator, self._hvp = operator, hvp
        self._is_part = is_part  # of a loss whose model is not its own to recast
        self._once = once  # one gradient or product is wanted: no graph is worth its memory
        self._first: tuple[Tensor, Tensor] | None = None  # loss and gradient
        self._difference: FiniteDifference | None = None
        self._one_sided: OneSided | None = None
        self._bends = {} if bends is None else bends
        self._graphless = False  # the gradient could not be had with its graph
        self.fallback = ""  # why it is not double backward
        self.obstacle = ""  # why there are no products at all

    @property
    def backend(self) -> str:
        """The way they are computed, as far as is known."""
        if self.obstacle:
            return "none"
        if self._hvp == "one_sided":
            return "one_sided"
        return "double_backward" if self._difference is None else "finite_difference"

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return both, of the whole window."""  # (), (D,)
        if self._first is None:
            layout = self._replay.layout
            loss, gradient = self._replay.mean(self._of_batch, layout.number(), layout.zeros())
            self._first = loss, gradient
        return self._first

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return it in the precision it is computed in: differences need all of it."""

        def of(batch: Any) -> tuple[Tensor]:
            return (self._replay.gradient(self._replay.evaluate(batch)),)

        with self._replay.displaced(displacement):
            total = torch.zeros_like(displacement, dtype=self._replay.leaves.dtype)
            return self._replay.mean(of, total)[0]

    def _of_batch(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return loss and gradient of a batch; the graph is kept if a product can use it.

        Lacking a graph is for a product to report.
        """
        if self._keeps_graph and self._operator == "hessian":
            try:
                self._replay.kept, loss, gradient = self._build(batch)
                return loss, gradient
            except DoubleBackwardError:  # it may do without a graph
                self._graphless = True
                self._replay.start()
        loss = self._replay.evaluate(batch)
        return loss, self._replay.gradient(loss)

    def adopt(self, loss: float, gradient: Tensor) -> None:
        """Take loss and gradient from who knows them already."""
        self._first = gradient.new_tensor(loss), gradient

    def __call__(self, v: Tensor, like: str = "top") -> Tensor:
        """Return H v or G v.

        Raises:
            NoCurvatureError: by no way, now or before.
            UsageError: `operator="ggn"` does not fit the loss.
        """  # (D,) -> (D,)
        if self.obstacle:
            raise NoCurvatureError(self.obstacle)
        if self._hvp == "one_sided":
            return self._by_one(v, like)
        if self._difference is None and self._hvp == "finite_difference":
            self._use_differences(self._replay.why_differences)
        if self._difference is None:
            try:
                return self._double_backward(v)
            except Exception as error:  # of which all ranks have to make the same
                if not self._lacks_second_derivative(error):
                    raise
                if self._hvp != "auto":
                    self._give_up(f"no double backward: {error}", error)
                self._use_differences(f"no double backward: {error}")
        return self._by_differences(v)

    def _lacks_second_derivative(self, error: Exception) -> bool:
        """Tell, by trying, whether a backward fails for its graph alone. One gradient."""
        is_twice = isinstance(error, DoubleBackwardError)
        return self._replay.ranks.all(is_twice and self._replay.differentiates_once())

    @property
    def _keeps_graph(self) -> bool:
        by_differences = self._hvp in ("one_sided", "finite_difference")
        wanted = not by_differences and not (self._graphless or self._once)
        return len(self._replay.window) == 1 and wanted

    def _double_backward(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        # kept on every rank or on none, since all do the same
        if self._replay.kept is not None:
            return self._replay.mean_of_kept(v, total)

        def of(batch: Any) -> tuple[Tensor]:
            matrix, _, _ = self._build(batch)
            self._replay.kept = matrix if self._keeps_graph else None
            return (matrix(v),)

        return self._replay.mean(of, total)[0]

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

    def _by_one(self, v: Tensor, like: str) -> Tensor:
        dtype = self._replay.leaves.dtype
        if self._one_sided is None:
            self._refuse_narrow()
            self._one_sided = OneSided(self.loss_and_gradient()[1].to(dtype), self._bends)
        return self._one_sided(self.gradient_at, v.to(dtype), like).to(v)

    def smoothness(self, v: Tensor) -> float:
        """Return how far a one-sided difference along v is from one at a quarter of its step.

        Relative; about 1e-3 on smooth losses, and of the order of 1 where kinks are crossed. Two
        gradients or three.
        """
        product = self._by_one(v, RANDOM)
        assert self._one_sided is not None
        size, length = float(product.norm()), float(v.norm())
        if not size > 0:
            return 0.0
        step = self._one_sided.step(RANDOM) / 4
        unit = (v / length).to(self._replay.leaves.dtype)
        finer = self._one_sided.difference(self.gradient_at, unit, step).mul_(length / step)
        return float((finer.to(product) - product).norm()) / size

    def _use_differences(self, reason: str) -> None:
        if self._operator == "ggn":
            raise UsageError(
                'operator="ggn" needs double backward, which is not to be had here '
                f'({reason}). Use operator="hessian".'
            )
        self.fallback = reason
        self._refuse_narrow()
        norm = float(self.loss_and_gradient()[1].norm())
        self._difference = FiniteDifference(norm, self._replay.leaves.dtype)
        self._replay.kept = None

    def _refuse_narrow(self) -> None:
        """Give up where weights have so few digits that small steps leave them where they are."""
        narrow = {p.dtype for p in self._replay.leaves.params if p.dtype.itemsize < 4}
        if narrow:
            self._give_up(
                f"differences of gradients are all rounding in {narrow.pop()}; "
                "precision='float32' or hvp='double_backward' do without"
            )

    def _by_differences(self, v: Tensor) -> Tensor:
        assert self._difference is not None
        try:
            return self._difference(self.gradient_at, v.to(self._replay.leaves.dtype)).to(v)
        except NotSmoothError as error:
            # A part leaves the model to the objective it belongs to.
            if self._is_part or not self._replay.can_recast:
                self._give_up(f"{self.fallback}; {error}", error)
            kinks = str(error)
        # A step of 1e-6 of the gradient crosses no kink, and float64 can resolve it.
        self._replay.kept = None
        try:
            with self._replay.ranks.together():
                self._replay.recast(torch.float64)
                self._use_differences(self.fallback)
                return self._difference(self.gradient_at, v.to(torch.float64)).to(v)
        except Exception as error:  # whatever a model says that is made for one precision
            self._replay.undo_recast()
            self._give_up(f"{self.fallback}; {kinks}; in float64: {error}", error)

    def _give_up(self, obstacle: str, error: Exception | None = None) -> NoReturn:
        self.obstacle = obstacle
        raise NoCurvatureError(obstacle) from error
