"""Barriers: closed forms, BatchNorm, permuted copies, bent paths, states that do not fit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Quadratic, cross_entropy, digits, mlp, quadratic_loss, wishart
from states import assert_same, everything
from torch import Tensor, nn

from geomwatch import landscape
from geomwatch.errors import UsageError, UsageTypeError

ONES = [torch.ones(2, dtype=torch.float64)]


def train(model: nn.Module, *, steps: int = 150, seed: int = 1, lr: float = 0.1) -> dict:
    x, y = digits(512)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        pick = torch.randint(0, len(x), (64,), generator=rng)
        optimizer.zero_grad()
        cross_entropy(model, (x[pick], y[pick])).backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def trained(make: Callable[[], nn.Module], seed: int, **options) -> dict:
    torch.manual_seed(seed)
    return train(make(), seed=seed, **options)


def small_mlp() -> nn.Sequential:
    return mlp(64, 32, 24, 10)


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(64, 20),
        nn.BatchNorm1d(20),
        nn.GELU(),
        nn.Linear(20, 10),
    )


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.deep(self.second(torch.relu(self.norm(self.first(x))))))


class Residual(nn.Module):
    """A residual net whose forward is its own, with a mean over places and a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(x.size(0), 1, 8, 8))
        x = F.max_pool2d(self.down(self.blocks(x)), 2)
        return self.head(self.norm(x.mean(dim=(2, 3))))


NETS = {"MLP": small_mlp, "convolutional, BatchNorm": convnet, "residual": Residual}


# --- closed forms ------------------------------------------------------------------------------


def test_the_barrier_of_a_double_well_is_what_algebra_says():
    class DoubleWell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, batch: Tensor) -> Tensor:
            return ((self.w**2 - 1) ** 2 + 0.25 * (self.w + 1)).sum()

    state = {"w": torch.tensor([-1.0], dtype=torch.float64)}
    other = {"w": torch.tensor([1.0], dtype=torch.float64)}
    found = landscape.barrier(DoubleWell(), state, other, quadratic_loss, ONES, points=201)
    w = np.linspace(-1, 1, 201)
    losses = (w**2 - 1) ** 2 + 0.25 * (w + 1)
    assert np.abs(found.losses - losses).max() < 1e-12
    assert (found.loss_a, found.loss_b) == (0.0, 0.5)
    assert found.max_loss == pytest.approx(losses.max())
    assert found.argmax == pytest.approx(losses.argmax() / 200)
    # the line between the ends is the tilt itself
    assert found.height == pytest.approx(1.0)
    assert found.argmax_height == pytest.approx(0.5)
    assert found.path == "linear"
    assert found.straight is found.losses or np.array_equal(found.straight, found.losses)


def test_a_convex_loss_has_a_largest_loss_but_no_barrier():
    model = Quadratic(wishart(12, seed=1))
    a, b = ({**model.state_dict(), "w": s * torch.ones(12, dtype=torch.float64)} for s in (1, -2))
    found = landscape.barrier(model, a, b, quadratic_loss, ONES)
    assert found.height == 0.0
    assert found.argmax_height in (0.0, 1.0)
    assert found.max_loss == found.loss_b > found.loss_a > 0


def test_points_that_are_not_finite_leave_lower_bounds():
    model = Quadratic(wishart(12, seed=1))
    a, b = ({**model.state_dict(), "w": s * torch.ones(12, dtype=torch.float64)} for s in (-1, 1))

    def pole(m, batch):
        loss = quadratic_loss(m, batch)
        return loss / (m.w.abs().max() > 0.15)

    found = landscape.barrier(model, a, b, pole, ONES, points=11)
    assert found.nonfinite == 1
    assert found.max_loss == pytest.approx(found.loss_a)
    nothing = landscape.barrier(model, a, b, lambda m, x: m(x) * torch.inf, ONES)
    assert (nothing.max_loss, nothing.height, nothing.nonfinite) == (None, None, 21)


def test_a_barrier_of_a_loss_that_changes_with_the_call_is_marked():
    model = small_mlp()
    a, b = (copy.deepcopy(small_mlp().state_dict()) for _ in range(2))
    calls = itertools.count()

    def drifting(model, batch):
        return cross_entropy(model, batch) + 0.01 * next(calls)

    found = landscape.barrier(model, a, b, drifting, [digits(16)], points=3)
    assert not found.provenance["deterministic"]
    assert found.provenance["repeat_difference"] == pytest.approx(0.01, rel=1e-3)


