import os
import signal
import threading

import pytest

from tasks.signals import asked_to_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_asks_and_a_second_ends(number: signal.Signals) -> None:
    class Ended(Exception):
        pass

    def end(*_: object) -> None:
        raise Ended

    before = signal.signal(number, end)
    try:
        with asked_to_stop() as is_asked:
            assert not is_asked()
            os.kill(os.getpid(), number)
            assert is_asked()
            with pytest.raises(Ended):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)


def test_other_threads_catch_no_signal() -> None:
    seen: list[bool] = []

    def look() -> None:
        with asked_to_stop() as is_asked:
            seen.append(is_asked())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [False]
