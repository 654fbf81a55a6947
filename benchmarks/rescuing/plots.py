"""The plot: what is left to learn at the end, by the multiple of the tuned rate."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from rescuing.outcomes import Outcomes
from rescuing.policies import BASELINES, NAMES

# Okabe and Ito's colours, which stay apart for all kinds of colour vision; and line styles.
_STYLES = {
    "none": ("#999999", "--"),
    "cap": ("#000000", "-"),
    "clip": ("#56B4E9", "-."),
    "autoclip": ("#0072B2", ":"),
    "zclip": ("#D55E00", "--"),
    "plateau": ("#009E73", "-."),
}


def draw(halves: dict[str, Outcomes], path: Path) -> None:
    """Draw the median over tasks, schedules and seeds of the share that is left to learn."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, adaptive in zip(axes, (False, True), strict=True):
        for policy in ("none", "cap", *BASELINES):
            colour, style = _STYLES[policy]
            line = _line(halves, policy, adaptive=adaptive)
            axis.plot(*zip(*line, strict=True), style, color=colour, label=NAMES[policy].strip("*"))
        axis.set(xscale="log", xlabel="multiple of the tuned rate", ylim=(-0.02, 1.1))
        axis.set_xticks([0.25, 1, 4, 8, 16, 30], ["0.25", "1", "4", "8", "16", "30"])
        axis.minorticks_off()
        axis.set_title("AdamW" if adaptive else "SGD with momentum")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("left to learn at the end (1: chance)")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(halves: dict[str, Outcomes], policy: str, *, adaptive: bool) -> list[tuple[float, float]]:
    left: dict[float, list[float]] = {}
    for half in halves.values():
        for o in half.all:
            own = o.run.setting.optimizer.startswith("adam") == adaptive
            if o.policy == policy and own:
                share = o.run.setting.rates.lost(o.loss) if math.isfinite(o.loss) else 1.0
                left.setdefault(o.run.multiple, []).append(min(share, 1.1))
    return [(m, statistics.median(shares)) for m, shares in sorted(left.items())] or [(1.0, 1.0)]
