"""Rules on what probes measure now and then, what to believe of it, and advice about batches."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from faces import faced
from observations import brief, heard, measured
from problems import cross_entropy, digits, mlp
from silent import RawContext
from torch import Tensor, nn

import geomwatch
from geomwatch.estimators.noise import NO_SIGNAL
from geomwatch.estimators.noise_floor import NO_FUNCTION
from geomwatch.records import Estimate
from geomwatch.rules import (
    CriticalBatchSize,
    FlatButRough,
    Observation,
    StabilityMargin,
    UntrustedProbe,
)
from geomwatch.rules.message import batch_advice

# Flat but rough


def rough(step: int, share: float, trace: float, *, error: float = 0.0) -> Observation:
    estimates = {
        "roughness_residual": Estimate(share, error, "stderr"),
        "trace_per_param": Estimate(trace),
    }
    return measured(step, 0.1, estimates=estimates)


def past(share: float = 0.01, count: int = 6) -> list[Observation]:
    return [rough(100 * t, share, 1.0 + t % 3) for t in range(count)]


def test_a_flat_and_rough_loss_is_warned_of_at_the_second_probe():
    run = [*past(), *(rough(600 + 100 * t, 0.3, 0.1) for t in range(9))]
    assert brief(heard(FlatButRough(), run)) == [(700, "warning")]


def test_rough_alone_or_flat_alone_is_no_cause_for_alarm():
    assert not heard(FlatButRough(), [*past(), *(rough(600 + t, 0.3, 2.0) for t in range(9))])
    assert not heard(FlatButRough(), [*past(), *(rough(600 + t, 0.03, 0.1) for t in range(9))])


def test_one_rough_probe_says_little():
    one = [rough(600, 0.3, 0.1), rough(700, 0.01, 0.1), rough(800, 0.3, 0.01)]
    assert not heard(FlatButRough(), [*past(), *one])


def test_roughness_within_its_own_error_is_none():
    unsure = [rough(600 + t, 0.3, 0.1 / (1 + t), error=0.11) for t in range(9)]
    assert not heard(FlatButRough(), [*past(), *unsure])


def test_a_run_that_has_always_been_rough_is_judged_by_its_own_past():
    assert not heard(FlatButRough(), [*past(0.1), *(rough(600 + t, 0.4, 0.1) for t in range(9))])
    assert heard(FlatButRough(), [*past(0.1), *(rough(600 + t, 0.6, 0.1) for t in range(9))])


def test_nothing_is_rough_before_four_measurements():
    assert not heard(FlatButRough(), [*past(count=3), rough(600, 0.3, 0.1), rough(700, 0.01, 0.1)])


def test_held_values_are_no_measurements():
    held = {name: Estimate(0.3, status="held") for name in ("roughness_residual",)}
    held["trace_per_param"] = Estimate(0.1)
    run = [*past(), *(measured(600 + t, 0.1, estimates=held) for t in range(9))]
    assert not heard(FlatButRough(), run)


class Rugged(nn.Module):
    """A quadratic bowl that flattens out, with ripples that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((8, 16), 1.0))
        self.bowl = 1.0

    def forward(self, x: Tensor) -> Tensor:
        ripple = 3e-4 * torch.sin(200 * self.w).mean()
        return x.mean() * (self.bowl * self.w.square().mean() + ripple)


def test_a_real_loss_that_flattens_out_into_ripples_is_warned_of():
    model, rule = Rugged(), FlatButRough()
    alerts = []
    for step, bowl in enumerate([1.0, 0.9, 1.1, 1.0, 1e-3, 1e-4]):
        model.bowl = bowl
        record = geomwatch.measure(
            model,
            lambda model, batch: model(batch),
            torch.ones(4),
            how=geomwatch.Measurement(
                quantities=["trace_per_param", "roughness_residual"], seed=step
            ),
            samples=30,
        )
        # the trace of the bowl alone; the ripples' is a matter of where w lies in them
        estimates = {**record.estimates, "trace_per_param": Estimate(2 * bowl / 128)}
        alert = rule(measured(step, 0.1, estimates=estimates))
        alerts += [] if alert is None else [alert.step]
    assert alerts == [5]


# Critical batch size


def noisy(step: int, scale: float | None, *, items: int = 64, reason: str = "") -> Observation:
    status = "ok" if scale is not None else "withheld"
    estimate = Estimate(scale, None, status=status, reason=reason)
    return measured(step, 0.1, estimates={"gradient_noise_scale": estimate}, items=items)


