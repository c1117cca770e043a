"""Notification of the end of a run: a command that reads a JSON document, and a webhook that it is posted to.

A notification that fails is a warning: the run is what it was. Addresses and arguments are the user's own, so a webhook may be
in a private network. Since they often are secrets, neither messages nor records have them.
"""

import dataclasses
import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from unclip.background import within
from unclip.config import require, secret
from unclip.errors import ConfigError
from unclip.messages import redacted

if TYPE_CHECKING:
    from tasks.stage import Run
    from tasks.store import Store

_DECISIONS = {"champion": "promoted", "challenger": "refused"}
"""Alias of a version that a run published -> event."""


@dataclasses.dataclass(frozen=True)
class NotifyConfig:
    """Command and address that are told when a run has ended or failed, and when its model was promoted or refused."""

    command: tuple[str, ...] = secret(())
    """Program and arguments; it gets the document as JSON on its standard input, never through a shell."""
    webhook: str | None = secret(None)
    """Address, http or https, that the document is posted to as JSON."""
    timeout_seconds: float = 10.0
    """Time for each of them; then the command is killed."""

    def __post_init__(self) -> None:
        require(not self.command or bool(self.command[0].strip()), "notify.command", "no program", "a program first")
        require(0 < self.timeout_seconds <= 300, "notify.timeout_seconds", self.timeout_seconds, "up to 300")
        if self.webhook is not None and not _is_address(self.webhook):
            raise ConfigError(
                "notify.webhook: expected an address such as https://host/path, without a user. (Its text is not shown.)"
            )


def describe_end(run: "Run", store: "Store", state: str, message: str = "") -> dict[str, Any]:
    """Document about the end of a run.

    Args:
        state: done, failed or stopped.
        message: reason, unless it is done.

    Returns:
        `event` is `promoted` or `refused` if the run published a model and that was decided, otherwise the state.
    """
    from tasks.run_records import stage_events
    from tasks.stage import find_artifact

    record = store.read_json("runs", run.id, "run.json")
    document: dict[str, Any] = {"event": state, "state": state, "message": message or None, "run": run.id}
    document |= {"pipeline": run.pipeline, "system": record["system"], "storage": store.root}
    document |= {"started": record["started"], "ended": time.time(), "mlflow_run": run.tracker.run_id or None}
    document["published"] = None
    events = stage_events(store, run.id)
    document["stages"] = {name: event["state"] for name, event in events.items()}
    event = events.get("publish", {})
    artifact = find_artifact(store, "publish", event["fingerprint"]) if event.get("state") == "done" else None
    if artifact is not None:
        document["published"] = {**artifact.facts, "stack": artifact.uri}
        if state == "done" and artifact.facts.get("alias") in _DECISIONS:
            document["event"] = _DECISIONS[artifact.facts["alias"]]
    return document


def notify(config: NotifyConfig, document: Mapping[str, Any]) -> list[str]:
    """Run the command and post to the webhook, if they are set.

    Args:
        document: JSON values; credentials in its texts are removed.

    Returns:
        Warnings, which are printed too.
    """
    data = json.dumps(redacted(dict(document))).encode()
    problems = []
    if config.command and (problem := _run(config.command, data, config.timeout_seconds)):
        problems.append(f"notify.command: {problem}")
    if config.webhook is not None and (problem := _post(config.webhook, data, config.timeout_seconds)):
        problems.append(f"notify.webhook: {problem}")
    for problem in problems:
        click.secho(f"warning: {problem}", fg="yellow", err=True)
    return problems


def _run(command: tuple[str, ...], data: bytes, seconds: float) -> str | None:
    """Run a program with the document on its standard input; returns what went wrong."""
    program = command[0]
    try:
        result = subprocess.run(
            command, input=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{program} took longer than {seconds:g} s and was killed."
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a NUL in its arguments"
        return f"{program} does not start: {reason}."
    return f"{program} ended with exit code {result.returncode}." if result.returncode else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could take the document to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(address: str, data: bytes, seconds: float) -> str | None:
    """Post the document; returns what went wrong, without the address."""
    host = urllib.parse.urlsplit(address).hostname
    headers = {"Content-Type": "application/json", "User-Agent": "unclip"}
    opener = urllib.request.build_opener(_NoRedirect)

    def post() -> int:
        request = urllib.request.Request(address, data, headers, method="POST")
        with opener.open(request, timeout=seconds) as response:
            return int(response.status)

    try:
        within(seconds, post)
    except urllib.error.HTTPError as error:
        return f"{host} answered with status {error.code}."
    except TimeoutError:
        return f"{host} did not answer within {seconds:g} s."
    except Exception as error:  # of the network, or of an answer that is no HTTP; its text may have the address
        cause = getattr(error, "reason", error)
        reason = (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__
        return f"{host} was not reached: {reason}."
    return None


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return is_plain and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
