"""Completed outputs for tests, without Prefect: a chain of stages as small as files can be."""

import dataclasses
import json
import math

from flows.record.lineage import SNAPSHOT
from flows.stage import Context, Need, Stage
from flows.stages import download, evaluate, filter, train_base, train_upsampler
from flows.storage.store import Input, Resolved, Store

BASE, UPSAMPLER = train_base.STAGE, train_upsampler.STAGE
RULES = {"name": "rules-64", "num_generated": 24, "num_real": 24, "seed": 0, "batch_size": 16}
FUNNEL = [
    {"step": "listed", "dropped": 0, "rows": 11},
    {"step": "dead link", "dropped": 4, "rows": 7},
]


def key(number: int) -> str:
    """A key that no other number has."""
    return f"{number:064x}"[::-1]


def commit(config, stage: Stage, number: int, files, *, inputs=None, metrics=None, run_id=None):
    """A complete output; returns it with what a later stage needs to know of it."""
    store = Store.of(config)
    place = store.place(stage.name, key(number))
    place.folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    context = Context(place.folder, getattr(config, stage.section), metrics=metrics or {})
    resolved = inputs or Resolved(key(number), {}, {})
    output = store.commit(
        stage,
        key(number),
        context,
        inputs=resolved.contents,
        origins=resolved.origins,
        mlflow_run_id=run_id,
        seconds=75.0,
    )
    return output


def reading(config, number: int, **found) -> Resolved:
    """The inputs of an output: name → (stage, output, file or folder)."""
    store = Store.of(config)
    inputs = {}
    for name, (stage, output, under) in found.items():
        place = store.place(stage.name, output.key)
        inputs[name] = Input(Need(stage, under), place, place.manifest())
    contents = {name: i.manifest.content_of(i.need.under) for name, i in inputs.items()}
    paths = {name: i.place.folder / i.need.under for name, i in inputs.items()}
    return Resolved(key(number), paths, contents, inputs)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An evaluation and what it read."""

    output: object
    resolved: Resolved
    base: object
    upsampler: object


def evaluated(
    config, number, kid, *, weights="", rules=RULES, results=None, runs=None
) -> Evaluated:
    """A chain from download to evaluation; pairs with equal `weights` are equal."""
    weights, runs = weights or f"weights {number}", runs or {}
    fetched = commit(
        config,
        download.STAGE,
        number,
        {
            "fates/0.parquet": f"fates {number}",
            "heldout/captions.json": "{}",
            "report.json": json.dumps({"funnel": FUNNEL}),
            "site/laion.parquet": "list",
        },
        run_id=runs.get("download"),
    )
    kept = commit(
        config,
        filter.STAGE,
        number,
        {"shards/032/0.tar": "pictures", "report.json": json.dumps({"funnel": FUNNEL})},
        inputs=reading(config, number, fates=(download.STAGE, fetched, "fates")),
        metrics={"kept": 7.0},
        run_id=runs.get("filter"),
    )
    trained = {
        stage.name: commit(
            config,
            stage,
            number,
            {SNAPSHOT: f"{stage.name} {weights}", "metrics.jsonl": ""},
            inputs=reading(config, number, shards=(filter.STAGE, kept, "shards/032")),
            metrics={"images_seen": 640.0, "psnr": 20.0, "psnr_bilinear": 21.0},
            run_id=runs.get(stage.name),
        )
        for stage in (BASE, UPSAMPLER)
    }
    resolved = reading(
        config,
        number,
        base=(BASE, trained["train-base"], SNAPSHOT),
        upsampler=(UPSAMPLER, trained["train-upsampler"], SNAPSHOT),
        heldout=(download.STAGE, fetched, "heldout"),
    )
    results = results or {"protocol": rules, "metrics": {} if kid is None else {"kid": kid}}
    output = commit(
        config,
        evaluate.STAGE,
        number,
        {"results.json": json.dumps(results)},
        inputs=resolved,
        metrics={k: v for k, v in results["metrics"].items() if math.isfinite(v)},
        run_id=runs.get("evaluate"),
    )
    return Evaluated(output, resolved, trained["train-base"], trained["train-upsampler"])
