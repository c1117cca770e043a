"""Every fault of the fault matrix is named by a test."""

import ast
import re
from pathlib import Path

FAULTS = range(1, 41)


def named_faults() -> dict[int, set[tuple[Path, str]]]:
    """Number of each fault that tests name in their names, parameters or docstrings -> files and names of these tests."""
    named: dict[int, set[tuple[Path, str]]] = {}
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path != Path(__file__) and isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                parameters = " ".join(map(ast.unparse, node.decorator_list))
                words = f"{node.name} {parameters} {ast.get_docstring(node)}"
                for low, high in re.findall(r"(?<![A-Za-z0-9])[fF](\d{1,3})(?:\b|_)(?: to F(\d+))?", words):
                    for number in range(int(low), int(high or low) + 1):
                        named.setdefault(number, set()).add((path, node.name))
    return named


def test_every_fault_is_named_by_a_test() -> None:
    named = named_faults()
    assert [f"F{number}" for number in FAULTS if number not in named] == []
