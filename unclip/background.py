"""Something done again and again beside other work."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeatedly(seconds: float, action: Callable[[], object], name: str) -> Iterator[None]:
    """Call `action` every so many seconds, from a thread of this name that ends with the block; the first time after the first
    of them."""
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


def now_and_then(seconds: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """Ask no more often than every so many seconds, and never again after a yes; in between the answer is the last one."""
    answer, asked_at = False, -seconds

    def recent() -> bool:
        nonlocal answer, asked_at
        if not answer and time.monotonic() - asked_at >= seconds:
            answer, asked_at = ask(), time.monotonic()
        return answer

    return recent
