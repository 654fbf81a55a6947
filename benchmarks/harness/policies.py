"""Every policy by its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tasks.training import Loop

from geomwatch import Measurement
from geomwatch.controllers import LearningRateCap
from harness.baselines import AutoClip, Clip, Plateau, WarmUp, ZClip
from harness.growing import Batches
from harness.policy import Make, Nothing
from harness.watching import Follower, Watch


@dataclass(frozen=True)
class Beside:
    """How a policy is made, what reports call it, and its overhead to plan with.

    `options` are those of the monitor; stored runs are valid for them only.
    """

    make: Make
    label: str
    costs: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)


def _watch(label: str, costs: float = 0.3, **options: Any) -> Beside:
    return Beside(partial(Watch, **options), label, costs, options)


def _cap(loop: Loop, *, monitor: dict[str, Any] | None = None, **settings: Any) -> Watch:
    return Watch(loop, controllers=[LearningRateCap(**settings)], observe=False, **(monitor or {}))


# Sentinels, and hardly anything else.
_LEAN = {"how": Measurement(quantities="loss"), "budget": 0.05}
DEFAULT, ADVICE, TUNED = "default", "advice", "tuned"
BUDGETS = (DEFAULT, "5%", "10%", "100%")
BASELINES = ("clip", "autoclip", "zclip", "plateau")
BATCHES = ("batches", "batches-cap")
POLICIES = {
    "none": Beside(Nothing, "no control"),
    DEFAULT: _watch("monitor"),
    "5%": _watch("monitor", 0.05, budget=0.05),
    "10%": _watch("monitor", 0.10, budget=0.10),
    "100%": _watch("monitor", 1.0, budget=1.0),
    ADVICE: Beside(Follower, "advice followed", 0.3),
    "cap": Beside(_cap, "**LearningRateCap**", 1.0),
    "lean": Beside(partial(_cap, monitor=_LEAN), "the same, lean", 0.1, _LEAN),
    "batches": Beside(Batches, "scaler", 1.0),
    "batches-cap": Beside(partial(Batches, cap=True), "scaler and cap", 1.0),
    "clip": Beside(Clip, "clip 1.0"),
    "autoclip": Beside(AutoClip, "AutoClip"),
    "zclip": Beside(ZClip, "ZClip"),
    "plateau": Beside(Plateau, "ReduceLROnPlateau"),
    TUNED: Beside(WarmUp, "tuned warm-up and rate"),
}


def named(name: str) -> Beside:
    """Return a policy by name; "cap:c_bs=1.5,release=1.1" sets options of the cap.

    Raises:
        ValueError: there is none of that name.
    """
    kind, _, given = name.partition(":")
    if kind not in POLICIES or (given and kind != "cap"):
        raise ValueError(f"a policy must be among {', '.join(POLICIES)} (or cap:...), got {name!r}")
    if not given:
        return POLICIES[kind]
    settings = {key: float(value) for key, _, value in (p.partition("=") for p in given.split(","))}
    return Beside(partial(_cap, **settings), name, POLICIES[kind].costs)
