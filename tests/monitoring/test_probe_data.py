"""Probing on data of one's own choice: a batch, or a loader."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch.utils.data import DataLoader, TensorDataset

import geomwatch
from geomwatch import Measurement, UsageError


def loader(count: int, *, shuffle: bool) -> DataLoader:
    return DataLoader(TensorDataset(*digits(count)), batch_size=40, shuffle=shuffle)


def step_once(probe_batch: object) -> geomwatch.Record:
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(
        model,
        cross_entropy,
        optimizer,
        how=Measurement(quantities=["loss", "lambda_max"], batch=probe_batch),
    )
    cross_entropy(model, digits(16)).backward()
    record = monitor.step()
    assert record is not None
    return record


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_is_measured_as_the_mean_over_its_items(shuffle: bool) -> None:
    whole, loaded = step_once(digits(100)), step_once(loader(100, shuffle=shuffle))
    assert loaded.provenance["items"] == 100
    assert loaded["loss"].value == pytest.approx(whole["loss"].value, rel=1e-5)
    assert loaded["lambda_max"].value == pytest.approx(whole["lambda_max"].value, rel=1e-2)


def test_reading_a_loader_draws_no_random_numbers() -> None:
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    geomwatch.Monitor(
        model, cross_entropy, optimizer, how=Measurement(batch=loader(100, shuffle=True))
    )
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_loader_without_batches_is_refused() -> None:
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(UsageError, match="batch must hold data, got a DataLoader without"):
        geomwatch.Monitor(
            model, cross_entropy, optimizer, how=Measurement(batch=loader(0, shuffle=False))
        )
