"""Batches, weights and losses of types that models are fed, made of and return."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import geomwatch
from situations.items import OfGraphs, Recurrent, classified, graphs, joined, labels, of_graphs
from situations.reference import curvature, dense, measured, top
from situations.table import Found, situation

N = 32


class Sparse(nn.Module):
    """A first layer whose inputs may be sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 8) / 2)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.out(torch.tanh(x @ self.first))


def _sparse(layout: str) -> Found:
    torch.manual_seed(0)
    model, x, y = Sparse(), torch.randn(N, 6).relu(), labels()
    made: Any = getattr(x, layout)()
    exact = top(dense(model, classified, (x, y)))
    return curvature(model, classified, (made, y), exact)


@situation("sparse COO inputs")
def coo() -> Found:
    return _sparse("to_sparse")


@situation("sparse CSR inputs")
def csr() -> Found:
    return _sparse("to_sparse_csr")


@situation("sparse CSR inputs, a Monitor that cuts them for the noise scale")
def csr_noise() -> Found:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6).relu(), labels(64)
    model, said = Sparse(), []
    for batch in ((x.to_sparse_csr(), y), (x, y)):
        record = measured(model, classified, batch, ["temperature"])
        said.append(record["temperature"].value or float("nan"))
    return Found(
        f"temperature {said[0]:.4g}",
        f"{said[1]:.4g} of the dense",
        abs(said[0] / said[1] - 1) < 1e-3,
    )


def ragged(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    means = torch.stack([piece.mean(0) for piece in x.unbind()])
    return F.cross_entropy(model(means), y)


@situation("jagged nested tensors")
def jagged() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = [torch.randn(3 + i % 5, 3) for i in range(N)], labels()
    exact = top(dense(model, classified, (torch.stack([one.mean(0) for one in x]), y)))
    nest = torch.nested.nested_tensor(x, layout=torch.jagged)
    return curvature(model, ragged, (nest, y), exact)


@situation("nested tensors of the older layout")
def nested() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = [torch.randn(3 + i % 5, 3) for i in range(N)], labels()
    exact = top(dense(model, classified, (torch.stack([one.mean(0) for one in x]), y)))
    return curvature(model, ragged, (torch.nested.nested_tensor(x), y), exact)


@situation("a packed sequence")
def packed() -> Found:
    torch.manual_seed(0)
    x, y = [torch.randn(3 + i % 5, 3) for i in range(N)], labels()
    batch = pack_sequence(x, enforce_sorted=False), y
    return curvature(Recurrent(), classified, batch)


@situation("graphs in a dict")
def graph_dict() -> Found:
    torch.manual_seed(0)
    return curvature(OfGraphs(), of_graphs, joined(graphs(N)))


class Graphs:
    """Graphs as an object of one's own, which can be moved."""

    def __init__(self, **members: Tensor) -> None:
        self.__dict__.update(members)
        self.num_graphs = len(members["y"])

    def to(self, device: Any) -> Graphs:
        """Move."""
        return Graphs(**{k: v.to(device) for k, v in vars(self).items() if k != "num_graphs"})


def of_object(model: nn.Module, batch: Any) -> Tensor:
    found = model(batch.x, batch.edge_index, batch.batch, batch.num_graphs)
    return F.cross_entropy(found, batch.y)


@situation("graphs in an object of one's own")
def graph_object() -> Found:
    torch.manual_seed(0)
    batch = joined(graphs(N))
    exact = top(dense(OfGraphs(), of_graphs, batch))
    torch.manual_seed(0)
    batch, model = joined(graphs(N)), OfGraphs()
    exact = top(dense(model, of_graphs, batch))
    return curvature(model, of_object, Graphs(**batch), exact)


class Locked:
    """A batch that holds a lock and refuses to be copied."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.lock = x, y, threading.Lock()

    def to(self, device: Any) -> Locked:
        """Move."""
        return Locked(self.x.to(device), self.y.to(device))

    def __copy__(self) -> Locked:
        """Refuse."""
        raise TypeError("a batch of shared memory is not to be copied")


def of_locked(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


@situation("a batch that refuses to be copied")
def locked() -> Found:
    torch.manual_seed(0)
    model, x, y = plain(), torch.randn(N, 6), labels()
    exact = top(dense(model, classified, (x, y)))
    return curvature(model, of_locked, Locked(x, y), exact)


@situation("a batch with a lock, a generator and a file name in it")
def strange_members() -> Found:
    torch.manual_seed(0)
    model, x, y = plain(), torch.randn(N, 6), labels()
    exact = top(dense(model, classified, (x, y)))
    batch = types.SimpleNamespace(
        x=x, y=y, lock=threading.Lock(), rows=(i for i in range(3)), path="a.txt"
    )
    return curvature(model, of_locked, batch, exact)


class Casts(nn.Module):
    """Casts its inputs to bfloat16, as its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.net(x.bfloat16()).float()


@situation("a model in bfloat16 that casts its inputs itself")
def casts() -> Found:
    torch.manual_seed(0)
    model, x, y = Casts(), torch.randn(N, 6), labels()
    exact = top(dense(copy.deepcopy(model.net).float(), classified, (x, y)))
    found = measured(model, classified, (x, y), ["lambda_max"])
    value, why = found["lambda_max"].value, found.provenance.get("precision_fallback", "")
    right = value is not None and abs(value / exact - 1) < 0.05 and bool(why)
    shown = "none" if value is None else f"{value:.3g}"
    return Found(f"λ_max {shown}; {str(why)[:60]}", f"{exact:.3g}, to 5 %", right)


class CastsBack(nn.Module):
    """Holds weights in float32 and runs its middle in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        weight, bias = self.two.weight.bfloat16(), self.two.bias.bfloat16()
        return F.linear(torch.tanh(self.one(x)).bfloat16(), weight, bias).float()


@situation("a layer that casts itself and its weights to bfloat16")
def casts_middle() -> Found:
    torch.manual_seed(0)
    model, x, y = CastsBack(), torch.randn(N, 6), labels()
    net = nn.Sequential(model.one, nn.Tanh(), model.two)
    exact = top(dense(net, classified, (x, y)))
    found = measured(model, classified, (x, y), ["lambda_max"])["lambda_max"]
    right = found.value is not None and abs(found.value / exact - 1) < 0.05
    shown = found.reason[:60] if found.value is None else f"{found.value:.3g}"
    return Found(f"λ_max {shown}", f"{exact:.3g}, to 5 %", right)


class Complex(nn.Module):
    """A complex layer, and a layer on the meta device that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5, dtype=torch.complex64)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify by real and imaginary parts."""
        z = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.out(torch.view_as_real(z).flatten(1))


@situation("complex weights")
def complex_weights() -> Found:
    torch.manual_seed(0)
    return curvature(Complex(), classified, (torch.randn(N, 6), labels()))


@situation("complex weights under Adam: the margin")
def complex_margin() -> Found:
    torch.manual_seed(0)
    one, batch = Complex(), (torch.randn(N, 6), labels())
    two = AsReals(one)
    margins = [_margin(model, batch) for model in (one, two)]
    right = abs(margins[0] / margins[1] - 1) < 1e-3
    return Found(f"margin {margins[0]:.4g}", f"{margins[1]:.4g} of the same in real weights", right)


class AsReals(nn.Module):
    """The same net with the real and imaginary parts of its weights as parameters."""

    def __init__(self, net: Complex) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(net.first.weight.detach()).clone())
        self.bias = nn.Parameter(torch.view_as_real(net.first.bias.detach()).clone())
        self.out = copy.deepcopy(net.out)

    def forward(self, x: Tensor) -> Tensor:
        """Classify as the other."""
        weight, bias = map(torch.view_as_complex, (self.weight, self.bias))
        z = torch.tanh(F.linear(x.to(weight.dtype), weight, bias))
        return self.out(torch.view_as_real(z).flatten(1))


def _margin(model: nn.Module, batch: Any) -> float:
    """Return the margin of the fourth step of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    how = geomwatch.Measurement(quantities=["stability_margin"], hvp="double_backward")
    monitor = geomwatch.Monitor(model, classified, optimizer, how, every=3)
    for _ in range(4):
        optimizer.zero_grad()
        classified(model, batch).backward()
        record = monitor.step(batch)
        optimizer.step()
    assert record is not None
    return record["stability_margin"].value or 0.0


