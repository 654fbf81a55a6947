"""Training of the models that people train: bit-identical with a probe at every step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from states import assert_same, everything, seed
from torch import nn
from zoo import ZOO
from zoo_case import Case, trainable

import geomwatch

STEPS = 3


def train(case: Case, *, watch: bool) -> tuple[dict[str, Any], list[geomwatch.Record]]:
    """Train for some steps from fixed seeds; return all that remains, and the records."""
    model, batch = case.build()
    optimizer = case.optimizer(trainable(model))
    monitor = geomwatch.Monitor(model, case.loss_fn, optimizer, every=1)
    seed(1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = case.loss_fn(model, batch)
        loss.backward()
        if watch:
            monitor.step(batch)
        optimizer.step()
        losses.append(loss.item())
    return remains(model, optimizer) | {"losses": losses}, monitor.history


def remains(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    state = everything(model, optimizer) | {"default dtype": torch.get_default_dtype()}
    # torch.equal refuses the sparse gradients of an embedding.
    return state | {"gradients": [g if g is None else g.to_dense() for g in state["gradients"]]}


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_training_is_bit_identical_and_records_say_how_they_came_about(case, caplog):
    without, _ = train(case, watch=False)
    caplog.clear()
    with_it, records = train(case, watch=True)
    assert_same(without, with_it)
    assert [r.step for r in records] == list(range(STEPS))
    for record in records:
        assert_says_how(case, record)
    told = [r.getMessage() for r in caplog.records if r.name == "geomwatch"]
    is_validated = records[0].provenance["backend"] != "one_sided"
    assert len(told) == (is_validated and case.validation.startswith("double backward is off"))
    assert all("differences of gradients instead" in message for message in told)


def assert_says_how(case: Case, record: geomwatch.Record) -> None:
    how = record.provenance
    assert record["stability_margin"].value is not None
    assert [n for n, e in record.estimates.items() if e.value is None and not e.reason] == []
    smooth = how.get("smoothness_error", 1.0) <= 0.03
    if smooth and not case.held:  # then there is no need of double backward
        assert (how["backend"], how["validated"]) == ("one_sided", False)
        return
    assert (how["backend"], how["dtype"]) == (case.backend, case.dtype)
    assert how["validated"] is (case.held or not case.validation)
    if case.validation:
        assert re.search(case.validation, str(how["validation"]))
    else:
        assert how["validation_error"] < case.validation_error
