"""What can be wrong with a call of watch(), and with the place of monitor.step()."""

from __future__ import annotations

from typing import Any

from torch import nn

from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.integrations._accelerate.ties import Ties
from geomwatch.integrations._host.parallelism import check_parallelism
from geomwatch.sinks.log import logger
from geomwatch.stability.problem import unwrap

PLACE = (
    "Call monitor.step(batch) for each micro-batch, inside `with accelerator.accumulate(model):`, "
    "after accelerator.backward(loss) and before optimizer.step()."
)
_PREPARE = (
    "Call watch() after `model, optimizer, ... = accelerator.prepare(model, optimizer, ...)`, with "
    "what it returned."
)


def check_prepared(accelerator: Any, model: Any, loss_fn: Any, optimizer: Any) -> None:
    """Refuse what `watch` can't work with.

    Raises:
        UsageError: as `watch` says.
    """
    if not hasattr(accelerator, "sync_gradients"):
        raise UsageTypeError(
            f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}."
        )
    if not callable(loss_fn):
        raise UsageTypeError(
            f"loss_fn must be callable as loss_fn(model, batch), got {type(loss_fn).__name__}."
        )
    check_parallelism(accelerator, model, "watch()")
    if not hasattr(optimizer, "step_was_skipped"):
        raise UsageTypeError(
            f"optimizer must be prepared, got {type(optimizer).__name__}. {_PREPARE}"
        )
    _check_model(accelerator, model, optimizer)
    inner = unwrap(optimizer)
    if any(tied.optimizer is inner for tied in Ties.tied_to(accelerator)):
        raise UsageError(
            "watch() must be called once for an optimizer, got one that is watched. Use the "
            "monitor that the first call returned, or close() it before."
        )
    if _has_stepped(inner):
        logger.warning(
            "watch() was called for an optimizer that has taken steps. They are not counted, and "
            "records begin at step 0. To go on where a checkpoint stopped, call watch() before "
            "accelerator.load_state()."
        )


def check_window(accelerator: Any, *, before: int, seen: int) -> None:
    """Refuse a first window that is not whole; `before` micro-batches were there already.

    Raises:
        UsageError: monitor.step() was called outside accumulate(), or not for each micro-batch.
    """
    count = accelerator.gradient_accumulation_steps
    expected = count - before % count
    # The last window of an epoch may be shorter.
    if seen >= expected or accelerator.gradient_state.end_of_dataloader:
        return
    if accelerator.step == before:
        raise UsageError(
            "monitor.step() must be called inside `with accelerator.accumulate(model):`, got none "
            f"that was entered and gradient_accumulation_steps={count}. {PLACE}"
        )
    if seen == 1:
        raise UsageError(
            f"monitor.step() must be called for each micro-batch, got one of {expected}. Don't put "
            f"it under `if accelerator.sync_gradients:`. {PLACE}"
        )


def bare(accelerator: Any, model: Any) -> Any:
    """Return the model inside the wrappers of `prepare`; its forward keeps the autocast.

    Out of a compiled wrapper too: `unwrap_model` would put it back into that one without its DDP.
    """
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _check_model(accelerator: Any, model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    prepared = [bare(accelerator, other) for other in accelerator._models]
    if not any(bare(accelerator, model) is other for other in prepared):
        raise UsageError(f"model must be prepared, got {type(model).__name__}. {_PREPARE}")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise UsageError(
            f"optimizer must step the parameters of model, got {type(unwrap(optimizer)).__name__} "
            f"of another model than {type(model).__name__}. Pass the two that belong together."
        )


def _has_stepped(optimizer: Any) -> bool:
    """Tell by its state; some optimizers make that before their first step, with step 0."""
    states = getattr(optimizer, "state", {}).values()
    return any(float(state.get("step", 1)) > 0 for state in states if state)
