"""The processes that train one model together: sums over them, and decisions they share.

Every collective of ours is preceded by an agreement: a rank whose part has failed says so, and all
ranks then raise in the same place instead of waiting for it. Everything that decides what comes
next is computed from sums, which are the same on all ranks to the last bit.

When a collective itself fails (a rank was killed, or did not come in time), no other one is tried:
probing ends, and what becomes of the training is left to its own next collective.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geomwatch.errors import UsageError

_FSDP = "torch.distributed.fsdp"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_CUT_OFF = "the other ranks can't be reached any more"
_REFUSED = "another rank can't be watched; its own error says why."
_ANOTHER = "another rank failed in its part of the probe; its own log says why"


def is_first_rank() -> bool:
    """Tell whether this process is the one that speaks for all; a process alone is."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


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
        self._is_cut_off = False  # from the others, by a collective that failed
        self._wrapper: nn.parallel.DistributedDataParallel | None = None
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Return the ranks that share the training of a model, as its wrapper or shards tell.

        Raises:
            UsageError: they share it in a way that no probe can follow: by flat parameters, as
                FullyShardedDataParallel does, or by tensor parallelism.
        """
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if not isinstance(model, nn.Module):
            return cls()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            ranks = cls(model.process_group, model.device)
            ranks._wrapper = model
            return ranks
        _refuse_flat_parameters(model)
        for p in model.parameters():
            mesh = getattr(p, "device_mesh", None)
            if mesh is not None:
                _refuse_tensor_parallel(model)
                group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
                return cls(group, p.device)
        return cls()

    def refuse_join(self) -> None:
        """Refuse a loop in which ranks that have run out of batches let the others go on alone.

        Raises:
            UsageError: it runs inside such a `join()`.
        """
        joined = None if self._wrapper is None else self._wrapper._join_config
        if joined is not None and joined.enable and not joined.throw_on_early_termination:
            raise UsageError(
                "all ranks must take the same number of steps, got a loop inside join(), where one "
                "that has run out of batches takes no part in probes. Pass "
                "throw_on_early_termination=True, or batches that are as many on each rank."
            )

    def sum(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the sums over all ranks of what `compute` returns on each.

        Raises:
            RankError: it failed on another rank, or a rank can't be reached. Where it failed its
                own error passes through.
        """
        if self.size == 1:
            return compute()
        with self.together():
            parts = compute()
        for part in parts:
            self.add_up(part)
        return parts

    def add_up(self, part: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place, without asking whether all have got there.

        Raises:
            RankError: a rank can't be reached.
        """
        if self.size > 1 and not self._reduce(part):
            raise RankError(_CUT_OFF)
        return part

    def mean(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over all ranks of tensors that each has, in one collective.

        Raises:
            RankError: a rank can't be reached.
        """
        if self.size == 1:
            return list(parts)
        (total,) = self.sum(lambda: (torch.cat([part.reshape(-1) for part in parts]),))
        pieces = total.div_(self.size).split([part.numel() for part in parts])
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]

    def total(self, number: float) -> float:
        """Return the sum of a number over all ranks; the number itself once they are cut off.

        Raises:
            RankError: another rank has failed meanwhile, and says so here.
        """
        if self.size == 1:
            return number
        part = torch.tensor([number], dtype=torch.float64, device=self._device)
        total = float(part) if self._reduce(part) else number
        if math.isnan(total):
            self._known = RankError(_ANOTHER)
            raise self._known
        return total

    def all(self, flag: bool) -> bool:
        """Tell whether the flag is set on every rank; never once they are cut off."""
        return flag if self.size == 1 else self.total(float(flag)) == self.size

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank that can be reached."""
        return flag if self.size == 1 else self.total(float(flag)) > 0

    def each(self, number: float) -> list[float]:
        """Return the number that each rank has.

        Raises:
            RankError: a rank can't be reached, or has failed meanwhile.
        """
        if self.size == 1:
            return [number]
        self.all(True)
        numbers = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        numbers[dist.get_rank(self._group)] = number
        return [float(n) for n in self.add_up(numbers)]

    def sum_and_count(self, value: Tensor | float | None) -> Tensor:
        """Return the sum of a number over the ranks that have one, and their number, on device."""
        part = torch.zeros(2, dtype=torch.float32, device=self._device)
        if value is not None:
            part[0], part[1] = torch.as_tensor(value).detach().reshape(()).to(part), 1.0
        own = part.clone()
        return part if self._reduce(part) else own

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block only if every rank has got through it.

        A rank that fails inside tells the others once: it contributes NaN to the next number that
        they sum, at the end of the block at the latest. There they find it, and leave the block.

        Raises:
            RankError: another rank has not, or can't be reached.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:  # passed on once all ranks know
            if not self._is_known(error):
                self._known = error
                self._reduce(torch.tensor([math.nan], dtype=torch.float64, device=self._device))
            raise
        if not self.all(True):
            self._known = RankError(_CUT_OFF)
            raise self._known

    @contextlib.contextmanager
    def refused_together(self) -> Iterator[None]:
        """Raise a UsageError on every rank when the block raises one on any.

        Raises:
            UsageError: as the block does, on this rank or on another.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # passed on, or replaced by that of another rank
            failure = error
        self.refuse_after(failure)
        if failure is not None:
            raise failure

    def refuse_after(self, failure: Exception | None) -> None:
        """Raise on every rank where the failure of any, this one's or another's, is a UsageError.

        Raises:
            UsageError: it is.
        """
        refused = failure if isinstance(failure, UsageError) else None
        if self.any(refused is not None):
            raise refused or UsageError(_REFUSED)

    def _is_known(self, error: BaseException | None) -> bool:
        """Tell whether all ranks have been told of an error, or of what it was made of."""
        while error is not None and error is not self._known:
            error = error.__cause__
        return error is not None

    def _reduce(self, part: Tensor) -> bool:
        """Sum a tensor over the ranks in place; tell whether they could be reached."""
        if self._is_cut_off:
            return False
        try:
            dist.all_reduce(part, group=self._group)
        except RuntimeError as error:  # by which torch.distributed tells of a rank that is gone
            self._is_cut_off = True
            logging.getLogger("geomwatch").warning(
                "%s (%s). Nothing is measured from here on; whether training goes on is up to its "
                "own collectives.",
                _CUT_OFF,
                error,
                extra={"each_rank": True},
            )
        return not self._is_cut_off


