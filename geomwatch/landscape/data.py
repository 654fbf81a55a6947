"""What a landscape is evaluated over: batches that can be gone through again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.errors import UsageError, UsageTypeError

_WANTED = "batches must be a list of batches or a DataLoader"


class Batches:
    """A list of batches, a DataLoader, or anything else that starts anew with each `for`."""

    def __init__(self, given: object) -> None:
        if isinstance(given, Tensor | Mapping | str | nn.Module) or not isinstance(given, Iterable):
            raise UsageTypeError(
                f"{_WANTED}, got {type(given).__name__}. For a single batch pass [batch]."
            )
        if isinstance(given, Iterator):
            raise UsageError(
                f"{_WANTED}, to be gone through at each point, got {type(given).__name__}, which "
                "is used up after one pass. Pass list(...) of it."
            )
        self._given: Iterable[Any] = given

    def __iter__(self) -> Iterator[Any]:
        return iter(self._given)

    def first(self) -> Any:
        """Return the first batch.

        Raises:
            UsageError: there is none.
        """
        for batch in self:
            return batch
        raise UsageError(f"{_WANTED}, got one without any batch.")

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that a DataLoader and its sampler own; they are to be replayed."""
        sampler = getattr(self._given, "sampler", None)
        batch_sampler = getattr(self._given, "batch_sampler", None)
        owners = (self._given, sampler, getattr(batch_sampler, "sampler", None))
        found = {id(g): g for o in owners for g in [getattr(o, "generator", None)]}
        return [g for g in found.values() if isinstance(g, torch.Generator)]

    def explain(self, error: Exception) -> None:
        """Raise a UsageError if what was passed looks like one batch instead of several."""
        given = self._given
        if isinstance(given, list | tuple) and given and all(isinstance(t, Tensor) for t in given):
            raise UsageError(
                f"{_WANTED}, got a {type(given).__name__} of {len(given)} tensors, with the first "
                f"of which as a batch loss_fn fails. For a single batch pass [batch]. "
                f"({type(error).__name__}: {error})"
            ) from error
