"""How a model that fully_shard has cut is measured: on a replica, or on its shards."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from geomwatch.curvature.subject import Subject
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.fsdp import is_sharded
from geomwatch.vectors.layout import Layout

_VECTORS = 28  # of D entries each, at the peak of a monitor's first probe (docs/decisions/009)
_SHARE = 0.5  # of the free memory: training has its own peaks


def choose_shards(subject: Subject) -> tuple[Subject, dict[str, str]]:
    """Choose between a replica and local shards; the same on all ranks. One collective.

    Returns the subject with the layout that says where its vectors are held, and what to record.

    A replica can be differentiated twice, but takes two copies of the whole model on each rank (one
    to put it back from) and whole vectors. It is chosen where these take no more than half of the
    memory that is free on every rank, as seen at the first probe. Local shards take that divided by
    the number of ranks, and have differences of gradients only: `hvp="finite_difference"` asks for
    them, `hvp="double_backward"` and `operator="ggn"` for a replica.
    """
    layout, hvp = subject.layout, subject.how.hvp
    if not is_sharded(layout.params):
        return subject, {}
    needs = _bytes_of_replica(subject.model, layout)
    free = _free_bytes(layout.device, subject.ranks)
    fits = subject.ranks.all(free is None or needs <= _SHARE * free)
    room = f"{_in_gb(needs)} for it and whole vectors, of {_in_gb(free)} free"
    why = _why_replica(subject.model, layout, hvp, subject.how.operator)
    if not why and hvp == "auto" and fits:
        why = f"there is room: {room}"
    if why:
        return subject, {"sharding": f"measured on a replica: {why}"}
    from geomwatch.vectors.shard_layout import ShardLayout  # imports DTensor, which takes a while

    why = f"a replica has no room: {room}" if hvp == "auto" else f"hvp={hvp!r}"
    cut = replace(subject, layout=ShardLayout(layout.names, layout.params))
    return cut.set(hvp="finite_difference"), {"sharding": f"measured on local shards: {why}"}


def _why_replica(model: nn.Module, layout: Layout, hvp: str, operator: str) -> str:
    """Say why local shards are out of the question; "" if they are not."""
    if hvp == "double_backward":
        return f"hvp={hvp!r}"
    if operator != "hessian":
        return f"operator={operator!r}"
    from geomwatch.curvature.fully_sharded import FullySharded
    from geomwatch.vectors.shard_layout import cut_otherwise

    name = cut_otherwise(layout)
    if name:
        return f"parameter {name} is not cut along its dimension 0 as the others are"
    if FullySharded(model).unknown_reduction():
        return "gradients are reduced by an operation of the user's own"
    return ""


def _bytes_of_replica(model: nn.Module, layout: Layout) -> int:
    scalars = 2 * sum(p.numel() for p in model.parameters()) + _VECTORS * layout.dim
    return scalars * layout.dtype.itemsize


def _free_bytes(device: torch.device, ranks: Ranks) -> int | None:
    """Memory that is free for this rank; None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type != "cpu":
        return None
    free_here = _free_on_host()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))  # as torchrun sets it
    return None if free_here is None else free_here // sharing


def _free_on_host() -> int | None:
    try:
        psutil: Any = importlib.import_module("psutil")
        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS no such name
        return None


def _in_gb(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 1e9:.3g} GB"
