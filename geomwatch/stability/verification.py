"""Does an optimizer step as its formula says? Its first steps tell, and what an unknown one is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geomwatch.stability.algorithms import CANDIDATES, TORCH
from geomwatch.stability.problem import coming_steps, learning_rates
from geomwatch.stability.registry import Known, known_of, settle
from geomwatch.vectors.layout import Layout

_TOLERANCE = 0.01  # of the update's length
_STEPS = 3  # that have to agree: at a first one many optimizers are alike
_TRIES = 10  # steps that are looked at, whether they tell anything or not
_LARGEST = 1 << 16  # entries of a tensor that is looked at
_MOST = 6  # tensors


class FirstSteps:
    """Holds what an optimizer's first steps do against what formulas predict, to 1 %.

    Of what is registered or known by its class one step that differs is a contradiction: it loses
    its formula. Of an unknown class three steps that agree with a candidate give it that one's
    formula. A few small tensors are looked at, one of each group at least; a step whose update is
    near the rounding of its weights tells nothing. torch's own classes are not asked.
    """

    def __init__(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        self._optimizer, self._known = optimizer, known_of(optimizer)
        self._candidates = _candidates(self._known)
        self._sample = _sample(optimizer, params) if self._candidates else []
        self._agreed = self._tries = 0
        self._weights: list[Tensor] = []  # of the step that is looked at, and as they were
        self._before: list[Tensor] = []
        self._predicted: list[Tensor | None] = []

    @property
    def is_open(self) -> bool:
        """Whether a further step would tell anything."""
        is_told = self._agreed == _STEPS or self._tries == _TRIES
        return bool(self._candidates and self._sample) and not is_told

    @torch.no_grad()
    def before(self, scale: float = 1.0, gradient_scale: float = 1.0) -> None:
        """Predict the coming step, at `scale` times its rates."""
        stepped = [p for p in self._sample if p.grad is not None and not p.grad.is_sparse]
        self._weights = stepped
        self._before = [p.detach().clone() for p in stepped]
        rates = tuple(scale * rate for rate in learning_rates(self._optimizer))
        self._predicted = [self._prediction(k, rates, gradient_scale) for k in self._candidates]

    @torch.no_grad()
    def after(self) -> str:
        """Compare; return what there is to say, if anything."""
        pairs = list(zip(self._weights, self._before, strict=True)) if self._before else []
        self._before = []
        self._tries += 1
        if not pairs:
            return ""
        taken = torch.cat([_wide(p) - _wide(w) for p, w in pairs])
        size = float(taken.norm())
        rounding = sum(torch.finfo(w.dtype).eps * float(_wide(w).norm()) for _, w in pairs)
        if not 0 < size < float("inf") or rounding > _TOLERANCE * size:
            return ""
        fits = [_fits(predicted, taken) for predicted in self._predicted]
        self._agreed += 1
        if self._known.has_formula:
            return "" if fits[0] else self._contradicted(self._predicted[0], taken)
        self._candidates = [
            k for k, fit in zip(self._candidates, fits, strict=True) if fit and self._has_state(k)
        ]
        return self._recognised() if self._candidates and self._agreed == _STEPS else ""

    def _prediction(
        self, known: Known, rates: tuple[float, ...], gradient_scale: float
    ) -> Tensor | None:
        layout = Layout(tuple(map(str, range(len(self._weights)))), tuple(self._weights))
        gradients = [_wide(p.grad) / gradient_scale for p in self._weights if p.grad is not None]
        assert known.algorithm is not None
        assert known.algorithm.step is not None
        try:
            coming = coming_steps(self._optimizer, known, layout, gradients, rates, cold_start=True)
            return torch.cat([known.algorithm.step(c).update(c) for c in coming if c is not None])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError):
            return None  # a layout that this formula does not fit

    def _has_state(self, known: Known) -> bool:
        assert known.algorithm is not None
        state = self._optimizer.state.get(self._weights[0], {})
        keys = [key for key in known.algorithm.state if key != "momentum_buffer"]
        return all(key in state for key in keys)

    def _contradicted(self, predicted: Tensor | None, taken: Tensor) -> str:
        name, size = type(self._optimizer).__name__, float(taken.norm())
        was = self._known.name
        found = "its state is laid out otherwise"
        if predicted is not None:
            off = float((predicted - taken).norm()) / size
            found = (
                f"a step of length {float(predicted.norm()):.4g} was predicted, one of {size:.4g} "
                f"was taken, {off:.1%} apart"
            )
        reason = f"{name} does not step as {was} does: {found}"
        self._candidates = []
        settle(self._optimizer, Known(reason=reason))
        return (
            f"{reason}. Its margins are withheld. Mend register_optimizer(...), or call "
            "monitor.step() after gradients are clipped."
        )

    def _recognised(self) -> str:
        known = self._candidates[0]
        settle(self._optimizer, known)
        name = type(self._optimizer).__name__
        return f"{name} steps as {known.name} does, to 1 % in {_STEPS} steps, and is judged so"


def _candidates(known: Known) -> list[Known]:
    if known.algorithm is None:
        return [Known(TORCH[name], name) for name in CANDIDATES] if not known.is_settled else []
    is_torchs_own = known.algorithm is TORCH.get(known.name) and not known.is_registered
    return [] if is_torchs_own or not known.has_formula else [known]


def _sample(optimizer: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """Take the smallest tensors, of each group and number of dimensions first."""
    watched = {id(p) for p in params}
    held = [
        (i, p)
        for i, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if id(p) in watched and type(p.data) is Tensor and p.is_floating_point()
    ]
    held = [(i, p) for i, p in held if p.numel() <= _LARGEST]
    first: dict[tuple[int, int], Tensor] = {}
    for i, p in sorted(held, key=lambda pair: pair[1].numel(), reverse=True):
        first[i, p.dim()] = p
    return list(first.values())[:_MOST]


def _wide(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _fits(predicted: Tensor | None, taken: Tensor) -> bool:
    if predicted is None:
        return False
    return float((predicted.to(taken) - taken).norm()) <= _TOLERANCE * float(taken.norm())
