"""How far lambda_max is off, by the vector that Lanczos starts from; writes docs/benchmarks/.

Cold: 20 HVPs from noise, against 32 HVPs on an eighth of the batch (4 whole ones) and then 16.
Warm: probes of 4 and 8 HVPs every 10 training steps, from the sum of the last three Ritz vectors
with equal or with falling weights. Reference: scipy's eigsh on float64 HVPs, tol 1e-10.

    python benchmarks/lanczos_starts.py            # about 7 minutes on one core
    python benchmarks/lanczos_starts.py --quick    # half a minute, writes nothing
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.estimators.lanczos import lanczos, warm_start
from geomwatch.quantities.probe import Budget, Probe

OUT = Path(__file__).parents[1] / "docs/benchmarks/lanczos_starts.md"
loss_fn = geomwatch.supervised(F.cross_entropy)
Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs[:512] / 16, dtype=torch.float32), torch.tensor(targets[:512])


def mlp(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, batch: Batch, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(5)
    for _ in range(steps):
        pick = torch.randint(0, len(batch[0]), (64,), generator=rng)
        optimizer.zero_grad()
        loss_fn(model, (batch[0][pick], batch[1][pick])).backward()
        optimizer.step()


def exact(model: nn.Module, batch: Batch, k: int = 1) -> np.ndarray:
    """The k largest eigenvalues, descending."""
    double = copy.deepcopy(model).double()
    with Objective(double, loss_fn, [(batch[0].double(), batch[1])]) as objective:
        dim = objective.layout.dim

        def matvec(v: np.ndarray) -> np.ndarray:
            return objective.hvp(torch.from_numpy(v.ravel().copy())).numpy()

        operator = LinearOperator((dim, dim), matvec=matvec, dtype=np.float64)
        return np.sort(eigsh(operator, k=k, which="LA", tol=1e-10)[0])[::-1]


def cold(seeds: int) -> dict[str, list[float]]:
    """Relative errors at initialisation, where the top eigenvalues lie close together."""
    errors: dict[str, list[float]] = defaultdict(list)
    batch = digits()
    nets = [(64, 96, 64, 10), (64, 128, 128, 10), (64, 64, 64, 64, 10)]
    for widths, net_seed in itertools.product(nets, range(2 * seeds)):
        torch.manual_seed(net_seed)
        model = mlp(widths, nn.ReLU)
        truth = exact(model, batch)[0]
        for seed in range(seeds):
            rng = torch.Generator().manual_seed(seed)
            with Objective(model, loss_fn, [batch]) as objective:
                noise = lanczos(objective.hvp, objective.layout.normal(rng), max_hvps=20)
                coarse = Probe(objective, budget=Budget(lanczos=20, tol=0), rng=rng).spectrum
            errors["noise, 20 HVPs"].append(abs(noise.values[0] / truth - 1))
            errors["eighth of the batch, 4 + 16 HVPs"].append(abs(coarse.values[0] / truth - 1))
    return errors


def warm(seeds: int) -> dict[str, list[float]]:
    """Relative errors of warm probes every 10 steps of real training, on a fixed batch."""
    errors: dict[str, list[float]] = defaultdict(list)
    batch = digits()
    for seed, activation in itertools.product(range(seeds), (nn.ReLU, nn.Tanh)):
        torch.manual_seed(seed)
        model = mlp((64, 96, 64, 10), activation)
        rng = torch.Generator().manual_seed(seed)
        memory: dict[tuple[str, int], Tensor] = {}
        for probe in range(21):
            truth = exact(model, batch)[0]
            with Objective(model, loss_fn, [batch]) as objective:
                for weights, hvps in itertools.product(("equal", "falling"), (4, 8)):
                    noise = objective.layout.normal(rng)
                    old = memory.get((weights, hvps))
                    start = warm_start(old, noise)
                    if weights == "equal" and old is not None:
                        mean = old.sum(0)
                        start = mean / mean.norm() + 0.1 * noise / noise.norm()
                    found = lanczos(objective.hvp, start, max_hvps=hvps if probe else 20)
                    memory[weights, hvps] = found.vectors
                    if probe:
                        error = abs(found.values[0] / truth - 1)
                        errors[f"{weights} weights, {hvps} HVPs"].append(error)
                        if weights == "falling":
                            above = found.values[0] * (1 + 1e-6) + found.residuals[0] >= truth
                            errors[f"bound {hvps}"].append(float(above))
            train(model, batch, 10)
    return errors


def top_three(seeds: int) -> dict[str, list[float]]:
    """Relative errors of the three largest eigenvalues with 30 HVPs."""
    errors: dict[str, list[float]] = defaultdict(list)
    batch = digits()
    names = ("lambda_max", "lambda_2", "lambda_3")
    for steps, net_seed in itertools.product((0, 20, 100), range(seeds)):
        torch.manual_seed(net_seed)
        model = mlp((64, 128, 128, 10), nn.ReLU)
        train(model, batch, steps)
        truth = exact(model, batch, k=3)
        for seed in range(3):
            record = geomwatch.measure(
                model, loss_fn, batch, quantities=names, max_hvps=30, seed=seed
            )
            for name, value in zip(names, truth, strict=True):
                errors[f"{name}, step {steps}"].append(abs(record[name].value / value - 1))
    return errors


def table(errors: dict[str, list[float]]) -> str:
    rows = [
        "| start | median error | 97 % below | worst | off by more than 1 % | probes |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in errors.items():
        if not name.startswith("bound"):
            high = float(np.quantile(found, 0.97))
            rows.append(
                f"| {name} | {statistics.median(found):.1e} | {high:.1e} | {max(found):.1e} "
                f"| {sum(e > 0.01 for e in found)} | {len(found)} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    cold_errors, warm_errors = cold(2 if quick else 5), warm(1 if quick else 8)
    bounds = {k.split()[1]: statistics.fmean(v) for k, v in warm_errors.items() if "bound" in k}
    text = f"""# Where Lanczos starts

Written by `benchmarks/lanczos_starts.py`. Relative error of lambda_max against eigsh in float64;
ReLU and tanh MLPs of 10,000 to 27,000 parameters, 512 real digits.

## Cold, at initialisation

{table(cold_errors)}

## The three largest, cold, with 30 HVPs

{table(top_three(1 if quick else 8))}

## Warm, every 10 steps of training

{table(warm_errors)}

Ritz value + residual >= exact: {bounds["4"]:.1%} of the probes of 4 HVPs, {bounds["8"]:.1%} of 8.
"""
    print(text)
    if not quick:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
