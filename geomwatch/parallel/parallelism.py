"""Ways to share a model between processes that no probe can follow."""

from __future__ import annotations

from torch import nn

from geomwatch.errors import UsageError

_FSDP = "torch.distributed.fsdp"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def refuse_flat_parameters(model: nn.Module) -> None:
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


def refuse_tensor_parallel(model: nn.Module) -> None:
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
