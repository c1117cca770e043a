"""Calls with a time limit."""

import sys
import threading

import pytest

from unclip.background import within


def test_the_result_or_the_error_of_a_call_with_a_limit_is_its_own() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    with pytest.raises(SystemExit, match="7"):  # not "no answer within 5 s"
        within(5.0, lambda: sys.exit(7))
    ended = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        within(0.01, lambda: ended.wait(60))
    ended.set()
