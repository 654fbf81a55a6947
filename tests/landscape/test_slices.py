"""Slices and planes against closed forms; what interrupts, resumes or spoils them."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Quadratic, cross_entropy, digits, mlp, quadratic_loss, wishart
from states import assert_same, everything
from torch import Tensor, nn

from geomwatch import Measurement, landscape
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.landscape.evaluator import evaluating
from geomwatch.landscape.results import Slice

DIM = 12
ONES = [torch.ones(3, dtype=torch.float64)]


def quadratic(dtype: torch.dtype = torch.float64) -> Quadratic:
    start = torch.linspace(-1, 2, DIM, dtype=dtype)
    return Quadratic(wishart(DIM, seed=1, dtype=dtype), start)


def exact(model: Quadratic, displacement: Tensor) -> float:
    w = model.w.detach().double() + displacement.double()
    return float(0.5 * w @ model.matrix.double() @ w)


def noisy_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 10)
    )


def small_slice(model: nn.Module, loss_fn=cross_entropy, batches=None, **options) -> Slice:
    options = {"alphas": np.linspace(-1, 1, 7), **options}
    direction = options.pop("direction", None) or landscape.random_direction(model)
    batches = [digits(64)] if batches is None else batches
    return landscape.slice_1d(model, loss_fn, batches, direction, **options)


# --- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_slice_of_a_quadratic_is_exact(dtype):
    model = quadratic(dtype)
    v = landscape.random_direction(model, scale="unit", seed=3)
    found = landscape.slice_1d(model, quadratic_loss, [torch.ones(3, dtype=dtype)], v)
    expected = [exact(model, a * v.vector) for a in found.alphas]
    assert len(found.losses) == 41
    assert np.abs(found.losses - expected).max() < 1e-6 * max(np.abs(expected))
    assert found.loss == pytest.approx(exact(model, torch.zeros(DIM)), rel=1e-6)
    assert (found.nonfinite, found.provenance["deterministic"]) == (0, True)


def test_a_plane_of_a_quadratic_is_exact_also_in_an_oblique_one():
    model = quadratic()
    first = landscape.random_direction(model, scale="unit", seed=1)
    second = first.vector + 2 * landscape.random_direction(model, scale="unit", seed=2).vector
    found = landscape.plane(
        model, quadratic_loss, ONES, [first, second], alphas=[-1, 0, 2], betas=[-0.5, 1]
    )
    for (i, a), (j, b) in itertools.product(enumerate(found.alphas), enumerate(found.betas)):
        expected = exact(model, a * first.vector + b * second)
        assert found.losses[i, j] == pytest.approx(expected, rel=1e-9)
    cosine = float(first.vector @ second / second.norm())
    assert found.provenance["cosine"] == pytest.approx(cosine)
    assert found.directions == ("unit random", "given")


def test_the_fit_of_a_quadratic_is_its_slope_and_curvature():
    model = quadratic()
    v = landscape.random_direction(model, scale="unit", seed=4)
    found = landscape.slice_1d(model, quadratic_loss, ONES, v, alphas=np.linspace(-3, 3, 9))
    fit = landscape.polynomial_fit(found)
    hv = model.matrix @ v.vector
    wanted = (found.loss, float(model.w.detach() @ hv), float(v.vector @ hv / 2))
    assert fit.coefficients == pytest.approx(wanted, rel=1e-9)
    assert fit.share < 1e-12
    assert fit.turns == 1


def test_a_fit_counts_turns_beyond_rounding_and_leaves_gaps_out():
    alphas = np.linspace(-1, 1, 41)
    ripple = 5 + 1e-7 * np.sin(40 * alphas)
    flat = Slice(alphas, ripple, 5.0, "v", 0, {})
    assert landscape.polynomial_fit(flat).turns == 0
    waves = np.sin(3 * np.pi * alphas)
    waves[3] = np.inf
    fit = landscape.polynomial_fit(Slice(alphas, waves, 0.0, "v", 1, {}), degree=3)
    assert fit.turns == 6
    assert math.isinf(fit.residual[3])
    assert math.isfinite(fit.rms)
    with pytest.raises(UsageError, match="more than 42 finite points, got 40"):
        landscape.polynomial_fit(Slice(alphas, waves, 0.0, "v", 1, {}), degree=41)


def test_a_slice_along_the_gradient_starts_as_steeply_as_the_gradient_is_long():
    model, batch = mlp(64, 16, 10).double(), digits(128, dtype=torch.float64)
    g = landscape.gradient_direction(model, cross_entropy, [batch])
    found = small_slice(model, batches=[batch], direction=g, alphas=[-1e-4, 0.0, 1e-4])
    slope = (found.losses[2] - found.losses[0]) / 2e-4
    assert slope == pytest.approx(g.facts["norm"], rel=1e-6)


def test_batches_count_by_their_items_and_a_loader_is_shuffled_alike_at_each_point():
    model = mlp(64, 16, 10)
    x, y = digits(100)
    whole = small_slice(model, batches=[(x, y)])
    uneven = small_slice(model, batches=[(x[:70], y[:70]), (x[70:], y[70:])])
    assert uneven.losses == pytest.approx(whole.losses, rel=1e-6)
    assert uneven.provenance["items"] == 100
    data = torch.utils.data.TensorDataset(x, y)
    for generator in (None, torch.Generator().manual_seed(1)):
        loader = torch.utils.data.DataLoader(
            data, batch_size=30, shuffle=True, drop_last=True, generator=generator
        )
        state = None if generator is None else generator.get_state()
        found = small_slice(model, batches=loader)
        # the ten items that are dropped are the same ones each time
        assert found.provenance["deterministic"]
        assert state is None or torch.equal(generator.get_state(), state)


def test_dropout_is_one_draw_and_batchnorm_follows_the_mode():
    model = noisy_net()
    train, again = small_slice(model), small_slice(model)
    assert np.array_equal(train.losses, again.losses)
    assert train.provenance["deterministic"]
    model.eval()
    evaluated = small_slice(model, how=Measurement(mode="eval"))
    assert (train.provenance["mode"], evaluated.provenance["mode"]) == ("train", "eval")
    assert not np.allclose(train.losses, evaluated.losses, rtol=1e-3)


def test_batches_may_be_cut_where_the_loss_is_a_mean_over_items():
    model = mlp(64, 16, 10)
    whole = small_slice(model)
    seen = set()

    def loss_fn(model, batch):
        seen.add(len(batch[0]))
        return cross_entropy(model, batch)

    cut = small_slice(model, loss_fn, how=Measurement(micro_batch=30))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)
    assert {30, 4} < seen
    a, b = (copy.deepcopy(mlp(64, 16, 10).state_dict()) for _ in range(2))
    paths = [
        landscape.barrier(model.requires_grad_(False), a, b, cross_entropy, [digits(64)], how)
        for how in (None, Measurement(mode="eval", micro_batch=30))
    ]
    assert paths[0].losses == pytest.approx(paths[1].losses, rel=1e-6)
    with pytest.raises(UsageError, match=r"micro_batch must leave the loss as it is, got 30"):
        small_slice(
            mlp(64, 16, 10),
            lambda m, b: cross_entropy(m, b) * len(b[0]) ** 0.5,
            how=Measurement(micro_batch=30),
        )


def test_batches_may_be_cut_where_the_loss_is_a_sum_over_items():
    def summed(model, batch):
        return cross_entropy(model, batch) * len(batch[0])

    model = mlp(64, 16, 10)
    whole = small_slice(model, summed)
    cut = small_slice(model, summed, how=Measurement(micro_batch=30))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)


def test_one_module_that_the_loss_uses_is_isolated_like_several():
    teacher = nn.Sequential(nn.Linear(64, 10), nn.Dropout(0.5), nn.BatchNorm1d(10))

    def distilled(model, batch):
        return (model(batch[0]) - teacher(batch[0])).square().mean()

    model = mlp(64, 16, 10)
    before = everything(teacher)
    found = [
        small_slice(model, distilled, how=Measurement(also=also)) for also in (teacher, [teacher])
    ]
    assert_same(before, everything(teacher))
    assert all(f.provenance["deterministic"] for f in found)


def test_how_to_measure_is_one_object():
    with pytest.raises(UsageTypeError, match=r"how must be a geomwatch\.Measurement, got 'eval'"):
        small_slice(mlp(64, 16, 10), how="eval")


def test_a_loss_may_be_an_error_rate():
    def errors(model, batch):
        return float((model(batch[0]).argmax(1) != batch[1]).float().mean())

    found = small_slice(mlp(64, 16, 10), errors)
    assert 0.5 < found.loss <= 1
    assert all(loss * 64 == pytest.approx(round(loss * 64)) for loss in found.losses)


def test_a_loss_that_differentiates_itself_keeps_its_graph():
    def penalised(model, batch):
        x = batch[0].requires_grad_()
        loss = F.cross_entropy(model(x), batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    def plain_without_grad(model, batch):
        loss = cross_entropy(model, batch)
        return loss + 1 if torch.is_grad_enabled() else loss

    assert math.isfinite(small_slice(mlp(64, 16, 10), penalised).loss)
    model = mlp(64, 16, 10)
    shifted, plain = small_slice(model, plain_without_grad), small_slice(model)
    assert shifted.losses == pytest.approx(plain.losses + 1)


# --- nothing is left behind --------------------------------------------------------------------


def assert_untouched(model: nn.Module, act) -> None:
    model[0].weight.register_hook(lambda g: g)
    cross_entropy(model, digits(32)).backward()
    before = everything(model)
    act()
    assert_same(before, everything(model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_slice_leaves_no_trace(mode, training):
    model = noisy_net().train(training)
    assert_untouched(model, lambda: small_slice(model, how=Measurement(mode=mode)))


def interrupting(after: int):
    """A loss that is interrupted at its n-th evaluation, once."""
    calls = itertools.count(1)

    def loss_fn(model: nn.Module, batch) -> Tensor:
        loss = cross_entropy(model, batch)
        if next(calls) == after:
            raise KeyboardInterrupt("stop")
        return loss

    return loss_fn


@pytest.mark.parametrize("after", [1, 2, 4, 9])
def test_an_interrupt_leaves_no_trace(after):
    model = noisy_net()

    def act() -> None:
        with pytest.raises(KeyboardInterrupt, match="stop"):
            small_slice(model, interrupting(after))

    assert_untouched(model, act)


def test_another_mode_takes_one_copy_of_the_weights():
    """The snapshot after the change of mode shares its values with the one before it."""
    model = noisy_net()
    with evaluating(model, cross_entropy, [digits(8)], Measurement(mode="eval")) as evaluator:
        saved = [s for s in evaluator._snapshot._saved if getattr(s, "tensor", None) is not None]
        values = {id(s._values) for s in saved}
        first = evaluator._snapshot._held
        assert values <= {id(s._values) for s in first.values()}
        assert len(values) >= 4


# --- resuming ----------------------------------------------------------------------------------


def test_an_interrupted_plane_goes_on_where_it_was(tmp_path):
    model, path = mlp(64, 8, 10), tmp_path / "deep" / "plane.partial"
    directions = [landscape.random_direction(model, seed=s) for s in (0, 1)]
    grid = {"alphas": [-1, 0, 1], "resume": path}
    evaluations = itertools.count()

    def counted(model, batch):
        next(evaluations)
        return cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        landscape.plane(model, interrupting(10), [digits(32)], directions, **grid)
    kept = path.read_text(encoding="utf-8").splitlines()
    assert 2 < len(kept) < 10
    path.write_text("\n".join(kept) + "\n[8, 1.23", encoding="utf-8")  # cut short by a crash
    done: list[tuple[int, int]] = []
    resumed = landscape.plane(
        model,
        counted,
        [digits(32)],
        directions,
        progress=lambda i, n: done.append((i, n)),
        **grid,
    )
    used = next(evaluations)
    fresh = landscape.plane(model, cross_entropy, [digits(32)], directions, alphas=[-1, 0, 1])
    assert np.array_equal(resumed.losses, fresh.losses)
    assert done[0] == (len(kept) - 1, 9)
    assert done[-1] == (9, 9)
    # three on a few items, two at the centre, and the points that were missing
    assert used == 3 + 2 + 9 - (len(kept) - 1)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 10


def test_a_file_of_another_computation_is_refused(tmp_path):
    path = tmp_path / "slice.partial"
    model = mlp(64, 8, 10)
    small_slice(model, resume=path)
    with pytest.raises(UsageError, match=r"differs in: grid\. Delete it"):
        small_slice(model, resume=path, alphas=[0, 1])
    with pytest.raises(UsageError, match=r"differs in: loss at the first point, .* in the file"):
        small_slice(model, resume=path, batches=[digits(63)])
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(UsageError, match=r"differs in: directions_digest, weights"):
        small_slice(model, resume=path)
    path.write_text("something else\n", encoding="utf-8")
    with pytest.raises(UsageError, match="is something else"):
        small_slice(model, resume=path)


# --- what spoils a landscape -------------------------------------------------------------------


def test_points_that_are_not_finite_are_kept_and_counted():
    def overflowing(model, batch):
        loss = cross_entropy(model, batch)
        return loss / (loss < 2.4)

    found = small_slice(mlp(64, 16, 10), overflowing, alphas=np.linspace(-3, 3, 13))
    assert 0 < found.nonfinite < 13
    assert found.nonfinite == (~np.isfinite(found.losses)).sum()
    broken = small_slice(mlp(64, 16, 10), lambda m, b: cross_entropy(m, b) * math.nan)
    assert broken.nonfinite == 7
    assert broken.provenance["deterministic"]


def test_a_loss_that_changes_with_the_call_is_marked():
    calls = itertools.count()

    def drifting(model, batch):
        return cross_entropy(model, batch) + 0.01 * next(calls)

    found = small_slice(mlp(64, 16, 10), drifting)
    assert not found.provenance["deterministic"]
    assert found.provenance["repeat_difference"] == pytest.approx(0.01, rel=1e-3)


def test_a_batch_in_the_place_of_batches_is_explained():
    model = mlp(64, 16, 10)
    x, y = digits(16)
    with pytest.raises(UsageTypeError, match=r"list of batches .* got Tensor\. For a single batch"):
        small_slice(model, batches=x)
    with pytest.raises(UsageTypeError, match=r"got dict\. For a single batch pass \[batch\]"):
        small_slice(model, batches={"x": x})
    with pytest.raises(UsageError, match=r"got a tuple of 2 tensors, with the first .* \[batch\]"):
        small_slice(model, batches=(x, y))
    with pytest.raises(UsageError, match=r"got list_iterator, which is used up .* Pass list"):
        small_slice(model, batches=iter([(x, y)]))
    empty = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:0], y[:0]))
    with pytest.raises(UsageError, match="got one without any batch"):
        small_slice(model, batches=empty)


def test_a_loss_of_another_kind_is_explained():
    model = mlp(64, 16, 10)
    with pytest.raises(UsageError, match=r"scalar tensor, got shape \(64, 10\)"):
        small_slice(model, lambda m, b: m(b[0]))
    with pytest.raises(UsageTypeError, match="scalar tensor or a number, got str"):
        small_slice(model, lambda m, b: "low")
    with pytest.raises(UsageTypeError, match="loss_fn must be callable"):
        small_slice(model, "cross entropy")


@pytest.mark.parametrize("alphas", [[0.0], [0, 0], [1, 0], [0, math.nan], "abc", [[0, 1]], 3])
def test_a_grid_must_ascend(alphas):
    with pytest.raises(UsageError, match="alphas must be two or more finite numbers in ascending"):
        small_slice(mlp(64, 8, 10), alphas=alphas)


def test_what_a_loss_changes_for_good_is_said(caplog):
    class Counting:
        def __call__(self, model, batch):
            self.log.total += 1
            return cross_entropy(model, batch)

    class Log:
        total = 0

    loss_fn = Counting()
    loss_fn.log = Log()
    loss_fn.log.total = 0
    with caplog.at_level(logging.WARNING, "geomwatch"):
        small_slice(mlp(64, 8, 10), loss_fn)
    assert any("changes Counting.log (Log), which can't be put back" in m for m in caplog.messages)


def test_a_bar_is_written_to_stderr(capsys):
    small_slice(mlp(64, 8, 10), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "slice [" in shown.err
    assert "7/7" in shown.err


def test_provenance_is_plain_json_and_names_what_was_evaluated():
    model = mlp(64, 8, 10)
    found = small_slice(model, how=Measurement(mode="eval"))
    how = json.loads(json.dumps(dict(found.provenance)))
    assert how["mode"] == "eval"
    assert how["dtype"] == "float32"
    assert how["model"] == "Sequential"
    assert how["items"] == 64
    assert how["torch"] == torch.__version__
    assert {"kind": "random", "scale": "filter", "seed": 0}.items() <= how["directions"][0].items()
    other = copy.deepcopy(model)
    assert small_slice(other).provenance["weights"] == how["weights"]
    with torch.no_grad():
        other[2].bias[0] += 1e-3
    assert small_slice(other).provenance["weights"] != how["weights"]
