"""What one item is: along another dimension than the first, in lists, graphs and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_sequence

from situations.reference import noise
from situations.table import Found, situation

N = 32


class Recurrent(nn.Module):
    """A GRU that reads sequences, along dimension 0 unless told otherwise, and a head."""

    def __init__(self, inputs: int = 3, outputs: int = 2, *, batch_first: bool = False) -> None:
        super().__init__()
        self.rnn = nn.GRU(inputs, 6, batch_first=batch_first)
        self.out = nn.Linear(6, outputs)

    def forward(self, x: Any) -> Tensor:
        """Classify by the last state."""
        return self.out(self.rnn(x)[1][0])


def classified(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of (inputs, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def sequences(lengths: Sequence[int]) -> list[Tensor]:
    """Sequences of some lengths, of three features."""
    return [torch.randn(length, 3) for length in lengths]


def lengths_of(count: int = N) -> list[int]:
    return torch.randint(3, 9, (count,)).tolist()


def labels(count: int = N) -> Tensor:
    return torch.randint(0, 2, (count,))


@situation("rows: an MLP on (64, 10), labels (64,)")
def rows() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(64, 10), labels(64)
    return noise(model, classified, (x, y), [(x[i : i + 1], y[i : i + 1]) for i in range(64)])


@situation("time-major: a GRU on (12, 32, 3), labels (32,)")
def time_major() -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(12, N, 3), labels()
    each = [(x[:, i : i + 1], y[i : i + 1]) for i in range(N)]
    return noise(Recurrent(), classified, (x, y), each)


@situation("time-major with as many steps as sequences: (32, 32, 3), labels (32,)")
def square() -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(N, N, 3), labels()
    each = [(x[:, i : i + 1], y[i : i + 1]) for i in range(N)]
    return noise(Recurrent(), classified, (x, y), each)


class Language(nn.Module):
    """A recurrent language model on (time, sequence)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(7, 4), nn.GRU(4, 6)
        self.out = nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next token at each place."""
        return self.out(self.rnn(self.embed(tokens))[0])


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:-1]).flatten(0, 1), batch[1:].flatten())


@situation("time-major language model: one tensor of tokens (13, 32), no labels")
def time_major_tokens() -> Found:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (13, N))
    return noise(Language(), next_token, tokens, [tokens[:, i : i + 1] for i in range(N)])


def by_sequence(model: nn.Module, batch: Any) -> Tensor:
    """The mean over a list of sequences, read one by one."""
    losses = [F.cross_entropy(model(x[:, None]), y[None]) for x, y in zip(*batch, strict=True)]
    return torch.stack(losses).mean()


@situation("a list of 32 sequences of different lengths, labels (32,)")
def listed() -> Found:
    torch.manual_seed(0)
    x, y = sequences(lengths_of()), labels()
    each = [([x[i]], y[i : i + 1]) for i in range(N)]
    return noise(Recurrent(), by_sequence, (x, y), each)


def autoregressive(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch.stack([F.mse_loss(model(x[:-1, None]), x[-1:]) for x in batch]).mean()


@situation("a list of 32 sequences, no labels")
def list_alone() -> Found:
    torch.manual_seed(0)
    x = sequences(lengths_of())
    return noise(Recurrent(3, 3), autoregressive, x, [[one] for one in x])


@situation("a list of 32 sequences that all have 5 steps, no labels")
def list_of_equals() -> Found:
    torch.manual_seed(0)
    x = sequences([5] * N)
    return noise(Recurrent(3, 3), autoregressive, x, [[one] for one in x])


def uncollated(model: nn.Module, batch: list[tuple[Tensor, int]]) -> Tensor:
    pairs = [F.cross_entropy(model(x[:, None]), torch.tensor([y])) for x, y in batch]
    return torch.stack(pairs).mean()


@situation("a list of 32 pairs (sequence, label), not collated")
def list_of_pairs() -> Found:
    torch.manual_seed(0)
    pairs = list(zip(sequences(lengths_of()), labels().tolist(), strict=True))
    return noise(Recurrent(), uncollated, pairs, [[pair] for pair in pairs])


def detection(model: nn.Module, batch: Any) -> Tensor:
    images, targets = batch
    losses = [
        F.l1_loss(model(image.flatten(1).mean(1)[None]), target["box"][None])
        for image, target in zip(images, targets, strict=True)
    ]
    return torch.stack(losses).mean()


@situation("detection: a tuple of images of different sizes, a tuple of dicts")
def images() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    seen = tuple(torch.randn(3, 4 + i % 3, 5 + i % 4) for i in range(N))
    targets = tuple({"box": torch.randn(4), "id": torch.tensor(i)} for i in range(N))
    each = [((seen[i],), (targets[i],)) for i in range(N)]
    return noise(model, detection, (seen, targets), each)


def of_task(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scale = 1.0 + batch["task"].item()
    return scale * F.cross_entropy(model(batch["x"]), batch["y"])


def task() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y, which = torch.randn(64, 10), labels(64), torch.tensor([1])
    batch = {"task": which, "x": x, "y": y}
    each = [{"task": which, "x": x[i : i + 1], "y": y[i : i + 1]} for i in range(64)]
    return noise(model, of_task, batch, each)


situation("a task id first in a dict")(task)


def of_prior(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]) + batch["prior"].log(), batch["y"])


@situation("class priors first in a dict, as many classes as items")
def priors() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 16))
    prior, x, y = torch.rand(16) + 0.1, torch.randn(16, 6), torch.randint(0, 16, (16,))
    each = [{"prior": prior, "x": x[i : i + 1], "y": y[i : i + 1]} for i in range(16)]
    return noise(model, of_prior, {"prior": prior, "x": x, "y": y}, each)


class Attends(nn.Module):
    """One layer of attention under a mask, and the mean of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend and classify."""
        q = self.q(x)
        weights = (q @ q.transpose(1, 2)).masked_fill(~mask, -1e9).softmax(-1)
        return self.out((weights @ self.v(x)).mean(1))


def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["mask"]), batch["y"])


@situation("an attention mask (8, 8) first in a dict, inputs (32, 8, 3)")
def mask_first() -> Found:
    torch.manual_seed(0)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    x, y = torch.randn(N, 8, 3), labels()
    each = [{"mask": mask, "x": x[i : i + 1], "y": y[i : i + 1]} for i in range(N)]
    return noise(Attends(), masked, {"mask": mask, "x": x, "y": y}, each)


@situation("a packed sequence of 32, labels (32,)")
def packed() -> Found:
    torch.manual_seed(0)
    x, y = sequences(lengths_of()), labels()
    each = [(pack_sequence([x[i]]), y[i : i + 1]) for i in range(N)]
    batch = pack_sequence(x, enforce_sorted=False), y
    return noise(Recurrent(), classified, batch, each)


class ByLength(Recurrent):
    """Packs padded sequences itself, which have to come by length."""

    def forward(self, x: Any) -> Tensor:
        """Classify (padded sequences, lengths)."""
        padded, lengths = x
        sequence: PackedSequence = pack_padded_sequence(padded, lengths)
        return super().forward(sequence)


def padded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model((batch["x"], batch["lengths"])), batch["y"])


@situation("padded sequences, sorted by length as packing wants them")
def sorted_by_length() -> Found:
    torch.manual_seed(0)
    x = sorted(sequences(lengths_of()), key=len, reverse=True)
    lengths, y = torch.tensor([len(one) for one in x]), labels()
    batch = {"x": pad_sequence(x), "lengths": lengths, "y": y}
    each = [
        {"x": x[i][:, None], "lengths": lengths[i : i + 1], "y": y[i : i + 1]} for i in range(N)
    ]
    return noise(ByLength(), padded, batch, each)


def ragged(model: nn.Module, batch: Any) -> Tensor:
    means = torch.stack([piece.mean(0) for piece in batch[0].unbind()])
    return F.cross_entropy(model(means), batch[1])


@situation("a jagged nested tensor of 32, labels (32,)")
def jagged() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = sequences(lengths_of()), labels()
    nest = torch.nested.nested_tensor

    def batch(chosen: Sequence[int]) -> Any:
        return nest([x[i] for i in chosen], layout=torch.jagged), y[list(chosen)]

    return noise(model, ragged, batch(range(N)), [batch([i]) for i in range(N)])


class OfGraphs(nn.Module):
    """Two rounds of messages along edges, and the mean of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor, graph_of: Tensor, graphs: int) -> Tensor:
        """Classify graphs."""
        h = torch.tanh(self.one(x))
        h = h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        total = h.new_zeros(graphs, h.shape[1]).index_add(0, graph_of, h)
        return self.two(total)


