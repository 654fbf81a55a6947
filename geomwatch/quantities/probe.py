"""What the quantities of one point share: gradient, spectra, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature.objective import Objective
from geomwatch.curvature.products import RANDOM
from geomwatch.estimators.hutchinson import Samples, hutchinson, mean_with_stderr
from geomwatch.estimators.lanczos import Operator, Spectrum, lanczos, lean_lanczos, unit, warm_start
from geomwatch.estimators.noise import Spread, pooled, spread_of
from geomwatch.estimators.noise_floor import Readout, read_out
from geomwatch.estimators.roughness import Slices, take_slices
from geomwatch.estimators.sharpness import directional_sharpness
from geomwatch.quantities.plan import Budget
from geomwatch.quantities.running_trace import RunningTrace
from geomwatch.records import Estimate
from geomwatch.stability.scaled import Stability
from geomwatch.vectors.layout import generator

_PIECES = 8
# Of the Ritz vectors of a part of the batch: any of them may be the top one of the whole.
_COARSE_WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6)


class Probe:
    """What the quantities of one point share; each part is computed when first asked for."""

    def __init__(
        self,
        objective: Objective,
        *,
        stability: Stability | None = None,
        budget: Budget | None = None,
        rng: torch.Generator | None = None,
        until: Sequence[int] = (0,),
        groups: Sequence[Mapping[str, Any]] = (),
        running: RunningTrace | None = None,
        last_lambda: float | None = None,
        needs_vectors: bool = True,
    ) -> None:
        self.objective = objective
        self.stability = stability
        self.budget = budget or Budget()
        self.rng = rng or generator(0)
        self.groups = groups  # the optimizer's parameter groups
        self._running, self._last_lambda = running, last_lambda
        self.until = until  # which Ritz values of the Hessian must converge
        self.needs_vectors = needs_vectors  # the margin's top Ritz vector

    @cached_property
    def spectrum(self) -> Spectrum:
        """Ritz values of the Hessian; of the margin's operator, scaled, where they are alike."""
        if self._margin_is_hessian:
            assert self.stability is not None
            assert self.stability.uniform is not None
            return _scaled(self.margin_spectrum, 1 / self.stability.uniform**2)
        return self._lanczos(lambda o: o.hvp, self.objective.gradient, self.until)

    @cached_property
    def margin_spectrum(self) -> Spectrum:
        """Ritz values of S (H + W) S, the operator whose largest eigenvalue is the margin."""
        assert self.stability is not None
        apply, scale = self.stability.apply, self.stability.scale
        until = self.until if self._margin_is_hessian else (0,)
        # nothing is to be found among the weights that are left out
        keep = scale > 0 if self.stability.uniform is None else None
        return self._lanczos(
            lambda o: apply(o.hvp), lambda: scale * self.objective.gradient(), until, keep
        )

    @cached_property
    def samples(self) -> Samples:
        """Hutchinson samples of the Hessian."""
        return hutchinson(
            partial(self.objective.hvp, like=RANDOM),
            self.objective.layout,
            samples=self.budget.samples,
            rng=self.rng,
        )

    @cached_property
    def batch_sharpness(self) -> float:
        """Curvature along the gradient, g'Hg / g'g."""
        if self._margin_is_hessian and self._began_downhill:
            assert self.stability is not None
            assert self.stability.uniform is not None
            return self.margin_spectrum.at_start / self.stability.uniform**2
        return directional_sharpness(self.objective.hvp, self.objective.gradient())

    @cached_property
    def margin_sharpness(self) -> float:
        """d'(H + W)d / g'd along the preconditioned step d = S^2 g: the margin of one batch."""
        assert self.stability is not None
        s = self.stability
        if self._began_downhill:
            return self.margin_spectrum.at_start
        if self._margin_is_hessian and s.uniform is not None:
            return s.uniform**2 * self.batch_sharpness

        def shifted(v: Tensor) -> Tensor:
            hv = s.sign * self.objective.hvp(v)
            return hv if s.decay is None else hv + s.decay * v

        return directional_sharpness(shifted, self.objective.gradient(), weight=s.scale**2)

    @property
    def knows_margin_sharpness(self) -> bool:
        """Whether `margin_sharpness` costs nothing, by what is known already."""
        known = self._margin_is_hessian and "batch_sharpness" in self.__dict__
        return known or self._began_downhill

    @property
    def _began_downhill(self) -> bool:
        """Whether the margin's Krylov space has begun at S g: its first quotient is along it."""
        is_along = self.budget.is_lean and not self.budget.is_mixed
        return is_along and "margin_spectrum" in self.__dict__

    @cached_property
    def trace(self) -> Estimate:
        """The trace from the samples of this probe, or pooled with those of the probes before."""
        if self._running is None:
            return mean_with_stderr(self.samples.quadratic, hvps=len(self.samples.quadratic))
        known = "spectrum" in self.__dict__ or self._margin_is_hessian
        reference = self.spectrum.values[0] if known else self._last_lambda
        return self._running.update(self.samples, reference)

    @cached_property
    def gradient_spread(self) -> Spread:
        """How the gradients of micro-batches spread: those of the window, or eight random ones."""
        return self._spread(lambda piece: piece.gradient(), self.objective.gradient())

    @cached_property
    def curvature_spread(self) -> Spread:
        """How the products of their Hessians with the margin's top Ritz vector spread."""
        assert self.stability is not None
        s, apply = self.margin_spectrum, self.stability.apply
        self.objective.hvps += 1
        whole, slack = s.values[0] * s.vectors[0], s.residuals[0]
        return self._spread(lambda piece: apply(piece.hvp)(s.vectors[0]), whole, slack)

    def _spread(
        self, of: Callable[[Objective], Tensor], whole: Tensor, slack: float = 0.0
    ) -> Spread:
        """Measure how what micro-batches have spreads; all together they have `whole`."""
        ranks = self.objective.ranks
        with ranks.together():
            pieces = self.objective.pieces(_PIECES, self.rng)
            found = [(piece.weight, of(piece)) for piece in pieces]
            self.objective.check_mean(found, whole, slack)
            local = spread_of(found)
        if ranks.size == 1 or pieces[0].ranks.size > 1:  # of all ranks already
            return local
        return pooled(local, ranks.total)

    @cached_property
    def readout(self) -> Readout:
        """How exactly differences of losses can be read here."""
        if self.objective.too_coarse:
            return Readout(self.objective.loss(), math.inf, self.objective.too_coarse)
        return read_out(self.objective.loss_at, self.objective.layout, rng=self.rng)

    @cached_property
    def slices(self) -> Slices:
        """The loss along random filter-normalised directions."""
        objective = self.objective
        return take_slices(objective.loss_at, objective.layout, self.readout, rng=self.rng)

    @property
    def costs_separate_hessian(self) -> bool:
        """Whether the Hessian's own spectrum needs HVPs beyond the margin's."""
        return not self._margin_is_hessian

    @property
    def _margin_is_hessian(self) -> bool:
        s = self.stability
        return s is not None and s.uniform is not None and s.decay is None and s.sign > 0

    def _lanczos(
        self,
        operator_of: Callable[[Objective], Operator],
        downhill: Callable[[], Tensor],
        until: Sequence[int],
        keep: Tensor | None = None,
    ) -> Spectrum:
        budget, operator = self.budget, operator_of(self.objective)
        spent = 0
        if budget.is_lean:
            start = downhill()
            if budget.is_mixed:
                noise = self.objective.layout.normal(self.rng)
                start = unit(start) + unit(noise if keep is None else noise * keep)
            if not self.needs_vectors:
                return lean_lanczos(operator, start, max_hvps=budget.lanczos, tol=budget.tol)
        else:
            coarse, spent = self._coarse(operator_of, budget.lanczos)
            noise = self.objective.layout.normal(self.rng)
            start = warm_start(coarse, noise, weights=_COARSE_WEIGHTS)
            start = start if keep is None else start * keep
        most = max(budget.lanczos - spent, 1)
        fine = lanczos(operator, start, max_hvps=most, tol=budget.tol, until=until)
        return replace(fine, hvps=fine.hvps + spent)

    def _coarse(
        self, operator_of: Callable[[Objective], Operator], budget: int
    ) -> tuple[Tensor | None, int]:
        """Spend a fifth of the budget on an eighth of the batch, where an HVP costs an eighth.

        At initialisation the top eigenvalues lie within a few percent of one another, and 20 HVPs
        from noise are off by more than 1 % in one of 17 cases, by up to 8 %; 32 HVPs on an eighth
        and 16 on the whole batch in one of 50, by up to 1.6 % (docs/benchmarks/lanczos_starts.md).
        """
        parts = ((share, self.objective.part(share)) for share in (8, 4))
        share, part = next(((s, p) for s, p in parts if p is not None), (1, None))
        spent = budget // 5
        if part is None or spent == 0:
            return None, 0
        noise = self.objective.layout.normal(self.rng)
        top = len(_COARSE_WEIGHTS)
        ranks = self.objective.ranks
        try:
            with ranks.together():
                found = lanczos(operator_of(part), noise, max_hvps=spent * share, top=top)
        except Exception as error:  # a loss that insists on its whole batch
            if ranks.any(isinstance(error, torch.OutOfMemoryError)):
                raise
            return None, 0
        self.objective.hvps += spent
        return found.vectors, spent


def _scaled(spectrum: Spectrum, factor: float) -> Spectrum:
    values = tuple(v * factor for v in spectrum.values)
    return replace(spectrum, values=values, residuals=tuple(r * factor for r in spectrum.residuals))
