"""Graceful stop on Ctrl-C or SIGTERM, which preempted machines send."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after a first SIGTERM or Ctrl-C; a second one has its usual effect.

    Outside the main thread no signal is caught.
    """
    stop_event = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def on_signal(number: int, _: Any) -> None:
        stop_event.set()
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, on_signal)
    try:
        yield stop_event.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
