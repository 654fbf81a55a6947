"""A function that leaves no trace: signals wait until it has put everything back."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from geomwatch.isolation.undo import later, until_here

_NUMBERS = sorted(map(int, signal.valid_signals()))

P = ParamSpec("P")
T = TypeVar("T")


def traceless(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function undo all that it has noted, in whatever line it is interrupted."""

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        _hold()
        return function(*args, **kwargs)

    return _Block()(held)


def users(function: Callable[..., T], *arguments: Any) -> T:
    """Call code of the user's, which may take long: signals are handled in there."""
    held = _THREAD.held
    return function(*arguments) if held is None else held.within(function, *arguments)


def raised_by_users(error: BaseException) -> bool:
    """Tell whether an error comes out of code that `users` has called."""
    calls = {users.__code__, HeldSignals.within.__code__}
    inside, frame = False, error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if inside and code not in calls:
            return True
        inside, frame = inside or code in calls, frame.tb_next
    return False


def handle_signals() -> None:
    """Handle the signals that wait, in a place where an exception does no harm."""
    if _THREAD.held is not None:
        _THREAD.held.deliver()


class _Block(contextlib.ContextDecorator):
    """Makes a call of a function a block, by the `with` of contextlib."""

    def _recreate_cm(self) -> Any:
        return until_here()


class HeldSignals:
    """Takes the place of the handlers of signals, such as that of Ctrl-C.

    A handler that raises between two of our lines would leave things half done, so its signal waits
    for the next call of loss_fn or of `handle_signals`, or for the end; a second one of its kind
    does not. Inside loss_fn, which may take long or for ever, handlers are called at once.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, Any], object]] = {}
        self._waiting: list[int] = []
        self._pass = False

    def hold(self) -> None:
        """Take the place of the handlers that are functions."""
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def release(self) -> None:
        """Give their place back, and call those that wait. May run twice."""
        self._pass = True
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self.deliver()

    def deliver(self) -> None:
        """Call the handlers of the signals that wait."""
        while self._waiting:
            number = self._waiting.pop(0)
            self._handlers[number](number, sys._getframe())

    def within(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call code of the user's, in which signals do not wait."""
        self._pass = True
        self.deliver()
        try:
            return function(*arguments)
        finally:
            self._pass = False

    def _note(self, number: int, frame: Any) -> None:
        if self._pass or number in self._waiting:
            self._handlers[number](number, frame)
        else:
            self._waiting.append(number)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.held: HeldSignals | None = None


_THREAD = _Thread()


def _hold() -> None:
    """Hold signals until the block around ends. Only the main thread is interrupted by any."""
    if _THREAD.held is not None or threading.current_thread() is not threading.main_thread():
        return
    held = HeldSignals()
    later(held.release)
    later(functools.partial(setattr, _THREAD, "held", None))
    _THREAD.held = held
    held.hold()
