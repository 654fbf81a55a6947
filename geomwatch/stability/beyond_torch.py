r"""One coming step of optimizers that other libraries bring, made linear as in `optimizers`.

| optimizer             | P                            | eta * threshold                         |
|-----------------------|------------------------------|-----------------------------------------|
| Schedule-free SGD     | 1                            | 2(2-c)/[(1-b)(2-c) + cb], ~ 2/(1-b)     |
| Schedule-free AdamW   | sqrt(v/(1-b2^t)) + eps       | the same, less eta wd                   |
| AdEMAMix              | as Adam                      | 2/[(1-b1)/(1+b1) + a(1-b3)/(1+b3)]      |
| Prodigy, D-Adaptation | as Adam of v/d^2; eta = lr d | as Adam                                 |
| transformers Adafactor| as that of torch             | 2; with beta1 as Adam                   |
| AdaBelief             | as Adam, of (g - m)^2        | as Adam                                 |

Schedule-free methods take the gradient at y, between the iterate z and its average x (weight b on
x, c the weight of z in the coming average). With e = z - y

    y' = y - eta (1 - b(1-c)) g + c e,   e' = (1-c) e - eta b(1-c) g,

a recursion with m = -e / eta: Defazio et al. 2024, "The Road Less Scheduled" (arXiv 2405.15682);
that y settles at 2/((1-b) eta): Song et al. 2025, "Through the River" (arXiv 2507.09846). AdEMAMix:
Pagliardini et al. 2024 (arXiv 2409.03137). Prodigy: Mishchenko, Defazio 2023 (arXiv 2306.06101);
D-Adaptation: Defazio, Mishchenko 2023 (arXiv 2301.07733); d is held at its present value. The
thresholds follow from `Recursion`; all are bisected against the libraries themselves in
tests/stability/test_other_libraries.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from geomwatch.stability.recursion import Recursion
from geomwatch.stability.step import Coming, Step, averaging, second_moment


def schedule_free_sgd(c: Coming) -> Step:
    """Schedule-free SGD at y."""
    recursion, behind = _averaged_iterates(c, c.option("momentum"))
    return Step(recursion, buffer=behind)


def schedule_free_adamw(c: Coming) -> Step:
    """Schedule-free AdamW at y; weight decay is added to P^-1 g there."""
    v, p = second_moment(c)
    recursion, behind = _averaged_iterates(c, float(c.group["betas"][0]))
    return Step(recursion, p, v, buffer=p * behind, decay_after=c.option("weight_decay"))


def _averaged_iterates(c: Coming, b: float) -> tuple[Recursion, Tensor]:
    """Return the recursion at y, and m = (y - z) / eta."""
    warmup = c.option("warmup_steps")
    eta = c.lr * min(1.0, c.count / warmup if warmup else 1.0)
    weight = c.count ** c.option("r") * max(eta, c.option("lr_max")) ** c.option("weight_lr_power")
    total = c.option("weight_sum") + weight
    share = weight / total if total > 0 else 0.0
    known = c.has("z") and eta > 0
    behind = (c.weights - c.read("z")) / eta if known else torch.zeros_like(c.weights)
    if share >= 1:  # x is thrown away
        return Recursion(eta), behind
    return Recursion(eta, 1 - share, b * (1 - share), 1 - b, share / (1 - share)), behind


def ademamix(c: Coming) -> Step:
    """AdEMAMix: Adam's step and `alpha` times that of a slow average, both over one P."""
    b1, _, b3 = map(float, c.group["betas"])
    alpha, over = c.option("alpha"), c.option("t_alpha_beta3")
    if over:  # both grow to their values
        s = min(c.count / over, 1.0)
        alpha = min(s * alpha, alpha)
        low, high = math.log(b1), math.log(b3)
        b3 = min(math.exp(low * high / ((1 - s) * high + s * low)), b3)
    v, p = second_moment(c)
    through = 1 / c.start(b1) if c.cold_start else 1.0
    recursion = Recursion(c.lr, b1, 1 - b1, 0.0, through, c.keep, alpha, b3)
    return Step(recursion, p, v, buffer=c.read("exp_avg"), slow_buffer=c.read("exp_avg_slow"))


