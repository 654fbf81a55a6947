"""Thresholds of optimizers that other libraries bring, against those libraries themselves."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from bisection import Quadratic, held

ADAM = {"step": 7.0, "exp_avg_sq": 0.3}
FACTORED = {"step": 9.0, "variance": 0.3}


def of(place: str, *, hold: Any, curvature: float = 3.0, sparse: bool = False, **options: Any):
    module, _, name = place.rpartition(".")
    return pytest.param(module, name, options, hold, curvature, sparse, id=f"{place} {options}")


PRODIGY = held({"step": 9, "exp_avg_sq": 0.012}, k=9, d=0.2, d_max=0.2)
AVERAGED = {"weight_sum": 9.0, "k": 20, "lr_max": 1.0}
FREE = {"weight_lr_power": 0.0}  # the average takes in a tenth
CASES = [
    of("torch.optim.SparseAdam", hold=held(ADAM), sparse=True),
    of("torch.optim.Adafactor", hold=held(FACTORED), curvature=1e4, weight_decay=0.0),
    of(
        "transformers.Adafactor",
        hold=held({"step": 9, "exp_avg_sq": 0.3}),
        relative_step=False,
        scale_parameter=False,
    ),
    of(
        "transformers.Adafactor",
        hold=held({"step": 9, "exp_avg_sq": 0.3}),
        relative_step=False,
        scale_parameter=False,
        beta1=0.9,
        weight_decay=0.1,
    ),
    of("schedulefree.SGDScheduleFree", hold=held({}, **AVERAGED), **FREE),
    of("schedulefree.SGDScheduleFree", hold=held({}, **AVERAGED), weight_decay=0.5, **FREE),
    of("schedulefree.AdamWScheduleFree", hold=held({"exp_avg_sq": 0.3}, **AVERAGED), **FREE),
    of(
        "schedulefree.AdamWScheduleFree",
        hold=held({"exp_avg_sq": 0.3}, **AVERAGED),
        weight_decay=0.5,
        **FREE,
    ),
    of("prodigyopt.Prodigy", hold=PRODIGY),
    of(
        "prodigyopt.Prodigy",
        hold=PRODIGY,
        use_bias_correction=True,
        weight_decay=0.1,
    ),
    of("dadaptation.DAdaptAdam", hold=held({"exp_avg_sq": 0.3}, k=9, d=0.2)),
    of(
        "pytorch_optimizer.AdEMAMix",
        hold=held({"exp_avg_sq": 0.3}, step=50),
        betas=(0.9, 0.999, 0.99),
    ),
    of("pytorch_optimizer.AdaBelief", hold=held({"exp_avg_var": 0.3}, step=50), rectify=False),
]


@pytest.mark.parametrize(("module", "name", "options", "hold", "curvature", "sparse"), CASES)
def test_steps_grow_from_the_limit_on(module, name, options, hold, curvature, sparse):
    library = pytest.importorskip(module.partition(".")[0])
    cls = getattr(importlib.import_module(module) if "." in module else library, name)

    def make(params: list[torch.Tensor], lr: float) -> Any:
        optimizer = cls(params, lr=lr, **options)
        train = getattr(optimizer, "train", None)
        if train is not None:
            train()
        return optimizer

    quadratic = Quadratic(make, hold, curvature, sparse)
    assert not quadratic.error()
