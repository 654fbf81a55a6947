"""One conductor an optimizer: two would each take the other's rate for the user's."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from geomwatch.controllers.conductor import Conductor
from geomwatch.errors import UsageError
from geomwatch.stability.registry import unwrap

_OWNERS: weakref.WeakKeyDictionary[Any, weakref.ref[Conductor]] = weakref.WeakKeyDictionary()


def claim(optimizer: Any, conductor: Conductor) -> Conductor:
    """Note that a conductor turns the knobs of an optimizer, until it is closed or collected.

    Returns the conductor.

    Raises:
        UsageError: another one does.
    """
    inner = unwrap(optimizer)
    if not conductor.turns:
        return conductor
    with contextlib.suppress(TypeError):  # of an optimizer that can't be referred to weakly
        ref = _OWNERS.get(inner)
        owner = None if ref is None else ref()
        if owner is not None and owner is not conductor and owner.turns:
            raise UsageError(
                "controllers must be those of one monitor, got a second monitor with controllers "
                f"on one {type(inner).__name__}. Give all controllers to one monitor, or call "
                "close() or release() of the first."
            )
        _OWNERS[inner] = weakref.ref(conductor)
    return conductor