def _refuse_flat_parameters(model: nn.Module) -> None:
    """Refuse FSDP1, which keeps the parameters of several layers in one.

    Raises:
        UsageError: a module is wrapped so.
    """
    for name, module in model.named_modules():
        if any(kind.__module__ == _FSDP1 for kind in type(module).__mro__):
            raise UsageError(
                "model must be sharded by fully_shard (FSDP2), got FullyShardedDataParallel (FSDP1)"
                f"{f' in {name!r}' if name else ''}, whose flat parameters can't be differentiated "
                "twice. Use torch.distributed.fsdp.fully_shard, or DistributedDataParallel."
            )


def _refuse_tensor_parallel(model: nn.Module) -> None:
    """Refuse layers that several ranks compute together.

    Shards of data parallelism are of modules that fully_shard has made its own, all on one mesh of
    one dimension, or replicated along the first of two (HSDP).

    Raises:
        UsageError: a parameter is cut otherwise.
    """
    managed = {
        id(p)
        for module in model.modules()
        if any(kind.__module__.startswith(_FSDP) for kind in type(module).__mro__)
        for p in module.parameters()
    }
    first = None
    for name, p in model.named_parameters():
        placements, mesh = getattr(p, "placements", None), getattr(p, "device_mesh", None)
        if placements is None:
            continue
        first = first or mesh
        hybrid = len(placements) == 2 and placements[0].is_replicate()
        alike = mesh == first and (len(placements) == 1 or hybrid)
        if id(p) not in managed or not alike:
            raise UsageError(
                "ranks must share a model by data parallelism alone, got a parameter that is cut "
                f"otherwise: {name!r}, {placements}. Tensor and expert parallel models can't be "
                "measured."
            )
