"""The loss measured is the loss trained on, and its curvature that of `geomwatch.measure`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from trainers import causal, classifier, labelled, lora, make

import geomwatch
from geomwatch import Measurement
from geomwatch.integrations.transformers import GeomwatchCallback

# peft asks transformers for a name that the latter is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LOSS_ONLY = {"how": Measurement(quantities=["loss", "grad_norm"]), "every": 1}


class Sum(transformers.Trainer):
    """An overridden loss, divided over the whole window."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / num_items_in_batch + 0.01 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Mean(transformers.Trainer):
    """An overridden loss, a mean over each micro-batch that the Trainer is to divide."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class OwnBackward(transformers.Trainer):
    """A training step of the user's own, which calls backward() itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


def by_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch


PATHS: dict[str, dict[str, Any]] = {
    "the model's loss": {},
    "a classifier's": {"model": classifier, "data": labelled()},
    "adapters": {"model": lora, "data": labelled()},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"parts": {"compute_loss_func": by_function}},
    "compute_loss divides over the window": {"kind": Sum},
    "compute_loss is a mean": {"kind": Mean},
    "training_step calls backward": {"kind": OwnBackward},
}


def watched(tmp_path, *, path: str = "the model's loss", watch: dict[str, Any], **options: Any):
    parts = dict(PATHS[path])
    torch.manual_seed(1)
    model = parts.pop("model", causal)(options.pop("dropout", 0.0))
    callback = GeomwatchCallback(**watch)
    trainer = make(tmp_path, callback, model=model, **{"max_steps": 5, **parts, **options})
    trainer.train()
    return trainer, callback.monitor.history


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_the_loss_measured_is_the_loss_trained_on(tmp_path, path, accumulate):
    # 48 passages in micro-batches of 5: the last window of an epoch is short, its last batch small
    trainer, records = watched(
        tmp_path,
        path=path,
        watch=LOSS_ONLY,
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=5,
    )
    assert [r.loss for r in records] == pytest.approx(logged(trainer, "loss"), rel=1e-6)
    norms = [r["grad_norm"].value for r in records]
    assert norms == pytest.approx(logged(trainer, "grad_norm"), rel=1e-4)


def test_with_dropout_it_is_the_loss_under_the_very_masks_of_the_step(tmp_path):
    trainer, records = watched(
        tmp_path, watch=LOSS_ONLY, dropout=0.3, gradient_accumulation_steps=2
    )
    assert [r.loss for r in records] == pytest.approx(logged(trainer, "loss"), rel=1e-6)


def test_under_autocast_it_is_that_loss_to_the_rounding_of_bfloat16(tmp_path):
    trainer, records = watched(tmp_path, watch=LOSS_ONLY, dropout=0.1, bf16=True)
    assert [r.loss for r in records] == pytest.approx(logged(trainer, "loss"), rel=1e-3)
    assert {r.provenance["dtype"] for r in records} == {"float32"}


@pytest.mark.parametrize("path", ["the model's loss", "a classifier's", "compute_loss is a mean"])
def test_pieces_of_micro_batches_add_up_to_the_same_loss(tmp_path, path):
    options = {"path": path, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 6}
    in_pieces = {**LOSS_ONLY, "how": Measurement(quantities=["loss"], micro_batch=4)}
    _, whole = watched(tmp_path, watch=LOSS_ONLY, **options)
    _, pieces = watched(tmp_path, watch=in_pieces, **options)
    assert [r.loss for r in pieces] == pytest.approx([r.loss for r in whole], rel=2e-3)


class Measuring(transformers.Trainer):
    """Measures with `geomwatch.measure` on the micro-batches of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window: list[Any] = []
        self.measured: list[float] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.window.append(inputs)
        if len(self.window) == self.args.gradient_accumulation_steps:
            self.measured.append(self._lambda_max())
            self.window.clear()
        return loss

    def _lambda_max(self) -> float:
        def loss_fn(model: nn.Module, window: list[Any]) -> torch.Tensor:
            # a BertForSequenceClassification returns means, which this Trainer sums
            return torch.stack([model(**inputs).loss for inputs in window]).sum()

        record = geomwatch.measure(
            self.model,
            loss_fn,
            self.window,
            how=geomwatch.Measurement(quantities=["lambda_max"], params="classifier.*"),
        )
        return record["lambda_max"].value


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lambda_max_is_that_of_measure_on_the_window(tmp_path, accumulate):
    torch.manual_seed(1)
    # few enough directions for Lanczos to be exact in a probe's budget
    callback = GeomwatchCallback(
        how=geomwatch.Measurement(quantities=["lambda_max"], params="classifier.*"), every=1
    )
    trainer = make(
        tmp_path,
        callback,
        model=classifier(),
        data=labelled(),
        kind=Measuring,
        max_steps=4,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    found = [record["lambda_max"].value for record in callback.monitor.history]
    assert len(found) == 4
    assert found == pytest.approx(trainer.measured, rel=2e-3)


def test_the_gradient_norm_is_that_before_clipping(tmp_path):
    seen = []

    class Listening(geomwatch.rules.NonFinite):
        def __call__(self, observation):
            if observation.settled is not None:
                seen.append(observation.settled.grad_norm)

    trainer, _ = watched(tmp_path, watch={"rules": [Listening()], **LOSS_ONLY}, max_grad_norm=1e-3)
    assert seen == pytest.approx(logged(trainer, "grad_norm"), rel=1e-6)
    assert min(seen) > 0.1


def test_a_probe_batch_is_measured_instead_of_the_steps_own(tmp_path):
    torch.manual_seed(2)
    probe_batch = {"input_ids": torch.randint(1, 128, (6, 10))}
    probe_batch["labels"] = probe_batch["input_ids"].clone()
    how = Measurement(quantities=["loss", "grad_norm"], batch=probe_batch)
    _, records = watched(tmp_path, watch={**LOSS_ONLY, "how": how})
    torch.manual_seed(1)
    expected = causal()(**probe_batch).loss.item()
    assert records[0].loss == pytest.approx(expected, rel=2e-3)
    assert {r.provenance["items"] for r in records} == {6}
