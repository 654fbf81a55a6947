"""What a probe measures, and what it may spend: dear quantities now and then, cheap ones always."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from geomwatch.isolation.state import Kept, Resumable


@dataclass(frozen=True, slots=True)
class Budget:
    """HVPs a probe may spend on its Lanczos run and its trace samples, and when to stop early."""

    lanczos: int = 20
    samples: int = 8
    tol: float = 1e-4
    is_lean: bool = False  # from the gradient, and without Ritz vectors unless they are asked for
    is_mixed: bool = False  # from the gradient and as much noise: it may be blind to what is new


# A residual of 5 % is an error of 1 % or less: it enters squared.
_LEAN = Budget(lanczos=8, samples=1, tol=5e-2, is_lean=True)
# The gradient of layers that were unfrozen had a cosine of .002 with the top eigenvector: from it
# alone 8 products ended at the second eigenvalue, 16 % below, with an error bar of 1.6 %.
_ANEW = Budget(lanczos=12, samples=5, tol=1e-2, is_lean=True, is_mixed=True)
_WHOLE = Budget(lanczos=8, samples=5, tol=1e-3, is_lean=True)  # all to measure


_SAMPLED = ("trace", "trace_per_param")


@dataclass(frozen=True, kw_only=True)
class Portions:
    """How rarely the default quantities that are dear, or slow to move, are measured.

    In intervals between two probes of a calm run (decision 014).
    """

    slow: int = 10  # between two measurements, the first at the first probe
    slow_frugal: int = 25  # the same where probes are held to a budget, and
    settled_frugal: int = 10  # before the first: a run that starts is watched, not described


class Plan(Resumable):
    """Chooses quantities and their products, probe by probe.

    With `interval`, the steps between two probes of a calm run, the choice is ours: everything now
    and then (see `Portions`); else without what is dear and slow to move, and without products of
    another operator than the margin's; and while probes are dense, little more than the margin.
    With `interval` None all are measured at each probe. `paces` are the
    quantities, each with its pace (see `Quantity`). What controllers need is
    measured at each.
    """

    probes: Kept[int]
    last_full: Kept[int]
    _next_whole: Kept[int]

    def __init__(
        self,
        paces: Mapping[str, str],
        *,
        interval: int | None,
        frugal: bool,
        per_layer: bool,
        needed: Collection[str] = (),
        portions: Portions | None = None,
    ) -> None:
        portions = portions or Portions()
        self._paces = dict(paces)
        self._needed = frozenset(needed)
        self._interval = interval
        self._per_layer = per_layer
        self.probes = 0  # so far
        self.last_full = 0  # step of the last one that was not dense
        settled = portions.settled_frugal if frugal else 0
        self._next_whole = settled * (interval or 0)
        self._slow = portions.slow_frugal if frugal else portions.slow
        self._frugal = frugal
        self._restarted = self._is_anew = False  # other parameters than at the last probe
        self.is_whole = False  # whether the present probe measures what is costly as well

    def restart(self) -> None:
        """Measure everything at the next probe, of which nothing is known."""
        self._next_whole, self._restarted = 0, True

    @property
    def all_names(self) -> tuple[str, ...]:
        """All that is measured, at one probe or another."""
        return tuple(self._paces)

    @property
    def is_free(self) -> bool:
        """Whether the choice is ours."""
        return self._interval is not None

    def names(self, step: int, *, separate: bool, noise: bool = False) -> list[str]:
        """Return what to measure; `separate` if the Hessian's spectrum is not the margin's.

        With `noise`, and at the first probe, also what batches that differ add to the margin.
        """
        names = list(self._paces)
        self._is_anew, self._restarted = self._restarted, False
        self.is_whole = self._interval is None or step >= self._next_whole
        if self._interval is None or self.is_whole:
            self.last_full = step
            self._next_whole = step + self._slow * (self._interval or 0)
            return names
        noise = noise or not self.probes
        needed = self._needed | {"stochastic_margin"} if noise else self._needed
        names = [n for n in names if self._paces[n] != "slow" or n in needed]
        if separate:
            names = [n for n in names if n not in ("lambda_max", "batch_sharpness")]
        if self._frugal and not self.probes:  # one sample makes no trace yet
            names = [n for n in names if n not in _SAMPLED or n in needed]
        if step - self.last_full < min(self._interval, self.last_full):
            return [n for n in names if self._paces[n] == "dense" or n in needed]
        self.last_full = step
        return names

    def budget(self, names: Sequence[str]) -> Budget:
        """Return what these quantities may cost."""
        budget = _ANEW if self._is_anew else _WHOLE if self.is_whole else _LEAN
        # What is not pooled over probes needs an error bar from the samples of one.
        single = self._per_layer or {"trace_squared", "effective_rank"} & set(names)
        return replace(budget, samples=_WHOLE.samples) if single else budget
