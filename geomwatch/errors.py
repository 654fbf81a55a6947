"""Wrong use of geomwatch, the only errors that reach a training loop; and what can't be had."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something was passed that can't work. The message says what, why and what to do.

    Raised at construction or at the first probe, before training has cost anything. Errors of a
    later probe never stop a run.
    """


class UsageTypeError(UsageError, TypeError):
    """A UsageError about the type of a thing."""


class WithheldError(RuntimeError):
    """A quantity has no meaning here; its estimate says why."""


class NoCurvatureError(RuntimeError):
    """No backend can differentiate the gradient of this loss."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to what was given; "" if none is."""
    plain = str(given).lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(plain, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
