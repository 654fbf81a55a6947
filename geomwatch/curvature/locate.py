"""Where in a model an operation is: the module whose forward pass makes its autograd node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.isolation.undo import attach, until_here

_OPERATION = re.compile(r"aten::(\w+)|(\w+) in the loss has no second derivative")


def operation_in(message: str) -> str | None:
    """Return the operation that an error about a missing derivative names."""
    found = _OPERATION.search(message)
    return next(name for name in found.groups() if name) if found else None


def module_of(model: nn.Module, evaluate: Callable[[], object], operation: str) -> str | None:
    """Name the innermost module that makes a node of this operation; None if it is in no module.

    Costs one forward pass, and a walk through the graph that each module makes.
    """
    wanted, found = _plain(operation), list[str]()

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and _makes(wanted, batches.tensors(inputs), batches.tensors(output)):
                found.append(name or type(module).__name__)

        return note

    with until_here():
        for name, module in model.named_modules():
            attach(module.register_forward_hook, watch(name))
        evaluate()
    return found[0] if found else None


def first_not_finite(model: nn.Module, evaluate: Callable[[], object]) -> str | None:
    """Name the first module whose output holds NaN or Inf; None if all are finite.

    Costs one forward pass, and one number of each module's output.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(map(_is_finite, batches.tensors(output))):
                found.append(name or type(module).__name__)

        return note

    with until_here():
        for name, module in model.named_modules():
            attach(module.register_forward_hook, watch(name))
        evaluate()
    return found[0] if found else None


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_nested or bool(tensor.detach().isfinite().all())


def _makes(wanted: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    seen: set[Any] = {t.grad_fn for t in inputs}
    waiting: list[Any] = [t.grad_fn for t in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _plain(node.name()) == wanted:
            return True
        waiting += [child for child, _ in node.next_functions]
    return False


def _plain(name: str) -> str:
    """CtcLossBackward0, aten::_ctc_loss_backward and ctc_loss are one operation."""
    short = name.rpartition("::")[2].replace("_", "").lower()
    return re.sub(r"(backward)?\d*$", "", short)
