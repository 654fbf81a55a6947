"""A bent path between two states: a quadratic Bezier curve with a trained control point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from geomwatch.curvature.checks import check_count
from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageError
from geomwatch.isolation.signals import traceless
from geomwatch.landscape.bar import Progress, reporter
from geomwatch.landscape.data import Batches
from geomwatch.landscape.evaluator import Evaluator, evaluating
from geomwatch.landscape.provenance import provenance, state_digest
from geomwatch.landscape.results import Curve
from geomwatch.landscape.states import State, mix, own_copies, place_on
from geomwatch.quantities.measurement import Measurement, check_how
from geomwatch.vectors.layout import Layout

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Bending:
    """How the control point of a Bezier path is trained.

    `above`: in `barrier`, the height from which on the straight path counts as blocked, in units
    of loss. `batches` to train on, by default those that are evaluated. `optimizer` makes one of
    the control point's tensors; by default Adam at `lr`. The rate falls to a hundredth over the
    second half of the steps.
    """

    steps: int = 500
    lr: float = 3e-3
    batches: object = None
    above: float = 0.05
    optimizer: MakeOptimizer | None = None
    seed: int = 0


@traceless
def bezier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    loss_fn: LossFn,
    batches: object,
    bending: Bending | None = None,
    how: Measurement | None = None,
    *,
    progress: Progress = False,
) -> Curve:
    """Train the control point of a quadratic Bezier curve from A to B for a low loss along it.

    Minimises E L(phi(t)) over t uniform in [0, 1] by stochastic gradients, starting from the middle
    of the straight path (Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast
    ensembling of DNNs"). Each step is a forward and backward pass of one batch, never cut. The
    trainable parameters are bent; the rest goes straight from A to B. The model is left as it was.

    Args:
        how: precision, mode and also count.
        progress: as in `slice_1d`, of the steps.

    Raises:
        UsageError: the states do not fit, or the training of the curve diverges.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> a, b = ({"weight": torch.tensor([pair])} for pair in ([1.0, 0.0], [0.0, 1.0]))
        >>> def ring(m, x):  # low where the two weights have length 1
        ...     return (m.weight.square().sum() - 1) ** 2 + 0 * m(x).sum()
        >>> curve = bezier(model, a, b, ring, [torch.ones(1, 2)], Bending(steps=20, lr=0.1))
        >>> curve.control["weight"].sum() > 1.5  # the straight path has 1
        tensor(True)
    """
    bending, how = bending or Bending(), replace(check_how(how), micro_batch=None)
    check_count("steps", bending.steps, 1)
    a, b = own_copies(model, state_a=state_a, state_b=state_b)
    names = Layout.of(model).names
    facts = provenance(model, loss_fn)
    facts |= {"state_a": state_digest(a), "state_b": state_digest(b), "mode": how.mode}
    facts |= {"steps": bending.steps, "lr": bending.lr, "seed": bending.seed}
    with evaluating(model, loss_fn, batches, how) as evaluator:
        report = reporter(progress, "bezier")
        control, losses = _train(evaluator, a, b, names, _cycle(batches, bending), bending, report)
    return Curve(control, np.array(losses), facts)


def _train(
    evaluator: Evaluator,
    a: State,
    b: State,
    names: Sequence[str],
    batches: Iterator[Any],
    bending: Bending,
    report: Callable[[int, int], None],
) -> tuple[State, list[float]]:
    """Return the control point, its named parameters trained, and the losses on the way."""
    evaluator.restore()
    tensors, layout = evaluator.tensors, evaluator.layout
    leaves = [layout.params[layout.names.index(name)] for name in names]
    control = {
        name: mix((a[name], b[name]), (0.5, 0.5), like.detach()).clone()
        for name, like in tensors.items()
    }
    bent = [control[name] for name in names]
    make = bending.optimizer or (lambda params: torch.optim.Adam(params, lr=bending.lr))
    optimizer = make(bent)
    schedule = LambdaLR(optimizer, lambda step: _decay(step / bending.steps))
    rng, losses = np.random.default_rng(bending.seed), []
    for batch in batches:
        t = rng.uniform()
        place_on(tensors, (a, control, b), t)
        loss = evaluator.differentiable(batch)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for theta, g in zip(bent, found, strict=True):
            theta.grad = None if g is None else g.mul(2 * t * (1 - t)).to(theta)
        optimizer.step()
        schedule.step()
        losses.append(_finite(float(loss.detach()), bending.lr))
        report(len(losses), bending.steps)
    return control, losses


def _finite(loss: float, lr: float) -> float:
    if not math.isfinite(loss):
        raise UsageError(
            f"bending must be trained at a rate that keeps the loss finite, got {loss} with "
            f"lr={lr:g}. Lower it, or pass an optimizer that clips."
        )
    return loss


def _cycle(given: object, bending: Bending) -> Iterator[Any]:
    batches = Batches(given)
    batches.first()  # refuses what is empty, which would be gone round forever
    return itertools.islice((b for _ in itertools.count() for b in batches), bending.steps)


def _decay(done: float) -> float:
    return 1.0 if done < 0.5 else max(2 * (1 - done), 0.01)
