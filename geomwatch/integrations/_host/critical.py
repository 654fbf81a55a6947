"""What `on_critical` does in every host: the same on all ranks, and never save what is lost."""

from __future__ import annotations

from collections.abc import Sequence

from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Alert
from geomwatch.sinks import logger


def wanted(on_critical: str | None, alerts: Sequence[Alert], ranks: Ranks, step: int) -> str | None:
    """Return "save", "stop" or None: what is to be done after these alerts, on every rank.

    Of several ranks, each must call it at each step: a host that saves or stops on one alone waits
    for the others forever.
    """
    if on_critical is None:
        return None
    rules = {alert.rule for alert in alerts if alert.severity == "critical"}
    if not ranks.any(bool(rules)):
        return None
    if on_critical == "stop":
        logger.warning("step %d: training stops, as on_critical asks.", step)
    elif ranks.any("non_finite" in rules):
        logger.warning(
            "step %d: no checkpoint is saved, although on_critical asks for it: what a loss or "
            "gradient that is not finite leaves behind is not worth it.",
            step,
        )
        return None
    return on_critical
