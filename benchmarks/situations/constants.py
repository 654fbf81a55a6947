"""Losses that take part of themselves for constant: the Hessian with that part held.

The reference is torch's own Hessian in float64, which differentiates twice what has a gradient and
nothing else. Its gradients are those that training steps by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geomwatch
from situations.couplings import encoder
from situations.reference import LR, dense, top
from situations.table import Found, situation

N = 24


def held(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> Found:
    """Hold lambda_max of a measurement and of a Monitor's probe against the dense Hessian's."""
    exact = top(dense(model, loss_fn, batch))
    said = []
    names = geomwatch.Measurement(quantities=["lambda_max"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    one = geomwatch.measure(model, loss_fn, batch, optimizer=optimizer, how=names, max_hvps=60)
    watched = copy.deepcopy(model)
    monitor = geomwatch.Monitor(
        watched, loss_fn, torch.optim.SGD(watched.parameters(), lr=LR), names
    )
    loss_fn(watched, batch).backward()
    two = monitor.step(batch)
    assert two is not None
    right = True
    for record, room in ((one, 2e-3), (two, 0.05)):
        found = record["lambda_max"]
        said.append("none" if found.value is None else f"{found.value:.4g}")
        room = max(room * abs(exact), 2 * (found.error or 0.0))  # of few products
        close = found.value is not None and abs(found.value - exact) < room
        failed = record.provenance.get("validation_failed", False)
        right = right and close and found.status == "ok" and not failed
    return Found(f"λ_max {said[0]}, watched {said[1]}", f"{exact:.4g}", right)


def moco(model: nn.Module, batch: Tensor) -> Tensor:
    q = F.normalize(model(batch), dim=1)
    with torch.no_grad():
        k = F.normalize(model(batch), dim=1)
    return F.cross_entropy(q @ k.T / 0.3, torch.arange(len(batch)))


def moco_view(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    q, k = (F.normalize(model(x), dim=1) for x in batch)
    return F.cross_entropy(q @ k.detach().T / 0.3, torch.arange(len(q)))


def dino(model: nn.Module, batch: Tensor) -> Tensor:
    student = (model(batch) / 0.5).log_softmax(1)
    with torch.inference_mode():
        out = model(batch)
        teacher = ((out - out.mean(0)) / 0.2).softmax(1)
    return -(teacher.clone() * student).sum(1).mean()


def weighted(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    weight = out.norm(dim=1).detach()
    return (weight * out.square().mean(1)).mean() / weight.mean().item()


def focal(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ((1 - (-losses).exp().detach()).square() * losses).mean()


def q_learning(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value = model(batch["x"]).gather(1, batch["action"][:, None])[:, 0]
    with torch.no_grad():
        target = batch["reward"] + 0.9 * model(batch["next"]).max(1).values
    return F.mse_loss(value, target)


def distilled(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    temperature = float(out.std())
    return -((out / temperature).softmax(1).detach() * out.log_softmax(1)).sum(1).mean()


def averaged(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    with torch.no_grad():
        centre = out.mean(0)
        centre.mul_(0.9).add_(0.1 * out[0])
    return (out - centre).square().mean()


class Quantized(nn.Module):
    """Codes that stand for what lies next to them, with gradients straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 3), nn.Linear(3, 6)
        self.codes = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        z = torch.tanh(self.encode(x))
        code = self.codes[(z.detach()[:, None] - self.codes.detach()).square().sum(-1).argmin(1)]
        loss = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return loss + F.mse_loss(self.decode(z + (code - z).detach()), x)


