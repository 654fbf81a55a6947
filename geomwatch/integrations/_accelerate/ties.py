"""What ties the watches of a loop to its accelerator: its clip_grad_norm_, and its checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geomwatch.integrations._host.tap import Method, Tap, named
from geomwatch.sinks.log import logger

FILE = "geomwatch.pt"
_ATTRIBUTE = "_geomwatch"


class Ties(Tap):
    """One for each accelerator that is watched; the last watch to be closed takes it off.

    State goes into a checkpoint through the hooks of `save_state` and `load_state`, into a file of
    our own. `register_for_checkpointing` would do it too, but then accelerate refuses to load a
    checkpoint of a run without geomwatch into one with it, and the other way round. It holds no
    watch alive: an `accelerate.utils.find_executable_batch_size` must be able to free the model.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self._accelerator = accelerator
        self._tied: list[weakref.ref[Any]] = []  # each a LoopWatch
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        self.stand_around(accelerator, "clip_grad_norm_", self._around_clip)
        setattr(accelerator, _ATTRIBUTE, self)

    @classmethod
    def of(cls, accelerator: Any) -> Ties:
        """Return those of an accelerator, tied now if need be."""
        return vars(accelerator).get(_ATTRIBUTE) or cls(accelerator)

    @staticmethod
    def tied_to(accelerator: Any) -> list[Any]:
        """Return what is tied to an accelerator, in the order of its making."""
        ties: Ties | None = vars(accelerator).get(_ATTRIBUTE)
        return [] if ties is None else ties._living()

    def add(self, watch: Any) -> None:
        """Tie a watch."""
        self._tied.append(weakref.ref(watch))

    def remove(self, watch: Any) -> None:
        """Untie a watch, and with the last one leave the accelerator as it was."""
        self._tied = [weakref.ref(other) for other in self._living() if other is not watch]
        if self._tied or not self.is_open:
            return
        for hook in self._hooks:
            hook.remove()
        self.close()
        delattr(self._accelerator, _ATTRIBUTE)

    def _living(self) -> list[Any]:
        return [watch for ref in self._tied if (watch := ref()) is not None]

    def _around_clip(self, original: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = named(("parameters", "max_norm", "norm_type"), args, kwargs)
        if isinstance(given["parameters"], Tensor):
            return original(**given)
        given["parameters"] = list(given["parameters"])  # once, it may be a generator
        norm = original(**given)
        for watch in self._living():
            watch.clipped(given["parameters"], norm, given.get("norm_type", 2))
        return norm

    def _save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        states = [watch.monitor.state_dict() for watch in self._living()]
        self._accelerator.save(states, Path(output_dir) / FILE)

    def _load(self, models: list[Any], input_dir: str) -> None:
        file, watches = Path(input_dir) / FILE, self._living()
        for watch in watches:
            watch.checkpoint_comes()
        # Tensors and primitives only, so that nothing of a stranger's checkpoint is executed.
        states = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else []
        if len(states) != len(watches):
            logger.warning(
                "the checkpoint %s holds the state of %d monitors, watched are %d: they begin "
                "anew, with steps counted from 0. Call watch() as often, and in the same order, as "
                "when it was saved.",
                input_dir,
                len(states),
                len(watches),
            )
            return
        for watch, state in zip(watches, states, strict=True):
            watch.monitor.load_state_dict(state)
