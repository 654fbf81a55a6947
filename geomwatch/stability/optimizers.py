r"""One coming step of each torch.optim optimizer, made linear: its rate, preconditioner, threshold.

With the preconditioner P frozen, each of these is one recursion in w and a buffer m, whose
coefficients alone decide when it is stable (see `recursion`). lambda is an eigenvalue of
P^-1 (H + wd I), eta = lr, mu = momentum, d = dampening, b1, b2 = betas; stable: lambda < threshold.

| optimizer        | P, from the state as the coming step will have it   | eta * threshold         |
|------------------|-----------------------------------------------------|-------------------------|
| SGD              | 1                                                   | 2                       |
| SGD, heavy ball  | 1                                                   | 2(1+mu)/(1-d)           |
| SGD, Nesterov    | 1                                                   | 2(1+mu)/(1+2mu)         |
| ASGD             | 1; eta from the state, lambd shrinks the weights    | 2 - eta lambd           |
| Adam             | sqrt(v/(1-b2^t)) + eps                              | 2(1+b1)/(1-b1)          |
| AdamW            | as Adam                                             | (2-eta wd)(1+b1)/(1-b1) |
| AMSGrad          | as Adam; v the maximum so far, before correction    | as Adam                 |
| Adamax           | max(b2 u, abs(g) + eps)                             | as Adam                 |
| NAdam, step t    | as Adam              | 2(1+b1)/[(1-mu_t)(1+b1) + mu_{t+1}(1-b1)]              |
| RAdam, rectified | (sqrt(v) + eps)/sqrt(1-b2^t); eta = lr r_t          | as Adam                 |
| RAdam, before    | 1                                                   | as Adam                 |
| RMSprop          | sqrt(v) + eps; centered: sqrt(v - avg(g)^2) + eps   | 2(1+mu)                 |
| Adagrad          | sqrt(sum) + eps; eta = lr/(1+(t-1) lr_decay)        | 2                       |
| Adadelta         | sqrt(v + eps)/sqrt(acc_delta + eps)                 | 2                       |

Weight decay is coupled (wd I beside H) unless the optimizer decouples it, as AdamW does.
Sources: SGD: Cohen, Kaur, Li, Kolter, Talwalkar 2021, "Gradient descent on neural networks
typically occurs at the edge of stability"; Adam: Cohen et al. 2022, "Adaptive gradient methods at
the edge of stability" (arXiv 2207.14484); the rest: `Recursion`. All are bisected against
torch.optim itself in tests/stability/test_stability.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geomwatch.stability.recursion import Recursion
from geomwatch.vectors.layout import entries


@dataclass(frozen=True, slots=True)
class Coming:
    """What a formula may look at: one parameter just before its step."""

    group: Mapping[str, Any]
    state: Mapping[str, Any]
    lr: float
    gradient: Tensor  # (n,), as the optimizer will use it: sign flipped, coupled decay added
    count: float  # t, this step's number, from 1
    sign: float  # -1 if it maximizes
    decay: float  # coupled weight decay
    keep: float  # what decoupled weight decay leaves of the weights, 1 - lr wd
    cold_start: bool  # keep the bias correction of the first moment


@dataclass(frozen=True, slots=True)
class Step:
    """One parameter's coming step: the recursion that each eigenvalue of P^-1 H goes through."""

    recursion: Recursion
    preconditioner: Tensor | None = None  # (n,) P; None for 1
    moment: Tensor | None = None  # (n,) what P is made of: > 0 where a gradient was seen
    decay: float = 0.0  # coupled weight decay


def unwrap(optimizer: object) -> object:
    """Return the optimizer inside wrappers that hold it as `.optimizer` (accelerate, Lightning).

    A wrapper with a state of its own (Lookahead) is another algorithm and stays as it is.
    """
    inner = getattr(optimizer, "optimizer", None)
    if inner is None or inner is optimizer or not hasattr(inner, "param_groups"):
        return optimizer
    state = getattr(inner, "state", None)
    return unwrap(inner) if getattr(optimizer, "state", state) is state else optimizer


def algorithm(optimizer: object) -> str:
    """Return the torch.optim class whose step() runs, "" if it is somebody else's.

    The class's own name would not do: a subclass that overrides step() is another algorithm. Under
    the wrappers of torch and of schedulers step() keeps the name of the class that defines it.
    """
    step: Any = inspect.unwrap(getattr(type(optimizer), "step", algorithm))
    module = getattr(step, "__module__", None) or ""
    return str(step.__qualname__).removesuffix(".step") if module.startswith("torch.optim.") else ""


def is_adaptive(optimizer: object) -> bool:
    """Tell whether an optimizer preconditions its steps by the gradients it has seen."""
    return algorithm(optimizer) not in ("SGD", "ASGD")


def _sgd(c: Coming) -> Step:
    mu, dampening = float(c.group["momentum"]), float(c.group["dampening"])
    if mu == 0:
        return Step(Recursion(c.lr))
    direct, through = (1.0, mu) if c.group["nesterov"] else (0.0, 1.0)
    return Step(Recursion(c.lr, memory=mu, intake=1 - dampening, direct=direct, through=through))


def _asgd(c: Coming) -> Step:
    # The rate was put into the state by the step before: a new lr takes effect one step late.
    eta = float(c.state.get("eta", c.lr))
    return Step(Recursion(eta, keep=1 - float(c.group["lambd"]) * eta))


def _adam(c: Coming) -> Step:
    v, p = _second_moment(c)
    return _averaging(c, p, v, through=_first_correction(c))


