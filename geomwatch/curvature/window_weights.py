"""What the micro-batches of an accumulation window count for: as the step's own gradient has it.

A loop averages micro-batches alike, or by their items, or by the labels that count in each (as
language models are trained): these are three losses where micro-batches differ in size or masks.
The gradient that the step will use is the sum that it has made, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from geomwatch.curvature.subject import Subject
from geomwatch.curvature.weights import RULES, residual, sketch_of, solve
from geomwatch.vectors.layout import generator

_SAME, _SURE = 1e-6, 1e-3  # of weights, and of gradients, relative
_ALIKE, _ITEMS = "each micro-batch alike", "by items"
_OWN = "weights of its own"


class Weighing:
    """Chooses the weights of windows at probes, and keeps the rule for the looks in between."""

    def __init__(self) -> None:
        self._rule = _ITEMS
        self.facts: dict[str, str] = {}  # for the record of the last window that was asked

    def __call__(
        self, subject: Subject, window: Sequence[Any], gradient: Tensor | None = None
    ) -> list[float] | None:
        """Return the weights of a window; None where they are as `loss_fn.weight` or items have it.

        `gradient` is the step's own, (D,), where the step has seen this window. It costs a gradient
        of each micro-batch where the rules differ, and nothing where they don't.
        """
        self.facts = {}
        if len(window) < 2 or callable(getattr(subject.loss_fn, "weight", None)):
            return None
        known = _by_rules(subject, window)
        if all(_alike(weights, known[_ITEMS]) for weights in known.values()):
            return None
        if gradient is None or subject.ranks.size > 1 or subject.layout.is_cut:
            return known.get(self._rule, known[_ITEMS])
        return self._chosen(known, *_sketches(subject, window, gradient))

    def _chosen(
        self, known: dict[str, list[float]], sketches: list[Tensor], whole: Tensor
    ) -> list[float]:
        left = {rule: residual(sketches, whole, weights) for rule, weights in known.items()}
        rule = min(left, key=lambda name: left[name])
        if left[rule] > _SURE:
            own, rest = solve(sketches, whole)
            if rest <= _SURE and min(own) >= 0:
                self.facts = {"window_weights": f"{_OWN}, which the step's gradient tells"}
                return own
        self._rule = rule if math.isfinite(left[rule]) else self._rule
        how = "as the step's gradient has them"
        if left[rule] > _SURE:
            how = f"closest to the step's gradient, which is {left[rule]:.0%} off"
        self.facts = {"window_weights": f"{self._rule}, {how}"}
        return known[self._rule]


def _by_rules(subject: Subject, window: Sequence[Any]) -> dict[str, list[float]]:
    known = {
        _ALIKE: [1.0] * len(window),
        _ITEMS: [float(subject.cutter.count(batch)) for batch in window],
    }
    for name, count in RULES.items():
        counts = _counted(count, window)
        if counts and sum(counts) > 0:
            known[f"by {name}"] = counts
    return known


def _counted(count: Callable[[Any], float | None], window: Sequence[Any]) -> list[float]:
    found = [count(batch) for batch in window]
    known = [c for c in found if c is not None]
    return known if len(known) == len(found) else []


def _sketches(
    subject: Subject, window: Sequence[Any], gradient: Tensor
) -> tuple[list[Tensor], Tensor]:
    sketch = sketch_of(gradient)
    with subject.set(micro_batch=None).on(window) as objective:
        pieces = objective.pieces(len(window), generator(0))
        return [sketch(piece.gradient()) for piece in pieces], sketch(gradient)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(math.isclose(x * sum(b), y * sum(a), rel_tol=_SAME) for x, y in pairs)
