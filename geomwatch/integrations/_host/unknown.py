"""What stands for batches that a rank has trained on and can't evaluate again."""

from __future__ import annotations

from typing import NoReturn

from geomwatch.errors import WithheldError


class Unknown:
    """A micro-batch that fails the probe on all ranks: without it they would measure another loss.

    A process alone has no need of it: it observes nothing, and nothing is measured.
    """

    share = 1.0

    def __init__(self, why: str) -> None:
        self._why = why

    def evaluate(self) -> NoReturn:
        """Tell why there is no loss of it.

        Raises:
            WithheldError: always.
        """
        raise WithheldError(self._why)
