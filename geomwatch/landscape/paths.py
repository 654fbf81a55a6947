"""The loss along one path between two states, straight or bent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError
from geomwatch.landscape.batchnorm import recalibrate, with_statistics
from geomwatch.landscape.bezier import Curve, digest_of, place_on
from geomwatch.landscape.data import Batches
from geomwatch.landscape.evaluator import Evaluator, Place, evaluating, same
from geomwatch.landscape.provenance import provenance
from geomwatch.landscape.scan import Loss, Scan, Setting, scan
from geomwatch.landscape.states import State

_SAME_FUNCTION = 1e-4  # of two orders of the same units, which are summed in another order


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """Two states, and what the second one was before it was aligned with the first."""

    a: State
    b: State
    before: State | None = None
    alignment: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Measures paths with one loss, on one grid."""

    model: nn.Module
    loss_fn: LossFn
    batches: object
    recalibrate: object
    setting: Setting
    points: int

    def measure(self, ends: Ends, curve: Curve | None = None) -> Scan:
        """Evaluate the loss along the straight path, or along a curve."""
        model, setting = self.model, self.setting
        anew = setting.mode == "eval" and self.recalibrate is not False
        norms = with_statistics(model) if anew else []
        data = Batches(self.batches if isinstance(self.recalibrate, bool) else self.recalibrate)
        facts = self._facts(ends, curve) | {"recalibrated": len(norms)}
        states = (ends.a, ends.b) if curve is None else (ends.a, curve.control, ends.b)
        origin = provenance(model, self.loss_fn, {})
        del origin["weights"]  # the model's own play no part
        options = setting.of_evaluator() | {"also": [*_listed(setting.also), *data.generators]}
        with evaluating(model, self.loss_fn, self.batches, **options) as evaluator:
            if ends.before is not None and setting.mode == "eval":
                _check_same_function(evaluator, ends.before, ends.b)
            loss = _recalibrated(evaluator, norms, data) if norms else None
            places = [_at(evaluator, states, t) for t in np.linspace(0, 1, self.points).tolist()]
            found = scan(
                evaluator, places, reference=places[0], header=facts, setting=setting, loss=loss
            )
        return Scan(found.losses, found.loss, {**origin, **found.provenance})

    def _facts(self, ends: Ends, curve: Curve | None) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": "barrier",
            "path": "linear" if curve is None else "bezier",
            "mode": self.setting.mode,
            "points": self.points,
            "states": [digest_of(ends.a), digest_of(ends.b)],
        }
        if ends.alignment is not None:
            facts["alignment"] = dict(ends.alignment)
        if curve is not None:
            facts["curve"] = {key: curve.provenance[key] for key in ("steps", "lr", "seed")}
            facts["control"] = digest_of(curve.control)
        return facts


def _at(evaluator: Evaluator, states: Sequence[State], t: float) -> Place:
    tensors = evaluator.tensors
    return lambda: place_on(tensors, states, t)


def _recalibrated(evaluator: Evaluator, norms: Sequence[Any], data: Batches) -> Loss:
    """Return the loss with BatchNorm statistics that are those of the weights it is at."""

    def loss(place: Place) -> float:
        def prepare() -> None:
            place()
            recalibrate(norms, lambda: evaluator.forward_all(data))

        return evaluator.loss(prepare)

    return loss


def _check_same_function(evaluator: Evaluator, before: State, after: State) -> None:
    """Refuse an alignment that changes what the net computes."""
    first, again = (evaluator.loss(_at(evaluator, [before, before], 0.0)) for _ in range(2))
    permuted = evaluator.loss(_at(evaluator, [after, after], 0.0))
    if same(first, again) and not same(first, permuted, _SAME_FUNCTION):
        raise UsageError(
            f"align must not change what the net computes, got a loss of {permuted:.6g} after it "
            f"and {first:.6g} before. Its units are tied in a way that units= (or the trace of its "
            "forward) does not show: pass units= that says all of it."
        )


def _listed(also: nn.Module | Sequence[object]) -> list[object]:
    return [also] if isinstance(also, nn.Module) else list(also)
