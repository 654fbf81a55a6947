"""Lightning under both of its names, `lightning.pytorch` and `pytorch_lightning`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from geomwatch.integrations._host.words import missing

_NAMES = ("lightning.pytorch", "pytorch_lightning")

if not any(importlib.util.find_spec(name.partition(".")[0]) for name in _NAMES):  # imports nothing
    raise missing("lightning or pytorch-lightning", "lightning")


def hosts() -> list[ModuleType]:
    """Return the Lightnings that the program has imported; import those there are if it has none.

    The two are copies that share no class, and each Trainer knows its own Callback only. One that
    nobody uses is left alone: imported, it would take over the logger of the other one.
    """
    used = [sys.modules[name] for name in _NAMES if name in sys.modules]
    used = [host for host in used if hasattr(host, "Trainer")]
    for name in () if used else _NAMES:
        with contextlib.suppress(ImportError):
            used.append(importlib.import_module(name))
    if not used:
        raise missing("lightning or pytorch-lightning", "lightning")
    return used


def host_of(trainer: object) -> ModuleType:
    """Return the Lightning that a Trainer is from."""
    return next((host for host in hosts() if isinstance(trainer, host.Trainer)), hosts()[0])


class _Made:
    """Marks the classes that `as_callback` makes."""


def as_callback(cls: Any) -> Any:
    """Return the class as a Callback of the Lightnings in use: of one, or of both."""
    return cls if issubclass(cls, _Made) else _made(cls, tuple(host.Callback for host in hosts()))


@functools.cache
def _made(cls: Any, callbacks: tuple[Any, ...]) -> Any:
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *callbacks, _Made), named)


def written(cls: Any) -> Any:
    """Return the class that `as_callback` was given; pickle finds no other."""
    return next(base for base in cls.__mro__ if not issubclass(base, _Made))


def remade(cls: Any) -> Any:
    """Return an empty instance, as pickle makes it."""
    return cls.__new__(cls)


def dummy_logger(trainer: object) -> Any:
    """Return a logger that takes everything and keeps nothing."""
    name = f"{host_of(trainer).__name__}.loggers.logger"
    return importlib.import_module(name).DummyLogger()
