"""Observations made by hand, and runs of them, for the tests of rules."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from geomwatch.monitoring.dispatch import is_due
from geomwatch.observation.findings import Findings, Present
from geomwatch.observation.movement import Movement
from geomwatch.observation.observer import Observer
from geomwatch.observation.rehearsed import Rehearsed
from geomwatch.observation.step import Settled
from geomwatch.observation.taken import Taken
from geomwatch.records import Alert, Estimate
from geomwatch.rules import Observation, Rule


def measured(
    step: int, margin: float, *, lr: float = 0.1, loss: float = 1.0, **more
) -> Observation:
    """A probe has measured this margin just now."""
    status = more.pop("status", "ok")
    estimate = Estimate(margin, 0.01, "residual", status=status)
    return Observation(
        index=step, lr=(lr,), optimizer="SGD", margin=estimate, fresh=True, loss=loss, **more
    )


def full_batch(step: int, margin: float, *, loss: float = 1.0) -> Observation:
    return measured(step, margin, loss=loss, same_data=True)


def trained(step: int, loss: float | None, *, grad_norm: float = 1.0, stepped: bool = True):
    """The step before is over and had this loss."""
    settled = Settled(step, loss, grad_norm, stepped)
    return Observation(index=step + stepped, lr=(0.1,), settled=settled)


class Watched:
    """A rule as a monitor asks it: an observer adds what earlier steps have shown."""

    def __init__(self, *rules: Rule) -> None:
        self.rules, self.observer = rules, Observer()

    def __call__(self, seen: Observation) -> Alert | None:
        """What the first of the rules says, that has something to say."""
        return next(iter(self.all_of(seen)), None)

    def all_of(self, seen: Observation) -> list[Alert]:
        known = self.observer(seen)
        said = [rule(known) for rule in self.rules if is_due(rule, known)]
        return [alert for alert in said if alert is not None]

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in (self.observer, *self.rules)]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        for part, state in zip((self.observer, *self.rules), states, strict=True):
            part.load_state_dict(state)


def heard(rule: Rule | Watched, observations: Iterable[Observation]) -> list[Alert]:
    watched = rule if isinstance(rule, Watched) else Watched(rule)
    return [alert for seen in observations if (alert := watched(seen)) is not None]


def brief(alerts: Iterable[Alert]) -> list[tuple[int, str]]:
    return [(alert.step, alert.severity) for alert in alerts]


def losses(values: Sequence[float], start: int = 0) -> list[Observation]:
    return [trained(start + t, value) for t, value in enumerate(values)]


def judged(rules: Watched, run: Iterable[Observation]) -> list[str]:
    # as text, because a NaN is unlike itself
    return [repr(alert) for seen in run for alert in rules.all_of(seen)]


@dataclass(frozen=True)
class Ahead:
    """Steps ahead that lose a share of what was learnt, and batches that have got worse."""

    rise: float
    change: float

    def __call__(self, multiple: float | None = None) -> Rehearsed:
        return Rehearsed(multiple or 1.0, self.rise, 8)

    def hindsight(self) -> float:
        return self.change


def rehearsals(rng: random.Random) -> dict[str, Any]:
    """What a rehearsal would say if it was asked, and where the rate has grown what it has said."""
    asked = Ahead(rng.uniform(-0.2, 1.0), rng.uniform(-2, 8))
    is_due = rng.random() < 0.15
    return {"rehearsals": asked, "rehearsed": (asked(2.0),) if is_due else ()}


def random_run(seed: int) -> list[Observation]:
    """What a wild run might show: drifting margins and losses, jumps, NaN, left-out steps."""
    rng, other, ahead = random.Random(seed), random.Random(~seed), random.Random(seed + 0.5)
    after = random.Random(seed + 0.25)
    status = rng.choice(["ok", "ok", "unknown"])
    same_data = rng.random() < 0.3
    usual = math.log(1.4 if same_data else 0.5)
    log_margin, lr, loss, step, stepped = math.log(0.3), 0.1, 2.0, 0, True
    frozen = rng.randrange(70, 140)  # steps at a rate of zero, before the warm-up starts
    run = []
    for i in range(160):
        log_margin += rng.gauss(0, 0.4) - 0.1 * (log_margin - usual)
        lr *= rng.choice([1.0, 1.0, 1.0, 1.3, 0.8, 2.5, 0.4])
        loss *= math.exp(rng.gauss(0, 0.2)) * rng.choice([1.0] * 30 + [8.0, 0.125])
        stepped = rng.random() > (0.1 if stepped else 0.7)  # left-out steps come in rows
        norm = math.exp(rng.gauss(0, 0.1)) * rng.choice([1.0] * 40 + [30.0])
        norm = norm if i % 20 < 16 else 0.0
        settled = Settled(step, loss, norm if stepped else math.inf, stepped)
        step += rng.choice([1, 1, 2, 5, 70]) * stepped
        broken = rng.random() < 0.01
        value = None if broken else math.exp(log_margin)
        fresh = rng.random() < 0.7
        error = 0.01 if i % 40 < 32 else 20.0
        run.append(
            Observation(
                index=step,
                lr=(lr if i >= frozen else 0.0,),
                margin=Estimate(value, error, "residual", status=status),
                fresh=fresh,
                gradient_margin=Estimate(rng.uniform(-1, 5)),
                gradient_fresh=fresh or i % 2 == 0,  # a sentinel, where no probe is
                peak=(30 * lr,),
                same_data=same_data,
                estimates=random_estimates(rng, i // 20 % 2) if fresh else None,
                items=64 if fresh else 0,
                loss=math.nan if broken else loss,
                settled=settled,
                taken=step_taken(after, step),
                **known_at_once(other),
                **rehearsals(ahead),
            )
        )
    return run


def step_taken(rng: random.Random, step: int) -> Taken:
    """What a step of an optimizer without a formula did to its own batch; some raise its loss."""
    before = math.exp(rng.gauss(0, 1))
    rise = rng.choice([rng.gauss(0, 0.1)] * 3 + [0.5 * abs(rng.gauss(0, 1))])
    return Taken(step, before, before * (1 + rise), 0.1 * before)


def known_at_once(rng: random.Random, nan: float = 0.0) -> dict[str, Any]:
    """What the host knows of a step before it is taken, with a bad batch now and then."""
    found = Findings(outsized="batch[0]", times=math.exp(rng.uniform(0, 5)))
    loss = math.exp(rng.gauss(0, 0.3)) * rng.choice([1.0] * 9 + [4.0, 20.0, 400.0])
    norm = math.exp(rng.gauss(0, 0.3)) * rng.choice([1.0] * 12 + [40.0])
    present = Present(math.nan if rng.random() < nan else loss, norm)
    still, relative = rng.random(), math.exp(rng.uniform(-17, -11))
    moved = Movement(20, still, relative, "bfloat16", rng.choice([0.01, 1.0, 1.0, 1.0]))
    movement = moved if rng.random() < 0.8 else None
    return {"present": present, "movement": movement, "inspect": lambda *, before=False: found}


def random_estimates(rng: random.Random, phase: int) -> dict[str, Estimate]:
    """Those of a probe that measures what is dear; in one phase all is noise, in another none."""
    rough = rng.choice([0.001] * 6 + [3.0, 3.0])
    return {
        "trace_per_param": Estimate(rng.uniform(0.5, 1.0) if rough < 1 else rng.uniform(0, 0.5)),
        "roughness_residual": Estimate(rough, 0.0001, "stderr"),
        "gradient_noise_scale": Estimate((1.0, 1e4)[phase] * rng.uniform(1, 2), 0.1, "stderr"),
        "stability_margin": Estimate(2.0, 0.01, "residual"),
        "stochastic_margin": Estimate(rng.uniform(0, 20), 0.1, "stderr"),
    }


def wild_run(seed: int) -> list[Observation]:
    """A run of any optimizer, calm or doomed from somewhere on: each level decides at some seed."""
    rng, other, ahead = random.Random(seed), random.Random(~seed), random.Random(seed + 0.5)
    after = random.Random(seed + 0.25)
    status = rng.choice(["ok"] * 4 + ["unknown"])
    more = {
        "adaptive": rng.random() < 0.4,
        "limit_ratio": rng.choice([19.0, 19.0, 5.0, 1.0]),
        "items": rng.choice([4, 16, 64, 256]),
    }
    same_data = rng.random() < 0.3
    level, along = rng.choice([0.1, 0.3, 0.9, 1.2, 2.0, 4.0, 12.0]), rng.choice([0.5, 3, 8, 15, 30])
    noise, scale = rng.choice([1.1, 1.4, 2.0, 4.0, 9.0]), rng.choice([1.0, 64.0, 500.0, 3e3, 1e5])
    drift, peak = rng.choice([0.0, 0.0, 0.03]), rng.choice([1.0, 1.06, 4.0, 15.0, 90.0])
    shaky, bend = rng.random() < 0.2, rng.choice([0.02, 0.2])
    lr, loss, step, taken, run = 0.1, 2.0, 0, True, []
    for i in range(rng.choice([40, 120, 300])):
        jump = rng.choice([1.0] * 30 + [1.6, 2.5, 8.0, 0.2, 0.1])
        lr, level = lr * jump, level * math.exp(drift / 3) * jump ** rng.choice([0, 1])
        loss *= math.exp(rng.gauss(drift - 0.005, 0.1)) * rng.choice([1.0] * 50 + [3.0, 0.3])
        taken = rng.random() > (0.02 if taken else 0.8)
        norm = math.exp(rng.gauss(0, 0.2)) * rng.choice(
            [1.0] * 30 + [8.0, 30.0] + [20.0] * (i > 90)
        )
        norm = norm if i % 40 < 34 + seed % 6 else 0.0
        settled = Settled(step - taken, loss, norm if taken else math.inf, taken) if i else None
        fresh = rng.random() < (0.9 if step < 12 else 0.4)
        margin = level * math.exp(rng.gauss(0, 0.15))
        error = margin * (rng.choice([0.02, 0.6, 2.0]) if shaky else 0.02)
        flat = rng.random() < 0.3 and i > 20
        whole = margin * noise * math.exp(rng.gauss(0, 0.1))
        rough = rng.uniform(1, 9) * bend if flat else bend / 9
        estimates = {
            "stability_margin": Estimate(margin, error, "residual", status=status),
            "stochastic_margin": Estimate(whole, 0.02, "stderr"),
            "trace_per_param": Estimate(rng.uniform(0.1, 0.5) if flat else rng.uniform(0.4, 1.0)),
            "roughness_residual": Estimate(rough, 0.03, "stderr"),
            "gradient_noise_scale": Estimate(scale * math.exp(rng.gauss(0, 0.6)), 0.1, "stderr"),
        }
        run.append(
            Observation(
                index=step,
                lr=(lr,),
                margin=estimates["stability_margin"],
                fresh=fresh,
                gradient_margin=Estimate(along * jump * math.exp(rng.gauss(drift * i, 0.4)), 0.0),
                gradient_fresh=fresh or rng.random() < 0.6,
                peak=(peak * lr,),
                same_data=same_data and i > 0,
                estimates=estimates if fresh else None,
                loss=loss if fresh else None,
                settled=settled,
                taken=step_taken(after, step) if seed % 3 == 0 else None,
                **known_at_once(other, nan=0.01),
                **(rehearsals(ahead) if seed % 2 else {}),
                **more,
            )
        )
        step += (1 if step < 14 else rng.choice([1, 1, 2, 6])) * taken
    return run
