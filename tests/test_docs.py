"""The documents: their links resolve, and their commands and run files are those of the code."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipelines.cli import main
from pipelines.config import load
from pipelines.preset import pipeline_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DEPLOYMENT = ROOT / "infra" / "README.md"


def ids(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else ""


def blocks(text: str) -> list[str]:
    """Code that is indented by four spaces or fenced, without a language or as sh."""
    fenced = re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"(?:^(?: {4}.*)?\n)+", bare, re.MULTILINE)]


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every command line in a block of code."""
    for line in "\n".join(blocks(text)).splitlines():
        found = re.match(r"\s*(?:.* -- )?unclip (.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


def mentioned_commands(text: str) -> Iterator[list[str]]:
    """Arguments of every command that a sentence mentions, perhaps without some that it needs."""
    for words in re.findall(r"`unclip ([a-z][^`]*)`", text):
        yield shlex.split(words)


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command, and what is left for it.

    Raises:
        UsageError: there is no such command.
    """
    command: click.Command = main
    while isinstance(command, click.Group) and arguments:
        _, found, arguments = command.resolve_command(click.Context(command), arguments)
        assert found is not None
        command = found
    return command, arguments


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def check_preset(context: click.Context) -> None:
    """Check the name of the pipeline, if the command has one: a preset, the placeholder, or a run file for `unclip estimate`."""
    name = context.params.get("pipeline")
    known = [*pipeline_names(), "PIPELINE", "[PIPELINE]", None]
    assert name in known or (context.command.name == "estimate" and str(name).endswith(".toml")), f"no preset: {name}"


@pytest.mark.parametrize("path", [*DOCUMENTS, DEPLOYMENT], ids=ids)
def test_command_lines_are_accepted(path: Path) -> None:
    """Parsed as the command line does; nothing is run."""
    text = path.read_text()
    for arguments in command_lines(text):
        command, rest = resolve(arguments)
        assert not isinstance(command, click.Group), arguments
        check_preset(command.make_context(command.name, list(rest)))
    for arguments in mentioned_commands(text):
        command, rest = resolve(arguments)
        unknown = {word.partition("=")[0] for word in rest if word.startswith("-")} - options(command)
        assert not unknown, f"unclip {' '.join(arguments)}"
        if not isinstance(command, click.Group):
            check_preset(command.make_context(command.name, list(rest), resilient_parsing=True))


def test_a_wrong_command_line_is_found() -> None:
    assert list(command_lines("Text\n\n    ray job submit -- unclip run demo  # all\n")) == [["run", "demo"]]
    for wrong in (["sampel", "x"], ["sample", "x", "--stepz", "3"], ["plan", "train", "--preset", "base"], ["run"]):
        with pytest.raises(click.UsageError):
            command, rest = resolve(wrong)
            command.make_context("unclip", rest)
    for unknown in (
        ["run", "FILE"],
        ["compare", "dmeo"],
        ["plan", "run.toml"],
        ["refresh", "FILE"],
        ["train", "prior", "dmeo"],
    ):
        command, rest = resolve(unknown)
        with pytest.raises(AssertionError, match="no preset"):
            check_preset(command.make_context(command.name, rest))


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_run_files_are_accepted(path: Path, tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"^```toml\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)):
        if "project" not in tomllib.loads(text):  # of a package
            file = tmp_path / f"{number}.toml"
            file.write_text(text)
            load("text_to_image", str(file), ["ingest.urls=pairs.parquet"])


def headings(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*DOCUMENTS, DEPLOYMENT, ROOT / "CHANGELOG.md"], ids=ids)
def test_links_resolve(path: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target, _, anchor = link.partition("#")
        if "://" not in link:
            file = path.parent / target if target else path
            assert file.exists(), link
            assert not anchor or anchor in headings(file), link
    for name in re.findall(r"python -m benchmarks\.(\w+)", path.read_text()):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