class Unused(nn.Module):
    """With a layer that was never given memory."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(4, 4, device="meta")
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.net(x)


@situation("an unused layer on the meta device")
def meta() -> Found:
    torch.manual_seed(0)
    model, batch = Unused(), (torch.randn(N, 6), labels())
    exact = top(dense(model.net, classified, batch))
    return curvature(model, classified, batch, exact)


def several(model: nn.Module, batch: Any) -> Any:
    found = model(batch[0])
    return {"class": F.cross_entropy(found, batch[1]), "size": found.square().mean()}


def _refused(loss_fn: Any, line: str) -> Found:
    torch.manual_seed(0)
    model, batch = plain(), (torch.randn(N, 6), labels())
    try:
        measured(model, loss_fn, batch, ["lambda_max"])
    except geomwatch.UsageError as error:
        last = str(error).splitlines()[-1].strip()
        repaired = eval(last, {"loss_fn": loss_fn, "sum": sum})
        record = measured(model, repaired, batch, ["lambda_max"])
        right = last == line and record["lambda_max"].status == "ok"
        return Found(f"UsageError, last line: {last}", line, right)
    return Found("measured", f"UsageError that ends with {line}", right=False)


@situation("a loss that is a dict of losses")
def dict_of_losses() -> Found:
    return _refused(several, "lambda model, batch: sum(loss_fn(model, batch).values())")


@situation('a loss that is a dict with "loss" in it')
def dict_with_loss() -> Found:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return {"loss": classified(model, batch), "accuracy": torch.tensor(0.5)}

    return _refused(loss_fn, 'lambda model, batch: loss_fn(model, batch)["loss"]')


@situation("a loss that is a tuple (loss, outputs)")
def tuple_of_loss() -> Found:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return classified(model, batch), model(batch[0])

    return _refused(loss_fn, "lambda model, batch: loss_fn(model, batch)[0]")


@situation("one-item batches every so often")
def one_item() -> Found:
    torch.manual_seed(0)
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, classified, optimizer, every=1)
    counted = []
    for step in range(6):
        n = 1 if step % 3 == 2 else N
        batch = torch.randn(n, 6), labels(n)
        optimizer.zero_grad()
        classified(model, batch).backward()
        record = monitor.step(batch)
        counted.append(0 if record is None else record.provenance["items"])
        optimizer.step()
    return Found(f"items {counted}", "[32, 32, 1, 32, 32, 1]", counted == [32, 32, 1, 32, 32, 1])
