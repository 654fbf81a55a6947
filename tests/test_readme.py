"""What the README shows runs as it stands, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import nn

from geomwatch.quantities.table import DEFAULT, QUANTITIES, SLOW

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
HOSTS = ("lightning", "transformers", "accelerate")


def host_of(block: str) -> str | None:
    return next((h for h in HOSTS if f"geomwatch.integrations.{h}" in block), None)


def in_a_loop() -> dict[str, Any]:
    """What a reader's own script has by the names that the blocks use."""
    model, loader = mlp(64, 16, 10), [digits(32) for _ in range(3)]
    return {
        "model": model,
        "loss_fn": cross_entropy,
        "criterion": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": loader,
        "batch": loader[0],
        "data": loader[0],
    }


def lightning(_: Path) -> dict[str, Any]:
    return {"Trainer": pytest.importorskip("pytorch_lightning").Trainer}


def transformers(out: Path) -> dict[str, Any]:
    host = pytest.importorskip("transformers")
    arguments = host.TrainingArguments(str(out), use_cpu=True, report_to=[])
    return {"Trainer": host.Trainer, "args": arguments}


def accelerate(_: Path) -> dict[str, Any]:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    own = in_a_loop()
    model, optimizer = accelerator.prepare(own["model"], own["optimizer"])
    return {"accelerator": accelerator, "model": model, "optimizer": optimizer}


@pytest.mark.parametrize("block", [b for b in BLOCKS if host_of(b) is None])
def test_a_block_runs_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block, in_a_loop())


@pytest.mark.parametrize("host", HOSTS)
def test_a_block_runs_in_its_host(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [b for b in BLOCKS if host_of(b) == host]
    namespace = {**in_a_loop(), **globals()[host](tmp_path)}
    exec(block, namespace)
    assert {"trainer", "monitor"} & set(namespace)


def test_the_quantities_are_listed_by_when_they_are_measured():
    rows = re.findall(r"^\| (`.*?) \| .* \| (.*?) \|$", README, flags=re.MULTILINE)
    listed: dict[str, set[str]] = {}
    for names, measured in rows:
        listed.setdefault(measured, set()).update(re.findall(r"`(\w+)`", names))
    assert listed == {
        "by default": set(DEFAULT) - set(SLOW),
        "now and then": set(SLOW),
        "on request": set(QUANTITIES) - set(DEFAULT),
    }
