r"""From optimizer state to the linear stability problem of the coming step.

A step with rate eta, diagonal preconditioner P and stability threshold c/eta is linearly stable on
an eigenvalue lambda of P^-1 (H + W) iff lambda < c/eta, W being coupled weight decay; optimizers.py
has the table of c and P with its sources. All of it becomes one symmetric operator

    S (sign H + W) S,   S = diag(sqrt(eta / (c P))),   margin M = its largest eigenvalue,

similar to eta/c P^-1 (sign H + W), so M < 1 is stable (Cohen et al. 2021, 2022). With several
parameter groups S takes each group's own eta, c and P: exact when the groups share their momentum,
an approximation otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from geomwatch.stability.optimizers import (
    FORMULAS,
    Coming,
    Step,
    algorithm,
    plain_step,
    unscaled_step,
)
from geomwatch.stability.optimizers import unwrap as unwrap
from geomwatch.stability.recursion import Recursion
from geomwatch.vectors.layout import Layout, entries

_SAMPLE = 1 << 15  # entries of a group that its median is taken from


@dataclass(frozen=True, slots=True, eq=False)
class Stability:
    """The stability problem of one coming step, per coordinate. The margin M has no unit.

    The small-batch margin looks along d = S^2 g, the preconditioned gradient, and costs one HVP:
    limit_ratio * d'(sign H + W)d / g'S^2 g. That is eta BS / 2 for SGD, eta BS / (2(1-mu)) with
    momentum, eta BS_P / 2 for Adam, BS_P = g'P^-1 H P^-1 g / g'P^-1 g (Andreyev et al. 2026).
    """

    scale: Tensor  # (D,) S; 0 on coordinates that are excluded or that the step leaves alone
    inverse_preconditioner: Tensor  # (D,) P^-1, 1 for SGD; 0 where excluded or left alone
    decay: Tensor | None  # (D,) W, coupled weight decay; None when all zero
    uniform: float | None  # c if S = c I, so that lambda_max(sign H + W) = M / c^2; else None
    recursions: tuple[Recursion, ...]  # of the groups, in the coordinates that S scales
    sign: float = 1.0  # -1.0 when the optimizer maximizes
    status: str = "ok"  # "ok" | "unknown" | "directional"
    reason: str = ""  # why it is not "ok"

    @property
    def limit_ratio(self) -> float:
        """Deterministic over small-batch threshold, the largest of the groups."""
        return max((r.limit_ratio for r in self.recursions), default=1.0)

    def step_along(self, gradient: Tensor) -> Tensor:
        """Return d = S^2 g: the coming step but for its length and its past. One pass over D."""
        if self.uniform is not None:
            return self.uniform**2 * gradient
        return (self.scale * gradient).mul_(self.scale)

    def apply(self, hvp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return y -> S (sign H + W) S y, (D,) -> (D,), for hvp(v) = H v. One HVP a call."""

        def scaled(y: Tensor) -> Tensor:
            v = self.scale * y
            image = hvp(v) if self.sign > 0 else -hvp(v)
            if self.decay is not None:
                image = image + self.decay * v
            return self.scale * image

        return scaled


def stability_of(
    optimizer: object,
    layout: Layout,
    *,
    gradient: Tensor | None = None,
    exclude: Collection[str] = (),
    damping: Literal["median", "none"] = "median",
    cold_start: bool = False,
    rates: Sequence[float] | None = None,
) -> Stability:
    """Build the stability problem of the step that `optimizer` would take now.

    Call it between backward() and optimizer.step(): running averages are advanced by the gradient
    exactly as the step will advance them. Reads only; no HVP, a few elementwise passes over D.

    An optimizer without a formula has status "unknown" (or "directional", where a margin has no
    meaning) and S = sqrt(lr), P = 1: M = lr lambda_max(H), to be held against this run's own past.

    Args:
        optimizer: a torch optimizer, or a wrapper that holds it as `.optimizer`.
        layout: which parameters make up a vector of D coordinates.
        gradient: (D,), what the step will use; each parameter's `.grad` when None, where a
            parameter without one is not stepped.
        exclude: names of parameters to leave out of the eigenproblem (scale-invariant ones).
        damping: "median" raises P to its median over a group, "none" leaves it as the step has it.
        cold_start: keep Adam's first-moment bias correction in P, as the step does. It makes the
            first step 1/(1-b1) times larger, but fades within as many steps, before an instability
            can grow. Warnings leave it out, controllers keep it.
        rates: learning rates to assume, one a group, for the margin at a planned rate.

    Raises:
        ValueError: no gradient, an unknown name in `exclude`, or a wrong shape or option.
    """
    _check_options(layout, exclude, damping)
    inner = unwrap(optimizer)
    lrs = learning_rates(inner) if rates is None else tuple(float(rate) for rate in rates)
    with torch.no_grad():
        coming = _coming(inner, layout, _gradients(layout, gradient), lrs, cold_start)
        formula = FORMULAS.get(algorithm(inner), plain_step)
        steps = [replace(formula(c), decay=c.decay) if c else None for c in coming]
        status, reason = _status(inner, coming, steps)
        if status != "ok":
            reason += "; the margin is lr * lambda_max(H), to be compared with this run's own past"
            steps = [plain_step(c) if c else None for c in coming]
            if not any(coming):
                steps = [unscaled_step(lrs[0] if lrs else 1.0)] * len(coming)
        if damping == "median":
            steps = _damped(steps, coming)
        kept = [None if n in exclude else s for n, s in zip(layout.names, steps, strict=True)]
        sign = -1.0 if {c.sign for c in coming if c} == {-1.0} else 1.0
        return replace(_assembled(layout, kept), sign=sign, status=status, reason=reason)


