"""A checkpoint carries what a monitor knows."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from loops import draws, loud, sgd, small, train
from problems import cross_entropy, mlp
from torch import nn

from geomwatch import Monitor, Record, UsageError
from geomwatch.rules import NonFinite


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
    if kind is sgd:  # else lambda_max is not measured by itself
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
