"""Items of batches counted, and batches cut into pieces of them, as is known of their kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from geomwatch.curvature.batches import Part
from geomwatch.curvature.items import (
    Cut,
    ItemsOf,
    guesses,
    length,
    stated,
    structure,
    take,
)
from geomwatch.curvature.weights import RULES

Weigh: TypeAlias = Callable[[Any], float] | None  # what loss_fn.weight says of a batch
Split: TypeAlias = Callable[[int], Sequence[Tensor]]  # of so many items: the numbers in each piece

A_MEAN, A_SUM = "a mean over items", "a sum over items"
_BY_WEIGHT = "a mean by loss_fn.weight"


@dataclass(frozen=True, slots=True)
class Known:
    """How batches of one structure are cut, and what of; or why they can't be."""

    cut: Cut
    rule: str = ""
    refused: str = ""
    others: tuple[Cut, ...] | None = None  # of parts with items of their own, once asked for


@dataclass(slots=True)
class Cutter:
    """Counts and cuts batches, by what the user says, losses have confirmed, or is likely."""

    items: ItemsOf = None
    _known: dict[object, Known] = field(default_factory=dict)

    def count(self, batch: Any) -> int:
        """Return the number of items; 1 of a batch without any dimension."""
        if callable(self.items):
            return stated(self.items, batch)
        return next((length(batch, cut) or 0 for cut in self.cuts(batch)), 1)

    def head(self, batch: Any, count: int) -> Any:
        """Return the first `count` items, or all of a batch that can't be cut."""
        cut = next(self.cuts(batch), {})
        with contextlib.suppress(Exception):  # whatever a batch of one's own says
            return take(batch, cut, numbers(min(count, length(batch, cut) or 0)))
        return batch

    def part(self, batch: Any, weigh: Weigh) -> Part:
        """Return a batch with what it counts for: its items, or what `loss_fn.weight` says."""
        items = self.count(batch)
        return Part(batch, float(items if weigh is None else weigh(batch)), items)

    def window(
        self,
        window: Sequence[Any],
        size: int | None,
        weigh: Weigh,
        weights: Sequence[float] | None,
    ) -> list[Part]:
        """Return batches with these `weights` or their own, in pieces of at most `size` items."""
        found: list[Part] = []
        for i, batch in enumerate(window):
            whole = self.part(batch, weigh)
            whole = whole if weights is None else replace(whole, weight=weights[i])
            if size is None or whole.items <= size:
                found.append(whole)
                continue
            cut = self.chunks(batch, size, weigh)
            share = whole.weight / sum(part.weight for part in cut)
            found += [replace(part, weight=share * part.weight) for part in cut]
        return found

    def chunks(self, batch: Any, size: int, weigh: Weigh = None) -> list[Part]:
        """Cut a batch into pieces of `size` items in their order; the last may be shorter.

        By the rule that a `Check` has confirmed, or as if the loss were a mean over items.
        """
        known = self.known(batch)
        for cut in self.cuts(batch):
            found = pieces(batch, cut, in_order(length(batch, cut) or 0, size))
            weights = dict(rules(found, weigh))
            first = next(iter(weights))
            rule = known.rule if known is not None and known.rule else first
            return parts_of(found, weights.get(rule, weights[A_MEAN]), is_sum=rule == A_SUM)
        return [Part(batch, 1.0 if weigh is None else float(weigh(batch)), 1)]

    def cuts(self, batch: Any) -> Iterator[Cut]:
        """Yield the cut that is known to be right, then guesses."""
        known = self.known(batch)
        if known is not None and known.cut and length(batch, known.cut) is not None:
            yield known.cut
        yield from guesses(batch, self.items)

    def known(self, batch: Any) -> Known | None:
        """Return what is known of batches like this one."""
        return self._known.get(structure(batch))

    def learn(self, batch: Any, known: Known) -> None:
        """Take note of it."""
        self._known[structure(batch)] = known

    def refuse(self, batch: Any, why: str) -> None:
        """Take note of why batches like this one can't be cut."""
        self._known[structure(batch)] = Known({}, refused=why)

    def describe(self, batch: Any) -> dict[str, str]:
        """Say what an item is, and what the loss is of them, where it is not what one expects."""
        known = self.known(batch)
        if known is None or not known.rule:
            return {}
        facts = {} if known.rule == A_MEAN else {"loss_is": known.rule}
        dims = sorted({place.dim for place in known.cut.values()})
        if any(place.rows > 1 for place in known.cut.values()):
            return facts | {"item": "a pair of rows"}
        return facts | ({"item": f"dimension {max(dims)}"} if max(dims) > 0 else {})


def pieces(batch: Any, cut: Cut, split: Sequence[Tensor]) -> list[Part]:
    """Return the pieces of a batch with these items, each counted by them."""
    return [Part(take(batch, cut, chosen), len(chosen), len(chosen)) for chosen in split]


def along_with(found: Sequence[Part], cut: Cut, split: Sequence[Tensor]) -> list[Part]:
    """Return pieces with as many of the items that another cut of the batch has, too."""
    return [
        replace(part, batch=take(part.batch, cut, chosen))
        for part, chosen in zip(found, split, strict=True)
    ]


def parts_of(
    found: Sequence[Part], weights: Sequence[float], *, is_sum: bool = False
) -> list[Part]:
    """Return pieces that count by `weights`, in items; those of a sum stand for all of it."""
    items, total = sum(part.items for part in found), sum(weights)
    return [
        Part(part.batch, items * w / total, part.items, items / part.items if is_sum else 1.0)
        for part, w in zip(found, weights, strict=True)
    ]


def numbers(count: int) -> Tensor:
    """Return the numbers of items, wherever a script makes its tensors."""
    return torch.arange(count, device="cpu")


def in_order(count: int, size: int) -> list[Tensor]:
    """Return the numbers of the items of each piece of `size`."""
    return list(numbers(count).split(size)) if count else []


def at_random(count: int, rng: torch.Generator) -> Split:
    """Return what cuts items into `count` pieces at random, as long as one another but for one.

    Random, because neighbours in a data set may be more or less alike than items drawn from it. In
    their order within a piece: some losses need sequences by length.
    """

    def split(n: int) -> list[Tensor]:
        order = torch.randperm(n, generator=rng, device=rng.device).cpu()
        return [chosen.sort().values for chosen in order.tensor_split(min(count, n))]

    return split


def rules(found: Sequence[Part], weigh: Weigh) -> Iterator[tuple[str, list[float]]]:
    """Yield what pieces may count for, by name."""
    if weigh is not None:
        yield _BY_WEIGHT, [float(weigh(part.batch)) for part in found]
    items = [float(part.items) for part in found]
    yield A_MEAN, items
    for name, count in RULES.items():
        counts = [count(part.batch) for part in found]
        known = [c for c in counts if c is not None]
        if len(known) == len(found):
            yield f"a mean over {name}", known
    yield A_SUM, items
