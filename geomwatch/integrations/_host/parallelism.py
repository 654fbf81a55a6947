"""How the processes of an Accelerator share the training of a model; what no probe can follow."""

from __future__ import annotations

from typing import Any

from geomwatch.errors import UsageError
from geomwatch.parallel.ranks import Ranks

_TAKE_THE_STEP = ("DEEPSPEED", "MEGATRON_LM")
_CUT_THE_BATCH = ("tp", "cp", "sp")  # tensor, context and sequence parallelism


def check_parallelism(accelerator: Any, model: Any, who: str) -> None:
    """Make sure that `p.grad` will hold the mean over all processes, each with a batch of its own.

    `model` is wrapped for them already. DistributedDataParallel and FSDP2 do that.

    Raises:
        UsageError: it won't.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _TAKE_THE_STEP:
        raise UsageError(
            f"{who} must find gradients in p.grad before a step that the loop takes, got {kind}, "
            "which takes it inside accelerator.backward(): there is no moment to probe at."
        )
    mesh = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(mesh, f"{name}_size", 1) or 1 for name in _CUT_THE_BATCH}
    if any(size > 1 for size in sizes.values()):
        found = ", ".join(f"{name}_size={size}" for name, size in sizes.items() if size > 1)
        raise UsageError(
            f"{who} must have a model and a batch whole on each rank, got {found}. Tensor, context "
            "and sequence parallelism can't be measured."
        )
    count = getattr(accelerator, "num_processes", 1)
    if Ranks.of(model).size != count:
        raise UsageError(
            f"{who} must find gradients that are averaged over {count} processes, got {kind} with "
            f"{type(model).__name__}. Use DistributedDataParallel, or FSDP2 (fsdp_version=2)."
        )
