"""A fault on one rank, wherever in a probe it strikes: no rank waits for another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import cross_entropy, digits, mlp
from ranks import play
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import geomwatch


def strike(rank: int, error: type[Exception], places: list[int]) -> Any:
    """Train two steps for each place; return what was struck, and the weights of all ranks."""
    x, y = digits(32)
    size, left, weights, struck = dist.get_world_size(), 0, [], 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal left
        left -= geomwatch.is_probing()
        if left == 0 and geomwatch.is_probing() and rank == place % size:
            raise error("on this rank only")
        return cross_entropy(model, batch)

    for place in places:
        left = place
        torch.manual_seed(0)
        model = DistributedDataParallel(mlp(64, 8, 10))  # with kinks: all ways are tried
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_fn(model, (x[rank::size], y[rank::size]))
            loss.backward()
            monitor.step((x[rank::size], y[rank::size]), loss=loss)
            optimizer.step()
        struck += left <= 0
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return struck, torch.stack(weights)


@pytest.mark.parametrize(
    ("size", "error", "places"),
    [
        (2, torch.OutOfMemoryError, [3, 19, 41]),
        (3, ValueError, [24]),
    ],
)
def test_training_goes_on_alike_wherever_one_rank_fails(
    size: int, error: type[Exception], places: list[int], tmp_path: Path
) -> None:
    ranks = play(strike, tmp_path, error, places, size=size)
    assert not [outcome.error for outcome in ranks if outcome.error or outcome.is_gone]
    assert [outcome.value[0] for outcome in ranks] == [len(places)] * size
    first = ranks[0].value[1]
    assert first.isfinite().all()
    assert all(torch.equal(first, outcome.value[1]) for outcome in ranks[1:])
