"""Small Hugging Face Trainers on real text, shared by the tests of their kit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn

from geomwatch import Measurement
from geomwatch.integrations.transformers import GeomwatchCallback

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def causal(dropout: float = 0.0) -> nn.Module:
    """A language model: its loss divides a sum over labels by those of the whole window."""
    config = transformers.GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def classifier(dropout: float = 0.0) -> nn.Module:
    """A classifier: it takes `num_items_in_batch`, and returns a mean over its micro-batch."""
    config = transformers.BertConfig(
        vocab_size=128,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **SMALL,
    )
    return transformers.BertForSequenceClassification(config)


def lora(dropout: float = 0.0) -> nn.Module:
    """The classifier with adapters, which are all that is trained."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_dropout=dropout, target_modules=["query"]
    )
    return peft.get_peft_model(classifier(dropout), config)


def sentences(count: int = 48) -> list[dict[str, list[int]]]:
    """Passages of Python's own manual, of uneven length, as character codes to be predicted."""
    text = topics["assignment"].encode("ascii", "ignore")
    rng = random.Random(0)
    found = []
    for start in range(0, 40 * count, 40):
        codes = list(text[start : start + rng.randint(6, 24)])
        found.append({"input_ids": codes, "labels": codes})
    return found


def labelled(count: int = 48) -> list[dict[str, Any]]:
    """The same passages, labelled by whether a vowel comes first."""
    passages = sentences(count)
    return [
        {"input_ids": p["input_ids"], "labels": int(chr(p["input_ids"][0]) in "aeiou")}
        for p in passages
    ]


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate to the length of the longest; labels for padding are not counted."""
    width = max(len(row["input_ids"]) for row in rows)

    def fill(values: Any, filler: int) -> list[int] | int:
        if isinstance(values, int):
            return values
        return [*values, *[filler] * (width - len(values))]

    return {
        "input_ids": torch.tensor([fill(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([fill(row["labels"], -100) for row in rows]),
    }


def make(
    folder: Path,
    callback: Any = None,
    *,
    model: nn.Module | None = None,
    kind: type[Any] = transformers.Trainer,
    arguments: type[Any] = transformers.TrainingArguments,
    data: Any = None,
    collate: Any = padded,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A Trainer on the CPU; `options` are those of TrainingArguments, `parts` the Trainer's."""
    torch.manual_seed(0)
    model = causal() if model is None else model
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(
        model=model,
        args=arguments(output_dir=str(folder), **{**settings, **options}),
        train_dataset=sentences() if data is None else data,
        data_collator=collate,
        callbacks=callback if isinstance(callback, list) else [callback] if callback else [],
        **(parts or {}),
    )


def loss_only(**options: Any) -> GeomwatchCallback:
    """A callback that probes every second step, and does little."""
    settings = {"how": Measurement(quantities=["loss"]), "every": 2}
    return GeomwatchCallback(**{**settings, **options})


def traces(trainer: Any) -> dict[str, Any]:
    """Everything that a monitor must leave as it would have been without it."""
    inner = trainer.optimizer.optimizer
    state = trainer.model.state_dict()
    moments = {f"{i}.{k}": v for i, s in enumerate(inner.state.values()) for k, v in s.items()}
    logged = [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
        if not any(key.startswith("geom/") for key in entry)
    ]
    return {
        "weights": state,
        "moments": moments,
        "rates": [group["lr"] for group in inner.param_groups],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "logged": logged,
        "training": [module.training for module in trainer.model.modules()],
    }


def equal(a: Any, b: Any) -> bool:
    """Compare bit for bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
