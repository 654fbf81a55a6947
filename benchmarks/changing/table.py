"""All cases, and what is right in each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from changing.changes import CHANGES
from changing.exact import Exact
from changing.hosts import train
from changing.net import CHANGE
from changing.run import EVERY, Case, Listening, Run

_ROUNDING = 0.005  # relative: of products by differences of gradients, of gradients in 16 bits
STEP_SHAPES: list[dict[str, Any]] = [
    {},
    {"clip": 0.05},
    {"accumulate": 3},
    {"accumulate": 3, "divided": False, "clip": 0.2},
    {"accumulate": 2, "divided": False},
]
_OPTIMIZERS = ("SGD", "momentum", "AdamW")
_IN_HOSTS = (
    "unfrozen, in a group of its own",
    "frozen",
    "a new head",
    "a new optimizer",
    "an optimizer of another kind",
    "weights loaded by assignment",
)


def cases() -> list[Case]:
    """Return each change in a raw loop twice, and some in the other hosts, under steps in turn."""
    found = []
    for i, change in enumerate(CHANGES):
        for turn in (i, i + 2):
            shape = STEP_SHAPES[(turn + i // 5) % len(STEP_SHAPES)]
            found.append(Case(change, _OPTIMIZERS[turn % 3], **shape))
    for i, change in enumerate(_IN_HOSTS):
        for j, host in enumerate(("accelerate", "Lightning", "Transformers")):
            shape = STEP_SHAPES[(i + j) % 3]  # hosts divide
            found.append(Case(change, _OPTIMIZERS[(i + 2 * j) % 3], host=host, **shape))
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run has shown: its last record, and all that is wrong."""

    case: Case
    records: int
    lambda_max: str
    margin: str
    identical: bool
    wrong: list[str]


def judge(case: Case) -> Verdict:
    """Train with and without the monitor, and hold all records against what is exact."""
    run = Run(case)
    with Listening(run.said):
        state = train(run, watched=True)
    bare = train(Run(case), watched=False)
    if run.broken:
        raise run.broken[0]
    same = len(state) == len(bare) and all(map(torch.equal, state, bare))
    wrong = [] if same else ["training is not what it is without the monitor"]
    for line, right in run.found:
        wrong += [f"step {line['step']}: {w}" for w in _wrong(line, right)]
    after = [line["step"] for line, _ in run.found if line["step"] >= CHANGE]
    if not after or after[0] > CHANGE + EVERY:
        wrong.append(f"first record at {after[:1]} after a change at {CHANGE}")
    if run.kind.says and not any(run.kind.says in said for said in run.said):
        wrong.append(f"never said: {run.kind.says}")
    line, right = run.found[-1]
    margin = "none" if right.margin is None else f"{right.margin:.3g}"
    return Verdict(
        case,
        len(run.found),
        f"{_shown(line['estimates']['lambda_max'])} ({right.lambda_max:.3g})",
        f"{_shown(line['estimates']['stability_margin'])} ({margin})",
        same,
        wrong,
    )


def _wrong(line: dict[str, Any], right: Exact) -> list[str]:
    estimates, found = line["estimates"], []
    for name, value in (("lambda_max", right.lambda_max), ("stability_margin", right.margin)):
        ours = estimates[name]
        if value is None:
            if ours["status"] != "withheld":
                found.append(f"{name} {_shown(ours)}, there is none")
        elif ours["status"] != "ok" or not _close(ours, value):
            found.append(f"{name} {_shown(ours)} ± {ours['error'] or 0:.2g}, right is {value:.4g}")
    gain = line["provenance"]["gain"]
    if right.margin is not None and not math.isclose(gain, right.gain, rel_tol=_ROUNDING):
        found.append(f"gain {gain:.3g}, right is {right.gain:.3g}")
    return found


def _close(ours: dict[str, Any], value: float) -> bool:
    return abs(ours["value"] - value) <= (ours["error"] or 0.0) + _ROUNDING * abs(value)


def _shown(estimate: dict[str, Any]) -> str:
    value = estimate["value"]
    return estimate["status"] if value is None else f"{value:.3g}"
