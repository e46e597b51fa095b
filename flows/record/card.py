"""The model card of an evaluated pair: what the files of the store say, and nothing else.

Every line comes from a manifest, a report, a result file or a snapshot's header; what none of them
holds reads "not recorded". Nothing is judged here but by comparing two recorded numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flows.record import lineage, scrub
from flows.stage import Manifest
from flows.storage.place import Place
from flows.storage.store import Store
from gigagan.common.exits import HARDWARE, read_fact
from gigagan.common.progress import clock

UNKNOWN = "not recorded"
SOURCES = {
    "embedded": "Twemoji (CC-BY 4.0) and OpenMoji (CC-BY-SA 4.0)",
    "metadata": "of the web, each with terms of its own, which lists do not record",
}
"""Licences of the pictures, by `download.source`."""
SMALLER_IS_BETTER = {"fid", "kid", "pixel_probe_median_rank", "shape_rank", "seconds_per_image"}
HIGHLIGHTS = (
    *("total_images", "batch_size", "seed", "precision", "optimizer.lr", "optimizer.r1_weight"),
    *("optimizer.ema_half_life_images", "loss.matching", "loss.contrastive", "loss.vision"),
)
"""Settings of both trainings that are shown; all are in their config.json."""
LOG = "output.log"
"""What a stage's process printed, with the fact of the hardware."""


