"""Training with the callback is training without it, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from trainers import causal, classifier, equal, labelled, lora, make, sentences, traces

from geomwatch import Measurement
from geomwatch.integrations.transformers import GeomwatchCallback

pytestmark = [
    # peft asks transformers for a name that the latter is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # dynamo looks at the .grad of whatever it compiles.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Teacher(nn.Module):
    """A frozen net with a state of its own, as a loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(128)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.norm(logits.flatten(0, 1).detach())


class OwnLoss(transformers.Trainer):
    """A loss of the user's that keeps books, and a teacher that BatchNorm makes stateful."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = Teacher()
        self.calls, self.noted = 0, {"losses": []}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits.flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        loss = loss + 0.1 * (logits - self.teacher(outputs.logits)).square().mean()
        self.calls += 1
        self.noted["losses"].append(loss.item())
        self.log({"noted": loss.item()})
        return (loss, outputs) if return_outputs else loss


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "float32": (causal, {}),
    "dropout and windows of two": (lambda: causal(0.1), {"gradient_accumulation_steps": 2}),
    "windows that do not fit": (
        lambda: classifier(0.1),
        {"gradient_accumulation_steps": 5, "data": labelled()},
    ),
    "bfloat16": (lambda: causal(0.1), {"bf16": True, "gradient_accumulation_steps": 2}),
    "LoRA": (lambda: lora(0.1), {"data": labelled(), "gradient_accumulation_steps": 2}),
    "gradient checkpointing": (lambda: causal(0.1), {"activation_checkpointing": True}),
    "compiled": (
        lambda: causal(0.1),
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ),
    "noise on embeddings": (causal, {"neftune_noise_alpha": 5.0}),
    "no clipping": (causal, {"max_grad_norm": 0.0, "optim": "sgd"}),
    "evaluation": (lambda: causal(0.1), {"eval_strategy": "steps", "eval_steps": 2}),
    "a loss of one's own": (lambda: causal(0.1), {"kind": OwnLoss}),
}


def train(tmp_path, name: str, callback: GeomwatchCallback | None) -> Any:
    build, options = CASES[name]
    torch.manual_seed(1)
    model = build()
    if options.get("eval_strategy"):
        options = {**options, "parts": {"eval_dataset": sentences(8)}}
    trainer = make(tmp_path, callback, model=model, max_steps=5, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "compiled" else n for n in CASES],
)
def test_nothing_differs_with_the_callback(tmp_path, name):
    without = train(tmp_path, name, None)
    expected = traces(without)
    quantities = ["loss", "lambda_max", "stability_margin", "roughness"]
    callback = GeomwatchCallback(how=Measurement(quantities=quantities), every=2)
    watched = train(tmp_path, name, callback)
    found = traces(watched)
    assert [r.step for r in callback.monitor.history] == [0, 2, 4]
    assert not callback.monitor.history[0]["lambda_max"].reason
    for part, value in expected.items():
        assert equal(value, found[part]), part
    if name == "a loss of one's own":
        assert equal(without.teacher.state_dict(), watched.teacher.state_dict())
        assert (without.calls, without.noted) == (watched.calls, watched.noted)


def test_nothing_is_left_on_the_trainer(tmp_path):
    trainer = make(tmp_path, GeomwatchCallback(every=3))
    before = set(vars(trainer)), set(vars(trainer.accelerator))
    trainer.train()
    own = {"_total_loss_scalar", "_tr_loss", "_initial_global_step", "current_flos"}
    added = set(vars(trainer)) - before[0] - own
    assert not {"training_step", "compute_loss"} & added
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_a_net_with_batchnorm_keeps_its_buffers(tmp_path):
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    rows = [
        {"pixel_values": np.float32(x.reshape(1, 8, 8) / 16), "labels": int(y)}
        for x, y in zip(images[:64], targets[:64], strict=True)
    ]
    runs = []
    for callback in (None, GeomwatchCallback(every=2)):
        torch.manual_seed(1)
        config = transformers.ResNetConfig(
            num_channels=1,
            num_labels=10,
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
        )
        model = transformers.ResNetForImageClassification(config)
        trainer = make(
            tmp_path,
            callback,
            model=model,
            data=rows,
            collate=transformers.default_data_collator,
            gradient_accumulation_steps=2,
            max_steps=4,
        )
        trainer.train()
        runs.append(traces(trainer))
    assert equal(*runs)
    assert any("running_mean" in name for name in runs[0]["weights"])
    assert len(callback.monitor.history) == 2


def test_generation_in_evaluations_goes_on_as_before(tmp_path):
    runs = []
    for callback in (None, GeomwatchCallback(every=2)):
        torch.manual_seed(1)
        config = transformers.T5Config(
            vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        config.decoder_start_token_id = 0
        trainer = make(
            tmp_path,
            callback,
            model=transformers.T5ForConditionalGeneration(config),
            kind=transformers.Seq2SeqTrainer,
            arguments=transformers.Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=8,
            eval_strategy="steps",
            eval_steps=3,
            max_steps=6,
            parts={"eval_dataset": sentences(8)},
        )
        trainer.train()
        made = trainer.predict(sentences(8)).predictions
        runs.append({**traces(trainer), "generated": made.tolist()})
    assert equal(*runs)
    assert [r.step for r in callback.monitor.history] == [0, 2, 4]


@pytest.mark.parametrize(
    ("steps", "every", "accumulate"), [(7, 3, 1), (8, 4, 2), (5, 1, 3), (6, 6, 2)]
)
def test_there_are_steps_over_every_records_at_optimizer_steps(tmp_path, steps, every, accumulate):
    callback = GeomwatchCallback(how=Measurement(quantities=["loss"]), every=every)
    make(tmp_path, callback, max_steps=steps, gradient_accumulation_steps=accumulate).train()
    assert len(callback.monitor.history) == math.ceil(steps / every)
    assert [r.step for r in callback.monitor.history] == list(range(0, steps, every))
    assert {r.provenance["items"] for r in callback.monitor.history} == {4 * accumulate}


def test_the_environment_turns_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    callback = GeomwatchCallback(every=1)
    trainer = make(tmp_path, callback)
    trainer.train()
    assert callback.monitor is None
    assert "training_step" not in vars(trainer)
