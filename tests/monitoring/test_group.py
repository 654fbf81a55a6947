"""Two monitors of one run: a GAN on real digits."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from problems import digits, mlp
from torch import Tensor, nn

import geomwatch


def gan(watch: bool, tmp_path=None) -> tuple[list[Tensor], geomwatch.Group | None]:
    torch.manual_seed(0)
    generator = nn.Sequential(mlp(8, 32, 64), nn.BatchNorm1d(64), nn.Sigmoid())
    discriminator = nn.Sequential(mlp(64, 32, 1), nn.Dropout(0.1))
    real = digits(64)[0]
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (generator, discriminator)]

    def generator_loss(model: nn.Module, noise: Tensor) -> Tensor:
        return F.softplus(-discriminator(model(noise))).mean()

    def discriminator_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        true, false = batch
        return F.softplus(-model(true)).mean() + F.softplus(model(false)).mean()

    group = None
    if watch:
        sink = geomwatch.JsonLines(tmp_path / "gan.jsonl")
        options = {"every": 1, "sinks": [sink]}
        group = geomwatch.Group(
            generator=geomwatch.Monitor(
                generator,
                generator_loss,
                optimizers[0],
                how=geomwatch.Measurement(also=(discriminator,)),
                **options,
            ),
            discriminator=geomwatch.Monitor(
                discriminator,
                discriminator_loss,
                optimizers[1],
                how=geomwatch.Measurement(also=(generator,)),
                **options,
            ),
        )
    for _ in range(4):
        noise = torch.randn(64, 8)
        optimizers[1].zero_grad()
        batch = (real, generator(noise).detach())
        discriminator_loss(discriminator, batch).backward()
        if group:
            group["discriminator"].step(batch)
        optimizers[1].step()
        optimizers[0].zero_grad()
        generator_loss(generator, noise).backward()
        if group:
            group["generator"].step(noise)
        optimizers[0].step()
    weights = [*generator.state_dict().values(), *discriminator.state_dict().values()]
    return weights, group


def test_a_gan_trains_bit_identically_with_both_nets_watched(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="geomwatch")
    bare, _ = gan(False)
    watched, group = gan(True, tmp_path)
    assert group is not None
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    flat = group.scalars()
    assert flat["geom/generator/stability_margin"] > 0
    assert flat["geom/discriminator/stability_margin"] > 0
    assert "generator: step      3" in caplog.text
    group.close()
    lines = [json.loads(line) for line in (tmp_path / "gan.jsonl").read_text().splitlines()]
    steps = [(x["monitor"], x["step"]) for x in lines if x["kind"] == "record"]
    assert steps == [(name, i) for i in range(4) for name in ("discriminator", "generator")]


def test_the_state_of_a_group_is_that_of_its_members(tmp_path):
    _, first = gan(True, tmp_path)
    _, second = gan(True, tmp_path)
    assert first is not None
    assert second is not None
    first.load_state_dict(second.state_dict())
    assert first.state_dict()["generator"]["step"] == 4
    first.pause()
    assert first["generator"].step(torch.randn(64, 8)) is None


def test_alerts_of_a_group_are_named_and_in_order():
    model = mlp(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitors = {
        name: geomwatch.Monitor(model, lambda m, b: m(b).sum(), optimizer) for name in ("a", "b")
    }
    group = geomwatch.Group(**monitors)
    for name, step in (("a", 7), ("b", 3)):
        alert = geomwatch.Alert("loss_rise", "warning", "up", 1.0, 0.5, step)
        monitors[name].alerts.append(alert)
    assert [(x.rule, x.step) for x in group.alerts] == [("b/loss_rise", 3), ("a/loss_rise", 7)]


def test_a_member_that_is_no_monitor_is_refused():
    with pytest.raises(TypeError, match=r"generator must be a geomwatch.Monitor, got Linear"):
        geomwatch.Group(generator=nn.Linear(2, 2))
