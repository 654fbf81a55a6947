"""What geomwatch says: frozen data, no behaviour beyond looking a value up, and its notation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

from geomwatch.errors import UsageKeyError, nearest

Severity = Literal["info", "warning", "critical"]
Effect = Literal["applied", "dry run", "advice", "abstains"]
ErrorKind = Literal["residual", "stderr", "none"]

SCHEMA = 2  # 1, of 0.1: no `end` line, and a record's provenance was called `how`
VERSION = "0.1.0"  # of geomwatch, read from here when a package is built


WITHOUT_LIMIT = ("unknown", "directional")  # statuses of margins that have no limit of 1
_UNLIMITED = {"stability_margin": "lr_lambda_max"}  # what they are called


@dataclass(frozen=True, slots=True)
class Estimate:
    """One measured number with its error, or the reason why there is none.

    `error` is in the units of `value`. "residual": some eigenvalue lies within `error` of `value`
    (it bounds neither from above nor below which one). "stderr": one standard error of a mean.
    `status` is "ok", "held" (from an earlier probe, `age` steps ago), "unknown" (no formula for
    this optimizer), "directional" (its steps have a constant size), "withheld" (it could be
    computed but would mislead) or "failed".
    """

    value: float | None
    error: float | None = None
    error_kind: ErrorKind = "none"
    status: str = "ok"
    reason: str = ""
    hvps: int = 0
    age: int = 0

    def __str__(self) -> str:
        """Return the value with its error, or why there is none."""
        return f"- ({self.reason})" if self.value is None else format_estimate(self)

    def _repr_html_(self) -> str:
        return escape(str(self))


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule found something: what to do, the number, its limit, and where.

    The first line of `message` is the instruction and the number beside its limit, the second, if
    any, what else is known. `advised_lr` is the learning rate to go on at, None where it is not the
    rate that is to blame.
    """

    rule: str
    severity: Severity
    message: str
    value: float
    limit: float
    step: int
    layers: tuple[str, ...] = ()
    advised_lr: float | None = None

    def __str__(self) -> str:
        """Return what was said, and when."""
        return f"step {self.step}, {self.severity}, {self.rule}: {self.message}"

    def _repr_html_(self) -> str:
        said = escape(self.message).replace("\n", "<br>")
        head = escape(f"step {self.step}, {self.severity}: {self.rule}")
        return f"<b>{head}</b><br>{said}"


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A controller turned a knob of the training loop before step `step`, or would have.

    knob "lr_scale": the factor between the rate a step takes and the user's; "batch_scale": items
    in a step over those of the loop as written; "clip_norm": the gradient norm clipped at, infinite
    for none. `effect` is "advice" where this loop can't turn it, or where only the user should, and
    "abstains" where a controller has nothing to go by: then nothing is ever turned.
    """

    knob: str
    before: float
    after: float
    reason: str
    step: int = 0
    effect: Effect = "applied"


@dataclass(frozen=True, slots=True)
class Record:
    """All that one probe measured. `step` counts the optimizer steps already taken, from 0."""

    step: int
    loss: float
    lr: tuple[float, ...]  # one per parameter group
    seconds: float
    estimates: Mapping[str, Estimate]
    alerts: tuple[Alert, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    provenance: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    knobs: Mapping[str, float] = field(default_factory=dict)  # as controllers have set them
    overhead: float | None = None  # all that was spent so far, as a share of the time of training

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.estimates:
            near = nearest(name, self)
            raise UsageKeyError(
                f"a record must hold what is looked up, got {name!r}. It holds {', '.join(self)}.",
                write=f'record["{near}"]' if near else f'Measurement(quantities=["{name}"])',
            )
        return self.estimates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.estimates)

    def __contains__(self, name: object) -> bool:
        return name in self.estimates

    def __str__(self) -> str:
        """Return a table: a line for each quantity, with its error or why it could not be had."""
        head = f"step {self.step}, loss {self.loss:.4g}, {self.hvps} products, {self.seconds:.3g} s"
        width = max(map(len, self.estimates), default=0)
        rows = (
            f"  {name:<{width}}  {found}{_aged(found)}" for name, found in self.estimates.items()
        )
        return "\n".join([head, *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(f'{found}{_aged(found)}')}</td></tr>"
            for name, found in self.estimates.items()
        )
        head = escape(str(self).splitlines()[0])
        return f"<table><caption>{head}</caption>{rows}</table>"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.estimates)

    @property
    def hvps(self) -> int:
        """Hessian-vector products this probe spent."""
        return sum(e.hvps for e in self.estimates.values())

    def scalars(self, prefix: str = "geom/") -> dict[str, float]:
        """Return a flat dict for a tracker: every finite value, its error under `<name>_error`.

        Without values held from an earlier probe: a tracker would take them for measured now. The
        margin of an optimizer without a formula, lr x λ_max, has no limit of 1 and is called so.

        What is a module's own, "trace/<module>", becomes "trace.<module>": MLflow keeps a metric as
        a file, and refuses one that lies inside another.
        """
        flat: dict[str, float] = {}
        for name, estimate in self.estimates.items():
            if estimate.value is None or not math.isfinite(estimate.value):
                continue
            if estimate.status == "held":
                continue
            if estimate.status in WITHOUT_LIMIT and name not in _UNLIMITED:
                continue
            called = _UNLIMITED[name] if estimate.status in WITHOUT_LIMIT else name
            key = prefix + called.replace("/", ".")
            flat[key] = estimate.value
            if estimate.error is not None and math.isfinite(estimate.error):
                flat[f"{key}_error"] = estimate.error
        flat |= {prefix + knob: value for knob, value in self.knobs.items() if math.isfinite(value)}
        flat[f"{prefix}probe_seconds"] = self.seconds
        if self.overhead is not None:
            flat[f"{prefix}overhead"] = self.overhead
        return flat


def _aged(found: Estimate) -> str:
    return f" ({found.age} steps ago)" if found.age else ""


_LEVEL = {"": 0, "info": 1, "warning": 2, "critical": 3}


@dataclass(frozen=True, slots=True)
class Look:
    """What a sentinel, or a probe, has seen along one step: the gradient margin beside its limit.

    `limit` is the level that the rule `gradient_margin` holds its mean against; None where the
    optimizer has none. `update_ratio`: the norm of an update over that of the weights, as last
    sampled. `overhead`: what geomwatch has taken so far, as a share of the time of training.
    `severity` is the gravest of the alerts since the look before, "" for none. `loss` is that of
    the step before, where the loop passes it.
    """

    step: int
    lr: float
    gradient_margin: Estimate
    limit: float | None = None
    update_ratio: float | None = None
    overhead: float | None = None
    severity: str = ""
    loss: float | None = None

    def scalars(self, prefix: str = "geom/") -> dict[str, float]:
        """Return a flat dict for a tracker; `alert_level` counts from 0, none, to 3, critical."""
        error = self.gradient_margin.error
        flat = {
            "gradient_margin": self.gradient_margin.value,
            "gradient_margin_error": error,
            "limit": self.limit,
            "update_ratio": self.update_ratio,
            "overhead": self.overhead,
            "alert_level": float(_LEVEL.get(self.severity, 0)),
        }
        known = {k: v for k, v in flat.items() if v is not None and math.isfinite(v)}
        return {prefix + name: value for name, value in known.items()}


def gravest(severities: Iterable[str]) -> str:
    """Return the gravest of some severities; "" of none."""
    return max(severities, key=_LEVEL.__getitem__, default="")


def format_estimate(estimate: Estimate) -> str:
    """Write a value with its error, both to the error's leading digit: 12.3 ± 0.4, 68 ± 21.

    Very large and small ones share a power of ten: (1.23 ± 0.04)e-7.
    """
    if estimate.value is None:
        return "n/a"
    value, error = estimate.value, estimate.error or 0.0
    largest = max(abs(value), error if math.isfinite(error) else 0.0)
    if not 1e-300 < largest < math.inf:
        return f"{value:g}"
    exponent = math.floor(math.log10(largest))
    if not -3 <= exponent < 5:
        scale = 10.0**exponent
        part = format_estimate(replace(estimate, value=value / scale, error=error / scale))
        return f"({part})e{exponent}" if "±" in part else f"{part}e{exponent}"
    if error == 0 or not math.isfinite(error):
        return f"{value:.{max(0, 2 - exponent)}f}"
    # never more than four digits of the value, however small the error
    decimals = max(0, min(-math.floor(math.log10(error)), 3 - exponent))
    if error < 0.5 * 10.0**-decimals:
        return f"{value:.{decimals}f}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
