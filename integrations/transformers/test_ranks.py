"""Two processes of a Trainer, over gloo: what they train on together is measured."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import transformers
from torch import nn
from trainers import causal, classifier, equal, labelled, make, traces
from transformers.distributed import DistributedConfig

import geomwatch
from geomwatch import Measurement, UsageError
from geomwatch.integrations.transformers import GeomwatchCallback

_MODELS = ("gpt2.modeling_gpt2", "bert.modeling_bert", "llama.modeling_llama")
ranks.preload("trainers", *(f"transformers.models.{name}" for name in _MODELS))

CURVATURE = ["loss", "grad_norm", "lambda_max", "stability_margin"]
ONE = {"how": Measurement(quantities=CURVATURE), "every": 1}


def fit(folder: Path, callback: Any = None, *, resume: Any = None, **options: Any) -> Any:
    """Train a small Trainer; its processes are those of a scene."""
    if "RANK" in os.environ:  # in a scene
        options |= {"ddp_backend": "gloo", "ddp_timeout": 20}
    trainer = make(folder, callback, **{"max_grad_norm": 0.0, **options})
    torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def numbers(callback: GeomwatchCallback) -> list[dict[str, float | None]]:
    return [{n: r[n].value for n in CURVATURE} for r in callback.monitor.history]


# What is measured


def watched_and_bare(rank: int, folder: Path) -> Any:
    said, seen = ranks.listen(), []
    callback = GeomwatchCallback(**{**ONE, "every": 2})
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    for watching in (None, callback):
        torch.manual_seed(0)
        trainer = fit(folder, watching, model=causal(0.1), **options)
        seen.append(traces(trainer))
    differing = [key for key in seen[0] if not equal(seen[0][key], seen[1][key])]
    rows = [row["step"] for row in trainer.state.log_history if "geom/lambda_max" in row]
    history = callback.monitor.history
    found = [[(n, e.value) for n, e in r.estimates.items()] for r in history]
    return differing + said, rows, found, dict(history[0].provenance)


def test_training_is_bit_identical_and_both_ranks_measure_the_same(tmp_path):
    first, second = ranks.run(watched_and_bare, tmp_path, tmp_path, group=False)
    for differing_or_said, rows, _, how in (first, second):
        assert differing_or_said == []
        assert rows == [0, 2, 4, 6]
        assert (how["ranks"], how["items"]) == (2, 8)
    assert first[2] == second[2]  # to the last bit


class OwnLoss(transformers.Trainer):
    """A mean over the labels of each micro-batch, and a metric of all ranks as TRL logs them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counted = self.accelerator.gather_for_metrics(inputs["labels"].ne(-100).sum()).sum()
        self.log({"labels": self.accelerator.reduce(counted.float(), "mean").item()})
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


KINDS = {
    "labels counted across devices": (causal, None, {}),
    "means": (classifier, labelled, {"average_tokens_across_devices": False}),
    "own loss": (causal, None, {"kind": OwnLoss, "average_tokens_across_devices": False}),
}


def options_of(kind: str) -> dict[str, Any]:
    model, data, options = KINDS[kind]
    torch.manual_seed(0)
    return {"model": model(), "data": data() if data else None, "max_steps": 3, **options}


def joined(rank: int, folder: Path) -> Any:
    said, found = ranks.listen(), {}
    for kind in KINDS:
        callback = GeomwatchCallback(**ONE)
        fit(folder, callback, **options_of(kind))
        found[kind] = numbers(callback)
    return said, found


def test_the_joined_batch_is_measured_as_one_process_would(tmp_path):
    first, second = ranks.run(joined, tmp_path, tmp_path, group=False)
    assert first == second
    assert first[0] == []
    for kind in ("labels counted across devices", "means"):
        callback = GeomwatchCallback(**ONE)
        fit(tmp_path, callback, per_device_train_batch_size=8, **options_of(kind))
        for found, expected in zip(first[1][kind], numbers(callback), strict=True):
            for name in CURVATURE:
                # differences of gradients round, each in its own order; later weights drift apart
                rel = 1e-4 if found is first[1][kind][0] else 1e-2
                assert found[name] == pytest.approx(expected[name], rel=rel), (kind, name)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=128, intermediate_size=32, max_position_embeddings=64, **sizes
    )
    return transformers.LlamaForCausalLM(config)


CUT = {"max_steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}


def sharded(rank: int, folder: Path) -> Any:
    dist.init_process_group("gloo")
    said, weights = ranks.listen(), []
    callback = GeomwatchCallback(**ONE)
    for watching in (None, callback):
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder / "llama", distributed_config=DistributedConfig(fsdp_size=2)
        )
        trainer = fit(folder, watching, model=model, **CUT)
        weights.append({n: p.full_tensor() for n, p in trainer.model.named_parameters()})
    return said, equal(*weights), numbers(callback)