# --- states ------------------------------------------------------------------------------------


def test_both_ends_are_the_states_themselves_whole_numbers_included():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, batch: Tensor) -> Tensor:
            return self.w.sum() * 0 + self.steps + 100 * self.flags.sum()

    model = Counting()
    a = {"w": torch.rand(2), "steps": torch.tensor(3), "flags": torch.tensor([True, False])}
    b = {"w": torch.rand(2), "steps": torch.tensor(7), "flags": torch.tensor([True, True])}
    found = landscape.barrier(model, a, b, quadratic_loss, ONES, points=5)
    assert found.losses.tolist() == [103, 103, 103, 207, 207]


def test_the_weights_of_the_model_play_no_part_and_are_left_alone():
    a, b = trained(convnet, 1, steps=20), trained(convnet, 2, steps=20)
    model, other = convnet(), convnet().eval()
    cross_entropy(model, digits(16)).backward()
    before = everything(model)
    first = landscape.barrier(model, a, b, cross_entropy, [digits(64)], points=5)
    assert_same(before, everything(model))
    second = landscape.barrier(other, a, b, cross_entropy, [digits(64)], points=5)
    assert np.array_equal(first.losses, second.losses)


@pytest.mark.parametrize("interrupted", [False, True])
def test_large_frozen_weights_are_interpolated_and_put_back(interrupted):
    """Those are not in a probe's snapshot, which has no need to move them."""
    model = nn.Sequential(nn.Linear(64, 16_000), nn.ReLU(), nn.Linear(16_000, 10))
    a = copy.deepcopy(model.state_dict())
    b = {k: t + 0.01 * torch.randn_like(t) for k, t in a.items()}
    model[0].requires_grad_(False)
    assert model[0].weight.numel() > 1_000_000
    calls = itertools.count(1)

    def loss_fn(m, batch):
        if interrupted and next(calls) == 6:
            raise KeyboardInterrupt
        return cross_entropy(m, batch)

    free = nn.Sequential(nn.Linear(64, 16_000), nn.ReLU(), nn.Linear(16_000, 10))
    before = everything(model)
    try:
        found = landscape.barrier(model, a, b, loss_fn, [digits(16)], points=3)
    except KeyboardInterrupt:
        assert interrupted
    else:
        same = landscape.barrier(free, a, b, cross_entropy, [digits(16)], points=3)
        assert np.array_equal(found.losses, same.losses)
    assert_same(before, everything(model))


def test_a_model_that_is_frozen_altogether_has_barriers():
    a, b = trained(small_mlp, 1, steps=20), trained(small_mlp, 2, steps=20)
    frozen = small_mlp().requires_grad_(False)
    found = landscape.barrier(frozen, a, b, cross_entropy, [digits(64)], points=5)
    free = landscape.barrier(small_mlp(), a, b, cross_entropy, [digits(64)], points=5)
    assert np.array_equal(found.losses, free.losses)


@pytest.mark.parametrize("after", [1, 4, 9, 16])
def test_an_interrupted_barrier_leaves_no_trace(after):
    model = convnet()
    a, b = (copy.deepcopy(model.state_dict()), copy.deepcopy(convnet().state_dict()))
    calls = itertools.count(1)

    def interrupted(m, batch):
        loss = cross_entropy(m, batch)
        if next(calls) == after:
            raise KeyboardInterrupt("stop")
        return loss

    before = everything(model)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        landscape.barrier(model, a, b, interrupted, [digits(32)], bend=True)
    assert_same(before, everything(model))


def test_a_state_that_refers_to_the_live_weights_is_not_moved_with_them():
    model = small_mlp()
    live = model.state_dict()
    other = copy.deepcopy(small_mlp().state_dict())
    found = landscape.barrier(model, live, other, cross_entropy, [digits(64)], points=5)
    frozen = copy.deepcopy(live)
    again = landscape.barrier(small_mlp(), frozen, other, cross_entropy, [digits(64)], points=5)
    assert np.array_equal(found.losses, again.losses)
    with pytest.raises(UsageError, match=r"state_dict\(\) refers to the live weights"):
        landscape.barrier(model, live, model.state_dict(), cross_entropy, [digits(64)])


