"""Vectors that are cut over ranks: each rank works on its part, sums run over all parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import dimension, entries

_aten = torch.ops.aten


class Holders:
    """The ranks that hold the parts of a vector between them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._ranks = Ranks(group, device)
        self.size = self._ranks.size
        self.place = dist.get_rank(group)  # of this rank among them

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of a small tensor over the ranks, added up in float64.

        Raises:
            RankError: a rank can't be reached.
        """
        wide = torch.float64 if part.is_floating_point() else torch.int64
        return self._ranks.add_up(part.to(wide, copy=True)).to(part.dtype)

    def largest(self, number: Tensor) -> Tensor:
        """Return the largest of the ranks' scalars."""
        return number.new_tensor(max(self._ranks.each(float(number))))


class ShardVector(Tensor):
    """This rank's part of a vector (D,), or of several as the rows of a matrix, (k, D).

    Its shape is that of the part. What works entry by entry stays on the rank; norms, inner
    products and products with a matrix of such vectors are those of whole vectors, the same on all
    ranks to the last bit. Whatever else is refused: it would tell of one part only.
    """

    part: Tensor
    holders: Holders
    axis: int  # that is cut, counted from the end: -1, or -2 in a transposed matrix

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, part: Tensor, holders: Holders, axis: int = -1) -> ShardVector:
        """Wrap a part; entries are shared, not copied."""
        vector: ShardVector = Tensor._make_wrapper_subclass(
            cls,
            part.shape,
            strides=part.stride(),
            dtype=part.dtype,
            device=part.device,
        )
        vector.part, vector.holders, vector.axis = part, holders, axis
        return vector

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardVector({self.part!r}, rank {self.holders.place} of {self.holders.size})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it so, whatever its stubs say
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, *args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags or func.overloadpacket in _BY_ENTRY:
            return _by_entry(func, *args, **(kwargs or {}))
        raise _refusal(func)


@entries.register
def _entries(like: ShardVector, tensor: Tensor) -> ShardVector:
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return ShardVector(part.reshape(-1).to(like), like.holders)


@dimension.register
def _dimension(vector: ShardVector) -> int:
    return int(vector.holders.sum(torch.tensor(vector.part.numel(), device=vector.device)))


def _refusal(func: Any) -> NotImplementedError:
    return NotImplementedError(f"{func} is not defined on vectors that are cut over ranks")


