"""When a run is looked at: from steps, learning rates, measured margins and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.budget import Account
from geomwatch.parallel.ranks import Ranks

Look: TypeAlias = Literal["nothing", "sentinel", "probe"]


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How densely a run is looked at, in optimizer steps, where no `every` is given.

    Chosen on half of the runs of docs/benchmarks/forecast.md (decisions 010, 014), where no other
    source is named.
    """

    start: tuple[int, ...] = (0, 1, 2, 3, 5, 8)  # looked at: a start that is too fast fails here
    calm: int = 100  # between two probes of a calm run; intervals grow up to it
    first: float = 15.0  # the first interval after the start
    growth: float = 1.6  # of the interval, probe by probe
    densest: float = 1 / 20  # of `calm`: the shortest interval, near the limit
    attention: float = 0.25  # margins above this are worth a closer look: a quarter of the limit
    rising: float = 1.1  # times the last margin: it rises
    steepness: float = 3.4  # intervals shrink as (attention / margin)^3.4: 1/20 at 0.6
    rises: int = 5  # steps in a row that are looked at again while they raise their own loss
    sentinels: int = 50  # between two sentinels of a calm run, half of its age before that,
    close_sentinels: int = 10  # and at least so many, as where the margin is above `attention`
    again: int = 10  # what the budget did not allow is asked for again at multiples of this
    norms: int = 10  # between two norms of the gradient, which cost some 10 us a tensor
    rise: float = 1.5  # of the rate since the last probe, across which no margin is trusted,
    risky_rise: float = 1.15  # and where the margin is above `attention`
    jump: float = 2.0  # times the rate of the step before: urgent, whatever the budget
    beyond: float = 1.0  # a margin that is not let out of sight in the first steps: the limit

    def next_norm(self, step: int) -> int:
        """Return the next step after this one whose gradient's norm is of interest."""
        return step + 1 if step < self.start[-1] else step + self.norms - step % self.norms


class Schedule(Resumable):
    """Says before each step whether to probe, to send a sentinel, or to do nothing.

    With `every`, a probe is due at each multiple of it, without, at the steps of `cadence`: dense
    at the start and while the margin approaches its limit, else at intervals that grow to `calm`.
    Either way one is due at once after the rate has risen by half. It is made as soon as the
    account affords it, but for what is urgent: the first probe, one at a jump of the rate, those of
    a start that is beyond the limit. Between probes sentinels look along the step; they, and the
    probes that they call for, are the least that watches: probes are made from what they leave of
    the budget.
    """

    _next: Kept[int]
    _interval: Kept[float]
    _margin: Kept[float | None]
    _next_sentinel: Kept[int]
    _rates: Kept[tuple[float, ...]]
    last_probe: Kept[int]
    jumped: Kept[bool]

    def __init__(
        self, every: int | None, account: Account, ranks: Ranks, cadence: Cadence | None = None
    ) -> None:
        self.cadence = cadence or Cadence()
        self.every = every
        self._account, self._ranks = account, ranks
        self._next, self._interval = 0, 1.0
        self._margin: float | None = None
        self._next_sentinel = 0
        self._rates: tuple[float, ...] = ()  # of the last step
        self.last_probe = -1  # its step
        self.jumped = False  # the rate, at the last step that was asked about

    def is_quiet(self, index: int, rates: tuple[float, ...]) -> bool:
        """Tell whether nothing can be due: no step of a look, at the rates of the step before."""
        is_quiet = rates == self._rates and index < self._next and index < self._next_sentinel
        self.jumped = self.jumped and not is_quiet
        return is_quiet

    @property
    def next_look(self) -> int:
        """The step at which something is due at the latest."""
        return min(self._next, self._next_sentinel)

    def look(
        self,
        index: int,
        rates: Sequence[float],
        *,
        margin: float | None,
        growth: float,
        growth_along: float,
    ) -> Look:
        """Say what to do before a step.

        Args:
            index: optimizer steps taken.
            rates: the user's learning rates.
            margin: the stability margin as the step will be taken; None if it is not known.
            growth: of the rates since it was measured,
            growth_along: and since the margin along the gradient was.
        """
        c, before = self.cadence, self._rates
        self._rates = tuple(rates)
        self.jumped = any(
            now >= c.jump * then > 0 for now, then in zip(rates, before, strict=False)
        )
        if index <= self.last_probe:  # a skipped step is the same step
            return "nothing"
        is_close = margin is not None and margin > c.attention
        if index >= self._next or growth > (c.risky_rise if is_close else c.rise):
            beyond = margin is not None and margin > c.beyond
            urgent = self.last_probe < 0 or self.jumped or (index <= c.start[-1] and beyond)
            worth = self._account.units.probe
            if self._ranks.all(urgent or self._account.affords(worth)):
                return "probe"
            # at steps that are no idle ones anyway
            self._next = max(self._next, index + c.again - index % c.again)
        regrouped = len(rates) != len(before) > 0  # the optimizer's groups
        wanted = regrouped or index >= self._next_sentinel or growth_along > c.risky_rise
        return "sentinel" if wanted else "nothing"

    def restart(self) -> None:
        """Forget margins and rates, and have the next step probed, whatever the budget."""
        self._next, self._interval, self._next_sentinel = 0, 1.0, 0
        self._margin, self._rates, self.last_probe = None, (), -1

    def looked(self, index: int, margin: float | None) -> None:
        """Take note of a sentinel and the margin it has found, in units of the probe's."""
        c = self.cadence
        start = next((s for s in c.start if s > index), None)
        is_close = margin is not None and margin > c.attention
        calm = max(c.close_sentinels, min(c.sentinels, index // 2))
        self._next_sentinel = start or index + (c.close_sentinels if is_close else calm)

    def probed(self, index: int, margin: float | None) -> None:
        """Take note of a probe and the margin it has found, and choose the step of the next."""
        self.last_probe = index
        self.looked(index, margin)
        self._next = index + self._gap(index, margin)
        self._margin = margin

    def _gap(self, index: int, margin: float | None) -> int:
        c = self.cadence
        if self.every is not None:
            return self.every - index % self.every
        start = next((s for s in c.start if s > index), None)
        if start is not None:
            return start - index
        rising = margin is not None and (self._margin is None or margin > c.rising * self._margin)
        interval = max(self._interval * c.growth, c.first)
        if rising and margin is not None and margin > c.attention:
            interval = min(interval, c.calm * (c.attention / margin) ** c.steepness)
        self._interval = min(max(interval, c.calm * c.densest, 1.0), c.calm)
        return max(1, round(self._interval))