def test_states_of_other_models_are_refused():
    model = small_mlp()
    good = copy.deepcopy(model.state_dict())

    def refuse(bad, message, kind=UsageError):
        with pytest.raises(kind, match=message):
            landscape.barrier(model, good, bad, cross_entropy, [digits(16)])

    missing = {k: t for k, t in good.items() if k != "2.bias"}
    refuse(missing, r"state_b must be a state of this Sequential, got one without 2\.bias\.")
    refuse(mlp(64, 32, 24, 24, 10).state_dict(), r"with the unknown 6\.weight, 6\.bias")
    refuse(mlp(64, 32, 16, 10).state_dict(), r"got shape \(16, 32\) for '2\.weight', .* \(24, 32\)")
    refuse({f"module.{k}": t for k, t in good.items()}, "Take the prefix 'module.' off its keys")
    refuse(model, "state_b must be a state_dict of the model, got Sequential", UsageTypeError)
    refuse({**good, "2.bias": 3}, r"got one without 2\.bias")


def test_options_that_do_not_fit_are_refused():
    model = small_mlp()
    a, b = copy.deepcopy(model.state_dict()), copy.deepcopy(small_mlp().state_dict())
    batches = [digits(16)]
    curve = landscape.bezier(model, a, b, cross_entropy, batches, landscape.Bending(steps=1))
    with pytest.raises(UsageError, match="points must be an integer >= 3, got 2"):
        landscape.barrier(model, a, b, cross_entropy, batches, points=2)
    with pytest.raises(UsageError, match="align must be False with a curve"):
        landscape.barrier(model, a, b, cross_entropy, batches, align=True, curve=curve)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mode'"):
        landscape.barrier(model, a, b, cross_entropy, batches, mode="train")


def test_an_interrupted_barrier_goes_on_where_it_was(tmp_path):
    model, path = small_mlp(), tmp_path / "barrier.partial"
    a, b = copy.deepcopy(model.state_dict()), copy.deepcopy(small_mlp().state_dict())
    calls = itertools.count(1)

    def interrupted(m, batch):
        if next(calls) == 14:
            raise KeyboardInterrupt
        return cross_entropy(m, batch)

    with pytest.raises(KeyboardInterrupt):
        landscape.barrier(model, a, b, interrupted, [digits(32)], resume=path)
    before = next(calls)
    found = landscape.barrier(model, a, b, interrupted, [digits(32)], resume=path)
    used = next(calls) - before - 1
    assert 5 < used < 20
    whole = landscape.barrier(model, a, b, cross_entropy, [digits(32)])
    assert np.array_equal(found.losses, whole.losses)
    with pytest.raises(UsageError, match="differs in: states"):
        landscape.barrier(model, b, a, cross_entropy, [digits(32)], resume=path)


# --- BatchNorm ---------------------------------------------------------------------------------


