"""Everything that docs/paper.md shows, made again from the raw results in docs/paper: no training.

Tables go between the marks `<!-- NAME -->` and `<!-- /NAME -->` of the page, curves into
docs/images. With `--check` nothing is written; the status is 1 if the page has other tables.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

STUDIES = ("ladder", "trilemma", "scaling", "memorisation")
PAGE, RESULTS, IMAGES = Path("docs/paper.md"), Path("docs/paper"), Path("docs/images")


def blocks(results: Path, images: Path) -> dict[str, str]:
    """Name → Markdown of every study's tables; their curves are drawn into `images`."""
    found: dict[str, str] = {}
    for name in STUDIES:
        study = importlib.import_module(f"studies.{name}")
        found |= study.report(results / name, images)
    return found


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with these tables between their marks.

    Raises:
        ValueError: a table has no place on the page, or a place no table.
    """
    places = re.findall(r"^<!-- ([\w-]+) -->$", page, flags=re.MULTILINE)
    if sorted(places) != sorted(tables):
        odd = sorted(set(places) ^ set(tables)) or places
        raise ValueError(f"marks of the page and tables of the studies differ: {', '.join(odd)}")
    for name, table in tables.items():
        head, found, rest = page.partition(f"<!-- {name} -->\n")
        page = f"{head}{found}\n{table}\n\n{rest[rest.index(f'<!-- /{name} -->') :]}"
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit status."""
    p = argparse.ArgumentParser(
        prog="python -m studies.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = p.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        new = filled(old, blocks(RESULTS, Path(scratch) if args.check else IMAGES))
    if args.check and new != old:
        print(f"{PAGE} is not what {RESULTS} says: run `python -m studies.paper`", file=sys.stderr)
        return 1
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
