"""The monitor in real training loops on digits, healthy and otherwise."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import logging
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faces import faced
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch import Alert, Measurement, Monitor, Record, UsageError
from geomwatch.monitoring.options import Options
from geomwatch.rules import NonFinite, Observation

Batch = tuple[Tensor, Tensor]
DENSE = [0, 1, 2, 3, 5, 8]


def draws(seed: int = 0, size: int = 64) -> Iterator[Batch]:
    """Random batches of digits without end."""
    inputs, targets = digits(1797)
    rng = torch.Generator().manual_seed(seed)
    while True:
        pick = torch.randint(0, len(inputs), (size,), generator=rng)
        yield inputs[pick], targets[pick]


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def small() -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    return model, sgd(model)


def train(
    model: nn.Module,
    optimizer: Any,
    monitor: Monitor | None,
    steps: int,
    *,
    batches: Iterator[Batch] | None = None,
    before: Callable[[int], None] = lambda step: None,
    loss_fn: Callable[[Any, Batch], Tensor] = cross_entropy,
    pass_loss: bool = True,
) -> list[Record | None]:
    """The loop of the README; `before(step)` is called before each monitor.step."""
    returned = []
    for step, batch in enumerate(itertools.islice(batches or draws(), steps)):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        before(step)
        if monitor is not None:
            returned.append(monitor.step(batch, loss=loss.detach() if pass_loss else None))
        optimizer.step()
    return returned


def loud(alerts: list[Alert]) -> list[Alert]:
    return [alert for alert in alerts if alert.severity != "info"]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# Records


def test_step_returns_the_record_when_a_probe_was_due():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    returned = train(model, optimizer, monitor, 12)
    assert [t for t, record in enumerate(returned) if record is not None] == DENSE
    assert [record for record in returned if record is not None] == monitor.history
    assert [record.step for record in monitor.history] == DENSE


def test_a_records_step_counts_the_steps_the_optimizer_has_taken():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    batches = draws()
    for call in range(9):
        optimizer.zero_grad()
        batch = next(batches)
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        if call % 3:  # every third step is left out
            optimizer.step()
    assert [record.step for record in monitor.history] == [0, 1, 2, 3, 4, 5]


def test_a_record_holds_what_the_step_was_trained_on():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    batch = next(draws())
    loss = cross_entropy(model, batch)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    record = monitor.step(batch)
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record["loss"].value == record.loss
    assert record["grad_norm"].value == pytest.approx(norm.item(), rel=1e-5)
    assert record.lr == (0.05,)
    assert record.provenance["mode"] == "train"
    assert record.provenance["items"] == 64


def test_the_margin_is_rate_times_curvature_over_the_limit_of_the_optimizer():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 10)
    for record in monitor.history:
        margin, top = record["stability_margin"], record["lambda_max"]
        assert margin.value == pytest.approx(0.05 * top.value / (2 * (1 + 0.9)), rel=1e-5)


def test_scalars_are_flat_and_finite_under_the_prefix():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 4)
    record = monitor.history[-1]
    flat = record.scalars()
    assert all(type(v) is float and math.isfinite(v) for v in flat.values())
    held = {n for n in record if record[n].status == "held"}
    assert {"trace", "batch_sharpness"} <= held  # a tracker would take them for measured now
    fresh = [n for n in record if n not in held]
    expected = {f"geom/{n}" for n in fresh if record[n].value is not None}
    expected |= {f"geom/{n}_error" for n in fresh if record[n].error is not None}
    assert set(flat) == expected | {"geom/probe_seconds"}
    assert {"geom/loss", "geom/lambda_max", "geom/lambda_max_error"} <= set(flat)
    assert "curvature.loss" in record.scalars("curvature.")
    assert len(record.scalars("")) == len(flat)


def test_held_values_carry_their_age():
    model = mlp(64, 16, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = Monitor(model, cross_entropy, optimizer, every=2)
    train(model, optimizer, monitor, 12)
    measured: dict[str, tuple[int, float]] = {}
    ages = []
    for record in monitor.history:
        for name, estimate in record.estimates.items():
            if estimate.status == "held":
                step, value = measured[name]
                assert (estimate.age, estimate.value, estimate.hvps) == (
                    record.step - step,
                    value,
                    0,
                )
                ages.append(estimate.age)
            elif estimate.value is not None:
                assert estimate.age == 0
                measured[name] = (record.step, estimate.value)
    assert max(ages) >= 5  # Adam's margin needs its own operator, so lambda_max is left to rest


def test_named_quantities_are_measured_at_every_probe():
    model, optimizer = small()
    names = ["lambda_min", "loss"]
    monitor = Monitor(model, cross_entropy, optimizer, how=Measurement(quantities=names), every=3)
    train(model, optimizer, monitor, 30)
    assert len(monitor.history) == 10
    for record in monitor.history:
        assert list(record) == names
        assert {record[name].status for name in names} == {"ok"}


def test_difficulty_grows_by_rate_times_gradient_squared_times_curvature():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    train(model, optimizer, monitor, 6)
    so_far = 0.0
    for record in monitor.history:
        assert record["difficulty"].value == pytest.approx(so_far, rel=1e-4)
        so_far += 0.05 * record["grad_norm"].value ** 2 * record["lambda_max"].value
    assert so_far > 0


# The window that a step averages over


def test_a_window_of_micro_batches_measures_like_their_union():
    # Few enough parameters for Lanczos to be exact.
    inputs, targets = digits(64)
    parts = list(zip(inputs.split([16, 8, 40]), targets.split([16, 8, 40]), strict=True))
    records = {}
    for way in ("window", "union"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(4), nn.Flatten())
        model.append(nn.Linear(4, 10, bias=False)).append(nn.AvgPool1d(5))
        optimizer = sgd(model)
        monitor = Monitor(model, lambda m, b: cross_entropy(m, (b[0], b[1] % 2)), optimizer)
        for part in parts:
            (len(part[0]) / 64 * cross_entropy(model, (part[0], part[1] % 2))).backward()
            if way == "window":
                monitor.observe(part)
        records[way] = monitor.step(None if way == "window" else (inputs, targets))
    for name in ("loss", "grad_norm", "lambda_max", "stability_margin", "batch_sharpness"):
        window, union = records["window"][name].value, records["union"][name].value
        assert window == pytest.approx(union, rel=1e-5), name
    assert records["window"].provenance["items"] == 64


def test_a_window_ends_with_its_step():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    first, second = itertools.islice(draws(size=16), 2)
    for batch in (first, second):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.observe(batch)
        record = monitor.step()
        assert record.provenance["items"] == 16
        optimizer.step()


def test_a_probe_batch_is_measured_instead_of_the_steps_own():
    model, optimizer = small()
    probe_batch = digits(100)
    monitor = Monitor(model, cross_entropy, optimizer, how=Measurement(batch=probe_batch))
    for batch in itertools.islice(draws(), 4):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        expected = cross_entropy(model, probe_batch).item()
        record = monitor.step()
        assert record.loss == pytest.approx(expected, rel=1e-6)
        assert record.provenance["items"] == 100
        optimizer.step()


# Wrong use is said at the first call


def test_a_call_without_gradients_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    with pytest.raises(UsageError, match=r"must find gradients, got none.*after loss.backward\(\)"):
        monitor.step(digits(8))


def test_a_call_after_the_optimizer_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, digits(8)).backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"must come before optimizer.step\(\), got a gradient"):
        monitor.step(digits(8))


def test_a_call_without_a_batch_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, digits(8)).backward()
    with pytest.raises(UsageError, match=r"must know the batch, got none.*observe\(batch\)"):
        monitor.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": cross_entropy}, r"model must be a torch.nn.Module, got _Supervised"),
        ({"loss_fn": 3}, r"loss_fn must be callable as loss_fn\(model, batch\), got int"),
        ({"mode": "test"}, r'mode must be "train" or "eval", got \'test\''),
        ({"every": 0}, r"every must be an integer >= 1, got 0"),
        ({"schedule": "fixed"}, r"Write:\n    Monitor\(model, loss_fn, optimizer, every=100\)"),
        ({"budget": 0}, r"budget must be a share .* got 0"),
        ({"budget": "5%"}, r"budget must be a share .* got '5%'"),
        ({"budget": 5}, r"budget must be a share .* got 5\. Did you mean 0\.05\?"),
        ({"quantities": ["sharpness"]}, r"list of known names, got 'sharpness'"),
    ],
)
def test_an_option_that_cannot_work_is_refused_at_construction(options, message):
    model, optimizer = small()
    arguments = {"model": model, "loss_fn": cross_entropy, "optimizer": optimizer, **options}
    with pytest.raises(UsageError, match=message):
        Monitor(**faced(arguments))


def test_a_loss_for_each_item_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, digits(8)).backward()
    with pytest.raises(UsageError, match=r"loss and grad_norm must be scalars .* got shape \(8,\)"):
        monitor.step(digits(8), loss=torch.zeros(8))


@pytest.mark.parametrize(("steps", "told"), [(10, True), (11, False)])
def test_a_run_that_ends_before_its_second_probe_is_told_of(caplog, steps, told):
    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer, every=10) as monitor:
        train(model, optimizer, monitor, steps)
        assert not caplog.records
    monitor.close()
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert messages == told * [
        "every must be smaller than the run, got every=10 for 10 steps: only the first was probed. "
        "Pass every=1, say, or leave it out."
    ]


# Probes that fail


class Failing:
    """A loss that works in training and raises in probes while `broken`."""

    def __init__(self) -> None:
        self.broken = True

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.broken and geomwatch.is_probing():
            raise RuntimeError("no second helping")
        return cross_entropy(model, batch)


def test_a_failing_probe_is_reported_once_and_training_goes_on(caplog):
    loss_fn = Failing()
    model, optimizer = small()
    monitor = Monitor(model, loss_fn, optimizer)
    train(model, optimizer, monitor, 30, loss_fn=loss_fn)
    bare, bare_optimizer = small()
    train(bare, bare_optimizer, None, 30)
    assert torch.equal(weights(model), weights(bare))
    failed, paused = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "step 0: a probe failed with RuntimeError: no second helping" in failed.getMessage()
    assert "step 2: probing is paused after 3 failed probes" in paused.getMessage()
    assert not monitor.history


def test_probes_go_on_after_resume_or_when_failures_are_few():
    loss_fn = Failing()
    model, optimizer = small()
    monitor = Monitor(model, loss_fn, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 2, batches=batches, loss_fn=loss_fn)
    loss_fn.broken = False
    train(model, optimizer, monitor, 2, batches=batches, loss_fn=loss_fn)
    assert [r.step for r in monitor.history] == [2, 3]
    loss_fn.broken = True
    train(model, optimizer, monitor, 30, batches=batches, loss_fn=loss_fn)
    assert [r.step for r in monitor.history] == [2, 3]
    loss_fn.broken = False
    train(model, optimizer, monitor, 3, batches=batches, loss_fn=loss_fn)
    assert [r.step for r in monitor.history] == [2, 3]  # still paused
    monitor.resume()
    train(model, optimizer, monitor, 30, batches=batches, loss_fn=loss_fn)
    assert len(monitor.history) > 2
    assert monitor.history[2].step >= 37


@pytest.mark.parametrize("error", [MemoryError("full"), KeyError("label"), AssertionError("oops")])
def test_whatever_a_loss_raises_in_a_probe_training_goes_on(error, caplog):
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if geomwatch.is_probing():
            raise error
        return cross_entropy(model, batch)

    model, optimizer = small()
    train(model, optimizer, Monitor(model, loss_fn, optimizer), 3, loss_fn=loss_fn)
    assert f"{type(error).__name__}: {error}" in caplog.text


# NaN and left-out steps


def test_a_run_outlives_nan_and_is_measured_again_once_it_is_mended():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    kept: dict[str, Any] = {}

    def break_and_mend(step: int) -> None:
        if step == 6:
            kept.update(copy.deepcopy({"model": model.state_dict(), "sgd": optimizer.state_dict()}))

    batches = draws()
    train(model, optimizer, monitor, 7, batches=batches, before=break_and_mend)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    train(model, optimizer, monitor, 3, batches=batches)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["sgd"])
    train(model, optimizer, monitor, 5, batches=batches)
    monitor.close()
    assert [(a.rule, a.severity, a.step) for a in loud(monitor.alerts)] == [
        ("non_finite", "critical", 7)
    ]
    assert [r.step for r in monitor.history] == list(range(15))
    for record in monitor.history[7:10]:
        assert math.isnan(record.loss)
        assert record["lambda_max"].status == "failed"
        assert "not finite" in record["lambda_max"].reason
        assert not any(math.isnan(v) for v in record.scalars().values())
    for record in monitor.history[:7] + monitor.history[10:]:
        assert record["lambda_max"].value > 0
        assert record["stability_margin"].status == "ok"


def test_a_loss_that_the_loop_passes_is_judged_a_step_later_or_at_the_end():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 12, batches=batches)
    batch = next(batches)
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    monitor.step(batch, loss=math.nan)
    optimizer.step()
    assert not monitor.alerts
    monitor.close()
    assert [(a.rule, a.step) for a in monitor.alerts] == [("non_finite", 12)]


@pytest.mark.parametrize("convert", [float, torch.tensor, lambda x: torch.tensor([x])])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_loss_and_norm_are_tensors_or_numbers(name, convert):
    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer) as monitor:
        for value in (1.0, 1.0, math.inf):
            optimizer.zero_grad()
            cross_entropy(model, digits(8)).backward()
            monitor.step(digits(8), **{name: convert(value)})
            optimizer.step()
    assert [(a.rule, a.severity, a.step) for a in monitor.alerts] == [("non_finite", "critical", 2)]


def test_a_loss_need_not_be_detached():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, rules=[])
    for batch in itertools.islice(draws(), 3):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss)
        optimizer.step()
    assert [r.step for r in monitor.history] == [0, 1, 2]


def test_gradients_that_are_still_scaled_are_recognised():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monitor = Monitor(model, cross_entropy, optimizer)
    batch = next(draws())
    scaler.scale(cross_entropy(model, batch)).backward()
    with pytest.raises(
        UsageError, match=r"got gradients 2\^16 times .* scaler.unscale_\(optimizer"
    ):
        monitor.step(batch)


def test_unscaled_gradients_are_taken():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monitor = Monitor(model, cross_entropy, optimizer)
    for batch in itertools.islice(draws(), 4):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        monitor.step(batch, grad_norm=norm)
        scaler.step(optimizer)
        scaler.update()
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]
    assert not monitor.alerts


def test_gradients_that_nothing_unscales_are_measured_through_their_scale():
    records = {}
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = mlp(64, 16, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monitor = Monitor(model, cross_entropy, optimizer)
        for batch in itertools.islice(draws(), 6):
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model, batch)).backward()
            before = model[0].weight.grad.clone()
            monitor.step(batch, grad_scale=scaler.get_scale())
            assert torch.equal(model[0].weight.grad, before)
            scaler.step(optimizer)
            scaler.update()
        records[scale] = monitor.history
    assert len(records[1.0]) == 5
    for plain, scaled in zip(*records.values(), strict=True):
        assert scaled.estimates == plain.estimates  # a power of two divides exactly
    assert plain["stability_margin"].value > 0
    assert plain["difficulty"].value > 0


def test_left_out_steps_are_information_and_five_are_critical():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    infinite = {2, 3, 7, 8, 9, 10, 11, 12}
    heard = {}
    for call, batch in enumerate(itertools.islice(draws(), 16)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch)).backward()
        if call in infinite:
            model[0].bias.grad[0] = math.inf
        scaler.unscale_(optimizer)
        monitor.step(batch)
        heard[call] = [(a.rule, a.severity) for a in monitor.alerts]
        scaler.step(optimizer)
        scaler.update()
    assert heard[3] == [("non_finite", "info")]  # the call after the first
    assert heard[11] == [("non_finite", "info")] * 2
    assert heard[15] == heard[12] == [("non_finite", "info")] * 2 + [("non_finite", "critical")]
    steps = [r.step for r in monitor.history]
    assert steps == list(range(16 - len(infinite)))  # no step is probed twice


def test_an_infinite_gradient_that_is_stepped_with_is_critical():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, rules=[NonFinite()])

    def spoil(step: int) -> None:
        if step == 9:
            model[0].bias.grad[0] = math.inf

    train(model, optimizer, monitor, 11, before=spoil, pass_loss=False)
    assert "stepped with it" in monitor.alerts[0].message
    assert (monitor.alerts[0].step, monitor.alerts[0].severity) == (9, "critical")


def test_sparse_gradients_do_not_stop_a_run():
    model = nn.Sequential(nn.Embedding(17, 4, sparse=True), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = (((16 * x).long(), y) for x, y in draws())
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 10, batches=batches)
    monitor.close()
    assert [r.step for r in monitor.history] == DENSE
    assert monitor.history[-1]["stability_margin"].value > 0


# Alerts


def test_a_jump_of_the_rate_is_critical_before_the_step_that_it_ruins():
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=0.1)
    monitor = Monitor(model, cross_entropy, optimizer)

    def jump(step: int) -> None:
        if step == 60:
            assert not monitor.alerts
            optimizer.param_groups[0]["lr"] *= 30

    batches = draws()
    train(model, optimizer, monitor, 60, batches=batches, before=jump)
    batch = next(batches)
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    jump(60)
    record = monitor.step(batch)
    assert record.step == 60
    assert [(a.rule, a.severity, a.step) for a in record.alerts] == [
        ("stability_margin", "critical", 60),
        ("gradient_margin", "warning", 60),
        ("rate_jump", "critical", 60),
    ]
    assert record.alerts[0].value > 2
    assert "learning rate 3 is beyond" in record.alerts[0].message


class Listening(NonFinite):
    """Notes what rules get to see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Observation] = []

    def __call__(self, seen: Observation) -> None:
        self.seen.append(seen)


