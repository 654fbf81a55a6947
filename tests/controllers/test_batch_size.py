"""A larger batch or a lower rate: what the two parts of the stochastic margin say."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from geomwatch.controllers import BatchSizeScaler, Knobs, Move
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.records import Estimate
from geomwatch.rules import Observation


def measured(step: int, curvature: float, noise: float, *, scale: float = 1e6, **more):
    """A probe at the loop's own batch of 64 has found these parts of the margin."""
    estimates = {
        "stability_margin": Estimate(curvature, 0.01, "residual"),
        "stochastic_margin": Estimate(curvature + noise, 0.01, "stderr"),
        "gradient_noise_scale": Estimate(scale, 1.0, "stderr"),
    }
    more = {"items": 64, "lr": (0.1,), **more}
    return Observation(index=step, fresh=True, estimates=estimates, **more)


def scaler(**options) -> BatchSizeScaler:
    return BatchSizeScaler(**{"limit": 1.0, "noise_scale": 1.0, "patience": 20} | options)


class Batch:
    """Follows the batch as its actuator would; noise falls with it."""

    def __init__(self, scaler: BatchSizeScaler, **other_knobs: float) -> None:
        self.scaler, self.scale, self.other_knobs = scaler, 1.0, other_knobs
        self.moves: list[tuple[int, float]] = []
        self.advice: list[Move] = []

    def __call__(self, seen: Observation) -> None:
        for move in self.scaler(seen, (), Knobs({"batch_scale": self.scale, **self.other_knobs})):
            if move.advice:
                self.advice.append(move)
                continue
            self.scale = move.to
            self.moves.append((seen.index, move.to))

    def run(self, curvature: float, noise: float, steps: int = 600, **more) -> list[float]:
        for t in range(0, steps, 10):
            items = round(64 * self.scale)
            self(measured(t, curvature, noise / self.scale, **{"items": items, **more}))
        return [to for _, to in self.moves]


def test_a_margin_within_the_limit_changes_nothing():
    assert Batch(scaler()).run(0.3, 0.6) == []


def test_a_loss_that_does_not_split_into_items_is_left_alone_by_name():
    why = "the loss is no mean over items"
    withheld = Estimate(None, status="withheld", reason=why)
    estimates = {"stability_margin": Estimate(0.5), "stochastic_margin": withheld}
    seen = Observation(index=0, fresh=True, lr=(0.1,), estimates=estimates)
    (move,) = scaler()(seen)
    assert move.abstains
    assert (move.to, move.reason) == (1.0, why)


def test_noise_is_brought_down_by_the_batch_it_takes_in_powers_of_two():
    batch = Batch(scaler())
    # N / (1 - D) = 3 / 0.7 = 4.3: eight times the batch
    assert batch.run(0.3, 3.0) == [2, 4, 8]


def test_a_change_takes_patience_and_the_next_one_a_cooldown():
    batch = Batch(scaler())
    batch.run(0.3, 3.0)
    assert [step for step, _ in batch.moves] == [20, 70, 120]


def test_curvature_itself_is_not_a_matter_of_the_batch_and_is_said_once():
    batch = Batch(scaler())
    assert batch.run(2.0, 3.0) == []
    (advice,) = batch.advice
    assert advice.knob == "lr_scale"
    assert advice.to == pytest.approx(0.1 * 0.5 / 2)
    assert "a larger batch can't help, a lower learning rate can" in advice.reason


def test_a_learning_rate_cap_sees_to_curvature_without_advice():
    batch = Batch(scaler(), lr_scale=0.5)
    batch.run(2.0, 3.0)
    assert not batch.advice


def test_where_curvature_dominates_the_noise_the_batch_stays():
    assert Batch(scaler()).run(0.9, 0.5) == []


def test_full_batch_training_is_left_alone():
    assert Batch(scaler()).run(0.3, 3.0, same_data=True) == []


def test_the_gradient_noise_scale_bounds_the_batch():
    # 200 items: three times the batch of 64
    assert Batch(scaler()).run(0.3, 3.0, scale=200.0) == [2]
    assert Batch(scaler(noise_scale=2.0)).run(0.3, 3.0, scale=200.0) == [2, 4]


def test_the_largest_batch_is_the_users_to_say():
    assert Batch(scaler(max_batch=128)).run(0.3, 3.0) == [2]
    assert Batch(scaler()).run(0.3, 1000.0) == [2, 4, 8, 16]


def test_the_batch_goes_down_again_when_half_of_it_would_do():
    batch = Batch(scaler())
    batch.run(0.3, 3.0)
    batch.moves.clear()
    for t in range(600, 1200, 10):
        batch(measured(t, 0.1, 0.5 / batch.scale, items=round(64 * batch.scale)))
    assert [to for _, to in batch.moves] == [4, 2, 1]


def test_only_fresh_measurements_count():
    batch = Batch(scaler(patience=0))
    held = measured(10, 0.3, 3.0)
    stale = {name: Estimate(e.value, status="held", age=10) for name, e in held.estimates.items()}
    batch(Observation(index=10, lr=(0.1,), fresh=True, estimates=stale, items=64))
    batch(Observation(index=20, lr=(0.1,)))
    failed = {name: Estimate(None, status="failed") for name in held.estimates}
    batch(Observation(index=30, lr=(0.1,), fresh=True, estimates=failed, items=64))
    assert batch.moves == []


def test_a_scaler_goes_on_from_its_state_as_if_it_had_not_stopped():
    def run(batches: Iterable[Batch], steps: Iterable[int]) -> None:
        for batch in batches:
            for t in steps:
                batch(measured(t, 0.3 + t / 1e4, 3 / batch.scale, items=round(64 * batch.scale)))

    whole, first, second = (Batch(scaler()) for _ in range(3))
    run([whole, first], range(0, 70, 10))
    second.scaler.load_state_dict(json.loads(json.dumps(first.scaler.state_dict())))
    second.scale = first.scale
    run([whole, second], range(70, 400, 10))
    assert whole.moves == first.moves + second.moves
    assert len(first.moves) == 1
    assert second.moves


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": 0}, UsageError, "limit must be a number above 0, got 0"),
        ({"max_batch": 0}, UsageError, "max_batch must be an integer >= 1, got 0"),
        ({"noise_scale": -1}, UsageError, "noise_scale must be a number above 0, got -1"),
        ({"cooldown": 1.5}, UsageError, "cooldown must be an integer >= 0, got 1.5"),
        ({"through": [1, 2]}, UsageTypeError, "ResizableBatchSampler or a DataLoader .* got list"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        BatchSizeScaler(**options)
