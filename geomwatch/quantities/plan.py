"""What a probe measures, and what it may spend: dear quantities now and then, cheap ones always."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from geomwatch.quantities.probe import Budget
from geomwatch.quantities.table import LIGHT, SLOW

_SLOW, _SLOW_FRUGAL = 10, 25  # intervals between two measurements of what is costly and slow,
_SETTLED, _SETTLED_FRUGAL = 1, 10  # and before the first
_WARM = Budget(lanczos=5, samples=1, tol=1e-2)
_COLD = Budget(lanczos=12, samples=2, tol=1e-3)  # nothing to start from yet
_COLD_FRUGAL = Budget(lanczos=8, samples=1, tol=1e-2)
_WHOLE = Budget(lanczos=8, samples=5, tol=1e-3)  # all to measure


class Plan:
    """Chooses quantities and budgets, probe by probe.

    With `every`, the choice is ours: everything every 10 x `every` steps (25 x if `frugal`), for
    the first time at the first probe after an interval of one `every` (10) that `warms_up`, since a
    run that starts is watched, not described; else without what is costly and slow to move, and
    without HVPs of another operator than the margin's;
    and while probes are dense, little more than the margin.
    With `every` None all of `names` are measured at each probe. What controllers need is measured
    at each.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        every: int | None,
        warms_up: bool,
        frugal: bool,
        per_layer: bool,
        needed: Collection[str] = (),
    ) -> None:
        self._names = tuple(names)
        self._needed = frozenset(needed)
        self._every = every
        self._per_layer = per_layer
        self.probes = 0  # so far
        self.last_full = 0  # step of the last one that was not dense
        settled = _SETTLED_FRUGAL if frugal else _SETTLED
        self._next_whole = settled * (every or 0) if warms_up else 0
        self._slow = _SLOW_FRUGAL if frugal else _SLOW
        self._cold = _COLD_FRUGAL if frugal and every is not None else _COLD
        self.is_whole = False  # whether the present probe measures what is costly as well

    @property
    def is_free(self) -> bool:
        """Whether the choice is ours."""
        return self._every is not None

    def names(self, step: int, *, separate: bool, noise: bool = False) -> list[str]:
        """Return what to measure; `separate` if the Hessian's spectrum is not the margin's.

        With `noise`, and at the first probe, also what batches that differ add to the margin.
        """
        names = list(self._names)
        self.is_whole = self._every is None or step >= self._next_whole
        if self._every is None or self.is_whole:
            self.last_full = step
            self._next_whole = step + self._slow * (self._every or 0)
            return names
        noise = noise or not self.probes
        needed = self._needed | {"stochastic_margin"} if noise else self._needed
        names = [n for n in names if n not in SLOW or n in needed]
        if separate and self.probes:
            names = [n for n in names if n not in ("lambda_max", "batch_sharpness")]
        if step - self.last_full < min(self._every, self.last_full):
            return [n for n in names if n in LIGHT or n in needed]
        self.last_full = step
        return names

    def budget(self, names: Sequence[str], *, cold: bool) -> Budget:
        """Return what these quantities may cost."""
        whole = self.is_whole and self._every is not None
        budget = self._cold if cold else _WHOLE if whole else _WARM
        # What is not pooled over probes needs an error bar from the samples of one.
        single = self._per_layer or {"trace_squared", "effective_rank"} & set(names)
        return replace(budget, samples=_WHOLE.samples) if single else budget

    def state_dict(self) -> dict[str, int]:
        """Return where in the run it is."""
        return {
            "probes": self.probes,
            "last_full": self.last_full,
            "next_whole": self._next_whole,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over where in the run it is."""
        self.probes, self.last_full = state["probes"], state["last_full"]
        self._next_whole = state["next_whole"]