def of_itself(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def penalised(model: nn.Module, batch: Tensor) -> Tensor:
    """A gradient penalty, whose own size is held."""
    x = batch.clone().requires_grad_()
    out = model(x).square().mean()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    norm = slope.norm()
    return out + norm.square() / norm.detach().clamp(min=0.1)


@situation("MoCo: keys by the same encoder under no_grad, of the same view")
def keys() -> Found:
    torch.manual_seed(0)
    return held(encoder(), moco, torch.randn(N, 6))


@situation("MoCo: keys by the same encoder, of another view, detached")
def keys_of_view() -> Found:
    torch.manual_seed(0)
    x = torch.randn(N, 6)
    return held(encoder(), moco_view, (x, x + 0.1 * torch.randn(N, 6)))


@situation("DINO: the teacher is the student, in inference mode and centred")
def teacher() -> Found:
    torch.manual_seed(0)
    return held(encoder(), dino, torch.randn(N, 6))


@situation("losses weighted by detached norms, over their mean as a number")
def weights() -> Found:
    torch.manual_seed(0)
    return held(encoder(), weighted, torch.randn(N, 6))


@situation("a focal loss whose weights are detached")
def focal_weights() -> Found:
    torch.manual_seed(0)
    return held(encoder(), focal, (torch.randn(N, 6), torch.randint(0, 4, (N,))))


@situation("Q-learning with its own target")
def target() -> Found:
    torch.manual_seed(0)
    batch = {
        "x": torch.randn(N, 6),
        "next": torch.randn(N, 6),
        "action": torch.randint(0, 4, (N,)),
        "reward": torch.randn(N),
    }
    return held(encoder(), q_learning, batch)


@situation("self-distillation with a temperature read as a number")
def self_distilled() -> Found:
    torch.manual_seed(0)
    return held(encoder(), distilled, torch.randn(N, 6))


@situation("a running centre that the loss itself updates in place under no_grad")
def centre() -> Found:
    torch.manual_seed(0)
    return held(encoder(), averaged, torch.randn(N, 6))


@situation("VQ-VAE: straight-through codes")
def codes() -> Found:
    torch.manual_seed(0)
    return held(Quantized(), of_itself, torch.randn(N, 6))


@situation("a gradient penalty over its own detached size")
def penalty() -> Found:
    torch.manual_seed(0)
    return held(encoder(), penalised, torch.randn(N, 6))


class Stop(torch.autograd.Function):
    """A stop of gradients that somebody wrote himself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Pass."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> None:
        """Stop."""
        return


def stopped(model: nn.Module, batch: Tensor) -> Tensor:
    keys: Tensor = Stop.apply(model(batch))
    return F.cross_entropy(model(batch) @ keys.T, torch.arange(len(batch)))


@situation("a Function of the user's that stops gradients")
def own_stop() -> Found:
    torch.manual_seed(0)
    return held(encoder(), stopped, torch.randn(N, 6))


def read_anew(model: nn.Module, batch: Tensor) -> Tensor:
    keys = batch.new_tensor(model(batch).tolist())
    return F.cross_entropy(model(batch) @ keys.T, torch.arange(len(batch)))


@situation("keys that went through a list of numbers")
def through_numbers() -> Found:
    torch.manual_seed(0)
    return held(encoder(), read_anew, torch.randn(N, 6))


def assigned(model: nn.Module, batch: Tensor) -> Tensor:
    z = F.normalize(model(batch), dim=1)
    with torch.no_grad():
        codes = (z / 0.3).exp().T
        for _ in range(3):
            codes /= codes.sum(1, keepdim=True)
            codes /= codes.sum(0, keepdim=True)
    return -(codes.T * (z / 0.3).log_softmax(1)).sum(1).mean()


@situation("SwAV: assignments by Sinkhorn steps in place, under no_grad")
def assignments() -> Found:
    torch.manual_seed(0)
    return held(encoder(), assigned, torch.randn(N, 6))


class Queue(nn.Module):
    """Keys of past batches in a buffer, into which the loss puts the present ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = encoder()
        self.register_buffer("queue", torch.randn(2 * N, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        z = self.encode(x)
        with torch.no_grad():
            self.queue[: len(x)] = self.encode(x).to(self.queue)
        return F.cross_entropy(z @ self.queue.clone().T, torch.arange(len(x)))


@situation("a queue of keys that the loss itself fills")
def queue() -> Found:
    torch.manual_seed(0)
    return held(Queue(), of_itself, torch.randn(N, 6))
