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
| SparseAdam       | (sqrt(v) + eps)/sqrt(1-b2^t)                        | as Adam                 |
| Adafactor        | sqrt(row mean x column mean / mean); eta = lr rms(w), shortened | 2           |

The first steps of some are longer than later ones, since averages start at zero. Unless
`cold_start` is set a formula leaves that out: Adam's correction of the first moment, NAdam's small
mu_t, RMSprop's v as if it were corrected, Adagrad's sum as if it had 100 steps in it.

Weight decay is coupled (wd I beside H) unless the optimizer decouples it, as AdamW does.
Sources: SGD: Cohen, Kaur, Li, Kolter, Talwalkar 2021, "Gradient descent on neural networks
typically occurs at the edge of stability"; Adam: Cohen et al. 2022, "Adaptive gradient methods at
the edge of stability" (arXiv 2207.14484); Adafactor: Shazeer, Stern
2018 (arXiv 1804.04235); the rest: `Recursion`. All are bisected against
torch.optim itself in tests/stability/test_stability.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from geomwatch.stability.recursion import Recursion
from geomwatch.stability.step import (
    Coming,
    Step,
    averaging,
    first_correction,
    second_moment,
)

_FORGOTTEN = 60  # steps after which the product of NAdam's momenta is none
ADAGRAD_START = 100  # steps that its sum counts as at least: RMSprop's own memory, 1/(1 - 0.99)


def sgd(c: Coming) -> Step:
    """SGD, heavy ball or Nesterov's."""
    mu, dampening = c.option("momentum"), c.option("dampening")
    if mu == 0:
        return Step(Recursion(c.lr, keep=c.keep))
    direct, through = (1.0, mu) if c.group.get("nesterov") else (0.0, 1.0)
    recursion = Recursion(c.lr, mu, 1 - dampening, direct, through, c.keep)
    # the first gradient is taken in as a whole
    first = dampening / mu * c.gradient
    return Step(recursion, buffer=c.read("momentum_buffer") if c.has("momentum_buffer") else first)


def asgd(c: Coming) -> Step:
    """Averaged SGD."""
    # The rate was put into the state by the step before: a new lr takes effect one step late.
    eta = float(c.state.get("eta", c.lr))
    return Step(Recursion(eta, keep=1 - float(c.group["lambd"]) * eta))


def adam(c: Coming) -> Step:
    """Adam and AdamW, with AMSGrad."""
    v, p = second_moment(c)
    return averaging(c, p, v, through=first_correction(c))


def adamax(c: Coming) -> Step:
    """Adamax."""
    b2, eps = float(c.group["betas"][1]), float(c.group["eps"])
    u = torch.maximum(b2 * c.read("exp_inf"), c.gradient.abs() + eps)
    # Where no gradient was ever seen u is eps, up to the rounding of a narrow state.
    return averaging(c, u, u - 1.01 * eps, through=first_correction(c))


def nadam(c: Coming) -> Step:
    """NAdam, whose momentum mu_t grows to b1 in some thousand steps."""
    b1, decay = float(c.group["betas"][0]), float(c.group["momentum_decay"])
    mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in (c.count, c.count + 1))
    product = float(c.state.get("mu_product", 1.0)) * mu
    if not c.cold_start:
        mu, mu_next, product = b1, b1, 0.0
    v, p = second_moment(c)
    direct, through = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    return averaging(c, p, v, direct=direct, through=through)


def radam(c: Coming) -> Step:
    """RAdam."""
    b2, t, correction = float(c.group["betas"][1]), c.count, first_correction(c)
    corrected = 1 - b2**t
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / corrected
    if length <= 5:  # too few gradients to trust v: the plain average of them
        return averaging(c, torch.ones_like(c.gradient), None, through=correction)
    v = c.average_of_squares("exp_avg_sq", b2)
    p = (v.sqrt() + float(c.group["eps"])) / math.sqrt(corrected)
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    step = averaging(c, p, v, through=correction)
    return replace(step, recursion=replace(step.recursion, rate=c.lr * math.sqrt(rectified)))


def rmsprop(c: Coming) -> Step:
    """RMSprop, whose average of squares starts at zero and is not corrected for it."""
    alpha, mu = float(c.group["alpha"]), float(c.group["momentum"])
    v = c.average_of_squares("square_avg", alpha)
    if c.group["centered"]:
        average = torch.lerp(c.read("grad_avg"), c.gradient, 1 - alpha)
        v = (v - average.square()).clamp_min(0)
    p = (v if c.cold_start else v / c.start(alpha)).sqrt() + float(c.group["eps"])
    recursion = Recursion(c.lr, memory=mu, intake=1, direct=0, through=1)
    # its buffer sums up what is divided by P already
    return Step(recursion, p, v, buffer=p * c.read("momentum_buffer"))