def test_a_model_that_is_cut_as_it_is_loaded_is_measured_and_trained_as_a_whole_one(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    first, second = ranks.run(sharded, tmp_path, tmp_path, group=False)
    assert first == second
    assert first[:2] == ([], True)
    callback = GeomwatchCallback(**ONE)
    fit(tmp_path, callback, model=llama(), per_device_train_batch_size=8, **CUT)
    for found, expected in zip(first[2], numbers(callback), strict=True):
        for name in CURVATURE:
            assert found[name] == pytest.approx(expected[name], rel=1e-2), name


# What goes on and what does not


class Fails(transformers.Trainer):
    """One rank whose probes raise at one step, and whose loss is NaN at another."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.args.process_index == 1 and geomwatch.is_probing() and self.state.global_step == 2:
            raise ValueError("a file is gone")
        if self.args.process_index == 1 and self.state.global_step == 5:
            loss = loss * float("nan")
        return (loss, outputs) if return_outputs else loss


def failures(rank: int, folder: Path) -> Any:
    said = ranks.listen()
    callback = GeomwatchCallback(**ONE)
    fit(folder, callback, kind=Fails)
    steps = [(r.step, r["lambda_max"].value is not None) for r in callback.monitor.history]
    told = said.copy()
    ended = [
        fit(folder / wish, GeomwatchCallback(on_critical=wish, rules=[ranks.OnOneRank(3)], **ONE))
        for wish in ("stop", "save")
    ]
    return steps, told, [trainer.state.global_step for trainer in ended]


def test_what_fails_on_one_rank_ends_the_probe_on_both_and_decisions_are_shared(tmp_path):
    first, second = ranks.run(failures, tmp_path, tmp_path, group=False)
    for steps, _, ended in (first, second):
        assert [step for step, _ in steps] == [0, 1, 3, 4, 5, 6, 7]
        assert [step for step, is_known in steps if is_known] == [0, 1, 3, 4]
        assert ended == [4, 8]
    assert (tmp_path / "save" / "checkpoint-4").exists()
    assert any("another rank failed in its part" in said for said in first[1])
    assert [said for said in second[1] if "step 2: a probe failed with ValueError" in said]
    assert not [said for said in second[1] if "step 2: a probe failed" not in said]  # once in all


class Gathers(transformers.Trainer):
    """A loss that needs what other ranks have."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss * self.accelerator.gather(torch.tensor(float(self.args.process_index))).sum()


class TwiceOnOne(transformers.Trainer):
    """One rank that computes its loss twice, of which one is not what it trains on."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.process_index == 1:
            self.compute_loss(model.module, dict(inputs), num_items_in_batch=num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


def refusals(rank: int, folder: Path) -> list[str]:
    said = []
    for kind in (Gathers, TwiceOnOne):
        with pytest.raises(UsageError) as refused:
            fit(folder, GeomwatchCallback(**ONE), kind=kind)
        said.append(str(refused.value))
    return said


def test_a_loss_that_needs_other_ranks_or_is_odd_on_one_is_refused_on_both(tmp_path):
    first, second = ranks.run(refusals, tmp_path, tmp_path, group=False)
    assert "must train on the loss that compute_loss returns" in first[0]
    assert "must train on the loss that compute_loss returns" in second[0]
    assert "another rank can't be watched" in first[1]
    assert "one call of compute_loss, got 2 calls" in second[1]


def resumed(rank: int, folder: Path) -> Any:
    options = {**ONE, "every": 4}
    found, weights = [], []
    for resume in (None, str(folder / "checkpoint-6")):
        callback = GeomwatchCallback(**options)
        trainer = fit(
            folder, callback, resume=resume, max_steps=12, save_strategy="steps", save_steps=6
        )
        history = {r.step: (r.loss, r["stability_margin"].value) for r in callback.monitor.history}
        found.append((history, callback.monitor.state_dict()["dispatch"]["rules"][:2]))
        weights.append(trainer.model.state_dict())
    return found, equal(*weights)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one_does(tmp_path):
    first, second = ranks.run(resumed, tmp_path, tmp_path, group=False)
    assert first == second
    ((whole, rules), (rest, same_rules)), weights_are_the_same = first
    assert (list(whole), list(rest)) == ([0, 4, 8], [8])
    assert rest[8][0] == pytest.approx(whole[8][0], rel=1e-6)
    assert rest[8][1] == pytest.approx(whole[8][1], rel=1e-2)
    assert rules == same_rules
    assert weights_are_the_same


class Dies(transformers.Trainer):
    """One rank that is killed in a step of training, or in a probe."""

    probing = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        here = self.args.process_index == 1 and self.state.global_step == 3
        if here and geomwatch.is_probing() == self.probing:
            ranks.die(asleep=False)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def dies(rank: int, folder: Path, probing: bool) -> None:
    Dies.probing = probing
    fit(folder, GeomwatchCallback(**ONE), kind=Dies)


@pytest.mark.parametrize("probing", [False, True])
def test_when_a_rank_dies_the_other_ends_with_the_hosts_own_error(tmp_path, probing):
    left, gone = ranks.play(dies, tmp_path, tmp_path, probing, group=False)
    assert gone.is_gone
    assert re.search("(RuntimeError|DistBackendError): .*by peer", left.error)
    assert "geomwatch/parallel/ranks.py" not in left.error
