"""watch() in training loops on the real accelerate: what is measured, and that nothing changes."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geomwatch
from geomwatch.integrations.accelerate import watch
from geomwatch.rules import Observation

FIXED = {"every": 1}


class Listener:
    """A rule that finds nothing and keeps what it saw of each step."""

    name = "listener"

    def __init__(self) -> None:
        self.losses: list[float | None] = []
        self.norms: list[float] = []

    def __call__(self, seen: Observation) -> None:
        if seen.settled is not None:
            self.losses.append(seen.settled.loss)
            self.norms.append(seen.settled.grad_norm)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def normalized(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 10)
    )


def tiny() -> nn.Module:
    """Ten parameters, few enough for Lanczos to be exact."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2), nn.Tanh()
    )


def parity(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1] % 2)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def cut(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = digits(sum(sizes))
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def one_step(accelerator, monitor, model, optimizer, micro_batches, loss_fn=cross_entropy):
    """Return what monitor.step returned for each micro-batch."""
    returned = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            returned.append(monitor.step(batch, loss=loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    return returned


def prepare(accelerator, model, *, loss_fn=cross_entropy, **options):
    """Return a monitor with the prepared model and SGD optimizer that it watches."""
    model, optimizer = accelerator.prepare(model, sgd(model))
    return watch(accelerator, model, loss_fn, optimizer, **options), model, optimizer


@contextlib.contextmanager
def prepared_watch(accelerator, model, **options):
    monitor, model, optimizer = prepare(accelerator, model, **options)
    with monitor:
        yield monitor, model, optimizer


def lambda_max(record: geomwatch.Record) -> float:
    value = record["lambda_max"].value
    assert value is not None
    assert value > 0
    return value


def one_window(accelerator, model: nn.Module, sizes: list[int], **options: Any) -> float:
    """Return lambda_max of one window of micro-batches."""
    monitor, model, optimizer = prepare(accelerator, model, loss_fn=parity, **FIXED, **options)
    *_, record = one_step(accelerator, monitor, model, optimizer, cut(sizes), parity)
    return lambda_max(record)


def epochs(loader: DataLoader, count: int) -> Iterator[Any]:
    for _ in range(count):
        yield from loader


def run(accelerator, *, clip: float | None = None, **options: Any) -> dict[str, Any]:
    """Train on shuffled digits; the last batch of an epoch is shorter, and so is its last window.

    Without options nothing watches.
    """
    model = normalized()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    loader = DataLoader(TensorDataset(*digits(200)), batch_size=16, shuffle=True)
    prepared = accelerator.prepare(model, optimizer, loader, scheduler)
    model, optimizer, loader, scheduler = prepared
    monitor = watch(accelerator, model, cross_entropy, optimizer, **options) if options else None
    losses, returned = [], []
    for batch in epochs(loader, 2):
        with accelerator.accumulate(model):
            loss = cross_entropy(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            if monitor is not None:
                returned.append(monitor.step(batch, loss=loss.detach()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "trained": {
            "weights": dict(model.named_parameters()),
            "buffers": dict(model.named_buffers()),
            "optimizer": optimizer.state_dict(),
            "rate": scheduler.get_last_lr(),
            "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": losses,
        },
        "returned": returned,
        "monitor": monitor,
    }


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# No trace


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (2, 0.5), (3, None)])
def test_training_is_bit_identical_when_watched(make_accelerator, precision, accumulation, clip):
    runs = []
    for options in ({}, {"every": 2}):
        accelerator = make_accelerator(
            mixed_precision=precision, gradient_accumulation_steps=accumulation
        )
        runs.append(run(accelerator, clip=clip, **options))
    assert len(runs[1]["monitor"].history) >= 5
    assert same(runs[0]["trained"], runs[1]["trained"])


def test_a_compiled_model_is_measured_and_stays_compiled(make_accelerator):
    accelerator = make_accelerator(dynamo_backend="eager")
    module = mlp(64, 16, 10)
    model, optimizer = accelerator.prepare(module, sgd(module))
    monitor = watch(accelerator, model, cross_entropy, optimizer, **FIXED)
    one_step(accelerator, monitor, model, optimizer, cut([32, 32]))
    assert [record["lambda_max"].status for record in monitor.history] == ["ok", "ok"]
    assert isinstance(model, torch._dynamo.OptimizedModule)
    assert model._orig_mod is module


def test_close_leaves_the_accelerator_as_it_was(accelerator):
    before = dict(vars(accelerator))
    for _ in range(2):
        with prepared_watch(accelerator, mlp(64, 8, 10)) as (monitor, *_):
            assert "clip_grad_norm_" in vars(accelerator)
        monitor.close()
        accelerator._models.clear()
        accelerator._optimizers.clear()
    assert vars(accelerator).keys() == before.keys()
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook


def test_a_clip_of_somebody_elses_is_called_and_put_back(accelerator):
    calls = []

    def clip(parameters, max_norm, norm_type=2):
        calls.append(max_norm)
        return torch.tensor(3.0)

    accelerator.clip_grad_norm_ = clip
    with prepared_watch(accelerator, mlp(64, 8, 10)) as (_, model, _):
        assert accelerator.clip_grad_norm_(model.parameters(), max_norm=0.5) == 3
    assert calls == [0.5]
    assert accelerator.clip_grad_norm_ is clip


def test_a_forgotten_monitor_does_not_keep_its_model_alive(accelerator):
    def attempt() -> weakref.ref:
        monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10))
        one_step(accelerator, monitor, model, optimizer, cut([8, 8]))
        accelerator.free_memory()
        return weakref.ref(model)

    forgotten = attempt()
    gc.collect()
    assert forgotten() is None
    assert prepare(accelerator, mlp(64, 8, 10))  # as find_executable_batch_size tries again


def test_geomwatch_disable_ties_nothing_to_the_accelerator(accelerator, monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    before = dict(vars(accelerator))
    monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10))
    assert one_step(accelerator, monitor, model, optimizer, cut([8, 8])) == [None, None]
    assert vars(accelerator).keys() == before.keys()
    monitor.close()


