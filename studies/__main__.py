"""`python -m studies NAME …`: one study, with what it takes; without a name, the list."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FILES = {
    path.stem: path
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if not path.stem.startswith("_")
}


def main() -> int:
    """Run the study that was named; only what it needs is imported."""
    if sys.argv[1:2] and sys.argv[1] in FILES:
        name = sys.argv.pop(1)
        sys.argv[0] = f"python -m studies {name}"
        runpy.run_module(f"studies.{name}", run_name="__main__")
        return 0
    print(__doc__, end="\n\n")
    for name, path in FILES.items():
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"  {name:10} {about.splitlines()[0]}")
    return 0 if sys.argv[1:2] in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main())
