"""Do the losses of a batch's pieces make up its own? Whatever comes from pieces rests on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from geomwatch.curvature.batches import Part
from geomwatch.curvature.cutting import (
    A_SUM,
    Cutter,
    Known,
    Split,
    Weigh,
    along_with,
    numbers,
    parts_of,
    pieces,
    rules,
)
from geomwatch.curvature.items import Cut, is_of_all, length
from geomwatch.curvature.quiet import quiet
from geomwatch.curvature.weights import sketch_of, solve
from geomwatch.errors import WithheldError

_AGREE = 1e-4  # of losses of a batch and of its pieces, relative
_ALONG = 2e-2  # where parts of several lengths are cut, of which some share is not as the others
_SOLVED = 1e-3  # of gradients
_MEAN, _NARROW = 1e-2, 1e-1  # of gradients and products, relative; in 16 bits
_SOLVE = 2  # ways whose gradients are asked
_OWN = "a mean with weights of its own, told by gradients"
_REMEDY = (
    "Measurement(items=...) can say what an item is, loss_fn.weight what a batch counts for; "
    "micro-batches of an accumulated gradient need not be cut"
)


Pieces: TypeAlias = Sequence[tuple[float, Tensor]]  # (weight, (D,) gradient or product)


class Evaluated(Protocol):
    """The loss of a batch."""

    def value(self) -> float:
        """Return it, without a graph."""

    def gradient(self) -> Tensor:
        """Return its gradient."""


class Check:
    """Cuts a batch so that the losses of its pieces make up its own, or says that no way does.

    Guesses are tried in turn: a piece that is no batch raises, one that was cut along time or out
    of pairs has another loss. The losses of pieces have to average to that of the batch, by
    `loss_fn.weight`, by items or by the labels that count, or to add up to it; or else gradients of
    the pieces have to make up that of the batch, with whatever weights. Where random numbers make
    them differ, all of it is asked with those held (see `quiet`).

    Costs two forward passes over the batch where the way is known, and one for each that fails.
    """

    def __init__(
        self, cutter: Cutter, batch: Any, on: Callable[[Any], Evaluated], *, weigh: Weigh
    ) -> None:
        self._cutter, self._batch, self._on, self._weigh = cutter, batch, on, weigh
        self._whole = on(batch).value()
        self._quiet_whole: float | None = None
        self._why, self._few = "", ""  # the first way has failed
        self.is_exact = True  # losses agree as they are, not only with random numbers held

    def pieces(self, split: Split, *, least: int, tries: int) -> list[Part]:
        """Return the pieces that `split` names, by the first of `tries` ways that is right.

        What has items of its own stays whole in each: unlabelled rows beside labelled ones.

        Raises:
            WithheldError: none is, or there are not `least` items.
        """
        if not math.isfinite(self._whole):
            raise WithheldError("the loss is not finite")
        known = self._cutter.known(self._batch)
        if known is not None and known.refused:
            raise WithheldError(known.refused)
        tried: list[tuple[Cut, list[Part]]] = []
        for cut in islice(_distinct(self._cutter.cuts(self._batch)), tries):
            found = self._cut(cut, split, least)
            rule, weights = self._judged(found, cut)
            if rule:
                return self._confirmed(cut, rule, parts_of(found, weights, is_sum=rule == A_SUM))
            tried = [*tried, (cut, found)][:_SOLVE] if weights else tried
        for cut, found in tried:
            weights = self._solved(found)
            if weights:
                return self._confirmed(cut, _OWN, parts_of(found, weights))
        if self._few:  # by the likeliest way: the next batch may have more
            raise WithheldError(
                f"{self._few} micro-batches; accumulate the gradient over micro-batches, or use a "
                "larger batch"
            )
        why = self._why or "the batch has no dimension that items could lie along"
        self._cutter.refuse(self._batch, f"{why}. {_REMEDY}")
        raise WithheldError(f"{why}. {_REMEDY}")

    def whole_pieces(self, split: Split, *, least: int, tries: int) -> list[Part]:
        """Return pieces in which also what has items of its own is cut, into as many parts.

        Labelled and unlabelled rows, points inside and on the boundary: the noise of a batch is
        that of all of them. Costs a forward pass for each such length, once.

        Raises:
            WithheldError: as `pieces` does, or the losses of such pieces don't make up the batch's.
        """
        found = self.pieces(split, least=least, tries=tries)
        known = self._cutter.known(self._batch)
        assert known is not None
        if known.others is None:
            known = replace(known, others=tuple(self._others(known.cut, len(found))))
            self._cutter.learn(self._batch, known)
        if not known.others or tries == 1:
            return found
        lengths = [length(self._batch, cut) or 0 for cut in known.others]
        if min(lengths) < len(found):
            raise WithheldError(
                f"{min(lengths)} items can't be cut into {len(found)} micro-batches"
            )
        for cut, n in zip(known.others, lengths, strict=True):
            found = along_with(found, cut, split(n))
        even = all(n % len(found) == 0 for n in (*lengths, sum(p.items for p in found)))
        rule, _ = self._judged(found, known.cut, tolerance=_AGREE if even else _ALONG)
        if not rule:
            raise WithheldError(f"{self._why}. {_REMEDY}")
        self.is_exact = self.is_exact and even
        return found

    def _others(self, cut: Cut, count: int) -> Iterator[Cut]:
        """Yield the cuts of further parts whose pieces average to the batch as well."""
        for guess in _distinct(self._cutter.cuts(self._batch)):
            inside = [p for p in guess if any(p[: len(above)] == above for above in cut)]
            other = {p: place for p, place in guess.items() if p not in inside}
            n = length(self._batch, other) if other else None
            if n is None or n < 2 or len(other) < len(guess):
                continue
            with contextlib.suppress(Exception):  # of a batch that can't be cut there
                found = pieces(self._batch, other, numbers(n).tensor_split(min(count, n)))
                rule, _ = self._judged(found, other)
                if rule and rule != A_SUM:
                    yield other
                    cut = {**cut, **other}

    def _confirmed(self, cut: Cut, rule: str, parts: list[Part]) -> list[Part]:
        known = self._cutter.known(self._batch)
        others = known.others if known is not None and known.cut == cut else None
        self._cutter.learn(self._batch, Known(cut, rule, others=others))
        return parts

    def _cut(self, cut: Cut, split: Split, least: int) -> list[Part]:
        """Return pieces, none where they can't be had."""
        n = length(self._batch, cut) or 0
        if n < least:
            self._few = self._few if self._why else f"{n} items can't be cut into {least}"
            return []
        try:
            return pieces(self._batch, cut, split(n))
        except Exception as error:  # of whatever type of batch
            self._why = self._why or f"the batch can't be cut ({type(error).__name__}: {error})"
            return []

    def _judged(
        self, found: Sequence[Part], cut: Cut, tolerance: float = _AGREE
    ) -> tuple[str, list[float]]:
        """Return the rule by which pieces make up the batch, "" for none, and their weights.

        No weights where pieces have no loss at all.
        """
        if not found:
            return "", []
        try:
            rule, weights = self._by_losses(found, self._whole, cut, tolerance)
            if rule or not self._is_random:
                return rule, weights
            with quiet():
                rule, weights = self._by_losses(found, self._target, cut, tolerance)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a loss says of what is no batch for it
            said = f"a piece of the batch has no loss ({type(error).__name__}: {error})"
            self._why = self._why or said
            return "", []
        self.is_exact = self.is_exact and not rule
        return rule, weights

    def _by_losses(
        self, found: Sequence[Part], whole: float, cut: Cut, tolerance: float
    ) -> tuple[str, list[float]]:
        losses = [self._on(part.batch).value() for part in found]
        scale = max([abs(whole), *map(abs, losses)])
        if all(x == whole for x in losses) and not is_of_all(self._batch, cut):
            self._why = self._why or "the loss does not depend on what was cut"
            return "", []
        weights: list[float] = []
        mean = math.nan
        for rule, weights in rules(found, self._weigh):
            total = sum(weights)
            mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / total if total else 0
            made = sum(losses) if rule == A_SUM else mean
            if abs(made - whole) <= tolerance * scale:
                return rule, weights
        self._why = self._why or (
            "pieces of the batch are another loss than the batch: theirs is "
            f"{mean:.3g} in the mean, the batch's {whole:.3g}"
        )
        return "", weights

    @property
    def _is_random(self) -> bool:
        """Whether the loss is another one with random numbers held."""
        if self._quiet_whole is None:
            with quiet():
                self._quiet_whole = self._on(self._batch).value()
        return abs(self._quiet_whole - self._whole) > 1e-6 * abs(self._whole)

    @property
    def _target(self) -> float:
        """The loss that pieces are to make up where random numbers are held."""
        return self._whole if self._quiet_whole is None else self._quiet_whole

    def _solved(self, found: Sequence[Part]) -> list[float]:
        """Return the weights with which gradients of pieces make up the batch's; or none."""
        with quiet() if self._is_random else contextlib.nullcontext():
            whole = self._on(self._batch).gradient()
            sketch = sketch_of(whole)
            parts = [sketch(self._on(part.batch).gradient()) for part in found]
            losses = [self._on(part.batch).value() for part in found]
        weights, left = solve(parts, sketch(whole))
        if not left <= _SOLVED or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-2:
            return []
        mean = sum(w * x for w, x in zip(weights, losses, strict=True))
        scale = max([abs(self._target), *map(abs, losses)])
        return weights if abs(mean - self._target) <= _SOLVED * scale else []


def check_mean(found: Pieces, whole: Tensor, slack: float, *, narrow: bool) -> None:
    """Make sure that the mean of what pieces have is what the whole has, to `slack` and rounding.

    Raises:
        WithheldError: it is not.
    """
    total = sum(weight for weight, _ in found)
    mean, square = torch.zeros_like(whole), 0.0
    for weight, x in found:
        mean.add_(x, alpha=weight / total)
        square += weight / total * float(x.norm()) ** 2
    off, size = float((mean - whole).norm()), math.sqrt(square)
    if off > 3 * slack + (_NARROW if narrow else _MEAN) * size:
        raise WithheldError(
            "pieces of the batch are another loss than the batch: they agree in its value, but "
            f"what they have in the mean is {off / size:.0%} off what the batch has. {_REMEDY}"
        )


def _distinct(cuts: Iterator[Cut]) -> Iterator[Cut]:
    seen: list[Cut] = []
    for cut in cuts:
        if cut not in seen:
            seen.append(cut)
            yield cut