def _by_entry(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a function to the parts."""
    vectors: list[ShardVector] = []
    tree_map_only(ShardVector, vectors.append, args)
    first = vectors[0]
    plain: list[Tensor] = []
    tree_map_only(Tensor, plain.append, args)
    if any(x.dim() > 0 for x in plain if not isinstance(x, ShardVector)):
        raise _refusal(func)  # whose entries would be whose?
    if any(x.axis != first.axis for x in vectors):
        raise _refusal(func)
    found = func(*tree_map_only(ShardVector, lambda x: x.part, args), **kwargs)
    if found is first.part:  # changed in place
        return first
    return tree_map_only(Tensor, lambda part: ShardVector(part, first.holders, first.axis), found)


def _along_rows(func: Any, x: ShardVector, dim: int = 0, *rest: Any) -> ShardVector:
    """Select among vectors, never among the entries of one."""
    if dim - x.dim() == x.axis or dim == x.axis:
        raise _refusal(func)
    return ShardVector(func(x.part, dim, *rest), x.holders, x.axis)


def _flat(func: Any, x: ShardVector, shape: Sequence[int]) -> ShardVector:
    if x.dim() != 1 or len(shape) != 1:
        raise _refusal(func)
    return ShardVector(func(x.part, shape), x.holders)


def _transposed(func: Any, x: ShardVector, *dims: Any) -> ShardVector:
    if x.dim() != 2:
        raise _refusal(func)
    return ShardVector(x.part.t(), x.holders, -3 - x.axis)


def _product(func: Any, a: Tensor, b: Tensor) -> Tensor:
    """Matrix and vector products: over the cut axis summed up, over another one by entry."""
    one = a if isinstance(a, ShardVector) else b
    assert isinstance(one, ShardVector)
    found = func(_part(a), _part(b))
    pairs = ((a, -1), (b, -min(2, b.dim())))
    summed = [x.axis == axis for x, axis in pairs if isinstance(x, ShardVector)]
    if all(summed) and len(summed) == 2:
        return one.holders.sum(found)
    if any(summed) or len(summed) == 2:
        raise _refusal(func)
    return ShardVector(found, one.holders, -1 if one is b or found.dim() == 1 else -2)


def _added_product(
    func: Any, x: ShardVector, matrix: ShardVector, v: Tensor, **factors: float
) -> ShardVector:
    """Add A v to x, v with one coefficient for each vector in A."""
    if isinstance(v, ShardVector) or not isinstance(x, ShardVector) or matrix.axis != -2:
        raise _refusal(func)
    return ShardVector(func(x.part, matrix.part, v, **factors), x.holders)


def _norm(
    func: Any, x: ShardVector, order: float = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Tensor:
    if order != 2 or dim is not None or keepdim:
        raise _refusal(func)
    square = func(x.part).double() ** 2
    return x.holders.sum(square).sqrt().to(x.dtype)


def _sum(func: Any, x: ShardVector) -> Tensor:
    return x.holders.sum(func(x.part))


def _any(func: Any, x: ShardVector) -> Tensor:
    return x.holders.sum(func(x.part).int()) > 0


def _all(func: Any, x: ShardVector) -> Tensor:
    return x.holders.sum(func(x.part).int()) == x.holders.size


def _largest(func: Any, x: ShardVector) -> Tensor:
    own = func(x.part) if x.part.numel() else x.part.new_tensor(-torch.inf)
    return x.holders.largest(own)


def _nanmedian(func: Any, x: ShardVector) -> Tensor:
    """The lower median of all entries that are no NaN, exactly: bisected on their bits.

    Floats are in the order of their bits, read as integers, once those of negative ones are turned
    round. One sum over the ranks for each bit.
    """
    integer = torch.int32 if x.dtype == torch.float32 else torch.int64
    if x.dtype not in (torch.float32, torch.float64):
        raise _refusal(func)
    bits = x.part[~x.part.isnan()].contiguous().view(integer)
    largest = torch.iinfo(integer).max
    keys = torch.where(bits < 0, bits ^ largest, bits).long()
    count = x.holders.sum(torch.tensor(keys.numel(), device=keys.device))
    low, high = keys.new_tensor(-largest - 1), keys.new_tensor(largest)
    for _ in range(torch.iinfo(integer).bits):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # can't overflow
        enough = 2 * x.holders.sum((keys <= middle).sum()) >= count
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    found = low.to(integer)
    value = torch.where(found < 0, found ^ largest, found).view(x.dtype)
    return value.where(count > 0, torch.nan)


def _part(x: Tensor) -> Tensor:
    return x.part if isinstance(x, ShardVector) else x


_BY_ENTRY = {
    _aten.copy_,
    _aten._to_copy,
    _aten.clone,
    _aten.detach,
    _aten.alias,
    _aten.zero_,
    _aten.fill_,
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.empty_like,
    _aten.new_empty,
    _aten.new_zeros,
    _aten.split_with_sizes,  # of a vector, by parameters
    _aten.cat,
}

_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.select.int: _along_rows,
    _aten.slice.Tensor: _along_rows,
    _aten.view.default: _flat,
    _aten.t.default: _transposed,
    _aten.permute.default: _transposed,
    _aten.transpose.int: _transposed,
    _aten.dot.default: _product,
    _aten.mv.default: _product,
    _aten.mm.default: _product,
    _aten.addmv.default: _added_product,
    _aten.linalg_vector_norm.default: _norm,
    _aten.sum.default: _sum,
    _aten.any.default: _any,
    _aten.all.default: _all,
    _aten.amax.default: _largest,
    _aten.max.default: _largest,
    _aten.nanmedian.default: _nanmedian,
}