# The window that an optimizer step averages over


def test_every_counts_optimizer_steps_not_micro_batches(accelerator):
    listener = Listener()
    result = run(accelerator, every=3, rules=[listener])
    result["monitor"].close()
    steps = 2 * math.ceil(math.ceil(200 / 16) / 2)
    assert len(listener.losses) == steps == 14
    assert [r.step for r in result["monitor"].history] == [0, 3, 6, 9, 12]
    made = [t for t, record in enumerate(result["returned"]) if record is not None]
    assert made == [1, 7, 12, 18, 24]  # the first epoch ends with a window of one, its 13th
    assert len(made) == math.ceil(steps / 3)


@pytest.mark.parametrize("sizes", [[16, 16], [24, 8]])
def test_the_loss_measured_is_the_loss_trained_on(accelerator, sizes):
    monitor, model, optimizer = prepare(accelerator, normalized(dropout=0.0), **FIXED)
    losses = []
    for batch in cut(sizes):
        with accelerator.accumulate(model):
            loss = cross_entropy(model, batch)
            accelerator.backward(loss)
            losses.append(loss.item())
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            record = monitor.step(batch)
            optimizer.step()
    assert record.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert record["grad_norm"].value == pytest.approx(norm.item(), rel=2e-3)
    assert record.provenance["items"] == sum(sizes)


