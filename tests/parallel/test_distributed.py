"""Two processes that train one model: the same numbers on both, and nobody waits in vain."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faces import faced
from problems import cross_entropy, digits, mlp
from ranks import die, listen, play, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import geomwatch
from geomwatch import Measurement, UsageError
from geomwatch.curvature.objective import Objective
from geomwatch.monitoring.scalars import StepScalars
from geomwatch.parallel.ranks import RankError, Ranks, unwrapped

Batch = tuple[Tensor, Tensor]
NAMES = ["loss", "grad_norm", "lambda_max", "stability_margin", "batch_sharpness"]


def shard(rank: int, cut: int = 70) -> Batch:
    """Uneven parts of 96 digits."""
    x, y = digits(96)
    return (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])


def net(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*mlp(64, 16), nn.Tanh(), *extra, nn.Linear(16, 10))


def train(model: nn.Module, batch: Batch | None, loss_fn: Any, **options: Any) -> Any:
    """Four steps of AdamW, weighted by items as one process would have it; watched unless bare."""
    bare = options.pop("bare", False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"every": 2, "quantities": NAMES} | options
    monitor = None if bare else geomwatch.Monitor(model, loss_fn, optimizer, **faced(options))
    for _ in range(4):
        optimizer.zero_grad()
        if isinstance(model, DistributedDataParallel) and batch is not None:
            # DDP averages over ranks: the weights make that a mean over items
            (2 * len(batch[0]) / 96 * cross_entropy(model, batch)).backward()
        else:
            cross_entropy(model, digits(96)).backward()
        if monitor is not None:
            monitor.step(batch, loss=0.5)
        optimizer.step()
    return monitor, [p.detach().clone() for p in model.parameters()]


def numbers(monitor: geomwatch.Monitor) -> list[dict[str, float | None]]:
    return [{n: r[n].value for n in NAMES} for r in monitor.history]


def watched_and_bare(rank: int) -> Any:
    bare = train(DistributedDataParallel(net()), shard(rank), cross_entropy, bare=True)[1]
    monitor, weights = train(DistributedDataParallel(net()), shard(rank), cross_entropy)
    same = all(torch.equal(a, b) for a, b in zip(bare, weights, strict=True))
    return same, numbers(monitor), monitor.history[0].provenance


def test_ranks_measure_the_joined_batch_and_training_is_bit_identical(tmp_path: Path) -> None:
    ranks = run(watched_and_bare, tmp_path)
    alone, _ = train(net(), digits(96), cross_entropy)
    assert all(same for same, _, _ in ranks)
    assert ranks[0][1] == ranks[1][1]  # to the last bit
    for found, expected in zip(ranks[0][1], numbers(alone), strict=True):
        for name in NAMES:
            assert found[name] == pytest.approx(expected[name], rel=5e-3), name
    first, expected = ranks[0][1][0], numbers(alone)[0]
    assert first["lambda_max"] == pytest.approx(expected["lambda_max"], rel=1e-4)
    assert [how["ranks"] for _, _, how in ranks] == [2, 2]
    assert [how["items"] for _, _, how in ranks] == [70, 26]


def without_items(rank: int) -> Any:
    batch = digits(96) if rank == 0 else None
    model = DistributedDataParallel(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=Measurement(quantities=NAMES), every=1
    )
    cross_entropy(model, digits(96)).backward()
    monitor.step(batch)
    return numbers(monitor)


def test_a_rank_without_items_does_its_part(tmp_path: Path) -> None:
    first, second = run(without_items, tmp_path)
    model = net()
    record = geomwatch.measure(
        model, cross_entropy, digits(96), how=Measurement(quantities=["lambda_max"])
    )
    assert first == second
    assert first[0]["lambda_max"] == pytest.approx(record["lambda_max"].value, rel=1e-2)


class Brittle(torch.autograd.Function):
    """The identity, with a gradient that can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return Broken.apply(slope)


class Broken(Brittle):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        raise ValueError("a file is gone")


class Fails:
    """Right in training; in the probes of one rank not finite, or an error."""

    def __init__(self, how: str, rank: int) -> None:
        self.how, self.mine = how, rank == 1

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model, batch)
        if not (self.mine and geomwatch.is_probing()):
            return loss
        if self.how == "nan":
            return loss * float("nan")
        if self.how == "error":
            raise ValueError("a file is gone")
        return F.cross_entropy(Brittle.apply(model(batch[0])), batch[1])


def one_fails(rank: int, how: str) -> Any:
    model = DistributedDataParallel(net())
    options = {"hvp": "double_backward"} if how == "no HVP" else {}
    monitor, weights = train(model, shard(rank), Fails(how, rank), **options)
    return [r.step for r in monitor.history], numbers(monitor), weights


