"""The mistakes that newcomers make: each is a UsageError whose last line is the repaired code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import sgd, small
from problems import cross_entropy, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import geomwatch
from geomwatch import Measurement, Monitor, UsageError
from geomwatch.controllers import LearningRateCap
from geomwatch.sinks import JsonLines

supervised = geomwatch.supervised(nn.CrossEntropyLoss())


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*digits(32)), batch_size=8)


def first_call(batch: Any = None, *, loss_fn: Any = supervised, **options: Any) -> None:
    """Build a monitor and call it once, in the right place."""
    model, optimizer = small()
    monitor = Monitor(model, loss_fn, options.pop("optimizer", optimizer), **options)
    cross_entropy(model, digits(8)).backward()
    monitor.step(digits(8) if batch is None else batch)


def after_the_step() -> None:
    model, optimizer = small()
    monitor = Monitor(model, supervised, optimizer)
    cross_entropy(model, digits(8)).backward()
    optimizer.step()
    monitor.step(digits(8))


def my_criterion(outputs: Any, targets: Any) -> Any:
    return (outputs - targets[0]).pow(2).mean()


def measured() -> geomwatch.Record:
    model, _ = small()
    return geomwatch.measure(model, supervised, digits(8), how=Measurement(quantities="lambda_max"))


ORDER = "loss.backward(); monitor.step(batch, loss=loss.detach()); optimizer.step()"
MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (after_the_step, ORDER),
    (lambda: Monitor(*small()), "Monitor(model, geomwatch.supervised(criterion), optimizer)"),
    (
        lambda: first_call(loss_fn=nn.CrossEntropyLoss()),
        "loss_fn = geomwatch.supervised(torch.nn.CrossEntropyLoss())",
    ),
    (
        lambda: first_call(loss_fn=nn.functional.cross_entropy),
        "loss_fn = geomwatch.supervised(torch.nn.functional.cross_entropy)",
    ),
    (
        lambda: first_call(loss_fn=my_criterion),
        "loss_fn = geomwatch.supervised(my_criterion)",
    ),
    (lambda: first_call(loader()), "for batch in loader: ... monitor.step(batch)"),
    (
        lambda: geomwatch.measure(small()[0], supervised, loader()),
        "measure(model, loss_fn, next(iter(loader)))",
    ),
    (
        lambda: first_call(digits(8)[0]),
        "monitor.step((inputs, targets), loss=loss.detach())",
    ),
    (lambda: first_call({"x": 1, "labels": 2}), "loss_fn = geomwatch.model_loss"),
    (lambda: first_call(controllers=[LearningRateCap]), "controllers=LearningRateCap()"),
    (lambda: first_call(rules=["stability_margin"]), "rules=[*default_rules(), StabilityMargin()]"),
    (lambda: first_call(sinks=JsonLines), 'sinks="run.jsonl"'),
    (lambda: first_call(on_alert="print"), "on_alert=print"),
    (lambda: first_call(budget=5), "budget=0.05"),
    (lambda: first_call(budget="5%"), "budget=0.05"),
    (lambda: first_call(every=0.5), "every=100"),
    (lambda: first_call(how=100), "every=100"),
    (lambda: first_call(how={"micro_batch": 8}), "how=geomwatch.Measurement(micro_batch=8)"),
    (lambda: Measurement(operator="GGN"), 'Measurement(operator="ggn")'),
    (lambda: Measurement(quantities="lamda_max"), 'Measurement(quantities=["lambda_max"])'),
    (
        lambda: Monitor(*_with(supervised), Measurement(params="encoder.*")),
        'Measurement(params="0.weight")',
    ),
    (
        lambda: first_call(optimizer=torch.optim.lr_scheduler.StepLR(small()[1], 10)),
        "Monitor(model, loss_fn, scheduler.optimizer)",
    ),
    (
        lambda: first_call(optimizer=sgd(small()[0])),
        "optimizer = torch.optim.SGD(model.parameters(), lr=...)",
    ),
    (lambda: measured()["lambdamax"], 'record["lambda_max"]'),
]


def _with(loss_fn: Any) -> tuple[Any, Any, Any]:
    model, optimizer = small()
    return model, loss_fn, optimizer


@pytest.mark.parametrize(("mistake", "repaired"), MISTAKES, ids=[code for _, code in MISTAKES])
def test_a_mistake_is_answered_with_the_repaired_code(mistake, repaired):
    with pytest.raises(UsageError) as refused:
        mistake()
    assert str(refused.value).splitlines()[-1].strip() == repaired


def test_masters_of_a_model_in_16_bits_are_no_mistake(caplog):
    model, _ = small()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    model.bfloat16()
    monitor = Monitor(model, supervised, torch.optim.SGD(masters, lr=0.1))
    inputs, targets = digits(8)
    cross_entropy(model, (inputs.bfloat16(), targets)).backward()
    monitor.step((inputs.bfloat16(), targets))
    assert "SGD holds none of the 4 parameters" in caplog.text
