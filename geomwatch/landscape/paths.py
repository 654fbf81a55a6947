"""The loss along one path between two states, straight or bent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageError
from geomwatch.landscape.bar import Progress
from geomwatch.landscape.data import Batches
from geomwatch.landscape.evaluator import Evaluator, evaluating
from geomwatch.landscape.provenance import provenance, same, state_digest
from geomwatch.landscape.results import Curve, Facts
from geomwatch.landscape.scan import Scan, scan
from geomwatch.landscape.states import State, place_on
from geomwatch.quantities.measurement import Measurement

_SAME_FUNCTION = 1e-4  # of two orders of the same units, which are summed in another order


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """Two states, and what the second one was before it was aligned with the first."""

    a: State
    b: State
    before: State | None = None
    alignment: Facts | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Measures paths with one loss, on one grid."""

    model: nn.Module
    loss_fn: LossFn
    batches: object
    how: Measurement
    recalibrate: object
    points: int
    progress: Progress

    def measure(
        self, ends: Ends, curve: Curve | None = None, resume: str | FilePath | None = None
    ) -> Scan:
        """Evaluate the loss along the straight path, or along a curve."""
        model, how = self.model, self.how
        anew = how.mode == "eval" and self.recalibrate is not False
        norms = _with_statistics(model) if anew else []
        data = Batches(self.batches if isinstance(self.recalibrate, bool) else self.recalibrate)
        states = [ends.a, ends.b] if curve is None else [ends.a, curve.control, ends.b]
        origin = provenance(model, self.loss_fn)
        del origin["weights"]  # the model's own play no part
        how = replace(how, also=(*how.also, *data.generators))
        with evaluating(model, self.loss_fn, self.batches, how) as evaluator:
            tensors = evaluator.tensors
            if ends.before is not None and how.mode == "eval":
                _check_same_function(evaluator, ends.before, ends.b)

            def place(t: float) -> None:
                place_on(tensors, states, t)
                if norms:
                    _recalibrate(norms, evaluator, data)

            found = scan(
                lambda t: evaluator.loss(lambda: place(t)),
                np.linspace(0, 1, self.points).tolist(),
                reference=0.0,
                header=self._facts(ends, curve) | {"recalibrated": len(norms)},
                resume=resume,
                progress=self.progress,
            )
        return Scan(found.losses, found.loss, {**origin, **found.provenance, **evaluator.facts})

    def _facts(self, ends: Ends, curve: Curve | None) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": "barrier",
            "path": "linear" if curve is None else "bezier",
            "mode": self.how.mode,
            "points": self.points,
            "states": [state_digest(ends.a), state_digest(ends.b)],
        }
        if ends.alignment is not None:
            facts["alignment"] = dict(ends.alignment)
        if curve is not None:
            facts["curve"] = {key: curve.provenance[key] for key in ("steps", "lr", "seed")}
            facts["control"] = state_digest(curve.control)
        return facts


def _check_same_function(evaluator: Evaluator, before: State, after: State) -> None:
    """Refuse an alignment that changes what the net computes."""
    tensors = evaluator.tensors

    def loss(state: State) -> float:
        return evaluator.loss(lambda: place_on(tensors, [state], 0.0))

    first, again, permuted = loss(before), loss(before), loss(after)
    if same(first, again) and not same(first, permuted, _SAME_FUNCTION):
        raise UsageError(
            f"align must not change what the net computes, got a loss of {permuted:.6g} after it "
            f"and {first:.6g} before. Its units are tied in a way that units= (or the trace of its "
            "forward) does not show: pass units= that says all of it."
        )


def _with_statistics(model: nn.Module) -> list[_NormBase]:
    """Return the normalisation layers whose running statistics an evaluation uses.

    Without those that a training model holds in eval mode: there they are part of the function.
    """
    held = {id(m) for m in model.modules() if model.training and not m.training}
    return [
        m
        for m in model.modules()
        if isinstance(m, _NormBase) and m.running_mean is not None and id(m) not in held
    ]


def _recalibrate(norms: Sequence[_NormBase], evaluator: Evaluator, data: Batches) -> None:
    """Set running statistics to the mean over the batches of what they are at these weights.

    At weights between those of two nets the statistics of either are wrong, so wrong that most of
    a barrier can be made of it (Izmailov et al. 2018; Jordan et al. 2023). One forward pass, in
    which these layers alone are in train mode. The caller puts everything back.
    """
    before = [(m, m.momentum, m.training) for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain mean, instead of one that forgets
        m.training = True
    for batch in data:
        evaluator.evaluate(batch)
    for m, momentum, training in before:
        m.momentum, m.training = momentum, training