def test_between_probes_rules_see_the_last_margin_at_the_present_rate():
    model, optimizer = small()
    rule = Listening()
    monitor = Monitor(model, cross_entropy, optimizer, every=5, rules=[rule])

    def ramp(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + 0.1 * step)

    train(model, optimizer, monitor, 10, before=ramp)
    assert [seen.fresh for seen in rule.seen] == [True, *[False] * 4] * 2
    for step, seen in enumerate(rule.seen):
        record = monitor.history[step // 5]
        margin, growth = record["stability_margin"], (10 + step) / (10 + record.step)
        assert seen.margin.value == pytest.approx(growth * margin.value)
        assert seen.margin.error == pytest.approx(growth * margin.error)
        assert (seen.index, seen.lr) == (step, (0.05 * (1 + 0.1 * step),))


def test_alerts_go_to_the_list_the_record_the_callback_and_the_log(caplog):
    told: list[Alert] = []
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=20.0)
    monitor = Monitor(model, cross_entropy, optimizer, on_alert=told.append)
    train(model, optimizer, monitor, 3)
    assert told == monitor.alerts
    assert [a for r in monitor.history for a in r.alerts] == told
    first = next(alert for alert in told if alert.severity == "critical")
    critical = [r.getMessage() for r in caplog.records if r.levelno == logging.CRITICAL]
    assert critical[0] == f"step {first.step}: {first.message}"


