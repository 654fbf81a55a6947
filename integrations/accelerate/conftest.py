"""Accelerators with a state of their own: accelerate shares it between all in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Return a function that makes accelerate forget what it has set up in this process."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    yield reset
    reset()


@pytest.fixture
def make_accelerator(forget: Callable[[], None]) -> Callable[..., Accelerator]:
    """Return an Accelerator on the CPU, each unaware of those before."""

    def make(**options: object) -> Accelerator:
        forget()
        return Accelerator(cpu=True, **options)

    return make


@pytest.fixture
def accelerator(make_accelerator: Callable[..., Accelerator]) -> Accelerator:
    return make_accelerator(gradient_accumulation_steps=2)
