"""The learning rate of a step is capped, and everybody but the step sees the user's own."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
from states import same
from torch import nn
from torch.optim import lr_scheduler as S

from geomwatch.controllers.actuators import LearningRate

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], S.LRScheduler]] = {
    "step": lambda o: S.StepLR(o, 3, gamma=0.3),
    "multistep": lambda o: S.MultiStepLR(o, [2, 5], gamma=3.0),
    "constant": lambda o: S.ConstantLR(o, 0.3, total_iters=4),
    "linear": lambda o: S.LinearLR(o, 0.1, total_iters=6),
    "exponential": lambda o: S.ExponentialLR(o, 0.9),
    "polynomial": lambda o: S.PolynomialLR(o, 8, power=2.0),
    "cosine": lambda o: S.CosineAnnealingLR(o, 10),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4),
    "lambda": lambda o: S.LambdaLR(o, lambda t: min(1.0, (t + 1) / 5)),
    "multiplicative": lambda o: S.MultiplicativeLR(o, lambda t: 1.1 if t < 5 else 0.8),
    "onecycle": lambda o: S.OneCycleLR(o, 1.0, total_steps=20),
    "cyclic": lambda o: S.CyclicLR(o, 0.05, 1.0, step_size_up=3),
    "sequential": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, total_iters=4), S.ExponentialLR(o, 0.9)], [4]
    ),
    "chained": lambda o: S.ChainedScheduler(
        [S.LinearLR(o, 0.1, total_iters=4), S.ExponentialLR(o, 0.9)]
    ),
}


def weight(value: float = 1.0) -> nn.Parameter:
    w = nn.Parameter(torch.full((3,), value))
    w.grad = torch.ones(3)
    return w


class Seen:
    """Records the rates that steps are taken with; made after the actuator."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates: list[list[float]] = []
        optimizer.register_step_pre_hook(
            lambda o, *_: self.rates.append([float(g["lr"]) for g in o.param_groups])
        )


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_the_way_it_would_without_a_cap(name):
    courses = []
    for capped in (False, True):
        optimizer = torch.optim.SGD([weight()], lr=1.0, momentum=0.9)
        actuator = LearningRate(optimizer)
        scheduler = SCHEDULERS[name](optimizer)
        seen = Seen(optimizer)
        course = []
        for _ in range(12):
            if capped:
                actuator.set(0.2)
            course.append((rates(optimizer), scheduler.get_last_lr()))
            optimizer.step()
            scheduler.step()
        courses.append((course, seen.rates))
    (base, taken), (beside_cap, taken_under_cap) = courses
    assert beside_cap == base
    assert taken_under_cap == [[pytest.approx(min(lr, 0.2))] for (lr,) in taken]


def test_plateau_schedulers_reduce_the_users_rate():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    actuator = LearningRate(optimizer)
    scheduler = S.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    actuator.set(0.1)
    for _ in range(4):
        optimizer.step()
        scheduler.step(1.0)
    assert rates(optimizer) == [0.125]


def test_without_a_cap_steps_are_those_of_a_bare_optimizer_bit_for_bit():
    bare, watched = weight(), weight()
    optimizers = [torch.optim.AdamW([w], lr=0.1) for w in (bare, watched)]
    actuator = LearningRate(optimizers[1])
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    assert actuator.value([0.1]) == 1.0
    assert torch.equal(bare, watched)
    assert same(optimizers[0].state_dict(), optimizers[1].state_dict())


