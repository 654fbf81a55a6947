"""Each level of a controller is a field that is used: with another value it decides otherwise."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from geomwatch.controllers import BatchSizeScaler, GradientClipper, Knobs, LearningRateCap
from geomwatch.observation.documented import Documented, fields_of
from geomwatch.observation.observer import Observer
from geomwatch.observation.step import Observation, Settled
from geomwatch.records import Alert, Estimate

SPIKE = Alert("grad_norm_spike", "warning", "a spike", 9.0, 3.0, 0)

# Where half of the default, or one more, would not show in these runs.
OTHER = {
    "c_bs": 1.0,
    "c_lambda": 0.3,
    "min_scale": 0.1,
    "release": 1.5,
    "patience": 17,
    "cooldown": 20,
    "bins": 20,
    "window": 31,
    "share": 0.95,
    "max_factor": 3.0,
    "change": 1.5,
    "history": 40,
    "min_norm": 2.0,
}
CHOICES = ("dry_run", "through", "policy", "rules", "max_batch")  # and no levels

# Settings with which levels that matter seldom matter.
SETTINGS: dict[Any, list[dict[str, Any]]] = {
    LearningRateCap: [{}, {"c_lambda": 0.5}, {"c_lambda": 8.0, "c_bs": 8.0}],
    BatchSizeScaler: [{"cooldown": 3}],
    GradientClipper: [{}, {"rules": None}, {"rules": None, "policy": "zscore"}],
}


def levels(kind: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for declared in fields_of(kind):
        if isinstance(declared.default, Documented):
            yield from levels(type(declared.default), (*above, declared.name))
        elif declared.name not in CHOICES:
            yield (*above, declared.name)


def changed(kind: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """The keyword that gives a level another value than its default."""
    name, *inner = path
    default = next(f.default for f in fields_of(kind) if f.name == name)
    if inner:
        group = type(default)
        return {name: group(**changed(group, tuple(inner)))}
    other = default + 1 if isinstance(default, int) else None if default is None else default / 2
    return {name: OTHER.get(name, other)}


@functools.cache
def wild(seed: int) -> list[tuple[Observation, list[Alert]]]:
    """A run of which all is measured often; its batches disagree, agree, or are all the same."""
    rng = random.Random(seed)
    noise = (12.0, 4.0, 1.5)[seed % 3]
    run, step, lr, margin, loss = [], 0, 0.1, rng.choice([0.2, 1.0, 2.0]), 2.0
    for _ in range(240):
        margin = max(margin * math.exp(rng.gauss(0, 0.3)), 0.01) ** 0.9
        lr *= rng.choice([1.0] * 8 + [1.3, 0.77])
        m_ms = margin * rng.uniform(1, noise)
        estimates = {
            "stability_margin": Estimate(margin, 0.01, "residual"),
            "stochastic_margin": Estimate(m_ms, 0.01 * m_ms, "stderr"),
            "gradient_noise_scale": Estimate(rng.choice([30.0, 100.0, 1e4]), 0.1, "stderr"),
        }
        seen = Observation(
            index=step,
            lr=(lr,),
            margin=estimates["stability_margin"],
            fresh=rng.random() < 0.5,
            gradient_margin=Estimate(margin * rng.uniform(0.2, 4.0)),
            gradient_fresh=True,
            adaptive=seed % 2 == 0,
            limit_ratio=19.0 if seed % 4 else 1.0,
            same_data=seed == 5,
            estimates=estimates,
            items=64,
            settled=Settled(step - 1, loss, rng.lognormvariate(0, 0.3), stepped=True),
        )
        run.append((seen, [SPIKE] * (rng.random() < 0.04)))
        loss *= math.exp(rng.gauss(-0.001, 0.05))
        step += rng.choice([1, 1, 1, 4])
    return run


def decided(kind: Any, options: dict[str, Any]) -> list[Any]:
    found = []
    for seed in range(12):
        controller, observer, batch = kind(**options), Observer(), 1.0
        for seen, alerts in wild(seed):
            moves = controller(observer(seen), alerts, Knobs({"batch_scale": batch}))
            batch = next((m.to for m in moves if m.knob == "batch_scale"), batch)
            found.append([(m.knob, m.to, m.advice) for m in moves])
    return found


usual = functools.cache(lambda kind, i: decided(kind, SETTINGS[kind][i]))


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        pytest.param(kind, path, id=f"{kind.__name__}.{'.'.join(path)}")
        for kind in SETTINGS
        for path in levels(kind)
    ],
)
def test_another_level_decides_otherwise(kind, path):
    other = changed(kind, path)
    assert any(
        decided(kind, setting | other) != usual(kind, i)
        for i, setting in enumerate(SETTINGS[kind])
        if setting | other != setting
    )
