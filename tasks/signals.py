"""Asking this process to end in good order: SIGTERM, as machines that are taken back send it, and Ctrl-C."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within the block a first SIGTERM or Ctrl-C only makes what it gives return True; a second one does what it always does.

    Outside of the main thread no signal is caught.
    """
    asked = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
