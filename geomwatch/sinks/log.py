"""The log: records and alerts as sentences, on the first rank only."""

from __future__ import annotations

import logging

from geomwatch.parallel.ranks import is_first_rank
from geomwatch.records import Estimate, format_estimate
from geomwatch.sinks.lines import Line

logger = logging.getLogger("geomwatch")
logger.addFilter(lambda said: is_first_rank() or getattr(said, "each_rank", False))

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
_IN_THE_LOG = (
    ("lambda_max", "λ_max"),
    ("stability_margin", "margin"),
    ("stochastic_margin", "stochastic margin"),
    ("trace", "trace"),
    ("grad_norm", "|g|"),
)


class Log:
    """Writes records at INFO and alerts at their own level to the logger "geomwatch"."""

    def __call__(self, line: Line) -> None:
        """Log one line."""
        name = f"{line['monitor']}: " if "monitor" in line else ""
        if line["kind"] == "record" and logger.isEnabledFor(logging.INFO):
            logger.info("%s%s", name, _sentence(line))
        elif line["kind"] == "alert":
            where = f"{name}step {line['step']}: "
            logger.log(_LEVELS[line["severity"]], "%s%s", where, line["message"])
        elif line["kind"] == "adjustment":
            level = logging.WARNING if line["effect"] == "advice" else logging.INFO
            logger.log(level, "%sstep %d: %s", name, line["step"], _turn(line))


def _sentence(line: Line) -> str:
    parts = [f"step {line['step']}", f"loss {line['loss']:.4g}"]
    if line["lr"]:
        parts.append(f"lr {max(line['lr']):.3g}")
    for name, label in _IN_THE_LOG:
        found = line["estimates"].get(name)
        if found is not None and found["value"] is not None:
            age = f" (at step {line['step'] - found['age']})" if found["age"] else ""
            parts.append(f"{label} {format_estimate(Estimate(**found))}{age}")
    return "  ".join(parts)


def _turn(line: Line) -> str:
    verb = {"applied": "", "dry run": "would be ", "advice": "advice, not applied: "}
    turned = f"{line['knob']} {line['before']:.3g} -> {line['after']:.3g}"
    return f"{verb[line['effect']]}{turned}: {line['reason']}"
