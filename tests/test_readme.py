"""What the README and the page on use show runs as it stands; what they list is what there is."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits
from torch import nn

from geomwatch.quantities.table import QUANTITIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USING = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README + USING, flags=re.DOTALL | re.MULTILINE)
HOSTS = ("lightning", "transformers", "accelerate")


def host_of(block: str) -> str | None:
    return next((h for h in HOSTS if f"geomwatch.integrations.{h}" in block), None)


def in_a_loop() -> dict[str, Any]:
    """What a reader's own script has by the names that the blocks use."""
    encoder, loader = nn.Sequential(nn.Linear(64, 16), nn.Tanh()), [digits(32)] * 3
    model = nn.Sequential(OrderedDict(encoder=encoder, head=nn.Linear(16, 10)))
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


WHEN = {"dense": "by default", "usual": "by default", "slow": "now and then", "asked": "on request"}


def test_the_quantities_are_listed_by_when_they_are_measured():
    listed = {
        name: when
        for names, when in re.findall(r"^\| (`.*?) \| .* \| (.*?) \|$", USING, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert listed == {name: WHEN[quantity.pace] for name, quantity in QUANTITIES.items()}


def test_the_figures_are_those_of_the_table_that_a_script_wrote():
    table = (ROOT / "docs" / "benchmarks" / "forecast.md").read_text(encoding="utf-8")
    rows = [row for row in table.splitlines() if row.startswith("| **geomwatch** |")]
    quoted = re.findall(r"^\| learning rate .*", README, flags=re.MULTILINE)
    assert len(rows) == len(quoted) == 3
    for row, told in zip(rows, quoted, strict=True):
        caught, false_alarms = re.findall(r"(\d+) of (\d+)", told)
        missed = told.split("|")[3]
        assert "/".join(caught) in row
        assert "/".join(false_alarms) in row
        assert int(missed) == int(caught[1]) - int(caught[0])
        lead = re.search(r"(\d+) steps", told)
        assert lead is None or f"| {lead[1]} [" in row


def test_what_it_costs_and_how_it_does_on_other_kinds_is_quoted_from_their_tables():
    cost = (ROOT / "docs" / "benchmarks" / "cost.md").read_text(encoding="utf-8")
    prose = " ".join(README.split())
    shares = re.search(r"(\S+) % for a small GPT and (\S+) % for an LSTM.*?it was (\S+) %", prose)
    for net, share in zip(("GPT", "LSTM", "MLP"), shares.groups(), strict=True):
        (row,) = (line for line in cost.splitlines() if line.startswith(f"| {net}, "))
        assert row.split("|")[4].strip() == f"{share}%"
    kinds = (ROOT / "docs" / "benchmarks" / "kinds.md").read_text(encoding="utf-8").splitlines()
    warned = re.search(r"warned (\d+) of (\d+) healthy", prose).groups()
    announced = re.search(r"announced (\d+) of (\d+) ramps", prose).groups()
    for start, quoted in (("| healthy, up", warned), ("| hidden ramps: announced", announced)):
        (row,) = (line for line in kinds if line.startswith(start))
        assert row.split("|")[5].strip().startswith("/".join(quoted) + " ")


def test_sentences_are_short():
    prose = re.sub(r"```.*?```|^\|.*?$|!\[.*?\]\(.*?\)|\]\(.*?\)", "", README, flags=re.S | re.M)
    sentences = re.split(r"(?<=[.:?!])\s+|\n\n|\n- ", prose)
    assert not [s for s in sentences if len(s.split()) > 25]
