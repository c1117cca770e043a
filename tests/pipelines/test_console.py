"""Console output of runs side by side; that of whole runs is in tests/pipelines/test_end_to_end.py."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from pipelines.console import Console, say
from tasks.progress import Progress
from tasks.store import Store


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Lines that are to be seen after all that was printed and erased."""
        first, *others = re.split(r"\x1b\[(\d+)F\x1b\[J", self.getvalue())
        lines = first.splitlines()
        for erased, printed in zip(others[::2], others[1::2], strict=True):
            lines = lines[: len(lines) - int(erased)] + printed.splitlines()
        return lines


def record(store: Store, run: str, stage: str, state: str, done: int = 0) -> None:
    store.write_json({"stage": stage, "at": 1.0, "state": state, "seconds": 2.0}, "runs", run, f"{stage}.json")
    progress = Progress(store.uri("runs", run, "progress", f"{stage}.json"), 10, "samples")
    progress.start(done)


def test_the_progress_of_all_runs_stays_at_the_end_of_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    store = Store(str(tmp_path))
    record(store, "run-1", "prior", "running", 3)
    record(store, "run-2", "glide", "running", 4)
    with contextlib.redirect_stdout(Terminal()) as terminal:
        with (
            contextlib.closing(Console(store, "run-1", ["prior"], "unclip")) as first,
            contextlib.closing(Console(store, "run-2", ["glide"], "glide")) as second,
        ):
            first.refresh()
            second.refresh()
            say("another line")
            both = [line.split()[1:3] for line in terminal.screen()]
            record(store, "run-1", "prior", "done")
            first.refresh()
            one = [line.split()[1:4] for line in terminal.screen()[-2:]]
        at_the_end = terminal.screen()
    states = [["unclip:", "prior"], ["glide:", "glide"]]
    assert both[:2] == states and both[2] == ["line"], "what does not change is above"
    assert [line[0] for line in both[3:]] == ["prior", "glide"] and len(both) == 5
    assert one[0] == ["unclip:", "prior", "done"] and one[1][0] == "glide"
    assert [line.split()[-1] for line in at_the_end] == ["s", "s", "line", "s"], "no progress is left behind"
