"""A run in the terminal while it goes on: loss, margin and rate as lines of blocks, last alert."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from geomwatch.report.verdict import rates_of, verdict_of
from geomwatch.sinks.reading import Run, read

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # blocks of a line


def glance(run: Run) -> str:
    """Return a run as it stands, in a few lines."""
    losses = {r.step: r.loss for r in run.records}
    losses |= {k.step - 1: k.loss for k in run.looks if k.loss is not None}
    margins = {
        k.step: k.gradient_margin.value / k.limit
        for k in run.looks
        if k.limit and k.gradient_margin.value is not None
    }
    rows = [
        ("loss", [v for _, v in sorted(losses.items())]),
        ("margin of 1", [v for _, v in sorted(margins.items())]),
        ("rate", [v for _, v in rates_of(run)]),
    ]
    lines = [verdict_of(run).sentence]
    lines += [f"{name:<12}{spark(values)}  {values[-1]:.4g}" for name, values in rows if values]
    shares = [k.overhead for k in run.looks if k.overhead is not None]
    if shares:
        lines.append(f"{'cost':<12}{shares[-1]:.1%} of the time of training")
    if run.alerts:
        last = run.alerts[-1]
        lines.append(f"last alert  step {last.step}, {last.severity}: {last.message}")
    if run.lost:
        lines.append(f"{len(run.lost)} lines could not be read, the last is {run.lost[-1].line}")
    return "\n".join(lines)


def spark(values: Sequence[float], width: int = _WIDTH) -> str:
    """Return numbers as blocks, the last `width` stretches of them, each by its largest."""
    size = max(1, math.ceil(len(values) / width))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    tops = [max((v for v in part if math.isfinite(v)), default=math.nan) for part in parts]
    known = [v for v in tops if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[int((v - low) * scale)] if math.isfinite(v) else "×" for v in tops)


def follow(
    path: str | Path, *, every: float = 0.5, rest: Callable[[float], None] = time.sleep
) -> None:
    """Show a run until it ends, again whenever its file has grown; with rich in place.

    Args:
        path: the file; it is waited for.
        every: seconds between two looks at it.
        rest: how to wait.
    """
    path, seen, show = Path(path), -1, _shower()
    while True:
        size = path.stat().st_size if path.exists() else -1
        if size != seen:
            seen, run = size, read(path) if size >= 0 else Run()
            show(glance(run))
            if run.end is not None:
                return
        rest(every)


def _shower() -> Callable[[str], None]:
    """Return what shows a text in place of the one before, or below it where that can't be."""
    if not sys.stdout.isatty():
        return lambda text: _write(f"{text}\n\n")
    try:
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        return lambda text: _write(f"\033[2J\033[H{text}\n")
    live = Live(auto_refresh=False)
    live.start()
    return lambda text: live.update(Text(text), refresh=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
