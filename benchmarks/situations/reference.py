"""References in float64 that know nothing of geomwatch, and how it is held against them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import geomwatch
from geomwatch.curvature.batches import fresh_copy
from situations.table import Found

LR = 0.1
_SEEDS = 12  # of the random pieces
_NOISE = 0.35  # relative, of a mean over them
_EXACT = 2e-3  # relative, of an eigenvalue
NOISE = ("temperature", "gradient_noise_scale", "stochastic_margin")

Loss = Callable[[Any, Any], Tensor]


def double(model: nn.Module) -> nn.Module:
    """Return a copy in float64, its complex weights in complex128."""
    wide = copy.deepcopy(model)
    for p in (*wide.parameters(), *wide.buffers()):
        if p.is_complex():
            p.data = p.data.to(torch.complex128)
        elif p.is_floating_point():
            p.data = p.data.double()
    return wide


def reals(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one real vector."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([t.reshape(-1) for t in parts])


def gradient(model: nn.Module, loss_fn: Loss, batch: Any) -> Tensor:
    """Return the gradient, in the precision that the model has."""
    params = [p for p in model.parameters() if p.requires_grad and not p.is_meta]
    return reals(torch.autograd.grad(loss_fn(model, batch), params))


def dense(model: nn.Module, loss_fn: Loss, batch: Any) -> Tensor:
    """Return the Hessian of a loss in float64, by torch alone; what is detached is held."""
    wide, data = double(model), fresh_copy(batch, torch.float64)
    named = {n: p for n, p in wide.named_parameters() if p.requires_grad and not p.is_meta}
    sizes = [p.numel() * (1 + p.is_complex()) for p in named.values()]

    class At(nn.Module):
        """The model at given weights, called as itself."""

        def __init__(self, values: dict[str, Tensor]) -> None:
            super().__init__()
            self.values = values

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Call it."""
            return functional_call(wide, self.values, args, kwargs)

    def at(flat: Tensor) -> Tensor:
        pieces = zip(flat.split(sizes), named.items(), strict=True)
        values = {
            name: torch.view_as_complex(v.view(*p.shape, 2)) if p.is_complex() else v.view(p.shape)
            for v, (name, p) in pieces
        }
        return loss_fn(At(values), data)

    flat = reals([p.detach() for p in named.values()])
    return torch.autograd.functional.hessian(at, flat)


def top(matrix: Tensor) -> float:
    """Return the largest eigenvalue."""
    return float(torch.linalg.eigvalsh(matrix)[-1])


def measured(
    model: nn.Module, loss_fn: Loss, batch: Any, names: Sequence[str], **how: Any
) -> geomwatch.Record:
    """Measure at a step of SGD, with up to 60 products."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    asked = geomwatch.Measurement(quantities=list(names), **how)
    return geomwatch.measure(model, loss_fn, batch, optimizer=optimizer, how=asked, max_hvps=60)


def curvature(
    model: nn.Module, loss_fn: Loss, batch: Any, exact: float | None = None, **how: Any
) -> Found:
    """Hold lambda_max against the dense Hessian's."""
    exact = top(dense(model, loss_fn, batch)) if exact is None else exact
    record = measured(model, loss_fn, batch, ["lambda_max"], **how)
    found = record["lambda_max"]
    right = found.status == "ok" and found.value is not None
    right = right and abs(found.value - exact) < _EXACT * abs(exact)
    return Found(f"λ_max {_shown(found)}", f"{exact:.4g}", right)


def noise(
    model: nn.Module, loss_fn: Loss, batch: Any, *groups: Sequence[Any], factor: float = 1.0
) -> Found:
    """Hold the temperature against the gradients of single items, which are batches of one.

    Each of the `groups` has the items of one length, with all that is of another. `factor` is N for
    a sum over N items. The noise of the batch gradient is tr(Sigma) / N.
    """
    wide, items, exact = double(model), len(groups[0]), 0.0
    for group in groups:
        own = torch.stack([gradient(wide, loss_fn, fresh_copy(i, torch.float64)) for i in group])
        exact += LR * float(own.var(0).sum()) * factor**2 / len(own) / (2 * own.shape[1])
    found = []
    for seed in range(_SEEDS):
        record = measured(model, loss_fn, batch, ["temperature"], seed=seed)
        found.append(record["temperature"])
    values = [e.value for e in found if e.status == "ok" and e.value is not None]
    if not values:
        return Found(f"withheld: {found[0].reason[:70]}", f"temperature {exact:.3g}", right=False)
    mean = statistics.fmean(values)
    right = abs(mean / exact - 1) < _NOISE and record.provenance["items"] == items
    said = f"temperature {mean:.3g}, {record.provenance['items']} items"
    return Found(said, f"{exact:.3g}, {items} items", right)


def withheld(model: nn.Module, loss_fn: Loss, batch: Any, why: str, **how: Any) -> Found:
    """Hold it against us if anything is said that comes from pieces of the batch."""
    record = measured(model, loss_fn, batch, [*NOISE, "lambda_max"], **how)
    told = [f"{name} {record[name].status}" for name in NOISE if record[name].status != "withheld"]
    reason = record[NOISE[0]].reason
    said = f"{', '.join(told)}" if told else f"withheld: {reason[:110]}"
    right = not told and record["lambda_max"].status == "ok"
    return Found(said, f"withheld: {why}", right)


def _shown(estimate: geomwatch.Estimate) -> str:
    if estimate.value is None:
        return f"{estimate.status}: {estimate.reason[:80]}"
    return f"{estimate.value:.4g} ({estimate.status})"
