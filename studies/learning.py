"""When did a run of the base generator learn to draw what one can name?

Every snapshot is evaluated as `python -m gigagan evaluate` does, by the same captions and latents;
what is here are the metrics over images seen, as a table and as curves, and the same captions drawn
by one snapshot after the other. A snapshot that has been evaluated into `OUT` is not again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from gigagan.config import EvaluateConfig
from gigagan.evaluation import measure
from gigagan.evaluation.heldout import SPLITS, read_heldout
from gigagan.evaluation.report.results import caption_grid
from gigagan.inference.sampler import load

PROMPTS = {"trained": 4, "combination": 4, "unseen": 2}
"""Captions of each split that are shown over time."""
CELL_PX = 96


@dataclass(frozen=True)
class Snapshot:
    """Weights of a base generator at one moment of its training."""

    path: Path

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def images_seen(self) -> int:
        """Real images that training had shown to the networks: by the name, else the metadata.

        Raises:
            ValueError: neither says it.
        """
        if match := re.fullmatch(r"images-(\d+)", self.path.stem):
            return int(match[1])
        with safe_open(self.path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("snapshot", "{}"))
        if "images_seen" not in described.get("about", {}):
            raise ValueError(
                f"{self.path}: neither its name (images-NNNN) nor its metadata says how many "
                "images it has seen"
            )
        return int(described["about"]["images_seen"])


def evaluated(
    snapshot: Snapshot,
    heldout: Path,
    out: Path,
    config: EvaluateConfig,
    *,
    aligner: Path | None = None,
) -> Results:
    """What `out`/results.json says of the snapshot, measured now if it says nothing."""
    file = out / "results.json"
    if file.is_file():
        results: Results = json.loads(file.read_text())
        if results["protocol"]["snapshots_sha256"] == {"base": snapshot.sha256}:
            return results
    sampler = load(snapshot.path)
    config = config.model_copy(update={"resolution": sampler.resolution})

    def sample(captions: list[str], seed: int, truncation: float) -> list[Image.Image]:
        return sampler.sample(captions, seed=seed, truncation=truncation, cut=True)

    return measure.evaluate(
        sample,
        heldout,
        out,
        config,
        aligner=aligner,
        snapshots={"base": snapshot.path},
        asks=sampler.condition.asks,
        classes=sampler.condition.classes,
        statistics=out.parent / "statistics",
        progress=lambda what, done, total: print(f"{out.name}: {done}/{total} {what}", flush=True),
    )


Results = dict[str, Any]
"""A results.json."""


def table(runs: Mapping[int, Results]) -> str:
    """All metrics over images seen, in Markdown, with real pictures and chance."""
    last = runs[max(runs)]
    heads = ["", *(f"{seen:,}" for seen in runs), "real pictures", "chance"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in last["metrics"]:
        values = [run["metrics"].get(name) for run in runs.values()]
        values += [last["reference"][kind].get(name) for kind in ("real", "chance")]
        cells = ["–" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_COLOURS = {"trained": "#0072b2", "combination": "#009e73", "unseen": "#d55e00", "": "#0072b2"}
_PANELS = {
    "R@1 by 16×16 pixels": "naming_pixels_r1",
    "R@1 by the judge": "naming_judge_r1",
    "KID": "kid",
    "FID": "fid",
    "Background colour": "background_colour_accuracy",
    "Shape rank (lower is better)": "shape_rank",
}


def draw_curve(path: Path, runs: Mapping[int, Results]) -> None:
    """A panel a metric over images seen; dashes are real pictures, dots chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    reference = runs[max(runs)]["reference"]
    for axes, (title, metric) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for split in SPLITS if metric.startswith("naming") else ("",):
            name = f"{metric}_{split}" if split else metric
            points = [
                (n, run["metrics"][name]) for n, run in runs.items() if name in run["metrics"]
            ]
            if not points:
                continue
            colour = _COLOURS[split]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=split)
            for kind, line in (("real", "--"), ("chance", ":")):
                if name in reference[kind]:
                    axes.axhline(reference[kind][name], color=colour, linestyle=line, linewidth=1)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("images seen")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        if metric.startswith("naming") and axes.lines:
            axes.legend(frameon=False)
    figure.supxlabel("dashes: real pictures; dots: chance", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_over_time(path: Path, heldout: Path, folders: Mapping[int, Path]) -> None:
    """The same captions, a column a snapshot; the real picture is the last."""
    everything = read_heldout(heldout)
    real = dict(zip(everything.captions, everything.pictures, strict=True))
    split_of = dict.fromkeys(everything.captions, "held-out")
    if everything.gallery is not None:
        real |= {work.caption: work.picture for work in everything.gallery.works}
        split_of |= {work.caption: work.split for work in everything.gallery.works}
    left = {**PROMPTS, "held-out": sum(PROMPTS.values())}
    drawn = [drawn_in(folder) for folder in folders.values()]
    rows = []
    for caption in drawn[-1]:
        split = split_of[caption]
        if left[split] and all(caption in pictures for pictures in drawn):
            left[split] -= 1
            files = [*(pictures[caption] for pictures in drawn), real[caption]]
            rows.append((f"{split}: {caption}", [Image.open(file) for file in files]))
    title = f"after {', '.join(f'{seen:,}' for seen in folders)} images, and real"
    caption_grid(rows, title=title, cell_px=CELL_PX).save(path)


def drawn_in(folder: Path) -> dict[str, Path]:
    """Caption → picture of an evaluation."""
    found: dict[str, Path] = {}
    for part in (folder, folder / "naming"):
        if (part / "captions.txt").is_file():
            captions = (part / "captions.txt").read_text().splitlines()
            found |= dict(zip(captions, sorted((part / "images").iterdir()), strict=True))
    return found


def learned(snapshots: Sequence[Path], heldout: Path, out: Path, num_images: int | None) -> None:
    """Evaluate every snapshot into a folder of `out`, and write a table, curves and pictures."""
    config = EvaluateConfig(num_images=num_images, sweep=(), speed_batches=(), neighbours=0)
    found = sorted((Snapshot(path) for path in snapshots), key=lambda s: s.images_seen)
    folders = {one.images_seen: out / f"images-{one.images_seen:010d}" for one in found}
    runs = {
        one.images_seen: evaluated(one, heldout, folders[one.images_seen], config) for one in found
    }
    (out / "learned.md").write_text(table(runs))
    draw_curve(out / "curve.png", runs)
    draw_over_time(out / "over-time.png", heldout, folders)
    print(f"{out / 'learned.md'}, {out / 'curve.png'} and {out / 'over-time.png'} show it")


def main() -> None:
    """Do what was asked for."""
    root = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--snapshots", type=Path, nargs="+", required=True, metavar="FILE")
    root.add_argument("--heldout", type=Path, required=True, help="folder with a captions.json")
    root.add_argument("--out", type=Path, required=True, help="a folder of results per snapshot")
    root.add_argument("--num-images", type=int, help="held-out captions (all)")
    torch.set_grad_enabled(False)
    learned(**vars(root.parse_args()))


if __name__ == "__main__":
    main()
