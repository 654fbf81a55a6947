"""Two processes of a Trainer, over gloo: the joined batch is measured, and nobody waits in vain."""

from __future__ import annotations

import copy
import logging
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
import torchmetrics
from problems import digits
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from states import near, rng_states, same
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import geomwatch
from geomwatch import Measurement, UsageError
from geomwatch.integrations.lightning import GeomwatchCallback

ranks.preload("pytorch_lightning", "torchmetrics")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

CURVATURE = ["loss", "grad_norm", "lambda_max", "stability_margin"]
ONE = {"how": Measurement(quantities=CURVATURE), "every": 1}


class Net(pl.LightningModule):
    """A classifier of digits; `plain` without all that makes ranks differ."""

    def __init__(self, *, plain: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [] if plain else [nn.BatchNorm1d(24), nn.Dropout(0.2)]
        self.layers = nn.Sequential(nn.Linear(64, 24), *middle, nn.Tanh(), nn.Linear(24, 10))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.layers(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        self.losses.append(loss.item())
        self.accuracy(outputs, batch[1])
        self.log("loss", loss, sync_dist=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(module: Any, *callbacks: Any, folder: Any = ".", size: int = 16, **options: Any) -> Any:
    """Fit on 256 digits: 8 batches of 16 on each of two ranks."""
    rank = os.environ.get("RANK")  # in a scene
    loader, ckpt_path = options.pop("loader", None), options.pop("ckpt_path", None)
    plain = {
        "accelerator": "cpu",
        "devices": 1 if rank is None else 2,
        "strategy": "auto" if rank is None else DDPStrategy(timeout=timedelta(seconds=20)),
        "use_distributed_sampler": False,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **plain | options)
    torch.manual_seed(7)
    data, sampler = TensorDataset(*digits(256)), None
    if rank is not None:
        sampler = DistributedSampler(data, num_replicas=2, rank=int(rank), shuffle=False)
    loader = loader or DataLoader(data, batch_size=size, sampler=sampler)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def numbers(callback: GeomwatchCallback) -> list[dict[str, float | None]]:
    return [{n: r[n].value for n in CURVATURE} for r in callback.monitor.history]


# What is measured


def watched_and_bare(rank: int, folder: Path) -> Any:
    seen, said = [], ranks.listen()
    callback = GeomwatchCallback(every=2)
    for name, callbacks in (("off", []), ("on", [callback])):
        module = Net(plain=False)
        log = CSVLogger(folder, name=name, version="")
        trainer = fit(module, *callbacks, logger=log, folder=folder, accumulate_grad_batches=2)
        state = {
            "weights and buffers": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "gradients": [p.grad for p in module.parameters()],
            "random": rng_states(),
            "losses": module.losses,
            "metrics": {k: v for k, v in trainer.callback_metrics.items() if k[:5] != "geom/"},
        }
        seen.append(copy.deepcopy(state))
    differing = [key for key in seen[0] if not same(seen[0][key], seen[1][key])]
    history = callback.monitor.history
    found = [[(n, e.value) for n, e in r.estimates.items()] for r in history]
    how = history[0].provenance
    shown = "geom/stability_margin" in trainer.callback_metrics
    return differing + said, [r.step for r in history], found, dict(how), shown


def test_training_is_bit_identical_and_both_ranks_measure_the_same(tmp_path):
    first, second = ranks.run(watched_and_bare, tmp_path, tmp_path, group=False)
    for differing_or_said, steps, _, how, shown in (first, second):
        assert differing_or_said == []
        assert steps == [0, 2]  # of 4 optimizer steps
        assert shown
        assert how["ranks"] == 2
        assert how["items"] == 32
    assert first[2] == second[2]  # to the last bit
    rows = (tmp_path / "on" / "metrics.csv").read_text().splitlines()
    margin = rows[0].split(",").index("geom/stability_margin")
    assert sum(row.split(",")[margin] != "" for row in rows[1:]) == 2  # once a probe


def joined(rank: int) -> Any:
    callback = GeomwatchCallback(**ONE)
    fit(Net(), callback)
    return numbers(callback)


def test_the_joined_batch_is_measured_as_one_process_would(tmp_path):
    first, second = ranks.run(joined, tmp_path, group=False)
    callback = GeomwatchCallback(**ONE)
    fit(Net(), callback, size=32)
    assert first == second
    assert len(first) == 8
    for found, expected in zip(first, numbers(callback), strict=True):
        for name in CURVATURE:
            rel = 1e-4 if found is first[0] else 1e-2  # differences round, and weights drift
            assert found[name] == pytest.approx(expected[name], rel=rel), name


def uneven(rank: int) -> Any:
    inputs, targets = digits(96)
    own = slice(0, 70) if rank == 0 else slice(70, 96)
    callback = GeomwatchCallback(**ONE)
    loader = DataLoader(TensorDataset(inputs[own], targets[own]), batch_size=96)
    fit(Net(), callback, loader=loader)
    how = callback.monitor.history[0].provenance
    return numbers(callback), (how["ranks"], how["items"])


def by_layers(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model.layers(batch[0]), batch[1])


class MeanOfRanks:
    """What DistributedDataParallel trains on: each rank counts alike, whatever its batch."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        parts = [slice(0, 70), slice(70, 96)]
        losses = [F.cross_entropy(model.layers(batch[0][p]), batch[1][p]) for p in parts]
        return torch.stack(losses).mean()


def test_ranks_count_alike_as_they_do_in_training_whatever_their_batch(tmp_path):
    (first, whole), (second, rest) = ranks.run(uneven, tmp_path, group=False)
    assert first == second
    assert (whole, rest) == ((2, 70), (2, 26))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    expected = geomwatch.measure(
        model, MeanOfRanks(), digits(96), how=Measurement(quantities=CURVATURE), optimizer=optimizer
    )
    for name in CURVATURE:
        assert first[0][name] == pytest.approx(expected[name].value, rel=1e-3), name
    by_items = geomwatch.measure(
        model, by_layers, digits(96), how=Measurement(quantities=["loss"])
    )["loss"].value
    assert by_items != pytest.approx(first[0]["loss"], rel=1e-3)


# What goes on and what does not


class Fails(Net):
    """One rank whose loss is NaN in one step of training, or whose probes raise."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 1:
            if geomwatch.is_probing() and batch_idx == 2:
                raise ValueError("a file is gone")
            if batch_idx == 5:
                return loss * float("nan")
        return loss


def failures(rank: int, folder: Path) -> Any:
    said = ranks.listen()
    callback = GeomwatchCallback(**ONE)
    fit(Fails(), callback)
    steps = [(r.step, r["lambda_max"].value is not None) for r in callback.monitor.history]
    alerts = [alert.rule for alert in callback.monitor.alerts]
    told = said.copy()
    stopped = fit(Net(), GeomwatchCallback(on_critical="stop", rules=[ranks.OnOneRank(3)], **ONE))
    saved = fit(
        Net(),
        GeomwatchCallback(on_critical="save", rules=[ranks.OnOneRank(3)], **ONE),
        folder=folder,
    )
    return steps, alerts, told, stopped.global_step, saved.global_step


def test_what_fails_on_one_rank_ends_the_probe_on_both_and_decisions_are_shared(tmp_path):
    first, second = ranks.run(failures, tmp_path, tmp_path, group=False)
    for steps, alerts, _, stopped, saved in (first, second):
        assert [step for step, _ in steps] == [0, 1, 3, 4, 5, 6, 7]
        assert [step for step, is_known in steps if is_known] == [0, 1, 3, 4]
        assert "non_finite" in alerts
        assert (stopped, saved) == (4, 8)
    assert (tmp_path / "geomwatch-step=4.ckpt").exists()
    assert any("another rank failed in its part" in said for said in first[2])
    assert [said for said in second[2] if "step 2: a probe failed with ValueError" in said]
    assert not [said for said in second[2] if "step 2: a probe failed" not in said]  # once in all


class Gathers(Net):
    """Its loss, or a metric alone, is made of what all ranks have."""

    def __init__(self, *, metric: bool) -> None:
        super().__init__()
        self.metric = metric

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        sum_of_ranks = self.all_gather(torch.tensor(float(self.global_rank))).sum()
        self.log("sum", sum_of_ranks)
        return loss if self.metric else loss * sum_of_ranks


class Reduces(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        torch.distributed.all_reduce(loss.detach().clone())
        return loss


class OwnChance(Net):
    """Draws from a generator of its own, on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.chance = iter(torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (next(self.chance) if self.global_rank == 1 else 1.0)


def refusals(rank: int) -> Any:
    said = []
    for module in (Gathers(metric=False), Reduces(), OwnChance()):
        with pytest.raises(UsageError) as refused:
            fit(module, GeomwatchCallback(**ONE))
        said.append(str(refused.value))
    callback = GeomwatchCallback(**ONE)
    fit(Gathers(metric=True), callback)
    return said, numbers(callback)


def test_a_loss_that_needs_other_ranks_or_differs_on_one_is_refused_on_both(tmp_path):
    first, second = ranks.run(refusals, tmp_path, group=False)
    for gathers, reduces, differs in (first[0], second[0]):
        assert "must give the same loss when it is evaluated again" in gathers
        assert "exchanges tensors with other ranks (allreduce)" in reduces
        assert "must give the same loss when it is evaluated again" in differs
    assert "here, but not on another rank" in first[0][2]
    assert first[1] == second[1]
    assert first[1][0]["lambda_max"] > 0


def resumed(rank: int, folder: Path) -> Any:
    options = {**ONE, "every": 3}
    whole, rest = GeomwatchCallback(**options), GeomwatchCallback(**options)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    one = fit(Net(), whole, keep, enable_checkpointing=True, folder=folder, max_epochs=2)
    two = fit(Net(), rest, folder=folder, max_epochs=2, ckpt_path=folder / "step=8.ckpt")
    margins = [
        {r.step: (r.loss, r["stability_margin"].value) for r in callback.monitor.history}
        for callback in (whole, rest)
    ]
    rules = [callback.monitor.state_dict()["dispatch"]["rules"] for callback in (whole, rest)]
    weights = [list(trainer.lightning_module.parameters()) for trainer in (one, two)]
    return margins, rules, same(*weights)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one_does(tmp_path):
    first, second = ranks.run(resumed, tmp_path, tmp_path, group=False)
    assert same(first, second)
    (whole, rest), rules, weights_are_the_same = first
    assert list(whole) == [0, 3, 6, 9, 12, 15]
    assert list(rest) == [9, 12, 15]
    for step, (loss, margin) in rest.items():
        assert loss == whole[step][0]
        assert margin == pytest.approx(whole[step][1], rel=1e-2)
    assert near(*rules, rel=1e-2)
    assert weights_are_the_same


class Dies(Net):
    """One rank is killed, or never comes back; in a step of training, or in a probe."""

    def __init__(self, *, probing: bool, asleep: bool) -> None:
        super().__init__()
        self.probing, self.asleep = probing, asleep

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and batch_idx == 3 and geomwatch.is_probing() == self.probing:
            ranks.die(asleep=self.asleep)
        return loss


def dies(rank: int, probing: bool, asleep: bool) -> None:
    strategy = DDPStrategy(timeout=timedelta(seconds=3))
    fit(Dies(probing=probing, asleep=asleep), GeomwatchCallback(**ONE), strategy=strategy)


@pytest.mark.parametrize(("probing", "asleep"), [(False, False), (True, False), (True, True)])
def test_when_a_rank_dies_the_other_ends_with_the_hosts_own_error(tmp_path, probing, asleep):
    left, gone = ranks.play(dies, tmp_path, probing, asleep, group=False)
    assert gone.is_gone
    assert re.search("RuntimeError: .*(by peer|timeout|Timed out)", left.error)
    assert "geomwatch/parallel/ranks.py" not in left.error


class Sharded(Net):
    """Its layers are cut over the ranks."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.layers[0], mesh=mesh)
        fully_shard(self.layers, mesh=mesh)


def sharded(rank: int, folder: Path) -> Any:
    callback = GeomwatchCallback(**ONE)
    weights, said = [], ranks.listen()
    for callbacks in ([], [callback]):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = fit(
            Sharded(), *callbacks, strategy=strategy, gradient_clip_val=1.0, folder=folder
        )
        weights.append([p.full_tensor() for p in trainer.lightning_module.parameters()])
    return same(*weights), numbers(callback), callback.monitor.history[0].provenance["ranks"], said


def test_a_model_cut_by_fully_shard_is_measured_and_trained_as_a_whole_one(tmp_path):
    first, second = ranks.run(sharded, tmp_path, tmp_path, group=False)
    callback = GeomwatchCallback(**ONE)
    fit(Net(), callback, size=32, gradient_clip_val=1.0)
    assert first == second
    is_the_same, found, count, said = first
    assert is_the_same
    assert (count, said) == (2, [])
    for one, expected in zip(found, numbers(callback), strict=True):
        for name in CURVATURE:
            assert one[name] == pytest.approx(expected[name], rel=1e-2), name
