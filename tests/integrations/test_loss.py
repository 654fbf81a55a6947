"""Micro-batches of a host count alike, whatever their size; pieces of them by their share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor

from geomwatch.curvature.cutting import Cutter
from geomwatch.errors import WithheldError
from geomwatch.integrations._host.loss import HostLoss, Unknown, mean_of
from geomwatch.isolation.random_state import RandomState


class Loss(HostLoss):
    """A cross-entropy that notes of what share it was evaluated."""

    __slots__ = ("shares",)

    def __init__(self, **weigh: Any) -> None:
        super().__init__(None, **weigh)
        self.shares: list[float] = []

    def evaluate(self, model: Any, batch: Any, call: Any, share: float) -> Tensor:
        self.shares.append(share)
        return cross_entropy(model, batch).detach() + torch.rand(())


def test_micro_batches_count_alike_and_pieces_by_their_share():
    loss = Loss()
    whole = loss.micro_batch(digits(24))
    pieces = [part.batch for part in Cutter().chunks(whole, 16)]
    assert [loss.weight(each) for each in (whole, loss.micro_batch(digits(8)))] == [1.0, 1.0]
    assert [loss.weight(piece) for piece in pieces] == pytest.approx([2 / 3, 1 / 3])
    assert loss.weight(digits(24)) == 24


def test_a_piece_may_be_weighed_by_something_else_than_its_items():
    loss = Loss(weigh=lambda batch: float((batch[1] < 5).sum()))
    whole = loss.micro_batch(digits(30))
    few, rest = [part.batch for part in Cutter().chunks(whole, 16)]
    assert loss.weight(whole) == 1.0
    assert loss.weight(few) + loss.weight(rest) == pytest.approx(1.0)
    assert loss.weight(few) != pytest.approx(16 / 30)


def test_a_whole_micro_batch_is_evaluated_from_the_random_state_of_training():
    loss, model, batch = Loss(), mlp(64, 8, 10), digits(8)
    before = RandomState()
    trained = float(loss(model, loss.micro_batch(batch)))
    torch.rand(5)
    whole = loss.micro_batch(batch, Call(before))
    assert float(loss(model, whole)) == trained
    piece = Cutter().head(whole, 4)
    assert float(loss(model, piece)) != trained
    assert loss.shares == [1.0, 1.0, 0.5]


class Call:
    """What a host keeps of a call: no dataclass and no namespace, which would be copied."""

    def __init__(self, random: RandomState) -> None:
        self.random = random


def test_a_batch_that_can_not_be_evaluated_again_says_why():
    with pytest.raises(WithheldError, match="gone"):
        Loss()(mlp(64, 8, 10), Unknown("gone"))
    assert Loss().weight(Unknown("gone")) == 1.0


def test_the_loss_of_a_window_is_known_if_each_of_its_micro_batches_is():
    assert mean_of([1.0, 3.0]) == 2.0
    assert float(mean_of([torch.tensor(1.0), torch.tensor(2.0)])) == 1.5
    assert mean_of([1.0, None]) is None
    assert mean_of([]) is None
