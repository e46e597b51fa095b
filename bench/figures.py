"""How large the rooms are: `python -m bench.figures` prints the table in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "flows", "gigagan", "bench", "studies", "tests")
PRODUCT = ("data", "flows", "gigagan")
LONG_FILE, LONG_FUNCTION, MANY_PARAMETERS = 400, 60, 7
COLUMNS = (
    *("room", "files", "lines", "of it code", "functions", "median", "mean", "p90", "longest"),
    *("typed", "documented", f"files > {LONG_FILE}", f"functions > {LONG_FUNCTION}"),
    f"> {MANY_PARAMETERS} parameters",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines of a function without its decorators and its docstring."""
    documented = ast.get_docstring(function, clean=False)
    docstring = function.body[0]
    silent = docstring.end_lineno - docstring.lineno + 1 if documented is not None else 0
    return function.end_lineno - function.lineno + 1 - silent


def parameters(function: Function) -> int:
    """How many a caller may give; `self` and `cls` are not counted."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([one for one in every if one.arg not in ("self", "cls")])


def is_typed(function: Function) -> bool:
    """Whether its result and all its parameters have types."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    given = [one for one in every if one.arg not in ("self", "cls")]
    return function.returns is not None and all(one.annotation for one in given)


def code_lines(text: str, tree: ast.AST) -> int:
    """Lines that are neither blank nor of a docstring."""
    silent = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                silent |= {*range(node.lineno, node.end_lineno + 1)}
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and number not in silent
    )


def row(name: str, *rooms: str) -> list[str]:
    """The figures of some rooms together."""
    texts = [path.read_text() for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    trees = [ast.parse(text) for text in texts]
    found = [function for tree in trees for function in functions(tree)]
    public = [function for function in found if not function.name.startswith("_")]
    lengths = sorted(map(length, found))
    typed = sum(map(is_typed, public)) / len(public)
    documented = sum(ast.get_docstring(one) is not None for one in public) / len(public)
    figures = (
        *(name, len(texts), sum(len(text.splitlines()) for text in texts)),
        *(sum(map(code_lines, texts, trees)), len(found), f"{statistics.median(lengths):g}"),
        *(f"{statistics.mean(lengths):.1f}", lengths[int(0.9 * len(lengths))], lengths[-1]),
        *(f"{typed:.0%}", f"{documented:.0%}"),
        sum(len(text.splitlines()) > LONG_FILE for text in texts),
        sum(one > LONG_FUNCTION for one in lengths),
        sum(parameters(one) > MANY_PARAMETERS for one in found),
    )
    return [f"{figure:,}" if isinstance(figure, int) else str(figure) for figure in figures]


def table() -> str:
    """All rooms, as Markdown."""
    rows = [row(room, room) for room in ROOMS if (ROOT / room).is_dir()]
    rows.append(row("**product**", *PRODUCT))
    lines = [COLUMNS, ["---"] + ["--:"] * (len(COLUMNS) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
