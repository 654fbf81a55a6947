"""What one item of a batch is: counted, cut, checked by losses, and said by the user."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import geomwatch
from geomwatch.curvature.batches import Carrier
from geomwatch.curvature.cutting import Cutter
from geomwatch.curvature.items import guesses, length, take
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.quiet import quiet
from geomwatch.errors import WithheldError
from geomwatch.vectors.layout import generator

SIXTEEN = torch.zeros(16, dtype=torch.long)
LISTED = [torch.randn(n, 3) for n in (5, 7, 9, 2)]
GRAPHS = {
    "x": torch.arange(9.0)[:, None],
    "edge_index": torch.tensor([[0, 1, 3, 4, 7], [1, 2, 4, 3, 8]]),
    "edge_attr": torch.arange(5.0),
    "batch": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]),
    "ptr": torch.tensor([0, 3, 5, 9]),
    "y": torch.tensor([10, 11, 12]),
}

COUNTS = {
    "rows": ((torch.randn(16, 5), SIXTEEN), 16),
    "time first": ((torch.randn(9, 16, 3), SIXTEEN), 16),
    "a task id first": ({"task": torch.tensor([3]), "x": torch.randn(16, 5), "y": SIXTEEN}, 16),
    "class weights first": ({"w": torch.rand(10), "x": torch.randn(16, 5), "y": SIXTEEN}, 16),
    "inputs and targets alike": ([torch.randn(16, 5), torch.randn(16, 1)], 16),
    "a list of sequences": (LISTED, 4),
    "a list and labels": ((LISTED, torch.zeros(4)), 4),
    "tuples of images and of targets": ((tuple(LISTED), tuple({"id": i} for i in range(4))), 4),
    "strings beside": ((["a", "b", "c"], torch.randn(3, 2)), 3),
    "packed": ((pack_sequence(LISTED, enforce_sorted=False), torch.zeros(4)), 4),
    "jagged": (torch.nested.nested_tensor(LISTED, layout=torch.jagged), 4),
    "sparse": ((torch.eye(16).to_sparse(), SIXTEEN), 16),
    "graphs": (GRAPHS, 3),
    "one item": ((torch.randn(1, 5), SIXTEEN[:1]), 1),
    "none": ((torch.randn(0, 5), SIXTEEN[:0]), 0),
    "a number": (torch.tensor(1.0), 1),
    "nothing": (None, 1),
}


@pytest.mark.parametrize(("batch", "count"), COUNTS.values(), ids=COUNTS)
def test_items_are_counted_along_what_the_parts_share(batch: Any, count: int) -> None:
    assert Cutter().count(batch) == count


@pytest.mark.parametrize("name", [n for n, (_, count) in COUNTS.items() if count > 1])
def test_a_cut_takes_the_items_that_it_names_and_no_others(name: str) -> None:
    batch, count = COUNTS[name]
    cut = guesses(batch)[0]
    piece = take(batch, cut, torch.tensor([0, count - 1]))
    assert length(batch, cut) == count
    assert length(piece, cut) == 2
    assert type(piece) is type(batch)


def test_graphs_are_numbered_anew() -> None:
    some = take(GRAPHS, guesses(GRAPHS)[0], torch.tensor([0, 2]))
    assert some["x"][:, 0].tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert some["edge_index"].tolist() == [[0, 1, 5], [1, 2, 6]]
    assert some["edge_attr"].tolist() == [0, 1, 4]
    assert some["batch"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert some["ptr"].tolist() == [0, 3, 7]
    assert some["y"].tolist() == [10, 12]


def test_sequences_keep_their_steps() -> None:
    packed = pack_sequence(LISTED, enforce_sorted=False)
    (cut,) = guesses(packed)[:1]
    one, three = unpack_sequence(take(packed, cut, torch.tensor([1, 3])))
    assert torch.equal(one, LISTED[1])
    assert torch.equal(three, LISTED[3])


class Wrapped(Carrier):
    """What a host puts around a batch."""

    def __init__(self, batch: Any, share: float = 1.0) -> None:
        self.batch, self.share = batch, share

    def carried(self) -> Any:
        return self.batch

    def carrying(self, batch: Any, share: float) -> Wrapped:
        return Wrapped(batch, self.share * share)


def test_what_a_host_puts_around_a_batch_knows_its_share() -> None:
    whole = Wrapped((torch.randn(9, 16, 3), SIXTEEN))
    first, *_, last = (part.batch for part in Cutter().chunks(whole, 6))
    assert (first.share, last.share) == (6 / 16, 4 / 16)
    assert last.batch[0].shape == (9, 4, 3)


class Uncopied(collections.UserDict):
    def __copy__(self) -> Uncopied:
        raise TypeError("not to be copied")


def test_a_batch_that_cannot_be_cut_is_not_taken_for_its_own_piece() -> None:
    batch = Uncopied(x=torch.randn(16, 5), y=SIXTEEN)
    with pytest.raises(TypeError, match="items can't be taken out of a Uncopied"):
        take(batch, guesses(batch)[0], torch.arange(4))
    assert Cutter().head(batch, 4) is batch


# --- what the user says ----------------------------------------------------------------------


def test_a_dimension_that_the_user_names_is_the_one_that_is_counted() -> None:
    tokens = torch.zeros(9, 16)
    assert Cutter().count((tokens, tokens)) == 9
    assert Cutter(1).count((tokens, tokens)) == 16


def test_a_function_of_the_users_counts() -> None:
    counter = Cutter(lambda batch: len(batch["rows"]) // 2)
    assert counter.count({"rows": torch.zeros(12, 3)}) == 6


@pytest.mark.parametrize("count", [-1, 2.5, True, "many", torch.zeros(2)])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    how = geomwatch.Measurement(items=lambda batch: count)
    with pytest.raises(geomwatch.UsageError, match=r"items.* must return the number of items"):
        geomwatch.measure(mlp(64, 10), cross_entropy, digits(16), how=how)


@pytest.mark.parametrize("items", [-1, 1.0, True, "rows", [0]])
def test_items_that_are_neither_a_dimension_nor_a_function_are_refused(items: Any) -> None:
    with pytest.raises(geomwatch.UsageError, match=r"items must be the dimension .*items=1"):
        geomwatch.Measurement(items=items)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[1][0])


def time_major() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(12, 32, 3), torch.randint(0, 2, (32,))


@pytest.mark.parametrize("items", [None, 1, lambda batch: len(batch[1])])
def test_each_way_to_say_it_gives_the_same_numbers(items: Any) -> None:
    torch.manual_seed(0)
    how = geomwatch.Measurement(quantities=["gradient_noise_scale"], items=items)
    record = geomwatch.measure(Recurrent(), cross_entropy, time_major(), how=how)
    assert record.provenance["items"] == 32
    assert record.provenance["item"] == "dimension 1"
    assert record["gradient_noise_scale"].status in ("ok", "withheld")
    assert "pieces of the batch" not in record["gradient_noise_scale"].reason


def test_what_the_user_says_is_checked_as_well() -> None:
    how = geomwatch.Measurement(quantities=["gradient_noise_scale"], items=0)
    record = geomwatch.measure(Recurrent(), cross_entropy, time_major(), how=how)
    assert record["gradient_noise_scale"].status == "withheld"
    assert "pieces of the batch are another loss" in record["gradient_noise_scale"].reason


def test_a_cut_that_cannot_be_told_is_told_by_items() -> None:
    def halves(model: nn.Module, batch: Tensor) -> Tensor:
        thirds = model(batch)[:, 0].chunk(3)
        return (thirds[0] - thirds[1]).square().mean() + thirds[2].square().mean()

    names = ["gradient_noise_scale"]
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1), torch.randn(48, 5)
    how = geomwatch.Measurement(quantities=names)
    found = geomwatch.measure(model, halves, x, how=how)["gradient_noise_scale"]
    assert found.status == "withheld"
    assert "Measurement(items=...)" in found.reason


def test_micro_batches_are_cut_along_the_items() -> None:
    torch.manual_seed(0)
    model, batch = Recurrent(), time_major()
    names = ["loss", "grad_norm", "lambda_max"]
    whole, pieces = (
        geomwatch.measure(
            model,
            cross_entropy,
            batch,
            how=geomwatch.Measurement(quantities=names, micro_batch=size),
            max_hvps=30,
        )
        for size in (None, 10)
    )
    for name in names:
        assert pieces[name].value == pytest.approx(whole[name].value, rel=2e-5)


@pytest.mark.parametrize("reduction", ["sum", "ignored", "weights"])
def test_micro_batches_of_sums_and_of_means_over_labels_are_the_same_loss(reduction: str) -> None:
    x, y = digits(60)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        options: dict[str, Any] = {"reduction": "sum"} if reduction == "sum" else {}
        return F.cross_entropy(model(batch[0]), batch[1], **options)

    if reduction == "ignored":
        y[torch.randperm(60)[:23]] = -100
    if reduction == "weights":
        loss_fn.weight = lambda batch: len(batch[1])  # type: ignore[attr-defined]
    model = mlp(64, 8, 10)
    for size in (60, 17):
        how = geomwatch.Measurement(quantities=["loss", "grad_norm"], micro_batch=size)
        record = geomwatch.measure(model, loss_fn, (x, y), how=how)
        assert record.loss == pytest.approx(loss_fn(model, (x, y)).item(), rel=1e-5)


# --- the check -------------------------------------------------------------------------------


def test_what_losses_have_told_is_kept_for_batches_of_the_same_kind() -> None:
    calls = 0

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(model, batch)

    model, cutter = Recurrent(), Cutter()
    counts = []
    for _ in range(2):
        with Objective(model, loss_fn, [time_major()], cutter=cutter) as objective:
            before = calls
            pieces = objective.pieces(8, generator(0))
            counts.append(calls - before)
        assert [piece.items for piece in pieces] == [4] * 8
        assert objective.items == 32
    assert counts == [9, 9]  # the whole and eight pieces: the likeliest way was right


def test_a_contrastive_loss_is_not_tried_again() -> None:
    calls = 0

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        z = F.normalize(model(batch), dim=1)
        return F.cross_entropy(z @ z.T / 0.2, torch.arange(len(z)))

    model, cutter = mlp(64, 6), Cutter()
    for attempt in range(2):
        with Objective(model, loss_fn, [digits(32)[0]], cutter=cutter) as objective:
            before = calls
            with pytest.raises(WithheldError, match="pieces of the batch are another loss"):
                objective.pieces(8, generator(0))
        if attempt:
            assert calls - before == 1


def test_a_batch_that_is_too_small_now_may_be_large_enough_later() -> None:
    model, cutter = mlp(64, 10), Cutter()
    for count in (3, 32):
        with Objective(model, cross_entropy, [digits(count)], cutter=cutter) as objective:
            if count == 3:
                with pytest.raises(WithheldError, match="3 items can't be cut into 4"):
                    objective.pieces(8, generator(0))
            else:
                assert len(objective.pieces(8, generator(0))) == 8


def test_a_part_that_the_loss_does_not_use_is_not_what_its_items_are() -> None:
    def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T / 0.2, torch.arange(len(z)))

    with (
        Objective(mlp(64, 6), contrastive, [digits(32)]) as objective,
        pytest.raises(WithheldError, match="another loss"),
    ):
        objective.pieces(8, generator(0))


DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "dropped channels": lambda x: F.dropout2d(x[..., None, None], 0.5)[..., 0, 0],
    "random slopes": lambda x: F.rrelu(-x.abs(), training=True),
    "normal": lambda x: x + torch.randn_like(x),
    "uniform": lambda x: x + torch.rand(x.shape),
    "integers": lambda x: x + torch.randint(0, 9, (len(x), 1)),
    "in place": lambda x: x + torch.empty(x.shape).normal_(1, 2),
    "of a generator": lambda x: x + torch.rand(x.shape, generator=OWN),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "categories": lambda x: x + torch.multinomial(x.softmax(1), 2).sum(1, keepdim=True),
    "a mask": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
    "exponential": lambda x: x + torch.empty(len(x), 1).exponential_(),
}
OWN = torch.Generator()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_nothing_is_random_where_it_is_quiet(draw: Any) -> None:
    x = torch.rand(1, 6).expand(8, 6)
    with quiet():
        one, two = draw(x), draw(x[:3])
    assert torch.equal(one[:3], two)
    assert not torch.equal(draw(x), draw(x))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_randomness_is_no_obstacle_to_pieces(draw: Any) -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(draw(model(batch[0])), batch[1])

    with Objective(mlp(64, 10), loss_fn, [digits(64)]) as objective:
        pieces = objective.pieces(8, generator(0))
    assert [piece.items for piece in pieces] == [8] * 8
