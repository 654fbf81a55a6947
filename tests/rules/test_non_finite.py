"""A loss or gradient that is not finite: before the step where it can, and the data first."""

from __future__ import annotations

import math

import pytest
import torch
from observations import brief, heard, measured, trained
from torch import nn
from torch.nn import functional as F

from geomwatch import Monitor
from geomwatch.observation.findings import Findings, Present
from geomwatch.rules import NonFinite, Observation

NOTHING = Findings()


def coming(
    step: int, loss: float | None, norm: float | None, found: Findings = NOTHING, **more
) -> Observation:
    present = Present(loss, norm)
    return Observation(
        index=step, lr=(0.1,), present=present, inspect=lambda *, before=False: found, **more
    )


def message(seen: Observation) -> str:
    return heard(NonFinite(), [seen])[0].message


def test_a_nan_loss_with_a_nan_gradient_is_critical_before_the_step():
    found = Findings(not_finite="batch['x'] (3 of 256 entries)", module="encoder.0")
    (alert,) = heard(NonFinite(), [coming(7, math.nan, math.nan, found)])
    assert (alert.step, alert.severity) == (7, "critical")
    assert alert.message == (
        "the loss of the batch of step 7 is nan: a step on it destroys the weights. In the data, "
        "batch['x'] (3 of 256 entries) is not finite. The first module whose output is not finite "
        "is 'encoder.0'. Skip this step, and look at the data. More: geomwatch explain non_finite."
    )


@pytest.mark.parametrize("norm", [0.0, 0.3])
def test_a_nan_loss_with_a_finite_gradient_loses_nothing_and_is_a_warning(norm):
    (alert,) = heard(NonFinite(), [coming(7, math.nan, norm, Findings(is_loss=True))])
    assert alert.severity == "warning"
    assert "nothing is lost" in alert.message
    assert "arises in the loss, from labels or targets" in alert.message
    assert "destroys" not in alert.message


def test_a_gradient_that_is_not_finite_is_critical_before_the_step_and_said_once():
    run = [
        coming(7, 1.0, math.inf),
        trained(7, 1.0, grad_norm=math.inf),
        trained(8, math.nan, grad_norm=math.nan),
    ]
    assert brief(heard(NonFinite(), run)) == [(7, "critical")]


def test_a_gradient_that_a_scaler_looks_after_is_told_once_it_is_left_out():
    run = [
        coming(7, 1.0, math.inf, Findings(is_scaled=True)),
        trained(7, 1.0, grad_norm=math.inf, stepped=False),
    ]
    assert brief(heard(NonFinite(), run)) == [(7, "info")]


def test_a_bad_loss_that_a_scaler_looks_after_is_a_warning():
    seen = coming(7, math.nan, math.nan, Findings(is_scaled=True))
    assert brief(heard(NonFinite(), [seen])) == [(7, "warning")]


def test_a_step_that_the_loop_has_left_out_as_advised_is_not_told_again():
    run = [
        coming(7, math.nan, math.nan),
        trained(7, math.nan, grad_norm=math.nan, stepped=False),
        trained(7, 1.0),
    ]
    assert brief(heard(NonFinite(), run)) == [(7, "critical")]


@pytest.mark.parametrize(
    ("found", "severity"),
    [
        (Findings(has_weights=True), "warning"),
        (Findings(has_weights=True, weights="0.weight"), "critical"),
        (Findings(), "critical"),
    ],
)
def test_after_the_step_and_without_a_norm_the_weights_tell(found, severity):
    seen = trained(7, math.nan, grad_norm=None)
    object.__setattr__(seen, "inspect", lambda *, before: found)
    assert brief(heard(NonFinite(), [seen])) == [(7, severity)]