def graphs(count: int) -> list[dict[str, Tensor]]:
    """Rings of three to seven nodes."""
    made = []
    for _ in range(count):
        nodes = int(torch.randint(3, 8, ()))
        ring = torch.arange(nodes)
        made.append(
            {
                "x": torch.randn(nodes, 3),
                "edge_index": torch.stack([ring, ring.roll(1)]),
                "y": labels(1),
            }
        )
    return made


def joined(several: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several graphs in one, as PyTorch Geometric puts them."""
    sizes = [len(g["x"]) for g in several]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = [g["edge_index"] + start for g, start in zip(several, starts, strict=True)]
    return {
        "x": torch.cat([g["x"] for g in several]),
        "edge_index": torch.cat(edges, 1),
        "batch": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        "y": torch.cat([g["y"] for g in several]),
    }


def of_graphs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(batch["x"], batch["edge_index"], batch["batch"], len(batch["y"]))
    return F.cross_entropy(found, batch["y"])


def of_tuple(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, edges, graph_of, y = batch
    return F.cross_entropy(model(x, edges, graph_of, len(y)), y)


@situation("32 graphs in one: a dict of nodes, edges, batch and labels")
def graph_dict() -> Found:
    torch.manual_seed(0)
    several = graphs(N)
    return noise(OfGraphs(), of_graphs, joined(several), [joined([g]) for g in several])


@situation("32 graphs in one: a tuple (x, edge_index, batch, y)")
def graph_tuple() -> Found:
    torch.manual_seed(0)
    several = graphs(N)
    each = [tuple(joined([g]).values()) for g in several]
    return noise(OfGraphs(), of_tuple, tuple(joined(several).values()), each)


def preference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """DPO: rewards of the chosen, which come first, over those of the rejected."""
    chosen, rejected = model(batch["x"])[:, 0].chunk(2)
    return -F.logsigmoid(chosen - rejected - batch["reference"]).mean()


@situation("DPO: cat([chosen, rejected]) of 64 rows, reference margins (32,)")
def pairs_apart() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x, reference = torch.randn(2 * N, 6), torch.randn(N)
    each = [{"x": x[[i, N + i]], "reference": reference[i : i + 1]} for i in range(N)]
    return noise(model, preference, {"x": x, "reference": reference}, each)


def ranked(model: nn.Module, batch: Tensor) -> Tensor:
    scores = model(batch)[:, 0]
    return -F.logsigmoid(scores[0::2] - scores[1::2]).mean()


@situation("pairs side by side: 64 rows of chosen, rejected, chosen, ...")
def pairs_beside() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(2 * N, 6)
    return noise(model, ranked, x, [x[2 * i : 2 * i + 2] for i in range(N)])


def cropped(model: nn.Module, batch: list[Tensor]) -> Tensor:
    outs = [model(crop).log_softmax(-1) for crop in batch]
    return torch.stack([F.mse_loss(outs[0], out) for out in outs[1:]]).mean()


@situation("multi-crop: a list of 6 views, each of 32 rows")
def crops() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    views = [torch.randn(N, 6) for _ in range(6)]
    each = [[view[i : i + 1] for view in views] for i in range(N)]
    return noise(model, cropped, views, each)


def summed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@situation('reduction="sum" over 64 items')
def sums() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(64, 10), labels(64)
    each = [(x[i : i + 1], y[i : i + 1]) for i in range(64)]
    return noise(model, summed, (x, y), each, factor=64)


def half_labelled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Labels of some rows, and predictions of the others that are not to depend on noise."""
    free = model(batch["unlabelled"])
    steady = F.mse_loss(model(batch["unlabelled"] + batch["shift"]), free.detach())
    return F.cross_entropy(model(batch["x"]), batch["y"]) + 4 * steady


@situation("32 labelled and 64 unlabelled rows in one loss")
def semi_supervised() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    batch = {
        "shift": torch.randn(6),
        "unlabelled": torch.randn(2 * N, 6),
        "x": torch.randn(N, 6),
        "y": labels(),
    }

    rows = [batch | {"x": batch["x"][[i]], "y": batch["y"][[i]]} for i in range(N)]
    free = [batch | {"unlabelled": batch["unlabelled"][[i]]} for i in range(2 * N)]
    return noise(model, half_labelled, batch, rows, free)


def physics(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inside, boundary = batch
    x = inside.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.sum(1) - x[:, 0].sin()).square().mean() + 3 * model(boundary).square().mean()


@situation("physics-informed: 64 points inside, 24 on the boundary")
def physics_informed() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    inside, boundary = 2 * torch.randn(64, 2), 2 * torch.randn(24, 2)
    within = [(inside[[i]], boundary) for i in range(64)]
    edges = [(inside, boundary[[i]]) for i in range(24)]
    return noise(model, physics, (inside, boundary), within, edges)


@situation("physics-informed: 50 points inside, 21 on the boundary")
def uneven() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    inside, boundary = 2 * torch.randn(50, 2), 2 * torch.randn(21, 2)
    within = [(inside[[i]], boundary) for i in range(50)]
    edges = [(inside, boundary[[i]]) for i in range(21)]
    return noise(model, physics, (inside, boundary), within, edges)


class Translates(nn.Module):
    """Reads one sequence and writes another, both along dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(6, 7)
        self.reads, self.writes = nn.GRU(4, 6), nn.GRU(4, 6)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Predict what comes next in the target."""
        state = self.reads(self.embed(source))[1]
        return self.out(self.writes(self.embed(target), state)[0])


def translated(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found = model(batch[0], batch[1][:-1])
    return F.cross_entropy(found.flatten(0, 1), batch[1][1:].flatten())


@situation("time-major translation: (9, 32) and (6, 32) tokens")
def translation() -> Found:
    torch.manual_seed(0)
    x, y = torch.randint(0, 7, (9, N)), torch.randint(0, 7, (6, N))
    each = [(x[:, i : i + 1], y[:, i : i + 1]) for i in range(N)]
    return noise(Translates(), translated, (x, y), each)


class Encodes(nn.Module):
    """A layer of torch's own encoder, with dropout, along dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        """Classify by the mean."""
        return self.out(self.layer(self.embed(x), mask, padding).mean(0))


def encoded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["mask"], batch["padding"]), batch["y"])


@situation("nn.TransformerEncoderLayer: (7, 32, 3), a mask (7, 7), padding (32, 7), dropout")
def transformer() -> Found:
    torch.manual_seed(0)
    mask = torch.triu(torch.full((7, 7), -1e9), 1)
    x, y = torch.randn(7, N, 3), labels()
    padding = torch.zeros(N, 7, dtype=torch.bool)
    batch = {"x": x, "mask": mask, "padding": padding, "y": y}
    each = [
        batch | {"x": x[:, i : i + 1], "padding": padding[i : i + 1], "y": y[i : i + 1]}
        for i in range(N)
    ]
    return noise(Encodes(), encoded, batch, each)