@pytest.mark.parametrize("how", ["nan", "error", "no HVP"])
def test_a_rank_that_fails_takes_the_others_out_of_the_probe(tmp_path: Path, how: str) -> None:
    (steps, found, weights), (steps2, found2, weights2) = run(one_fails, tmp_path, how)
    assert steps == steps2
    assert found == found2
    assert all(torch.equal(a, b) for a, b in zip(weights, weights2, strict=True))
    assert len(found) == (0 if how == "error" else 2)
    for record in found:
        assert record["lambda_max"] is None
        assert (record["loss"] is None) == (how == "nan")


def wrong_losses(rank: int) -> list[str]:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model, batch)
        return loss.expand(2) if rank == 1 and geomwatch.is_probing() else loss

    def gathers(model: nn.Module, batch: Batch) -> Tensor:
        mean = cross_entropy(model, batch).detach()
        dist.all_reduce(mean)
        return cross_entropy(model, batch) * mean

    said = []
    for loss in (loss_fn, gathers):
        with pytest.raises(UsageError) as refused:
            train(DistributedDataParallel(net()), shard(rank), loss)
        said.append(str(refused.value))
    return said


def test_wrong_use_on_one_rank_is_refused_on_both(tmp_path: Path) -> None:
    first, second = run(wrong_losses, tmp_path)
    assert "another rank can't be watched; its own error says why" in first[0]
    assert "must return a scalar" in second[0]
    for _, gathers in (first, second):
        assert "got one that exchanges tensors with other ranks (allreduce)" in gathers


def dies(rank: int, probing: bool) -> None:
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if rank == 1 and len(monitor.history) == 2 and geomwatch.is_probing() == probing:
            die(asleep=False)
        return cross_entropy(model, batch)

    monitor = geomwatch.Monitor(
        model, loss_fn, optimizer, how=Measurement(quantities=NAMES), every=1
    )
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(model, shard(rank)).backward()
        monitor.step(shard(rank))
        optimizer.step()


@pytest.mark.parametrize("probing", [False, True])
def test_when_a_rank_dies_the_loop_ends_with_torchs_own_error(
    tmp_path: Path, probing: bool
) -> None:
    left, gone = play(dies, tmp_path, probing)
    assert gone.is_gone
    assert re.search("(RuntimeError|DistBackendError): .*by peer", left.error)
    assert "geomwatch/parallel/ranks.py" not in left.error


def paused_on_one(rank: int) -> Any:
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=Measurement(quantities=["lambda_max"]), every=1
    )
    for step in range(3):
        if rank == 1 and step == 1:
            monitor.pause()
        if rank == 1 and step == 2:
            monitor.resume()
        optimizer.zero_grad()
        cross_entropy(model, shard(rank)).backward()
        monitor.step(shard(rank))
        optimizer.step()
    return [r.step for r in monitor.history]


def test_a_pause_on_one_rank_is_one_for_all(tmp_path: Path) -> None:
    assert run(paused_on_one, tmp_path) == [[0, 2], [0, 2]]


def agreements(rank: int) -> Any:
    ranks = Ranks(dist.group.WORLD, torch.device("cpu"))
    means = []
    for loss in (torch.tensor(1.0 + rank), None if rank else 4.0, None):
        scalars = StepScalars(ranks)
        scalars.put(0, scalars.loss(loss), 1.0)
        means.append(scalars.take(1).loss)
    caught = ""
    try:
        with ranks.together():
            if rank == 1:
                raise KeyError("mine")
    except (KeyError, RankError) as error:
        caught = type(error).__name__
    between = []
    with contextlib.suppress(KeyError, RankError), ranks.together():
        if rank == 1:
            raise KeyError("mine")
        between.append("before")
        ranks.any(True)
        between.append("after")
    return means, (caught, between), ranks.total(1.0), ranks.any(rank == 1), ranks.all(rank == 1)


def test_ranks_average_the_losses_they_have_and_leave_a_block_together(tmp_path: Path) -> None:
    first, second = run(agreements, tmp_path)
    assert first == ([1.5, 4.0, None], ("RankError", ["before"]), 2.0, True, False)
    assert second == ([1.5, 4.0, None], ("KeyError", []), 2.0, True, False)


def with_norms() -> nn.Module:
    torch.manual_seed(1)
    return net(nn.BatchNorm1d(16), nn.Linear(16, 16), nn.BatchNorm1d(16, affine=False))


def twice_multiplied(model: nn.Module, batch: Batch, ranks: Ranks | None = None) -> list[Tensor]:
    """The gradient, H v and H H v in float64."""
    exact = (batch[0].double(), batch[1])
    with Objective(model.double(), cross_entropy, [exact], ranks=ranks) as objective:
        v = objective.layout.normal(torch.Generator().manual_seed(0))
        hv = objective.hvp(v)
        return [objective.gradient(), hv, objective.hvp(hv)]


def normalised(rank: int, sync: bool) -> Any:
    """Measure a net with two BatchNorms, with a gradient that is made up.

    torch's SyncBatchNorm trains on GPUs only; the one of a probe needs none.
    """
    model = DistributedDataParallel(with_norms())
    if sync:  # which DDP refuses on a CPU
        nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=Measurement(quantities=[*NAMES, "trace"]), every=1
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    record = monitor.step(shard(rank))
    vectors = twice_multiplied(copy.deepcopy(model.module), shard(rank), Ranks.of(model))
    optimizer.step()
    said = listen()
    for part in zip(*(t.split(70 if rank == 0 else 20) for t in shard(rank)), strict=True):
        monitor.observe(part)
    monitor.step()
    return {n: e.value for n, e in record.estimates.items()}, record.provenance, vectors, said


