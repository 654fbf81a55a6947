"""Does SGD sample a Gibbs distribution, and does it prefer flat minima? On a loss of two basins.

Writes docs/benchmarks/sgd_sampler.md.

    python benchmarks/sgd_sampler.py            # about five minutes on one core
    python benchmarks/sgd_sampler.py --quick    # one, prints only
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.version import written_by
from torch import Tensor, nn

import geomwatch

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "sgd_sampler.md"
FLAT, SHARP = 2.0, 20.0  # curvature of each y in the basins at x = -1 and x = +1
GROWTH = math.log(SHARP / FLAT) / 2
BATCH, ITEMS = 16, 2_048
T, LR = 0.3, 4e-3
TILT = 0.3

Noise = Callable[[Tensor, torch.Generator], Tensor]  # (chains, 1 + n) weights -> gradient noise


@dataclass(frozen=True)
class TwoBasins:
    """L(x, y) = height (x^2 - 1)^2 - tilt s(x) + k(x) |y|^2 / 2, y in n dimensions.

    k grows exponentially with x, from FLAT at x = -1 to SHARP at x = +1. s rises from 0 at x = -1
    to 1 at x = +1: the two basins are equally deep, or the sharp one is deeper by `tilt`.
    """

    n: int
    height: float = 1.0
    tilt: float = 0.0

    def curvature(self, x: Tensor) -> Tensor:
        return math.sqrt(FLAT * SHARP) * torch.exp(GROWTH * x)

    def along(self, x: Tensor) -> Tensor:
        """The loss at y = 0."""
        z = x.clamp(-1, 1)
        return self.height * (x * x - 1) ** 2 - self.tilt * (2 + 3 * z - z**3) / 4

    def __call__(self, w: Tensor) -> Tensor:
        """(chains, 1 + n) -> (chains,)."""
        x, y = w[:, 0], w[:, 1:]
        return self.along(x) + 0.5 * self.curvature(x) * (y * y).sum(1)

    def gradient(self, w: Tensor) -> Tensor:
        """The same, by hand: (chains, 1 + n)."""
        x, y = w[:, :1], w[:, 1:]
        k, z = self.curvature(x), x.clamp(-1, 1)
        along = 4 * self.height * x * (x * x - 1) - 0.75 * self.tilt * (1 - z * z)
        return torch.cat([along + 0.5 * GROWTH * k * (y * y).sum(1, keepdim=True), k * y], dim=1)


def isotropic(scale: float) -> Noise:
    return lambda w, rng: scale * torch.randn(w.shape, generator=rng, dtype=w.dtype)


def like_the_curvature(loss: TwoBasins, scale: float) -> Noise:
    """Isotropic along x; of covariance proportional to k(x) along y, as the noise of a fit is."""

    def noise(w: Tensor, rng: torch.Generator) -> Tensor:
        drawn = scale * torch.randn(w.shape, generator=rng, dtype=w.dtype)
        share = loss.curvature(w[:, :1]) / math.sqrt(FLAT * SHARP)
        return torch.cat([drawn[:, :1], share.sqrt() * drawn[:, 1:]], dim=1)

    return noise


def descend(
    loss: TwoBasins,
    noise: Noise | None,
    *,
    lr: float,
    steps: int,
    start: float,
    chains: int = 2_000,
    seed: int = 0,
) -> Tensor:
    """Run SGD from one basin, or from both by halves (start 0); return the weights at the end."""
    rng = torch.Generator().manual_seed(seed)
    w = 0.05 * torch.randn(chains, 1 + loss.n, generator=rng, dtype=torch.float64)
    w[:, 0] += start or torch.ones(chains).index_fill_(0, torch.arange(0, chains, 2), -1)
    for _ in range(steps):
        g = loss.gradient(w)
        if noise is not None:
            g += noise(w, rng)
        w -= lr * g
    return w


def share_of_flat(w: Tensor) -> tuple[float, float]:
    """The share of chains in the flat basin, and its standard error."""
    p = float((w[:, 0] < 0).double().mean())
    return p, math.sqrt(max(p * (1 - p), 1e-6) / len(w))


def predicted(potential: Callable[[Tensor], Tensor], t: float) -> float:
    """The share of x < 0 under p(x) ~ exp(-potential(x) / t), numerically."""
    x = torch.linspace(-2.5, 2.5, 20_001, dtype=torch.float64)
    weight = torch.exp(-(potential(x) - potential(x).min()) / t)
    return float(weight[x < 0].sum() / weight.sum())


def gibbs(loss: TwoBasins, t: float) -> float:
    """exp(-L / t) with y integrated out: each of its n dimensions gives k(x)^(-1/2)."""
    return predicted(lambda x: loss.along(x) + 0.5 * loss.n * t * torch.log(loss.curvature(x)), t)


class Items(nn.Module):
    """The same loss as the mean over items of gradient noise xi_i, for geomwatch to measure."""

    def __init__(self, loss: TwoBasins, x: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1 + loss.n, dtype=torch.float64))
        self.w.data[0] = x
        self.loss = loss

    def forward(self, xi: Tensor) -> Tensor:
        return self.loss(self.w[None]).sum() + (xi @ self.w).mean()


def measured_temperature(loss: TwoBasins, scale: float, lr: float) -> tuple[float, float]:
    """Measure `temperature` with geomwatch, for batches whose mean has noise of that scale."""
    rng = torch.Generator().manual_seed(1)
    xi = scale * math.sqrt(BATCH) * torch.randn(ITEMS, 1 + loss.n, generator=rng).double()
    model = Items(loss, -1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    for _ in range(200):
        batch = xi[torch.randint(0, ITEMS, (BATCH,), generator=rng)]
        record = geomwatch.measure(
            model,
            lambda m, x: m(x),
            batch,
            how=geomwatch.Measurement(quantities=["temperature"]),
            optimizer=optimizer,
        )
        found.append(record["temperature"].value)
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))


def scale_for(t: float, lr: float) -> float:
    """The noise of a batch gradient at which lr sigma^2 / 2 = t."""
    return math.sqrt(2 * t / lr)


@dataclass(frozen=True)
class Row:
    """What one run of chains has found, beside what a formula says."""

    at: float  # n, T or the rate in units of 2 / lambda_max
    found: float  # share in the flat basin
    stderr: float
    gibbs: float
    other: float = math.nan  # what another formula says
    flat: float = math.nan  # of y in the flat basin: its energy or spread over what is predicted
    sharp: float = math.nan
    temperature: str = ""

    def agrees(self, prediction: float) -> bool:
        return abs(self.found - prediction) < 4 * self.stderr + 0.02  # lr is not zero


def mean_in_basins(w: Tensor, values: Tensor) -> tuple[float, float]:
    here = w[:, 0] < 0
    return float(values[here].mean()), float(values[~here].mean())


def isotropic_rows(steps: int) -> list[Row]:
    """Isotropic noise, two equally deep basins: the volume of the flat one, by dimensions."""
    rows = []
    for n in (1, 2, 4):
        loss = TwoBasins(n)
        measured, error = measured_temperature(loss, scale_for(T, LR), LR)
        w = descend(loss, isotropic(scale_for(T, LR)), lr=LR, steps=steps, start=0)
        energies = loss.curvature(w[:, 0]) * (w[:, 1:] ** 2).mean(1) / T
        laplace = 1 / (1 + (FLAT / SHARP) ** (n / 2))
        text = f"{measured:.3f} ± {error:.3f}"
        rows.append(
            Row(n, *share_of_flat(w), gibbs(loss, T), laplace, *mean_in_basins(w, energies), text)
        )
    return rows


def curved_rows(steps: int) -> list[Row]:
    """Noise that follows the curvature: not Gibbs, but a drift towards flat weights."""
    rows = []
    for n in (1, 2, 4):
        loss = TwoBasins(n)
        scale = scale_for(T, LR)
        w = descend(loss, like_the_curvature(loss, scale), lr=LR, steps=steps, start=0)
        # <y^2> = lr c / 2 wherever it is, c k(x) the noise: a force -n k'(x) <y^2> / 2 along x
        spread = LR * scale**2 / math.sqrt(FLAT * SHARP) / 2

        def drift(x: Tensor, loss: TwoBasins = loss, spread: float = spread) -> Tensor:
            return loss.along(x) + 0.5 * loss.n * spread * loss.curvature(x)

        spreads = mean_in_basins(w, (w[:, 1:] ** 2).mean(1) / spread)
        rows.append(Row(n, *share_of_flat(w), gibbs(loss, T), predicted(drift, T), *spreads))
    return rows


def deeper_rows(steps: int) -> list[Row]:
    """A sharp basin that is deeper: which one wins depends on the temperature."""
    loss = TwoBasins(2, height=0.5, tilt=TILT)
    lr = 2 * LR
    rows = []
    for t in (0.1, 0.15, 0.2, 0.4):
        noise = isotropic(scale_for(t, lr))
        w = descend(loss, noise, lr=lr, steps=2 * steps, start=0, chains=1_000)
        rows.append(Row(t, *share_of_flat(w), gibbs(loss, t)))
    return rows


def remembering_rows(steps: int) -> list[Row]:
    """From the flat basin (`flat`) and from the sharp one (`found`)."""
    loss = TwoBasins(2)
    rows = []
    for t in (0.05, 0.1, 0.15, 0.3):
        noise = isotropic(scale_for(t, LR))
        runs = [descend(loss, noise, lr=LR, steps=steps, start=s, chains=1_000) for s in (1, -1)]
        found, stderr = share_of_flat(runs[0])
        rows.append(Row(t, found, stderr, gibbs(loss, t), flat=share_of_flat(runs[1])[0]))
    return rows


def instability_rows() -> list[tuple[float, int, int, int, int]]:
    """Gradient descent without noise, begun in the sharp basin: the rate, and where it ends.

    At rest in the sharp basin, at rest in the flat one, still moving, not finite.
    """
    loss = TwoBasins(2)
    rows = []
    for share in (0.5, 0.9, 0.99, 1.01, 1.1, 1.5):
        w = descend(loss, None, lr=share * 2 / SHARP, steps=20_000, start=1, chains=500)
        finite = torch.isfinite(w).all(1)
        rest = finite & (loss.gradient(w).norm(dim=1) < 1e-3)
        counts = (rest & (w[:, 0] > 0.5), rest & (w[:, 0] < 0), finite & ~rest, ~finite)
        sharp, flat, moving, lost = (int(c.sum()) for c in counts)
        rows.append((share, sharp, flat, moving, lost))
    return rows


def lines(rows: Sequence[Row], form: Callable[[Row], str]) -> str:
    return "\n".join(f"| {form(row)} |" for row in rows)


def shares(row: Row) -> str:
    return f"{row.at:g} | {row.found:.3f} ± {row.stderr:.3f} | {row.gibbs:.3f}"


def word(holds: bool) -> str:
    return "holds" if holds else "fails"


def verdicts(
    round_noise: Sequence[Row], curved: Sequence[Row], deeper: Sequence[Row], kept: Sequence[Row]
) -> str:
    """The claims of the paper's section 3 and 5, each with what these runs say of it."""
    energy = statistics.fmean([x for row in round_noise for x in (row.flat, row.sharp)])
    # k <y^2> / T of spreads in units of T / sqrt(FLAT SHARP)
    held = [
        math.sqrt(k) * statistics.fmean(spreads)
        for k, spreads in (
            (FLAT / SHARP, [row.flat for row in curved]),
            (SHARP / FLAT, [row.sharp for row in curved]),
        )
    ]
    drifts = all(row.agrees(row.other) for row in curved)
    lowest = min(deeper, key=lambda row: row.found)
    stuck = max(kept, key=lambda row: abs(row.found - row.flat))
    claims = [
        (
            "p ~ exp(-d'Hd / T) around a minimum",
            abs(energy - 0.5) < 0.1,
            f"k<y²>/T is {energy:.2f}, not 0.5: it is exp(-d'Hd / 2T), for isotropic noise",
        ),
        (
            "volume makes the flat one of two equally deep minima dominate",
            all(row.agrees(row.gibbs) and row.found > 0.5 for row in round_noise),
            f"isotropic noise: {_against(round_noise)} for n = 1, 2, 4",
        ),
        (
            "SGD's noise gives a Gibbs distribution",
            all(abs(energy - 1) < 0.2 for energy in held),
            f"noise like the curvature: k<y²>/T is {held[0]:.2f} in the flat basin and "
            f"{held[1]:.2f} in the sharp one; a drift along tr H {'gives' if drifts else 'misses'} "
            "the shares",
        ),
        (
            "SGD finds flat minima",
            all(row.found > 0.5 for row in deeper),
            f"the share of the flat one is {lowest.found:.2f} at T = {lowest.at:g} where the sharp "
            "one is deeper",
        ),
        (
            "... whatever the start",
            all(abs(row.found - row.flat) < 0.05 for row in kept),
            f"at T = {stuck.at:g}: {stuck.flat:.2f} if begun in the flat one, {stuck.found:.2f} if "
            "begun in the sharp one",
        ),
    ]
    return "\n".join(f"| {claim} | {word(holds)} | {why} |" for claim, holds, why in claims)


