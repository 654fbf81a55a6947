"""One loss at one point: its value, gradient, and products with its Hessian."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature.batches import Part
from geomwatch.curvature.checks import check_loss_fn, find_kink, raw_backward
from geomwatch.curvature.cutting import Cutter, Split, Weigh, at_random, in_order
from geomwatch.curvature.locate import first_not_finite, module_of
from geomwatch.curvature.padding import padding_mask
from geomwatch.curvature.piece_check import Check, Pieces, check_mean
from geomwatch.curvature.products import Products
from geomwatch.curvature.replay import Replay
from geomwatch.curvature.settings import LossFn as LossFn
from geomwatch.curvature.settings import Settings
from geomwatch.errors import UsageError, WithheldError
from geomwatch.isolation.forward_only import forward_only
from geomwatch.isolation.outside import Outside
from geomwatch.isolation.twice_differentiable import not_compiled
from geomwatch.isolation.undo import until_here
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import Layout, generator

_SMALLEST_PART = 16  # items
_FEWEST_PIECES = 4  # that tell how micro-batches spread
_WAYS = 8  # to cut a batch that are tried


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

    Without `products` only losses and gradients are wanted: kernels stay those of training, some of
    which have no second derivative.

    Everything is computed at `dtype`, by default that of the parameters, but at least float32, and
    without autocast; `precision="training"` leaves both as they are in training. `how` has the
    other choices (see `Settings`).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        window: Sequence[Any],
        how: Settings | None = None,
        *,
        layout: Layout | None = None,
        ranks: Ranks | None = None,
        cutter: Cutter | None = None,
        weights: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        products: bool = True,
        outside: Outside | None = None,
        bends: dict[str, float] | None = None,
    ) -> None:
        check_loss_fn(loss_fn)
        self.layout = layout or Layout.of(model)
        self._how = how = how or Settings()
        self._cutter = cutter or Cutter(how.items)
        self.hvps = 0
        weigh = getattr(loss_fn, "weight", None)  # of a torch loss, class weights or None
        self._weigh: Weigh = weigh if callable(weigh) else None
        self._batches = list(window)
        parts = self._cutter.window(window, how.micro_batch, self._weigh, weights)
        self.items = sum(part.items for part in parts)
        if (ranks is None or ranks.size == 1) and self.items == 0:
            raise UsageError(f"window must hold items, got {len(window)} batches without any.")
        kind = _replay_on(self.layout)
        self._replay = kind(
            model,
            loss_fn,
            parts,
            layout=self.layout,
            also=how.also,
            ranks=ranks,
            outside=outside,
        )
        by_one = how.hvp == "one_sided"  # needs no second derivative: kernels of training
        self._products_wanted = products and not by_one
        if not self._products_wanted:
            self._replay.second_order = False
        # So that it needs a graph, as a gradient penalty does. Ranks would have to agree on trying
        # without one first.
        self._differentiates_itself = self._replay.ranks.size > 1
        # autograd.grad does not reach the shards
        hvp = "finite_difference" if self.layout.is_cut else how.hvp
        self._kind = {"operator": how.operator, "hvp": hvp}
        self._dtype = dtype or (self.layout.dtype if how.precision == "float32" else None)
        self._bends = {} if bends is None else bends
        self._block = contextlib.ExitStack()  # at whose end all is put back
        self._still: Tensor | None = None  # (D,), 0 on embedding rows for padding
        self._pieces_are_exact = False  # to be held against the whole
        self._reset()

    def _reset(self, *, is_part: bool = False, once: bool = False) -> None:
        self.hvps = 0
        self._products = Products(
            self._replay, **self._kind, is_part=is_part, once=once, bends=self._bends
        )

    def __enter__(self) -> Objective:
        self._reset()
        with until_here() as block:
            if not self._products_wanted:
                not_compiled()
            autocast = self._how.precision == "training"
            snapshot = self._replay.open(self._how.mode, autocast=autocast, dtype=self._dtype)
            self._still = padding_mask(snapshot.modules, self._replay.leaves)
            if self._replay.obstacle:
                self.forgo_hvps(self._replay.obstacle)
            self._block = block.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._block.close()

    @property
    def provenance(self) -> dict[str, str | int | float | bool]:
        """How the numbers are obtained: operator, backend, dtype, mode and items."""
        facts: dict[str, str | int | float | bool] = {
            "operator": self._kind["operator"],
            "backend": self._products.backend,
            "dtype": str(self._replay.leaves.params[0].dtype).removeprefix("torch."),
            "precision": self._how.precision,
            "mode": self._how.mode,
            "items": self.items,
        }
        if self._replay.ranks.size > 1:
            facts["ranks"] = self._replay.ranks.size
        if len(self._batches) == 1:
            facts |= self._cutter.describe(self._batches[0])
        found = {
            "fallback": self._products.fallback,
            "obstacle": self._products.obstacle,
            "batch_statistics": self._replay.batch_statistics(),
        }
        return facts | {name: why for name, why in found.items() if why}

    @property
    def ranks(self) -> Ranks:
        """The processes it is a mean over."""
        return self._replay.ranks

    @property
    def weight(self) -> float:
        """What it counts for beside others: its items, or what `loss_fn.weight` says."""
        return self._replay.total

    @property
    def obstacle(self) -> str:
        """Why there are no HVPs; "" while none has failed."""
        return self._products.obstacle

    @property
    def too_coarse(self) -> str:
        """Why differences of its losses have no meaning; "" where they have one."""
        return self._replay.obstacle

    def forgo_hvps(self, obstacle: str) -> None:
        """Spend nothing on trying again what is known to fail."""
        self._products.obstacle = obstacle

    def module_of(self, operation: str) -> str | None:
        """Name the module that an operation is in. One forward pass."""
        return self._told(
            lambda part: module_of(
                self._replay.model, partial(self._replay.evaluate, part), operation
            )
        )

    def first_not_finite(self) -> str | None:
        """Name the first module whose output is not finite. One forward pass."""
        with forward_only():
            return self._told(
                lambda part: first_not_finite(
                    self._replay.model, partial(self._replay.evaluate, part)
                )
            )

    def raw_backward(self) -> str | None:
        """Name a function that computes its gradient without a graph. One gradient."""
        params = self._replay.leaves.params
        return self._told(lambda part: raw_backward(self._replay.evaluate(part), params))

    def _told(self, look: Callable[[Part], str | None]) -> str | None:
        """Return what a look at the batches tells of the first that it tells something of."""
        found: list[str | None] = []

        def of(part: Part) -> tuple[Tensor, ...]:
            found.append(look(part))
            return ()

        self._replay.mean(of)
        return next((name for name in found if name), None)

    @property
    def normalizes_batches(self) -> bool:
        """Whether a BatchNorm takes its statistics from the batch."""
        return self._replay.normalizes_batches()

    @property
    def changed_objects(self) -> list[str]:
        """Python state that the loss changed and that can't be put back."""
        return self._replay.changed_objects()

    def loss(self) -> float:
        """Return L(w). Costs a forward and a backward pass, shared with `gradient`."""
        return float(self._products.loss_and_gradient()[0])

    def gradient(self) -> Tensor:
        """Return the gradient of L.

        Raises:
            UsageError: the loss is no scalar tensor that depends on the parameters.
        """  # (D,)
        return self._products.loss_and_gradient()[1]

    def adopt(self, loss: float, gradient: Tensor) -> None:
        """Take over L(w) and its gradient, which a step knows, in place of computing them."""
        self._products.adopt(loss, gradient)

    def hvp(self, v: Tensor, like: str = "top") -> Tensor:
        """Return H v, H the Hessian of L, or G v. One HVP.

        `like` is the kind of direction ("top", "random"), for differences to find their step by.

        Rows that an Embedding keeps still for padding are left out of H.

        Raises:
            NoCurvatureError: there is no double backward, and differences do not agree either.
            UsageError: `operator="ggn"` does not fit the loss.
        """  # (D,) -> (D,)
        self.hvps += not self.obstacle
        if self._still is None:
            return self._products(v, like)
        return self._still * self._products(self._still * v, like)

    def kink(self) -> str:
        """Name a function with kinks, such as ReLU, that the loss uses; "" where none is seen.

        One forward pass.
        """
        return self._told(lambda part: find_kink(self._replay.evaluate(part))) or ""

    def smoothness(self, v: Tensor) -> float:
        """Return how far one-sided differences of two steps along v differ, relatively.

        About 1e-3 on smooth losses, of the order of 1 with ReLU. Two gradients, three if the one at
        w is not known. Only with `hvp="one_sided"`.
        """
        return self._products.smoothness(v)

    def loss_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement); the weights are back when it returns. One forward pass."""
        with self._replay.displaced(displacement):
            return self.value()

    def value(self) -> float:
        """Return the loss, without what a gradient would need. One forward pass."""
        if not self._differentiates_itself:
            try:
                with forward_only():
                    return self._evaluated()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a second time it tells whether that was it
                self._differentiates_itself = True
        return self._evaluated()

    def _evaluated(self) -> float:
        (loss,) = self._replay.mean(
            lambda batch: (self._replay.evaluate(batch),), self.layout.number()
        )
        return float(loss)

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient at w + displacement. One forward and backward pass."""  # (D,)
        return self._products.gradient_at(displacement).to(displacement)

    def part(self, share: int) -> Objective | None:
        """Return the same loss on the first 1/`share` of the items, for use inside this block.

        A coarse stand-in at 1/`share` of the cost, never a number to report. None where the
        window has several batches or too few items.
        """
        window = self._replay.window
        fits = len(window) == 1 and self.items >= _SMALLEST_PART * share
        if not self._replay.ranks.all(fits):
            return None
        return self._on(self._cutter.head(window[0].batch, self.items // share), self.ranks)

    def pieces(self, count: int, rng: torch.Generator) -> list[Objective]:
        """Return the same loss on each micro-batch: those of the window, or `count` random ones.

        Of a batch of fewer items than `count`, one each. A batch is cut so that the losses of its
        pieces make up its own (see `Check`); those of a sum stand for all of it.

        For how they spread, inside this block: a gradient or a product of each, without keeping its
        graph. Those of this rank, or on local shards each joined over the ranks.

        Raises:
            WithheldError: there are not four items, pieces of a batch would be normalised by other
                statistics than the batch, or be another loss.
        """
        # A generator of its own: how much it draws depends on the items, which differ by rank.
        own = generator(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        ranks = self._replay.ranks_of_a_piece
        with ranks.together():
            cuts = self._micro_batches(count, own)
        if len(set(ranks.each(len(cuts)))) > 1:
            raise WithheldError("ranks differ in how many micro-batches they have")
        return [self._on(part, ranks, once=True) for part in cuts]

    def check_chunks(self, size: int) -> None:
        """Make sure that the batch may be cut into pieces of `size` items, and find out how.

        Raises:
            WithheldError: the loss would be another one.
        """
        self._cut_as(lambda n: in_order(n, size), least=1)

    def _micro_batches(self, count: int, rng: torch.Generator) -> list[Part]:
        window = self._replay.window
        if len(window) > 1:  # in items, by which the spread counts
            scale = self.items / sum(part.weight for part in window)
            return [replace(part, weight=scale * part.weight) for part in window]
        return self._cut_as(at_random(count, rng), least=_FEWEST_PIECES, wholly=True)

    def _cut_as(self, split: Split, *, least: int, wholly: bool = False) -> list[Part]:
        """Cut the batch by the way that its pieces' losses confirm."""
        if self._replay.normalizes_batches():
            raise WithheldError(
                "a BatchNorm in train mode would give pieces of the batch statistics of their own; "
                "accumulate the gradient over micro-batches, or measure with mode='eval'"
            )
        ranks = self._replay.ranks_of_a_piece
        check = Check(
            self._cutter,
            self._batches[0],
            lambda batch: self._on(batch, ranks, once=True),
            weigh=self._weigh,
        )
        cut = check.whole_pieces if wholly else check.pieces
        found = cut(split, least=least, tries=_WAYS if ranks.size == 1 else 1)
        self._pieces_are_exact = check.is_exact
        self.items = sum(part.items for part in found)  # as it has turned out
        return found

    def check_mean(self, found: Pieces, whole: Tensor, slack: float) -> None:
        """Make sure that what pieces of the batch have comes to what the whole of it has.

        A loss may agree in its value and in nothing else, as one does that is divided by itself or
        by its standard deviation. Not where randomness makes them differ. No evaluations.

        Raises:
            WithheldError: it does not.
        """
        if len(self._batches) > 1 or self.ranks.size > 1 or not self._pieces_are_exact:
            return
        narrow = any(p.dtype.itemsize < 4 for p in self._replay.leaves.params)
        try:
            check_mean(found, whole, slack, narrow=narrow)
        except WithheldError as why:
            self._cutter.refuse(self._batches[0], str(why))
            raise

    def _on(self, batch: Any, ranks: Ranks | None = None, *, once: bool = False) -> Objective:
        part = batch if isinstance(batch, Part) else self._cutter.part(batch, self._weigh)
        other = copy.copy(self)
        other._replay, other._batches = self._replay.on(part, ranks), [part.batch]
        other.items = part.items
        other._bends = dict(self._bends)  # a piece of one rank must not set the steps of all
        other._reset(is_part=True, once=once)
        other.forgo_hvps(self.obstacle)
        return other

    def is_finite(self) -> bool:
        """Tell whether loss and gradient are finite, so that curvature has a meaning."""
        # NaN and Inf reach the norm, which is 20 times faster than to ask each element.
        return math.isfinite(self.loss()) and math.isfinite(float(self.gradient().norm()))


def _replay_on(layout: Layout) -> type[Replay]:
    if not layout.is_cut:
        return Replay
    from geomwatch.curvature.shard_replay import ShardReplay  # imports DTensor, which takes a while

    return ShardReplay
