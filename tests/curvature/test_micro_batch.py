"""A probe in micro-batches: the same numbers, or a refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch


@pytest.mark.parametrize("size", [1, 7, 32, 100, 500])
def test_uneven_pieces_give_the_numbers_of_the_whole_batch(size):
    torch.manual_seed(0)
    model, batch = mlp(64, 12, 10), digits(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = ["loss", "grad_norm", "lambda_max", "stability_margin", "batch_sharpness"]
    whole, pieces = (
        geomwatch.measure(
            model,
            cross_entropy,
            batch,
            how=geomwatch.Measurement(quantities=names, micro_batch=n),
            optimizer=optimizer,
            max_hvps=30,
        )
        for n in (None, size)
    )
    for name in names:
        assert pieces[name].value == pytest.approx(whole[name].value, rel=2e-5)
    assert pieces.provenance["items"] == 100


def test_a_piece_is_never_larger_than_asked_for():
    sizes = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(batch[0]))
        return cross_entropy(model, batch)

    geomwatch.measure(mlp(64, 10), loss_fn, digits(64), how=geomwatch.Measurement(micro_batch=16))
    assert sorted(set(sizes)) == [4, 16]  # whole losses are compared without a graph


def test_dropout_is_no_obstacle():
    model = nn.Sequential(mlp(64, 16, 10), nn.Dropout(0.2))
    record = geomwatch.measure(
        model, cross_entropy, digits(64), how=geomwatch.Measurement(micro_batch=16)
    )
    assert record["lambda_max"].value is not None


def test_a_batchnorm_in_train_mode_is_refused():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    with pytest.raises(geomwatch.UsageError, match="must not cut the batches of a BatchNorm"):
        geomwatch.measure(
            model, cross_entropy, digits(64), how=geomwatch.Measurement(micro_batch=16)
        )
    record = geomwatch.measure(
        model, cross_entropy, digits(64), how=geomwatch.Measurement(micro_batch=16, mode="eval")
    )
    assert record["lambda_max"].value is not None


def test_a_loss_over_the_whole_batch_is_refused():
    def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        embedded = F.normalize(model(batch[0]))
        return F.cross_entropy(embedded @ embedded.T, torch.arange(len(embedded)))

    with pytest.raises(geomwatch.UsageError, match="it is no mean over items"):
        geomwatch.measure(
            mlp(64, 10), contrastive, digits(64), how=geomwatch.Measurement(micro_batch=16)
        )


def test_a_monitor_refuses_at_its_first_probe():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=geomwatch.Measurement(micro_batch=4)
    )
    batch = (digits(16)[0], digits(16)[1] % 8)
    cross_entropy(model, batch).backward()
    with pytest.raises(geomwatch.UsageError, match="BatchNorm in train mode, got 4"):
        monitor.step(batch)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(geomwatch.UsageError, match="micro_batch must be an integer >= 1"):
        geomwatch.measure(
            mlp(64, 10), cross_entropy, digits(8), how=geomwatch.Measurement(micro_batch=size)
        )
