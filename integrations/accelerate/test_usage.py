"""watch() and monitor.step() used wrongly: each is said at once, with what to do."""

from __future__ import annotations

import builtins
import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import nn

from geomwatch import Measurement, UsageError
from geomwatch.controllers import LearningRateCap
from geomwatch.integrations.accelerate import AcceleratedMonitor, watch


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def prepared(accelerator):
    model = mlp(64, 8, 10)
    return accelerator.prepare(model, sgd(model))


def test_an_accelerator_must_be_one():
    model = mlp(64, 8, 10)
    with pytest.raises(UsageError, match=r"accelerator must be an accelerate.Accelerator, got Seq"):
        watch(model, model, cross_entropy, sgd(model))


def test_an_optimizer_must_be_prepared(accelerator):
    model, _ = prepared(accelerator)
    with pytest.raises(
        UsageError, match=r"optimizer must be prepared, got SGD. Call watch\(\) aft"
    ):
        watch(accelerator, model, cross_entropy, sgd(model))


def test_a_model_must_be_prepared(accelerator):
    model = mlp(64, 8, 10)
    optimizer = accelerator.prepare(sgd(model))
    with pytest.raises(UsageError, match=r"model must be prepared, got Sequential. Call watch\(\)"):
        watch(accelerator, model, cross_entropy, optimizer)


def test_an_optimizer_must_be_the_models_own(accelerator):
    model, _ = prepared(accelerator)
    _, other = prepared(accelerator)
    with pytest.raises(
        UsageError, match=r"optimizer must step the parameters of model, got SGD of"
    ):
        watch(accelerator, model, cross_entropy, other)


def test_an_optimizer_is_watched_once(accelerator):
    model, optimizer = prepared(accelerator)
    monitor = watch(accelerator, model, cross_entropy, optimizer)
    with pytest.raises(UsageError, match=r"watch\(\) must be called once for an optimizer"):
        watch(accelerator, model, cross_entropy, optimizer)
    monitor.close()
    watch(accelerator, model, cross_entropy, optimizer).close()


def test_a_host_that_steps_by_itself_is_refused(accelerator):
    model, optimizer = prepared(accelerator)
    deepspeed = SimpleNamespace(sync_gradients=True, distributed_type="DEEPSPEED")
    with pytest.raises(UsageError, match=r"before a step that the loop takes, got DEEPSPEED"):
        watch(deepspeed, model, cross_entropy, optimizer)


def test_processes_that_do_not_average_their_gradients_are_refused(accelerator):
    model, optimizer = prepared(accelerator)
    ranks = SimpleNamespace(sync_gradients=True, distributed_type="MULTI_CPU", num_processes=2)
    with pytest.raises(UsageError, match=r"averaged over 2 processes, got MULTI_CPU with Sequent"):
        watch(ranks, model, cross_entropy, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_fn": 3}, r"loss_fn must be callable as loss_fn\(model, batch\), got int"),
        ({"model": 3}, r"model must be a torch.nn.Module, got int"),
        ({"every": 0}, r"every must be an integer >= 1, got 0"),
        ({"mode": "eval"}, r"optimizer, how=Measurement\(mode='eval'\)"),
    ],
)
def test_an_option_that_cannot_work_is_refused_and_nothing_is_tied(accelerator, options, message):
    model, optimizer = prepared(accelerator)
    arguments = {"model": model, "loss_fn": cross_entropy, "optimizer": optimizer, **options}
    with pytest.raises(UsageError, match=message):
        watch(accelerator, **arguments)
    assert "clip_grad_norm_" not in vars(accelerator)


def test_an_optimizer_that_has_stepped_is_told_of(accelerator, caplog):
    model, optimizer = prepared(accelerator)
    cross_entropy(model, digits(8)).backward()
    optimizer.step()
    watch(accelerator, model, cross_entropy, optimizer).close()
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "call watch() before accelerator.load_state()" in told


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.AdamW, torch.optim.SGD])
def test_a_new_optimizer_has_not_stepped(accelerator, caplog, kind):
    model = mlp(64, 8, 10)
    model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
    watch(accelerator, model, cross_entropy, optimizer).close()
    assert not caplog.records


