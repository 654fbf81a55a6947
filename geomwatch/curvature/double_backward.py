"""First and second derivatives of a loss by autograd, without touching `.grad`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from geomwatch.errors import UsageError
from geomwatch.vectors.layout import Layout

# What torch says, in its many places, of an operation that has no second derivative.
_NO_SECOND = re.compile(
    r"not implemented|double backward|second derivative|once_differentiable|create_graph"
    r"|does not require grad|differentiate twice|trying to differentiate",
    re.IGNORECASE,
)
_ONCE_DIFFERENTIABLE: Any = once_differentiable(print)  # what the decorator makes of a backward
_OTHERS_ERROR = "torch::autograd::Error"  # the node that C++ functions of that kind leave


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


def find_once_differentiable(loss: Tensor, gradients: Iterable[Tensor | None]) -> str | None:
    """Name a function in the graph whose backward is marked once_differentiable.

    torch.autograd.grad takes the gradients of such functions for constants in a second pass, and
    HVPs come out wrong without an error. Walks the graph: a microsecond per node.
    """
    waiting: list[Any] = [t.grad_fn for t in (loss, *gradients) if t is not None]
    seen: set[Any] = set()
    found = None
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function: Any = getattr(node, "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if code is _ONCE_DIFFERENTIABLE.__code__:
            return str(function.__name__)
        if node.name() == _OTHERS_ERROR:
            found = "a function"
        waiting += [child for child, _ in node.next_functions]
    return found
