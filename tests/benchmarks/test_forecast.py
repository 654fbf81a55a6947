"""The forecast benchmark: its grid, labels, detectors and statistics, and a run from end to end."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from forecast import Forecast, concerns
from harness import pool
from harness.advice import Obedience, advised_rate
from harness.codec import decode, encode
from harness.detectors import (
    Detector,
    above,
    either,
    first_above,
    first_alert,
    geomwatch,
    geomwatch_geometry,
    geomwatch_unplanned,
    grad_norm_z_score,
    lambda_max,
    loss_rise,
    loss_z_score,
)
from harness.execute import execute
from harness.grid import FORECAST, FULL_BATCH
from harness.grid import forecast as grid
from harness.grid import forecast_quick as quick
from harness.outcome import event, judge
from harness.policies import ADVICE, DEFAULT
from harness.replay import differences, read_replayed, replay
from harness.run import Run, Shape
from harness.scoring import before_end, by_step_ten, curve, freeze, lead_of, score
from harness.stats import Median, Share
from harness.store import Store
from harness.story import Story, read
from tasks.rates import Rates
from tasks.training import Recipe, prepare, train

from geomwatch.observation.step import Settled
from geomwatch.records import Estimate
from geomwatch.rules import LossRise, NonFinite, Observation

TEN = Rates(tuned=0.1, breaks=0.8, floor=0.0, chance=math.log(10), seconds=1.0)
SHORT = Recipe("sgd", 0.1, 16, 0, 40)
ILL = replace(SHORT, rate=30.0)


def a_run(recipe: Recipe = SHORT, shape: str = "constant-1tuned", task="mlp-digits") -> Run:
    return Run(task, shape, recipe)


def story(losses, *, alerts=(), norms=None, left=0.0, run=None, margins=()) -> Story:
    """A story told by hand."""
    records = [
        {"step": t, "seconds": 0.1, "estimates": {"lambda_max": {"value": m, "age": 0}}}
        for t, m in margins
    ]
    data = {
        "losses": list(losses),
        "grad_norms": list(norms if norms is not None else np.ones(len(losses))),
        "alerts": list(alerts),
        "records": records,
        "tail": left * TEN.chance if math.isfinite(left) else None,
        "seconds": {"bare": 10.0, "policy": 1.0, "grad_norms": 0.1},
    }
    return Story(run or a_run(), DEFAULT, data)


def an_alert(raised: int, severity: str = "warning", rule: str = "stability_margin") -> dict:
    return {"raised": raised, "step": raised, "severity": severity, "rule": rule, "message": ""}


# The grid


@pytest.fixture
def everything_is_calibrated(monkeypatch):
    known = lambda *_: TEN  # noqa: E731
    monkeypatch.setattr("harness.run.rates", known)


@pytest.mark.usefixtures("everything_is_calibrated")
def test_the_grid_is_the_same_each_time_and_large_enough():
    assert grid() == grid()
    assert len(grid()) >= 120
    assert len({run.name for run in grid()}) == len(grid())
    assert {run.scenario for run in grid()} == {"steady", "start", "ramp", "jump", "edge"}
    assert set(quick()) <= set(grid())


@pytest.mark.usefixtures("everything_is_calibrated")
def test_the_sets_share_neither_architecture_nor_seed():
    development, validation = (
        [r for r in grid() if r.part == part] for part in ("development", "validation")
    )
    assert not {r.task_name for r in development} & {r.task_name for r in validation}
    assert not {r.recipe.seed for r in development} & {r.recipe.seed for r in validation}
    for part in (development, validation):
        assert {r.recipe.batch for r in part} >= {4, 16, 64, None}
        assert {r.recipe.optimizer for r in part} == {"gd", "sgd", "adam", "adamw"}


def test_every_combination_of_the_grid_has_been_calibrated():
    from tasks.rates import key, load

    wanted = (*FORECAST, *FULL_BATCH)
    assert {key(s.task_name, s.optimizer, s.batch) for s in wanted} <= set(load())


def test_a_hidden_or_clipped_run_has_a_name_of_its_own():
    plain = Shape("ramp", "breaks", 2)
    shapes = [plain, replace(plain, hidden=True), replace(plain, clip=1.0)]
    runs = [FORECAST[0].run(shape, 0) for shape in shapes]
    assert len({run.name for run in runs}) == 3
    assert [(run.recipe.hidden, run.recipe.clip) for run in runs] == [
        (False, None),
        (True, None),
        (False, 1.0),
    ]


# What became of a run


def falling(steps: int = 100) -> np.ndarray:
    return 2.3 * np.exp(-np.arange(steps) / 15)


def test_a_falling_loss_is_healthy():
    found = judge(list(falling()), TEN, items=64, left=0.01, from_start=False)
    assert (found.label, found.event) == ("healthy", None)


def test_a_loss_that_blows_up_for_good_has_failed_at_its_first_step_above_the_limit():
    losses = np.concatenate([falling(50), [0.5, 1.9, 2.1], np.full(47, 2.3)])
    found = judge(list(losses), TEN, items=64, left=1.0, from_start=False)
    assert (found.label, found.event) == ("failed", 52)


def test_a_spike_that_heals_is_excluded():
    losses = falling()
    losses[60] = 5.0
    found = judge(list(losses), TEN, items=64, left=0.01, from_start=False)
    assert (found.label, found.event) == ("excluded", 60)


def test_a_run_that_does_not_get_anywhere_is_excluded_unless_its_rate_was_too_large():
    losses = [2.3] * 100
    assert judge(losses, TEN, items=64, left=1.0, from_start=False).label == "excluded"
    found = judge(losses, TEN, items=64, left=1.0, from_start=True)
    assert (found.label, found.event) == ("failed", 10)


def test_a_run_at_its_tuned_rate_or_below_is_no_failure_of_the_rate():
    losses = [2.3 * 0.9**t for t in range(60)] + [3.0] * 40
    said = [
        judge(losses, TEN, items=64, left=1.3, from_start=False, multiple=m).label
        for m in (0.5, 1.0, 1.5)
    ]
    assert said == ["excluded", "excluded", "failed"]


def test_one_bad_batch_of_four_items_is_no_event():
    losses = falling()
    losses[60] = 4.0
    assert event(list(losses), TEN, items=64) == 60
    assert event(list(losses), TEN, items=4) is None


def test_the_event_of_small_batches_is_dated_at_its_first_bad_loss():
    losses = np.concatenate([falling(50), np.full(50, 2.6)])
    assert event(list(losses), TEN, items=4) == 50


def test_before_step_ten_only_a_loss_that_is_not_finite_is_an_event():
    assert event([2.3, 9.0, *falling(50)], TEN, items=64) is None
    assert event([2.3, 9.0, math.nan], TEN, items=64) == 2


def test_losses_count_in_shares_of_what_can_be_learnt():
    text = Rates(tuned=1, breaks=2, floor=2.0, chance=3.0, seconds=1)
    assert event([*np.linspace(3, 2.1, 50), 2.9], text, items=64) == 50
    assert event([*np.linspace(3, 2.1, 50), 2.8], text, items=64) is None


@pytest.mark.usefixtures("known_rates")
def test_a_task_whose_loss_tells_nothing_is_judged_by_its_scores():
    told = story(np.ones(100), left=1.0, run=a_run(ILL, "ramp", "reinforce-grid"))
    told.data["scores"] = [2.3, 0.8, 0.3, 0.2, 0.2, 0.2, 2.4, 2.4, 2.4, 2.4]  # every ten steps
    assert (told.outcome.label, told.outcome.event) == ("failed", 60)
    assert story(np.ones(100), left=0.1).outcome.label == "healthy"


# Detectors


def test_the_z_score_of_a_loss_is_that_of_the_fifty_before_it():
    losses = np.random.default_rng(0).normal(1, 0.1, 80)
    losses[70] = 2.0
    expected = (2.0 - losses[20:70].mean()) / losses[20:70].std()
    assert loss_z_score(story(losses))[70] == pytest.approx(expected)


def test_a_rising_loss_is_found_in_units_of_the_first():
    scores = loss_rise(story(np.concatenate([np.full(30, 2.0), np.full(60, 4.0)])))
    assert scores[:30].max() == pytest.approx(0, abs=1e-9)
    assert scores[-1] == pytest.approx(1.0, rel=1e-3)


def test_zclip_counts_a_spike_clipped_only():
    norms = np.random.default_rng(0).normal(1, 0.1, 100)
    norms[50:53] = 100.0
    scores = grad_norm_z_score(story(np.ones(100), norms=norms))
    assert np.isneginf(scores[:25]).all()
    assert (scores[50:53] > 50).all()  # the first has not hidden the others
    assert abs(scores[53:]).max() < 10


def test_a_value_that_is_not_finite_is_the_highest_score():
    losses = [*np.ones(60), math.nan]
    for formula in (loss_z_score, loss_rise):
        assert formula(story(losses))[60] == math.inf
    assert grad_norm_z_score(story(losses, norms=losses))[60] == math.inf


def test_lambda_max_scores_only_where_a_probe_has_measured_it():
    scores = lambda_max(story(np.ones(10), margins=[(3, 20.0), (7, 40.0)]))
    assert first_above(scores, 30) == 7
    assert np.isfinite(scores).sum() == 2
    assert first_above(scores, 50) is None


def test_alerts_count_from_when_they_are_raised_and_by_their_severity_and_rule():
    told = story(
        np.ones(50),
        alerts=[an_alert(5, "info"), an_alert(9, rule="loss_rise"), an_alert(20, "critical")],
    )
    assert geomwatch(told) == 9
    assert geomwatch_geometry(told) == 20
    assert first_alert(told, severities=("info",)) == 5
    told.alerts.append(an_alert(2, rule="planned_rate"))
    assert geomwatch(told) == 2
    assert geomwatch_unplanned(told) == 9
    assert either(geomwatch_unplanned, lambda _: 12)(told) == 9


# Scores


LOSS = Detector("loss itself", lambda s: np.asarray(s.losses))


def test_a_frozen_threshold_allows_as_many_false_alarms_as_it_says():
    well = [story([peak]) for peak in range(40)]
    threshold = freeze(LOSS, well, most=0.05)
    assert sum(above(LOSS, threshold)(s) is not None for s in well) == 2
    assert freeze(LOSS, []) == math.inf


def failing(alarm: int | None, event: int) -> Story:
    losses = np.concatenate([falling(event), np.full(40, 2.5)])
    alerts = [] if alarm is None else [an_alert(alarm)]
    return story(losses, alerts=alerts, left=1.0, run=a_run(shape="ramp"))


@pytest.fixture
def known_rates(monkeypatch):
    monkeypatch.setattr(Run, "rates", TEN)


@pytest.mark.usefixtures("known_rates")
def test_a_failing_run_is_announced_when_the_alarm_comes_before_the_event():
    ill = [failing(20, 50), failing(45, 50), failing(50, 50), failing(None, 50)]
    assert [lead_of(geomwatch, s) for s in ill] == [30, 5, 0, 0]
    found = score(geomwatch, [story(falling()), story(falling(), alerts=[an_alert(3)])], ill)
    assert (found.false.k, found.false.n) == (1, 2)
    assert (found.recall.k, found.recall.n, found.early.k) == (2, 4, 1)
    assert found.lead.value == 17.5


@pytest.mark.usefixtures("known_rates")
def test_by_step_ten_means_before_a_nan_that_comes_sooner():
    early = story([2.3, 9.0, math.nan], left=math.inf, alerts=[an_alert(2)])
    late = story([2.3] * 50, left=1.0, alerts=[an_alert(11)])
    in_time = story([2.3, 9.0, math.nan], left=math.inf, alerts=[an_alert(1)])
    assert by_step_ten(geomwatch, [early, late, in_time]).k == 1


@pytest.mark.usefixtures("known_rates")
def test_later_than_step_ten_is_still_in_time_before_the_loss_blows_up():
    stories = [failing(9, 50), failing(40, 50), failing(50, 50), failing(None, 50)]
    assert before_end(geomwatch, stories).k == 2


@pytest.mark.usefixtures("known_rates")
def test_a_curve_goes_from_no_alarm_to_all_and_counts_announcements_only():
    well = [story([0.1, 0.2]), story([0.1, 0.4])]
    ill = [failing(None, 50)]
    found = curve(LOSS, well, ill)
    assert (found.false[0], found.recall[0]) == (0, 0)
    assert (found.false[-1], found.recall[-1]) == (1, 1)
    assert found.recall_at(0.0) == 1  # its first loss, 2.3
    assert (np.diff(found.recall) >= 0).all()


def test_intervals_of_shares_are_exact():
    # The values that tables of the binomial distribution give.
    assert Share(0, 30).interval == pytest.approx((0, 0.1157), abs=1e-4)
    assert Share(1, 30).interval == pytest.approx((0.0008, 0.1722), abs=1e-4)
    assert Share(30, 30).interval == pytest.approx((0.8843, 1), abs=1e-4)
    assert str(Share(0, 0)) == "-"


def test_the_interval_of_a_median_holds_it_and_does_not_change():
    sample = Median(list(np.random.default_rng(1).exponential(30, 40)))
    low, high = sample.interval
    assert low < sample.value < high
    assert sample.interval == (low, high)
    assert Median([7, 7, 7]).interval == (7, 7)


# Storage


def test_an_observation_comes_back_from_json_as_it_was():
    seen = Observation(
        index=7,
        lr=(0.1, 0.2),
        optimizer="SGD momentum 0.9",
        margin=Estimate(0.4, math.inf, "residual", hvps=5),
        fresh=True,
        same_data=True,
        estimates={"lambda_max": Estimate(None, status="failed", reason="why")},
        loss=math.nan,
        layers=("a (90%)",),
        settled=Settled(6, None, 1.5, stepped=False),
    )
    back = decode(Observation, json.loads(json.dumps(encode(seen))))
    assert math.isnan(back.loss)
    assert replace(back, loss=0.0) == replace(seen, loss=0.0)


def test_an_old_observation_is_read_without_the_fields_that_are_gone():
    data = encode(Observation(index=3, lr=(0.1,))) | {"gone": {"deep": 1}}
    assert decode(Observation, data) == Observation(index=3, lr=(0.1,))


def test_what_cannot_be_stored_is_refused():
    @dataclass
    class Holder:
        what: object

    with pytest.raises(TypeError, match=r"must be plain data, got Tensor"):
        encode(Holder(torch.ones(2)))


# A run from end to end


@pytest.fixture(scope="module")
def told() -> Story:
    run = a_run(ILL, shape="constant-30tuned")
    return Story(run, DEFAULT, json.loads(json.dumps(execute(run, DEFAULT))))


def test_the_monitor_does_not_change_the_run_it_watches(told):
    bare = train(prepare(told.run.task, ILL))
    assert told.losses == bare.losses
    assert told.grad_norms == bare.grad_norms


def test_a_run_says_what_was_seen_when_it_was_raised_and_what_it_cost(told):
    steps = [shown["at"] for shown in told.data["observations"]]
    assert steps == list(range(len(told.losses) + 1))  # and once more when it is closed
    loud = [a for a in told.alerts if a["severity"] != "info"]
    assert loud
    assert all(a["step"] <= a["raised"] <= len(told.losses) for a in loud)
    assert told.measured("stability_margin")[0] > 0
    assert told.cost.total > told.cost.grad_norms > 0
    assert told.outcome.label == "failed"


def test_rules_replayed_on_a_stored_run_say_what_they_said_in_it(told):
    assert replay(told).alerts == told.alerts
    assert differences([told]) == []


def test_other_rules_on_a_stored_run_differ(told):
    [difference] = differences([told], rules=lambda: [LossRise()])
    assert difference.before[1] != "loss_rise"
    assert difference.before != difference.after


def test_who_follows_the_advice_of_an_alert_trains_at_a_lower_rate(told):
    followed = execute(told.run, ADVICE)
    assert followed["caps"]
    assert followed["caps"][0][0] == 0  # before the first step
    assert followed["caps"][0][1] < ILL.rate
    assert followed["attempts"] == 1
    assert followed["losses"][0] == told.losses[0]
    assert followed["losses"][-1] < told.losses[-1]
    assert set(followed["rates"]) == {ILL.rate}  # the user's own schedule is left alone


def test_who_is_told_to_start_again_does(told, monkeypatch):
    monkeypatch.setattr("harness.watching.default_rules", lambda: [LossRise(), NonFinite()])
    followed = execute(told.run, ADVICE)
    assert followed["attempts"] > 1
    assert followed["losses"][0] == told.losses[0]
    assert followed["losses"][-1] < told.losses[-1]


def test_only_what_says_so_makes_a_follower_start_again():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    obedience = Obedience(optimizer, [(3, 0.5)])
    obedience.hear(0, {"severity": "warning", "message": "Lower it to about 0.3 (0.3 x)."})
    assert not obedience.wants_again
    obedience.hear(9, {"severity": "info", "message": "Start again at about 0.1 (0.1 x)."})
    obedience.hear(9, {"severity": "warning", "message": "Start again at about 0.9 (0.9 x)."})
    assert not obedience.wants_again  # no lower than it is already
    obedience.hear(9, {"severity": "warning", "message": "Start again at about 0.1 (0.1 x)."})
    assert obedience.wants_again
    assert obedience.caps == [(3, 0.5), (0, 0.3), (9, 0.1)]


def test_the_advised_rate_is_read_from_the_message_of_an_alert():
    alert = {"severity": "critical", "message": "Lower the learning rate to about 2e-05 (0.1 x)."}
    assert advised_rate(alert) == 2e-5
    assert advised_rate(alert | {"severity": "info"}) is None
    assert advised_rate(alert | {"message": "look at the data"}) is None


def test_a_lowered_rate_does_not_reach_the_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    planned = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    obedience = Obedience(optimizer)
    obedience.hear(0, {"severity": "warning", "message": "to about 0.3 (x"})
    obedience.hear(0, {"severity": "warning", "message": "to about 0.6 ("})  # no lower one
    seen = []
    for _ in range(3):
        obedience.apply()
        obedience.apply()  # once before the monitor looks and once after
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        planned.step()
    assert seen == [0.3, 0.3, 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert obedience.caps == [(0, 0.3)]


# The program


@pytest.fixture
def few_runs(monkeypatch) -> list[Run]:
    """Two healthy and two failing ramps of either half, too short for any figure."""
    runs = [
        a_run(replace(SHORT, batch=batch, rate=rate, schedule="ramp"), f"ramp-{rate}", task)
        for task, batch in (("mlp-digits", 16), ("moe-digits", 32))
        for rate in (0.05, 20.0)
    ]
    monkeypatch.setattr("harness.grid.forecast_quick", lambda: runs)
    return runs


def test_the_program_does_what_is_missing_and_writes_a_report(few_runs, tmp_path, capsys):
    arguments = ["--quick", "--workers", "1", "--folder", str(tmp_path)]
    assert Forecast().main([*arguments, "--policies", "default", "10%", "advice"]) == 0
    report = (tmp_path / "forecast.md").read_text(encoding="utf-8")
    assert "from 4 trainings" in report
    assert "budget" in report
    assert (tmp_path / "forecast_roc.png").stat().st_size > 10_000
    assert (tmp_path / "forecast_lead.png").stat().st_size > 10_000
    store = Store(tmp_path)
    wanted = [job for job in product(few_runs, ("default", "10%")) if concerns(*job)]
    assert store.missing(wanted) == []
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")}
    assert Forecast().main([*arguments, "--policies", "default"]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")}
    capsys.readouterr()
    assert Forecast().main(["replay", *arguments, "--policies", "default"]) == 0
    assert "default: 0 of 4 runs would be judged otherwise" in capsys.readouterr().out


def test_runs_are_read_as_they_would_be_judged_today(told, tmp_path):
    store = Store(tmp_path)
    store.save(told.run, DEFAULT, told.data | {"alerts": []})
    (again,) = read_replayed(store, [told.run, a_run()], DEFAULT, workers=1)
    assert again.alerts == told.alerts


def test_a_run_with_other_settings_is_done_again(tmp_path):
    store, run = Store(tmp_path), a_run()
    store.save(run, DEFAULT, {"losses": [1.0]})
    assert store.load(run, DEFAULT)["losses"] == [1.0]
    slower = replace(run, recipe=replace(run.recipe, rate=0.05))
    assert slower.name == run.name
    assert store.load(slower, DEFAULT) is None
    assert store.missing([(run, DEFAULT), (slower, DEFAULT)]) == [(slower, DEFAULT)]
    assert read(store, [(run, DEFAULT), (slower, DEFAULT)])[0].run == run


def test_a_file_that_was_cut_off_is_done_again(tmp_path):
    store, run = Store(tmp_path), a_run()
    store.save(run, DEFAULT, {"losses": [1.0]})
    path = store.path(run, DEFAULT)
    path.write_bytes(path.read_bytes()[:-20])
    assert store.load(run, DEFAULT) is None
    assert store.missing([(run, DEFAULT)]) == [(run, DEFAULT)]


def test_a_run_that_raises_does_not_stop_the_others(few_runs, tmp_path, monkeypatch, capsys):
    true = pool.execute

    def fragile(run, policy):
        if run.recipe.rate == 20:
            raise RuntimeError("out of luck")
        return true(run, policy)

    monkeypatch.setattr(pool, "execute", fragile)
    arguments = ["--quick", "--workers", "1", "--folder", str(tmp_path), "--policies", "default"]
    assert Forecast().main(arguments) == 1
    assert capsys.readouterr().err.count("RuntimeError: out of luck") == 2
    assert len(list(tmp_path.rglob("*.gz"))) == 2
    assert "**Incomplete: 2 runs are missing.**" in (tmp_path / "forecast.md").read_text("utf-8")


def test_stored_runs_are_plain_json(tmp_path):
    store, run = Store(tmp_path), a_run()
    store.save(run, DEFAULT, {"losses": [1.0]})
    data = json.loads(gzip.decompress(store.path(run, DEFAULT).read_bytes()))
    assert data["run"]["name"] == run.name
    assert data["policy"] == DEFAULT


def test_a_policy_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        Forecast().main(["--quick", "--policies", "3%"])
    assert "a policy must be among none, default, 5%" in capsys.readouterr().err