def prodigy(c: Coming) -> Step:
    """Prodigy, whose averages are of d g."""
    d = c.option("d", 1.0)
    return _at_estimated_distance(c, d, d)


def d_adapt_adam(c: Coming) -> Step:
    """Adam under D-Adaptation, whose average is of d lr g."""
    return _at_estimated_distance(c, None, 1.0)


def _at_estimated_distance(c: Coming, of_mean: float | None, of_square: float) -> Step:
    b1, b2 = map(float, c.group["betas"])
    corrected = bool(c.group.get("use_bias_correction"))
    start = math.sqrt(c.start(b2))
    rate = c.lr * c.option("d", 1.0) * (start / c.start(b1) if corrected else 1.0)
    unit = (of_mean if of_mean is not None else rate) or 1.0
    v = c.average_of_squares("exp_avg_sq", b2)
    if of_square != 1:
        v = b2 * c.read("exp_avg_sq") / of_square**2 + (1 - b2) * c.gradient.square()
    p = v.sqrt() + float(c.group["eps"])
    if not c.cold_start:
        p, rate = p / start, c.lr * c.option("d", 1.0)
    keep = 1 - rate * (1 - c.keep) / c.lr if c.lr else 1.0
    step = averaging(c, p, v, through=1.0, rate=rate, buffer=c.read("exp_avg") / unit)
    return replace(step, recursion=replace(step.recursion, keep=keep))


def transformers_adafactor(c: Coming) -> Step:
    """Adafactor of transformers, with or without a first moment."""
    t, eps = c.count, c.group["eps"]
    rate = c.lr
    if c.group.get("relative_step"):
        least = 1e-6 * t if c.group.get("warmup_init") else 1e-2
        rate = min(least, 1 / math.sqrt(t))
    scaled = max(float(eps[1]), float(c.weights.square().mean().sqrt()))
    rate *= scaled if c.group.get("scale_parameter") else 1.0
    share = t ** c.option("decay_rate", -0.8)
    g = c.gradient.view(c.shape)
    square = g.square() + float(eps[0])
    if g.dim() > 1:
        rows = _mixed(c, "exp_avg_sq_row", square.mean(-1), share)
        columns = _mixed(c, "exp_avg_sq_col", square.mean(-2), share)
        v = (rows / rows.mean(-1, keepdim=True)).unsqueeze(-1) * columns.unsqueeze(-2)
    else:
        v = _mixed(c, "exp_avg_sq", square, share)
    v = v.reshape(-1)
    p = v.sqrt()
    length = float((c.gradient / p).square().mean().sqrt())
    p = p * max(1.0, length / float(c.group["clip_threshold"]))
    keep = 1 - c.option("weight_decay") * rate
    b1 = c.group.get("beta1")
    if b1 is None:
        return Step(Recursion(rate, keep=keep), p, v)
    recursion = Recursion(rate, float(b1), 1 - float(b1), 0.0, 1.0, keep)
    # what it averages is the update itself
    return Step(recursion, p, v, buffer=c.read("exp_avg") * p / rate if rate else None)


def adabelief(c: Coming) -> Step:
    """AdaBelief: P from the variance of gradients about their average, not from their squares."""
    b1, b2 = (float(b) for b in c.group["betas"][:2])
    eps = float(c.group["eps"])
    mean = torch.lerp(c.read("exp_avg"), c.gradient, 1 - b1)
    v = b2 * c.read("exp_avg_var") + (1 - b2) * (c.gradient - mean).square() + eps
    p = v.sqrt() / math.sqrt(c.start(b2)) + eps
    return averaging(c, p, v, through=1 / c.start(b1) if c.cold_start else 1.0)


def corrected_or_not_start(group: Mapping[str, Any], t: float) -> float:
    """The root of what v lacks at first, where the method leaves it so: 1 / sqrt(1 - b2^t)."""
    b1, b2 = (float(b) for b in group["betas"][:2])
    if group.get("use_bias_correction"):
        return float(1 / (1 - b1**t))
    return 1 / math.sqrt(1 - b2**t)


def _mixed(c: Coming, key: str, now: Tensor, share: float) -> Tensor:
    return torch.lerp(c.read(key).view_as(now), now, share) if c.has(key) else share * now