def adagrad(c: Coming) -> Step:
    """Adagrad, whose sum of squares starts at zero."""
    total = c.read("sum") + c.gradient.square()
    recursion = Recursion(c.lr / (1 + (c.count - 1) * float(c.group["lr_decay"])))
    grown = total if c.cold_start else total * max(1.0, ADAGRAD_START / c.count)
    return Step(recursion, grown.sqrt() + float(c.group["eps"]), total)


def adadelta(c: Coming) -> Step:
    """Adadelta."""
    eps = float(c.group["eps"])
    v = c.average_of_squares("square_avg", float(c.group["rho"]))
    # The step divides by the average of squared updates as it was before this update.
    p = (v + eps).sqrt() / (c.read("acc_delta") + eps).sqrt()
    return Step(Recursion(c.lr), preconditioner=p, moment=v)


def sparse_adam(c: Coming) -> Step:
    """SparseAdam: Adam on the rows that have a gradient, with eps inside the correction."""
    b2 = float(c.group["betas"][1])
    v = c.average_of_squares("exp_avg_sq", b2)
    p = (v.sqrt() + float(c.group["eps"])) / math.sqrt(c.start(b2))
    return averaging(c, p, v, through=first_correction(c))


def adafactor(c: Coming) -> Step:
    """Adafactor of torch: P from the means of squares of rows and columns.

    Its rate is lr by the root mean square of the weights, and what would be a longer step than
    `d` times that is shortened.
    """
    t, eps1, eps2 = c.count, c.group["eps"][0], float(c.group["eps"][1])
    eps1 = torch.finfo(c.gradient.dtype).eps if eps1 is None else float(eps1)
    share = t ** float(c.group["beta2_decay"])
    rate = max(eps2, float(c.weights.square().mean().sqrt())) * min(c.lr, 1 / math.sqrt(t))
    if len(c.shape) > 1:
        g = c.gradient.view(c.shape)
        rows = _mixed(c, "row_var", g.square().mean(-1, keepdim=True), share)
        columns = _mixed(c, "col_var", g.square().mean(-2, keepdim=True), share)
        v = (rows @ columns).div_(rows.mean(-2, keepdim=True).clamp_min(eps1)).reshape(-1)
    else:
        v = _mixed(c, "variance", c.gradient.square(), share)
    p = v.clamp_min(eps1**2).sqrt()
    length = float((c.gradient / p).square().mean().sqrt())
    shortened = max(1.0, length / float(c.group["d"]))
    return Step(Recursion(rate / shortened, keep=c.keep), p, v)


def _mixed(c: Coming, key: str, now: Tensor, share: float) -> Tensor:
    return torch.lerp(c.read(key).view_as(now), now, share) if c.has(key) else share * now


def sgd_start(_: Mapping[str, Any], __: float) -> float:
    """Nothing is longer at first."""
    return 1.0


def first_moment_start(group: Mapping[str, Any], t: float) -> float:
    """Adam's correction of its first moment, 1 / (1 - b1^t)."""
    return float(1 / (1 - float(group["betas"][0]) ** t))


def nadam_start(group: Mapping[str, Any], t: float) -> float:
    """What the present weights of the gradient and of its average do beside the settled ones."""
    b1, decay = float(group["betas"][0]), float(group["momentum_decay"])

    def mu(step: float) -> float:
        return float(b1 * (1 - 0.5 * 0.96 ** (step * decay)))

    product = math.prod(mu(step) for step in range(1, min(int(t), _FORGOTTEN) + 1))
    direct = (1 - mu(t)) / (1 - product)
    through = mu(t + 1) / (1 - product * mu(t + 1))
    push = direct * (1 + b1) + through * (1 - b1)
    return push / ((1 - b1) * (1 + b1) + b1 * (1 - b1))


def rmsprop_start(group: Mapping[str, Any], t: float) -> float:
    """The root of what its average of squares lacks, 1 / sqrt(1 - alpha^t)."""
    alpha = float(group["alpha"])
    return 1 / math.sqrt(1 - alpha**t) if alpha < 1 else 1.0


def adagrad_start(_: Mapping[str, Any], t: float) -> float:
    """The same of its sum, held against that of the first 100 steps."""
    return math.sqrt(max(1.0, ADAGRAD_START / t))
