"""Micro-batches that differ in size or in what counts of them: the mean that the loop takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geomwatch
from situations.couplings import encoder, info_nce, masked_tokens, weighted
from situations.items import classified, labels
from situations.reference import dense, top
from situations.table import Found, situation

_CLOSE = 5e-3  # relative


def language() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9))


def text(tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches with so many labels that count."""
    made = []
    for count in tokens:
        x = torch.randint(0, 9, (8, 6))
        y = (x + 1) % 9
        y.view(-1)[count:] = -100
        made.append((x, y))
    return made


def watched(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    window: Sequence[Any],
    shares: Sequence[float],
    *,
    clip: float | None = None,
    exact: Tensor | None = None,
    **how: Any,
) -> Found:
    """Hold loss and lambda_max of a window against those of the mean with these shares."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked = geomwatch.Measurement(quantities=["lambda_max"], **{"hvp": "double_backward", **how})
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, asked)
    for share, batch in zip(shares, window, strict=True):
        (share * loss_fn(model, batch)).backward()
        monitor.observe(batch)
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    record = monitor.step()
    assert record is not None
    if exact is None:
        parts = [s * dense(model, loss_fn, b) for s, b in zip(shares, window, strict=True)]
        exact = torch.stack(parts).sum(0)
    exact = exact / sum(shares)
    loss = sum(s * float(loss_fn(model, b)) for s, b in zip(shares, window, strict=True))
    loss /= sum(shares)
    found = record["lambda_max"]
    right = abs(record.loss / loss - 1) < _CLOSE and found.status == "ok"
    # lean Lanczos: an eigenvalue lies within its error of what it says
    room = max(2 * (found.error or 0.0), _CLOSE * top(exact))
    right = right and found.value is not None and abs(found.value - top(exact)) < room
    told = record.provenance.get("window_weights", "as items have it")
    said = f"loss {record.loss:.4f}, λ_max {found.value or 0:.4g}; {told}"
    return Found(said, f"{loss:.4f}, {top(exact):.4g}", right)


@situation("2, 40, 40, 40 labels that count, trained by labels")
def by_labels() -> Found:
    torch.manual_seed(0)
    window = text((2, 40, 40, 40))
    return watched(language(), masked_tokens, window, [n / 122 for n in (2, 40, 40, 40)])


@situation("2, 40, 40, 40 labels that count, each micro-batch alike")
def alike() -> Found:
    torch.manual_seed(0)
    return watched(language(), masked_tokens, text((2, 40, 40, 40)), [0.25] * 4)


@situation("by labels, and the gradient is clipped to a tenth")
def clipped() -> Found:
    torch.manual_seed(0)
    window = text((3, 20, 40, 45))
    shares = [n / 108 for n in (3, 20, 40, 45)]
    return watched(language(), masked_tokens, window, shares, clip=0.05)


@situation("by labels, and the sum is not divided")
def undivided() -> Found:
    torch.manual_seed(0)
    window = text((3, 20, 40, 45))
    return watched(language(), masked_tokens, window, [0.3, 2.0, 4.0, 4.5])


def rows(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 6), labels(n)) for n in sizes]


@situation("a shorter last micro-batch (16, 16, 16, 3), each alike")
def shorter_alike() -> Found:
    torch.manual_seed(0)
    return watched(encoder(6, 2), classified, rows((16, 16, 16, 3)), [0.25] * 4)


@situation("a shorter last micro-batch (16, 16, 16, 3), by items")
def shorter_by_items() -> Found:
    torch.manual_seed(0)
    shares = [n / 51 for n in (16, 16, 16, 3)]
    return watched(encoder(6, 2), classified, rows((16, 16, 16, 3)), shares)


def summed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@situation("summed losses of micro-batches of 16, 8, 3 items")
def sums() -> Found:
    torch.manual_seed(0)
    return watched(encoder(6, 2), summed, rows((16, 8, 3)), [1.0, 1.0, 1.0])


@situation("class weights: micro-batches count by the weights of their labels")
def by_class_weights() -> Found:
    torch.manual_seed(0)
    window = rows((16, 12, 9))
    weight = torch.tensor([1.0, 4.0])
    own = [float(weight[y].sum()) for _, y in window]
    return watched(encoder(6, 2), weighted, window, own)


@situation("dropout, and unequal labels trained by labels")
def dropout() -> Found:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Tanh(), nn.Dropout(0.02), nn.Linear(16, 9))
    window = text((2, 10, 46, 46))
    shares = [n / 104 for n in (2, 10, 46, 46)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = geomwatch.Measurement(quantities=["loss"])
    monitor = geomwatch.Monitor(model, masked_tokens, optimizer, how)
    for share, batch in zip(shares, window, strict=True):
        (share * masked_tokens(model, batch)).backward()
        monitor.observe(batch)
    record = monitor.step()
    assert record is not None
    model.eval()
    exact = sum(s * float(masked_tokens(model, b)) for s, b in zip(shares, window, strict=True))
    told = str(record.provenance.get("window_weights"))
    right = abs(record.loss / exact - 1) < 0.02 and "labels" in told
    return Found(f"loss {record.loss:.4f}; {told}", f"{exact:.4f} without dropout", right)


@situation("InfoNCE over 8 micro-batches: their noise is that of the step")
def contrastive() -> Found:
    torch.manual_seed(0)
    model = encoder()
    values, count = [], 12
    for _ in range(count):
        window = [(torch.randn(8, 6), torch.randn(8, 6)) for _ in range(8)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        how = geomwatch.Measurement(quantities=["temperature"])
        monitor = geomwatch.Monitor(model, info_nce, optimizer, how)
        model.zero_grad()
        for batch in window:
            (info_nce(model, batch) / 8).backward()
            monitor.observe(batch)
        record = monitor.step()
        assert record is not None
        values.append(record["temperature"].value or float("nan"))
    mean = sum(values) / count
    gradients = []
    for _ in range(400):
        batch = torch.randn(8, 6), torch.randn(8, 6)
        parts = torch.autograd.grad(info_nce(model, batch), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in parts]))
    exact = 0.1 * float(torch.stack(gradients).var(0).mean()) / 8 / 2
    return Found(f"temperature {mean:.3g}", f"{exact:.3g}", abs(mean / exact - 1) < 0.25)
