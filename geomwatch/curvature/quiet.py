"""Random draws replaced by what they are on average, so that every item is treated alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geomwatch.isolation.undo import enter, until_here

_OF = Callable[[dict[str, Any], Tensor], object]


def quiet() -> ExitStack:
    """Let dropout pass everything, noise be its mean, and numbers be drawn alike for each item.

    Then the loss of a batch can be held against those of its pieces, which would draw other numbers
    than the batch. Inside, nothing is random but what Python or NumPy draw.
    """
    block = until_here()
    mode: Any = _Quiet()  # type: ignore[no-untyped-call]  # torch has no types there
    enter(mode)
    return block


class _Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what a random operation has drawn."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        known = func._schema.arguments
        given = {a.name: a.default_value for a in known if a.has_default_value()}
        given |= dict(zip([a.name for a in known], args, strict=False)) | kwargs
        if given.get("dropout_p"):
            return func(**{**given, "dropout_p": 0.0})
        if "noise" in given and given.get("training"):  # a ReLU with random slopes
            return func(**{**given, "training": False})
        name = func._schema.name.removeprefix("aten::")
        if name == "native_dropout":
            return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)
        made = func(*args, **kwargs)
        settle = _SETTLED.get(name.removesuffix("_").removesuffix("_like"))
        if settle is not None and isinstance(made, Tensor):
            settle(given, made)
        return made


def _uniform(given: dict[str, Any], made: Tensor) -> None:
    made.fill_((given.get("from", 0.0) + given.get("to", 1.0)) / 2)


def _normal(given: dict[str, Any], made: Tensor) -> None:
    mean = given.get("mean", 0.0)
    made.copy_(mean) if isinstance(mean, Tensor) else made.fill_(mean)


def _integers(given: dict[str, Any], made: Tensor) -> None:
    low = given.get("low", given.get("from", 0)) or 0
    high = given.get("high", given.get("to"))
    made.fill_(low if high is None else (low + high - 1) // 2)


def _bernoulli(given: dict[str, Any], made: Tensor) -> None:
    p = given.get("p")
    if p is None:  # each entry has its own
        p = given["self"]
    made.copy_(p) if isinstance(p, Tensor) else made.fill_(p)


def _multinomial(given: dict[str, Any], made: Tensor) -> None:
    p, count = given["self"], made.shape[-1]
    likely = p.topk(min(count, p.shape[-1]), dim=-1).indices
    made.copy_(likely if likely.shape == made.shape else likely[..., :1].expand_as(made))


def _ones(given: dict[str, Any], made: Tensor) -> None:
    made.fill_(1)


_SETTLED: dict[str, _OF] = {
    "rand": _uniform,
    "uniform": _uniform,
    "randn": _normal,
    "normal": _normal,
    "normal_functional": _normal,
    "randint": _integers,
    "random": _integers,
    "randperm": lambda given, made: made.copy_(torch.arange(len(made))),
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "poisson": lambda given, made: made.copy_(given["self"]),
    "_standard_gamma": lambda given, made: made.copy_(given["self"]),
    "_sample_dirichlet": lambda given, made: made.copy_(
        given["self"] / given["self"].sum(-1, keepdim=True)
    ),
    "exponential": _ones,
    "geometric": _ones,
    "log_normal": _ones,
    "cauchy": _ones,
}
