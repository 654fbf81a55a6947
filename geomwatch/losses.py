"""loss_fn(model, batch) for what people already have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from geomwatch.curvature.settings import LossFn


def supervised(criterion: Callable[[Any, Any], Tensor]) -> LossFn:
    """Make a loss_fn for (inputs, targets) batches: criterion(model(inputs), targets)."""
    return _Supervised(criterion)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Use the `.loss` of the model's output, as Hugging Face models give it for labels."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"model output must have a loss, got {type(output).__name__} without one. "
            "Pass labels in the batch, or write a loss_fn(model, batch)."
        )
    return loss  # type: ignore[no-any-return]


class _Supervised:
    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        self.criterion = criterion

    def __call__(self, model: Any, batch: Any) -> Tensor:
        inputs, targets = batch
        return self.criterion(model(inputs), targets)
