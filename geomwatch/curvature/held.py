"""A loss with all that it takes for constant held, where its weights are moved.

What comes from detach(), `.data`, `.item()` and code under no_grad has no part in the gradient: the
keys of MoCo and the teacher of DINO made by the same encoder, targets, weights of a loss. Moved
weights move it all the same. Held at what it was at first, the loss is the function of the weights
whose gradient training uses, and differences of that gradient are products with its Hessian, as
double backward gives them (docs/decisions/007).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from geomwatch.isolation.undo import enter, until_here

_NUMBERS = (  # functions that make other things than tensors of one
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
)


class Held:
    """Evaluates a loss again and again, with the constants of the first time."""

    def __init__(self) -> None:
        self._made: list[Any] | None = None

    @property
    def anything(self) -> bool:
        """Whether there are any; a number at least."""
        return bool(self._made)

    def __call__(self, loss_fn: Callable[[Any, Any], Tensor], model: Any, batch: Any) -> Tensor:
        """Return the loss.

        Raises:
            RuntimeError: it makes other constants than the first time.
        """
        mode = _Constants(self._made)
        with until_here():
            enter(mode)
            loss = loss_fn(model, batch)
        if self._made is None:
            self._made = mode.made
        return loss


class _Constants(TorchFunctionMode):
    """Notes what is made constant, or gives it again in the order in which it was made."""

    def __init__(self, made: list[Any] | None) -> None:
        super().__init__()
        self.made: list[Any] = []
        self._again: Iterator[Any] | None = None if made is None else iter(made)
        self._is_off = False  # gradients, by a block of the user's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In the forward of a Function they are off too, but what comes of it has its backward.
        off = self._is_off or torch.is_inference_mode_enabled()
        is_in_function = not torch.is_grad_enabled() and not off
        had_graph = torch.is_grad_enabled() and _has_graph(args)
        made = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._is_off = self._is_off if is_in_function else not args[0]
            return made
        # detach(), .data, argmax, a tensor made of another
        dropped = had_graph and isinstance(made, Tensor) and not made.requires_grad
        lost = dropped or func in _NUMBERS
        if is_in_function or not (off or lost):
            return made
        if self._again is None:
            self.made.append(_kept(made))
            return made
        try:
            return _put(made, next(self._again), in_place=bool(args) and made is args[0])
        except StopIteration:
            raise RuntimeError("the loss makes other constants each time") from None


def _has_graph(args: Any) -> bool:
    given = (x for a in args for x in (a if isinstance(a, tuple | list) else (a,)))
    return any(isinstance(x, Tensor) and x.requires_grad for x in given)


def _kept(made: Any) -> Any:
    if isinstance(made, Tensor):
        return made.detach().clone()
    if isinstance(made, np.ndarray):
        return made.copy()
    if isinstance(made, tuple | list) and not isinstance(made, torch.Size):
        return [_kept(part) for part in made]
    return made


def _put(made: Any, kept: Any, *, in_place: bool) -> Any:
    """Return what was kept, in the place of what was made, or as a tensor that may be changed."""
    if isinstance(made, Tensor) and isinstance(kept, Tensor):
        if made.shape != kept.shape:
            raise RuntimeError("the loss makes other constants each time")
        if in_place:
            made.data.copy_(kept)
            return made
        return kept.clone()
    if isinstance(made, np.ndarray):
        return kept.copy()
    if isinstance(made, tuple | list) and isinstance(kept, list):
        parts = [_put(m, k, in_place=False) for m, k in zip(made, kept, strict=True)]
        return type(made)(*parts) if hasattr(made, "_fields") else type(made)(parts)
    return kept
