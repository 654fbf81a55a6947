"""What `on_critical` does in every host: say it, and never save what is lost."""

from __future__ import annotations

from collections.abc import Collection

from geomwatch.sinks import logger


def tell_of_stop(step: int) -> None:
    """Say that training stops."""
    logger.warning("step %d: training stops, as on_critical asks.", step)


def is_worth_saving(rules: Collection[str], step: int) -> bool:
    """Tell whether the weights are worth a checkpoint after these rules' alerts; say if not."""
    if "non_finite" not in rules:
        return True
    logger.warning(
        "step %d: no checkpoint is saved, although on_critical asks for it: what a loss or "
        "gradient that is not finite leaves behind is not worth it.",
        step,
    )
    return False
