"""What can be wrong with a loss_fn, its loss or its batch, and what to do about each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from geomwatch.curvature import batches
from geomwatch.errors import UsageError, UsageTypeError

_WRONG_DEVICE = "same device|expected device|expected on|weight type|storage has not been allocated"


_CRITERIA = ("torch.nn.modules.loss", "torch.nn.functional")  # functions of outputs and targets


def check_loss_fn(loss_fn: object) -> None:
    """Refuse what can't be a loss_fn: what is no function, and what is one of outputs."""
    must = "loss_fn must be a function of model and batch, got"
    if hasattr(loss_fn, "param_groups"):
        raise UsageTypeError(
            f"{must} the optimizer {type(loss_fn).__name__}: it stands third.",
            write="Monitor(model, geomwatch.supervised(criterion), optimizer)",
        )
    if not callable(loss_fn):
        raise UsageTypeError(
            f"loss_fn must be callable as loss_fn(model, batch), got {type(loss_fn).__name__}.",
            write="loss_fn = geomwatch.supervised(torch.nn.CrossEntropyLoss())",
        )
    made_in = type(loss_fn).__module__
    is_function = getattr(loss_fn, "__module__", "") == "torch.nn.functional"
    if made_in in _CRITERIA or is_function or isinstance(loss_fn, type):
        raise UsageTypeError(f"{must} {loss_fn!r:.60}.", write=f"loss_fn = {_wrapped(loss_fn)}")


def took_the_model_for_outputs(error: BaseException, loss_fn: object) -> UsageError:
    """Return the refusal of a loss_fn that wanted outputs where it was given the model."""
    return UsageTypeError(
        f"loss_fn must be a function of model and batch, got {loss_fn!r:.60}, which takes the "
        f"model for outputs ({type(error).__name__}: {error}).",
        write=f"loss_fn = {_wrapped(loss_fn)}",
    )


def takes_the_model_for_outputs(error: BaseException, model: object) -> bool:
    """Tell whether an error says that the model itself is no tensor."""
    name, text = type(model).__name__, str(error)
    if isinstance(error, AttributeError):
        missing = re.search(rf"'{name}' object has no attribute '(\w+)'", text)
        return missing is not None and hasattr(Tensor, missing[1])
    pattern = rf"must be \w+, not {name}\b|operand type.*'{name}'|'{name}' object (is|does) not"
    return isinstance(error, TypeError) and re.search(pattern, text) is not None


def _wrapped(criterion: Any) -> str:
    """Return the code that makes a loss_fn of a criterion."""
    if isinstance(criterion, type):
        made = f"torch.nn.{criterion.__name__}()"
        is_criterion = criterion.__module__ in _CRITERIA
        return f"geomwatch.supervised({made})" if is_criterion else f"{criterion.__name__}()"
    if type(criterion).__module__ in _CRITERIA:
        return f"geomwatch.supervised(torch.nn.{type(criterion).__name__}())"
    if getattr(criterion, "__module__", "") == "torch.nn.functional":
        return f"geomwatch.supervised(torch.nn.functional.{criterion.__name__})"
    return f"geomwatch.supervised({getattr(criterion, '__name__', 'criterion')})"


def check_optimizer(optimizer: object) -> None:
    """Refuse what can't be an optimizer."""
    if hasattr(optimizer, "param_groups"):
        return
    inside = hasattr(getattr(optimizer, "optimizer", None), "param_groups")
    given = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
    raise UsageTypeError(
        f"optimizer must be the torch optimizer in use (anything with param_groups), got {given}.",
        write=f"Monitor(model, loss_fn, {'scheduler.optimizer' if inside else 'optimizer'})",
    )


def check_loss_and_batch(loss_fn: object, batch: object, call: str) -> None:
    """Refuse what can't be a loss_fn, or a batch of it; `call` is what is called with both.

    Raises:
        UsageTypeError: one of them can't be.
    """
    check_loss_fn(loss_fn)
    check_batch(batch, f"{call}(model, loss_fn, next(iter(loader)))")


def check_batch(batch: object, call: str) -> None:
    """Refuse what gives batches for a batch; `call` is how one of them is passed.

    Raises:
        UsageTypeError: it is a DataLoader, or an iterator of one.
    """
    if isinstance(batch, DataLoader) or hasattr(batch, "__next__"):
        raise UsageTypeError(
            f"batch must be one batch, got {type(batch).__name__}, which gives many.", write=call
        )


def check_count(name: str, value: object, least: int) -> None:
    """Refuse a number of things that is none or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be an integer >= {least}, got {value!r}.")


def check_loss(loss: object) -> Tensor:
    """Return the loss as a scalar tensor, or refuse it."""
    if not isinstance(loss, Tensor):
        raise UsageTypeError(
            f"loss_fn must return a scalar tensor, got {_shown(loss)}. {_repaired(loss)}"
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


def _shown(loss: object) -> str:
    if isinstance(loss, Mapping):
        return f"a {type(loss).__name__} of {', '.join(map(str, loss))}"
    if isinstance(loss, tuple | list):
        return f"a {type(loss).__name__} of {', '.join(type(x).__name__ for x in loss)}"
    return f"{type(loss).__name__} {loss!r:.80}"


def _repaired(loss: object) -> str:
    """Say what to do, with the line to write: of several losses only their user knows the sum."""
    if isinstance(loss, Mapping) and "loss" in loss:
        line = 'lambda model, batch: loss_fn(model, batch)["loss"]'
    elif isinstance(loss, Mapping):
        line = "lambda model, batch: sum(loss_fn(model, batch).values())"
    elif isinstance(loss, tuple | list):
        line = "lambda model, batch: loss_fn(model, batch)[0]"
    elif isinstance(getattr(loss, "loss", None), Tensor):
        line = "lambda model, batch: loss_fn(model, batch).loss"
    else:
        return "Return the loss itself, without .item() or float()."
    return f"Pass the one that is trained on, such as:\n    {line}"


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
    for node in _nodes([loss.grad_fn]):
        found = _KINKED.match(node.name())
        if found:
            return found.group(1)
    return ""


def raw_backward(loss: Tensor, params: Sequence[Tensor]) -> str | None:
    """Name a function in the graph that drops the graph of what its backward is given.

    Raw tensors kept on ctx, or a backward under no_grad: autograd takes such a gradient for a
    constant, without a word. Differences of gradients tell it too, where they can be had.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[Sequence[Any], Sequence[Any]], None]:
        def note(made: Sequence[Any], given: Sequence[Any]) -> None:
            if _any_with_graph(given) and not _any_with_graph(made):
                found.append(name)

        return note

    for node in _nodes([loss.grad_fn]):
        function: Any = getattr(node, "_forward_cls", None)
        if function is not None:
            node.register_hook(watch(str(function.__name__)))
    torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    return found[0] if found else None


def _any_with_graph(gradients: Sequence[Any]) -> bool:
    return any(g is not None and g.requires_grad for g in gradients)


def _nodes(waiting: list[Any]) -> Iterator[Any]:
    """Walk an autograd graph, a microsecond per node."""
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [child for child, _ in node.next_functions]