def test_layers_are_named_in_a_margin_alert():
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=20.0)
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 3)
    alert = next(a for a in monitor.alerts if a.rule == "stability_margin")
    assert {layer.split(" ")[0] for layer in alert.layers} <= {"0", "2"}
    assert alert.layers[0] in alert.message


class Talkative(NonFinite):
    """Has something to say at every step."""

    name = "talkative"

    def __call__(self, seen: Observation) -> Alert:
        return Alert(self.name, "info", "another step", 1.0, 1.0, seen.index)


class Broken(NonFinite):
    """A callback, sink or rule that raises whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, message: Any) -> None:
        self.calls += 1
        raise OSError("disk full")


@pytest.mark.parametrize("part", ["on_alert", "sinks", "rules"])
def test_a_callback_sink_or_rule_that_raises_does_not_stop_the_run(part, caplog):
    broken = Broken()
    model, optimizer = small()
    told: list[Alert] = []
    options: dict[str, Any] = {"on_alert": told.append, "rules": [Talkative()]}
    parts = {"on_alert": broken, "sinks": [broken], "rules": [broken, Talkative()]}
    monitor = Monitor(model, cross_entropy, optimizer, **faced(options | {part: parts[part]}))
    train(model, optimizer, monitor, 12)
    assert broken.calls >= 12
    assert len(monitor.alerts) == 12
    assert len(told) == (0 if part == "on_alert" else 12)
    assert [r.step for r in monitor.history] == DENSE
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "failed with OSError: disk full" in warnings[0]


def test_a_sink_that_cannot_be_closed_does_not_stop_the_program(caplog):
    class Stuck:
        def __call__(self, line: dict[str, Any]) -> None:
            pass

        def close(self) -> None:
            raise OSError("stale file handle")

    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer, sinks=[Stuck()]) as monitor:
        train(model, optimizer, monitor, 2)
    assert "failed with OSError: stale file handle" in caplog.text


# How much, and when not


def test_the_environment_switches_everything_off(monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    lines: list[dict[str, Any]] = []
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=20.0)
    with Monitor(model, cross_entropy, optimizer, sinks=[lines.append]) as monitor:
        monitor.observe(digits(8))
        assert train(model, optimizer, monitor, 20) == [None] * 20
    assert [monitor.history, monitor.alerts, lines] == [[], [], []]


@pytest.mark.parametrize("value", ["", "0"])
def test_the_environment_can_also_leave_it_on(value, monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", value)
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 1)
    assert len(monitor.history) == 1


def test_pause_stops_probes_and_resume_starts_them_again():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=5)
    batches = draws()
    train(model, optimizer, monitor, 8, batches=batches)
    monitor.pause()
    train(model, optimizer, monitor, 8, batches=batches)
    monitor.resume()
    train(model, optimizer, monitor, 8, batches=batches)
    assert [r.step for r in monitor.history] == [0, 5, 16, 20]  # at once, then on its grid


def test_a_paused_monitor_still_watches_the_loss():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 3, batches=batches)
    monitor.pause()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    train(model, optimizer, monitor, 3, batches=batches)
    assert [(a.rule, a.step) for a in monitor.alerts] == [("non_finite", 3)]


def test_close_takes_the_hook_off_the_optimizer_and_may_be_called_twice():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    train(model, optimizer, monitor, 2)
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks
    alerts = list(monitor.alerts)
    monitor.close()
    assert monitor.alerts == alerts


def test_leaving_the_with_block_closes_the_monitor_also_on_an_error():
    model, optimizer = small()
    with pytest.raises(KeyboardInterrupt, match="enough"):  # noqa: SIM117
        with Monitor(model, cross_entropy, optimizer):
            raise KeyboardInterrupt("enough")
    assert not optimizer._optimizer_step_post_hooks


def test_close_closes_the_sinks_that_can_be_closed():
    class Tracker:
        closed = False

        def __call__(self, line: dict[str, Any]) -> None:
            assert not self.closed

        def close(self) -> None:
            self.closed = True

    model, optimizer = small()
    tracker, lines = Tracker(), []
    with Monitor(model, cross_entropy, optimizer, sinks=[tracker, lines.append]) as monitor:
        train(model, optimizer, monitor, 2)
        assert not tracker.closed
    assert tracker.closed
    assert lines


# Checkpoints


def checkpoint(**parts: Any) -> dict[str, Any]:
    """Through a file and back, the safe way."""
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Whether samples show an effective rank is up to them: a cold start draws others.
BY_CHANCE = {"effective_rank"}


def measured(record: Record) -> set[str]:
    # The running trace is relative to a lambda_max held from before, and may have to start anew.
    ok = {name for name in record if record[name].status == "ok"}
    return ok - {"trace", "trace_per_param"} - BY_CHANCE


def ages(record: Record) -> dict[str, int]:
    return {n: e.age for n, e in record.estimates.items() if n not in BY_CHANCE}


@pytest.mark.parametrize("every", [None, 7])
@pytest.mark.parametrize("kind", [sgd, lambda m: torch.optim.Adam(m.parameters(), lr=3e-3)])
def test_a_resumed_run_measures_what_the_uninterrupted_run_does(kind, every):
    def start() -> tuple[nn.Module, Any, Monitor]:
        torch.manual_seed(0)
        model = mlp(64, 16, 10)
        optimizer = kind(model)
        return model, optimizer, Monitor(model, cross_entropy, optimizer, every=every)

    model, optimizer, whole = start()
    train(model, optimizer, whole, 80)

    model, optimizer, first = start()
    batches = draws()
    train(model, optimizer, first, 45, batches=batches)
    saved = checkpoint(model=model, optimizer=optimizer, monitor=first)
    model, optimizer, second = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["monitor"])
    train(model, optimizer, second, 35, batches=batches)

    expected = [r for r in whole.history if r.step >= 45]
    assert len(expected) >= (5 if every else 1)
    assert [r.step for r in second.history] == [r.step for r in expected]
    for resumed, record in zip(second.history, expected, strict=True):
        assert resumed.loss == record.loss
        assert resumed["grad_norm"].value == record["grad_norm"].value
        assert measured(resumed) == measured(record)
        assert ages(resumed) == ages(record)
        margin, other = resumed["stability_margin"], record["stability_margin"]
        # few HVPs, from other start vectors: a residual bounds the distance to some eigenvalue
        spread = margin.error + other.error + 0.2 * other.value
        assert abs(margin.value - other.value) <= spread
    assert second.history[-1]["difficulty"].value > first.history[-1]["difficulty"].value


def test_the_memory_of_the_rules_survives_a_checkpoint():
    model, optimizer = small()
    rates = itertools.chain([0.05] * 20, itertools.repeat(1.2))

    def raise_rate(step: int) -> None:
        optimizer.param_groups[0]["lr"] = next(rates)

    monitor = Monitor(model, cross_entropy, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 40, batches=batches, before=raise_rate)
    before = loud(monitor.alerts)
    assert before
    second = Monitor(model, cross_entropy, optimizer)
    second.load_state_dict(checkpoint(monitor=monitor)["monitor"])
    assert second.state_dict()["dispatch"] == monitor.state_dict()["dispatch"]
    assert second.state_dict()["step"] == 40


def test_a_checkpoint_of_other_rules_is_refused():
    model, optimizer = small()
    saved = Monitor(model, cross_entropy, optimizer, rules=[NonFinite()]).state_dict()
    with pytest.raises(
        UsageError, match=r"state must be of rules \[.*loss_rise.*\], got \['non_finite'\]"
    ):
        Monitor(model, cross_entropy, optimizer).load_state_dict(saved)


# Living with others


def test_two_monitors_on_one_optimizer_do_not_disturb_each_other():
    def run(*everys: int) -> tuple[Tensor, list[Monitor]]:
        model, optimizer = small()
        monitors = [Monitor(model, cross_entropy, optimizer, every=every) for every in everys]
        for batch in itertools.islice(draws(), 40):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            for monitor in monitors:
                monitor.step(batch)
            optimizer.step()
        return weights(model), monitors

    bare, _ = run()
    both, pair = run(7, 20)
    assert torch.equal(both, bare)
    for together, every in zip(pair, (7, 20), strict=True):
        _, (alone,) = run(every)
        assert [r.step for r in together.history] == [r.step for r in alone.history]
        for record, other in zip(together.history, alone.history, strict=True):
            assert dict(record.estimates) == dict(other.estimates)


class HandMade:
    """Gradient descent by somebody who does not derive from torch.optim.Optimizer."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": lr}]

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * p.grad


