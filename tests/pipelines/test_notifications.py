"""Notifications of the end of a run: a command and a webhook."""

import contextlib
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.notifications import NotifyConfig, describe_end, notify
from tasks.stage import Run
from tasks.store import Store
from tasks.tracking import Tracker
from unclip.config import load, to_dict
from unclip.errors import ConfigError

HOSTILE = "$(touch ran) `touch ran`; touch ran | cat \"'\n\u202e --flag"
TOKEN = "c4n4ryT0ken"


@contextlib.contextmanager
def listener(status: int = 204, location: str | None = None, seconds: float = 0) -> Iterator[tuple[str, list[Any]]]:
    """Server on loopback; yields its address with a token, and the documents that it was sent."""
    received: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            time.sleep(seconds)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            received.append((self.path, None))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hooks/{TOKEN}", received
        server.shutdown()


def test_the_command_and_the_webhook_get_the_document_whatever_texts_are_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    program = f"import sys, pathlib; pathlib.Path({str(out)!r}).write_bytes(sys.stdin.buffer.read()); assert len(sys.argv) == 2"
    document = {"event": "failed", "message": HOSTILE, "storage": "s3://key:hunter2@bucket/x"}
    with listener() as (address, received):
        config = NotifyConfig((sys.executable, "-c", program, HOSTILE), address)
        assert notify(config, document) == []
    expected = {"event": "failed", "message": HOSTILE, "storage": "s3://key@bucket/x"}
    assert json.loads(out.read_text()) == expected
    assert received == [(f"/hooks/{TOKEN}", expected)]
    assert not (Path.cwd() / "ran").exists()


def test_f159_a_notification_that_fails_is_a_warning_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    slow = (sys.executable, "-c", "import time; time.sleep(30)", TOKEN)
    started = time.monotonic()
    assert "longer than 0.5 s" in notify(NotifyConfig(slow, timeout_seconds=0.5), {})[0]
    assert time.monotonic() - started < 10
    failing = (sys.executable, "-c", "raise SystemExit(3)", TOKEN)
    assert "exit code 3" in notify(NotifyConfig(failing), {})[0]
    assert "does not start" in notify(NotifyConfig(("/no/such/program", TOKEN)), {})[0]
    with listener(500) as (address, _):
        assert notify(NotifyConfig(webhook=address), {}) == ["notify.webhook: 127.0.0.1 answered with status 500."]
    with listener(seconds=5) as (address, _):
        assert "did not answer within 0.5 s" in notify(NotifyConfig(webhook=address, timeout_seconds=0.5), {})[0]
    with listener() as (other, reached), listener(302, other) as (address, _):
        assert "status 302" in notify(NotifyConfig(webhook=address), {})[0] and not reached
    assert "was not reached" in notify(NotifyConfig(webhook=f"http://127.0.0.1:9/{TOKEN}"), {})[0]
    assert TOKEN not in capsys.readouterr().err


def test_records_have_neither_the_address_nor_the_arguments() -> None:
    config = NotifyConfig(
        ("curl", "-H", f"Authorization: {TOKEN}"), f"https://hooks.example/services/{TOKEN}?key={TOKEN}"
    )
    values = to_dict(config)
    assert values["command"] == ["curl", "…", "…"] and values["webhook"] == "https://hooks.example"
    load(NotifyConfig, values)  # records can be read again


@pytest.mark.parametrize(
    "address", ["ftp://host/x", f"https://me:{TOKEN}@host/", "host/x", "http://", "http://h:x/", "http://h/a b"]
)
def test_an_address_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NotifyConfig(webhook=address)
    assert TOKEN not in str(caught.value) and "notify.webhook" in str(caught.value)


@pytest.mark.parametrize(("alias", "event"), [("champion", "promoted"), ("challenger", "refused")])
def test_the_event_is_the_decision_about_a_published_model(tmp_path: Path, alias: str, event: str) -> None:
    store = Store(str(tmp_path))
    run = Run("r1", "demo", store.root, Tracker("", ""), "")
    store.write_json({"system": "unclip/autoregressive", "started": 1.0}, "runs", "r1", "run.json")
    assert describe_end(run, store, "failed", "too bad")["message"] == "too bad"
    assert describe_end(run, store, "done")["event"] == "done"
    facts = {"name": "unclip-demo", "version": "2", "alias": alias}
    artifact = {"stage": "publish", "fingerprint": "f", "uri": "u", "digest": "d", "facts": facts, "seconds": 1.0}
    store.write_json(artifact, "stages", "publish", "f.json")
    for state, expected in (("cached", "done"), ("done", event)):
        store.write_json({"stage": "publish", "state": state, "fingerprint": "f"}, "runs", "r1", "publish.json")
        assert describe_end(run, store, "done")["event"] == expected
    assert describe_end(run, store, "done")["published"] == {**facts, "stack": "u"}
