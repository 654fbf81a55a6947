"""First and second derivatives of a loss by autograd, without touching `.grad`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from geomwatch.errors import UsageError
from geomwatch.vectors.layout import Layout

_ONCE_DIFFERENTIABLE: Any = once_differentiable(print)  # what the decorator makes of a backward
_OTHERS_ERROR = "torch::autograd::Error"  # the node that C++ functions of that kind leave


class DoubleBackwardError(RuntimeError):
    """A backward with a graph, or through one, has ended with an error, whatever it says."""


class NoSecondDerivativeError(DoubleBackwardError):
    """Some operation in the loss can be differentiated once only."""


@contextlib.contextmanager
def differentiating_twice() -> Iterator[None]:
    """Have errors of the backward passes inside told from those of all else.

    Only what happens without a graph tells whether a second derivative is what is missing: torch,
    Triton, Apex and authors of Functions have no words for it in common.

    Raises:
        DoubleBackwardError: with the words of the error, which is its cause.
    """
    try:
        yield
    except (torch.OutOfMemoryError, UsageError, DoubleBackwardError):
        raise
    except Exception as error:  # of any kind: authors of Functions have no word in common
        raise DoubleBackwardError(str(error) or type(error).__name__) from error


def gradients(loss: Tensor, leaves: Layout, *, create_graph: bool) -> list[Tensor]:
    """Return d loss / d p for each parameter; zero where the loss does not depend on it.

    Raises:
        UsageError: it depends on none of them.
        NoSecondDerivativeError: with `create_graph`, a function is marked once_differentiable,
            which autograd would take for a constant without a word.
        DoubleBackwardError: with `create_graph`, it failed.
    """
    params = leaves.params
    with differentiating_twice() if create_graph else contextlib.nullcontext():
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


@differentiating_twice()
def product(graph: Sequence[Tensor], leaves: Layout, v: Tensor) -> Tensor:
    """Return H v = grad(<grad L, v>) from the gradients with their graph (Pearlmutter 1994).

    Raises:
        DoubleBackwardError: the backward through it failed.
    """
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
