"""What puts things back, noted before they are changed, so that nothing is left out at any line.

A stack of steps for each thread. A block, `with until_here():`, undoes at its end what was noted
inside. But Python can be interrupted between the last line of a `with` block and its `__exit__`,
or in there, and no `try` closes the gap. Hence three rules: a step is noted before what it undoes
is done, and may run twice; what an interrupted block has left is undone by the next one around it;
and the outermost one, `traceless`, has its `with` in the standard library, where nothing but a
signal interrupts, and those wait (see `signals`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Step = Callable[[], object]

_ABSENT: Any = object()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.steps: list[Step] = []


_THREAD = _Thread()


def later(step: Step) -> None:
    """Note what undoes the change that is made next. It may run twice."""
    _THREAD.steps.append(step)


def enter(context: contextlib.AbstractContextManager[T]) -> T:
    """Enter a context, not one of ours, until the block around ends."""
    alone = contextlib.ExitStack()
    later(alone.close)
    return alone.enter_context(context)


def swap(owner: Any, name: str, value: object) -> None:
    """Set an attribute until the block around ends; one that was inherited is so again."""
    before = vars(owner).get(name, _ABSENT)

    def put_back() -> None:
        if before is not _ABSENT:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)

    later(put_back)
    setattr(owner, name, value)


def attach(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
    """Register a hook until the block around ends."""
    alone = contextlib.ExitStack()
    later(alone.close)
    alone.callback(register(hook, **options).remove)


def until_here() -> contextlib.ExitStack:
    """Return a block at whose end all that was noted inside is undone, the last first."""
    block = contextlib.ExitStack()
    undo = functools.partial(_undo, len(_THREAD.steps))
    block.callback(undo)
    block.callback(undo)  # should the first be interrupted
    return block


def _undo(down_to: int) -> None:
    """Run the steps above a height, each again if it raises, and go on if it does so twice.

    Raises:
        BaseException: the first that was raised, once everything is undone.
    """
    steps = _THREAD.steps
    failure: BaseException | None = None
    failed: Step | None = None
    while len(steps) > down_to:
        step = steps[-1]
        try:
            step()
        except BaseException as error:  # an interrupt must not leave the rest undone
            failure = failure or error
            if failed is not step:
                failed = step
                continue
        steps.pop()
    if failure is not None:
        raise failure
