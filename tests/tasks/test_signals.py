import os
import signal
import threading

import pytest

from tasks.signals import kept_handlers, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_requests_a_stop_and_the_second_ends_the_process(number: signal.Signals) -> None:
    class Ended(Exception):
        pass

    def end(*_: object) -> None:
        raise Ended

    previous = signal.signal(number, end)
    try:
        with stop_on_signal() as is_stop_requested:
            assert not is_stop_requested()
            os.kill(os.getpid(), number)
            assert is_stop_requested()
            with pytest.raises(Ended):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, previous)


def test_signals_are_not_caught_outside_the_main_thread() -> None:
    observed: list[bool] = []

    def look() -> None:
        with stop_on_signal() as is_stop_requested:
            observed.append(is_stop_requested())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert observed == [False]


def test_threads_hear_what_the_main_thread_caught() -> None:
    observed: list[bool] = []

    def look() -> None:
        with stop_on_signal() as is_stop_requested:
            observed.append(is_stop_requested())

    with stop_on_signal() as is_stop_requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_stop_requested()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert observed == [True]


def test_handlers_are_kept_where_a_library_sets_its_own() -> None:
    def end(*_: object) -> None:
        raise SystemExit

    before = signal.getsignal(signal.SIGTERM)
    try:
        with stop_on_signal() as is_stop_requested:
            with kept_handlers():
                signal.signal(signal.SIGTERM, end)
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_stop_requested()
        with kept_handlers():
            signal.signal(signal.SIGTERM, end)
        assert signal.getsignal(signal.SIGTERM) is end, "nothing asks for a stop"
    finally:
        signal.signal(signal.SIGTERM, before)
