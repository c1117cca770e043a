"""Periodic work in the background, and rate-limited checks."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def run_periodically(seconds: float, action: Callable[[], object], name: str) -> Iterator[None]:
    """Call `action` every `seconds` from a thread called `name`, until the block ends; the first call comes after `seconds`."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def rate_limited(seconds: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """Limit `ask` to one call every `seconds` and repeat its last answer in between; after True it is not called again."""
    answer, asked_at = False, -seconds

    def recent() -> bool:
        nonlocal answer, asked_at
        if not answer and time.monotonic() - asked_at >= seconds:
            answer, asked_at = ask(), time.monotonic()
        return answer

    return recent
