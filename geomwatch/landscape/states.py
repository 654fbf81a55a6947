"""States of a model, as state_dict() gives them: do they fit, and what lies between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from geomwatch.errors import UsageError, UsageTypeError

State: TypeAlias = Mapping[str, Any]

_LISTED = 5


def check_states(model: nn.Module, **states: State) -> None:
    """Refuse what is no state_dict of this model: other names or shapes, or other things."""
    own = tensors_of(model.state_dict(keep_vars=True))
    for name, state in states.items():
        if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
            raise UsageTypeError(
                f"{name} must be a state_dict of the model, got {type(state).__name__}."
            )
        wanted = f"{name} must be a state of this {type(model).__name__}, got"
        missing = [k for k in own if not isinstance(state.get(k), Tensor)]
        extra = [k for k in tensors_of(state) if k not in own]
        if missing or extra:
            raise UsageError(f"{wanted} one {_differences(missing, extra)}.{_hint(missing, extra)}")
        for key, t in own.items():
            if state[key].shape != t.shape:
                raise UsageError(
                    f"{wanted} shape {tuple(state[key].shape)} for {key!r}, which is "
                    f"{tuple(t.shape)} here."
                )


def own_copies(model: nn.Module, **states: State) -> list[State]:
    """Check states, and copy them where they share memory with the model that is about to move.

    Raises:
        UsageError: one does not fit, or more than one is the model's present weights by reference.
    """
    check_states(model, **states)
    live = {_memory(t) for t in tensors_of(model.state_dict(keep_vars=True)).values()}

    def own(value: Any) -> Any:
        shared = isinstance(value, Tensor) and _memory(value) in live
        return value.detach().clone() if shared else value

    copies: list[State] = [{k: own(value) for k, value in s.items()} for s in states.values()]
    pairs = zip(states.items(), copies, strict=True)
    alive = [name for (name, s), copy in pairs if all(copy[k] is not v for k, v in s.items())]
    if len(alive) > 1:
        raise UsageError(
            f"{' and '.join(alive)} must be different states, got the model's present weights for "
            "each: state_dict() refers to the live weights. Keep "
            "copy.deepcopy(model.state_dict()) at the moment it is to be a state of."
        )
    return copies


def place_on(tensors: Mapping[str, Tensor], states: Sequence[State], t: float) -> None:
    """Put a model on the Bezier curve of one, two or three states at t in [0, 1]."""
    s = 1 - t
    coefficients = {1: (1.0,), 2: (s, t), 3: (s**2, 2 * t * s, t * t)}[len(states)]
    for name, live in tensors.items():
        live.data.copy_(mix([state[name] for state in states], coefficients, live.detach()))


def mix(states: Sequence[Tensor], coefficients: Sequence[float], like: Tensor) -> Tensor:
    """Return sum_i c_i t_i; of whole numbers and flags, which have no between, the heaviest."""
    heaviest = max(range(len(states)), key=lambda i: coefficients[i])
    if not (like.is_floating_point() or like.is_complex()) or coefficients[heaviest] == 1:
        return states[heaviest].to(like.device, like.dtype)
    total = torch.zeros_like(like)
    for t, c in zip(states, coefficients, strict=True):
        if c:
            total.add_(t.to(like.device, like.dtype), alpha=c)
    return total


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return what of a state is tensors."""
    return {name: t for name, t in state.items() if isinstance(t, Tensor)}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _differences(missing: list[str], extra: list[str]) -> str:
    parts = []
    for keys, word in ((missing, "without"), (extra, "with the unknown")):
        if keys:
            more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
            parts.append(f"{word} {', '.join(keys[:_LISTED])}{more}")
    return " and ".join(parts)


def _hint(missing: list[str], extra: list[str]) -> str:
    for prefix in ("module.", "_orig_mod."):
        if missing and {prefix + key for key in missing} <= set(extra):
            return f" Take the prefix {prefix!r} off its keys, or pass the model that has it."
    return " Is it of another model?"
