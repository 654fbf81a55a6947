"""loss_fn(model, batch) for what people already have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageTypeError


def supervised(criterion: Callable[[Any, Any], Tensor]) -> LossFn:
    """Make a loss_fn for (inputs, targets) batches: criterion(model(inputs), targets)."""
    return _Supervised(criterion)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Use the `.loss` of the model's output, as Hugging Face models give it for labels."""
    if isinstance(batch, tuple | list):
        raise UsageTypeError(
            f"model_loss must be given a batch that the model takes whole, got a "
            f"{type(batch).__name__} of {len(batch)}.",
            write="loss_fn = geomwatch.supervised(criterion)",
        )
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise UsageTypeError(
            f"model output must have a loss, got {type(output).__name__} without one. "
            "Pass labels in the batch, or a loss_fn of your own.",
            write="loss_fn = lambda model, batch: criterion(model(batch), targets)",
        )
    return loss  # type: ignore[no-any-return]


class _Supervised:
    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        self.criterion = criterion

    def __call__(self, model: Any, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UsageTypeError(
                f"batch must be (inputs, targets) for geomwatch.supervised, got {_shown(batch)}.",
                write="loss_fn = geomwatch.model_loss"
                if isinstance(batch, Mapping)
                else "monitor.step((inputs, targets), loss=loss.detach())",
            )
        inputs, targets = batch
        return self.criterion(model(inputs), targets)


def _shown(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"one tensor of shape {tuple(batch.shape)}"
    many = f" of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
    return f"a {type(batch).__name__}{many}"
