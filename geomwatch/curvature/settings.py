"""How a loss is evaluated and differentiated: the part of a Measurement that curvature needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from torch import Tensor

from geomwatch.curvature.checks import check_count
from geomwatch.errors import UsageError, nearest

LossFn: TypeAlias = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar
Operator: TypeAlias = Literal["hessian", "ggn"]
Hvp: TypeAlias = Literal["auto", "double_backward", "one_sided", "finite_difference"]
Precision: TypeAlias = Literal["float32", "training"]
Mode: TypeAlias = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """What an Objective has to know beside the loss and its point.

    Args:
        operator: "hessian", or "ggn" for the generalised Gauss-Newton matrix, where the loss is a
            function of the model's outputs.
        hvp: how Hessian-vector products are computed: "auto"; "double_backward"; "one_sided", by
            one difference of gradients a product, where the loss is smooth; "finite_difference", by
            four. Of a model that fully_shard has cut: on a replica or on its local shards by memory
            ("auto"), on a replica ("double_backward"), or on the shards ("finite_difference").
        precision: "float32" (without autocast, whatever trains) or "training".
        mode: "train" (the flags of the training step) or "eval".
        micro_batch: evaluate so many items at a time, to bound the memory of a probe.
        also: another module the loss uses (a teacher, a discriminator) that probes must isolate,
            or several.
        items: what one item of a batch is, where it can't be told: the dimension that items lie
            along, or a function of a batch that counts them.

    Raises:
        UsageError: a value is none of the known ones.
    """

    operator: Operator = "hessian"
    hvp: Hvp = "auto"
    precision: Precision = "float32"
    mode: Mode = "train"
    micro_batch: int | None = None
    also: Any = ()
    items: int | Callable[[Any], int] | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            _check_choice(name, getattr(self, name), known)
        if self.micro_batch is not None:
            check_count("micro_batch", self.micro_batch, 1)
        if self.items is not None and not callable(self.items):
            _check_dimension(self.items)
        also = self.also
        several = tuple(also) if isinstance(also, list | tuple | set) else (also,)
        object.__setattr__(self, "also", several)


_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(Settings).items()
    if name in ("operator", "hvp", "precision", "mode")
}


def _check_dimension(items: object) -> None:
    if isinstance(items, bool) or not isinstance(items, int) or items < 0:
        raise UsageError(
            "items must be the dimension that items lie along, or a function that counts them, got "
            f"{items!r}. Pass items=1 for time-major sequences, say."
        )


def _check_choice(name: str, given: object, known: tuple[str, ...]) -> None:
    if given not in known:
        choices = " or ".join(f'"{choice}"' for choice in known)
        raise UsageError(
            f"{name} must be {choices}, got {given!r}.",
            write=f'Measurement({name}="{nearest(given, known) or known[0]}")',
        )