@pytest.mark.parametrize(
    ("scale", "expected"), [(5000.0, "far below"), (64.0, None), (3.0, "far above")]
)
def test_a_batch_far_from_the_noise_scale_is_told_of_once(scale, expected):
    rng = random.Random(0)
    run = [noisy(100 * t, scale * rng.uniform(0.8, 1.25)) for t in range(20)]
    alerts = heard(CriticalBatchSize(), run)
    assert brief(alerts) == ([(200, "info")] if expected else [])
    assert all(expected in a.message for a in alerts)
    assert all(0.8 < a.value / scale < 1.25 for a in alerts)


def test_the_noise_scale_is_averaged_before_it_is_divided():
    # The mean of these ratios is 10 x the batch; two of three gradients are half signal.
    scales = itertools.cycle([64.0, 64.0, 1800.0])
    assert not heard(CriticalBatchSize(), [noisy(t, next(scales)) for t in range(30)])


def test_gradients_that_the_noise_hides_count_as_no_signal():
    hidden = [noisy(t, None, reason=f"{NO_SIGNAL}: ||G||^2 = -1") for t in range(3)]
    (alert,) = heard(CriticalBatchSize(), hidden)
    assert "out of sight" in alert.message
    assert not heard(CriticalBatchSize(), [noisy(t, None, reason="no batch") for t in range(9)])


def test_measurements_of_another_batch_size_do_not_count():
    sizes = [64, 64, 128, 128, 64, 64]
    assert not heard(CriticalBatchSize(), [noisy(t, 1e5, items=n) for t, n in enumerate(sizes)])


def test_full_batch_training_has_no_critical_batch():
    run = [
        Observation(t, (0.1,), same_data=True, items=64, estimates=noisy(t, 1e5).estimates)
        for t in range(9)
    ]
    assert not heard(CriticalBatchSize(), run)


def test_whole_probes_of_a_monitor_carry_what_these_rules_need():
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, every=1)
    cross_entropy(model, batch).backward()
    record = monitor.step(batch)
    assert {"gradient_noise_scale", "roughness_residual", "trace_per_param"} <= set(record)


# What can be believed


def doubtful(step: int, margin: float, error: float, **more) -> Observation:
    estimate = Estimate(margin, error, "residual")
    return Observation(step, (0.1,), "SGD", estimate, fresh=True, loss=1.0, **more)


def moving(step: int, margin: float = 3.0) -> Observation:
    reason = f"{NO_FUNCTION}: two evaluations at the same point differ by 0.1"
    estimates = {"roughness": Estimate(None, status="withheld", reason=reason)}
    return doubtful(step, margin, 0.01, estimates=estimates)


def wrong(step: int) -> Observation:
    how = {"validation_failed": True, "backend": "double_backward", "validation": "off by 30 %"}
    return doubtful(step, 3.0, 0.01, provenance=how)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ([doubtful(t, 2.5, 2.6) for t in range(1, 20)], "exceeds the margin 2.5 itself"),
        ([moving(t) for t in range(1, 20)], "two evaluations|no function of the weights"),
        ([wrong(t) for t in range(1, 20)], "off by 30 %"),
    ],
    ids=["error", "loss", "double backward"],
)
def test_a_margin_that_cannot_be_believed_is_told_of_and_raises_nothing(run, words):
    assert not heard(StabilityMargin(), run)
    (alert,) = heard(UntrustedProbe(), run)
    assert (alert.step, alert.severity) == (6, "warning")
    assert any(word in alert.message for word in words.split("|"))
    assert "geomwatch.doctor" in alert.message


def test_the_same_margin_when_believed_is_critical():
    assert heard(StabilityMargin(), [doubtful(1, 2.6, 2.4)])
    assert not heard(UntrustedProbe(), [doubtful(t, 2.6, 1.2) for t in range(1, 20)])


def test_differences_of_gradients_mend_a_wrong_double_backward():
    mended = {**(wrong(1).provenance or {}), "backend": "finite_difference"}
    run = [doubtful(t, 3.0, 0.01, provenance=mended) for t in range(1, 20)]
    assert heard(StabilityMargin(), run)
    assert not heard(UntrustedProbe(), run)