def test_one_item_does_for_a_list(make_accelerator, tmp_path):
    accelerator = make_accelerator()
    model, optimizer = prepared(accelerator)
    monitor = watch(
        accelerator,
        model,
        cross_entropy,
        optimizer,
        Measurement(also=nn.Dropout(), quantities="loss"),
        controllers=LearningRateCap(dry_run=True),
        sinks=str(tmp_path / "run.jsonl"),
    )
    accelerator.backward(cross_entropy(model, digits(8)))
    assert monitor.step(digits(8)) is not None
    monitor.close()
    assert (tmp_path / "run.jsonl").read_text().count('"kind": "record"') == 1


# The place of monitor.step()


def watched(accelerator, **options) -> tuple[nn.Module, torch.optim.Optimizer, AcceleratedMonitor]:
    model, optimizer = prepared(accelerator)
    return model, optimizer, watch(accelerator, model, cross_entropy, optimizer, **options)


def test_a_step_outside_accumulate_is_refused(accelerator):
    model, _, monitor = watched(accelerator)
    accelerator.backward(cross_entropy(model, digits(8)))
    with pytest.raises(
        UsageError, match=r"must be called inside .*, got none that was entered and .*steps=2"
    ):
        monitor.step(digits(8))


def test_a_step_under_sync_gradients_only_is_refused(accelerator):
    model, _, monitor = watched(accelerator)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, digits(8)))
    with pytest.raises(UsageError, match=r"must be called for each micro-batch, got one of 2"):
        monitor.step(digits(8))


def test_a_step_before_backward_is_refused_at_the_first_micro_batch(accelerator):
    model, _, monitor = watched(accelerator)
    with (
        accelerator.accumulate(model),
        pytest.raises(UsageError, match=r"must find gradients, got none. Call monitor.step\(batch"),
    ):
        monitor.step(digits(8))


def test_a_step_after_the_optimizer_is_refused(accelerator):
    model, optimizer, monitor = watched(accelerator)
    for part in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, digits(8)))
            optimizer.step()
            if part == 0:
                monitor.step(digits(8))
            else:
                with pytest.raises(
                    UsageError, match=r"must come before optimizer.step\(\), got a gradient that it"
                ):
                    monitor.step(digits(8))


def test_a_step_without_a_batch_is_refused(accelerator):
    model, _, monitor = watched(accelerator)
    for part in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, digits(8)))
            if part == 0:
                monitor.step()
            else:
                with pytest.raises(UsageError, match=r"must know the batch, got none"):
                    monitor.step()


def test_a_first_window_may_be_what_is_left_of_an_epoch(make_accelerator):
    accelerator = make_accelerator(gradient_accumulation_steps=4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits(8)), batch_size=8)
    loader = accelerator.prepare(loader)
    model, optimizer, monitor = watched(accelerator, every=1)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model, batch))
                assert monitor.step(batch) is not None
                optimizer.step()
                optimizer.zero_grad()
    assert [record.step for record in monitor.history] == [0, 1]


def test_every_larger_than_the_run_is_told_of_at_its_end(accelerator, caplog):
    model, optimizer, monitor = watched(accelerator, every=50)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, digits(8)))
            monitor.step(digits(8))
            optimizer.step()
            optimizer.zero_grad()
    monitor.close()
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "every must be smaller than the run, got every=50 for 3 steps" in told


def test_without_accelerate_the_error_names_the_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.partition(".")[0] == "accelerate":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "geomwatch.integrations.accelerate")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'geomwatch\[accelerate\]'"):
        importlib.import_module("geomwatch.integrations.accelerate")