def learning_rates(optimizer: object) -> tuple[float, ...]:
    """Return eta of each parameter group; 1.0 where a group defines none."""
    rates = [group.get("lr") for group in getattr(unwrap(optimizer), "param_groups", ())]
    return tuple(1.0 if rate is None else float(rate) for rate in rates)


def cold_start(optimizer: object, taken: int) -> float:
    """Return the factor by which the first moment's bias correction enlarges the coming step.

    The largest of the groups, 1 / (1 - b1^t) at step t = `taken` + 1 for Adam and its kin, else 1.
    It is what `stability_of(cold_start=True)` adds.
    """
    inner = unwrap(optimizer)
    if algorithm(inner) not in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam"):
        return 1.0
    groups = getattr(inner, "param_groups", ())
    return max((1 / (1 - float(g["betas"][0]) ** (taken + 1)) for g in groups), default=1.0)


def planned_rates(optimizer: object, present: Sequence[float]) -> tuple[float, ...]:
    """Return the highest rate each group is known to be headed for: its `present` one, or more.

    A torch scheduler that starts below its base rate leaves that as "initial_lr" in the group, a
    OneCycleLR its peak as "max_lr".
    """
    groups = getattr(unwrap(optimizer), "param_groups", ())
    pairs = zip(groups, present, strict=True)
    return tuple(
        max([lr, *(float(g[key]) for key in ("initial_lr", "max_lr") if g.get(key))])
        for g, lr in pairs
    )


def _coming(
    optimizer: Any,
    layout: Layout,
    gradients: Sequence[Tensor | None],
    lrs: Sequence[float],
    cold_start: bool,
) -> list[Coming | None]:
    """What each parameter's step will work on; None where the optimizer will not step it."""
    groups = getattr(optimizer, "param_groups", ())
    if len(lrs) != len(groups):
        raise ValueError(
            f"rates must have one entry for each of {len(groups)} parameter groups, got {lrs!r}. "
            "learning_rates(optimizer) gives the present ones."
        )
    held = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    name = algorithm(optimizer)
    known = name in FORMULAS
    # .get, because optimizer.state makes an entry for whatever is looked up by [].
    states = [optimizer.state.get(p, {}) if known else {} for p in layout.params]
    coming: list[Coming | None] = []
    for p, g, state, done in zip(layout.params, gradients, states, _counts(states), strict=True):
        if g is None or id(p) not in held:
            coming.append(None)
            continue
        group, lr = groups[held[id(p)]], lrs[held[id(p)]]
        sign = -1.0 if group.get("maximize", False) else 1.0
        decay, keep = float(group.get("weight_decay", 0.0)) if known else 0.0, 1.0
        if group.get("decoupled_weight_decay", name == "AdamW"):
            decay, keep = 0.0, 1 - lr * decay
        g = sign * g if decay == 0 else sign * g + decay * entries(g, p)
        coming.append(Coming(group, state, lr, g, done + 1, sign, decay, keep, cold_start))
    return coming


def _gradients(layout: Layout, gradient: Tensor | None) -> Sequence[Tensor | None]:
    if gradient is not None:
        if gradient.shape != (sum(layout.sizes),):
            raise ValueError(
                f"gradient must have shape ({layout.dim},), got {tuple(gradient.shape)}. "
                "layout.flatten makes it from one tensor per parameter."
            )
        return torch.split(gradient.detach().to(layout.device, layout.dtype), layout.sizes)
    if all(p.grad is None for p in layout.params):
        raise ValueError(
            f"gradient must be there before the step, got none on {len(layout.params)} parameters. "
            "Call this after backward() and before optimizer.zero_grad(), or pass gradient=."
        )
    return [None if p.grad is None else layout.flatten([p.grad]) for p in layout.params]


