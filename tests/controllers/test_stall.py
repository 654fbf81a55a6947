"""When a loss counts as no longer falling."""

from __future__ import annotations

import json

import pytest
import torch

from geomwatch.controllers.learning_rate_cap.history import Stall, StallTest


def looks(losses) -> list[int]:
    """The steps at which the loss is said to have stopped falling."""
    stall = Stall(StallTest())
    return [t for t, loss in enumerate(losses) if stall(float(loss))]


def noise(number, seed):
    return torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_constant_loss_has_stopped_at_the_first_look():
    assert looks([1.0] * 150) == [149]
    assert not looks([1.0] * 149)


def test_noise_around_a_level_is_recognised_in_most_runs_at_the_first_look():
    # P(z < 2) = 0.98, a little less with twenty bins
    found = sum(bool(looks(2 + 0.3 * noise(150, seed))) for seed in range(300))
    assert 280 < found < 300


def test_a_loss_that_falls_by_five_standard_errors_a_third_is_mistaken_rarely():
    # thirds of 50 steps: standard error of their difference 0.3 sqrt(2 / 50) = 0.06
    slope = 5 * 0.06 / 50
    time = torch.arange(150, dtype=torch.float64)
    found = sum(bool(looks(2 - slope * time + 0.3 * noise(150, seed))) for seed in range(300))
    assert found <= 6  # P(z < -3) = 0.1 %, a little more with twenty bins


def test_a_slow_decay_is_followed_however_long_it_takes():
    time = torch.arange(20_000, dtype=torch.float64)
    losses = 3 - 0.3 * torch.log1p(time / 50) + 0.1 * noise(20_000, 0)
    assert not looks(losses)


def test_memory_does_not_grow_with_the_run():
    stall = Stall(StallTest())
    for t in range(20_000):
        stall(float(-t))
    state = stall.state_dict()
    assert len(state["bins"]) < 60
    assert len(state["open"]) < state["size"]
    assert len(state["bins"]) * state["size"] + len(state["open"]) == 20_000


def test_it_goes_on_from_its_state_and_can_begin_anew():
    losses = (2 + 0.3 * noise(400, 1)).tolist()
    whole, first, second = Stall(StallTest()), Stall(StallTest()), Stall(StallTest())
    expected = [whole(loss) for loss in losses]
    begun = [first(loss) for loss in losses[:203]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [second(loss) for loss in losses[203:]] == expected
    second.restart()
    assert second.state_dict() == Stall(StallTest()).state_dict()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out(loss):
    assert looks([1.0, loss] * 150) == [298]
