"""The loss of a model that fully_shard has cut, evaluated without putting it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature.batches import Part
from geomwatch.curvature.fully_sharded import FullySharded
from geomwatch.curvature.replay import Replay
from geomwatch.errors import UsageError, WithheldError
from geomwatch.isolation.snapshot import Snapshot
from geomwatch.isolation.twice_differentiable import spectral_norm_held
from geomwatch.isolation.undo import later
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.shard_vector import ShardVector


class ShardReplay(Replay):
    """A Replay whose gradients stay cut over the ranks, as the parameters are.

    Evaluations go through FSDP's own hooks and are displaced by changing the shards. No rank holds
    more than in training, beside its part of a few vectors. Kernels are those of training: there
    are no second derivatives here that they could lack.

    Every rank evaluates equally often: one with fewer batches repeats its last one, with no weight.
    """

    second_order = False
    why_differences = (
        "local shards can't be differentiated twice (hvp='double_backward' measures a replica, if "
        "there is memory for it)"
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sharded = FullySharded(self._model)
        self._rounds: list[tuple[Part, float]] = []  # batches with their share of the whole
        self._share = 0.0  # of the batch that is evaluated

    def open(self, mode: str, *, autocast: bool, dtype: torch.dtype | None) -> Snapshot:
        """Isolate the model until the block around ends; returns what is put back."""
        self.obstacle = self._sharded.obstacle(self.layout.params)
        # The hooks come first: what the model looks like with them is what is put back.
        self._sharded.guard(self._agree)
        spectral_norm_held()
        snapshot = super().open(mode, autocast=autocast, dtype=dtype)
        later(self._sharded.settle)
        return snapshot

    @property
    def can_recast(self) -> bool:
        """FSDP gathers shards at the precision they have."""
        return False

    def _prepare(self, dtype: torch.dtype | None) -> None:
        """Leave everything as it is: the leaves are the shards."""
        self._sharded.check()

    @property
    def ranks_of_a_piece(self) -> Ranks:
        """The ranks that evaluate a micro-batch: all, since FSDP's passes are collectives."""
        return self.ranks

    def on(self, part: Part, ranks: Ranks | None = None) -> Replay:
        """Return the same loss on another batch; one rank can't evaluate it without the others."""
        return super().on(part, self.ranks)

    def _weigh_window(self) -> None:
        super()._weigh_window()
        shares = [(part, part.weight / self.total) for part in self.window]
        self._rounds = [(part, share) for part, share in shares if share > 0]
        if self.ranks.any(not self._rounds):
            raise WithheldError(
                "a rank has no items: FSDP's passes wait for all ranks, so on local shards each "
                "needs some"
            )
        most = max(self.ranks.each(len(self._rounds)))
        last, _ = self._rounds[-1]
        self._rounds += [(last, 0.0)] * (int(most) - len(self._rounds))

    def mean(self, of: Callable[[Part], tuple[Tensor, ...]], *totals: Tensor) -> tuple[Tensor, ...]:
        """Return the weighted mean of what `of` returns for each batch, over all ranks.

        Gradients come weighted and summed over the ranks from their backward pass.
        """
        with self.ranks.together():
            self.start()
            for part, share in self._rounds:
                self._share = share
                for total, x in zip(totals, of(part), strict=True):
                    is_weighted = isinstance(x, ShardVector)
                    total.add_(x.detach().to(total), alpha=1.0 if is_weighted else share)
        for total in totals:
            if not isinstance(total, ShardVector):
                self.ranks.add_up(total)
        return totals

    def gradient(self, loss: Tensor) -> Tensor:
        """Return the sum over ranks of the gradients of their losses, by share. One collective."""
        with self.ranks.together():
            if not loss.requires_grad:
                raise UsageError(
                    "loss_fn must return a loss that depends on the model's parameters, got one "
                    "that depends on none. Use the model it is called with."
                )
        shards = self._sharded.gradient(self._share * loss, self.layout.params)
        return self.leaves.flatten(shards)

    def start(self) -> None:
        """Go back to the state that every evaluation of the window starts from."""
        self._sharded.settle()
        super().start()

    def _agree(self) -> None:
        """Go into a forward pass only if every rank does."""
        with self.ranks.together():
            pass