def test_the_rate_is_named_only_where_the_margins_speak_against_it_and_after_the_data():
    calm = measured(7, 0.1, present=Present(math.nan, math.nan), loss=math.nan)
    assert "rate" not in message(calm)
    near = measured(7, 0.9, present=Present(math.nan, math.nan), loss=math.nan)
    said = message(near)
    assert said.index("look at the data") < said.index("speak against the rate")
    assert "at a learning rate of about" in said


def test_nothing_is_looked_for_while_the_same_alert_is_not_over():
    looks = []

    def look(*, before: bool = False) -> Findings:
        looks.append(before)
        return Findings()

    bad = Present(math.nan, math.nan)
    run = [Observation(index=t, lr=(0.1,), present=bad, inspect=look) for t in range(9)]
    assert brief(heard(NonFinite(), run)) == [(0, "critical")]
    assert looks == [False]


# In a monitor


def told_in(batches, loss_fn=F.mse_loss, model=None, **passed):
    """Train on batches; return (call, alert) for all that non_finite has said."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    told, now = [], 0

    def evaluate(model, batch):
        return loss_fn(model(batch[0]), batch[1])

    monitor = Monitor(
        model,
        evaluate,
        optimizer,
        rules=NonFinite(),
        on_alert=lambda alert: told.append((now, alert)),
    )
    for now, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = evaluate(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach() if passed.get("loss", True) else None)
        if not told or told[-1][0] != now:  # a loop that skips what it is warned of
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    return told


def draws(steps: int, bad: int, spoil):
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = torch.randn(16, 4, generator=rng)
        y = x.sum(1, keepdim=True)
        yield spoil(x, y) if step == bad else (x, y)


def nan_feature(x, y):
    x = x.clone()
    x[2, 1] = math.nan
    return x, y


@pytest.mark.parametrize("at", [4, 10, 17, 33])
@pytest.mark.parametrize("loss", [True, False])
def test_a_nan_feature_is_told_in_the_call_before_the_step_with_its_place(at, loss):
    ((call, alert),) = told_in(draws(40, at, nan_feature), loss=loss)
    assert call == at
    assert "batch[0] (1 of 64 entries) is not finite" in alert.message
    assert "first module whose output is not finite is '0'" in alert.message


def test_an_impossible_ctc_target_is_found_in_the_loss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 5)

        def forward(self, x):
            return self.out(x).log_softmax(-1)

    def ctc(out, target):
        lengths = torch.full((2,), out.shape[0]), torch.full((2,), target.shape[1])
        return F.ctc_loss(out, target, *lengths)

    rng = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 2, 4, generator=rng), torch.full((2, 9 if t == 12 else 2), 1))
        for t in range(20)
    ]
    for batch in batches:  # no repeats but in the impossible one
        batch[1][:, 1::2] = 2
    ((call, alert),) = told_in(batches, ctc, Net())
    assert call == 12
    assert "it arises in the loss, from labels or targets" in alert.message


def test_labels_that_are_all_masked_are_named_and_nothing_is_critical():
    rng = torch.Generator().manual_seed(0)
    x = [torch.randn(16, 4, generator=rng) for _ in range(30)]
    batches = [
        (a, torch.full((16,), -100) if t == 14 else (a.sum(1) > 0).long()) for t, a in enumerate(x)
    ]
    model = nn.Linear(4, 2)
    ((call, alert),) = told_in(batches, F.cross_entropy, model)
    assert (call, alert.severity) == (14, "warning")
    assert "batch[1] (-100 throughout) holds no labels" in alert.message


def test_a_step_that_a_fused_optimizer_leaves_out_is_not_counted():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100)
    monitor = Monitor(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), optimizer)
    for step, batch in enumerate(draws(8, -1, None)):
        loss = F.mse_loss(model(batch[0]), batch[1])
        scaler.scale(loss * (1e38 if step in (2, 4) else 1.0)).backward()
        monitor.step(batch, loss=loss.detach(), grad_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert monitor.state_dict()["step"] == 6
    assert {a.severity for a in monitor.alerts if a.rule == "non_finite"} == {"info"}
