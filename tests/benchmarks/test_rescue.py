"""The rescue benchmark: its grid, its bars, its policies, and a run from end to end."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import rescue
import torch
from harness.baselines import AutoClip, Plateau, ZClip
from harness.cells import Cells
from harness.execute import execute
from harness.grid import CALIBRATION, LONG, NOISY, RESCUE, SEEDS, multiplied
from harness.grid import rescue as runs
from harness.growing import Growing, Knob
from harness.policies import BASELINES, named
from harness.run import Setting
from harness.store import Store
from harness.story import Story
from rescue import Rescue, page
from tasks import TASKS
from tasks.rates import key, load
from tasks.training import Recipe, prepare, train

DIGITS = Setting("mlp-digits", "sgd", 64, 40)


def ended(
    loss: float, *, policy: str = "cap", multiple: float = 8.0, accuracy: float = 0.9, seed: int = 0
) -> Story:
    run = multiplied(DIGITS, "constant", multiple, seed)
    data = {
        "tail": loss if math.isfinite(loss) else None,
        "evaluation": {"loss": 0.0, "accuracy": accuracy},
        "rates": [1.0],
        "taken": [1.0],
        "seconds": {"bare": 1.0, "policy": 0.1},
        "code": "",
        "commit": "",
    }
    return Story(run, policy, data)


def tuned(*losses: float) -> list[Story]:
    return [ended(x, policy="none", multiple=1.0, seed=i) for i, x in enumerate(losses)]


def test_the_sets_share_neither_tasks_nor_seeds():
    by_set = {part: {s.task_name for s in RESCUE if s.part == part} for part in SEEDS}
    assert not by_set["development"] & by_set["validation"]
    assert not set(SEEDS["development"]) & set(SEEDS["validation"])
    assert all(CALIBRATION not in seeds for seeds in SEEDS.values())


def test_every_setting_of_the_grid_has_been_calibrated():
    known = load()
    assert all(key(s.task_name, s.optimizer, s.batch) in known for s in (*RESCUE, *LONG, *NOISY))
    names = [run.name for run in runs(RESCUE)]
    assert len(set(names)) == len(names)


def test_large_nets_are_done_on_the_part_of_the_grid_that_decides():
    (large,) = {
        (frozenset(r.recipe.schedule for r in own), frozenset(r.multiple for r in own))
        for own in [[r for r in runs([s])] for s in RESCUE if s.costly]
    }
    assert large == (frozenset({"constant", "cosine"}), frozenset({1.0, 8.0, 30.0}))


@pytest.mark.parametrize(
    ("loss", "accuracy", "rescued"),
    [
        (0.029, 0.9, 1),  # within three times 0.01
        (0.031, 0.9, 0),
        (0.01, 0.886, 1),
        (0.01, 0.884, 0),
        (math.inf, 0.9, 0),
    ],
)
def test_a_run_is_rescued_when_loss_and_accuracy_are_those_of_the_tuned_rate(
    loss, accuracy, rescued
):
    found = Cells([*tuned(0.01, 0.01), ended(loss, accuracy=accuracy)])
    assert found.rescued("cap", 8.0) == (rescued, 1)


def test_the_spread_of_seeds_widens_the_bar():
    found = Cells([*tuned(0.005, 0.105), ended(0.18)])  # sd 0.07
    assert found.rescued("cap", 8.0) == (1, 1)


def test_a_run_has_diverged_when_it_has_learnt_nothing():
    found = Cells([ended(2.2), ended(math.inf, seed=1), ended(1.0, seed=2)])
    assert found.diverged("cap", 8.0) == (2, 3)


def test_no_harm_is_judged_over_seeds():
    own = [ended(x, multiple=1.0, seed=i) for i, x in enumerate((0.0105, 0.0114))]
    assert Cells([*tuned(0.01, 0.01), *own]).kept() == (1, 1)
    own = [ended(x, multiple=1.0, seed=i) for i, x in enumerate((0.011, 0.0114))]
    assert Cells([*tuned(0.01, 0.01), *own]).kept() == (0, 1)


def test_a_better_baseline_is_named():
    outcomes = [*tuned(0.01, 0.01), ended(0.02), ended(0.015, policy="clip")]
    assert Cells(outcomes).worse_than_a_baseline() == [(DIGITS, "constant", 8.0)]


def test_a_baseline_is_compared_on_the_seeds_it_was_run_on():
    own = [ended(0.01, seed=0), ended(5.0, seed=1)]
    on_one = Cells([*tuned(0.01, 0.01), *own, ended(0.02, policy="clip", seed=0)])
    assert on_one.worse_than_a_baseline() == []
    on_other = Cells([*tuned(0.01, 0.01), *own, ended(0.02, policy="clip", seed=1)])
    assert on_other.worse_than_a_baseline() == [(DIGITS, "constant", 8.0)]


def test_the_report_says_what_was_reached():
    cells = Cells([*tuned(0.01, 0.01), ended(0.02), ended(math.inf, policy="clip")])
    text = page({"development": cells}, {}, "A note.")
    assert "| development | x4 to x30: rescued | >= 95 % | 1 of 1 |" in text
    assert "0.02 / 90.0%" in text
    assert "NaN" in text


@pytest.mark.parametrize("policy", ["none", "cap", *BASELINES, "tuned", "batches"])
def test_a_run_ends_in_plain_data_under_every_policy(policy):
    run = multiplied(DIGITS, "cosine", 8.0, 0)
    found = execute(run, policy)
    assert json.loads(json.dumps(found)) == found
    assert len(found["losses"]) == 40
    if policy == "cap":
        assert len(found["taken"]) == 40
        assert min(Story(run, policy, found).scales) < 1


def test_a_store_returns_what_was_saved_for_the_same_settings_only(tmp_path):
    store, run = Store(tmp_path), multiplied(DIGITS, "cosine", 8.0, 0)
    store.save(run, "cap", {"tail": 1.0})
    assert store.load(run, "cap")["tail"] == 1.0
    assert store.missing([(run, "cap"), (run, "none")]) == [(run, "none")]
    path = next(tmp_path.rglob("*.json.gz"))
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(text.replace('"settings": "', '"settings": "x').encode()))
    assert store.load(run, "cap") is None
    path.write_text("{")
    assert store.load(run, "cap") is None


def loop_of(rate: float = 0.1):
    recipe = Recipe("sgd", rate, 64, 0, 40)
    return prepare(TASKS["mlp-digits"], recipe)


def test_a_plateau_lowers_the_rate_of_steps_and_gives_the_schedule_its_own_back():
    loop = loop_of()
    policy = Plateau(loop)
    taken: list[float] = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: taken.append(o.param_groups[0]["lr"]))
    for _ in range(25 * 5):
        policy(0, None, torch.tensor(1.0))
    train(loop)
    assert taken[0] == pytest.approx(0.01)
    assert loop.optimizer.param_groups[0]["lr"] == 0.1


def test_clipping_baselines_follow_their_papers():
    loop = loop_of()

    def step(policy, norm: float) -> float:
        for p in loop.model.parameters():
            p.grad = torch.zeros_like(p)
        next(loop.model.parameters()).grad.view(-1)[0] = norm
        policy(0, None, torch.tensor(1.0))
        return policy.norm()

    auto = AutoClip(loop)
    assert [step(auto, norm) for norm in (1.0, 2.0, 3.0)] == pytest.approx([1.0, 1.1, 1.2])
    z = ZClip(loop)
    for i in range(25):
        step(z, 1.0 + 0.1 * (-1) ** i)
    mean, sd = z.mean, math.sqrt(z.variance)
    score = (2.0 - mean) / (sd + 1e-6)
    assert step(z, 2.0) == pytest.approx(mean + 2.5**2 * sd / score, rel=1e-4)
    assert step(z, mean) == pytest.approx(mean, rel=1e-5)


def test_options_of_the_cap_can_be_tried_by_name():
    loop = loop_of()
    assert named("cap:c_bs=1.5,release=1.1").make(loop).monitor is not None
    with pytest.raises(TypeError, match="c_ps"):
        named("cap:c_ps=1.5").make(loop)


def test_batches_grow_by_whole_draws():
    knob = Knob()
    source = Growing(TASKS["mlp-digits"].source, knob)
    drawn = source.draws(0, 16)
    sizes = [len(next(drawn)[1])]
    knob.set(4.0)
    assert [*sizes, len(next(drawn)[1])] == [16, 64]


def test_the_whole_runs_restarts_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rescue, "RESCUE", (DIGITS,))
    arguments = ["--quick", "--folder", str(tmp_path), "--workers", "1", "--only", "sgd"]
    monkeypatch.setattr(rescue, "QUICK", (DIGITS.label,))
    monkeypatch.setattr(rescue, "BASELINES", ("clip",))
    assert Rescue().main(["list", *arguments]) == 0
    assert "16 missing" in capsys.readouterr().out
    assert Rescue().main(arguments) == 0
    assert Rescue().main(["list", *arguments]) == 0
    assert "0 missing" in capsys.readouterr().out
    assert "| development | x4 to x30: rescued |" in (tmp_path / "rescue.md").read_text("utf-8")
    assert (tmp_path / "rescue.png").stat().st_size > 1000
