"""Command that checks the files of a storage."""

import collections
import sys
from typing import TYPE_CHECKING

import click

from pipelines.options import FOLLOW_LINKS, JSON, STORAGE, print_json, say_links
from unclip.background import usable_cpus

if TYPE_CHECKING:
    from tasks.verification import Problem


@click.command()
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=min(8, usable_cpus()),
    show_default=True,
    metavar="N",
    help="Files to read at once.",
)
@click.option("--drop", is_flag=True, help="Drop what is damaged, so that the next run makes it again.")
@FOLLOW_LINKS
@STORAGE
@JSON
def verify(jobs: int, drop: bool, follow_links: bool, storage: str | None, as_json: bool) -> None:
    """Find missing files and flipped bits in a storage.

    Reads every file that records refer to, and says what each wrong file is and which commands make it again. Files of
    earlier versions that carry no digest are counted as not covered.

    Exit codes: 0 everything is as it was written; 1 something is not, even if --drop has dropped it; 2 invalid input; 75 a run
    is changing the tables (--drop only).
    """
    from pipelines.storage import open_storage
    from tasks.lock import lock
    from tasks.verification import Problem, check_all, survey
    from tasks.verification import drop as drop_problems

    store = open_storage(storage)
    items = survey(store)
    with click.progressbar(length=sum(item.size for item in items), label="verifying", file=sys.stderr) as bar:
        states = check_all(items, jobs, lambda item: bar.update(item.size))
    problems: list[Problem] = []
    remaining: set[Problem] = set()
    not_covered: collections.Counter[str] = collections.Counter()
    for item, state in zip(items, states, strict=True):
        if state == "not covered":
            not_covered[item.what] += 1
        elif state != "sound":
            problems.append(Problem(item, state))
    if drop and problems:
        with lock(store) as held:
            # Tables stay as they are now. A file of a stage that reads a snapshot may have come back meanwhile.
            again = check_all([problem.item for problem in problems], jobs)
            problems = [problem for problem, state in zip(problems, again, strict=True) if state == problem.state]
            remaining = set(drop_problems(store, problems, held, follow_links))
        if not follow_links:
            say_links(store.links())
    dropped = set(problems) - remaining if drop else set()
    if as_json:
        counts = {"files": len(items), "bytes": sum(item.size for item in items)}
        print_json(
            {
                "storage": store.root,
                **counts,
                "problems": [{**_facts(problem), "is_dropped": problem in dropped} for problem in problems],
                "not_covered": dict(sorted(not_covered.items())),
            }
        )
    else:
        for problem in problems:
            facts = _facts(problem)
            click.secho(f"{facts['problem']:<10} {facts['file']}", fg="red")
            click.echo(
                f"           {facts['what']}{' (dropped)' if problem in dropped else ''}; remedy: {facts['remedy']}"
            )
        for what, count in sorted(not_covered.items()):
            click.echo(f"not covered: {count:,} x {what}")
        size = sum(item.size for item in items) / 1e9
        click.echo(f"{len(items):,} files, {size:,.2f} GB: {len(problems):,} damaged, missing or unreadable")
    if problems:
        sys.exit(1)


def _facts(problem: "Problem") -> dict[str, str]:
    item = problem.item
    return {"file": item.uri, "what": item.what, "problem": problem.state, "remedy": item.remedy}


COMMANDS = (verify,)
