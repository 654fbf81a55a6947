"""A model that fully_shard has cut, measured on its shards by differences of gradients."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faces import faced
from problems import cross_entropy, digits
from ranks import run
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature import placement as shard_choice
from geomwatch.curvature.fully_sharded import FullySharded
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.placement import choose_shards
from geomwatch.curvature.settings import Settings
from geomwatch.curvature.subject import Subject
from geomwatch.errors import WithheldError
from geomwatch.parallel.ranks import Ranks
from geomwatch.stability.problem import stability_of
from geomwatch.vectors.layout import Layout, dimension
from geomwatch.vectors.shard_vector import Holders, ShardVector

NAMES = [
    "loss",
    "grad_norm",
    "lambda_max",
    "stability_margin",
    "batch_sharpness",
    "normalized_sharpness",  # by losses: forward passes that leave the outermost module whole
]
ON_SHARDS = {"hvp": "finite_difference", "quantities": NAMES}


def part(rank: int) -> tuple[Tensor, Tensor]:
    """Uneven parts of 96 digits."""
    x, y = digits(96)
    return (x[:70], y[:70]) if rank == 0 else (x[70:], y[70:])


def net() -> nn.Sequential:
    """With rows and a bias that two ranks can't share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 17), nn.Tanh(), nn.LayerNorm(17), nn.Linear(17, 10))


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], **options)
    fully_shard(model, **options)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def steps(model: nn.Module, batch: Any, optimizer: Any, monitor: geomwatch.Monitor | None) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        if monitor is not None:
            monitor.step(batch)
        optimizer.step()


def numbers(monitor: geomwatch.Monitor) -> list[dict[str, float | None]]:
    return [{n: r[n].value for n in NAMES} for r in monitor.history]


def said() -> list[str]:
    """Collect what the log is told from here on."""
    lines: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("geomwatch").addHandler(Note(logging.WARNING))
    return lines


def outside(model: nn.Module) -> list[Any]:
    """What FSDP and others see of a model: its state, hooks and storage."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for module in model.modules():
        found += [len(module._forward_pre_hooks), len(module._forward_hooks)]
        found += [(type(p).__name__, p.grad is None) for p in module._parameters.values()]
    for group in FullySharded(model)._groups():
        found += [str(group._training_state), str(group._sharded_state)]
        found += [p.all_gather_outputs[0].untyped_storage().size() for p in group.fsdp_params]
    return found


def trained(rank: int) -> Any:
    """The watched run goes first: what it leaves behind is in the other's way."""
    lines, ends, seen = said(), [], []
    for watch in (True, False):
        model = sharded(net())
        optimizer = adamw(model)
        made = geomwatch.Monitor(model, cross_entropy, optimizer, every=2, **faced(ON_SHARDS))
        monitor = made if watch else None
        x, y = digits(96)
        steps(model, (x[48 * rank :][:48], y[48 * rank :][:48]), optimizer, monitor)
        ends.append([p.full_tensor() for p in model.parameters()])
        seen.append(outside(model))
        if monitor is not None:
            found, how = numbers(monitor), monitor.history[0].provenance
    same = all(map(torch.equal, *ends)) and seen[0] == seen[1]
    return same, found, how, lines, _both_scales(model, optimizer)


def _both_scales(model: nn.Module, optimizer: Any) -> tuple[Tensor, Tensor]:
    """The margin's scale from sharded optimizer state, put together, and from whole state."""
    from geomwatch.vectors.shard_layout import ShardLayout

    whole = Layout.of(model)
    shards = ShardLayout(whole.names, whole.params)
    scales = []
    for layout in (whole, shards):
        gradient = layout.flatten([p.grad for p in layout.params])
        stability = stability_of(optimizer, layout, gradient=gradient, exclude=["0.bias"])
        scales.append(whole.flatten(layout.unflatten(stability.scale)))
    return scales[0], scales[1]


def test_shards_are_measured_as_one_process_measures_the_joined_batch(tmp_path: Path) -> None:
    first, second = run(trained, tmp_path)
    model = net()
    optimizer = adamw(model)
    options = ON_SHARDS | {"hvp": "auto"}
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, every=2, **faced(options))
    steps(model, digits(96), optimizer, monitor)
    for same, found, how, lines, (whole, shards) in (first, second):
        assert same  # bit for bit, with nothing left behind
        assert found == first[1]
        assert lines == []
        assert how["backend"] == "finite_difference"
        assert how["validated"] is False
        assert how["sharding"] == "measured on local shards: hvp='finite_difference'"
        assert torch.equal(whole, shards)
    for record, expected in zip(first[1], numbers(monitor), strict=True):
        for name in NAMES:
            # differences on one side are good for a percent or two
            assert record[name] == pytest.approx(expected[name], rel=2e-2), name
    assert first[1][0]["lambda_max"] == pytest.approx(numbers(monitor)[0]["lambda_max"], rel=1e-4)