def test_a_loss_that_stands_still_again_is_believed_again():
    still = {"roughness": Estimate(0.1)}
    run = [*(moving(t) for t in range(1, 4)), doubtful(4, 3.0, 0.01, estimates=still)]
    assert brief(heard(StabilityMargin(), run)) == [(4, "critical")]


def test_a_tiny_margin_needs_no_belief():
    assert not heard(UntrustedProbe(), [doubtful(t, 0.01, 0.2) for t in range(99)])


def test_a_margin_with_a_large_error_is_a_lower_bound():
    alerts = heard(UntrustedProbe(), [doubtful(t, 0.4, 0.3) for t in range(20)])
    assert brief(alerts) == [(5, "info")]
    assert "lower bound" in alerts[0].message


def test_one_probe_without_a_margin_is_forgiven():
    def probe(t: int, value: float | None) -> Observation:
        return Observation(t, (0.1,), margin=Estimate(value, 0.0, reason="no memory"), fresh=True)

    assert not heard(UntrustedProbe(), [probe(t, None if t % 5 else 0.1) for t in range(50)])
    (alert,) = heard(UntrustedProbe(), [probe(t, None) for t in range(50)])
    assert (alert.step, alert.severity) == (5, "warning")
    assert "no memory" in alert.message


def test_a_run_that_does_not_ask_for_the_margin_is_not_told_that_it_is_missing():
    assert not heard(UntrustedProbe(), [Observation(t, (0.1,), fresh=True) for t in range(50)])


def test_a_loss_that_is_random_where_no_probe_can_set_it_back_is_told_of_in_a_real_run():
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rng = torch.Generator().manual_seed(random.SystemRandom().getrandbits(60))
        noise = torch.randn(batch[0].shape, generator=rng)
        return cross_entropy(model, (batch[0] + 0.3 * noise, batch[1]))

    options = {"every": 2, "quantities": ["stability_margin", "roughness"]}
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, **faced(options))
    for _ in range(12):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
    rules = {a.rule for a in monitor.alerts if a.severity != "info"}
    assert "untrusted_probe" in rules
    assert not rules & {"stability_margin", "rate_jump"}


class Silent(nn.Module):
    """tanh with a backward whose own derivative is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return RawContext.apply(x)


@pytest.mark.parametrize(("hvp", "expected"), [("double_backward", True), ("auto", False)])
def test_a_wrong_backward_is_told_of_where_it_is_used_all_the_same(hvp, expected):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(64, 16), Silent(), nn.Linear(16, 10)), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=geomwatch.Measurement(hvp=hvp), every=2
    )
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
    told = [a for a in monitor.alerts if a.rule == "untrusted_probe"]
    assert bool(told) is expected
    assert all("double backward is off by" in a.message for a in told)


# Batch noise and what to do about it


def whole(step: int, margin: float, mean_square: float, **more) -> Observation:
    estimates = {
        "stability_margin": Estimate(margin, 0.01, "residual"),
        "stochastic_margin": Estimate(mean_square, 0.1, "stderr"),
    }
    return measured(step, margin, estimates=estimates, **more)


def test_the_factor_of_the_batch_brings_the_stochastic_margin_down_to_one():
    # D = 0.9, N = 1.55: ceil(1.55 / 0.1) = 16, and 0.9 + 1.55 / 16 < 1
    alerts = heard(StabilityMargin(warning=0.8), [whole(20, 0.9, 2.45), measured(22, 0.9)])
    assert "make the batch 16 x larger: 63% of the stochastic margin 2.5" in alerts[0].message


@pytest.mark.parametrize(
    ("margin", "noise", "words"),
    [
        (0.5, None, ""),
        (0.5, 1.0, ""),
        (0.5, 1.9, ""),  # 0.95 in all: noise is not too large
        (0.5, 2.1, "make the batch 2 x larger"),
        (1.0, 3.0, "A larger batch would not help"),
        (0.99, 9.0, "it would take a batch 792 x larger"),
    ],
)
def test_advice_about_the_batch_says_whether_it_helps(margin, noise, words):
    advice = batch_advice(margin, noise)
    assert words in advice
    assert bool(words) == bool(advice)


def test_full_batch_training_has_no_larger_batch():
    run = [whole(t, 1.6, 9.0, loss=1 + t / 9, same_data=True) for t in (20, 30)]
    alerts = heard(StabilityMargin(), run)
    assert alerts
    assert all("batch" not in a.message for a in alerts)
