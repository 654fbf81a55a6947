"""What a rule is, and what rules have in common: that they say a thing once, and if it lasts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import GUESS, Documented, above, group, level, whole
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity

_ORDER = ("", "info", "warning", "critical")


class Rule(Protocol):
    """What is known of a step in, at most one alert out. Everything is counted in optimizer steps.

    A rule whose verdicts depend on earlier steps is a `Resumable`, and annotates as `Kept[...]`
    what it remembers of them. It is asked before every step, unless it `reads` less:

        reads = "norm"   steps at which a gradient's norm, or a move of the weights, became known,
                         which is one in ten, and these:
        reads = "look"   steps at which a sentinel or a probe has measured something
        reads = "rise"   these, and those whose rate is above that of the step before
        reads = "taken"  steps after one whose loss was looked at again
        reads = "probe"  steps at which a probe has measured something
        reads = ("trace", ...)  steps at which a probe has measured all of these quantities

    and while it `waits` for the next step, whatever that brings. One that is asked before every
    step, or about norms, may say what it need not see at once, and is shown that later:

        def lets_wait(self) -> Calm | None: ...    None, as without it, lets nothing wait
        def waited(self, steps: Waited) -> None: ...
    """

    name: str

    def __call__(self, step: Observation) -> Alert | None:
        """Look at one step."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Once(Documented):
    """An alert is said again when it gets worse, or after it is over and a cool-down."""

    release: int = level(15, "steps of calm until an alert is over", source=GUESS)
    cooldown: int = level(
        25,
        "steps to the next one, unless critical",
        source=GUESS,
        check=whole(0),
    )


def soon_over() -> Once:
    """Return what suits a rule whose condition shows itself each time it is looked for."""
    return Once(release=1, cooldown=0)


class Latch(Resumable):
    """Lets an alert out once: again only when it gets worse, or after release and cool-down."""

    severity: Kept[str]
    _calm_since: Kept[int | None]
    _quiet_until: Kept[int]

    def __init__(self, once: Once = Once()) -> None:
        self._once = once
        self.severity = ""
        self._calm_since = None
        self._quiet_until = 0

    def is_news(self, severity: Severity) -> bool:
        """Tell whether an alert of this severity would be worse than the one that is not over."""
        return _ORDER.index(severity) > _ORDER.index(self.severity)

    def admit(self, severity: Severity, step: int) -> bool:
        """Let an alert of this severity out, if it is news."""
        self._calm_since = None
        if not self.is_news(severity):
            return False
        if step < self._quiet_until and severity != "critical":
            return False
        self.severity = severity
        return True

    def calm(self, step: int) -> None:
        """Note that the condition is clearly absent at this step."""
        if not self.severity:
            return
        if self._calm_since is None:
            self._calm_since = step
        if step - self._calm_since >= self._once.release:
            self.severity = ""
            self._calm_since = None
            self._quiet_until = step + self._once.cooldown

    def between(self) -> None:
        """Note that the condition is neither present nor clearly absent."""
        self._calm_since = None


class Persistence(Resumable):
    """How long a condition has held without a measurement to the contrary."""

    _since: Kept[int | None]

    def __init__(self, steps: int) -> None:
        self._needed = steps
        self._since = None

    def __call__(self, present: bool, step: int) -> bool:
        """Take a measurement; tell whether the condition has held for the steps needed."""
        if not present:
            self._since = None
            return False
        if self._since is None:
            self._since = step
        return step - self._since >= self._needed


@dataclass(frozen=True, kw_only=True, repr=False)
class SecondOpinion(Documented):
    """A rehearsal before an alert: steps ahead that learn on deny that the rate is too high."""

    survives: float = level(
        0.2, "share of what was learnt that it may lose", source="130 runs: .1 to .5 do alike"
    )
    young: int = level(20, "first step at which it counts", source="a dead net does not rise")
    grows: float = level(
        2**0.5, "times the value that was denied: asked again", source=GUESS, check=above(1)
    )
    lasts: float = level(1.5, "times the step of a denial: asked again", source=GUESS)


class Denial(Resumable):
    """What a rehearsal has denied, and for how long that holds."""

    _step: Kept[int | None]
    _value: Kept[float]

    def __init__(self, opinion: SecondOpinion) -> None:
        self._opinion = opinion
        self._step = None
        self._value = 0.0

    def __call__(self, step: Observation, value: float) -> bool:
        """Tell whether steps ahead, at the rate the run is headed for, deny an alert of `value`."""
        how = self._opinion
        if step.index < how.young:
            return False
        is_recent = self._step is not None and step.index <= how.lasts * self._step
        if is_recent and value <= how.grows * self._value:
            return True
        found = step.rehearsals()
        self._step = None
        if found is None or found.rise > how.survives:
            return False
        self._step, self._value = step.index, value
        return True


@dataclass(kw_only=True, eq=False, repr=False)
class LatchedRule(Documented, Resumable):
    """A rule whose levels are its fields, and whose alerts are let out once."""

    name = ""
    reads: ClassVar[str | tuple[str, ...]] = "step"
    says: ClassVar[tuple[Severity, ...]] = ()

    once: Once = group(Once, "when an alert is news again")
    _latch: Kept[Latch] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._latch = Latch(self.once)
