"""What does a monitor cost, and how exact is it at that price?

Each net is trained twice in turns in one process, bare and with a monitor at its default settings,
on the same batches. A cost is the thread CPU time of `monitor.step` over the median of a bare step:
the machine may be shared. Accuracy is that of the stability margin of a monitor that probes every
ten steps, against 60 products by double backward on the same batch. Writes docs/benchmarks/cost.md.

    python benchmarks/cost.py                  # half an hour
    python benchmarks/cost.py --keep FOLDER    # what is done by net is kept there, and not repeated
    python benchmarks/cost.py --quick          # two minutes, prints only
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness.version import written_by
from torch import Tensor, nn
from torch.nn import functional as F

import geomwatch
import geomwatch.rules

OUT = Path(__file__).parents[1] / "docs/benchmarks/cost.md"
VOCABULARY = 64
LONG = 10_000  # steps


@dataclass(frozen=True)
class Net:
    """A net with its optimizer and a source of batches."""

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


class Block(nn.Module):
    """A transformer block with fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        split = self.qkv(self.first(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, c))
        return x + self.feed(self.second(x))


class GPT(nn.Module):
    """Two blocks, 128 wide."""

    def __init__(self, length: int = 64, width: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.tokens(x) + places)))


class LSTM(nn.Module):
    """One layer, 128 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        self.cells, self.head = nn.LSTM(32, 128, batch_first=True), nn.Linear(128, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.tokens(x))[0])


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = _conv(i, o, stride), _conv(o, o, 1)
        self.short = _conv(i, o, stride) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.short(x))


def _conv(i: int, o: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))


def resnet(w: int = 12) -> nn.Module:
    body = (Residual(w, w, 1), Residual(w, 2 * w, 2), Residual(2 * w, 4 * w, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10))
    return nn.Sequential(_conv(3, w, 1), nn.ReLU(), *body, *head)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def words(items: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    chain = torch.softmax(
        3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), 1
    )

    def draw(rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.zeros(items, 65, dtype=torch.long)
        x[:, 0] = torch.randint(VOCABULARY, (items,), generator=rng)
        for t in range(64):
            x[:, t + 1] = torch.multinomial(chain[x[:, t]], 1, generator=rng)[:, 0]
        return x[:, :-1], x[:, 1:]

    return draw


def clouds(items: int, *shape: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    centres = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0))

    def draw(rng: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (items,), generator=rng)
        return centres[labels] + 3 * torch.randn(items, *shape, generator=rng), labels

    return draw


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9)


NETS = (
    Net("MLP, SGD", mlp, sgd(0.01), clouds(64, 784)),
    Net("GPT, AdamW", GPT, lambda p: torch.optim.AdamW(p, lr=1e-3), words(8)),
    Net("LSTM, Adam", LSTM, lambda p: torch.optim.Adam(p, lr=2e-3), words(16)),
    Net("ResNet, SGD", resnet, sgd(0.05), clouds(32, 3, 32, 32)),
)


@dataclass(frozen=True)
class Costs:
    """Of one run, in steps; `overhead` and `share` as shares of training."""

    step: float  # seconds
    backend: str
    overhead: float
    first: float
    probes: list[float]
    sentinels: list[float]
    idle: float  # seconds


class Looks:
    """A rule that counts the steps which were looked at."""

    name, reads = "looks", "look"

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: Any) -> None:
        self.count += 1


def run(net: Net, steps: int) -> Costs:
    """Train the twins in turns."""
    torch.manual_seed(0)
    bare = net.build()
    watched = copy.deepcopy(bare)
    optimizers = net.optimizer(bare.parameters()), net.optimizer(watched.parameters())
    looks = Looks()
    rules = [*geomwatch.rules.default_rules(), looks]
    monitor = geomwatch.Monitor(watched, loss_fn, optimizers[1], rules=rules)
    rng = torch.Generator().manual_seed(1)
    times: list[float] = []
    spent: list[tuple[str, float]] = []
    for _ in range(steps):
        batch = net.batch(rng)
        start = time.thread_time()
        _gradient(bare, batch)
        optimizers[0].step()
        optimizers[0].zero_grad()
        times.append(time.thread_time() - start)
        loss = _gradient(watched, batch)
        before, start = looks.count, time.thread_time()
        record = monitor.step(batch, loss=loss)
        kind = "probe" if record else "sentinel" if looks.count > before else "idle"
        spent.append((kind, time.thread_time() - start))
        optimizers[1].step()
        optimizers[1].zero_grad()
    step = statistics.median(times)

    def of(kind: str) -> list[float]:
        return [seconds / step for k, seconds in spent[1:] if k == kind]

    return Costs(
        step,
        str(monitor.history[0].provenance["backend"]),
        sum(seconds for _, seconds in spent) / (step * steps),
        spent[0][1] / step,
        of("probe"),
        of("sentinel"),
        statistics.median(of("idle")) * step,
    )


def errors(net: Net, steps: int) -> list[float]:
    """Return the relative errors of the margin, at a probe every ten steps."""
    torch.manual_seed(0)
    model = net.build()
    optimizer = net.optimizer(model.parameters())
    names = geomwatch.Measurement(quantities=["stability_margin"], hvp="double_backward")
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=10, budget=None)
    rng, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = net.batch(rng)
        loss = _gradient(model, batch)
        record = monitor.step(batch, loss=loss)
        if record is not None and record.step:
            exact = geomwatch.measure(
                model, loss_fn, batch, optimizer=optimizer, how=names, max_hvps=60
            )
            known = exact["stability_margin"].value
            found.append(abs(record["stability_margin"].value / known - 1))
        optimizer.step()
        optimizer.zero_grad()
    return found


def _gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = loss_fn(model, batch)
    loss.backward()
    return loss.detach()


Row = tuple[Net, Costs, list[float]]


def row(net: Net, steps: int, probed: int, folder: Path | None) -> Row:
    """Measure a net, or read what was measured before."""
    file = None if folder is None else folder / f"{net.name.split(',')[0]}-{steps}-{probed}.json"
    if file is not None and file.exists():
        known = json.loads(file.read_text())
        return net, Costs(**known["costs"]), known["errors"]
    costs, wrong = run(net, steps), errors(net, probed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"costs": asdict(costs), "errors": wrong}))
    return net, costs, wrong


def page(rows: list[Row], steps: int) -> str:
    text = [
        "# What a monitor costs",
        "",
        written_by("cost.py"),
        "",
        f"{steps} steps at the default settings, one thread; thread CPU time of `monitor.step` over"
        " the median bare step of a twin that trains in turns with it. Probes, sentinels and the"
        " first probe are in steps, with their number; the median idle step takes so many"
        " microseconds. Over 10,000 steps: as much, but for the first probe, which counts once. The"
        " error is that of the stability margin of probes every ten steps, against 60 products by"
        " double backward on the same batch.",
        "",
        "| net | step, ms | products by | overhead | over 10,000 steps | first probe | "
        "later probes | sentinels | idle step, us | error, median / 95 % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for net, c, wrong in rows:
        later = f"{statistics.median(c.probes):.1f} ({len(c.probes)})" if c.probes else "none"
        looks = f"{statistics.median(c.sentinels):.2f} ({len(c.sentinels)})"
        worst = sorted(wrong)[int(0.95 * len(wrong))]
        long = c.overhead - c.first / steps + c.first / LONG
        text.append(
            f"| {net.name} | {1e3 * c.step:.3g} | {c.backend} | {c.overhead:.1%} | "
            f"{long:.1%} | {c.first:.0f} | {later} | {looks} | {1e6 * c.idle:.0f} | "
            f"{statistics.median(wrong):.1%} / {worst:.1%} |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    steps, probed = (60, 31) if options.quick else (options.steps, 51)
    rows: list[Row] = []
    for net in NETS:
        rows.append(row(net, steps, probed, options.keep))
        text = page(rows, steps)
        if not options.quick:
            OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