def test_an_optimizer_without_hooks_is_counted_by_calls_and_has_no_known_limit():
    model = mlp(64, 16, 10)
    optimizer = HandMade(model, lr=0.1)
    with Monitor(model, cross_entropy, optimizer) as monitor:
        train(model, optimizer, monitor, 60)
    assert [r.step for r in monitor.history][:6] == DENSE
    for record in monitor.history:
        margin = record["stability_margin"]
        assert margin.status == "unknown"
        assert "no stability formula for HandMade" in margin.reason
        assert margin.value == pytest.approx(0.1 * record["lambda_max"].value, rel=0.05)
    assert not monitor.alerts


def test_a_hand_made_optimizer_that_breaks_down_is_warned_of():
    model = mlp(64, 16, 10)
    optimizer = HandMade(model, lr=0.1)
    monitor = Monitor(model, cross_entropy, optimizer)

    def ramp(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * 1.04 ** max(step - 150, 0)

    train(model, optimizer, monitor, 300, before=ramp)
    assert "stability_margin" in {a.rule for a in loud(monitor.alerts)}


def test_the_optimizer_can_be_copied_and_pickled_while_it_is_watched():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 3)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        twin.zero_grad()
        twin.step()
    train(model, optimizer, monitor, 1)
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]


def test_a_forgotten_monitor_is_freed_although_the_optimizer_lives_on():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 3)
    alive = [weakref.ref(monitor), weakref.ref(monitor._counter)]
    del monitor
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    train(model, optimizer, None, 2)


