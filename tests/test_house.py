"""Architecture rules: allowed imports between modules, and words that only systems may use."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipelines", "tasks", "unclip")
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}
"""Module name -> file."""


def names_imported(path: Path) -> set[str]:
    """Return all names that a file imports anywhere, including in functions and for types: packages, modules and members."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {module: names_imported(path) for module, path in PATHS.items()}


def is_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("unclip", ("tasks", "pipelines", "ray", "mlflow")),
        ("tasks", ("pipelines",)),
        ("unclip.diffusion", ("unclip.models", "unclip.training", "unclip.systems")),
        ("unclip.models", ("unclip.training", "unclip.systems")),
        ("unclip.training", ("unclip.systems",)),
        ("tasks.untrusted", ("tasks.stages", "ray", "mlflow")),
        ("tasks.lineage", ("tasks.stages",)),
        ("pipelines.run", ("pipelines.systems", "unclip.systems")),
    ],
)
def test_imports_go_downwards_only(importer: str, forbidden: tuple[str, ...]) -> None:
    importers = [module for module in PATHS if is_in(module, importer)]
    assert importers
    found = [
        f"{module} imports {name}"
        for module in importers
        for name in IMPORTS[module]
        if any(is_in(name, folder) for folder in forbidden)
    ]
    assert not found


@pytest.mark.parametrize("folder", ["tasks.stages", "pipelines.commands"])
def test_stages_and_commands_do_not_import_each_other(folder: str) -> None:
    members = [module for module in PATHS if module.startswith(f"{folder}.")]
    assert len(members) > 5
    found = [
        f"{module} imports {other}"
        for module in members
        for other in members
        if other != module and other in IMPORTS[module]
    ]
    assert not found


def folder_of(module: str) -> str:
    """Return the folder of a module, one level below the package; a module directly in a package stands for itself."""
    parts = module.split(".")
    return "/".join(parts[:2]) if len(parts) > 2 else module


@pytest.mark.parametrize("level", ["modules", "folders"])
def test_there_are_no_circular_imports(level: str) -> None:
    graph: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        for name in names & PATHS.keys():
            source, target = (module, name) if level == "modules" else (folder_of(module), folder_of(name))
            if source != target:
                graph.setdefault(source, set()).add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_unclip_needs_only_torch_numpy_and_pyarrow() -> None:
    blocked = ["ray", "mlflow", "open_clip", "deltalake", "img2dataset", "PIL", "matplotlib", "safetensors", "tasks"]
    blocked += ["diffusers", "transformers"]
    modules = [module for module in PATHS if is_in(module, "unclip")]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_commands_import_nothing_that_only_trainings_need() -> None:
    modules = ["pipelines.cli", "pipelines.run", *(module for module in PATHS if is_in(module, "pipelines.systems"))]
    slow = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.utils.flop_counter", "mlflow", "pandas"]
    code = f"import sys, {', '.join(modules)}\nprint(*[name for name in {slow} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


PARTS = re.compile(r"(?i)prior(?!it)|(?<!json)(?<!incremental)decoder|upsampler")  # Python has two of these names
KNOW_PARTS = (
    *("pipelines.systems", "pipelines.upsampled", "pipelines.image_stacks", "pipelines.latents"),
    *("unclip.systems", "unclip.models", "unclip.interop"),
)
EXCEPTIONS = {
    "pipelines.commands.exchange": {"upsampler"},  # the third, which diffusers pipelines cannot hold, has an option
    "unclip.diffusion.process": {"prior"},  # the term of x_T in the variational bound
}
"""Words allowed in a module anyway, and why."""


def test_only_systems_know_the_names_of_parts() -> None:
    found: dict[str, set[str]] = {}
    for module, path in PATHS.items():
        words = {match.lower() for match in PARTS.findall(path.read_text())}
        if words and not any(is_in(module, folder) for folder in KNOW_PARTS):
            found[module] = words
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    ("arguments", "typed", "is_imported"),
    [
        (["--help"], None, False),
        (["sample", "--help"], None, False),
        (["plan", "train", "--help"], None, False),
        ([], "unclip ", False),
        ([], "unclip run ", False),
        ([], "unclip train ", False),
        (["plan", "tiny", "--set", "system=stranger"], None, True),  # proves that the package can be imported
    ],
)
def test_other_packages_are_imported_only_when_named(
    tmp_path: Path, arguments: list[str], typed: str | None, is_imported: bool
) -> None:
    info = tmp_path / "stranger-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 0.1\n")
    groups = ("unclip.systems", "unclip.pipelines")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\nstranger = stranger:IT\n" for group in groups))
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise SystemExit(3)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    if typed is not None:
        words = str(len(typed.split()))
        environment |= {"_UNCLIP_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": words}
    script = "import runpy; runpy.run_module('pipelines', run_name='__main__')"
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == (3 if is_imported else 0) and (result.stdout or is_imported), result.stderr
    assert (tmp_path / "imported").exists() == is_imported