def _adamax(c: Coming) -> Step:
    b2, eps = float(c.group["betas"][1]), float(c.group["eps"])
    u = torch.maximum(b2 * _read(c, "exp_inf"), c.gradient.abs() + eps)
    # Where no gradient was ever seen u is eps, up to the rounding of a narrow state.
    return _averaging(c, u, u - 1.01 * eps, through=_first_correction(c))


def _nadam(c: Coming) -> Step:
    b1, decay = float(c.group["betas"][0]), float(c.group["momentum_decay"])
    mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in (c.count, c.count + 1))
    product = float(c.state.get("mu_product", 1.0)) * mu if c.cold_start else 0.0
    v, p = _second_moment(c)
    direct, through = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    return _averaging(c, p, v, direct=direct, through=through)


def _radam(c: Coming) -> Step:
    b2, t, correction = float(c.group["betas"][1]), c.count, _first_correction(c)
    corrected = 1 - b2**t
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / corrected
    if length <= 5:  # too few gradients to trust v: the plain average of them
        return _averaging(c, torch.ones_like(c.gradient), None, through=correction)
    v = _average_of_squares(c, "exp_avg_sq", b2)
    p = (v.sqrt() + float(c.group["eps"])) / math.sqrt(corrected)
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    step = _averaging(c, p, v, through=correction)
    return replace(step, recursion=replace(step.recursion, rate=c.lr * math.sqrt(rectified)))


def _rmsprop(c: Coming) -> Step:
    alpha, mu = float(c.group["alpha"]), float(c.group["momentum"])
    v = _average_of_squares(c, "square_avg", alpha)
    if c.group["centered"]:
        average = torch.lerp(_read(c, "grad_avg"), c.gradient, 1 - alpha)
        v = (v - average.square()).clamp_min(0)
    recursion = Recursion(c.lr, memory=mu, intake=1, direct=0, through=1)
    return Step(recursion, preconditioner=v.sqrt() + float(c.group["eps"]), moment=v)


def _adagrad(c: Coming) -> Step:
    total = _read(c, "sum") + c.gradient.square()
    recursion = Recursion(c.lr / (1 + (c.count - 1) * float(c.group["lr_decay"])))
    return Step(recursion, preconditioner=total.sqrt() + float(c.group["eps"]), moment=total)


def _adadelta(c: Coming) -> Step:
    eps = float(c.group["eps"])
    v = _average_of_squares(c, "square_avg", float(c.group["rho"]))
    # The step divides by the average of squared updates as it was before this update.
    p = (v + eps).sqrt() / (_read(c, "acc_delta") + eps).sqrt()
    return Step(Recursion(c.lr), preconditioner=p, moment=v)


def plain_step(c: Coming) -> Step:
    """Return the step of an optimizer without a formula: M = lr lambda_max(H)."""
    return unscaled_step(c.lr)


def unscaled_step(lr: float) -> Step:
    """Return a step whose margin is lr times the curvature, deterministic or stochastic."""
    return Step(Recursion(2 * lr))


FORMULAS: dict[str, Callable[[Coming], Step]] = {
    "SGD": _sgd,
    "ASGD": _asgd,
    "Adam": _adam,
    "AdamW": _adam,  # inherits Adam's step() now, has its own in older torch
    "Adamax": _adamax,
    "NAdam": _nadam,
    "RAdam": _radam,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Adadelta": _adadelta,
}


def _averaging(
    c: Coming, p: Tensor, moment: Tensor | None, *, direct: float = 0.0, through: float
) -> Step:
    """Step along the gradient and its running average m = b1 m + (1-b1) g.

    P takes up what makes them sum to another weight than 1: Adam's (1-b1^t) at a cold start.
    """
    b1, total = float(c.group["betas"][0]), direct + through
    direct, through = direct / total, through / total
    recursion = Recursion(c.lr, b1, 1 - b1, direct, through, c.keep)
    return Step(recursion, preconditioner=p if total == 1 else p / total, moment=moment)


def _first_correction(c: Coming) -> float:
    return 1 / (1 - float(c.group["betas"][0]) ** c.count) if c.cold_start else 1.0


def _second_moment(c: Coming) -> tuple[Tensor, Tensor]:
    """Adam's v and sqrt(v/(1-b2^t)) + eps."""
    b2 = float(c.group["betas"][1])
    v = _average_of_squares(c, "exp_avg_sq", b2)
    if c.group.get("amsgrad", False):
        v = torch.maximum(v, _read(c, "max_exp_avg_sq"))
    root = v.sqrt().div_(math.sqrt(1 - b2**c.count)).add_(float(c.group["eps"]))
    return v, root


def _average_of_squares(c: Coming, key: str, decay: float) -> Tensor:
    return (decay * _read(c, key)).addcmul_(c.gradient, c.gradient, value=1 - decay)


def _read(c: Coming, key: str) -> Tensor:
    """A state tensor as a vector in the gradient's dtype; zeros before the first step."""
    value = c.state.get(key)
    return torch.zeros_like(c.gradient) if value is None else entries(c.gradient, value)


def optimizer_name(optimizer: Any) -> str:
    """Return the optimizer as messages call it: its class, momentum and weight decay."""
    inner: Any = unwrap(optimizer)
    group = inner.param_groups[0] if getattr(inner, "param_groups", None) else {}
    options = [f"{k} {group[k]:g}" for k in ("momentum", "weight_decay") if group.get(k)]
    return " ".join([type(inner).__name__, *options])
