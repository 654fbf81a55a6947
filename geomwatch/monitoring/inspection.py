"""What is wrong with a batch: looked for when a loss or a gradient is, and never otherwise."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from geomwatch.curvature import batches
from geomwatch.curvature.subject import Subject
from geomwatch.isolation.signals import traceless
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.findings import Findings
from geomwatch.sinks.log import logger
from geomwatch.stability.problem import unwrap
from geomwatch.vectors.layout import Layout


class Inspector(Resumable):
    """Knows the usual sizes of the tensors in a batch, and looks at one that may be bad."""

    usual = 5  # looks whose median size is the usual one,
    fewest = 3  # and so many before there is one

    _sizes: Kept[dict[str, list[float]]]  # mean absolute values at the last looks

    def __init__(self, subject: Subject, optimizer: Any) -> None:
        self._subject, self._optimizer = subject, unwrap(optimizer)
        self._sizes = {}

    def follow(self, layout: Layout, optimizer: Any) -> None:
        """Look at other weights from now on."""
        self._subject = replace(self._subject, layout=layout)
        self._optimizer = unwrap(optimizer)

    def note(self, window: Sequence[Any]) -> None:
        """Take note of the sizes in the batches of a look."""
        with contextlib.suppress(Exception):  # of tensors of a kind that has no mean
            for name, size in _sizes_of(window).items():
                if math.isfinite(size):
                    self._sizes[name] = [*self._sizes.get(name, []), size][-self.usual :]

    def __call__(
        self, window: Sequence[Any], past: Sequence[Any] = (), *, before: bool = False
    ) -> Findings:
        """Look at a batch, the weights and a forward pass; not that of the step `before`."""
        try:
            return self._look(past if before else window, is_past=before)
        except Exception as error:  # whatever is wrong with the batch
            logger.debug("a batch could not be looked at: %s: %s", type(error).__name__, error)
            return Findings()

    def _look(self, window: Sequence[Any], *, is_past: bool) -> Findings:
        tensors = named_tensors(window)
        outsized, times = self._largest(window)
        weights = self._first_bad_weight()
        module, is_loss = None, False
        if not (is_past or weights):
            module, is_loss = self._forward(window)
        return Findings(
            not_finite=next(filter(None, (_bad_entries(n, t) for n, t in tensors)), ""),
            unlabelled=next((_constant(n, t) for n, t in tensors if _is_unlabelled(t)), ""),
            outsized=outsized,
            times=times,
            module=module or "",
            is_loss=is_loss,
            weights=weights,
            has_weights=True,
            is_scaled=has_scaler(self._optimizer),
        )

    def _largest(self, window: Sequence[Any]) -> tuple[str, float]:
        found = [("", 1.0)]
        for name, size in _sizes_of(window).items():
            before = self._sizes.get(name, [])
            usual = statistics.median(before) if len(before) >= self.fewest else 0.0
            if usual > 0 and math.isfinite(size):
                found.append((name, size / usual))
        return max(found, key=lambda each: each[1])

    def _first_bad_weight(self) -> str:
        layout = self._subject.layout
        pairs = zip(layout.names, layout.params, strict=True)
        return next((n for n, p in pairs if not bool(_local(p).isfinite().all())), "")

    @traceless
    def _forward(self, window: Sequence[Any]) -> tuple[str | None, bool]:
        """Return the first module with a bad output, and whether the loss alone is bad."""
        if self._subject.ranks.size > 1 or not window:  # the others are not here to take part
            return None, False
        subject = self._subject.set(precision="training", micro_batch=None)
        with subject.on(window, products=False) as objective:
            module = objective.first_not_finite()
            return module, module is None and not math.isfinite(objective.value())


def named_tensors(window: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """List the tensors of some batches by what one writes to get at them."""
    found = []
    for i, batch in enumerate(window):
        start = "batch" if len(window) == 1 else f"micro-batch {i}"
        for path, part in batches.parts(batch):
            if isinstance(part, Tensor) and not part.is_nested and part.numel():
                found.append((start + "".join(f"[{key!r}]" for key in path), part.detach()))
    return found


def has_scaler(optimizer: Any) -> bool:
    """Tell whether a GradScaler looks after an optimizer. Walks through all objects there are."""
    if not _may_have_scaler(optimizer):
        return False
    gc.collect()  # one that nobody has any more may still be there
    return _may_have_scaler(optimizer)


def _may_have_scaler(optimizer: Any) -> bool:
    scalers = [t for t in gc.get_objects() if issubclass(type(t), GradScaler)]
    # before `unscale_` or `step` it knows of none
    states = [s._per_optimizer_states for s in scalers if s.is_enabled() and s._scale is not None]
    return any(id(optimizer) in known or not known for known in states)


def _sizes_of(window: Sequence[Any]) -> dict[str, float]:
    """Return the mean absolute values of the floating-point tensors, over the whole window."""
    found: dict[str, list[float]] = {}
    for batch in window:
        for name, tensor in named_tensors([batch]):
            if tensor.is_floating_point() or tensor.is_complex():
                values = _local(tensor)
                found.setdefault(name, []).append(float(values.abs().float().mean()))
    return {name: statistics.fmean(sizes) for name, sizes in found.items()}


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout == torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _bad_entries(name: str, tensor: Tensor) -> str:
    values = _local(tensor)
    bad = int(values.numel() - values.isfinite().sum())
    return f"{name} ({bad} of {values.numel()} entries)" if bad else ""


def _is_unlabelled(tensor: Tensor) -> bool:
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not integers or tensor.layout != torch.strided:
        return False
    first = tensor.flatten()[0]
    return bool(first < 0) and bool((tensor == first).all())


def _constant(name: str, tensor: Tensor) -> str:
    return f"{name} ({int(tensor.flatten()[0])} throughout)"
