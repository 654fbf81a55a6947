"""Which optimizer steps, where the one that is known does not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class Movement:
    """Tells whether parameters have moved since the last call."""

    def __init__(self) -> None:
        self._versions: tuple[tuple[int, int], ...] = ()  # with the id of each
        self._sample: Tensor | None = None

    def seen(self, params: Sequence[Tensor]) -> bool:
        """Look, and tell; False at the first call of these parameters.

        Versions tell of what is changed in place, a copy of the smallest of them of the rest
        (p.data = ...). A microsecond a parameter.
        """
        versions, sample = self._versions, self._sample
        self._versions = tuple((id(p), p._version) for p in params)
        smallest = min(params, key=Tensor.numel)
        self._sample = smallest.detach().clone()
        if sample is None or [i for i, _ in versions] != [i for i, _ in self._versions]:
            return False
        if sample.shape != self._sample.shape or sample.device != self._sample.device:
            return True
        return versions != self._versions or not torch.equal(sample, self._sample)


class OptimizerSearch:
    """Notices that weights move while the optimizer that is known does not step, and who steps.

    A call at which a step was counted costs a comparison of two integers. From the second call in
    a row without one a hook for all torch optimizers notes which of them step, until one is found
    or the known one steps again. A step that a GradScaler leaves out moves nothing.
    """

    def __init__(self, calls: int = 2) -> None:
        self._calls = calls  # at which weights have moved; one may be of weights that are clipped
        self._steps = -1
        self._moved = 0
        self._movement = Movement()
        self._handle: Any = None
        self._stepped: list[weakref.ref[Any]] = []
        self._told = False
        self.missed = 0  # steps that were taken by another since the last that was counted

    def call(self, steps: int, trained: Callable[[], Sequence[Tensor]]) -> list[Any]:
        """Take note of a call after so many counted steps; return the optimizers that step instead.

        `trained` returns the parameters that are trained now, which may be others than those that
        are measured. Each verdict is given once.
        """
        if steps != self._steps:
            self._steps = steps
            if self.missed:
                self.reset()
            return []
        self.missed += 1
        if self._told:
            return []
        params = trained()
        self._moved += self._movement.seen(params)
        if self._handle is None:
            self._watch_all()
        if self._moved < self._calls:
            return []
        own = set(map(id, params))
        found = [o for ref in self._stepped if (o := ref()) is not None and _holds(o, own)]
        self._told = bool(found)
        if found:
            self._unhook()
        return found

    def stepped(self, steps: int) -> None:
        """Take note of calls at which steps were counted, the last after so many."""
        self._steps = steps

    def reset(self) -> None:
        """Begin anew."""
        self._unhook()
        self._moved, self.missed, self._told = 0, 0, False
        self._movement, self._stepped = Movement(), []

    def _watch_all(self) -> None:
        me = weakref.ref(self)

        def note(optimizer: Any, *_: object) -> None:
            search = me()
            if search is not None:
                search._note(optimizer)

        self._handle = register_optimizer_step_post_hook(note)
        weakref.finalize(self, self._handle.remove)

    def _note(self, optimizer: Any) -> None:
        if all(ref() is not optimizer for ref in self._stepped):
            self._stepped.append(weakref.ref(optimizer))

    def _unhook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _holds(optimizer: Any, params: set[int]) -> bool:
    return any(id(p) in params for group in optimizer.param_groups for p in group["params"])
