"""Graceful stop on Ctrl-C or SIGTERM, which preempted machines send."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_asked: list[threading.Event] = []
"""Events of the blocks that the main thread is in."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after a first SIGTERM or Ctrl-C; a second one has its usual effect.

    Outside the main thread no signal is caught; the function tells what the blocks of the main thread caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: any(event.is_set() for event in _asked)
        return
    stop_event = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def on_signal(number: int, _: Any) -> None:
        stop_event.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, on_signal)
    _asked.append(stop_event)
    try:
        yield stop_event.is_set
    finally:
        _asked.remove(stop_event)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Keep the handlers of a `stop_on_signal` around this block, in which a library sets its own, as Ray does when it starts."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers = (
        {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if is_main and _asked else {}
    )
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
