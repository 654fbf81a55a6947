"""The code in docs/landscape.md runs as it stands, and the example does."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from problems import cross_entropy, digits, mlp

from geomwatch import landscape

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, capsys):
    page = (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = mlp(64, 8, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(25):
            states.append(copy.deepcopy(model.state_dict()))
            optimizer.zero_grad()
            cross_entropy(model, digits(64)).backward()
            optimizer.step()
    names = {
        "model": model,
        "loss_fn": cross_entropy,
        "batches": [digits(64)],
        "states": states[25:],
        "state_a": states[24],
        "state_b": states[49],
        "out": tmp_path,
    }
    for block in blocks:
        exec(block, names)
    drawn = {path.stem for path in tmp_path.glob("*.pdf")}
    assert drawn == {"slice", "plane", "surface", "trajectory", "barrier", "density"}
    assert "T" in capsys.readouterr().out  # of a date


def test_the_page_names_all_that_is_public():
    page = (ROOT / "docs" / "landscape.md").read_text(encoding="utf-8")
    results = {"Alignment", "Barrier", "Curve", "Density", "Direction", "Fit", "Plane", "Slice"}
    for name in set(landscape.__all__) - results - {"Trajectory"}:
        assert re.search(rf"\b{name}\b", page), f"{name} is not on the page"


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["landscape.py", "--steps", "20", "--points", "3"])
    runpy.run_path(str(ROOT / "examples" / "landscape.py"), run_name="__main__")
    out = tmp_path / "runs" / "landscape"
    assert (out / "comparison.png").stat().st_size > 10_000
    for net in ("MLP", "convnet"):
        assert len(list((out / net).glob("*.png"))) == 6
        assert isinstance(landscape.load(out / net / "plane"), landscape.Plane)
