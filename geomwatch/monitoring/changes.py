"""What a run trains now, and with what, against what is measured: changes and their words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.monitoring.search import OptimizerSearch
from geomwatch.parallel.ranks import unwrapped
from geomwatch.stability.problem import unwrap
from geomwatch.stability.registry import optimizer_name
from geomwatch.vectors.fsdp import is_sharded
from geomwatch.vectors.layout import Layout


@dataclass(frozen=True, eq=False)
class Trained:
    """The parameters that are measured and the optimizer's groups, as they are at one moment.

    Taking it costs a microsecond or two a parameter, so that it is taken at looks alone.
    """

    layout: Layout
    optimizer: Any
    kinds: tuple[tuple[object, ...], ...]  # shape, dtype and device of each parameter
    groups: tuple[frozenset[int], ...]  # ids of the parameters of each group

    @classmethod
    def now(cls, model: nn.Module, patterns: str | Sequence[str] | None, optimizer: Any) -> Trained:
        """Look at a model and an optimizer.

        Raises:
            UsageError: nothing is trained, or nothing of what was asked for.
        """
        layout = Layout.of(model, patterns)
        groups = getattr(unwrap(optimizer), "param_groups", ())
        return cls(
            layout,
            optimizer,
            tuple((p.shape, p.dtype, p.device) for p in layout.params),
            tuple(frozenset(map(id, group["params"])) for group in groups),
        )

    def changes_since(self, before: Trained) -> list[str]:
        """Say what differs, a phrase each; nothing where all is as it was."""
        if is_sharded(before.layout.params) or is_sharded(self.layout.params):
            return self._of_names(before) + self._of_optimizer(before)
        return self._of_names(before) + self._of_tensors(before) + self._of_optimizer(before)

    def strangers(self) -> list[str]:
        """Name the parameters that are measured but that the optimizer does not hold."""
        held = frozenset().union(*self.groups)
        pairs = zip(self.layout.names, self.layout.params, strict=True)
        return [name for name, p in pairs if id(p) not in held]

    def _of_names(self, before: Trained) -> list[str]:
        now, then = dict.fromkeys(self.layout.names), dict.fromkeys(before.layout.names)
        return [
            *_phrase("trained now", [n for n in now if n not in then]),
            *_phrase("no longer trained", [n for n in then if n not in now]),
        ]

    def _of_tensors(self, before: Trained) -> list[str]:
        then = dict(
            zip(
                before.layout.names,
                zip(before.layout.params, before.kinds, strict=True),
                strict=True,
            )
        )
        other: dict[str, list[str]] = {}
        for name, p, kind in zip(self.layout.names, self.layout.params, self.kinds, strict=True):
            if name not in then:
                continue
            tensor, was = then[name]
            if kind != was:
                how = next(f"{a} instead of {b}" for a, b in _pairs(kind, was) if a != b)
                other.setdefault(f"now {how}", []).append(name)
            elif p is not tensor:
                other.setdefault("now another tensor", []).append(name)
        return [phrase for how, names in other.items() for phrase in _phrase(how, names)]

    def _of_optimizer(self, before: Trained) -> list[str]:
        if self.optimizer is not before.optimizer:
            return [f"the optimizer is another {optimizer_name(self.optimizer)}"]
        if self.groups == before.groups:
            return []
        if len(self.groups) != len(before.groups):
            return [f"the optimizer has {len(self.groups)} groups instead of {len(before.groups)}"]
        return ["the optimizer's groups hold other parameters"]


def strangers_line(strangers: Sequence[str], total: int, optimizer: Any) -> str:
    """Say that the optimizer does not hold what is measured, and what follows."""
    name, count = type(unwrap(optimizer)).__name__, len(strangers)
    if count == total:
        return (
            f"{name} holds none of the {total} parameters that are measured, as where it steps "
            "copies of them: no margin can be told. Pass the optimizer that holds the model's own "
            "parameters: monitor.follow(optimizer)."
        )
    return (
        f"{name} does not hold {count} of the {total} parameters that are measured "
        f"({_few(strangers)}): margins are those of its own steps alone, lambda_max is of all. "
        "Give it the rest by add_param_group, freeze them, or build one Monitor for each optimizer "
        "with Measurement(params=...)."
    )


_CHANGED = {
    "gradient": (
        "the gradient was changed between monitor.step() and the step of {name}, as by clipping "
        "that comes after it, or by the second pass of a sharpness-aware optimizer: margins are "
        "not those of the step that is taken. Call monitor.step() last, right before the step; of "
        "two passes, before that of the second."
    ),
    "weights": (
        "the weights were moved between monitor.step() and the step of {name}, as in the second "
        "step of a sharpness-aware optimizer: curvature is that where the gradient was taken, and "
        "margins are those of a plain step there."
    ),
}


def changed_line(what: str, optimizer: Any) -> str:
    """Say what follows from a gradient or weights that a step does not find as they were seen."""
    return _CHANGED[what].format(name=type(unwrap(optimizer)).__name__)


class Changes:
    """Compares what is trained now with what is measured."""

    def __init__(
        self, model: nn.Module, patterns: str | Sequence[str] | None, optimizer: Any
    ) -> None:
        self.patterns = patterns
        self.search = OptimizerSearch()
        self._model = unwrapped(model) if isinstance(model, nn.Module) else model
        self._known = Trained.now(self._model, patterns, optimizer)

    def look(self, optimizer: Any) -> list[str]:
        """Return what has changed since the last look, a phrase each.

        Raises:
            UsageError: nothing is trained now, or nothing of what was asked for.
        """
        before, self._known = self._known, Trained.now(self._model, self.patterns, optimizer)
        return self._known.changes_since(before)

    def refuse_another_model(self) -> None:
        """Refuse an optimizer of another model: one that is no master copy, nor cut or joined.

        Raises:
            UsageError: it holds none of what is measured, but parameters that are the like.
        """
        layout, optimizer = self._known.layout, unwrap(self._known.optimizer)
        groups = getattr(optimizer, "param_groups", ())
        held = [p for group in groups for p in group["params"] if isinstance(p, torch.Tensor)]
        kinds = {(p.dtype, p.device) for p in layout.params}
        is_flat = all(p.ndim == 1 for p in held)
        if len(self.strangers) < len(layout.names) or is_flat or is_sharded(held):
            return
        if kinds & {(p.dtype, p.device) for p in held} and all(p.grad is None for p in held):
            name = type(optimizer).__name__
            raise UsageError(
                f"optimizer must step the model that is watched, got {name} of {len(held)} "
                f"parameters, none of them among the {len(layout.names)} of this model.",
                write=f"optimizer = torch.optim.{name}(model.parameters(), lr=...)",
            )

    def trained_now(self) -> Sequence[Tensor]:
        """Return the parameters that are trained at this moment; of none, those last measured."""
        try:
            return Layout.of(self._model, self.patterns).params
        except UsageError:
            return self.layout.params

    @property
    def layout(self) -> Layout:
        """Where the parameters lie that were trained at the last look."""
        return self._known.layout

    @property
    def strangers(self) -> list[str]:
        """Names of the parameters that the optimizer does not hold."""
        return self._known.strangers()


def _phrase(how: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    verb = "parameter is" if len(names) == 1 else "parameters are"
    return [f"{len(names)} {verb} {how} ({_few(names)})"]


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _pairs(now: Iterable[object], then: Iterable[object]) -> Iterable[tuple[str, str]]:
    def words(value: object) -> str:
        if isinstance(value, torch.Size):
            return f"of shape {tuple(value)}"
        return f"{'on ' if isinstance(value, torch.device) else ''}{value}"

    return [(words(a), words(b)) for a, b in zip(now, then, strict=True)]
