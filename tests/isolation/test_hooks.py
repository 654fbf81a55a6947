"""Hooks and gradients of the training are set aside in a probe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import cross_entropy, mlp
from states import assert_same, everything, same, seed
from torch import Tensor, nn
from undisturbed import convolutional, frozen, noisy_mlp, old_style

import geomwatch
from geomwatch.curvature.objective import Objective


def clip(gradient: Tensor) -> Tensor:
    return 10 * gradient.clamp(-1e-3, 1e-3)


def hessian_times(model: nn.Module, loss_fn: Any, batch: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    with Objective(model, loss_fn, [batch]) as objective:
        return objective.gradient(), objective.hvp(v)


def test_hooks_do_not_bend_the_gradient_or_an_hvp():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    plain = hessian_times(model, cross_entropy, batch, v)
    for p in model.parameters():
        p.register_hook(clip)
        p.register_hook(lambda gradient: -gradient)
    model[1].register_full_backward_hook(lambda module, given, out: (clip(given[0]),))
    model[2].register_full_backward_pre_hook(lambda module, out: (clip(out[0]),))
    assert same(hessian_times(model, cross_entropy, batch, v), plain)
    cross_entropy(model, batch).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert 0 < gradient.abs().max() <= 1.01e-2  # they work after
    assert not torch.allclose(gradient, plain[0], rtol=0.5)


def test_forward_hooks_run_in_a_probe_and_backward_hooks_do_not():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    calls: list[str] = []

    def noting(kind: str) -> Callable[..., None]:
        return lambda *_: calls.append(kind)

    forward = {"forward pre", "forward"}
    backward = {"backward pre", "backward", "parameter", "accumulated", "global"}
    last = model[2]
    handles = [
        last.register_forward_pre_hook(noting("forward pre")),
        last.register_forward_hook(noting("forward")),
        last.register_full_backward_pre_hook(noting("backward pre")),
        last.register_full_backward_hook(noting("backward")),
        last.weight.register_hook(noting("parameter")),
        last.weight.register_post_accumulate_grad_hook(noting("accumulated")),
        nn.modules.module.register_module_full_backward_hook(noting("global")),
    ]
    batch[0].requires_grad_()  # or the global hook warns at the first layer
    try:
        hessian_times(model, backward_inside, batch, torch.ones(75))
        assert set(calls) == forward
        calls.clear()
        cross_entropy(model, batch).backward()
        assert set(calls) == forward | backward
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    cross_entropy(model, batch).backward()
    assert calls == []  # the handles still know their hooks


def test_a_hook_that_the_loss_registers_is_taken_off_again():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        model[2].weight.register_hook(clip)
        model[2].bias.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
        model[2].register_full_backward_hook(lambda *_: None)
        return cross_entropy(model, batch)

    geomwatch.measure(model, loss_fn, batch)
    assert not model[2].weight._backward_hooks
    assert not model[2].bias._post_accumulate_grad_hooks
    assert not model[2]._backward_hooks


def backward_inside(model: nn.Module, batch: Any) -> Tensor:
    loss = cross_entropy(model, batch)
    loss.backward(retain_graph=True)
    return loss


@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_loss_that_calls_backward_adds_nothing_to_grad(has_gradient):
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    if has_gradient:
        cross_entropy(model, batch).backward()
    gradients = [p.grad for p in model.parameters()]
    before = everything(model)
    record = geomwatch.measure(model, backward_inside, batch)
    assert record["lambda_max"].value > 0
    assert_same(before, everything(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


class Adaptive(nn.Module):
    """Scales by a running size of its input, in place: a live graph has saved the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("size", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        self.size.mul_(0.5).add_(x.detach().abs().mean(0), alpha=0.5)
        return self.linear(torch.tanh(self.linear.weight.sum(0) * self.size * x))


@pytest.mark.parametrize(
    "make", [noisy_mlp, Adaptive, lambda: old_style(nn.utils.spectral_norm), frozen, convolutional]
)
def test_a_measurement_between_forward_and_backward_leaves_the_gradients_alone(make):
    model, batch = make(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    twin = copy.deepcopy(model)
    seed(2)
    cross_entropy(twin, batch).backward()
    after_twin = everything(twin)
    seed(2)
    loss = cross_entropy(model, batch)
    record = geomwatch.measure(model, cross_entropy, batch)
    loss.backward()
    assert record["lambda_max"].value is not None
    assert_same(after_twin, everything(model))
