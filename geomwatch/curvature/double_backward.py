"""First and second derivatives of a loss by autograd, without touching `.grad`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from geomwatch.curvature.checks import find_once_differentiable
from geomwatch.errors import UsageError
from geomwatch.vectors.layout import Layout

# What torch says, in its many places, of an operation that has no second derivative.
_NO_SECOND = re.compile(
    r"not implemented|double backward|second derivative|once_differentiable|create_graph"
    r"|does not require grad|differentiate twice|trying to differentiate",
    re.IGNORECASE,
)


class NoSecondDerivativeError(RuntimeError):
    """Some operation in the loss can be differentiated once only."""


def gradients(loss: Tensor, leaves: Layout, *, create_graph: bool) -> list[Tensor]:
    """Return d loss / d p for each parameter; zero where the loss does not depend on it.

    Raises:
        UsageError: it depends on none of them.
        NoSecondDerivativeError: with `create_graph`, a function is marked once_differentiable,
            which autograd would take for a constant without a word.
    """
    params = leaves.params
    found = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    if all(g is None for g in found):
        raise UsageError(
            "loss_fn must return a loss that depends on the model's parameters, got one that "
            f"depends on none of the {len(params)} measured. Use the model it is called with."
        )
    if create_graph:
        obstacle = find_once_differentiable(loss, found)
        if obstacle is not None:
            raise NoSecondDerivativeError(
                f"{obstacle} in the loss has no second derivative: its backward is marked "
                "once_differentiable. Write that backward with differentiable operations."
            )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def product(graph: Sequence[Tensor], leaves: Layout, v: Tensor) -> Tensor:
    """Return H v = grad(<grad L, v>) from the gradients with their graph (Pearlmutter 1994)."""
    # A gradient without grad_fn is constant in the parameters: its rows of H are zero.
    pairs = zip(graph, leaves.unflatten(v), strict=True)
    rows = [(g, piece) for g, piece in pairs if g.requires_grad]
    if not rows:
        return torch.zeros_like(v)
    outputs, pieces = zip(*rows, strict=True)
    return leaves.flatten(
        torch.autograd.grad(
            outputs, leaves.params, pieces, retain_graph=True, materialize_grads=True
        )
    )


def lacks_second_derivative(error: RuntimeError) -> bool:
    """Tell whether an error is about a missing second derivative, not about memory, say."""
    return isinstance(error, NoSecondDerivativeError) or bool(_NO_SECOND.search(str(error)))
