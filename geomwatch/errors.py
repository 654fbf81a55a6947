"""Wrong use of geomwatch, the only errors that reach a training loop; and what can't be had."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something was passed that can't work. The message says what, why and what to do.

    Raised at construction or at the first probe, before training has cost anything. Errors of a
    later probe never stop a run.

    Args:
        message: what must be, what was passed, what to do.
        write: the repaired code, which becomes the last line of the message.
    """

    def __init__(self, message: str, write: str = "") -> None:
        super().__init__(f"{message} Write:\n    {write}" if write else message)


class UsageTypeError(UsageError, TypeError):
    """A UsageError about the type of a thing."""


class UsageKeyError(UsageError, KeyError):
    """A UsageError about a name that is not there."""

    __str__ = ValueError.__str__  # that of a KeyError has quotes around it


class MisplacedError(UsageError, AttributeError):
    """A UsageError where a host looks for what is not there; `hasattr` takes it for a no."""


class WithheldError(RuntimeError):
    """A quantity has no meaning here; its estimate says why."""


class NoCurvatureError(RuntimeError):
    """No backend can differentiate the gradient of this loss."""


def nearest(given: object, known: Iterable[str]) -> str:
    """Return the known name nearest to what was given; "" if none is near."""
    plain = str(given).lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(plain, list(known), n=1)
    return close[0] if close else ""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to what was given; "" if none is."""
    near = nearest(given, known)
    return f" Did you mean {near!r}?" if near else ""
