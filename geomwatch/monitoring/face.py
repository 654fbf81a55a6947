"""What a Monitor is made from: what people pass for it, and what they passed before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from geomwatch.errors import UsageError
from geomwatch.quantities.measurement import Measurement
from geomwatch.stability.registry import optimizer_name


def is_disabled() -> bool:
    """Tell whether GEOMWATCH_DISABLE=1 in the environment turns everything off."""
    return os.environ.get("GEOMWATCH_DISABLE", "") not in ("", "0")


def run_facts(optimizer: Any, dim: int, names: tuple[str, ...], how: Measurement) -> dict[str, Any]:
    """Return what the first line of a log says of a run."""
    return {
        "torch": torch.__version__,
        "optimizer": optimizer_name(optimizer),
        "parameters": dim,
        "quantities": list(names),
        "mode": how.mode,
        "operator": how.operator,
        "seed": how.seed,
    }


def check_state(state: Mapping[str, Any], version: int, own: Mapping[str, Any]) -> None:
    """Refuse the state of another version, model, set of rules or controllers.

    Raises:
        UsageError: it is one; the message names what differs.
    """
    remedy = "Load a state that a monitor like this one has saved, or start without it."
    if not isinstance(state, Mapping) or state.get("version") != version:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise UsageError(
            f"state must be of version {version} of a Monitor's states, got {found!r}. {remedy}"
        )
    of = state.get("of")
    for name, value in own.items():
        found = of.get(name) if isinstance(of, Mapping) else None
        if found != value:
            raise UsageError(f"state must be of {name} {value}, got {found}. {remedy}")
