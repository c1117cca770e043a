"""Something done again and again beside the work of a `with` block."""

import contextlib
import threading
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
