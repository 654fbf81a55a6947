"""A callback that was given to the other host, or as a class: refused with the line to write."""

from __future__ import annotations

from typing import Any

from geomwatch.errors import MisplacedError, UsageTypeError


class NotOfLightning:
    """What Lightning asks of a callback first: that of transformers is none."""

    state_key = "GeomwatchCallback"  # Lightning names what it calls by it

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse the Trainer of Lightning.

        Raises:
            UsageTypeError: always.
        """
        raise UsageTypeError(
            "a Trainer of Lightning must be given the callback of Lightning, got that of "
            "transformers.",
            write="from geomwatch.integrations.lightning import GeomwatchCallback",
        )

    def on_exception(self, *arguments: object) -> None:
        """Let Lightning pass the refusal on."""


class NotOfTransformers:
    """What transformers asks of a callback first: that of Lightning is none."""

    def on_init_end(self, *arguments: object, **known: object) -> None:
        """Refuse the Trainer of transformers.

        Raises:
            UsageTypeError: always.
        """
        raise UsageTypeError(
            "a Trainer of transformers must be given the callback of transformers, got that of "
            "Lightning.",
            write="from geomwatch.integrations.transformers import GeomwatchCallback",
        )


class StateKey:
    """The name of a callback in Lightning's checkpoints; the first thing it asks of a class."""

    def __get__(self, callback: object, owner: type) -> str:
        if callback is None:
            raise MisplacedError(
                f"callbacks must hold callbacks, got the class {owner.__name__}.",
                write=f"Trainer(callbacks=[{owner.__name__}()])",
            )
        return owner.__qualname__
