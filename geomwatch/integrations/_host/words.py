"""What is said in every host alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from geomwatch.sinks.log import logger


def missing(host: str, extra: str) -> ImportError:
    """Return the error to raise `from` the ImportError of the host's own package."""
    return ImportError(
        f"geomwatch.integrations.{extra} needs {host}, which is not installed. "
        f"Install it with: pip install 'geomwatch[{extra}]'"
    )


def tell_of_joining(step: int) -> None:
    """Tell that a callback has not seen a run begin."""
    logger.warning(
        "GeomwatchCallback was added after training had begun: it watches from step %d on.", step
    )


@contextlib.contextmanager
def survived(what: str, tell: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Tell of a tracker that is out of reach, say, instead of stopping a training run."""
    try:
        yield
    except Exception as error:  # of anybody's own tracker
        tell(f"{what}: {type(error).__name__}: {error}")


def tell_of_a_short_run(every: int | None, steps: float) -> None:
    """Tell that in the steps to come there will be one probe only, if so."""
    if every is not None and 1 < steps <= every:
        logger.warning(
            "every=%d makes one probe only, at the first of the %d steps of this run. Pass "
            "every=%d, say, or leave it out.",
            every,
            steps,
            max(1, steps // 10),
        )
