"""What the margin rule says."""

from __future__ import annotations

from dataclasses import dataclass

from geomwatch.observation.regime import EDGE
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity, format_estimate
from geomwatch.rules.advice import lower_rate, rate_factor
from geomwatch.rules.message import alert, batch_advice, carried_by


@dataclass(frozen=True, slots=True)
class Levels:
    """Where the margin rule speaks."""

    warning: float  # of the mean of the last measurements
    critical: float  # of the mean, for some steps
    at_once: float  # of a single measurement


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the margin rule has found."""

    severity: Severity
    mean: float  # of the last measurements,
    count: int  # so many
    single: bool  # the last measurement alone decided
    level: float  # that was exceeded
    noise: float | None  # mean-square over full-batch margin
    is_quiet: bool  # it hardly matters


@dataclass(frozen=True, slots=True)
class Usual:
    """What a run without a limit is held against: its own medians."""

    margin: float  # lr x λ_max
    loss: float
    factor: float  # of the margin, above which it is unusual
    loss_limit: float  # the same of the loss


def described(rule: str, step: Observation, found: Verdict) -> Alert:
    """Return the alert of a margin near or beyond its limit, or at the edge of stability."""
    assert step.margin is not None
    assert step.margin.value is not None
    shown = format_estimate(step.margin)
    if found.severity == "info":
        text = (
            f"at the edge of stability: margin {shown} with the same data at each step. This is "
            "where full-batch training settles; no action needed."
        )
        return _sent(rule, step, "info", text, found.mean, EDGE)
    value = step.margin.value if found.single else found.mean
    if not found.single and found.count > 1:
        shown = f"{found.mean:.2f} over the last {found.count} probes, {shown} now"
    margin = f"{shown} (alert above {found.level:g}, unstable at 1)"
    factor = rate_factor(step, margin=value, is_quiet=found.is_quiet)
    text = _text(step, value, margin, factor) + batch_advice(value, found.noise)
    return _sent(rule, step, found.severity, text, value, found.level)


def beyond_usual(rule: str, step: Observation, margin: float, usual: Usual) -> Alert:
    """Return the alert of an optimizer without a formula, held against its own past."""
    text = (
        f"lr x λ_max has risen to {margin:.3g}, {margin / usual.margin:.1f} times its median in "
        f"this run, and the loss to {step.loss:.4g} from a median of {usual.loss:.4g} (alert above "
        f"{usual.factor:g} times the median with the loss above {usual.loss_limit:.4g}; no "
        f"stability limit is known for {step.optimizer}){carried_by(step)}. Lower the learning "
        "rate if the loss goes on rising."
    )
    return _sent(rule, step, "warning", text, margin, usual.factor * usual.margin)


def _sent(
    rule: str, step: Observation, severity: Severity, text: str, value: float, limit: float
) -> Alert:
    return alert(
        rule, severity, text, value=value, limit=limit, step=step.index, layers=step.layers
    )


def _text(step: Observation, value: float, margin: str, factor: float) -> str:
    lr = max(step.lr, default=1.0)
    beyond = "is beyond" if value > 1 else "comes close to"
    rising = ", and the loss rises" if step.same_data else ""
    return (
        f"learning rate {lr:.3g} {beyond} what the curvature allows for {step.optimizer}{rising}: "
        f"stability margin {margin}{_curvature(step)}{carried_by(step)}. "
        f"{lower_rate(step, factor)}, or end its warm-up there."
    )


def _curvature(step: Observation) -> str:
    found = None if step.estimates is None else step.estimates.get("lambda_max")
    assert step.margin is not None
    if found is None or found.value is None or found.age or not step.margin.value:
        return ""
    return (
        f"; λ_max {format_estimate(found)}, stable below {found.value / step.margin.value:.3g} "
        "at this rate"
    )
