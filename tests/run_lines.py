"""Lines of a run, made by hand and by a watched training of 64 digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from faces import faced
from problems import cross_entropy, digits, mlp

from geomwatch import Alert, Estimate, JsonLines, Monitor, Record
from geomwatch.sinks import Line, Sink


def record(**changes: Any) -> Record:
    facts: dict[str, Any] = {
        "step": 40,
        "loss": 0.5,
        "lr": (0.1, 0.02),
        "seconds": 0.01,
        "estimates": {
            "lambda_max": Estimate(12.34, 0.41, "residual", hvps=5),
            "stability_margin": Estimate(0.325, 0.011, "residual", hvps=5),
            "trace": Estimate(68.0, 21.0, "stderr", status="held", age=15),
            "grad_norm": Estimate(None, status="failed", reason="not finite"),
        },
    }
    return Record(**facts | changes)


def alert(severity: str = "warning", **changes: Any) -> Alert:
    facts: dict[str, Any] = {
        "rule": "stability_margin",
        "severity": severity,
        "message": "the margin is 0.7",
        "value": 0.7,
        "limit": 0.5,
        "step": 41,
        "layers": ("head (80%)",),
    }
    return Alert(**facts | changes)


def watched_run(
    path: Path, *, lr: float = 0.05, steps: int = 4, also_to: Sink | None = None, **options: Any
) -> Monitor:
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    with Monitor(
        model,
        cross_entropy,
        optimizer,
        sinks=[JsonLines(path), *([also_to] if also_to else [])],
        **faced(options),
    ) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
    return monitor


def lines_of(path: Path) -> list[Line]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in text]
