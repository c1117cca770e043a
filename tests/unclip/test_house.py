"""Who may import whom: pipelines -> tasks -> unclip, and unclip needs torch, numpy and pyarrow alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HIGHER = {"unclip": {"tasks", "pipelines"}, "tasks": {"pipelines"}}


@pytest.mark.parametrize("layer", HIGHER)
def test_layers_import_downwards_only(layer: str) -> None:
    for path in (ROOT / layer).glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            upwards = {name.partition(".")[0] for name in names} & HIGHER[layer]
            assert not upwards, f"{path.name} imports {upwards}"


def test_unclip_needs_torch_numpy_and_pyarrow_alone() -> None:
    blocked = ["ray", "mlflow", "open_clip", "deltalake", "img2dataset", "PIL", "matplotlib", "safetensors", "tasks"]
    blocked += ["diffusers", "transformers"]
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "unclip").rglob("*.py")]
    modules = [".".join(path.parts) for path in paths if path.stem != "__init__"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
