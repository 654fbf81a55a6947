"""What controllers turn in a real Trainer: rates within steps, clipping, samplers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from scripted import Scripted
from torch.utils.data import DataLoader, SequentialSampler
from trainers import causal, make, sentences

import geomwatch
from geomwatch.controllers import LearningRateCap, ResizableBatchSampler
from geomwatch.integrations.transformers import GeomwatchCallback


def scripted(knob: str, moves: dict[int, float], **options: Any) -> GeomwatchCallback:
    return GeomwatchCallback(
        how=geomwatch.Measurement(quantities=["loss"]),
        controllers=[Scripted(knob, moves)],
        **options,
    )


class Noting(transformers.TrainerCallback):
    """Notes what a step is clipped at and taken with."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms.append(args.max_grad_norm)
        if not self.rates:
            kwargs["optimizer"].optimizer.register_step_pre_hook(
                lambda o, *_: self.rates.append(o.param_groups[0]["lr"])
            )


def test_the_rate_of_a_warm_up_is_capped_and_the_trainer_logs_its_own(tmp_path):
    noting = Noting()
    callback = scripted("lr_scale", {2: 0.004})
    trainer = make(tmp_path, [callback, noting], warmup_steps=4, learning_rate=1e-2)
    trainer.train()
    user = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [min(lr, 0.004) if t >= 2 else lr for t, lr in enumerate(user)]
    assert noting.rates == pytest.approx(expected)
    assert max(user) == 1e-2


def test_a_rate_far_too_large_trains(tmp_path):
    losses = []
    for controllers in ([], [LearningRateCap()]):
        callback = GeomwatchCallback(controllers=controllers)
        trainer = make(tmp_path, callback, learning_rate=3.0, max_steps=30, max_grad_norm=0.0)
        trainer.train()
        logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        losses.append(sum(logged[-5:]) / 5)
    assert losses[1] < min(4.0, losses[0])
    assert any(e.get("geom/lr_scale", 1.0) < 0.5 for e in trainer.state.log_history)


def test_clipping_goes_down_and_comes_back_to_the_trainers_own(tmp_path):
    noting = Noting()
    callback = scripted("clip_norm", {1: 0.25, 3: 5.0, 5: math.inf})
    trainer = make(tmp_path, [callback, noting], max_grad_norm=1.0)
    trainer.train()
    assert noting.norms == [1.0, 1.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
    assert trainer.args.max_grad_norm == 1.0


def test_a_batch_that_a_trainer_can_not_change_is_advice_once(tmp_path):
    callback = scripted("batch_scale", {1: 2.0, 3: 4.0})
    make(tmp_path, callback).train()
    (advice,) = callback.monitor.adjustments
    assert (advice.effect, advice.after) == ("advice", 2.0)
    assert "pass gradient_accumulation_steps to TrainingArguments" in advice.reason


def test_a_resizable_sampler_is_found_in_the_loader_that_a_trainer_uses(tmp_path):
    sizes = []

    class Own(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            sampler = ResizableBatchSampler(SequentialSampler(self.train_dataset), 4)
            loader = DataLoader(
                self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            if not geomwatch.is_probing():
                sizes.append(len(inputs["labels"]))
            return super().compute_loss(model, inputs, **kwargs)

    callback = scripted("batch_scale", {1: 2.0})
    make(tmp_path, callback, kind=Own, max_steps=5, data=sentences(48)).train()
    # accelerate draws one batch ahead
    assert sizes == [4, 4, 4, 8, 8]


def test_a_dry_run_trains_as_without(tmp_path):
    weights = []
    for options in ({}, {"controllers": LearningRateCap(dry_run=True)}):
        callback = GeomwatchCallback(**options)
        torch.manual_seed(1)
        trainer = make(tmp_path, callback, model=causal(0.1), learning_rate=1.0)
        trainer.train()
        weights.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
    assert torch.equal(*weights)
    assert {a.effect for a in callback.monitor.adjustments} == {"dry run"}


def test_a_resumed_training_goes_on_with_its_cap(tmp_path):
    def run(steps: int, **options: Any) -> tuple[Any, list[float]]:
        noting = Noting()
        moves = {1: 0.002} if not options else {}
        callback = scripted("lr_scale", moves)
        trainer = make(
            tmp_path,
            [callback, noting],
            save_strategy="steps",
            save_steps=3,
            max_steps=steps,
            lr_scheduler_type="constant",
        )
        trainer.train(**options)
        return trainer, noting.rates

    run(3)
    saved = torch.load(tmp_path / "checkpoint-3/optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["lr"] != 0.002
    _, rates = run(5, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rates == [0.002, 0.002]