def test_lambda_max_is_that_of_measure_on_the_same_window(accelerator):
    model = tiny()
    expected = lambda_max(geomwatch.measure(model, parity, digits(32), optimizer=sgd(model)))
    assert one_window(accelerator, model, [16, 16]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_shorter_micro_batch_counts_as_much_as_accelerate_makes_it(accelerator, micro_batch):
    model = tiny()
    parts = cut([24, 8])

    def mean_of_both(model: nn.Module, batches: list[Any]) -> Tensor:
        return torch.stack([parity(model, batch) for batch in batches]).mean()

    expected = lambda_max(geomwatch.measure(model, mean_of_both, parts))
    joined = lambda_max(geomwatch.measure(model, parity, digits(32)))
    how = geomwatch.Measurement(micro_batch=micro_batch)
    found = one_window(accelerator, model, [24, 8], how=how)
    assert found == pytest.approx(expected, rel=2e-3)
    assert found != pytest.approx(joined, rel=1e-3)


def test_observe_and_a_step_at_the_end_of_the_window_do_too(make_accelerator):
    accelerator = make_accelerator()  # the loop accumulates by itself
    monitor, model, _ = prepare(accelerator, mlp(64, 8, 10), **FIXED)
    parts = cut([16, 16])
    for batch in parts:
        accelerator.backward(cross_entropy(model, batch) / 2)
        monitor.observe(batch)
    record = monitor.step(loss=1.0)
    assert record.provenance["items"] == 32
    assert record.loss == pytest.approx(
        sum(cross_entropy(model, b).item() for b in parts) / 2, rel=1e-6
    )


def test_a_probe_batch_is_measured_instead(accelerator):
    fixed = digits(50)
    monitor, model, optimizer = prepare(
        accelerator, mlp(64, 8, 10), how=geomwatch.Measurement(batch=fixed), **FIXED
    )
    expected = cross_entropy(model, fixed).item()
    _, record = one_step(accelerator, monitor, model, optimizer, cut([8, 8]))
    assert record.loss == pytest.approx(expected, rel=1e-6)
    assert record.provenance["items"] == 50


def test_rules_see_the_mean_of_the_losses_of_a_window(accelerator):
    listener = Listener()
    monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10), rules=[listener])
    losses: list[float | None] = [2.0, 3.0, 5.0, None]
    for loss, batch in zip(losses, cut([8] * 4), strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, batch))
            monitor.step(batch, loss=loss)
            optimizer.step()
    monitor.close()
    assert listener.losses == [2.5, None]


# Clipping


def clipped_run(accelerator, clip) -> tuple[list[float], list[float]]:
    """Return the norms that rules saw and those of the gradients before `clip`."""
    listener = Listener()
    monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10), rules=[listener], **FIXED)
    raw = []
    for batch in cut([8] * 6):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, batch))
            if accelerator.sync_gradients:
                raw.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            clip(accelerator, model, lambda batch=batch: monitor.step(batch))
            optimizer.step()
            optimizer.zero_grad()
    monitor.close()
    assert len(listener.norms) == 3
    return listener.norms, raw


def test_the_norm_before_clipping_is_known(accelerator):
    def clip(accelerator, model, probe):
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
        probe()

    seen, raw = clipped_run(accelerator, clip)
    assert min(raw) > 0.2
    assert seen == pytest.approx(raw, rel=2e-3)


def test_clipping_after_the_probe_says_nothing_about_the_next_one(accelerator):
    def clip(accelerator, model, probe):
        probe()
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.1)

    seen, raw = clipped_run(accelerator, clip)
    assert seen == pytest.approx(raw, rel=2e-3)
    assert len(set(raw)) == 3


@pytest.mark.parametrize("way", ["in parts", "by the largest entry", "by torch"])
def test_clipped_in_another_way_the_norm_is_that_of_the_step(accelerator, way):
    def clip(accelerator, model, probe):
        if accelerator.sync_gradients:
            if way == "in parts":
                for layer in (model[0], model[2]):
                    accelerator.clip_grad_norm_(layer.parameters(), 0.1)
            elif way == "by torch":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1 * math.sqrt(2))
            else:
                accelerator.clip_grad_norm_(model.parameters(), 1e-3, norm_type=math.inf)
        probe()

    seen, raw = clipped_run(accelerator, clip)
    bound = 1e-3 * math.sqrt(64 * 8 + 8 + 80 + 10) if "entry" in way else 0.1 * math.sqrt(2)
    assert max(seen) <= 1.001 * bound < min(raw)


def test_clipping_another_model_is_not_taken_for_ones_own(accelerator):
    other = mlp(64, 4, 10)
    cross_entropy(other, digits(8)).backward()

    def clip(accelerator, model, probe):
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            accelerator.clip_grad_norm_(other.parameters(), 0.1)
        probe()

    seen, raw = clipped_run(accelerator, clip)
    assert seen == pytest.approx(raw, rel=2e-3)


