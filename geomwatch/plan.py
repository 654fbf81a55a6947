"""What a probe measures, and what it may spend: dear quantities now and then, cheap ones always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from geomwatch.probe import Budget
from geomwatch.quantities import LIGHT, SLOW

_SLOW = 10  # probes between two measurements of what is costly and moves slowly
_WARM = Budget(lanczos=5, samples=1, tol=1e-2)
_COLD = Budget(lanczos=12, samples=6, tol=1e-3)  # nothing to start from yet, or all to measure


class Plan:
    """Chooses quantities and budgets, probe by probe.

    With `every`, the choice is ours between steps that are that far apart: everything at every
    10th probe, the first included; else without what is costly and slow to move, and without HVPs
    of another operator than the margin's; and while probes are dense, little more than the margin.
    With `every` None all of `names` are measured at each probe.
    """

    def __init__(self, names: Sequence[str], *, every: int | None, per_layer: bool) -> None:
        self._names = tuple(names)
        self._every = every
        self._per_layer = per_layer
        self.probes = 0  # so far
        self.last_full = 0  # step of the last one that was not dense

    @property
    def is_whole(self) -> bool:
        """Whether the coming probe measures what is costly as well."""
        return self.probes % _SLOW == 0

    def names(self, step: int, *, separate: bool) -> list[str]:
        """Return what to measure; `separate` if the Hessian's spectrum is not the margin's."""
        names = list(self._names)
        if self._every is None or self.is_whole:
            self.last_full = step
            return names
        names = [n for n in names if n not in SLOW]
        if separate:
            names = [n for n in names if n not in ("lambda_max", "batch_sharpness")]
        if step - self.last_full < min(self._every, self.last_full):
            return [n for n in names if n in LIGHT]
        self.last_full = step
        return names

    def budget(self, names: Sequence[str], *, cold: bool) -> Budget:
        """Return what these quantities may cost."""
        spends = self.is_whole and self._every is not None
        budget = _COLD if cold or spends else _WARM
        # What is not pooled over probes needs an error bar from the samples of one.
        single = self._per_layer or {"trace_squared", "effective_rank"} & set(names)
        return replace(budget, samples=_COLD.samples) if single else budget
