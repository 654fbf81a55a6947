"""Where the shards of parameters that fully_shard has cut lie in this rank's part of a vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from geomwatch.vectors.layout import Layout
from geomwatch.vectors.shard_vector import Holders, ShardVector


@dataclass(frozen=True)
class ShardLayout(Layout):
    """A Layout whose vectors stay cut as the parameters are, D / R entries on each of R ranks.

    Parameters are cut along dimension 0, as fully_shard does by default, so that a filter is whole
    on one rank.
    """

    is_cut: ClassVar[bool] = True

    @cached_property
    def holders(self) -> Holders:
        """The ranks that hold the parts."""
        first: Any = self.params[0]
        axis = next(i for i, placed in enumerate(first.placements) if placed.is_shard())
        return Holders(first.device_mesh.get_group(axis), self.device)

    @cached_property
    def _shapes(self) -> list[torch.Size]:
        return [_local(p).shape for p in self.params]

    @property
    def sizes(self) -> list[int]:
        """How many entries of each parameter are on this rank."""
        return [shape.numel() for shape in self._shapes]

    def filters(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector into the filters that are on this rank, plain tensors."""
        assert isinstance(vector, ShardVector)
        pieces = vector.part.split(self.sizes)
        return [
            piece.view(shape[0], shape[1:].numel())
            for piece, shape in zip(pieces, self._shapes, strict=True)
        ]

    def rows(self, index: int, parameter: Tensor) -> slice:
        """Return where slice `index` of a parameter is among its filters; empty if elsewhere."""
        each = -(-parameter.shape[0] // self.holders.size)  # as torch.chunk cuts
        index -= each * self.holders.place
        return slice(index, index + 1) if 0 <= index < each else slice(0)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of two vectors over each parameter, in one collective."""
        assert isinstance(a, ShardVector)
        assert isinstance(b, ShardVector)
        pairs = zip(a.part.split(self.sizes), b.part.split(self.sizes), strict=True)
        return self.holders.sum(torch.stack([x @ y for x, y in pairs]))

    def normal(self, rng: torch.Generator) -> Tensor:
        """Draw a standard normal vector: each rank its own part, from a seed they share."""
        own = self._own(rng)
        drawn = torch.randn(sum(self.sizes), generator=own, dtype=self.dtype)
        return self._vector(drawn.to(self.device))

    def rademacher(self, rng: torch.Generator) -> Tensor:
        """Draw a vector of independent +-1: each rank its own part, from a seed they share."""
        own = self._own(rng)
        bits = torch.randint(0, 2, (sum(self.sizes),), generator=own, dtype=torch.int8)
        return self._vector(bits.to(self.device).to(self.dtype).mul_(2).sub_(1))

    def _own(self, rng: torch.Generator) -> torch.Generator:
        """A generator for this rank; all leave `rng` in one state."""
        seed = torch.randint(2**62, (), generator=rng, device=rng.device)
        return torch.Generator().manual_seed(int(seed) + self.holders.place)

    def _entries(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def _vector(self, entries: Tensor) -> Tensor:
        return ShardVector(entries, self.holders)

    def _shaped(self, piece: Tensor, parameter: Tensor) -> Tensor:
        assert isinstance(piece, ShardVector)
        assert isinstance(parameter, DTensor)
        local = piece.part.view(_local(parameter).shape).to(parameter.dtype)
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def cut_otherwise(layout: Layout) -> str:
    """Name a parameter that no part of a vector can hold; "" where every one is cut alike."""
    meshes = set()
    for name, p in zip(layout.names, layout.params, strict=True):
        placements = p.placements if isinstance(p, DTensor) else ()
        cut = [placed for placed in placements if not placed.is_replicate()]
        if len(cut) != 1 or type(cut[0]) is not Shard or cut[0].dim != 0:
            return name
        meshes.add(p.device_mesh)  # type: ignore[attr-defined]
    return "" if len(meshes) == 1 else layout.names[-1]


def _local(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()
