"""A probe leaves no trace: training with geomwatch on is bit for bit training without it."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import cross_entropy
from states import assert_same, everything, same, seed
from torch import nn
from undisturbed import NETS, STEPS, Net

import geomwatch
from geomwatch.isolation.snapshot import Snapshot

OPTIMIZERS = {
    "SGD with momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-2, foreach=False),
    "Adam, foreach": functools.partial(torch.optim.Adam, lr=1e-2, foreach=True),
    "AdamW, amsgrad": functools.partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
}


def train(
    net: Net, make_optimizer: Callable[..., Any], *, watch: bool, quantities: Any = "all"
) -> tuple[dict[str, Any], list[geomwatch.Record]]:
    """Train for some steps from fixed seeds; return all that remains, and the records."""
    seed(1)
    model = net.make()
    optimizer = make_optimizer(model.parameters())
    monitor = None
    if watch:
        monitor = geomwatch.Monitor(
            model,
            cross_entropy,
            optimizer,
            how=geomwatch.Measurement(quantities=quantities),
            every=1,
        )
    calls: collections.Counter[str] = collections.Counter()
    hook_in(model, calls)
    losses = []
    for _ in range(STEPS):
        batch = net.batch()
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch)
        optimizer.step()
        losses.append(loss.item())
    remains = everything(model, optimizer) | {"losses": losses, "hook calls": dict(calls)}
    return remains, [] if monitor is None else monitor.history


def hook_in(model: nn.Module, calls: collections.Counter[str]) -> None:
    """Hooks of every kind; the forward hook steps aside in a probe, as is_probing() lets it."""

    def forward(*_: object) -> None:
        calls["forward"] += not geomwatch.is_probing()

    def count(kind: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[kind] += 1

        return hook

    last = list(model.modules())[-1]
    last.register_forward_hook(forward)
    last.register_full_backward_hook(count("module"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainable[0].register_hook(count("parameter"))
    trainable[0].register_hook(lambda gradient: 0.5 * gradient)
    trainable[-1].register_post_accumulate_grad_hook(count("accumulated"))


def assert_watching_changes_nothing(net: Net, make_optimizer: Callable[..., Any]) -> None:
    without, _ = train(net, make_optimizer, watch=False)
    with_it, records = train(net, make_optimizer, watch=True)
    assert_same(without, with_it)
    # It did measure: a probe that failed would leave no trace either.
    assert [r.step for r in records] == list(range(STEPS))
    assert all(r["lambda_max"].value > 0 and r.provenance["hvps"] >= 3 for r in records)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_training_is_bit_identical_for_every_kind_of_net(net):
    assert_watching_changes_nothing(net, OPTIMIZERS["SGD with momentum"])


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_is_bit_identical_for_every_optimizer(make_optimizer):
    assert_watching_changes_nothing(NETS["BatchNorm, dropout and other generators"], make_optimizer)


def test_the_comparison_notices_a_probe_that_is_not_put_back(monkeypatch):
    monkeypatch.setattr(Snapshot, "finish", lambda self: None)
    monkeypatch.setattr(Snapshot, "restore", lambda self: None)
    net, optimizer = NETS["BatchNorm, dropout and other generators"], OPTIMIZERS["Adam"]
    without, _ = train(net, optimizer, watch=False)
    with_it, _ = train(net, optimizer, watch=True, quantities=["loss"])
    differing = {key for key in without if not same(without[key], with_it[key])}
    assert differing >= {"weights and buffers", "gradients", "optimizer", "rng", "losses"}
