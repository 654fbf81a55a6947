"""What ties monitors to an accelerator: its clip_grad_norm_, and its checkpoints."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geomwatch.sinks import logger

if TYPE_CHECKING:
    from geomwatch.integrations.accelerate import AcceleratedMonitor

FILE = "geomwatch.pt"
_ATTRIBUTE = "_geomwatch"


class Ties:
    """One for each accelerator that is watched; the last monitor to be closed takes it off.

    State goes into a checkpoint through the hooks of `save_state` and `load_state`, into a file of
    our own. `register_for_checkpointing` would do it too, but then accelerate refuses to load a
    checkpoint of a run without geomwatch into one with it, and the other way round. It holds no
    monitor alive: an `accelerate.utils.find_executable_batch_size` must be able to free the model.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._monitors: list[weakref.ref[AcceleratedMonitor]] = []
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        self._before = vars(accelerator).get("clip_grad_norm_")  # somebody else's, if any
        self._tap = self._tapped(accelerator.clip_grad_norm_)
        accelerator.clip_grad_norm_ = self._tap
        setattr(accelerator, _ATTRIBUTE, self)

    @classmethod
    def of(cls, accelerator: Any) -> Ties:
        """Return those of an accelerator, tied now if need be."""
        return vars(accelerator).get(_ATTRIBUTE) or cls(accelerator)

    @staticmethod
    def monitors(accelerator: Any) -> list[AcceleratedMonitor]:
        """Return the monitors that are tied to an accelerator, in the order of their making."""
        ties: Ties | None = vars(accelerator).get(_ATTRIBUTE)
        return [] if ties is None else ties._living()

    def add(self, monitor: AcceleratedMonitor) -> None:
        """Tie a monitor."""
        self._monitors.append(weakref.ref(monitor))

    def remove(self, monitor: AcceleratedMonitor) -> None:
        """Untie a monitor, and with the last one leave the accelerator as it was."""
        self._monitors = [weakref.ref(m) for m in self._living() if m is not monitor]
        accelerator = self._accelerator
        if self._monitors or vars(accelerator).get(_ATTRIBUTE) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        # Whoever has wrapped it since holds on to ours, which goes on calling the original.
        if vars(accelerator).get("clip_grad_norm_") is self._tap:
            del accelerator.clip_grad_norm_
            if self._before is not None:
                accelerator.clip_grad_norm_ = self._before
        delattr(accelerator, _ATTRIBUTE)

    def _living(self) -> list[AcceleratedMonitor]:
        return [monitor for ref in self._monitors if (monitor := ref()) is not None]

    def _tapped(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(clip)
        def clip_grad_norm_(
            parameters: Any, max_norm: float, norm_type: float = 2, **options: Any
        ) -> Any:
            if isinstance(parameters, Tensor):
                return clip(parameters, max_norm, norm_type, **options)
            params = list(parameters)  # once, it may be a generator
            norm = clip(params, max_norm, norm_type, **options)
            for monitor in self._living():
                monitor.note_clipped(params, norm, norm_type)
            return norm

        return clip_grad_norm_

    def _save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        states = [monitor.state_dict() for monitor in self._living()]
        self._accelerator.save(states, Path(output_dir) / FILE)

    def _load(self, models: list[Any], input_dir: str) -> None:
        file, monitors = Path(input_dir) / FILE, self._living()
        # Tensors and primitives only, so that nothing of a stranger's checkpoint is executed.
        states = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else []
        if len(states) != len(monitors):
            logger.warning(
                "the checkpoint %s holds the state of %d monitors, watched are %d: they begin "
                "anew, with steps counted from 0. Call watch() as often, and in the same order, as "
                "when it was saved.",
                input_dir,
                len(states),
                len(monitors),
            )
            return
        for monitor, state in zip(monitors, states, strict=True):
            monitor.load_state_dict(state)
