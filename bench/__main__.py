"""`python -m bench [NAME …]`: run some benchmarks, or all, and print their ratios."""

from __future__ import annotations

import argparse

from bench import adaptive, initial, precision

BENCHMARKS = {
    "adaptive": adaptive.main,
    "initial": initial.main,
    "precision": precision.main,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = sorted(set(names) - BENCHMARKS.keys())
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}: {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"== {name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}", flush=True)
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
