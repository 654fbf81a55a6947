"""Mode connectivity: what the loss does on the way from one solution to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath

import numpy as np
from torch import nn

from geomwatch.curvature.checks import check_count
from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageError
from geomwatch.isolation.signals import traceless
from geomwatch.landscape.bar import Progress
from geomwatch.landscape.bezier import Bending, bezier
from geomwatch.landscape.paths import Ends, Path
from geomwatch.landscape.permutations.alignment import align as align_states
from geomwatch.landscape.results import Barrier, Curve, Floats
from geomwatch.landscape.scan import Scan
from geomwatch.landscape.states import State, own_copies
from geomwatch.quantities.measurement import Measurement, check_how


@traceless
def barrier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    loss_fn: LossFn,
    batches: object,
    how: Measurement | None = None,
    *,
    points: int = 21,
    align: bool = False,
    curve: Curve | None = None,
    bend: Bending | bool = False,
    recalibrate: object = True,
    resume: str | FilePath | None = None,
    progress: Progress = False,
) -> Barrier:
    """Measure the loss on the path from state A to state B, alpha from 0 to 1.

    Straight, w(alpha) = (1 - alpha) A + alpha B in parameters and floating-point buffers; whole
    numbers and flags are those of the nearer end. `max_loss` is the paper's B = max L(w(alpha)),
    ends included, so that two bad solutions have a large one; `height` is the most by which the
    path rises above (1 - alpha) L(A) + alpha L(B) (Frankle et al. 2020; Entezari et al. 2022). Both
    are in units of the loss.

    In mode "eval" the running statistics of BatchNorm are taken anew at each point, ends included:
    those of A or B, or their mean, belong to no point in between. Costs a forward pass over
    `batches` for each point, two with BatchNorm. The model is left as it was, bit for bit.

    Args:
        state_a: a state_dict; the model's own weights play no part.
        how: precision, mode, micro_batch and also count; by default Measurement(mode="eval").
        points: how many, ends included.
        align: permute the units of B first to lie where those of A do (see `align`). That the
            permuted net computes the same is checked on `batches`, in mode "eval".
        curve: of `bezier`, to follow instead of the straight line, which is measured too.
        bend: train such a curve where the straight path is higher than `Bending.above`.
        recalibrate: True for the statistics of `batches`, other batches (those trained on, say)
            for theirs, False to interpolate the statistics of A and B.
        resume: as in `slice_1d`; a bent path has a file beside it that ends in .bezier.

    Raises:
        UsageError: a state is not of this model, both are its live weights, or an option does not
            fit.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> a, b = ({"weight": torch.tensor([pair])} for pair in ([1.0, 0.0], [0.0, 1.0]))
        >>> ring = lambda m, x: (m.weight.square().sum() - 1) ** 2
        >>> found = barrier(model, a, b, ring, [torch.ones(1, 2)], points=5)
        >>> found.losses.tolist(), found.height, found.argmax_height
        ([0.0, 0.140625, 0.25, 0.140625, 0.0], 0.25, 0.5)
    """
    check_count("points", points, 3)
    if align and curve is not None:
        raise UsageError("align must be False with a curve: train it between aligned states.")
    ends = Ends(*own_copies(model, state_a=state_a, state_b=state_b))
    how = check_how(Measurement(mode="eval") if how is None else how)
    path = Path(model, loss_fn, batches, how, recalibrate, points, progress)
    if align:
        ends = _aligned(model, ends)
    straight = path.measure(ends, resume=resume)
    if curve is None and bend:
        curve = _bent(path, ends, straight, bend if isinstance(bend, Bending) else Bending())
    if curve is None:
        return _result(straight, straight, aligned=align)
    beside = None if resume is None else f"{resume}.bezier"
    return _result(path.measure(ends, curve, beside), straight, aligned=align)


def _aligned(model: nn.Module, ends: Ends) -> Ends:
    found = align_states(model, ends.a, ends.b)
    facts = {name: getattr(found, name) for name in ("cosine_before", "cosine_after", "sweeps")}
    facts["groups"] = len(found.permutations)
    return Ends(ends.a, found.state, before=ends.b, alignment=facts)


def _bent(path: Path, ends: Ends, straight: Scan, bending: Bending) -> Curve | None:
    """Train a curve where the straight path is blocked."""
    height, _ = _highest(straight.losses - _between(straight.losses))
    if height is not None and height <= bending.above:
        return None
    batches = path.batches if bending.batches is None else bending.batches
    how = replace(path.how, mode="train")
    states = (ends.a, ends.b)
    return bezier(path.model, *states, path.loss_fn, batches, bending, how, progress=path.progress)


def _result(found: Scan, straight: Scan, *, aligned: bool) -> Barrier:
    losses = found.losses
    max_loss, argmax = _highest(losses)
    height, argmax_height = _highest(losses - _between(losses))
    return Barrier(
        alphas=np.linspace(0, 1, len(losses)),
        losses=losses,
        path=str(found.provenance["path"]),
        aligned=aligned,
        loss_a=float(losses[0]),
        loss_b=float(losses[-1]),
        max_loss=max_loss,
        argmax=argmax,
        height=height,
        argmax_height=argmax_height,
        nonfinite=found.nonfinite,
        straight=straight.losses,
        provenance=found.provenance,
    )


def _between(losses: Floats) -> Floats:
    """The straight line between the losses at the ends; NaN where one of them is not finite."""
    if not np.isfinite(losses[[0, -1]]).all():
        return np.full_like(losses, np.nan)
    return np.linspace(losses[0], losses[-1], len(losses))


def _highest(values: Floats) -> tuple[float | None, float | None]:
    """The largest finite value and its alpha."""
    finite = np.isfinite(values)
    if not finite.any():
        return None, None
    index = int(np.where(finite, values, -np.inf).argmax())
    return float(values[index]), index / (len(values) - 1)