class Fails:
    """Right in training; in probes, where armed, an error somewhere on one rank, or on both."""

    def __init__(self, where: str, rank: int) -> None:
        self.where, self.mine, self.armed = where, rank == 1 or where == "inside", True

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        where = self.where if geomwatch.is_probing() and self.mine and self.armed else ""
        if where == "before":
            raise ValueError("a file is gone")
        if where == "inside":
            return cross_entropy(model, (batch[0][:, :1], batch[1]))  # a shape it refuses
        loss = cross_entropy(model, batch)
        if where == "after":
            raise ValueError("a file is gone")
        return loss * float("nan") if where == "nan" else loss


def failing(rank: int) -> Any:
    found: dict[str, Any] = {}
    x, y = part(rank)
    for where in ("before", "inside", "after", "nan", "no items", "bare"):
        model = sharded(net())
        optimizer = adamw(model)
        options = ON_SHARDS | {"quantities": ["lambda_max"]}
        loss_fn = Fails(where, rank)
        monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1, **faced(options))
        for step in range(2):
            loss_fn.armed = step == 0
            optimizer.zero_grad()
            cross_entropy(model, (x, y)).backward()
            idle = where == "no items" and rank == 1 and step == 0
            if where != "bare":
                monitor.step((x[:0], y[:0]) if idle else (x, y))
            optimizer.step()
        weights = torch.cat([p.full_tensor().flatten() for p in model.parameters()])
        found[where] = weights, {r.step: r["lambda_max"].value for r in monitor.history}
    return found


def test_a_failed_probe_of_one_rank_is_one_of_all_and_the_next_is_right(tmp_path: Path) -> None:
    first, second = run(failing, tmp_path)
    right = None
    for where in ("before", "inside", "after", "nan", "no items"):
        for weights, found in (first[where], second[where]):
            assert torch.equal(weights, first["bare"][0])
            assert found == first[where][1]
            assert found.get(0) is None
            assert (0 in found) == (where == "nan")
            right = right or found[1]
            assert found[1] == pytest.approx(right, rel=1e-2)


def bootstrapped(model: nn.Module, batch: Any) -> Tensor:
    """With a target that moves with the weights, as a Q-learner's does."""
    return F.mse_loss(model(batch[0]), 0.9 * model(batch[0].flip(1)).detach() + 1)


def refused(rank: int) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def why(model: nn.Module, loss_fn: Any = cross_entropy) -> dict[str, str]:
        options: Any = {"hvp": "finite_difference", "quantities": ["lambda_max", "roughness"]}
        record = geomwatch.measure(model, loss_fn, part(rank), **faced(options))
        return {"": str(record.provenance["backend"])} | {
            n: e.reason for n, e in record.estimates.items()
        }

    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    kinky = nn.Sequential(*net()[:2], nn.Linear(17, 64), nn.ReLU(), nn.Linear(64, 10))
    unsynchronised = sharded(net())
    unsynchronised.set_requires_gradient_sync(False)
    with pytest.raises(geomwatch.UsageError, match=r"reduced .* set_requires_gradient_sync"):
        why(unsynchronised)
    found = why(sharded(kinky)), why(sharded(net(), mp_policy=narrow))
    return *found, why(sharded(net()), bootstrapped)


def test_where_differences_have_no_meaning_the_record_says_why(tmp_path: Path) -> None:
    for kinks, narrow, held in run(refused, tmp_path):
        assert kinks[""] == narrow[""] == held[""] == "none"
        assert "kinks (ReLU" in kinks["lambda_max"]
        assert "hvp='double_backward' measures a replica" in kinks["lambda_max"]
        assert "MixedPrecisionPolicy of fully_shard asks for bfloat16" in narrow["lambda_max"]
        assert "asks for bfloat16" in narrow["roughness"]
        assert "part of the loss is held constant" in held["lambda_max"]
        assert held["roughness"] == ""


