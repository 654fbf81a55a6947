"""What a Trainer's checkpoint holds of the callback, and the new one that it makes from that."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomwatch.errors import UsageError
from geomwatch.integrations._host.options import HostCallback
from geomwatch.integrations._transformers.trainer import callbacks_of
from geomwatch.sinks.log import logger

_TENSOR = "tensor"
_USERS_OWN = "_geomwatch_callback"  # where a Trainer keeps the callback that the user has made


class CheckpointedCallback(HostCallback):
    """Goes into trainer_state.json, and comes back from there in one of two ways.

    With `restore_callback_states_from_checkpoint` a Trainer puts a new callback in place of the
    user's own, made from what JSON could hold of it; the rest is then taken from the user's own,
    which goes on showing what the new one does. Without, the state is read by the user's own when
    training resumes.
    """

    def __init__(self, *wanted: Any, loss_fn: Any) -> None:
        super().__init__(*wanted)
        self._loss_fn = loss_fn
        self._watch: Any = None  # a TrainingWatch, once there is a training
        self._heir: CheckpointedCallback | None = None  # that the Trainer has put in its place
        # What a Trainer sets in the new callback that it makes from a checkpoint.
        self.saved_state: Any = None  # of the monitor
        self.left_out: list[str] | None = None  # options that the checkpoint could not hold

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the monitor's state, and such options as are JSON."""
        options = {"prefix": self._prefix, "on_critical": self._on_critical, **self._options.given}
        if self._watching:
            self.saved_state = to_json(self._watch.monitor.state_dict())
        return {
            "args": {name: value for name, value in options.items() if is_json(value)},
            "attributes": {"saved_state": self.saved_state, "left_out": list(self._not_json())},
        }

    def _take_up_state(self, state: Any) -> Any:
        """Return the monitor's state that a TrainerState has brought from a checkpoint, or None."""
        if state.global_step == 0:
            return None
        stored = state.stateful_callbacks.get(type(self).__name__, {})
        stored = stored[0] if isinstance(stored, list) else stored
        self.saved_state = stored.get("attributes", {}).get("saved_state")
        return self.saved_state

    @property
    def _watching(self) -> bool:
        return self._watch is not None and self._watch.is_open

    def _take_trainer(self, trainer: Any) -> None:
        """Belong to a Trainer, which may have made this callback in place of the user's own."""
        self._belong_to(trainer, callbacks_of(trainer))
        left_out, self.left_out = self.left_out, None
        if left_out is None:
            setattr(trainer, _USERS_OWN, self)
            return
        users_own: CheckpointedCallback | None = getattr(trainer, _USERS_OWN, None)
        if users_own is not None:
            own = users_own._not_json()
            self._loss_fn = own.pop("loss_fn", None)
            self._options.given |= own
            users_own._heir = self
        elif left_out:
            logger.warning(
                "GeomwatchCallback was restored from a checkpoint without %s, which JSON can't "
                "hold. Leave out restore_callback_states_from_checkpoint: it finds its state "
                "without.",
                ", ".join(left_out),
            )

    def _not_json(self) -> dict[str, Any]:
        own = {"loss_fn": self._loss_fn, **self._options.given}
        return {name: value for name, value in own.items() if not is_json(value)}


def to_json(state: Any) -> Any:
    """Return dicts, lists, tensors and primitives as what JSON knows; a tensor as its bytes."""
    if isinstance(state, Tensor):
        array = state.detach().cpu().numpy()
        text = base64.b64encode(array.tobytes()).decode("ascii")
        return {_TENSOR: text, "dtype": str(array.dtype), "shape": list(array.shape)}
    if isinstance(state, Mapping):
        return {str(key): to_json(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [to_json(value) for value in state]
    return state


def from_json(state: Any) -> Any:
    """Undo `to_json`; tuples come back as lists.

    Raises:
        UsageError: a tensor is damaged.
    """
    if isinstance(state, Mapping) and _TENSOR in state:
        try:
            array = np.frombuffer(base64.b64decode(state[_TENSOR]), dtype=state["dtype"])
            return torch.from_numpy(array.copy().reshape(state["shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the state must hold tensors as geomwatch has saved them, got one with {error}."
            ) from error
    if isinstance(state, Mapping):
        return {key: from_json(value) for key, value in state.items()}
    if isinstance(state, list):
        return [from_json(value) for value in state]
    return state


def is_json(value: Any) -> bool:
    """Tell whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