def _against(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row.found:.3f} against {row.gibbs:.3f}" for row in rows)


def report(steps: int) -> str:
    round_noise, curved = isotropic_rows(steps), curved_rows(steps)
    deeper, kept, unstable = deeper_rows(steps), remembering_rows(steps), instability_rows()
    gone = "\n".join(f"| {' | '.join(map(str, row))} |" for row in unstable)
    return PAGE.format(
        written=written_by("sgd_sampler.py"),
        flat=FLAT,
        sharp=SHARP,
        steps=steps,
        T=T,
        LR=LR,
        tilt=TILT,
        cross=TILT / math.log(SHARP / FLAT),
        isotropic=lines(
            round_noise,
            lambda r: (
                f"{shares(r)} | {r.other:.3f} | {r.temperature} | {r.flat:.2f}, {r.sharp:.2f}"
            ),
        ),
        curved=lines(
            curved, lambda r: f"{shares(r)} | {r.other:.3f} | {r.flat:.2f}, {r.sharp:.2f}"
        ),
        deeper=lines(deeper, shares),
        kept=lines(
            kept,
            lambda r: f"{r.at} | {1 / r.at:.0f} | {r.flat:.3f} | {r.found:.3f} | {r.gibbs:.3f}",
        ),
        gone=gone,
        verdicts=verdicts(round_noise, curved, deeper, kept),
    )


