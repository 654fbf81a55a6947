"""Wrong use of geomwatch, the only errors that reach a training loop; and what can't be had."""

from __future__ import annotations


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
