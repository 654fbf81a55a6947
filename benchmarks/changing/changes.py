"""What may change in mid-run: each takes model and optimizer, and returns what steps from now on.

Each expects what `begin` gives it: body and head trained by the optimizer, with an embedding that
is frozen where the change is to unfreeze it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

Make = Callable[[Iterable[Any]], Any]  # an optimizer of parameters or groups
Change = Callable[[nn.Module, Any, Make], Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A change, how its run begins, and a word that the log has to say of it."""

    change: Change
    frozen: bool = False  # the embedding, at the start
    says: str = "Measured anew"


def begin(net: nn.Module, make: Make, *, frozen: bool) -> Any:
    """Return the optimizer of what is trained at the start."""
    net.embedding.requires_grad_(not frozen)
    return make([p for p in net.parameters() if p.requires_grad])


def unfreeze(net: nn.Module, optimizer: Any, make: Make) -> Any:
    net.embedding.requires_grad_(True)
    optimizer.add_param_group({"params": [net.embedding.weight], "lr": 3 * _rate(optimizer)})
    return optimizer


def freeze(net: nn.Module, optimizer: Any, make: Make) -> Any:
    net.embedding.requires_grad_(False)
    net.embedding.weight.grad = None
    return optimizer


def leave_out(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Freeze by not stepping, as where the parameter is taken out of its group."""
    _take_out(optimizer, net.embedding.weight)
    return optimizer


def split_groups(net: nn.Module, optimizer: Any, make: Make) -> Any:
    _take_out(optimizer, net.head.weight)
    optimizer.add_param_group({"params": [net.head.weight], "lr": 4 * _rate(optimizer)})
    return optimizer


def new_head(net: nn.Module, optimizer: Any, make: Make) -> Any:
    for p in net.head.parameters():
        _take_out(optimizer, p)
    torch.manual_seed(7)
    net.head = nn.Linear(6, 3)
    optimizer.add_param_group({"params": list(net.head.parameters()), "lr": 2 * _rate(optimizer)})
    return optimizer


def new_rows(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Resize the embedding, and give the optimizer the new one."""
    _take_out(optimizer, net.embedding.weight)
    _resize(net)
    optimizer.add_param_group({"params": [net.embedding.weight]})
    return optimizer


def new_rows_forgotten(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Resize the embedding, and forget the optimizer, which goes on with the old one."""
    _resize(net)
    return optimizer


def new_optimizer(net: nn.Module, optimizer: Any, make: Make) -> Any:
    return make([{"params": list(net.parameters()), "lr": 0.3 * _rate(optimizer)}])


def another_kind(net: nn.Module, optimizer: Any, make: Make) -> Any:
    if isinstance(optimizer, torch.optim.SGD):
        return torch.optim.Adam(net.parameters(), lr=0.02)
    return torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.8)


def new_groups(net: nn.Module, optimizer: Any, make: Make) -> Any:
    rate = _rate(optimizer)
    rest = [*net.body.parameters(), *net.head.parameters()]
    groups = [{"params": [net.embedding.weight], "lr": 5 * rate}, {"params": rest, "lr": rate}]
    return make(groups)


def double(net: nn.Module, optimizer: Any, make: Make) -> Any:
    net.double()
    return _like(net, optimizer)


def bfloat16(net: nn.Module, optimizer: Any, make: Make) -> Any:
    net.bfloat16()
    return _like(net, optimizer)


def pruned(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Prune a layer: its weight gets another name, and a mask."""
    prune.l1_unstructured(net.body, "weight", amount=0.4)
    return optimizer


def adapter(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Freeze all, put an adapter behind the body, and train it by an optimizer of its own."""
    for p in net.parameters():
        p.requires_grad_(False)
        p.grad = None
    torch.manual_seed(7)
    net.body = nn.Sequential(net.body, nn.Linear(6, 2, bias=False), nn.Linear(2, 6))
    trained = [p for p in net.parameters() if p.requires_grad]
    return make([{"params": trained, "lr": _rate(optimizer)}])


def resumed(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Load the optimizer's own state, which puts new groups in place of the old ones."""
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def another_rate(net: nn.Module, optimizer: Any, make: Make) -> Any:
    optimizer.param_groups[0]["lr"] *= 2.5
    return optimizer


def loaded(net: nn.Module, optimizer: Any, make: Make) -> Any:
    """Load weights by assignment: the optimizer goes on with tensors that nobody uses."""
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return optimizer


CHANGES: dict[str, Kind] = {
    "unfrozen, in a group of its own": Kind(unfreeze, frozen=True),
    "frozen": Kind(freeze),
    "taken out of its group": Kind(leave_out, says="does not hold 1 of the 5"),
    "moved to a group of its own": Kind(split_groups),
    "a new head": Kind(new_head),
    "a resized embedding": Kind(new_rows),
    "a resized embedding, optimizer forgotten": Kind(
        new_rows_forgotten, says="does not hold 1 of the 5"
    ),
    "a new optimizer": Kind(new_optimizer),
    "an optimizer of another kind": Kind(another_kind),
    "a new optimizer of two groups": Kind(new_groups),
    "model.double()": Kind(double),
    "model.bfloat16()": Kind(bfloat16),
    "pruned": Kind(pruned),
    "an adapter, all else frozen": Kind(adapter),
    "the optimizer's state is loaded": Kind(resumed, says=""),
    "another rate": Kind(another_rate, says=""),
    "weights loaded by assignment": Kind(loaded, says="holds none of the 5"),
}


def _rate(optimizer: Any) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _take_out(optimizer: Any, gone: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not gone]
    optimizer.state.pop(gone, None)


def _resize(net: nn.Module) -> None:
    old = net.embedding.weight.detach()
    torch.manual_seed(7)
    net.embedding = nn.Embedding(len(old) + 3, old.shape[1])
    with torch.no_grad():
        net.embedding.weight[: len(old)] = old


def _like(net: nn.Module, optimizer: Any) -> Any:
    """Bring an optimizer's state to the dtype of its parameters, as loading it does."""
    for p in net.parameters():
        p.grad = None
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer
