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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from geomwatch.stability.recursion import Recursion
from geomwatch.stability.registry import Known, known_of, rate_of
from geomwatch.stability.registry import learning_rates as learning_rates
from geomwatch.stability.registry import unwrap as unwrap
from geomwatch.stability.scaled import Stability
from geomwatch.stability.step import Coming, Step
from geomwatch.vectors.layout import Layout, entries

_SAMPLE = 1 << 15  # entries of a group that its median is taken from


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
        cold_start: keep in P what makes first steps longer than later ones, as averages that start
            at zero do: Adam's first is 1/(1-b1) times longer. It fades, or is damped by the average
            itself, before an instability can grow. Warnings leave it out, controllers keep it.
        rates: learning rates to assume, one a group, for the margin at a planned rate.

    Raises:
        ValueError: no gradient, an unknown name in `exclude`, or a wrong shape or option.
    """
    _check_options(layout, exclude, damping)
    inner = unwrap(optimizer)
    lrs = learning_rates(inner) if rates is None else tuple(float(rate) for rate in rates)
    with torch.no_grad():
        known = known_of(inner)
        coming = coming_steps(
            inner, known, layout, _gradients(layout, gradient), lrs, cold_start=cold_start
        )
        status, reason = _has_none(known, layout)
        steps = [] if status != "ok" else [_linear(known, c) for c in coming]
        if status == "ok":
            status, reason = _has_no_limit(inner, coming, steps)
        if status != "ok":
            reason += "; the margin is lr * lambda_max(H), to be compared with this run's own past"
            steps = [_unscaled(c.lr) if c else None for c in coming]
            if not any(coming):
                steps = [_unscaled(lrs[0] if lrs else 1.0)] * len(coming)
        if damping == "median":
            steps = _damped(steps, coming)
        kept = [None if n in exclude else s for n, s in zip(layout.names, steps, strict=True)]
        sign = -1.0 if {c.sign for c in coming if c} == {-1.0} else 1.0
        return replace(_assembled(layout, kept), sign=sign, status=status, reason=reason)


def cold_start(optimizer: object, taken: int) -> float:
    """Return the factor by which the coming step is longer than later ones at the same rate.

    The largest of the groups at step t = `taken` + 1: 1 / (1 - b1^t) for Adam and its kin, of whose
    averages starting at zero formulas leave that out (see `optimizers`). It is what
    `stability_of(cold_start=True)` adds.
    """
    inner = unwrap(optimizer)
    known = known_of(inner)
    if known.algorithm is None:
        return 1.0
    groups = [known.group_of(g) for g in getattr(inner, "param_groups", ())]
    return max((known.algorithm.start(g, float(taken + 1)) for g in groups), default=1.0)


def planned_rates(optimizer: object, present: Sequence[float]) -> tuple[float, ...]:
    """Return the highest rate each group is known to be headed for: its `present` one, or more.

    A torch scheduler that starts below its base rate leaves that as "initial_lr" in the group, a
    OneCycleLR its peak as "max_lr".
    """
    groups = getattr(unwrap(optimizer), "param_groups", ())
    pairs = zip(groups, present, strict=True)
    return tuple(
        max([lr, *filter(math.isfinite, (rate_of(g.get(key)) for key in ("initial_lr", "max_lr")))])
        for g, lr in pairs
    )


def coming_steps(
    optimizer: Any,
    known: Known,
    layout: Layout,
    gradients: Sequence[Tensor | None],
    lrs: Sequence[float],
    *,
    cold_start: bool,
) -> list[Coming | None]:
    """Return what each parameter's step works on; None where the optimizer will not step it."""
    groups = [known.group_of(g) for g in getattr(optimizer, "param_groups", ())]
    if len(lrs) != len(groups):
        raise ValueError(
            f"rates must have one entry for each of {len(groups)} parameter groups, got {lrs!r}. "
            "learning_rates(optimizer) gives the present ones."
        )
    held = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    has_state = known.has_formula and hasattr(optimizer, "state")
    # .get, because optimizer.state makes an entry for whatever is looked up by [].
    states = [optimizer.state.get(p, {}) if has_state else {} for p in layout.params]
    states = [known.state_of(state) for state in states]
    of = [groups[held[id(p)]] if id(p) in held else {} for p in layout.params]
    coming: list[Coming | None] = []
    counts = _counts(states, of)
    for p, g, state, group, done in zip(layout.params, gradients, states, of, counts, strict=True):
        if g is None or id(p) not in held:
            coming.append(None)
            continue
        lr, sign = lrs[held[id(p)]], -1.0 if group.get("maximize", False) else 1.0
        w = entries(g, p.detach())
        decay, keep = _decay(known, group, lr)
        g = sign * g if decay == 0 else sign * g + decay * w
        coming.append(
            Coming(group, state, lr, g, done + 1, sign, decay, keep, cold_start, w, p.shape)
        )
    return coming


def _decay(known: Known, group: Mapping[str, Any], lr: float) -> tuple[float, float]:
    """Coupled weight decay, and what decoupled decay leaves of the weights."""
    if known.algorithm is None or not known.has_formula:
        return 0.0, 1.0
    decay, way = float(group.get("weight_decay") or 0.0), known.algorithm.couples(group)
    if way == "coupled":
        return decay, 1.0
    return 0.0, 1 - lr * decay if way == "decoupled" else 1.0


def _linear(known: Known, c: Coming | None) -> Step | None:
    if c is None:
        return None
    assert known.algorithm is not None
    assert known.algorithm.step is not None
    return replace(known.algorithm.step(c), decay=c.decay)


def _unscaled(lr: float) -> Step:
    """A step whose margin is lr times the curvature, deterministic or stochastic."""
    return Step(Recursion(2 * lr))


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


def _counts(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Steps each parameter has taken; one transfer, as fused optimizers count on the device.

    Some libraries count in the group, as "step" or "k".
    """
    pairs = zip(states, groups, strict=True)
    found = [s.get("step", g.get("step", g.get("k", 0.0))) for s, g in pairs]
    counts = [torch.as_tensor(count).reshape(()) for count in found]
    numbers: list[float] = torch.stack([c.to(counts[0]) for c in counts]).tolist()
    return numbers


def _has_none(known: Known, layout: Layout) -> tuple[str, str]:
    algorithm = known.algorithm
    if algorithm is None or algorithm.step is None:
        is_directional = algorithm is not None and algorithm.directional
        return "directional" if is_directional else "unknown", known.reason
    if algorithm.whole and layout.is_cut:
        return "unknown", f"{known.name} needs whole tensors, and these are shards"
    return "ok", ""


def _has_no_limit(
    optimizer: Any, coming: Sequence[Coming | None], steps: Sequence[Step | None]
) -> tuple[str, str]:
    kind = type(optimizer).__name__
    if not any(coming):
        return "unknown", f"this {kind} steps none of the measured parameters that have a gradient"
    if len({c.sign for c in coming if c}) > 1:
        return "unknown", "groups that minimize beside groups that maximize have no symmetric form"
    if any(step and _limit(step) <= 0 for step in steps):
        return "unknown", "at this momentum and weight decay no step is stable"
    return "ok", ""


def _limit(step: Step) -> float:
    """The rate * h of P^-1 H up to which a step is stable."""
    return step.recursion.threshold - step.recursion.rate * step.decay_after


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
    factors = [s.recursion.rate / _limit(s) if s else 0.0 for s in steps]
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
