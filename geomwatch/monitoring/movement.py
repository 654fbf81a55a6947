"""Whether weights move at all: some of their entries, compared over some steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from geomwatch.observation.movement import Movement


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which entries are compared, and when, in optimizer steps."""

    span: int = (
        20  # over which: updates that are rounded at random, or kept elsewhere, show by then
    )
    young: int = 100  # until then one span after the other,
    period: int = 500  # and later one at each multiple
    tensors: int = 8  # the largest, which hold most weights
    entries: int = 256  # of each, spread over it


@dataclass(frozen=True, slots=True)
class _Sample:
    step: int
    rate: float
    params: list[Tensor]
    values: list[Tensor]
    moving: list[Tensor]  # whether entries have a gradient


class MovementSampler:
    """Compares entries of the weights with what they were `span` steps before.

    Entries whose gradient is zero count for nothing: rows of an embedding that no item has used, or
    units that are dead, stay still in healthy runs as well. A resumed run begins a span anew.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.sampling = Sampling()
        whole = [p for p in params if type(p.data) is Tensor and p.numel()]
        self._largest = sorted(whole, key=lambda p: -p.numel())
        self._kept: _Sample | None = None

    def __call__(self, step: int, rates: Sequence[float]) -> Movement | None:
        """Sample before a step, or compare with the sample before; None where neither is due."""
        how, found = self.sampling, None
        if self._kept is not None and step >= self._kept.step + how.span:
            found, self._kept = self._compared(step, self._kept), None
        if step % (how.span if step < how.young else how.period) == 0 and self._kept is None:
            self._kept = self._sampled(step, rates)
        return found

    def due(self, step: int) -> int:
        """Return the next step after this one at which it has something to do."""
        how = self.sampling
        if self._kept is not None:
            return self._kept.step + how.span
        period = how.span if step < how.young else how.period
        return step + period - step % period

    def _sampled(self, step: int, rates: Sequence[float]) -> _Sample:
        dense = [p for p in self._largest if p.grad is not None and not p.grad.is_sparse]
        used = dense[: self.sampling.tensors]
        moving = [self._some(p.grad) != 0 for p in used if p.grad is not None]
        return _Sample(step, max(rates, default=1.0), used, list(map(self._some, used)), moving)

    def _compared(self, step: int, sample: _Sample) -> Movement | None:
        counted = same = change = size = 0.0
        for p, before, moving in zip(sample.params, sample.values, sample.moving, strict=True):
            now = self._some(p)
            if now.shape != before.shape:
                return None
            counted += float(moving.sum())
            same += float(((now == before) & moving).sum())
            change += float((now.float() - before.float()).square().sum())
            size += float(before.float().square().sum())
        if counted == 0 or size == 0:
            return None
        dtype = str(sample.params[0].dtype).removeprefix("torch.")
        relative = math.sqrt(change / size)
        return Movement(step - sample.step, same / counted, relative, dtype, sample.rate)

    def _some(self, tensor: Tensor) -> Tensor:
        values = tensor.detach().reshape(-1)
        return values[:: max(1, values.numel() // self.sampling.entries)].clone()