def test_what_a_probe_draws_does_not_depend_on_the_items_of_a_rank() -> None:
    states = []
    for x, y in (part(0), part(1), digits(8)):  # the last too few to be cut
        rng = torch.Generator().manual_seed(0)
        with (
            Objective(net(), cross_entropy, [(x, y)]) as objective,
            contextlib.suppress(WithheldError),
        ):
            objective.pieces(8, rng)
        states.append(rng.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def chosen(rank: int) -> dict[str, Any]:
    from torch.distributed.tensor import Shard

    def choice(model: nn.Module, hvp: str = "auto", operator: str = "hessian") -> Any:
        how = Settings(hvp=hvp, operator=operator)
        subject = Subject(model, cross_entropy, Layout.of(model), how, Ranks.of(model))
        made, facts = choose_shards(subject)
        return made.layout.is_cut, made.how.hvp, facts["sharding"]

    model = sharded(net())
    found = {"as it is": choice(model)}
    need = shard_choice._bytes_of_replica(model, Layout.of(model))
    for name, free in {
        "room": 2 * need,
        "no room on one": 2 * need - rank,
        "not known": None,
    }.items():
        shard_choice._free_bytes = lambda device, ranks, free=free: free  # type: ignore[assignment]
        found[name] = choice(model)
    shard_choice._free_bytes = lambda device, ranks: 0  # type: ignore[assignment]
    found["asked for"] = choice(model, hvp="double_backward")
    found["ggn"] = choice(model, operator="ggn")
    across = sharded(net()[:1], shard_placement_fn=lambda p: Shard(p.dim() - 1))
    found["other dimension"] = choice(across)
    return found


def test_a_replica_is_chosen_where_every_rank_has_twice_its_memory(tmp_path: Path) -> None:
    first, second = run(chosen, tmp_path)
    for name, (is_cut, hvp, _) in first.items():
        assert second[name][:2] == (is_cut, hvp)
        assert is_cut == (name == "no room on one")
        assert hvp == {"no room on one": "finite_difference", "asked for": "double_backward"}.get(
            name, "auto"
        )
    reasons = {name: why for name, (_, _, why) in first.items()}
    assert "there is room: 0.000" in reasons["room"]
    assert "of an unknown amount free" in reasons["not known"]
    assert reasons["no room on one"].startswith("measured on local shards: a replica has no room")
    assert reasons["asked for"] == "measured on a replica: hvp='double_backward'"
    assert "0.weight is not cut along its dimension 0" in reasons["other dimension"]


def arithmetic(rank: int) -> Any:
    holders = Holders(dist.group.WORLD, torch.device("cpu"))
    torch.manual_seed(0)
    a, b, rows = torch.randn(11), torch.randn(11), torch.randn(3, 11)
    a[4], b[2], coefficients = float("nan"), float("inf"), torch.randn(3)
    keep = slice(0, 4) if rank == 0 else slice(4, 11)

    def cut(x: Tensor) -> Tensor:
        return ShardVector(x[..., keep].clone(), holders)

    def results(a: Tensor, b: Tensor, rows: Tensor) -> list[Tensor]:
        finite = a.nan_to_num(0.5)
        return [
            finite.norm(),
            finite @ finite.sign(),
            rows @ finite,
            (rows[:2] * 2) @ torch.addmv(finite, rows.T, coefficients, alpha=-1),
            (rows.T @ coefficients).square().sum(),
            rows.norm(),
            b.amax(),
            a.nanmedian(),
            (-a).nanmedian(),
            torch.cat([a, b]).nanmedian(),
            (a * torch.nan).nanmedian(),
            (finite > 2).any().double(),
            (finite < 9).all().double(),
            torch.tensor(float(dimension(a))),
        ]

    vector = cut(a)
    for refuse in (
        lambda: vector.mean(),
        lambda: vector[0],
        lambda: vector[1:],
        lambda: vector.cumsum(0),
        lambda: vector * torch.ones(len(vector)),
        lambda: cut(rows).norm(dim=1),
        lambda: cut(rows) @ torch.ones(len(vector)),
    ):
        with pytest.raises(NotImplementedError, match="not defined on vectors that are cut"):
            refuse()
    return results(a, b, rows), results(cut(a), cut(b), cut(rows))


def test_sums_over_parts_are_those_of_whole_vectors_and_parts_never_pass_for_them(
    tmp_path: Path,
) -> None:
    first, second = run(arithmetic, tmp_path)
    assert all(map(torch.equal, first[1][:7], second[1][:7]))
    for whole, parts in (first, second):
        torch.testing.assert_close(parts, whole, equal_nan=True)