# A GradScaler, which accelerate makes for fp16 on a GPU only


def scaled(make_accelerator, scale: float):
    accelerator = make_accelerator(mixed_precision="fp16", gradient_accumulation_steps=2)
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return accelerator


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_training_through_a_scaler_is_bit_identical_when_watched(make_accelerator, scale, clip):
    bare = run(scaled(make_accelerator, scale), clip=clip)
    result = run(scaled(make_accelerator, scale), clip=clip, **FIXED)
    assert same(bare["trained"], result["trained"])
    steps = [record.step for record in result["monitor"].history]
    assert steps == list(range(len(steps)))  # a step that was left out is not probed twice
    assert len(steps) == 14 if scale < 2**20 else len(steps) < 14


def test_gradients_are_unscaled_for_the_margin_and_left_alone(make_accelerator):
    accelerator = scaled(make_accelerator, 2.0**10)
    listener = Listener()
    monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10), rules=[listener], **FIXED)
    for batch in cut([16, 16]):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, batch))
            before = [p.grad.clone() for p in model.parameters()]
            record = monitor.step(batch)
            assert same(before, [p.grad for p in model.parameters()])
    norm = nn.utils.get_total_norm(before).item() / 2.0**10
    monitor.close()
    assert listener.norms == pytest.approx([norm], rel=2e-3)
    assert record["grad_norm"].value == pytest.approx(norm, rel=2e-2)  # trained on in float16
    optimizer.step()
    assert model[0].weight.abs().max() < 1


@pytest.mark.parametrize("clip", [None, 1e9])
def test_the_margin_does_not_depend_on_the_scale(make_accelerator, clip):
    first = [
        run(scaled(make_accelerator, scale), clip=clip, **FIXED)["monitor"].history[0]
        for scale in (1.0, 2.0**10)
    ]
    margins = [record["stability_margin"].value for record in first]  # Adam divides by gradients
    assert margins[1] == pytest.approx(margins[0], rel=5e-2)
    assert margins[0] > 0


# Several at once, other ways to log


def test_monitors_of_a_group_log_under_their_names(make_accelerator):
    accelerator = make_accelerator()
    logged: list[tuple[int, set[str]]] = []
    accelerator.log = lambda values, step: logged.append((step, set(values)))
    models = {"generator": mlp(64, 8, 10), "discriminator": mlp(64, 4, 10)}
    parts = {name: prepare(accelerator, model, **FIXED) for name, model in models.items()}
    group = geomwatch.Group(**{name: monitor for name, (monitor, *_) in parts.items()})
    for monitor, model, optimizer in parts.values():
        one_step(accelerator, monitor, model, optimizer, cut([16]))
    group.close()
    assert [step for step, _ in logged] == [0, 0]
    for name, (_, keys) in zip(models, logged, strict=True):
        assert all(key.startswith(f"geom/{name}/") for key in keys)
        assert f"geom/{name}/lambda_max" in keys
    assert "clip_grad_norm_" not in vars(accelerator)


def test_records_go_where_log_takes_them(accelerator):
    seen: list[geomwatch.Record] = []
    monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10), log=seen.append, **FIXED)
    one_step(accelerator, monitor, model, optimizer, cut([8] * 4))
    assert seen == monitor.history
    assert len(seen) == 2


def test_a_tracker_that_fails_does_not_stop_the_run(accelerator, caplog):
    def log(values, step):
        raise ConnectionError("no route to host")

    accelerator.log = log
    monitor, model, optimizer = prepare(accelerator, mlp(64, 8, 10), **FIXED)
    returned = one_step(accelerator, monitor, model, optimizer, cut([8] * 4))
    assert [record is not None for record in returned] == [False, True] * 2
    told = [r.getMessage() for r in caplog.records if "could not be logged" in r.getMessage()]
    assert told == [
        "a record could not be logged: ConnectionError: no route to host. Training goes on."
    ]
