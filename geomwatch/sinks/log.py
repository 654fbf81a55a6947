"""The log: what a run says as sentences, on the first rank only, without tearing a progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from geomwatch.parallel.ranks import is_first_rank
from geomwatch.records import VERSION, WITHOUT_LIMIT, Estimate, format_estimate
from geomwatch.sinks.escapes import one_entry
from geomwatch.sinks.lines import Line

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
_NOISE = 2.0  # a value below so many of its errors is not told from nothing


class _BesideBars(logging.Logger):
    """A logger that has the bars of tqdm cleared while a line is written, and drawn again."""

    def handle(self, record: logging.LogRecord) -> None:
        with _bars_cleared():
            super().handle(record)


def _of_geomwatch() -> logging.Logger:
    found = logging.getLogger("geomwatch")
    if type(found) is logging.Logger:  # also where a program has asked for it before
        found.__class__ = _BesideBars
    found.addFilter(_admitted)
    return found


def _admitted(said: logging.LogRecord) -> bool:
    """Tell whether this rank says it, and make it one entry, whatever is quoted in it."""
    if not (is_first_rank() or getattr(said, "each_rank", False)):
        return False
    message = said.getMessage()
    if (entry := one_entry(message)) != message:
        said.msg, said.args = entry, ()
    return True


@contextmanager
def _bars_cleared() -> Iterator[None]:
    """Clear the bars that tqdm has on the terminal, by its own means, if it is in use at all."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not getattr(tqdm, "_instances", None):
        yield
        return
    with tqdm.external_write_mode(file=sys.stderr):
        yield


logger = _of_geomwatch()


class Log:
    """Writes what a run says to the logger "geomwatch": alerts at their level, the rest at INFO.

    The last line of a run is a WARNING where there was one.
    """

    def __call__(self, line: Line) -> None:
        """Log one line."""
        said = _SAID.get(line["kind"])
        name = f"{line['monitor']}: " if "monitor" in line else ""
        if said is not None and logger.isEnabledFor(level := _level(line)):
            logger.log(level, "%s%s", name, said(line))


def _level(line: Line) -> int:
    if line["kind"] == "alert":
        return _LEVELS[line["severity"]]
    # of what nobody would see otherwise
    is_advice = line["kind"] == "adjustment" and line["effect"] in ("advice", "abstains")
    is_troubled = line["kind"] == "end" and set(line["alerts"]) - {"info"}
    return logging.WARNING if is_advice or is_troubled else logging.INFO


def _start(line: Line) -> str:
    every, budget = line.get("every"), line.get("budget")
    paces = [f"every {every} steps"] if every is not None else []
    paces += [f"within {budget:.2g} of the time of training"] if budget is not None else []
    return (
        f"geomwatch {VERSION}: watching {line['parameters']:,} parameters under "
        f"{line['optimizer']}, {' and '.join(paces) or 'without a limit of its cost'}. Rules: "
        "geomwatch explain"
    )


def _record(line: Line) -> str:
    """Write a probe in columns of fixed width; what is held or lost in noise is left out."""
    lr = max(line["lr"], default=None)
    margin = line["estimates"].get("stability_margin") or {}
    has_limit = margin.get("status") not in WITHOUT_LIMIT
    name, of = ("margin", " of 1") if has_limit else ("lr x λ_max", "")
    columns = (
        f"step {line['step']:>6}",
        f"loss {_number(line['loss'], 4):<9}",
        f"lr {_number(lr, 3):<8}",
        f"{name} {_measured(line, 'stability_margin'):<13}{of}",
        f"λ_max {_measured(line, 'lambda_max')}",
    )
    return "  ".join(columns)


def _measured(line: Line, name: str) -> str:
    found = line["estimates"].get(name)
    if found is None or found["value"] is None or found["status"] == "held":
        return "-"
    if found["error"] and abs(found["value"]) < _NOISE * found["error"]:
        return "-"
    return format_estimate(Estimate(**found)).replace(" ± ", "±")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _alert(line: Line) -> str:
    return f"step {line['step']}: {line['message']}"


def _adjustment(line: Line) -> str:
    if line["effect"] == "abstains":
        return f"step {line['step']}: {line['reason']}"
    verb = {"applied": "", "dry run": "would be ", "advice": "advice, not applied: "}
    turned = f"{line['knob']} {line['before']:.3g} -> {line['after']:.3g}"
    return f"step {line['step']}: {verb[line['effect']]}{turned}: {line['reason']}"


def _end(line: Line) -> str:
    """Write what became of a run."""
    return f"end at step {line['step']}: {'; '.join(_sums(line))}"


def _sums(line: Line) -> Iterator[str]:
    counts = line["alerts"]
    kinds = [f"{counts[kind]} {kind}" for kind in reversed(_LEVELS) if kind in counts]
    if kinds:
        yield f"alerts: {', '.join(kinds)}, the last at step {line['last_alert']}"
    else:
        yield "no alerts"
    if line["margin"] is not None:
        yield f"last stability margin {line['margin']:.2g} of 1"
    if line["overhead"] is not None:
        yield f"cost {line['overhead']:.1%} of the time of training"
    if line["followed"] is False:
        yield f"the advice to go down to {line['advised_lr']:.2g} was not followed"


_SAID: dict[str, Any] = {
    "run": _start,
    "record": _record,
    "alert": _alert,
    "adjustment": _adjustment,
    "end": _end,
}