def test_batch_statistics_are_those_of_all_ranks_or_recorded_as_each_ranks_own(
    tmp_path: Path,
) -> None:
    model = with_norms()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    joined = geomwatch.measure(model, cross_entropy, digits(96), optimizer=optimizer)
    first, second = run(normalised, tmp_path, True)
    found, how, vectors, said = first
    assert found == second[0]
    assert found["lambda_max"] == pytest.approx(joined["lambda_max"].value, rel=1e-2)
    assert how["batch_statistics"] == "of the batches of all ranks"
    assert how["backend"] == "one_sided"
    for mine, expected in zip(vectors, twice_multiplied(model, digits(96)), strict=True):
        assert float((mine - expected).norm() / expected.norm()) < 1e-12
    assert "each needs as many batches, got 1, 2" in said[0]
    found, how, _, said = run(normalised, tmp_path, False)[0]
    assert how["batch_statistics"] == "of each rank's own batch"
    assert found["lambda_max"] != pytest.approx(joined["lambda_max"].value, rel=1e-2)
    assert said == []


def sharded(rank: int, optimizer_name: str) -> Any:
    from torch.distributed.fsdp import fully_shard

    found = []
    for watch in (False, True):
        model = net(nn.LayerNorm(16))
        fully_shard(model[0])
        fully_shard(model)
        optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=0.01)
        monitor = geomwatch.Monitor(
            model, cross_entropy, optimizer, how=Measurement(quantities=NAMES), every=2
        )
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(model, shard(rank, 48)).backward()
            if watch:
                monitor.step(shard(rank, 48))
            optimizer.step()
        found.append([p.full_tensor() for p in model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return same, numbers(monitor), monitor.history[0].provenance


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
def test_sharded_parameters_are_measured_as_whole_ones(tmp_path: Path, optimizer_name: str) -> None:
    ranks = run(sharded, tmp_path, optimizer_name)
    model = net(nn.LayerNorm(16))
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=0.01)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=Measurement(quantities=NAMES), every=2
    )
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model, digits(96)).backward()
        monitor.step(digits(96))
        optimizer.step()
    assert all(same for same, _, _ in ranks)
    assert ranks[0][1] == ranks[1][1]
    for found, expected in zip(ranks[0][1], numbers(monitor), strict=True):
        for name in NAMES:
            assert found[name] == pytest.approx(expected[name], rel=1e-2), name
    assert ranks[0][2]["validation"] == "not run on sharded parameters"


def refusals(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    flat = nn.Sequential(FullyShardedDataParallel(net(), device_id=torch.device("cpu")))
    mesh = init_device_mesh("cpu", (2,))
    split = parallelize_module(net(), mesh, {"0": ColwiseParallel()})
    said = []
    for model in (flat, split):
        with pytest.raises(UsageError) as refused:
            Ranks.of(model)
        said.append(str(refused.value))
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for stop in (True, False):
        monitor = geomwatch.Monitor(
            model, cross_entropy, optimizer, how=Measurement(quantities=["loss"])
        )
        with model.join(throw_on_early_termination=stop):
            cross_entropy(model, shard(rank)).backward()
            if stop:
                assert monitor.step(shard(rank)) is not None
                continue
            with pytest.raises(UsageError) as refused:
                monitor.step(shard(rank))
            said.append(str(refused.value))
    return said


def test_ranks_that_no_probe_can_follow_are_refused(tmp_path: Path) -> None:
    for flat, split, joined in run(refusals, tmp_path):
        assert "by fully_shard (FSDP2), got FullyShardedDataParallel (FSDP1) in '0'" in flat
        assert "data parallelism alone, got a parameter that is cut otherwise: '0.weight'" in split
        assert "the same number of steps, got a loop inside join()" in joined


def test_no_collective_is_tried_once_one_has_failed(monkeypatch: Any, caplog: Any) -> None:
    tried = []

    def fails(*args: Any, **options: Any) -> None:
        tried.append(args)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", fails)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    ranks = Ranks(object(), torch.device("cpu"))
    with pytest.raises(RankError, match="can't be reached any more"):
        ranks.sum(lambda: (torch.ones(2),))
    assert (ranks.all(True), ranks.any(True), ranks.any(False)) == (False, True, False)
    assert ranks.sum_and_count(4.0).tolist() == [4.0, 1.0]
    with pytest.raises(RankError), ranks.together():
        pass
    assert len(tried) == 1
    assert [r.getMessage() for r in caplog.records if "Connection closed" in r.getMessage()]


def test_a_model_alone_has_one_rank() -> None:
    model = net()
    assert Ranks.of(model).size == 1
    assert unwrapped(model) is model
