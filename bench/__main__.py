"""`python -m bench [NAME …]`: run some benchmarks, or all, and print their ratios."""

from __future__ import annotations

import argparse
import itertools

from bench import adaptive, initial, model, precision

BENCHMARKS = {
    "adaptive": adaptive.main,
    "initial": initial.main,
    "model": model.main,
    "precision": precision.main,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=3, help="of model: processes a candidate")
    parser.add_argument(
        "--what",
        default=",".join(model.TASKS),
        help="of model: %(default)s, or single tasks like train-32",
    )
    parser.add_argument(
        "--candidates", default=",".join(model.CANDIDATES), help="of model: %(default)s"
    )
    arguments = parser.parse_args()
    names, what = arguments.names or list(BENCHMARKS), arguments.what.split(",")
    candidates = arguments.candidates.split(",")
    tasks = {*model.TASKS, *itertools.chain.from_iterable(model.TASKS.values())}
    for given, known in (
        (names, set(BENCHMARKS)),
        (what, tasks),
        (candidates, set(model.CANDIDATES)),
    ):
        unknown = sorted(set(given) - known)
        if unknown:
            parser.error(f"{unknown[0]!r} is unknown: {', '.join(sorted(known))}")
    for name in names:
        print(f"== {name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}", flush=True)
        if name == "model":
            model.main(arguments.rounds, what, candidates)
        else:
            BENCHMARKS[name]()


if __name__ == "__main__":
    main()