@dataclass(frozen=True)
class Output:
    """A completed output of the store, to be read from."""

    place: Place
    manifest: Manifest

    def file(self, name: str) -> Path | None:
        """One of its files, on this machine."""
        entries = [entry for entry in self.manifest.files if entry.path == name]
        self.place.pull(self.manifest, entries)
        path = self.place.folder / name
        return path if path.is_file() else None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of it; empty where there is none."""
        file = self.file(name)
        return json.loads(file.read_text()) if file else {}


def find(store: Store, name: str | None) -> Output | None:
    """The output called STAGE/KEY."""
    stage, _, key = (name or "").partition("/")
    place = store.place(stage, key) if key else None
    manifest = place.manifest() if place else None
    return Output(place, manifest) if place and manifest else None


def render(name: str, store: Store, judged: Output, networks: Mapping[str, Output]) -> str:
    """The card of a base generator and its upsampler, in Markdown."""
    kept = find(store, networks["base"].manifest.origins.get("shards"))
    fetched = find(store, kept.manifest.origins.get("fates") if kept else None)
    results = judged.json("results.json")
    sections = [
        _title(name, results, networks),
        _use(name, networks, results),
        _results(results, judged),
        _limits(results, networks, kept),
        _data(fetched, kept),
        _training(networks),
        _config(networks),
        _licences(fetched, networks, results),
        _files(networks),
    ]
    return scrub.text("\n\n".join(sections)) + "\n"


_MAKES = {
    "text": ("pictures from text", '["a caption"]'),
    "class": ("pictures of classes", '["0"]'),
    "nothing": ("pictures, told nothing", "1"),
}
"""What is drawn, and how it is asked for, by what the base is told."""


def _condition(results: Mapping[str, Any]) -> str:
    return str(results.get("protocol", {}).get("condition", "text"))


def _title(name: str, results: Mapping[str, Any], networks: Mapping[str, Output]) -> str:
    size = "×".join(map(str, results.get("protocol", {}).get("generated_size", []))) or UNKNOWN
    what = _MAKES[_condition(results)][0]
    rows = [("Makes", f"{what}, {size} pixels when evaluated")]
    for role, network in networks.items():
        count = _count(network.file(lineage.SNAPSHOT))
        rows.append((role.capitalize(), f"{count / 1e6:.2f} M parameters" if count else UNKNOWN))
    return f"# {name}: a base generator and its upsampler\n\n{_table(('what', 'value'), rows)}"


def _data(fetched: Output | None, kept: Output | None) -> str:
    parts = ["## Data"]
    if fetched is not None:
        config = fetched.manifest.config
        lists = [str(place) for place in config.get("metadata") or []]
        made = ", ".join(lists) or f"made by the source `{config.get('source', UNKNOWN)}`"
        parts.append(f"Lists of URLs: {made}.")
    for title, output in (("Download", fetched), ("Filter", kept)):
        funnel = output.json("report.json").get("funnel", []) if output else []
        rows = [
            (step["step"], step.get("dropped", ""), step["rows"])
            for number, step in enumerate(funnel)
            if step.get("dropped") or number in (0, len(funnel) - 1)
        ]
        table = _table(("step", "dropped", "rows left"), rows) if rows else UNKNOWN
        parts.append(f"{title}:\n\n{table}")
    if kept is not None:
        thresholds = {
            key: value
            for key, value in kept.manifest.config.items()
            if key.startswith(("min_", "max_", "top_", "languages")) and value is not None
        }
        parts.append("Thresholds of the filter: " + _inline(thresholds))
    return "\n\n".join(parts)


def _licences(
    fetched: Output | None, networks: Mapping[str, Output], results: Mapping[str, Any]
) -> str:
    from gigagan.models.pretrained import CATALOGUE  # it imports torch

    names = set(results.get("protocol", {}).get("weights_sha256", {}))
    for output in networks.values():
        names |= {text for text in _strings(output.manifest.config) if _is_model(text)}
    rows = []
    for name in sorted(names):
        known = CATALOGUE.get(name)
        rows.append((f"`{name}`", known.licence if known else UNKNOWN))
    source = fetched.manifest.config.get("source") if fetched else None
    data = SOURCES.get(str(source), UNKNOWN)
    table = _table(("frozen model", "licence"), rows) if rows else UNKNOWN
    return f"## Licences\n\nPictures and captions: {data}.\n\n{table}"


def _config(networks: Mapping[str, Output]) -> str:
    rows = []
    for key in HIGHLIGHTS:
        values = [_setting(network.manifest.config, key) for network in networks.values()]
        rows.append((key, *("" if value is None else value for value in values)))
    return "## Configuration\n\n" + _table(("setting", *networks), rows)


def _setting(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _training(networks: Mapping[str, Output]) -> str:
    rows = []
    for role, network in networks.items():
        metrics, manifest = network.manifest.metrics, network.manifest
        seen, rate = metrics.get("images_seen"), metrics.get("images_per_second")
        rows.append(
            (
                role,
                f"{seen:,.0f}" if seen is not None else UNKNOWN,
                f"{rate:.1f}" if rate is not None else UNKNOWN,
                clock(manifest.seconds),
                _hardware(network.place.folder / LOG),
                manifest.created.date().isoformat(),
            )
        )
    head = ("network", "images seen", "images/s", "last attempt", "hardware", "finished")
    return "## Training\n\n" + _table(head, rows)


def _results(results: Mapping[str, Any], judged: Output) -> str:
    rules = results.get("protocol", {})
    reference = results.get("reference", {})
    metrics = results.get("metrics", {})
    intervals = results.get("intervals", {})
    rows = []
    for name, value in metrics.items():
        interval = "–".join(f"{end:.4g}" for end in intervals.get(name, ()))
        others = [reference.get(kind, {}).get(name) for kind in ("real", "chance")]
        floors = ("" if other is None else f"{other:.4g}" for other in others)
        rows.append((name, f"{value:.4g}", interval, *floors))
    told = {k: v for k, v in rules.items() if not isinstance(v, dict | list | None)}
    return "\n\n".join(
        [
            f"## Results\n\nEvaluation `{judged.manifest.key[:16]}`, by these rules: "
            + (_inline(told) if told else UNKNOWN),
            _table(("metric", "generated", "95 %", "real pictures", "chance"), rows),
            "Intervals are of drawing the pictures anew, not of training again.",
        ]
    )


def _limits(results: Mapping[str, Any], networks: Mapping[str, Output], kept: Output | None) -> str:
    facts = []
    if kept is not None and "kept" in kept.manifest.metrics:
        facts.append(f"Its training shards hold {kept.manifest.metrics['kept']:,.0f} pictures.")
    images = results.get("protocol", {}).get("num_generated")
    if images is not None:
        facts.append(
            f"It was measured on {images:,} captions; numbers compare only under equal rules."
        )
    facts += [f"Not measured: {name} ({why})." for name, why in results.get("absent", {}).items()]
    beaten = list(_no_better_than_chance(results))
    if beaten:
        facts.append(f"No better than chance: {', '.join(beaten)}.")
    if worse := list(_worse_than_plain(networks)):
        facts.append(f"The upsampler is no better than plain enlargement in: {', '.join(worse)}.")
    facts.append(f"Bias, safety and use outside its training captions: {UNKNOWN}.")
    return "## Limits\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _no_better_than_chance(results: Mapping[str, Any]) -> Iterator[str]:
    for name, chance in results.get("reference", {}).get("chance", {}).items():
        value = results["metrics"].get(name)
        if value is None:
            continue
        is_smaller_better = name in SMALLER_IS_BETTER or "_rank_" in name
        is_better = value < chance if is_smaller_better else value > chance
        if not is_better:
            yield f"{name} ({value:.4g}, chance {chance:.4g})"


def _worse_than_plain(networks: Mapping[str, Output]) -> Iterator[str]:
    metrics = networks["upsampler"].manifest.metrics
    for name, sign in (("psnr", 1), ("lpips", -1)):
        ours = metrics.get(name)
        found = {m: metrics.get(f"{name}_{m}") for m in ("bilinear", "bicubic", "lanczos")}
        plain = {m: value for m, value in found.items() if value is not None}
        if ours is None or not plain:
            continue
        best = max(plain, key=lambda m: sign * plain[m])
        if sign * (ours - plain[best]) <= 0:
            yield f"{name} ({ours:.4g}, {best} {plain[best]:.4g})"


def _files(networks: Mapping[str, Output]) -> str:
    rows = []
    for role, network in networks.items():
        sha256 = lineage.sha256_of(network.manifest, lineage.SNAPSHOT) or UNKNOWN
        place = lineage.uri(network.place, lineage.SNAPSHOT)
        rows.append((role, f"`{network.manifest.name}`", f"`{sha256}`", f"`{place}`"))
    return "## Files\n\n" + _table(("network", "output", "sha256", "file"), rows)


def _use(name: str, networks: Mapping[str, Output], results: Mapping[str, Any]) -> str:
    asked = _MAKES[_condition(results)][1]
    places = [network.place.folder / lineage.SNAPSHOT for network in networks.values()]
    files = ", ".join(f'"{path}"' for path in places)
    return (
        "## Use\n\n```python\nimport gigagan\n\n"
        f'sampler = gigagan.load("models:/{name}@champion")  # of MLFLOW_TRACKING_URI\n'
        f"sampler = gigagan.load({files})\n"
        f'sampler.sample({asked}, seed=0)[0].save("picture.png")\n```'
    )


def _count(snapshot: Path | None) -> int:
    """Numbers in a safetensors file, by its header; 0 where it is none."""
    if snapshot is None:
        return 0
    try:
        with safe_open(snapshot, framework="np") as file:
            return sum(prod(file.get_slice(n).get_shape()) for n in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return 0


def _hardware(log: Path) -> str:
    """What the training said it ran on, `8 × cuda, 4 threads`; of several attempts each other."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    facts = [fact for line in lines if (fact := read_fact(line))]
    return "; ".join(dict.fromkeys(str(v) for name, v in facts if name == HARDWARE)) or UNKNOWN


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value)


def _is_model(text: str) -> bool:
    return text.startswith(("embedded:", "open_clip:"))


def _inline(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
