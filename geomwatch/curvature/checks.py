"""What can be wrong with a loss_fn, its loss or its batch, and what to do about each."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature import batches
from geomwatch.errors import UsageError, UsageTypeError

_WRONG_DEVICE = "same device|expected device|expected on|weight type|storage has not been allocated"


def check_loss_fn(loss_fn: object) -> None:
    """Refuse what can't be a loss_fn."""
    if not callable(loss_fn):
        raise UsageTypeError(
            f"loss_fn must be callable as loss_fn(model, batch), got {type(loss_fn).__name__}."
        )


def check_optimizer(optimizer: object) -> None:
    """Refuse what can't be an optimizer."""
    if not hasattr(optimizer, "param_groups"):
        raise UsageTypeError(
            "optimizer must be the torch optimizer in use (anything with param_groups), got "
            f"{type(optimizer).__name__}."
        )


def check_count(name: str, value: object, least: int) -> None:
    """Refuse a number of things that is none or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be an integer >= {least}, got {value!r}.")


def check_loss(loss: object) -> Tensor:
    """Return the loss as a scalar tensor, or refuse it."""
    if not isinstance(loss, Tensor):
        raise UsageTypeError(
            f"loss_fn must return a scalar tensor, got {type(loss).__name__} {loss!r}. "
            "Return the loss itself, without .item() or float()."
        )
    if loss.numel() != 1:
        raise UsageError(
            f"loss_fn must return a scalar tensor, got shape {tuple(loss.shape)}. "
            "Reduce it the way you train on it, for example loss.mean()."
        )
    if not loss.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            "loss_fn must return a loss that depends on the model's parameters, got a tensor "
            "without a graph. Don't detach it or compute it under torch.no_grad()."
        )
    return loss.reshape(())


def explain_device(error: RuntimeError, batch: Any, device: torch.device) -> None:
    """Raise a UsageError if a batch on another device is what the error is about."""
    devices = {str(t.device) for t in batches.tensors(batch)}
    elsewhere = bool(devices) and str(device) not in devices
    # Out of memory, say, has nothing to do with a batch that loss_fn itself moves.
    if elsewhere and re.search(_WRONG_DEVICE, str(error)):
        raise UsageError(
            f"batch must be on the model's device {device}, got tensors on "
            f"{', '.join(sorted(devices))}. Move the batch before step(batch), or inside "
            f"loss_fn. (torch said: {error})"
        ) from error


# Backward nodes of functions with kinks: their first derivative jumps, as that of ReLU at 0.
_KINKED = re.compile(
    r"^(Relu|Relu6|LeakyRelu|RRelu|PreluKernel|Threshold|Hardtanh|Hardsigmoid|Hardswish|Hardshrink"
    r"|Softshrink|Selu|Abs|Sgn|Clamp|ClampMin|ClampMax|Maximum|Minimum|Max|Min|Amax|Amin"
    r"|\w*MaxPool\w*|MaxUnpool\w*|HingeEmbeddingLoss|MarginRankingLoss|MultiMargin\w*|L1Loss"
    r"|SmoothL1Loss|HuberLoss|Sort|Topk|Kthvalue|Median)Backward\d*$"
)


def find_kink(loss: Tensor) -> str:
    """Name a function with kinks in the graph of a loss; "" where none is seen.

    A compiled or checkpointed part hides its functions. A microsecond per node.
    """
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found = _KINKED.match(node.name())
        if found:
            return found.group(1)
        waiting += [child for child, _ in node.next_functions]
    return ""