def _counts(states: Sequence[Mapping[str, Any]]) -> list[float]:
    """Steps each parameter has taken; one transfer, as fused optimizers count on the device."""
    counts = [torch.as_tensor(state.get("step", 0.0)).reshape(()) for state in states]
    numbers: list[float] = torch.stack([c.to(counts[0]) for c in counts]).tolist()
    return numbers


def _status(
    optimizer: object, coming: Sequence[Coming | None], steps: Sequence[Step | None]
) -> tuple[str, str]:
    kind, name = type(optimizer).__name__, algorithm(optimizer)
    if name == "Muon":
        return "directional", "the steps of Muon have a constant size, whatever the curvature"
    if name not in FORMULAS:
        return "unknown", f"there is no stability formula for {kind}.step"
    if not any(coming):
        return "unknown", f"this {kind} steps none of the measured parameters that have a gradient"
    if len({c.sign for c in coming if c}) > 1:
        return "unknown", "groups that minimize beside groups that maximize have no symmetric form"
    if any(step and step.recursion.threshold <= 0 for step in steps):
        return "unknown", "at this momentum and weight decay no step is stable"
    return "ok", ""


def _damped(steps: Sequence[Step | None], coming: Sequence[Coming | None]) -> list[Step | None]:
    """Raise each P to its group's median over the entries that have seen a gradient.

    In a coordinate with a tiny P the instability is real but harmless: its first oscillation
    raises P, however P remembers gradients. Undamped, healthy runs read M > 100 at first, those of
    Adagrad too. Entries without a gradient (76 % of v in a language model) would make it eps. Of
    groups of more than 32,768 entries a sample will do: its median is the 49.7th to the 50.3rd
    percentile.
    """
    adaptive: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # group -> parameter -> P, moment
    for i, (step, c) in enumerate(zip(steps, coming, strict=True)):
        if c and step and step.preconditioner is not None and step.moment is not None:
            adaptive.setdefault(id(c.group), {})[i] = (step.preconditioner, step.moment)
    damped = list(steps)
    for members in adaptive.values():
        pairs = _sampled(list(members.values()))
        # nanmedian, because a boolean index would wait for the device.
        seen = torch.cat([p.where(moment > 0, math.nan) for p, moment in pairs])
        median = seen.nanmedian().nan_to_num(0.0, posinf=math.inf)
        for i, (p, _) in members.items():
            damped[i] = replace(cast(Step, steps[i]), preconditioner=p.maximum(median))
    return damped


def _sampled(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Take every k-th entry of large vectors: a median takes longer than all else here."""
    if any(type(x) is not Tensor for pair in pairs for x in pair):  # sharded
        return pairs
    # odd, so that it does not fall on the same columns of a matrix again and again
    k = sum(p.numel() for p, _ in pairs) // _SAMPLE | 1
    return [(p[::k], moment[::k]) for p, moment in pairs]


def _assembled(layout: Layout, steps: Sequence[Step | None]) -> Stability:
    factors = [s.recursion.rate / s.recursion.threshold if s else 0.0 for s in steps]
    decays = [s.decay if s else 0.0 for s in steps]
    inverse = layout.spread([1.0 if s else 0.0 for s in steps])
    scale = layout.spread([math.sqrt(factor) for factor in factors])
    parts = (torch.split(x, layout.sizes) for x in (inverse, scale))
    for of_inverse, of_scale, s in zip(*parts, steps, strict=True):
        if s and s.preconditioner is not None:
            p = s.preconditioner
            of_inverse.copy_(p.reciprocal().where(p != 0, 0.0))
            of_scale.mul_(of_inverse.sqrt())
    same = len(set(factors)) == 1 and all(s and s.preconditioner is None for s in steps)
    return Stability(
        scale=scale,
        inverse_preconditioner=inverse,
        decay=layout.spread(decays) if any(decays) else None,
        uniform=math.sqrt(factors[0]) if same and factors[0] > 0 else None,
        recursions=tuple({replace(s.recursion, rate=s.recursion.threshold) for s in steps if s}),
    )


def _check_options(layout: Layout, exclude: Collection[str], damping: str) -> None:
    if damping not in ("median", "none"):
        raise ValueError(f'damping must be "median" or "none", got {damping!r}.')
    unknown = sorted(set(exclude) - set(layout.names))
    if unknown:
        raise ValueError(
            f"exclude must hold names of measured parameters, got {unknown!r}. "
            f"The names are: {', '.join(layout.names[:8])}{', ...' if layout.names[8:] else ''}."
        )
