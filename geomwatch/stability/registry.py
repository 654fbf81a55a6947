"""Which algorithm an optimizer runs: by its class, by what was registered, by its first steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from geomwatch.errors import UsageError, UsageTypeError, nearest
from geomwatch.stability.algorithms import ELSEWHERE, TORCH, WITHOUT, Algorithm

Read = str | Callable[[Mapping[str, Any]], Tensor]


_ANOTHER = ("super", "step")  # the names in a step() that only calls its parent's


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of an optimizer: its algorithm, and where it keeps what that reads."""

    algorithm: Algorithm | None = None
    name: str = ""
    state: Mapping[str, Read] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""  # why there is no formula
    is_registered: bool = False
    is_settled: bool = False  # by its steps

    @property
    def has_formula(self) -> bool:
        """Whether there is a limit."""
        return self.algorithm is not None and self.algorithm.step is not None

    def state_of(self, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a parameter's state under the names that the formula reads."""
        if not self.state or not held:
            return held
        named = {key: at(held) if callable(at) else held.get(at) for key, at in self.state.items()}
        return {**held, **named}

    def group_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a group's options under the names that the formula reads."""
        if not self.options:
            return group
        return {**group, **{key: group.get(at) for key, at in self.options.items()}}


_REGISTERED: dict[type, Known] = {}
_SETTLED: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()  # by the steps it has taken


def register_optimizer(
    cls: type,
    like: str,
    *,
    state: Mapping[str, Read] | None = None,
    options: Mapping[str, str] | None = None,
) -> None:
    """Say that an optimizer class steps as a known one does, so that its margin is known.

    `like` is the class of torch.optim, such as "AdamW" or "SGD". `state` says where it keeps what
    that one reads of a parameter's state: another key, or a function of the state, as where a
    second moment is kept in 8 bits; `options` the same of a parameter group. The first steps of
    each optimizer are held against what this predicts; one that steps otherwise by more than 1 % is
    said with both numbers and has no margin.

        class Mine(torch.optim.Optimizer):
            def step(self): ...             # w -= rate * mean / (variance.sqrt() + eps)

        geomwatch.register_optimizer(
            Mine,
            like="AdamW",
            state={"exp_avg": "mean", "exp_avg_sq": lambda s: dequantize(s["variance"])},
            options={"lr": "rate"},
        )
        monitor = geomwatch.Monitor(model, loss_fn, Mine(model.parameters()))

    Raises:
        UsageError: `cls` is no class, `like` is not known, or a key is none that its formula reads.
    """
    if not isinstance(cls, type):
        raise UsageTypeError(
            f"cls must be the optimizer's class, got {cls!r:.80}. Pass the class, not an instance."
        )
    names = sorted(name for name, known in TORCH.items() if known.step is not None)
    meant = {name.lower(): name for name in names}.get(
        nearest(like, map(str.lower, names)), "AdamW"
    )
    if like not in names:
        raise UsageError(
            f"like must be one of {', '.join(names)}, got {like!r}.",
            write=f"register_optimizer({cls.__name__}, like={meant!r})",
        )
    algorithm = TORCH[like]
    _check_keys("state", state, (*algorithm.state, "step"), like)
    _check_keys("options", options, (*algorithm.options, "weight_decay", "maximize"), like)
    _REGISTERED[cls] = Known(
        algorithm, like, dict(state or {}), dict(options or {}), is_registered=True
    )


def _check_keys(
    what: str, given: Mapping[str, Any] | None, read: tuple[str, ...], like: str
) -> None:
    for key, at in (given or {}).items():
        if key not in read:
            raise UsageError(
                f"{what} must name what {like} reads ({', '.join(read)}), got {key!r}.",
                write=f"{what}={{{nearest(key, read) or read[0]!r}: {at!r}}}",
            )


def settle(optimizer: Any, known: Known) -> None:
    """Take over what an optimizer's first steps have shown."""
    _SETTLED[optimizer] = replace(known, is_settled=True)


def known_of(optimizer: object) -> Known:
    """Return what is known of an optimizer, itself and not a wrapper of it."""
    try:
        settled = _SETTLED.get(optimizer)
    except TypeError:  # what can't be a key
        settled = None
    return settled or _by_class(type(optimizer))


def _by_class(kind: type) -> Known:
    for above in kind.__mro__:
        if above in _REGISTERED and _steps_as(kind, above):
            return _REGISTERED[above]
    runs = _running(kind)
    module, name = _defined_in(runs)
    if module.startswith("torch.optim.") and name in TORCH:
        return Known(TORCH[name], name, reason=TORCH[name].reason)
    found = ELSEWHERE.get((module.partition(".")[0], name)) or WITHOUT.get(name)
    found = found or WITHOUT.get(kind.__name__)
    if found is not None:
        return Known(found, name, reason=found.reason)
    return Known(reason=f"there is no stability formula for {kind.__name__}.step")


def _steps_as(kind: type, above: type) -> bool:
    return _running(kind) is _running(above)


def _running(kind: type) -> Any:
    """Return the step() that does something: not one that only calls that of its parent.

    Under the wrappers of torch and of schedulers it keeps the name of the class that defines it.
    """
    for above in kind.__mro__:
        step = vars(above).get("step")
        if step is None:
            continue
        step = inspect.unwrap(step)
        code = getattr(step, "__code__", None)
        if code is None or not set(code.co_names) <= set(_ANOTHER) or "step" not in code.co_names:
            return step
    return None


def _defined_in(step: Any) -> tuple[str, str]:
    name = str(getattr(step, "__qualname__", "")).removesuffix(".step")
    return str(getattr(step, "__module__", None) or ""), name


def unwrap(optimizer: object) -> object:
    """Return the optimizer inside wrappers that hold it as `.optimizer` (accelerate, Lightning).

    A wrapper with a state of its own (Lookahead) is another algorithm and stays as it is.
    """
    inner = getattr(optimizer, "optimizer", None)
    if inner is None or inner is optimizer or not hasattr(inner, "param_groups"):
        return optimizer
    state = getattr(inner, "state", None)
    return unwrap(inner) if getattr(optimizer, "state", state) is state else optimizer


def learning_rates(optimizer: object) -> tuple[float, ...]:
    """Return eta of each parameter group; 1.0 where a group defines none."""
    inner = unwrap(optimizer)
    known = known_of(inner)
    rates = [known.group_of(g).get("lr") for g in getattr(inner, "param_groups", ())]
    return tuple(1.0 if rate is None else rate_of(rate) for rate in rates)


def rate_of(entry: Any) -> float:
    """Return what a group holds as a rate, the largest of several; NaN for what is none."""
    try:
        return max(map(rate_of, entry)) if isinstance(entry, list | tuple) else float(entry)
    except (TypeError, ValueError, RuntimeError):  # of None, of text, of a tensor of several
        return math.nan


def unusable(rates: Sequence[float]) -> str:
    """Say why a step at these rates has no margin, "" where it has one."""
    bad = next((rate for rate in rates if not 0 <= rate < math.inf), None)
    return "" if bad is None else f"the learning rate is {bad:g}: no step down the gradient"


def is_adaptive(optimizer: object) -> bool:
    """Tell whether an optimizer preconditions its steps by the gradients it has seen."""
    algorithm = known_of(unwrap(optimizer)).algorithm
    return algorithm is None or algorithm.adaptive


def sets_rate(optimizer: object) -> bool:
    """Tell whether an optimizer finds its learning rate itself."""
    algorithm = known_of(unwrap(optimizer)).algorithm
    return algorithm is not None and algorithm.sets_rate


def optimizer_name(optimizer: Any) -> str:
    """Return the optimizer as messages call it: its class, momentum and weight decay."""
    inner: Any = unwrap(optimizer)
    group = inner.param_groups[0] if getattr(inner, "param_groups", None) else {}
    options = [f"{k} {group[k]:g}" for k in ("momentum", "weight_decay") if group.get(k)]
    return " ".join([type(inner).__name__, *options])
