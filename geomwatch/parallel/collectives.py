"""Does a loss ask other ranks? Then no probe can evaluate it as often as one rank needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from geomwatch.errors import UsageError
from geomwatch.isolation.undo import enter, until_here

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@contextlib.contextmanager
def refuse_collectives() -> Iterator[None]:
    """Refuse a loss, evaluated once in this block by each rank, that exchanges tensors.

    Its derivatives would leave out what the other ranks make of this one's part, and ranks that
    evaluate it a different number of times would wait for one another forever.

    Raises:
        UsageError: it does.
    """
    with until_here():
        seen = enter(_Collectives())
        yield
    if seen.names:
        raise UsageError(
            "the loss must be that of this rank's own batch, got one that exchanges tensors with "
            f"other ranks ({', '.join(sorted(seen.names))}). Pass a loss_fn= without that."
        )


class _Collectives(TorchDispatchMode):
    """Notes the collectives of torch.distributed that are called meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _NAMESPACES:
            self.names.add(func.__name__.partition(".")[0].strip("_"))
        return func(*args, **(kwargs or {}))
