"""What one item of a batch is: dimensions that share a length, and how a batch is cut along them.

A batch does not say. Its first dimension may be time, its first tensor class weights or a task; a
list may hold sequences of different lengths, or fields. What is cut is a guess, in the order in
which guesses are likely, until losses have confirmed it (see `cutting`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

from torch import Tensor

from geomwatch.curvature.batches import DESCEND, Carrier, Path, parts, rebuilt
from geomwatch.curvature.selection import Place, is_list, is_whole, select, sizes
from geomwatch.errors import UsageError

Cut: TypeAlias = Mapping[Path, Place]  # of the parts that items lie in; all others are shared
ItemsOf: TypeAlias = int | Callable[[Any], int] | None  # what a user says of them

_LABELS = frozenset(("labels", "label", "targets", "target", "y", "label_ids"))
_MOST = 12  # guesses
_LENGTHS = 4  # of these the most likely
_FIELDS = 3  # a list of so many tensors of like lengths holds fields, not items


def inside(batch: Any) -> Any:
    """Return the batch in what a host has put around it."""
    return batch.carried() if isinstance(batch, Carrier) else batch


def length(batch: Any, cut: Cut) -> int | None:
    """Return the number of items under a cut; None if it is none of this batch."""
    found = {path: part for path, part in _parts(inside(batch)) if path in cut}
    if len(found) < len(cut):
        return None
    counts = set()
    for path, place in cut.items():
        along = sizes(found[path])
        if place.dim >= len(along) or along[place.dim] % place.rows:
            return None
        counts.add(along[place.dim] // place.rows)
    return counts.pop() if len(counts) == 1 else None


def take(batch: Any, cut: Cut, items: Tensor) -> Any:
    """Return the batch with some of its items, by their numbers (n,), in that order.

    Raises:
        TypeError: a container can't be made anew with fewer items.
    """

    def visit(path: Path, part: Any) -> Any:
        return select(part, cut[path], items) if path in cut else DESCEND

    piece = rebuilt(inside(batch), visit)
    if length(piece, cut) != len(items):
        raise TypeError(f"items can't be taken out of a {type(inside(batch)).__name__}")
    if not isinstance(batch, Carrier):
        return piece
    return batch.carrying(piece, len(items) / (length(batch, cut) or 1))


def is_of_all(batch: Any, cut: Cut) -> bool:
    """Tell whether a cut leaves no tensor of the batch whole."""
    tensors = [path for path, part in _parts(inside(batch)) if not is_list(part)]
    return all(any(path[: len(above)] == above for above in cut) for path in tensors)


def structure(batch: Any) -> object:
    """Return what batches share that are cut alike: their parts, by path and dimensions."""
    known = _parts(inside(batch))
    lists = [path for path, part in known if is_list(part)]
    return tuple(
        (path, len(sizes(part)))
        for path, part in known
        if not any(_is_below(path, above) for above in lists)
    )


def guesses(batch: Any, items: ItemsOf = None) -> list[Cut]:
    """Return the ways in which a batch may be cut, likely ones first; at least one that counts.

    `items` is the user's word: a dimension, or a function that counts.

    Raises:
        UsageError: that function returns no number of items.
    """
    table = _Table(inside(batch))
    if isinstance(items, int):
        return [cut for cut in [table.along(items)] if cut]
    if items is not None:
        return list(islice(table.counting(stated(items, batch)), _MOST))
    return list(islice(table.guesses(), _MOST))


def stated(items: Callable[[Any], int], batch: Any) -> int:
    """Return what the user's function says of a batch.

    Raises:
        UsageError: it is no number of items.
    """
    count = items(inside(batch))
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if (
        isinstance(count, bool)
        or not isinstance(count, int | float)
        or count != int(count)
        or count < 0
    ):
        raise UsageError(
            f"items(batch) must return the number of items of the batch, got {count!r}."
        )
    return int(count)


class _Table:
    """The parts of a batch with their lengths."""

    def __init__(self, batch: Any) -> None:
        self._parts = [(path, part, sizes(part)) for path, part in _parts(batch)]
        self._label = self._find_label(batch)
        self._tensors = [path for path, part, _ in self._parts if not is_list(part)]

    def guesses(self) -> Iterator[Cut]:
        """Yield cuts along each length, pairs of the first, and then less of the first ones."""
        lengths = sorted(
            {n for _, _, along in self._parts for n in along}, key=self._rank, reverse=True
        )
        first = [self._along_all(n) for n in lengths[:_LENGTHS]]
        yield from first
        if lengths:
            yield from self._pairs(lengths[0])
        for n, cut in zip(lengths[:2], first, strict=False):
            yield from self._less(n, cut)

    def counting(self, count: int) -> Iterator[Cut]:
        """Yield the cuts that have so many items."""
        whole = self._along_all(count)
        if whole:
            yield whole
        yield from self._pairs(2 * count)
        if whole:
            yield from self._less(count, whole)

    def along(self, dim: int) -> Cut:
        """Return the cut along a dimension, and where a part has fewer along its length."""
        count = next((along[dim] for _, _, along in self._parts if len(along) > dim), None)
        if count is None:
            return {}
        return self._cut(
            lambda along: dim if along[dim : dim + 1] == (count,) else _index(along, count)
        )

    def _along_all(self, n: int) -> dict[Path, Place]:
        return self._cut(lambda along: _index(along, n))

    def _cut(self, dim_of: Callable[[tuple[int, ...]], int | None]) -> dict[Path, Place]:
        cut: dict[Path, Place] = {}
        for path, _, along in self._parts:
            dim = dim_of(along)
            if dim is not None and not any(path[: len(above)] == above for above in cut):
                cut[path] = Place(dim)
        return cut

    def _pairs(self, n: int) -> Iterator[Cut]:
        """Yield cuts into pairs of rows, with n / 2 rows of what a pair has one of."""
        if n % 2 or n < 2:
            return
        for apart in (True, False):
            cut = self._along_all(n // 2)
            both = {path: Place(p.dim, 2, apart) for path, p in self._along_all(n).items()}
            if both:
                yield cut | both

    def _less(self, n: int, cut: Cut) -> Iterator[Cut]:
        """Yield variants: another dimension of that length, a part left out, a list left whole."""
        for path, part, along in self._parts:
            if path in cut:
                others = [dim for dim, size in enumerate(along) if size == n]
                for dim in others[1:]:
                    yield {**cut, path: Place(dim)}
                if len(cut) > 1 and path != self._label:
                    yield {p: place for p, place in cut.items() if p != path}
                if is_list(part):
                    below = {
                        p: Place(a.index(n))
                        for p, _, a in self._parts
                        if _is_below(p, path) and n in a
                    }
                    if below:
                        yield {p: place for p, place in cut.items() if p != path} | below

    def _rank(self, n: int) -> tuple[float, ...]:
        """Say how likely a length is that of the items; the larger the likelier."""
        cut = self._along_all(n)
        labelled = self._label is not None and any(
            self._label[: len(path)] == path and place.dim == 0 for path, place in cut.items()
        )
        covered = sum(any(path[: len(above)] == above for above in cut) for path in self._tensors)
        fields = sum(path in cut and _holds_fields(part) for path, part, _ in self._parts)
        dims = sum(place.dim for place in cut.values())
        features = all(_is_of_features(part, cut[p]) for p, part, _ in self._parts if p in cut)
        share = covered / max(len(self._tensors), 1)
        return labelled, not features, -fields, share, n > 1, -dims, -len(cut)

    def _find_label(self, batch: Any) -> Path | None:
        """Return the path of the labels: by name, or the last of a tuple, if of its own kind."""
        for path, _, along in self._parts:
            if path and along and str(path[-1]).lower() in _LABELS:
                return path
        top = [(path, part, along) for path, part, along in self._parts if len(path) == 1]
        if not isinstance(batch, list | tuple) or len(top) < 2 or is_list(batch):
            return None
        path, _, along = top[-1]
        return path if along and path == (len(batch) - 1,) else None


def _parts(batch: Any) -> list[tuple[Path, Any]]:
    """The parts of a batch; none of those inside of what is cut as one, but the items of lists."""
    known = parts(batch, also=is_whole)
    closed = [p for p, part in known if is_whole(part) and not is_list(part)]
    return [(p, part) for p, part in known if not any(_is_below(p, above) for above in closed)]


def _is_below(path: Path, above: Path) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _holds_fields(part: Any) -> bool:
    """Tell whether a list is one of fields, not of items: few, of which some are as long."""
    if not is_list(part) or len(part) > _FIELDS:
        return False
    lengths = [along[0] for along in map(sizes, part) if along]
    return len(set(lengths)) < len(lengths)


def _is_of_features(part: Any, place: Place) -> bool:
    """Tell whether a dimension is that in which floating-point rows have their features."""
    is_rows = isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 1
    return bool(is_rows and place.dim == part.ndim - 1)


def _index(along: tuple[int, ...], n: int) -> int | None:
    return along.index(n) if n in along else None
