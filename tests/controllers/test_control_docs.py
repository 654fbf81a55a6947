"""The code in docs/control.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from problems import cross_entropy, digits, mlp
from torch.utils.data import DataLoader, TensorDataset

from geomwatch import Monitor

PAGE = Path(__file__).parents[2] / "docs" / "control.md"


def test_the_code_of_the_page_runs():
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    torch.manual_seed(0)
    model = mlp(64, 8, 10)
    data = TensorDataset(*digits(128))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    names = {
        "model": model,
        "loss_fn": cross_entropy,
        "optimizer": optimizer,
        "data": data,
        "loader": DataLoader(data, batch_size=32),
        "monitor": Monitor(model, cross_entropy, optimizer),
    }
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        names["loader"] = DataLoader(data, batch_size=32)  # without the workers of the page
    assert names["monitor"].history
    assert names["scaler"].through is not None
