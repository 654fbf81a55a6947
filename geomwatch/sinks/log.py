"""The log: records and alerts as sentences, on the first rank only."""

from __future__ import annotations

import logging

from geomwatch.parallel.ranks import is_first_rank
from geomwatch.records import WITHOUT_LIMIT, Estimate, format_estimate
from geomwatch.sinks.escapes import one_entry
from geomwatch.sinks.lines import Line

logger = logging.getLogger("geomwatch")


def _admitted(said: logging.LogRecord) -> bool:
    """Tell whether this rank says it, and make it one entry, whatever is quoted in it."""
    if not (is_first_rank() or getattr(said, "each_rank", False)):
        return False
    message = said.getMessage()
    if (entry := one_entry(message)) != message:
        said.msg, said.args = entry, ()
    return True


logger.addFilter(_admitted)

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
            is_told = line["effect"] in ("advice", "abstains")  # which nobody would see otherwise
            level = logging.WARNING if is_told else logging.INFO
            logger.log(level, "%sstep %d: %s", name, line["step"], _turn(line))
        elif line["kind"] == "end":
            logger.info("%sstep %d: %s", name, line["step"], _closing(line))


def _sentence(line: Line) -> str:
    parts = [f"step {line['step']}", f"loss {line['loss']:.4g}"]
    if line["lr"]:
        parts.append(f"lr {max(line['lr']):.3g}")
    for name, label in _IN_THE_LOG:
        found = line["estimates"].get(name)
        if found is not None and found["value"] is not None:
            if name == "stability_margin" and found["status"] in WITHOUT_LIMIT:
                label = "lr x λ_max"
            age = f" (at step {line['step'] - found['age']})" if found["age"] else ""
            parts.append(f"{label} {format_estimate(Estimate(**found))}{age}")
    return "  ".join(parts)


def _closing(line: Line) -> str:
    part = line["overhead"]
    share = "" if part is None else f", {100 * part:.2g} % of the time of training"
    return f"closed; watching took {line['seconds']:.3g} s{share}"


def _turn(line: Line) -> str:
    if line["effect"] == "abstains":
        return str(line["reason"])
    verb = {"applied": "", "dry run": "would be ", "advice": "advice, not applied: "}
    turned = f"{line['knob']} {line['before']:.3g} -> {line['after']:.3g}"
    return f"{verb[line['effect']]}{turned}: {line['reason']}"
