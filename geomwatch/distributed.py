"""The processes that train one model together: sums over them, and decisions they share.

Every collective of ours is preceded by an agreement: a rank whose part has failed says so, and all
ranks then raise in the same place instead of waiting for it. Everything that decides what comes
next is computed from sums, which are the same on all ranks to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, whose own forward would synchronise."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model


class RankError(RuntimeError):
    """Another rank could not go on with its part of a probe."""


class Ranks:
    """The ranks of a process group, or this process alone."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None
    ) -> None:
        self._group = group
        self._device = device  # that the group's backend can reduce on
        self._known: BaseException | None = None  # the failure that all ranks know of
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Return the ranks that share the training of a model, as its wrapper or shards tell."""
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return cls(model.process_group, model.device)
        for p in model.parameters() if isinstance(model, nn.Module) else ():
            mesh = getattr(p, "device_mesh", None)
            if mesh is not None:
                group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
                return cls(group, p.device)
        return cls()

    def sum(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the sums over all ranks of what `compute` returns on each.

        Raises:
            RankError: it failed on another rank. Where it failed its own error passes through.
        """
        if self.size == 1:
            return compute()
        with self.together():
            parts = compute()
        for part in parts:
            dist.all_reduce(part, group=self._group)
        return parts

    def total(self, number: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return number
        part = torch.tensor([number], dtype=torch.float64, device=self._device)
        dist.all_reduce(part, group=self._group)
        return float(part)

    def all(self, flag: bool) -> bool:
        """Tell whether the flag is set on every rank."""
        return flag if self.size == 1 else self.total(float(flag)) == self.size

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return flag if self.size == 1 else self.total(float(flag)) > 0

    def sum_and_count(self, value: Tensor | float | None) -> Tensor:
        """Return the sum of a number over the ranks that have one, and their number, on device."""
        part = torch.zeros(2, dtype=torch.float32, device=self._device)
        if value is not None:
            part[0], part[1] = torch.as_tensor(value).detach().reshape(()).to(part), 1.0
        dist.all_reduce(part, group=self._group)
        return part

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block only if every rank has got through it.

        Raises:
            RankError: another rank has not.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:  # passed on once all ranks know
            if error is not self._known:
                self._known = error
                self.all(False)
            raise
        if not self.all(True):
            self._known = RankError(
                "another rank failed in its part of the probe; its own log says why"
            )
            raise self._known
