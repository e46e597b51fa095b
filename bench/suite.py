"""`python -m bench [NAME …]`: run some benchmarks, or all, and print their ratios.

`python -m bench gpu --help` is about GPUs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

from bench import (
    data,
    model,
    orchestration,
    predict,
    sampling,
    training,
)

BENCHMARKS = {
    "data": data.main,
    "model": model.main,
    "orchestration": orchestration.main,
    "predict": predict.main,
    "sampling": sampling.main,
    "training": training.main,
}
TASKS: dict[str, Mapping[str, Collection[str]]] = {
    "model": model.TASKS,
    "sampling": sampling.TASKS,
    "training": training.TASKS,
}
CANDIDATES = {
    "model": model.CANDIDATES,
    "sampling": sampling.CANDIDATES,
    "training": training.CANDIDATES,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    both = "of model, sampling and training"
    parser.add_argument("--rounds", type=int, default=3, help=f"{both}: processes a candidate")
    known_tasks = "; ".join(f"{name}: {','.join(tasks)}" for name, tasks in TASKS.items())
    parser.add_argument("--what", help=f"{known_tasks}; or single tasks like train-32")
    parser.add_argument("--candidates", help=f"{both}: {','.join(_all(CANDIDATES))}")
    parser.add_argument("--shards", type=Path, help="of training: pictures of its profile")
    parser.add_argument("--steps", type=int, default=16, help="of training: of its profile")
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    what = arguments.what.split(",") if arguments.what else None
    candidates = arguments.candidates.split(",") if arguments.candidates else None
    tasks = {name: {*of, *itertools.chain.from_iterable(of.values())} for name, of in TASKS.items()}
    for given, known in (
        (names, set(BENCHMARKS)),
        (what or [], _all({name: tasks[name] for name in names if name in tasks})),
        (candidates or [], _all(CANDIDATES)),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"{unknown[0]!r} is unknown: {', '.join(sorted(known))}")
    for name in names:
        print(f"== {name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}", flush=True)
        if name not in TASKS:
            BENCHMARKS[name]()
            continue
        chosen = [task for task in what or TASKS[name] if task in tasks[name]]
        among = [n for n in candidates or CANDIDATES[name] if n in CANDIDATES[name]]
        if name in ("model", "sampling"):
            {"model": model, "sampling": sampling}[name].main(arguments.rounds, chosen, among)
        else:
            training.main(arguments.rounds, chosen, among, arguments.shards, arguments.steps)


def _all(of: Mapping[str, Collection[str]]) -> list[str]:
    """What the benchmarks know together, each once."""
    return list(dict.fromkeys(itertools.chain.from_iterable(of.values())))
