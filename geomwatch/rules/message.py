"""What the messages of rules have in common: where trouble sits, what batches do, what to read."""

from __future__ import annotations

import math

from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity

_LIMIT = 1.0  # of the stochastic margin
_LARGEST = 64  # times the batch: beyond it nobody follows the advice


def alert(
    rule: str,
    severity: Severity,
    text: str,
    *,
    value: float,
    limit: float,
    step: int,
    layers: tuple[str, ...] = (),
    details: str = "",
    advised_lr: float | None = None,
) -> Alert:
    """Return an alert whose message ends in where its rule is explained.

    `text` says what to do, the number and its limit; `details` what else is known, on a second
    line.
    """
    first = f"{text}\n{details}" if details else text
    message = f"{first} More: geomwatch explain {rule}."
    return Alert(rule, severity, message, value, limit, step, layers, advised_lr)


def carried_by(step: Observation) -> str:
    """Name the layers that hold the top eigenvector."""
    return f"; mostly in layers {', '.join(step.layers)}" if step.layers else ""


def larger_batch(factor: float) -> str:
    """Say which batch does what a rate lowered by `factor` does, where anybody would take it."""
    times = math.ceil(1 / factor)
    return f", or make the batch {times} x larger" if 1 < times <= _LARGEST else ""


def batch_advice(margin: float, noise: float | None) -> str:
    """Say whether a larger batch would help, and how much larger.

    The stochastic margin is D + N, D the margin of the full batch and N what the disagreement of
    batches adds. A batch k x larger leaves D and divides N by k: k = ceil(N / (1 - D)) brings the
    sum down to 1, if D < 1; otherwise no batch does.

    Args:
        margin: D at the present learning rate.
        noise: (D + N) / D when it was last measured; None if never.
    """
    if noise is None or noise <= 1 or margin <= 0:
        return ""
    if margin >= _LIMIT:
        return " A larger batch would not help: the full-batch part alone is beyond its limit."
    extra = (noise - 1) * margin
    if margin + extra <= _LIMIT:
        return ""
    times = math.ceil(extra / (_LIMIT - margin))
    source = f"{extra / (margin + extra):.0%} of the stochastic margin {margin + extra:.2g} is"
    if times > _LARGEST:
        return f" {source} batch noise, but it would take a batch {times} x larger to outgrow it."
    return f" Or make the batch {times} x larger: {source} batch noise."