def test_batchnorm_statistics_are_those_of_each_point():
    a, b = trained(convnet, 1), trained(convnet, 2)
    model = convnet()
    batch = digits(512)
    anew = landscape.barrier(model, a, b, cross_entropy, [batch])
    kept = landscape.barrier(model, a, b, cross_entropy, [batch], recalibrate=False)
    assert anew.provenance["recalibrated"] == 3
    assert kept.provenance["recalibrated"] == 0
    assert anew.height < 0.8 * kept.height
    # at the middle, against statistics that were taken by hand
    middle = copy.deepcopy(model)
    middle.load_state_dict(
        {k: (t + b[k]) / 2 if t.is_floating_point() else t for k, t in a.items()}
    )
    norms = [m for m in middle.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    middle.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        middle(batch[0])
        loss = float(cross_entropy(middle.eval(), batch))
    assert anew.losses[10] == pytest.approx(loss, rel=1e-5)


def test_batchnorm_statistics_may_come_from_other_batches_and_frozen_layers_keep_theirs():
    a, b = trained(convnet, 1, steps=30), trained(convnet, 2, steps=30)
    model = convnet()
    x, y = digits(512)
    test = [(x[256:], y[256:])]
    own = landscape.barrier(model, a, b, cross_entropy, test, points=5)
    theirs = landscape.barrier(
        model, a, b, cross_entropy, test, points=5, recalibrate=[(x[:256], y[:256])]
    )
    assert not np.allclose(own.losses, theirs.losses, rtol=1e-4)
    model[2].eval()  # a frozen layer in a net that trains
    assert (
        landscape.barrier(model, a, b, cross_entropy, test, points=3).provenance["recalibrated"]
        == 2
    )


# --- alignment ---------------------------------------------------------------------------------


def permuted(model: nn.Module, state: dict, seed: int = 0) -> dict:
    """The same function with its hidden units in another order, moved by plain indexing."""
    rng = np.random.default_rng(seed)
    moved = dict(state)
    for slots in landscape.permutable_units(model).values():
        size = min(state[key].shape[axis] for key, axis in slots)
        order = rng.permutation(size)
        for key, axis in slots:
            shape = moved[key].shape
            blocks = moved[key].reshape(
                *shape[:axis], size, shape[axis] // size, *shape[axis + 1 :]
            )
            moved[key] = blocks.index_select(axis, torch.from_numpy(order)).reshape(shape)
    return moved


@pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())
def test_a_permuted_copy_is_the_same_function_behind_a_barrier_until_it_is_aligned(make):
    state = trained(make, 1)
    model = make()
    other = permuted(model, state)
    batches = [digits(256)]
    outputs = []
    for s in (state, other):
        model.load_state_dict(s)
        outputs.append(model.eval()(digits(64)[0]).detach())
    assert torch.allclose(*outputs, atol=1e-4)
    before = landscape.barrier(model, state, other, cross_entropy, batches)
    after = landscape.barrier(model, state, other, cross_entropy, batches, align=True)
    assert before.height > 0.05
    assert after.height < 0.05 * before.height
    assert after.aligned
    assert not before.aligned
    found = landscape.align(model, state, other)
    assert found.cosine_after == pytest.approx(1, abs=1e-6)
    assert found.cosine_before < 0.9
    assert all(torch.equal(found.state[k], t) for k, t in state.items() if t.is_floating_point())


def test_aligning_two_trainings_lowers_the_barrier_between_them():
    a, b = trained(small_mlp, 1), trained(small_mlp, 2)
    model, batches = small_mlp(), [digits(512)]
    before = landscape.barrier(model, a, b, cross_entropy, batches)
    after = landscape.barrier(model, a, b, cross_entropy, batches, align=True)
    assert before.height > 0.1
    assert after.height < 0.6 * before.height
    assert (
        after.provenance["alignment"]["cosine_after"]
        > after.provenance["alignment"]["cosine_before"]
    )
    assert after.loss_b == pytest.approx(before.loss_b, rel=1e-5)


def test_units_are_found_through_flattening_sums_and_depthwise_convolutions():
    units = landscape.permutable_units(convnet())
    assert ("10.weight", 1) in units["units 2"]  # 64 inputs of 16 channels
    residual = landscape.permutable_units(Residual())
    stream = next(slots for slots in residual.values() if ("stem.weight", 0) in slots)
    wanted = {"blocks.0.first.weight": 1, "blocks.1.deep.weight": 0, "down.weight": 1}
    assert set(wanted.items()) <= set(stream)
    # a depthwise convolution keeps what comes in where it is
    assert ("blocks.0.second.weight", 0) in stream
    assert ("blocks.0.first.weight", 0) not in stream


def test_a_sum_with_the_input_or_the_output_keeps_its_order():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 64)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.second(F.relu(self.first(x))))

    units = landscape.permutable_units(Skip())
    assert list(units.values()) == [[("first.weight", 0), ("first.bias", 0), ("second.weight", 1)]]


class Mixing(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 16), nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.ones(16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.grouped = nn.Conv1d(16, 16, 1, groups=4)
        self._mix = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._mix(self, x)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (lambda m, x: m.two(m.one(x).cumsum(-1)), r"permute an operation, 'cumsum'"),
        (lambda m, x: m.two(m.one(x) * m.scale), r"permute a bare parameter or buffer, 'scale'"),
        (
            lambda m, x: m.two(m.attention(*3 * (m.one(x)[None],))[0][0]),
            r"'attention'|an operation",
        ),
        (lambda m, x: m.two(m.one(x)) if x.sum() > 0 else x, r"trace the forward of Mixing"),
        (lambda m, x: m.two(torch.softmax(m.one(x), 1)), r"an operation, 'softmax'"),
    ],
)
def test_what_is_not_known_is_refused(mix, message):
    model = Mixing(mix)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message) as error:
        landscape.align(model, state, state)
    assert "units={name: [(key, axis), ...]}" in str(error.value)