PAGE = """# SGD as a sampler, on a loss with two basins

{written} The loss is L(x, y) = (x² - 1)² + k(x) |y|² / 2 with y in n
dimensions and k growing exponentially with x: two equally deep basins, a flat one at x = -1
(k = {flat:g}) and a sharp one at x = +1 (k = {sharp:g}), a ridge of height 1 between them. SGD runs
{steps:,} steps, 2,000 chains, from both basins by halves; ± is one standard error. On a noisy
quadratic, where the answer is exact, `tests/landscape/test_sampler.py` checks `temperature`.

| claim of the paper | here it | because |
|---|---|---|
{verdicts}

## Isotropic noise: a Gibbs distribution, with a 1/2 that the paper lacks

At lr = {LR} and T = lr σ² / 2 = {T}; `temperature` is what geomwatch measures from batches:

| n | share in the flat basin | exp(-L/T) | volumes alone | `temperature` | k<y²>/T, both basins |
|---|---|---|---|---|---|
{isotropic}

The exponent of exp(-L/T) around a minimum is -d'Hd / 2T, so that each direction holds k<y²> = T.
With the paper's exp(-d'Hd / T) it would hold half of that.

## Noise like the curvature: towards the flat as well, but by another law

The noise of a net near a good fit is not isotropic: its covariance is nearly proportional to the
Hessian. Here it is c k(x) along y.

| n | share in the flat basin | exp(-L/T) | drift along tr H | <y²> / (lr c / 2), both basins |
|---|---|---|---|---|
{curved}

y spreads alike in both basins, whatever k is: no volume is weighed. But that spread makes sharp
places costly: the mean force along x is that of L + lr c tr H / 4.

## A deeper sharp basin: the temperature decides

Deeper by {tilt}, with a ridge of 0.5 and n = 2; by volumes alone the flat one wins above
T = {tilt} / ln(k sharp / k flat) = {cross:.2f}.

| T | share in the flat basin | exp(-L/T) says |
|---|---|---|
{deeper}

## Time: a run remembers where it began

| T | ridge / T | share in the flat basin, begun there | begun in the sharp one | exp(-L/T) says |
|---|---|---|---|---|
{kept}

The time to cross grows as exp(ridge / T), and with it the time from which on a stationary
distribution says anything.

## Without noise: stability alone empties the sharp basin

500 runs of plain gradient descent begun at its bottom, 20,000 steps:

| lr, in units of 2 / λ_max at its bottom | at rest in it | in the flat one | moving | lost |
|---|---|---|---|---|
{gone}

Above 2 / λ_max no run comes to rest at the sharp minimum: it oscillates beside it where k is just
stable (the edge of stability), or leaves for the flat one. This needs no temperature, and it is
what `stability_margin` watches.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and no page written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    text = report(5_000 if quick else 60_000)
    print(text)
    if not quick:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
