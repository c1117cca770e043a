"""Files of users that hide a package of this project, such as a `tasks.py` in the working folder of a job."""

import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("pipelines", "tasks", "unclip")
ROOT = Path(__file__).resolve().parents[1]


def refuse_shadows(folder: str | None = None) -> None:
    """Check that Python finds this project's packages and no other modules of their names.

    Args:
        folder: a folder that Python will search first; None checks the folders that it searches now.

    Raises:
        ImportError: names the file and the package that it hides.
    """
    for name in PACKAGES:
        found = PathFinder.find_spec(name, [folder]) if folder else importlib.util.find_spec(name)
        if found is not None and found.origin and Path(found.origin).resolve().parent != ROOT / name:
            raise ImportError(
                f"{found.origin} hides the package {name!r} of unclip, in {ROOT / name}. Rename it, or start from another "
                f"folder; docs/cluster.md says how to leave it out of a job."
            )
