"""Controllers in real loops: what is turned, what is said of it, and what stays as it was."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from scripted import Scripted
from states import everything, same, seed
from torch import nn

from geomwatch import Adjustment, JsonLines, Monitor
from geomwatch.controllers import LearningRateCap, Move
from geomwatch.controllers.actuators import KNOBS, Memory
from geomwatch.controllers.conductor import Conductor
from geomwatch.controllers.protocol import check_controllers, copies
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.observation.observer import Observer
from geomwatch.records import Estimate
from geomwatch.rules import Observation


def draws(size: int = 64):
    inputs, targets = digits(1797)
    rng = torch.Generator().manual_seed(0)
    while True:
        pick = torch.randint(0, len(inputs), (size,), generator=rng)
        yield inputs[pick], targets[pick]


def build(lr: float, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options):
    seed(0)
    model = mlp(64, 32, 10)
    if kind is torch.optim.SGD:
        options = {"momentum": 0.9, **options}
    return model, kind(model.parameters(), lr=lr, **options)


def train(model, optimizer, monitor: Monitor | None, steps: int, *, batches=None) -> list[float]:
    losses = []
    for batch in itertools.islice(batches or draws(), steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch, loss=loss.detach())
        optimizer.step()
        losses.append(loss.item())
    return losses


class Turned(Memory):
    """An actuator that tells in which order it was turned and the adjustment was logged."""

    def __init__(self, knob: str, story: list[str]) -> None:
        super().__init__(knob)
        self.story = story

    def set(self, to: float) -> None:
        super().set(to)
        self.story.append(f"{self.knob} {to:g}")


# A run that would diverge


def test_a_rate_thirty_times_too_large_trains():
    model, optimizer = build(3.0)
    assert train(model, optimizer, None, 150)[-1] > 2
    model, optimizer = build(3.0)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
    assert train(model, optimizer, monitor, 150)[-1] < 0.3
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_alerts_judge_the_rate_that_is_applied():
    model, optimizer = build(3.0)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
    train(model, optimizer, monitor, 150)
    assert not [a for a in monitor.alerts if a.severity == "critical" and a.step > 0]


def test_the_scale_is_in_the_record_and_goes_to_trackers():
    model, optimizer = build(3.0)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
    train(model, optimizer, monitor, 4)
    for record in monitor.history:
        (adjustment,) = record.adjustments
        assert adjustment.knob == "lr_scale"
        assert record.scalars()["geom/lr_scale"] == record.knobs["lr_scale"] == adjustment.after
        assert record.lr == (3.0,)


def test_every_adjustment_is_a_line_of_the_run_and_of_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, "geomwatch")
    model, optimizer = build(3.0)
    sink = JsonLines(tmp_path / "run.jsonl")
    monitor = Monitor(
        model, cross_entropy, optimizer, controllers=[LearningRateCap()], sinks=[sink]
    )
    train(model, optimizer, monitor, 4)
    lines = [json.loads(line) for line in sink.path.read_text("utf-8").splitlines()]
    own = [line for line in lines if line["kind"] == "adjustment"]
    assert [line["after"] for line in own] == [a.after for a in monitor.adjustments]
    assert own[0]["effect"] == "applied"
    assert lines[0]["controllers"] == ["LearningRateCap"]
    said = [r.getMessage() for r in caplog.records if "lr_scale" in r.getMessage()]
    assert said[0].startswith("step 0: lr_scale 1 -> 0.")
    assert "learning rate 3 held at" in said[0]
    assert "while the loss stands where it began, curvature, and how much" in said[0]


# What must not happen


@pytest.mark.parametrize("controllers", [[], [LearningRateCap(dry_run=True)]])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_bit_identical_without_controllers_and_in_a_dry_run(kind, controllers):
    states = []
    for watched in (False, True):
        model, optimizer = build(0.5, kind)
        monitor = None
        if watched:
            own = copies(controllers)
            monitor = Monitor(model, cross_entropy, optimizer, controllers=own)
        losses = train(model, optimizer, monitor, 25)
        states.append((losses, everything(model, optimizer)))
    assert same(*states)
    assert monitor is not None
    assert bool(monitor.adjustments) == bool(controllers)
    assert {a.effect for a in monitor.adjustments} <= {"dry run"}


def test_a_dry_run_says_what_it_would_do(caplog):
    caplog.set_level(logging.INFO, "geomwatch")
    model, optimizer = build(3.0)
    cap = LearningRateCap(dry_run=True)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=cap)
    train(model, optimizer, monitor, 2)
    assert "step 0: would be lr_scale 1 -> 0." in caplog.text
    assert monitor.history[0].scalars()["geom/lr_scale"] < 1


def test_geomwatch_disable_turns_controllers_off_too(monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    model, optimizer = build(3.0)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
    train(model, optimizer, monitor, 2)
    assert not optimizer._optimizer_step_pre_hooks
    assert not monitor.adjustments


def test_a_closed_monitor_gives_the_rate_back():
    model, optimizer = build(3.0)
    with Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()]) as monitor:
        train(model, optimizer, monitor, 2)
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_probes_that_fail_never_raise_the_rate():
    model, optimizer = build(3.0)
    broken = False

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        if broken:
            raise RuntimeError("no more probes")
        return cross_entropy(model, batch)

    monitor = Monitor(model, loss_fn, optimizer, controllers=[LearningRateCap()])
    batches = draws()
    train(model, optimizer, monitor, 3, batches=batches)
    scale = monitor.adjustments[-1].after
    broken = True
    train(model, optimizer, monitor, 40, batches=batches)
    assert [a.after for a in monitor.adjustments if a.step > 2 and a.after > scale] == []


@pytest.mark.parametrize("steps", [7, 10, 23])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(steps):
    def start(lr: float):
        model, optimizer = build(lr, torch.optim.AdamW)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        monitor = Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
        return model, optimizer, scheduler, monitor

    def go(model, optimizer, scheduler, monitor, batches):
        scales = []
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
            scheduler.step()
            scales.append(monitor._control.scale)
        return scales

    batches = list(itertools.islice(draws(), 40))
    whole = start(0.5)
    # Warm starts are not saved, so that probes after a resume differ in their last digits; held to
    # one measurement the decisions of both runs have to be the same.
    expected = go(*whole, batches[:steps])
    saved = [part.state_dict() for part in whole]
    saved = torch.load(_stored(saved), weights_only=True)
    again = start(0.5)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    for run in (whole, again):
        run[3].pause()
    rest = [go(*run, batches[steps:]) for run in (whole, again)]
    assert rest[0] == rest[1]
    assert min(expected) < 0.5
    assert same(everything(*whole[:2]), everything(*again[:2]))


def _stored(state: Any):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_state_of_other_controllers_is_refused():
    model, optimizer = build(0.1)
    without = Monitor(model, cross_entropy, optimizer).state_dict()
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
    with pytest.raises(UsageError, match=r"controllers \['lr_scale'\], got \[\]"):
        monitor.load_state_dict(without)


# The conductor


def observed(step: int, lr: float = 0.1) -> Observation:
    return Observation(index=step, lr=(lr,))


def test_an_adjustment_is_known_before_it_is_applied():
    story: list[str] = []
    _, optimizer = build(0.1)
    control = Conductor([Scripted("clip_norm", {0: 2.0})], optimizer)
    control.equip(Turned("clip_norm", story))
    story += [f"logged {a.after:g}" for a in control(observed(0), ())]
    control.apply((0.1,))
    assert story == ["logged 2", "clip_norm 2"]


def test_the_learning_rate_comes_first_and_later_controllers_know():
    _, optimizer = build(0.1)
    asked = [Scripted(knob, {0: 0.05, 1: 0.05}) for knob in reversed(KNOBS)]
    control = Conductor(asked, optimizer)
    control.equip(Memory("batch_scale"), Memory("clip_norm"))
    adjustments = control(observed(0), ())
    assert [a.knob for a in adjustments] == list(KNOBS)
    moved = [sorted(c.seen[0][2].moved) for c in reversed(asked)]
    others = ["batch_scale", "clip_norm", "lr_scale"]
    assert moved == [[], ["lr_scale"], ["batch_scale", "lr_scale"], others]
    control.apply((0.1,))
    # a step is left out anew each time; the others are where they should be
    assert [a.knob for a in control(observed(1), ())] == ["skip_step"]


def test_what_a_loop_cannot_turn_becomes_advice_once():
    _, optimizer = build(0.1)
    control = Conductor([Scripted("batch_scale", dict.fromkeys(range(9), 4.0))], optimizer)
    said = [a for t in range(9) for a in control(observed(t), ())]
    (advice,) = said
    assert (advice.before, advice.after, advice.effect) == (1.0, 4.0, "advice")
    assert "pass BatchSizeScaler(through=...) a ResizableBatchSampler" in advice.reason
    assert control.values((0.1,)) == {"batch_scale": 1.0}


def test_a_host_that_brings_an_actuator_is_turned_to_where_the_run_was():
    _, optimizer = build(0.1)
    first = Conductor([Scripted("clip_norm", {0: 2.0})], optimizer)
    first.equip(Memory("clip_norm"))
    first(observed(0), ())
    first.apply((0.1,))
    story: list[str] = []
    second = Conductor([Scripted("clip_norm")], optimizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.equip(Turned("clip_norm", story))
    assert story == ["clip_norm 2"]


def test_a_controller_that_fails_is_reported_once_and_training_goes_on(caplog):
    class Broken(Scripted):
        def __call__(self, *_: Any) -> Sequence[Move]:
            raise ZeroDivisionError("in a controller")

    model, optimizer = build(0.1)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[Broken("lr_scale")])
    train(model, optimizer, monitor, 5)
    assert caplog.text.count("failed with ZeroDivisionError: in a controller") == 1


def test_advice_of_a_controller_is_a_warning_and_turns_nothing(caplog):
    model, optimizer = build(0.25)
    advises = Scripted("lr_scale", {1: 0.125}, advice=True)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[advises])
    train(model, optimizer, monitor, 3)
    (advice,) = monitor.adjustments
    assert advice == Adjustment("lr_scale", 1.0, 0.5, "the test wants it", 1, "advice")
    assert "step 1: advice, not applied: lr_scale 1 -> 0.5: the test wants it" in caplog.text
    assert monitor._control.scale == 1.0


def test_the_rules_see_the_capped_margin_and_peak():
    _, optimizer = build(0.1)
    control = Conductor([Scripted("lr_scale", {0: 0.05})], optimizer)
    control(observed(0), ())
    control.apply((0.1,))
    margin = Estimate(2.0, 0.2, "residual")
    seen = Observation(index=1, lr=(0.1,), margin=margin, gradient_margin=margin, peak=(1.0,))
    judged = Observer()(seen, control.cap).applied
    assert judged.lr == (0.05,)
    assert judged.margin == judged.gradient_margin == Estimate(1.0, 0.1, "residual")
    assert judged.peak == pytest.approx((0.05,))


@pytest.mark.parametrize(
    ("controllers", "error", "message"),
    [
        (["cap"], UsageTypeError, r"controllers must hold controllers .* got 'cap'"),
        ([Scripted("volume")], UsageError, "knob must be one of lr_scale, .* got 'volume'"),
        (
            [LearningRateCap(), LearningRateCap()],
            UsageError,
            "controllers must hold one for each knob, got 2 for 'lr_scale'",
        ),
    ],
)
def test_controllers_that_cannot_work_are_refused(controllers, error, message):
    model, optimizer = build(0.1)
    with pytest.raises(error, match=message):
        Monitor(model, cross_entropy, optimizer, controllers=controllers)


def test_what_a_controller_needs_is_measured_at_every_probe():
    needy = Scripted("lr_scale")
    needy.needs = ("stochastic_margin", "gradient_noise_scale")
    model, optimizer = build(0.1)
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[needy])
    train(model, optimizer, monitor, 10)
    for record in monitor.history:
        assert record["stochastic_margin"].status == "ok"
        assert record["gradient_noise_scale"].age == 0
    (first, *_) = needy.seen
    assert first[0].items == 64
    assert first[0].limit_ratio == pytest.approx(19)


def test_two_optimizers_are_capped_apart():
    seed(0)
    models = [mlp(64, 16, 10), mlp(64, 16, 10)]
    optimizers = [torch.optim.SGD(models[i].parameters(), lr=(50.0, 0.01)[i]) for i in (0, 1)]
    monitors = [
        Monitor(m, cross_entropy, o, controllers=[LearningRateCap()])
        for m, o in zip(models, optimizers, strict=True)
    ]
    for batch in itertools.islice(draws(), 3):
        for model, optimizer, monitor in zip(models, optimizers, monitors, strict=True):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
    assert monitors[0]._control.scale < 1
    assert monitors[1]._control.scale == 1
    assert math.isclose(optimizers[0].param_groups[0]["lr"], 50.0)


# What may be passed


@pytest.mark.parametrize("several", [False, True])
def test_one_controller_will_do_for_a_list(several):
    model, optimizer = build(3.0)
    cap = LearningRateCap()
    monitor = Monitor(model, cross_entropy, optimizer, controllers=[cap] if several else cap)
    train(model, optimizer, monitor, 2)
    assert [a.knob for a in monitor.adjustments] == ["lr_scale"] * len(monitor.adjustments)
    assert monitor.adjustments


@pytest.mark.parametrize(
    ("controllers", "repaired"),
    [
        (LearningRateCap, "controllers=LearningRateCap()"),
        ("LearningRateCap", "controllers=LearningRateCap()"),
        ("batch size scaler", "controllers=BatchSizeScaler()"),
        (["clipper", Scripted("lr_scale")], "controllers=[GradientClipper(), Scripted(...)]"),
        (None, "controllers=LearningRateCap()"),
        (3, "controllers=LearningRateCap()"),
    ],
)
def test_what_is_no_controller_is_refused_with_the_line_repaired(controllers, repaired):
    with pytest.raises(UsageTypeError, match="controllers must hold controllers") as refused:
        check_controllers(controllers)
    assert str(refused.value).splitlines()[-1].strip() == repaired


def test_a_controller_of_ones_own_needs_no_memory_and_no_further_attribute():
    class Halves:
        knob = "lr_scale"

        def __call__(self, step: Observation, alerts: Any, knobs: Any) -> Sequence[Move]:
            return [Move("lr_scale", 0.5 * max(step.lr), "half is enough")]

    _, optimizer = build(0.1)
    first, second = Conductor(Halves(), optimizer), Conductor(Halves(), optimizer)
    assert [(a.after, a.effect) for a in first(observed(0), ())] == [(0.5, "applied")]
    first.apply((0.1,))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.scale == 0.5
    assert second(observed(1), ()) == []


# Some dry, some live


def dry(controller: Scripted) -> Scripted:
    controller.dry_run = True
    return controller


@pytest.mark.parametrize("is_dry", [True, False])
def test_each_controller_has_a_dry_run_of_its_own(is_dry):
    model, optimizer = build(0.1)
    rate, clip = Scripted("lr_scale", {0: 0.05}), Scripted("clip_norm", {0: 2.0})
    dry(rate if is_dry else clip)
    conductor = Conductor([rate, clip], optimizer)
    effects = {a.knob: a.effect for a in conductor(observed(0), ())}
    dry_knob = "lr_scale" if is_dry else "clip_norm"
    assert effects == {"lr_scale": "applied", "clip_norm": "applied"} | {dry_knob: "dry run"}
    conductor.apply((0.1,))
    assert conductor.scale == (1.0 if is_dry else 0.5)
    weight = next(model.parameters())
    before = weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    weight.grad.view(-1)[0] = 4.0
    optimizer.step()
    moved = (before - weight).view(-1)[0].item()
    assert moved == pytest.approx(0.1 * 2.0 if is_dry else 0.05 * 4.0)
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    assert hooks == ((1, 0) if is_dry else (1, 1))


def test_what_a_dry_run_would_do_is_hidden_from_live_controllers_alone():
    _, optimizer = build(0.1)
    asked = [dry(Scripted("lr_scale", {0: 0.05})), Scripted("batch_scale"), Scripted("clip_norm")]
    dry(asked[2])
    conductor = Conductor(asked, optimizer)
    conductor(observed(0), ())
    live, beside = asked[1].seen[0][2], asked[2].seen[0][2]
    assert (set(live.values), live.moved) == ({"batch_scale"}, frozenset())
    assert set(beside.values) == {"lr_scale", "batch_scale", "clip_norm"}
    assert beside.moved == {"lr_scale"}


def test_a_host_does_not_equip_a_dry_controller():
    _, optimizer = build(0.1)
    conductor = Conductor(dry(Scripted("clip_norm", {0: 2.0})), optimizer)
    story: list[str] = []
    conductor.equip(Turned("clip_norm", story))
    conductor(observed(0), ())
    conductor.apply((0.1,))
    assert story == []


def test_what_a_controller_wants_of_anothers_knob_is_advice():
    _, optimizer = build(0.1)
    wants = Move("lr_scale", 0.05, "it would help")
    grasping = type("Grasping", (Scripted,), {"__call__": lambda *_: [wants]})("batch_scale")
    conductor = Conductor([grasping, dry(Scripted("lr_scale"))], optimizer)
    (adjustment,) = conductor(observed(0), ())
    conductor.apply((0.1,))
    assert (adjustment.knob, adjustment.effect) == ("lr_scale", "advice")
    assert conductor.values((0.1,))["lr_scale"] == 1.0
