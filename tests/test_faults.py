"""The fault matrix: its rows are the faults that tests name, and none is lost."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = {*range(1, 105), *range(110, 116), 130, 131, *range(132, 140), 145, *range(150, 170), 190}
"""Numbers of all faults. A row that is deleted together with its tests is missed here; add the numbers of new ones."""


def named_faults() -> dict[int, set[str]]:
    """Number of each fault that tests name in their names, parameters or docstrings -> files of these tests."""
    named: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path != Path(__file__) and isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                parameters = " ".join(map(ast.unparse, node.decorator_list))
                words = f"{node.name} {parameters} {ast.get_docstring(node)}"
                for low, high in re.findall(r"(?<![A-Za-z0-9])[fF](\d{1,3})(?:\b|_)(?: to F(\d+))?", words):
                    for number in range(int(low), int(high or low) + 1):
                        named.setdefault(number, set()).add(str(path.relative_to(ROOT)))
    return named


def test_the_table_of_faults_is_that_of_the_tests() -> None:
    """Every number has one row, which links the files of the tests that name it."""
    table = re.findall(r"^\| F(\d+) \|.*\| (.*) \|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    documented = {int(number): set(re.findall(r"\]\(\.\./([^)]*)\)", tests)) for number, tests in table}
    assert len(documented) == len(table)
    assert documented == named_faults()
    assert documented.keys() == NUMBERS