# Whole runs


def convnet(*, norm: bool) -> nn.Module:
    def block(fan_in: int, fan_out: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=not norm)
        return [layer, *([nn.BatchNorm2d(fan_out)] if norm else []), nn.ReLU()]

    blocks = [*block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 1)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.Flatten(), nn.Linear(512, 10))


def test_the_scale_of_weights_before_a_batchnorm_does_not_move_the_margin():
    records = []
    for scale in (1.0, 0.3):
        torch.manual_seed(0)
        model = convnet(norm=True)
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Conv2d):
                    layer.weight *= scale
        optimizer = sgd(model)
        monitor = Monitor(model, cross_entropy, optimizer)
        train(model, optimizer, monitor, 1)
        records.append(monitor.history[0])
    one, other = records
    assert other["lambda_max"].value > 3 * one["lambda_max"].value
    assert other["stability_margin"].value == pytest.approx(one["stability_margin"].value, rel=0.05)


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (lambda: mlp(64, 128, 64, 10), sgd),
        (lambda: mlp(64, 128, 64, 10), adam),
        (lambda: convnet(norm=False), lambda m: sgd(m, lr=0.02)),
        (lambda: convnet(norm=True), sgd),
        (lambda: convnet(norm=True), lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3)),
        (lambda: mlp(64, 128, 64, 10), lambda m: HandMade(m, lr=0.1)),
    ],
    ids=["mlp sgd", "mlp adam", "conv sgd", "batchnorm sgd", "batchnorm adamw", "mlp hand-made"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_raises_no_warning(build, make, seed):
    torch.manual_seed(seed)
    model = build()
    optimizer = make(model)
    with Monitor(model, cross_entropy, optimizer) as monitor:
        train(model, optimizer, monitor, 150, batches=draws(seed))
    inputs, targets = digits(1797)
    assert F.cross_entropy(model(inputs), targets) < 0.8  # it has learnt something
    assert not loud(monitor.alerts)


def test_full_batch_training_at_the_edge_of_stability_raises_no_warning():
    torch.manual_seed(0)
    model, batch = mlp(64, 32, 10, activation=nn.Tanh), digits(400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def half_square(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean() / 2

    with Monitor(model, half_square, optimizer) as monitor:
        train(model, optimizer, monitor, 300, batches=itertools.repeat(batch), loss_fn=half_square)
    assert not loud(monitor.alerts)
    assert [a.severity for a in monitor.alerts] == ["info"]
    assert max(r["stability_margin"].value for r in monitor.history if r.step > 100) > 1


@pytest.mark.parametrize(
    ("build", "start"), [(lambda: mlp(64, 128, 64, 10), 0.02), (lambda: convnet(norm=False), 0.01)]
)
def test_a_rate_that_is_ramped_until_it_breaks_is_warned_of_before(build, start):
    torch.manual_seed(0)
    model = build()
    optimizer = sgd(model, start)
    losses: list[float] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model, batch)
        if not geomwatch.is_probing():
            losses.append(loss.item())
        return loss

    def ramp(step: int) -> None:
        optimizer.param_groups[0]["lr"] = start * 1.02**step

    monitor = Monitor(model, loss_fn, optimizer)
    train(model, optimizer, monitor, 230, before=ramp, loss_fn=loss_fn)
    blow_up = next(t for t, x in enumerate(losses) if t > 10 and not x <= losses[0] + 0.5)
    assert loud(monitor.alerts)[0].step < blow_up


def test_the_options_that_hosts_pass_on_are_those_of_the_monitor() -> None:
    own = [name for name in inspect.signature(Monitor).parameters if name != "gone"]
    assert own == ["model", "loss_fn", "optimizer", *Options.__annotations__]
    assert len(own) == 10
