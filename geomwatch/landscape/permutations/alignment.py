"""Permute the units of one net to lie where those of another do: weight matching."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.landscape.permutations.units import Units, permutable_units
from geomwatch.landscape.states import State, check_states

Order: TypeAlias = npt.NDArray[np.int64]  # the unit of B that comes to each place
Orders: TypeAlias = dict[str, Order]  # of each group

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # moved, but not matched
_GAIN = 1e-9  # of all products: what rounding alone can gain


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """State B with its units where those of A are; the same function as before."""

    state: Mapping[str, Any]
    permutations: Mapping[str, Order]  # of each group: the unit of B that comes to each place
    units: Units
    cosine_before: float  # of the weights that can be permuted, A with B
    cosine_after: float
    sweeps: int


def align(
    model: nn.Module,
    state_a: State,
    state_b: State,
    *,
    units: Units | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Permute the hidden units of B so that its weights are as near those of A as can be.

    Weight matching (Ainsworth, Hayase and Srinivasa 2023, "Git Re-Basin"): maximise <A, pi(B)>
    over one permutation for each group of units by coordinate ascent, an assignment problem each
    time, until no permutation changes. Ascent starts from the order as it is and from one matched
    layer by layer, and the better end is kept; it is a local maximum, not always the best one.
    No data, no evaluations; the cost of an assignment is cubic in the width.

    Args:
        units: for a model whose forward can't be traced, {name: [(key of the state, axis), ...]}.
        seed: of the order in which groups are gone through.

    Raises:
        UsageError: the states or units do not fit, or the model is of a kind that is not known.
        ImportError: SciPy is not installed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> a = net.state_dict()
        >>> b = {k: t if k == "2.bias" else t.flip(int(k == "2.weight")) for k, t in a.items()}
        >>> found = align(net, a, b)  # b is a, its hidden units the other way round
        >>> found.permutations["units 1"].tolist(), round(found.cosine_after, 6)
        ([7, 6, 5, 4, 3, 2, 1, 0], 1.0)
    """
    check_states(model, state_a=state_a, state_b=state_b)
    matching = _Matching(state_a, state_b, permutable_units(model) if units is None else units)
    rng = np.random.default_rng(seed)
    starts = (matching.identity, matching.layer_by_layer())
    ends = [matching.climb(start, rng, max_sweeps) for start in starts]
    orders, sweeps = max(ends, key=lambda end: matching.similarity(end[0]))
    return Alignment(
        state=matching.apply(orders),
        permutations=orders,
        units=matching.units,
        cosine_before=matching.similarity(matching.identity),
        cosine_after=matching.similarity(orders),
        sweeps=sweeps,
    )


class _Matching:
    """Two states and the axes that move together."""

    def __init__(self, a: State, b: State, units: Units) -> None:
        self.units = units
        self._a, self._b = a, b
        self._sizes: dict[str, int] = {}
        self._groups: dict[str, dict[int, str]] = {}  # key -> axis -> group
        for group, slots in units.items():
            lengths = [_length(a, group, slot) for slot in slots]
            if not lengths or any(n % min(lengths) for n in lengths):
                raise UsageError(
                    f"units[{group!r}] must be axes whose lengths are multiples of one another, "
                    f"got {lengths}."
                )
            self._sizes[group] = min(lengths)
            for key, axis in slots:
                self._groups.setdefault(key, {})[axis] = group
        self._assign = _assignment()

    @property
    def identity(self) -> Orders:
        return {group: np.arange(size) for group, size in self._sizes.items()}

    def layer_by_layer(self) -> Orders:
        """Match each group by those weights alone whose other axes are settled."""
        settled: Orders = {}
        for group, slots in self.units.items():
            others = [
                (key, axis)
                for key, axis in slots
                if all(g in settled for x, g in self._groups[key].items() if x != axis)
            ]
            products = self._products(group, others or slots, self.identity | settled)
            settled[group] = self._assign(products)
        return settled

    def climb(self, start: Orders, rng: np.random.Generator, most: int) -> tuple[Orders, int]:
        """Match one group after another until none changes; return that and how many rounds."""
        orders = dict(start)
        for sweep in range(1, most + 1):
            changed = False
            for group in rng.permutation(list(orders)):
                products = self._products(group, self.units[group], orders)
                best = self._assign(products)
                rows = np.arange(len(best))
                gain = products[rows, best].sum() - products[rows, orders[group]].sum()
                if gain > _GAIN * np.abs(products).sum():
                    orders[group], changed = best, True
            if not changed:
                return orders, sweep
        return orders, max(most, 0)

    def similarity(self, orders: Orders) -> float:
        """Return the cosine of A and the permuted B, over the weights that can be permuted."""
        inner = lengths_a = lengths_b = 0.0
        for key in self._groups:
            if not key.endswith(_STATISTICS):
                a, b = _matrix(self._a[key]), _matrix(self._moved(key, orders))
                inner += float((a * b).sum())
                lengths_a += float((a * a).sum())
                lengths_b += float((b * b).sum())
        return inner / max(math.sqrt(lengths_a * lengths_b), sys.float_info.min)

    def apply(self, orders: Orders) -> dict[str, Any]:
        return {**self._b, **{key: self._moved(key, orders) for key in self._groups}}

    def _products(self, group: str, slots: Sequence[tuple[str, int]], orders: Orders) -> Any:
        """Return <unit i of A, unit j of B>, with B's other axes as they are permuted now."""
        size = self._sizes[group]
        total = torch.zeros(size, size, dtype=torch.float64)
        for key, axis in slots:
            if not key.endswith(_STATISTICS):
                b = self._moved(key, orders, without=axis)
                pair = [_matrix(t).movedim(axis, 0).reshape(size, -1) for t in (self._a[key], b)]
                total += pair[0] @ pair[1].T
        return total.numpy()

    def _moved(self, key: str, orders: Orders, *, without: int | None = None) -> Tensor:
        """Return a tensor of B with its axes permuted, all or all but one."""
        tensor: Tensor = self._b[key]
        for axis, group in self._groups[key].items():
            if axis != without:
                block = tensor.shape[axis] // self._sizes[group]
                places = orders[group][:, None] * block + np.arange(block)
                index = torch.from_numpy(places.reshape(-1)).to(tensor.device)
                tensor = tensor.index_select(axis, index)
        return tensor


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _length(state: State, group: str, slot: tuple[str, int]) -> int:
    key, axis = slot
    tensor = state.get(key)
    if not isinstance(tensor, Tensor) or not 0 <= axis < tensor.ndim:
        raise UsageError(f"units[{group!r}] must be (key of the state, axis from 0), got {slot!r}.")
    return tensor.shape[axis]


def _assignment() -> Callable[[Any], Order]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "align needs SciPy, which is not installed. "
            "Install it with: pip install 'geomwatch[landscape]'"
        ) from error
    return lambda products: np.asarray(linear_sum_assignment(products, maximize=True)[1])
