"""What Prefect, MLflow and manifests add to the stages run bare, and to a stage that is skipped.

The stages' bodies are replaced by ones that only write files, so that what remains is the
overhead: the time of the flow less that of calling the bodies, in seconds whatever a stage
takes, and as a share of a pipeline of one hour. Then the same flow with all stages up to date,
in this process and submitted to a Prefect worker, which adds the start of a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HOUR_S = 3600.0
ROUNDS = 5
SHARDS = 500
SHARD_BYTES = 100_000
FILES = {
    "download": ("images/{:05d}.tar", "fates/{:05d}.parquet", "heldout/captions.json"),
    "score": ("scores/{:05d}.parquet",),
    "filter": ("shards/032/train-{:05d}.tar", "shards/128/train-{:05d}.tar", "aligner.safetensors"),
    "train-base": ("snapshot.safetensors",),
    "train-upsampler": ("snapshot.safetensors",),
    "evaluate": ("results.json",),
}
"""What each body writes: `SHARDS` files where the name has a number."""


def main() -> None:
    """Prefect, MLflow and manifests around six stages, against the six stages bare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _isolate(folder)
        from flows.serve import services, settings

        settings.apply()
        settings.quiet()
        with services.prefect_api(services.free_port()):
            _measure(folder)


def _measure(folder: Path) -> None:
    from flows.config import PipelineConfig
    from flows.stages.full_pipeline import full_pipeline

    def flow(number: int) -> None:
        full_pipeline(config=PipelineConfig(store=str(folder / f"store-{number}")))

    with _bodies() as bodies:
        flow(-1)  # warms up: the schema of MLflow's database
        bare = _median(lambda number: _bare(bodies, folder / f"bare-{number}"))
        full = _median(flow)
        again = _median(flow)
    _report(bare, full, again, _through_a_worker(folder / "store-0"))


def _report(bare: float, full: float, again: float, worker: float) -> None:
    stages = len(FILES)
    added = full - bare
    print(f"six stages that write {_count()} files: bare {bare:.1f} s, in the flow {full:.1f} s")
    print(f"  added: {added:.1f} s, {added / HOUR_S:.2%} of a run of one hour")
    print(f"  all six up to date: {again:.1f} s, {again / stages:.2f} s a skipped stage")
    print(f"  the same through a worker, from submission to its end: {worker:.1f} s")


def _isolate(folder: Path) -> None:
    """Databases of our own, whatever the environment names."""
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    os.environ["PREFECT_HOME"] = str(folder / "prefect")


@contextlib.contextmanager
def _bodies() -> Iterator[list[tuple[str, Callable[[Any], None]]]]:
    """Replace what the stages do during the block."""
    from flows.stages import download, evaluate, filter, score, train_base, train_upsampler

    stages = [m.STAGE for m in (download, score, filter, train_base, train_upsampler, evaluate)]
    before = [stage.run for stage in stages]
    try:
        for stage in stages:
            vars(stage)["run"] = _body(stage.name)  # frozen; the flow holds this very object
        yield [(stage.name, stage.run) for stage in stages]
    finally:
        for stage, run in zip(stages, before, strict=True):
            vars(stage)["run"] = run


def _body(stage: str) -> Callable[[Any], None]:
    def run(context: Any) -> None:
        for name in _names(stage):
            path = context.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"metrics": {"fid": 1.0}, "stage": stage})
            path.write_text(text.ljust(SHARD_BYTES) if "0" in name else text)
        context.metrics["loss"] = 1.0

    return run


def _names(stage: str) -> Sequence[str]:
    patterns = FILES[stage]
    return [
        name
        for pattern in patterns
        for name in dict.fromkeys(pattern.format(number) for number in range(SHARDS))
    ]


def _count() -> int:
    return sum(len(_names(stage)) for stage in FILES)


def _bare(bodies: Sequence[tuple[str, Callable[[Any], None]]], folder: Path) -> None:
    from flows.stage import Context

    for stage, run in bodies:
        run(Context(path=folder / stage, config=None))


def _through_a_worker(store: Path) -> float:
    """Seconds from submitting a run whose stages are up to date to its end."""
    from flows.serve import services
    from flows.serve.bootstrap import bootstrap

    bootstrap()
    # The store was filled with the defaults, not with a preset.
    parameters = json.dumps({"config": {"store": str(store)}})
    command = ["prefect", "deployment", "run", "full-pipeline/full-pipeline", "--watch"]
    with services.running("worker", services.WORKER):
        time.sleep(5)  # it polls every 2 s and has to come up first
        return _seconds(
            lambda: subprocess.run(
                [sys.executable, "-m", *command, "--params", parameters],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        )


def _median(run: Callable[[int], object]) -> float:
    return statistics.median(_seconds(lambda n=n: run(n)) for n in range(ROUNDS))  # type: ignore[misc]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
