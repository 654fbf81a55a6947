"""Some items of a part of a batch: a tensor of any layout, a list, a packed sequence, graphs.

Several graphs are held as PyTorch Geometric holds them: the nodes of all in one tensor, edges as
pairs of their numbers, and for each node the number of its graph, in a vector called `batch`. A
tuple has no names: there the edges are the integers (2, E), and that vector the one that never
falls.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

_SCALARS = (str, bytes, bool, int, float, complex, type(None))


@dataclass(frozen=True, slots=True)
class Place:
    """Where the items of a part lie: along a dimension, each in so many rows of it.

    With two rows an item is a pair: rows i and n + i where they lie `apart`, as in
    cat([chosen, rejected]), else 2i and 2i + 1.
    """

    dim: int = 0
    rows: int = 1
    apart: bool = True

    def among(self, items: Tensor, length: int) -> Tensor:
        """Return the rows of some items in a part of this length."""
        if self.rows == 1:
            return items
        of_item = torch.arange(self.rows, device="cpu")
        if self.apart:
            return (items + of_item[:, None] * (length // self.rows)).reshape(-1)
        return (items[:, None] * self.rows + of_item).reshape(-1)


def is_whole(part: Any) -> bool:
    """Tell whether a container is cut as one, not each of its parts."""
    return isinstance(part, PackedSequence) or count_graphs(part) is not None or is_list(part)


def is_list(part: Any) -> bool:
    """Tell whether a container may be a list of items: things of one kind."""
    if not isinstance(part, list | tuple) or isinstance(part, torch.Size | PackedSequence):
        return False
    return not hasattr(part, "_fields") and len({_kind(item) for item in part}) == 1


def sizes(part: Any) -> tuple[int, ...]:
    """Return how long a part is along each dimension that it can be cut along."""
    if isinstance(part, PackedSequence):
        return (int(part.batch_sizes[0]),)
    if isinstance(part, Tensor) and part.is_nested:
        return (part.size(0),)
    if isinstance(part, Tensor | np.ndarray):
        return tuple(part.shape)
    graphs = count_graphs(part)
    if graphs is not None:
        return (graphs,)
    return (len(part),) if isinstance(part, Sized) else ()


def select(part: Any, place: Place, items: Tensor) -> Any:
    """Return some items of a part, by their numbers (n,) on the CPU."""
    rows = place.among(items, sizes(part)[place.dim])
    if isinstance(part, Tensor):
        return _of_tensor(part, place.dim, rows)
    if isinstance(part, np.ndarray):
        return np.take(part, rows.numpy(), axis=place.dim)
    if isinstance(part, PackedSequence):
        sequences = unpack_sequence(part)
        return pack_sequence([sequences[i] for i in rows.tolist()], enforce_sorted=False)
    if is_list(part):
        return type(part)(part[i] for i in rows.tolist())
    return some_graphs(part, rows)


def _of_tensor(part: Tensor, dim: int, rows: Tensor) -> Tensor:
    if part.is_nested:
        pieces = part.unbind()
        return torch.nested.as_nested_tensor([pieces[i] for i in rows.tolist()], layout=part.layout)
    if part.layout in (torch.strided, torch.sparse_coo):
        return part.index_select(dim, rows.to(part.device))
    found = part.to_sparse_coo().index_select(dim, rows.to(part.device))
    blocked = part.layout in (torch.sparse_bsr, torch.sparse_bsc)
    made: Any = found  # whose to_sparse() has no types
    blocks = {"blocksize": part.values().shape[1:3]} if blocked else {}
    return made.to_sparse(layout=part.layout, **blocks)  # type: ignore[no-any-return]


def _kind(item: Any) -> object:
    if isinstance(item, Tensor | np.ndarray):
        return type(item), item.ndim, item.dtype
    if isinstance(item, Mapping):
        return type(item), tuple(item)
    if isinstance(item, list | tuple):
        return type(item), len(item) if isinstance(item, tuple) else None
    return float if isinstance(item, _SCALARS[2:5]) else type(item)


def count_graphs(part: Any) -> int | None:
    """Count the graphs of a container; None where it holds none."""
    if isinstance(part, Tensor):
        return None
    if callable(getattr(part, "batch_num_nodes", None)):  # of DGL
        return int(part.batch_size)
    known = getattr(part, "num_graphs", None)
    if isinstance(known, int):
        return known
    found = _found(part)
    return None if found is None else int(found.graph_of.max()) + 1


def some_graphs(part: Any, chosen: Tensor) -> Any:
    """Return some of the graphs of a container, by their numbers in rising order.

    Raises:
        TypeError: it is of a library whose graphs can't be taken apart here.
    """
    if callable(getattr(part, "to_data_list", None)):
        return type(part).from_data_list(part.index_select(chosen))
    found = _found(part)
    if found is None:
        raise TypeError(f"graphs of a {type(part).__name__} can't be taken out")
    return found.some(chosen)


class _Graphs:
    """A container with the two of its members that tell which graph everything is of."""

    def __init__(self, part: Any, members: dict[Any, Any], graph_of: Any, edges: Any) -> None:
        self._part, self._members = part, members
        self._names = graph_of, edges
        self.graph_of: Tensor = members[graph_of]
        self.edges: Tensor = members[edges]

    def some(self, chosen: Tensor) -> Any:
        """Return the container with some of its graphs, everything numbered anew."""
        chosen = chosen.to(self.graph_of.device)
        nodes = torch.isin(self.graph_of, chosen)
        edges = nodes[self.edges[0]]
        number = nodes.cumsum(0) - 1
        made = {
            name: self._of_member(name, value, chosen, nodes, edges)
            for name, value in self._members.items()
        }
        graph_of, edges_of = self._names
        made[graph_of] = torch.searchsorted(chosen, self.graph_of[nodes])
        made[edges_of] = number[self.edges[:, edges]]
        if isinstance(self._part, tuple | list):
            return type(self._part)(made.values())
        put = operator.setitem if isinstance(self._part, Mapping) else object.__setattr__
        replica = copy.copy(self._part)
        for name, value in made.items():
            put(replica, name, value)
        return replica

    def _of_member(
        self, name: Any, value: Any, chosen: Tensor, nodes: Tensor, edges: Tensor
    ) -> Any:
        """Take the rows of the chosen graphs: rows are of edges, of nodes or of graphs."""
        if name == "num_graphs":
            return len(chosen)
        if name == "num_nodes":
            return int(nodes.sum())
        if name == "ptr":
            counts = torch.bincount(self.graph_of)[chosen]
            return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        kinds = [nodes, edges] if not str(name).startswith("edge") else [edges, nodes]
        for kept in kinds:
            if len(value) == len(kept):
                rows = kept.nonzero()[:, 0]
                square = value.is_sparse and value.ndim == 2 and value.shape[1] == len(value)
                found = value.index_select(0, rows)
                return found.index_select(1, rows) if square else found
        return value[chosen] if len(value) == int(self.graph_of.max()) + 1 else value


def _found(part: Any) -> _Graphs | None:
    if isinstance(part, tuple | list):
        return _found_by_content(part)
    members = dict(part) if isinstance(part, Mapping) else getattr(part, "__dict__", {})
    graph_of, edges = members.get("batch"), members.get("edge_index")
    if _is_integer(graph_of, 1) and _is_integer(edges, 2) and graph_of.numel():
        return _Graphs(part, dict(members), "batch", "edge_index")
    return None


def _found_by_content(part: Any) -> _Graphs | None:
    members = dict(enumerate(part))
    edges = [i for i, t in members.items() if _is_integer(t, 2) and len(t) == 2]
    if not edges or hasattr(part, "_fields"):
        return None
    lengths = {len(t) for t in part if isinstance(t, Tensor) and t.ndim > 1}
    for i, t in members.items():
        if _is_integer(t, 1) and len(t) in lengths and len(t) and int(t[0]) == 0:
            steps = t.diff()
            if bool(((steps == 0) | (steps == 1)).all()) and int(t[-1]) + 1 < len(t):
                return _Graphs(part, members, i, edges[0])
    return None


def _is_integer(value: Any, dimensions: int) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.ndim != dimensions:
        return False
    return value.dtype in (torch.int64, torch.int32)