def test_units_may_be_given_and_wrong_ones_are_found_out():
    make = small_mlp
    state = trained(make, 1, steps=60)
    model = make()
    units = landscape.permutable_units(model)
    other = permuted(model, state)
    given = landscape.align(model, state, other, units={"hidden": units["units 1"]})
    assert 0 < given.cosine_after < 1 - 1e-3
    with pytest.raises(UsageError, match=r"must be \(key of the state, axis from 0\), got"):
        landscape.align(model, state, other, units={"hidden": [("3.weight", 0)]})
    with pytest.raises(UsageError, match=r"multiples of one another, got \[32, 10\]"):
        landscape.align(model, state, other, units={"u": [("0.weight", 0), ("4.weight", 0)]})


def test_an_alignment_that_changes_the_function_is_found_out(monkeypatch):
    state = trained(small_mlp, 1, steps=60)
    model = small_mlp()
    wrong = {"hidden": [("0.weight", 0), ("0.bias", 0)]}  # and not what follows
    monkeypatch.setattr(
        "geomwatch.landscape.permutations.alignment.permutable_units", lambda model: wrong
    )
    with pytest.raises(UsageError, match="align must not change what the net computes"):
        landscape.barrier(
            model, state, trained(small_mlp, 2), cross_entropy, [digits(64)], align=True
        )


def test_aligning_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    model = small_mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ImportError, match=r"needs SciPy.*pip install 'geomwatch\[landscape\]'"):
        landscape.align(model, state, state)


# --- bent paths --------------------------------------------------------------------------------


def test_a_bent_path_goes_round_a_blocked_straight_one():
    a, b = trained(small_mlp, 1), trained(small_mlp, 2)
    model, batches = small_mlp(), [digits(512)]
    bending = landscape.Bending(steps=200, lr=1e-2)
    found = landscape.barrier(model, a, b, cross_entropy, batches, bend=bending)
    straight = landscape.barrier(model, a, b, cross_entropy, batches)
    assert found.path == "bezier"
    assert np.array_equal(found.straight, straight.losses)
    assert straight.height > 0.1
    assert found.height < 0.2 * straight.height
    assert (found.loss_a, found.loss_b) == (straight.loss_a, straight.loss_b)
    curve = landscape.bezier(model, a, b, cross_entropy, batches, bending)
    again = landscape.barrier(model, a, b, cross_entropy, batches, curve=curve)
    assert np.array_equal(again.losses, found.losses)
    assert np.mean(curve.losses[-20:]) < 0.5 * np.mean(curve.losses[:20])


def test_an_open_path_is_not_bent():
    model = small_mlp()
    a = train(model)
    b = train(model, steps=10, lr=0.01)
    found = landscape.barrier(model, a, b, cross_entropy, [digits(256)], bend=True)
    assert found.path == "linear"


def test_a_curve_that_diverges_says_so():
    a, b = trained(small_mlp, 1, steps=20), trained(small_mlp, 2, steps=20)
    bending = landscape.Bending(
        steps=200, lr=1e9, optimizer=lambda params: torch.optim.SGD(params, lr=1e9)
    )
    with pytest.raises(UsageError, match=r"keeps the loss finite, got (nan|inf) with lr=1e\+09"):
        landscape.bezier(small_mlp(), a, b, cross_entropy, [digits(64)], bending)


def test_training_a_curve_leaves_no_trace():
    model = convnet()
    a, b = copy.deepcopy(model.state_dict()), copy.deepcopy(convnet().state_dict())
    cross_entropy(model, digits(16)).backward()
    before = everything(model)
    curve = landscape.bezier(model, a, b, cross_entropy, [digits(64)], landscape.Bending(steps=5))
    assert_same(before, everything(model))
    assert len(curve.losses) == 5
    assert set(curve.control) == set(a)
