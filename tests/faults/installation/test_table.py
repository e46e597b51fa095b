"""docs/operations.md: every row of its table is backed by a test, and every test has its row."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "operations.md"


def _tests_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    functions = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {name for name in functions if name.startswith("test_")}


def test_every_row_names_a_test_and_every_test_has_a_row():
    table = PAGE.read_text().partition("## What broke")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert all(named), [row for row, names in zip(rows, named, strict=True) if not names]
    others = [path for path in HERE.glob("test_*.py") if path != Path(__file__)]
    mine = {name for path in others for name in _tests_of(path)}
    assert mine == {name for names in named for name in names}
