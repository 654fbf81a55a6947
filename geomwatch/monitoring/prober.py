"""One probe of a running training: the measurement with the memory that spans probes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature import batches
from geomwatch.curvature.locate import operation_in
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.placement import choose_shards
from geomwatch.curvature.side_effects import side_effects
from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import choose_backend, choose_products
from geomwatch.curvature.window_weights import Weighing
from geomwatch.estimators.along_step import Point, Sentinel
from geomwatch.isolation.signals import traceless
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.memory import Held
from geomwatch.monitoring.probed import Probed
from geomwatch.monitoring.rehearsal import Rehearsal
from geomwatch.monitoring.replay_fidelity import ReplayFidelity, gradient_of_step
from geomwatch.quantities.plan import Plan
from geomwatch.quantities.probe import Probe
from geomwatch.quantities.running_trace import RunningTrace
from geomwatch.quantities.table import (
    WITHOUT_HVPS,
    evaluate,
    evaluate_layers,
    ritz_indices,
    scaled,
)
from geomwatch.records import Estimate, Record
from geomwatch.stability.problem import stability_of
from geomwatch.stability.registry import learning_rates, unusable
from geomwatch.stability.scale_invariance import ScaleInvariance
from geomwatch.stability.scaled import Stability
from geomwatch.vectors.layout import Layout, generator

_MARGINS = ("stability_margin", "stochastic_margin")
_UNSTEADY = Estimate(
    None, status="failed", reason="the gradient that the step would use is not finite"
)
_LONGER = 1.5  # gain that is no chance: two micro-batches give 2, a state that moves on 1.2
_SYMMETRIC = 0.03  # relative asymmetry of products, as `smoothness` tells kinks by
_NAMES_LAYERS = 0.25  # the margin from where on an alert may want to name its layers
_NEED_VECTORS = {"stochastic_margin", "lambda_2", "lambda_3", "lambda_min", "spectral_gap"}
_LAYERS_NAMED = 3
_LAYER_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Own:
    """What the coming step itself knows: its gradient and its loss, if it does."""

    gradient: Tensor | None  # (D,)
    loss: float | None
    is_of_window: bool  # they are of the batches that are measured on
    unclipped: float | None = None  # the gradient's norm before clipping, if it is known
    is_single: bool = False  # the window is one batch

    def is_finite(self) -> bool:
        """Tell whether the gradient is; also where there is none."""
        return self.gradient is None or math.isfinite(float(self.gradient.norm()))


@dataclass(frozen=True, slots=True)
class _Found:
    loss: float
    estimates: dict[str, Estimate]
    provenance: dict[str, str | int | float | bool]
    along: Estimate
    layers: tuple[str, ...]
    items: int


class Prober(Resumable):
    """Measures at a training step; keeps warm starts, the running trace and held values."""

    plan: Kept[Plan]
    _rng: Kept[torch.Generator]
    _invariance: Kept[ScaleInvariance]
    _invariant: Kept[frozenset[str]]
    _sentinel: Kept[Sentinel]
    _fidelity: Kept[ReplayFidelity]
    _trace: Kept[RunningTrace]
    _held: Kept[Held]
    same_data: Kept[bool]
    _fingerprint: Kept[tuple[float, ...] | None]
    _compared: Kept[int | None]
    _validation: Kept[dict[str, str | int | float | bool] | None]
    _chosen: Kept[tuple[str, str, int | None] | None]  # hvp, precision, micro_batch
    _obstacle: Kept[str]
    _bends: Kept[dict[str, float]]
    _last_margin: Kept[float | None]
    _is_kinked: Kept[bool]

    def __init__(
        self, subject: Subject, optimizer: Any, plan: Plan, *, per_layer: bool, seed: int
    ) -> None:
        self.ranks, self.optimizer, self.plan = subject.ranks, optimizer, plan
        self._per_layer = per_layer
        self._rng = generator(seed)
        self._weighing = Weighing()
        self.same_data = False  # each step sees the same data
        self._fingerprint = None
        self._compared = None  # the step it was taken at
        self.surprises: list[str] = []  # things to tell the user once
        self.limit_ratio = 1.0  # full-batch over small-batch limit, at the last look
        self.no_margin = ""  # why the optimizer's steps have none
        self._given = self._subject = subject
        self._forget()

    def restart(self, layout: Layout, optimizer: Any) -> None:
        """Go on with other parameters or another optimizer: nothing measured so far is of them."""
        self.optimizer = optimizer
        self._subject = replace(self._given, layout=layout)
        self._forget()
        self.plan.restart()

    def _forget(self) -> None:
        self._validation = None
        self._chosen = None
        self._sharding: dict[str, str] | None = None
        self._obstacle = ""  # why this model has no HVPs
        self._bends = {}  # what steps of differences go by
        self._checked: list[tuple[float, Tensor]] = []  # loss and gradient at the first check
        self._last_margin = None
        self._is_kinked = False  # one-sided differences were given up
        self._invariance = ScaleInvariance()
        self._invariant: frozenset[str] = frozenset()
        self._sentinel = Sentinel()
        self._fidelity = ReplayFidelity()
        self._trace = RunningTrace()
        self._held = Held()

    def resumed(self) -> None:
        """Measure as was chosen before, unless something else is asked for now."""
        if self._chosen is None:
            return
        (hvp, precision, cut), asked = self._chosen, self._given.how
        as_before = asked.hvp in ("auto", hvp) and asked.precision in ("float32", precision)
        if not (as_before and asked.micro_batch in (None, cut)):
            self._validation = None
        else:
            self._subject = self._subject.set(hvp=hvp, precision=precision, micro_batch=cut)

    @traceless
    def probe(
        self,
        window: Sequence[Any],
        step: int,
        *,
        same_data: Sequence[Any],
        noise: bool = False,
        loss: Tensor | float | None = None,
        grad_norm: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> Probed:
        """Measure on `window`; `same_data` are the batches the step itself has seen.

        `loss` is the step's own, if known; gradients are still to be divided by `grad_scale`. With
        `noise` what micro-batches tell is measured in any case.
        """
        start = time.perf_counter()
        self._checked.clear()  # of a probe that has failed
        self._choose_shards()
        # A step that came through a scaler or a clip knows its gradient; a probe may not.
        gradient = gradient_of_step(self._subject.layout, grad_scale)
        is_single = len(window) == 1
        own = Own(gradient, _number(loss), window is same_data, _number(grad_norm), is_single)
        names: list[str] | None = None
        while True:
            with self._objective(window, gradient if own.is_of_window else None) as objective:
                adopted = self._adopt(objective, own)
                probe = self._shared(objective, own)
                names = names or self._choose(probe, step, noise=noise)
                self._spend(probe, names)
                if not self._is_asymmetric(probe, names):
                    found = self._measured(probe, names, own, adopted=adopted)
                    break
            # the step's gradient was another one after all, as where clipping has set in; or the
            # loss has kinks now: a layer was switched, or a mask has changed
            if adopted:
                self._fidelity.has_gradient = False
            else:
                self._subject, self._validation = self._subject.set(hvp="auto"), None
                self._is_kinked = True
        self._compare_data(step, same_data)
        self.plan.probes += 1
        margin = found.estimates.get("stability_margin")
        self._last_margin = None if margin is None else margin.value
        record = Record(
            step=step,
            loss=found.loss,
            lr=learning_rates(self.optimizer),
            seconds=time.perf_counter() - start,
            estimates=self._ordered(self._held.merge(step, found.estimates)),
            provenance=found.provenance | {"same_data": self.same_data},
        )
        return Probed(record, margin, found.along, found.layers, found.items)

    def _measured(self, probe: Probe, names: Sequence[str], own: Own, *, adopted: bool) -> _Found:
        objective = probe.objective
        fresh = evaluate(probe, names)
        if self._per_layer and self.plan.is_whole and objective.is_finite():
            fresh |= evaluate_layers(probe)
        if objective.obstacle:
            fresh |= self._without_hvps(probe, names)
        if not own.is_finite():
            fresh |= {name: _UNSTEADY for name in _MARGINS if name in fresh}
        if why := self._why_no_margin():
            fresh |= {name: _none(why) for name in _MARGINS if name in fresh}
        layers = self._layers(probe, fresh)
        if not adopted:
            self._fidelity.compare(objective, own.gradient if own.is_of_window else None, own.loss)
        gain = self._fidelity.gain_of_step(own.gradient, own.unclipped)
        fresh |= {n: scaled(fresh[n], gain) for n in _MARGINS if n in fresh and gain != 1}
        along = self._along_gradient(probe, own.gradient, gain)
        self._tell_gain(gain)
        how = objective.provenance | (self._validation or {}) | (self._sharding or {})
        how |= self._weighing.facts
        self.surprises += [
            f"evaluating the loss changes {name}, which a probe can't put back. Pass a "
            "loss_fn= that leaves it alone, or name its owner in also=(...)."
            for name in objective.changed_objects
        ]
        return _Found(
            objective.loss(),
            fresh,
            how | {"hvps": objective.hvps, "gain": gain},
            along,
            layers,
            self._items(objective),
        )

    def _adopt(self, objective: Objective, own: Own) -> bool:
        """Let one-sided differences go by the step's own gradient, where that is the loss's."""
        if self._checked and own.is_single and self.ranks.size == 1:
            objective.adopt(*self._checked.pop())
            return False
        known = own.is_of_window and own.gradient is not None and own.loss is not None
        if self._subject.how.hvp != "one_sided" or not known or not own.is_finite():
            return False
        if not (self._fidelity.has_gradient and self._fidelity.has_loss):
            return False
        if self._fidelity.gain_of_step(own.gradient, own.unclipped) != 1:  # clipped just now
            return False
        assert own.gradient is not None
        assert own.loss is not None
        objective.adopt(own.loss, own.gradient)
        return True

    def _is_asymmetric(self, probe: Probe, names: Sequence[str]) -> bool:
        """Tell whether one-sided differences have turned out not to be those of a Hessian."""
        if self._subject.how.hvp != "one_sided" or "stability_margin" not in names:
            return False
        if not probe.objective.is_finite():
            return False
        try:
            with self.ranks.together():
                return probe.margin_spectrum.asymmetry > _SYMMETRIC
        except Exception:  # for the estimate to report
            return False

    @traceless
    def glance(
        self,
        window: Sequence[Any],
        step: int,
        *,
        same_data: Sequence[Any],
        loss: Tensor | float | None = None,
        grad_norm: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> Estimate:
        """Measure the margin along the coming step from losses alone (see `sentinel`)."""
        if why := self._why_no_margin():
            return _none(why)
        self._choose_shards()
        self._compare_data(step, same_data)
        gradient = gradient_of_step(self._subject.layout, grad_scale)
        weights = self._weighing(self._subject, window)
        with self._subject.on(window, products=False, weights=weights) as objective:
            used = objective.gradient() if gradient is None else gradient
            if self._fidelity.has_gradient and self._invariance.is_young:
                self._invariant = self._invariance.update(self._subject.layout, used)
            stability = self._stability(used)
            known = _number(loss) if self._fidelity.has_loss and len(window) == 1 else None
            unclipped = _number(grad_norm)
            gain: float | None = self._fidelity.gain_of_step(gradient, unclipped)
            is_own = gradient is None or (self._fidelity.has_gradient and gain == 1)
            if self._fidelity.agrees and not is_own and unclipped is None:
                gain = None  # clipping may have set in or ended since the probe
            point = Point(stability, used, is_own, known, gain)
            return _of(stability, self._sentinel.measure(objective.loss_at, point))

    def loss_on(self, window: Sequence[Any]) -> Objective:
        """Return the loss on a window, for its values alone."""
        weights = self._weighing(self._subject, window)
        return self._subject.on(window, products=False, weights=weights)

    def rehearse(
        self,
        windows: Sequence[Sequence[Any]],
        multiples: Sequence[float],
        *,
        grad_norm: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> list[float]:
        """Return by how much steps over the last windows raise the loss (see `Rehearsal`)."""
        gradient = gradient_of_step(self._subject.layout, grad_scale)
        gain = self._fidelity.gain_of_step(gradient, _number(grad_norm))
        size = math.inf if gradient is None else float(gradient.norm())
        gain = gain if gain < 1 or gain > _LONGER else 1.0
        return self._rehearsal(gain, size).rises(windows, multiples)

    def present(self, windows: Sequence[Sequence[Any]]) -> list[float]:
        """Return the losses of windows at the present weights."""
        return self._rehearsal().present(windows)

    def _rehearsal(self, gain: float = 1.0, size: float = math.inf) -> Rehearsal:
        return Rehearsal(self._subject, self.optimizer, self._weighing, gain, size)

    def cut_batches(self, window: Sequence[Any]) -> int | None:
        """Use a quarter of the memory from now on; None where items can't be fewer."""
        if self._subject.how.micro_batch is not None:
            return None
        most = max((self._subject.cutter.count(batch) for batch in window), default=1)
        smaller = max(1, most // 4)
        self._subject = self._subject.set(micro_batch=smaller)
        self._validation = None  # it is to be checked that the loss is a mean over items
        return smaller

    def uncut_batches(self) -> None:
        """Take back `cut_batches`."""
        self._subject, self._validation = self._subject.set(micro_batch=None), None

    def lambda_max(self) -> float | None:
        """Return the last known lambda_max of the Hessian."""
        return self._held.value("lambda_max")

    def _choose_shards(self) -> None:
        """Settle, once, where vectors are held; warm starts are held there too."""
        if self._sharding is None:
            self._subject, self._sharding = choose_shards(self._subject)

    def _objective(self, window: Sequence[Any], gradient: Tensor | None) -> Objective:
        first = window[0] if window else None
        if self.ranks.any(self._subject.outside.is_doubtful):
            self.surprises += side_effects(self._subject, first).told()
        if self._validation is None:
            by_one = partial(choose_products, self._bends, self._checked)
            choose = choose_backend if self._is_kinked else by_one
            self._subject, self._validation = choose(self._subject, first)
            how = self._subject.how
            self._chosen = how.hvp, how.precision, how.micro_batch
            by_differences = self._subject.how.hvp == "finite_difference"
            if by_differences and "validation_error" in self._validation:
                self.surprises.append(
                    f"{self._validation['validation']}. Curvature is measured by differences of "
                    "gradients instead, at twice the cost or more."
                )
        weights = self._weighing(self._subject, window, gradient)
        return self._subject.on(window, weights=weights, bends=self._bends)

    def _shared(self, objective: Objective, own: Own) -> Probe:
        obstacle = self._obstacle or str((self._validation or {}).get("obstacle", ""))
        if obstacle:
            objective.forgo_hvps(obstacle)
        gradient = own.gradient
        if gradient is not None and own.is_finite() and objective.is_finite():
            self._fidelity.refuse_scaled(gradient, objective.gradient())
        used = objective.gradient() if gradient is None else gradient
        self._invariant = self._invariance.update(self._subject.layout, objective.gradient())
        return Probe(
            objective,
            stability=self._stability(used),
            rng=self._rng,
            groups=getattr(self.optimizer, "param_groups", ()),
            running=self._trace,
            last_lambda=self.lambda_max(),
        )

    def _stability(self, gradient: Tensor) -> Stability:
        rates = learning_rates(self.optimizer)
        found = stability_of(
            self.optimizer,
            self._subject.layout,
            gradient=gradient,
            exclude=self._invariant,
            rates=[0.0] * len(rates) if unusable(rates) else rates,
        )
        self.limit_ratio = found.limit_ratio
        return found

    def _why_no_margin(self) -> str:
        return self.no_margin or unusable(learning_rates(self.optimizer))

    def _along_gradient(self, probe: Probe, gradient: Tensor | None, gain: float) -> Estimate:
        """Return the margin along the coming step: an HVP's where there is one for free."""
        stability = probe.stability
        assert stability is not None
        if why := self._why_no_margin():
            return _none(why)
        if probe.knows_margin_sharpness:
            exact = probe.margin_sharpness
            self._sentinel.note(exact)
            return _of(stability, Estimate(gain * stability.limit_ratio * exact, 0.0, "none"))
        objective = probe.objective
        used = objective.gradient() if gradient is None else gradient
        is_own = gradient is None or (self._fidelity.has_gradient and gain == 1)
        point = Point(stability, used, is_own, objective.loss(), gain)
        return _of(stability, self._sentinel.measure(objective.loss_at, point))

    def _tell_gain(self, gain: float) -> None:
        """Say once that steps are longer than the loss as it is measured has them."""
        if self._fidelity.agrees and gain > _LONGER:
            self.surprises.append(
                f"the step's gradient is {gain:.3g} x that of loss_fn on the same batches, as "
                "where an accumulation is not divided by its micro-batches, or the loss is scaled. "
                "Margins are those of the step that is taken."
            )

    def _choose(self, probe: Probe, step: int, *, noise: bool) -> list[str]:
        """Choose what to measure."""
        return self.plan.names(step, separate=probe.costs_separate_hessian, noise=noise)

    def _spend(self, probe: Probe, names: Sequence[str]) -> None:
        """Set what that may cost."""
        probe.budget, probe.until = self.plan.budget(names), ritz_indices(names)
        margin = self._last_margin
        near = margin is None or margin > _NAMES_LAYERS
        probe.needs_vectors = near or bool(_NEED_VECTORS & set(names))

    def _without_hvps(self, probe: Probe, names: Sequence[str]) -> dict[str, Estimate]:
        """Measure what losses alone can tell; say once what is in the way."""
        objective = probe.objective
        if not self._obstacle:
            self._obstacle = objective.obstacle
            operation = operation_in(objective.obstacle)
            module = objective.module_of(operation) if operation else None
            place = f" It is in module {module!r}." if module else ""
            self.surprises.append(
                f"curvature can't be measured here: {objective.obstacle}.{place} Loss, gradient "
                "norm, batch_sharpness and critical_lr still are. For the rest, write that "
                "backward with differentiable operations, or leave its parameters out with "
                "params=[...]."
            )
        return evaluate(probe, [n for n in WITHOUT_HVPS if n not in names and n != "difficulty"])

    def _layers(self, probe: Probe, fresh: dict[str, Estimate]) -> tuple[str, ...]:
        """Name the modules that hold the top Ritz vector: squares of its entries, for free."""
        if "stability_margin" not in fresh or fresh["stability_margin"].value is None:
            return ()
        if not len(probe.margin_spectrum.vectors):
            return ()
        mass = self._subject.layout.mass_by_module(probe.margin_spectrum.vectors[0])
        named = [(m, share) for m, share in mass.items() if share >= _LAYER_SHARE]
        return tuple(f"{m} ({share:.0%})" for m, share in named[:_LAYERS_NAMED])

    def _items(self, objective: Objective) -> int:
        own = objective.items
        return own if self.ranks.size == 1 else round(self.ranks.total(float(own)))

    def _compare_data(self, step: int, window: Sequence[Any]) -> None:
        """Tell whether this step sees the data that the last measured one has seen."""
        if step == self._compared:  # a sentinel has done so
            return
        self._compared = step
        now = tuple(number for batch in window for number in batches.fingerprint(batch))
        before, self._fingerprint = self._fingerprint, now
        same = (
            before is not None
            and len(before) == len(now) > 0
            and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(before, now, strict=True))
        )
        self.same_data = self.ranks.all(same)

    def _ordered(self, estimates: dict[str, Estimate]) -> dict[str, Estimate]:
        own = {name: estimates[name] for name in self.plan.all_names if name in estimates}
        return own | estimates


def _of(stability: Stability, margin: Estimate) -> Estimate:
    """A margin along the gradient; without a formula it is a share of no limit."""
    if stability.status == "ok" or margin.status != "ok":
        return margin
    return replace(margin, status=stability.status, reason=stability.reason)


def _none(reason: str) -> Estimate:
    return Estimate(None, status="withheld", reason=reason)


def _number(loss: Tensor | float | None) -> float | None:
    return float(loss.detach()) if isinstance(loss, Tensor) else loss