def test_all_groups_are_lowered_by_the_same_factor():
    groups = [{"params": [weight()], "lr": 1.0}, {"params": [weight()], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    actuator, seen = LearningRate(optimizer), Seen(optimizer)
    actuator.set(0.5)
    optimizer.step()
    optimizer.add_param_group({"params": [weight()], "lr": 2.0})  # as when layers are unfrozen
    optimizer.step()
    assert seen.rates == [pytest.approx([0.5, 0.05]), pytest.approx([0.25, 0.025, 0.5])]
    assert rates(optimizer) == [1.0, 0.1, 2.0]


def test_decoupled_weight_decay_scales_with_the_rate():
    w = weight()
    w.grad = torch.zeros(3)
    optimizer = torch.optim.AdamW([w], lr=0.5, weight_decay=0.1)
    actuator = LearningRate(optimizer)
    actuator.set(0.05)
    optimizer.step()
    assert torch.allclose(w, torch.full((3,), 1 - 0.05 * 0.1))


def test_a_tensor_rate_is_changed_in_place_and_given_back():
    shared = torch.tensor(1.0)
    groups = [{"params": [weight()]}, {"params": [weight()]}]
    optimizer = torch.optim.SGD(groups, lr=shared, foreach=False)
    actuator, seen = LearningRate(optimizer), Seen(optimizer)
    actuator.set(0.25)
    optimizer.step()
    assert seen.rates == [[0.25, 0.25]]
    assert optimizer.param_groups[0]["lr"] is shared
    assert float(shared) == 1.0


def test_a_step_that_a_grad_scaler_skips_leaves_the_rates_alone():
    w = weight()
    optimizer = torch.optim.SGD([w], lr=1.0)
    actuator, seen = LearningRate(optimizer), Seen(optimizer)
    actuator.set(0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (True, False):
        w.grad = None
        scaler.scale(w.sum() * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert rates(optimizer) == [1.0]
    assert seen.rates == [[0.25]]
    assert torch.allclose(w, torch.full((3,), 0.75))


def failing_step(optimizer: torch.optim.Optimizer) -> None:
    def closure() -> float:
        raise MemoryError("in the middle of a step")

    with pytest.raises(MemoryError, match="in the middle"):
        optimizer.step(closure)


def test_after_an_exception_inside_a_step_the_next_one_starts_from_the_users_rate():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    actuator, seen = LearningRate(optimizer), Seen(optimizer)
    actuator.set(0.25)
    failing_step(optimizer)
    optimizer.step()
    assert seen.rates == [[0.25], [0.25]]
    assert rates(optimizer) == [1.0]


def test_after_an_exception_inside_a_step_a_checkpoint_holds_the_users_rate():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    actuator = LearningRate(optimizer)
    actuator.set(0.25)
    failing_step(optimizer)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1.0


def test_a_rate_that_somebody_sets_inside_a_step_is_theirs():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    actuator = LearningRate(optimizer)
    actuator.set(0.25)

    def closure() -> float:
        optimizer.param_groups[0]["lr"] = 0.125
        return 0.0

    optimizer.step(closure)
    assert rates(optimizer) == [0.125]


def test_a_cap_found_inside_a_closure_holds_for_that_step():
    w = weight()
    optimizer = torch.optim.SGD([w], lr=1.0)
    actuator = LearningRate(optimizer)
    lent = []

    def closure() -> float:
        actuator.lift()
        lent.append(rates(optimizer))  # what a monitor sees
        actuator.set(actuator.setting / 2 if actuator.setting < math.inf else 0.5)
        actuator.refresh()
        return 0.0

    optimizer.step(closure)
    optimizer.step(closure)
    assert lent == [[1.0], [1.0]]
    assert torch.allclose(w, torch.full((3,), 1 - 0.5 - 0.25))
    assert rates(optimizer) == [1.0]


def test_lbfgs_takes_all_its_iterations_at_the_capped_rate():
    w = weight()
    optimizer = torch.optim.LBFGS([w], lr=1.0, max_iter=1)
    actuator = LearningRate(optimizer)
    actuator.set(0.25)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(w, torch.full((3,), 1 - 0.25 / 3))  # its first step is lr / |g|_1
    assert rates(optimizer) == [1.0]


def test_a_closed_actuator_leaves_no_hook_behind():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    hooks = copy.copy((optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))
    actuator, seen = LearningRate(optimizer), Seen(optimizer)
    actuator.set(0.25)
    actuator.close()
    optimizer.step()
    assert seen.rates == [[1.0]]
    assert hooks[1] == optimizer._optimizer_step_post_hooks


def test_an_optimizer_does_not_keep_a_forgotten_actuator():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    actuator, seen = LearningRate(optimizer), Seen(optimizer)
    actuator.set(0.25)
    del actuator
    gc.collect()
    optimizer.step()
    assert seen.rates == [[1.0]]


def test_an_optimizer_without_hooks_says_so():
    class Own:
        param_groups = ({"lr": 1.0},)

    assert "Own has no step hooks" in LearningRate(Own()).obstacle
