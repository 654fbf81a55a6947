"""A bent path between two states: a quadratic Bezier curve with a trained control point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.curvature.checks import check_count
from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageError
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
        >>> curve = bezier(model, a, b, ring, [torch.ones(1, 2)], Bending(steps=300, lr=0.01))
        >>> bool(curve.control["weight"].sum() > 1.5)  # the straight path has 1
        True
    """
    bending, how = bending or Bending(), check_how(how)
    check_count("steps", bending.steps, 1)
    a, b = own_copies(model, state_a=state_a, state_b=state_b)
    names = Layout.of(model).names
    report = reporter(progress, "bezier")
    facts = provenance(model, loss_fn)
    facts |= {"state_a": state_digest(a), "state_b": state_digest(b), "mode": how.mode}
    facts |= {"steps": bending.steps, "lr": bending.lr, "seed": bending.seed}
    with evaluating(model, loss_fn, batches, how) as evaluator:
        training = _Training(evaluator, a, b, names, bending)
        losses = []
        for step, batch in enumerate(_cycle(Batches(batches), bending.steps)):
            losses.append(training.step(batch, _decay(step, bending.steps)))
            report(step + 1, bending.steps)
    return Curve(training.control, np.array(losses), facts)


class _Training:
    """The control point, its optimizer, and where on the curve it is trained next."""

    def __init__(
        self, evaluator: Evaluator, a: State, b: State, names: Sequence[str], bending: Bending
    ) -> None:
        evaluator.restore()
        self._evaluator, self._a, self._b, self._lr = evaluator, a, b, bending.lr
        self._tensors = evaluator.tensors
        self.control = {
            name: mix((a[name], b[name]), (0.5, 0.5), like.detach()).clone()
            for name, like in self._tensors.items()
        }
        self._bent = [self.control[name] for name in names]
        leaves = dict(zip(evaluator.layout.names, evaluator.layout.params, strict=True))
        self._leaves = [leaves[name] for name in names]
        make = bending.optimizer or (lambda params: torch.optim.Adam(params, lr=bending.lr))
        self._optimizer = make(self._bent)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._rng = np.random.default_rng(bending.seed)

    def step(self, batch: Any, factor: float) -> float:
        """Take one step of the control point, at a random t; return the loss there."""
        t = self._rng.uniform()
        place_on(self._tensors, (self._a, self.control, self._b), t)
        loss = self._evaluator.differentiable(batch)
        found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        for theta, g in zip(self._bent, found, strict=True):
            theta.grad = None if g is None else g.mul(2 * t * (1 - t)).to(theta)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UsageError(
                f"bending must be trained at a rate that keeps the loss finite, got {value} with "
                f"lr={self._lr:g}. Lower it, or pass an optimizer that clips."
            )
        return value


def _cycle(given: Batches, steps: int) -> Iterator[Any]:
    rounds = (batch for _ in itertools.count() for batch in given)
    given.first()  # refuses what is empty, which would be gone round forever
    return itertools.islice(rounds, steps)


def _decay(step: int, steps: int) -> float:
    left = 1 - step / steps
    return 1.0 if left > 0.5 else max(2 * left, 0.01)
