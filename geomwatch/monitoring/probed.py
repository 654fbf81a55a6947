"""What a probe of a run hands on, and what is asked of who makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.plan import Plan
from geomwatch.records import Estimate, Record
from geomwatch.vectors.layout import Layout


@dataclass(frozen=True, slots=True)
class Probed:
    """A record with what only the rules need beside it."""

    record: Record
    margin: Estimate | None
    gradient_margin: Estimate
    layers: tuple[str, ...]
    items: int  # of all ranks


class Measures(Protocol):
    """A Prober, as it is seen from where its failures are survived."""

    plan: Plan
    ranks: Ranks
    optimizer: Any
    limit_ratio: float
    same_data: bool
    surprises: list[str]
    no_margin: str

    @property
    def probe(self) -> Callable[..., Probed]:
        """Measures on a window, at a step."""

    @property
    def glance(self) -> Callable[..., Estimate]:
        """Looks along a step."""

    @property
    def rehearse(self) -> Callable[..., list[float]]:
        """Goes some steps ahead."""

    @property
    def present(self) -> Callable[..., list[float]]:
        """Evaluates the loss of some windows."""

    def restart(self, layout: Layout, optimizer: Any) -> None:
        """Go on with other parameters or another optimizer."""

    def cut_batches(self, window: Sequence[Any]) -> int | None:
        """Use a quarter of the memory from now on."""

    def uncut_batches(self) -> None:
        """Take that back."""

    def lambda_max(self) -> float | None:
        """Return the last known lambda_max."""
