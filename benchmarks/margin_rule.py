"""How the stability-margin rule does on runs that train, ramps, and rates far too large.

Trains small nets on real digits with the monitor's defaults and counts, for each rule: healthy
runs with a warning, failing runs announced before the loss blew up, and by how many steps. The
levels in geomwatch/rules/margin.py were chosen on these very runs, so this is a fit, not a test.
Results are kept run by run in benchmarks/results/, so that it can be stopped and started again.

    python benchmarks/margin_rule.py            # about 6 minutes on one core; writes docs/
    python benchmarks/margin_rule.py --quick    # a minute, writes nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import geomwatch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/margin_rule.jsonl"
OUT = ROOT / "docs/benchmarks/margin_rule.md"
loss_fn = geomwatch.supervised(F.cross_entropy)

# The largest of the rates tried on each that still learns the digits well.
TUNED = {
    ("mlp", "SGD momentum"): 0.05,
    ("conv", "SGD momentum"): 0.05,
    ("conv BatchNorm", "SGD momentum"): 0.05,
    ("transformer", "SGD momentum"): 0.1,
    ("mlp", "Adam"): 3e-3,
    ("conv BatchNorm", "Adam"): 3e-3,
    ("transformer", "AdamW"): 3e-3,
    ("conv", "AdamW"): 3e-3,
}
Job = tuple[str, str, str, float, int, int]  # net, optimizer, schedule, lr, batch, seed


class Transformer(nn.Module):
    """Eight rows of a digit are eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.position = nn.Parameter(torch.zeros(8, 24))
        self.encoder = nn.TransformerEncoderLayer(
            24, 2, 48, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(-1, 8, 8)) + self.position
        return self.head(self.encoder(tokens).mean(1))


def conv(batch_norm: bool) -> nn.Module:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=not batch_norm),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=not batch_norm),
        norm(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


NETS = {
    "mlp": mlp,
    "conv": lambda: conv(False),
    "conv BatchNorm": lambda: conv(True),
    "transformer": Transformer,
}
OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}


def jobs(quick: bool) -> Iterator[Job]:
    seeds = (0,) if quick else (0, 1)
    for ((net, optimizer), lr), batch in itertools.product(TUNED.items(), (64, 16)):
        for seed in seeds:
            for factor in (0.3, 1.0):
                yield net, optimizer, "constant", lr * factor, batch, seed
            for growth in (1.015, 1.03):
                yield net, optimizer, f"ramp {growth}", lr * 0.3, batch, seed
        for factor in (30, 100):
            yield net, optimizer, "constant", lr * factor, batch, 0


def run(job: Job) -> dict[str, object]:
    """Train with the defaults a user gets."""
    net, optimizer_name, schedule, base, size, seed = job
    torch.manual_seed(seed)
    inputs, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)
    model = NETS[net]()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    monitor = geomwatch.Monitor(model, loss_fn, optimizer)
    growth = 1.0 if schedule == "constant" else float(schedule.split()[1])
    steps = 250 if growth == 1 else min(500, int(math.log(300) / math.log(growth)))
    losses: list[float] = []
    for step in range(steps):
        pick = torch.randint(0, len(x), (size,))
        optimizer.param_groups[0]["lr"] = base * growth**step
        optimizer.zero_grad()
        loss = loss_fn(model, (x[pick], y[pick]))
        loss.backward()
        monitor.step((x[pick], y[pick]), loss=loss.detach())
        optimizer.step()
        losses.append(loss.item())
    monitor.close()
    loud = [a for a in monitor.alerts if a.severity != "info"]
    return {
        "job": job,
        "event": blow_up(losses),
        "final": statistics.fmean(losses[-20:]),
        "alerts": {
            rule: next((a.step for a in loud if a.rule == rule), None)
            for rule in ("stability_margin", "loss_rise")
        },
    }


def blow_up(losses: list[float]) -> int | None:
    """The first step whose loss exceeds thrice its running minimum, and 2."""
    smooth, lowest = losses[0], math.inf
    for step, loss in enumerate(losses):
        if not math.isfinite(loss) or (step >= 10 and loss > max(3 * lowest, 2.0)):
            return step
        smooth = 0.8 * smooth + 0.2 * loss
        lowest = min(lowest, smooth)
    return None


def results(quick: bool) -> list[dict]:
    """Run what is missing."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if RESULTS.exists() and not quick:
        for line in RESULTS.read_text().splitlines():
            done[tuple(json.loads(line)["job"])] = json.loads(line)
    wanted = list(jobs(quick))
    for number, job in enumerate(wanted, 1):
        if job not in done:
            done[job] = run(job)
            if not quick:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(done[job]) + "\n")
        print(f"\r{number}/{len(wanted)}", end="", flush=True)
    print()
    return [done[job] for job in wanted]


def report(runs: list[dict]) -> str:
    constant = [r for r in runs if r["job"][2] == "constant"]
    healthy = [r for r in constant if r["event"] is None and r["final"] < 0.6]
    started_bad = [r for r in constant if r["job"][3] >= 10 * TUNED[tuple(r["job"][:2])]]
    started_bad = [r for r in started_bad if r["event"] is not None or r["final"] > 1.2]
    ramps = [r for r in runs if r["job"][2] != "constant" and r["event"] is not None]
    rows = [
        "| rule | healthy runs with a warning | ramps announced before the blow-up | median lead | "
        "30 x and 100 x rates announced | by step 10 |",
        "|---|---|---|---|---|---|",
    ]
    for rule in ("stability_margin", "loss_rise", "either"):

        def first(r: dict, rule: str = rule) -> int | None:
            found = [s for k, s in r["alerts"].items() if rule in (k, "either") and s is not None]
            return min(found, default=None)

        false = sum(first(r) is not None for r in healthy)
        leads = [r["event"] - s for r in ramps if (s := first(r)) is not None and s < r["event"]]
        early = [s for r in started_bad if (s := first(r)) is not None]
        rows.append(
            f"| {rule} | {false} of {len(healthy)} | {len(leads)} of {len(ramps)} "
            f"| {statistics.median(leads) if leads else 0:.0f} steps "
            f"| {len(early)} of {len(started_bad)} | {sum(s <= 10 for s in early)} |"
        )
    table = "\n".join(rows)
    return f"""# The margin rule on small nets

Written by `benchmarks/margin_rule.py`; levels chosen on these runs, so a fit and not a test. MLP,
convolutional nets with and without BatchNorm, a small transformer; SGD with momentum, Adam, AdamW;
batches of 16 and 64 real digits. Ramps grow the learning rate by 1.5 or 3 % a step. Healthy runs
are constant rates, tuned or 0.3 x that, without a blow-up.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    logging.getLogger("geomwatch").setLevel(logging.CRITICAL + 1)
    torch.set_num_threads(1)
    text = report(results(quick))
    print(text)
    if not quick:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
