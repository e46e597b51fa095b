"""Does influence find wrong captions, and is a base that never saw the worst pairs a better one?

The embedded source plants wrong captions and says where. A base is trained on all pictures that
other rules leave, and the influence of each is measured; then bases of two seeds are trained for as
many images without what similarity, influence or both drop, and evaluated alike. What is in `--out`
is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.metrics import average_precision_score

from data.filter.run import run as filter_pictures
from data.filter.select import score_files
from flows.config import PipelineConfig
from gigagan.__main__ import main as gigagan
from gigagan.config import TrainBaseConfig
from gigagan.training import __main__ as training
from gigagan.training.distributed.world import World
from studies.learning import Results, Snapshot, evaluated

SNAPSHOTS = 5
"""Checkpoints of the averaged network over a run, at which gradients are compared."""
COOLDOWN, GAME = 3_000, 3_000
"""The last images: rates fall; D takes part."""
SHARE_ALONE, SHARE_BESIDE = 0.05, 0.03
"""Dropped by influence where it is the only rule, and where similarity is one."""
METRICS = {
    "naming_pixels_r1_combination": "own picture nearest of 64",
    "naming_judge_r1_combination": "… by the judge",
    "kid": "KID × 10³",
}


def config_of(images: int, seed: int) -> TrainBaseConfig:
    """The preset's training at this length, its stretches in proportion."""
    tree = PipelineConfig.preset("demo").train_base.model_dump(mode="json")
    tree["warm_start"]["images"] = images - GAME
    tree["optimizer"]["cooldown_images"] = COOLDOWN
    every = images // SNAPSHOTS
    tree |= {"total_images": images, "seed": seed, "sample_images": every, "snapshot_images": every}
    tree |= {"num_probe_captions": 0, "checkpoint_images": 10**9, "precision": "fp32"}
    return TrainBaseConfig.model_validate(tree | {"system": {"loader_threads": 1}})


class Study:
    """Folders of one study, and what is done in them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.scores, self.download, self.out = args.scores, args.download, args.out
        self.images, self.seeds = args.images, args.seeds
        self.influence = self.out / "influence.parquet"

    def shards(self, name: str, **settings: Any) -> Path:
        """Training pictures by the preset's filter with these settings."""
        config = PipelineConfig.preset("demo").filter
        chosen = type(config).model_validate({**config.model_dump(), **settings})
        filter_pictures(self.out / name, self.scores, self.download, chosen)
        return self.out / name / "shards" / "032"

    def trained(self, name: str, shards: Path, seed: int) -> Path:
        """A base trained on these; its run folder."""
        folder: Path = self.out / name / f"base-{seed}"
        if not (folder / "result.json").exists():
            training.run(config_of(self.images, seed), folder, shards, None, World())
        return folder

    def measured(self, name: str, shards: Path, seed: int) -> Results:
        """What such a base draws for captions never trained."""
        snapshot = Snapshot(self.trained(name, shards, seed) / "snapshot.safetensors")
        config = PipelineConfig.preset("demo").evaluate.model_copy(
            update={"sweep": (), "speed_batches": (), "neighbours": 0, "diversity_prompts": 0}
        )
        with torch.no_grad():
            folder = self.out / "evaluations" / f"{name}-{seed}"
            return evaluated(snapshot, self.download / "heldout", folder, config)

    def found(self) -> str:
        """How well each score, and similarity, and both find the planted captions."""
        table = pq.read_table(self.influence).to_pandas().set_index("key")
        scores = pq.read_table(score_files(self.scores)).to_pandas().set_index("key")
        known = pq.read_table(self.download / "site" / "truth.parquet").to_pandas()
        planted = set(known[known["defect"] == "wrong_caption"][["url", "caption"]].itertuples(
            index=False, name=None))  # fmt: skip
        rows = scores.loc[table.index]
        pairs = zip(rows["url"], rows["caption"], strict=True)
        is_wrong_N = np.array([pair in planted for pair in pairs])
        unlike_N = -rows["similarity"].to_numpy(np.float64)
        of = {"similarity": unlike_N}
        of |= {name: table[name].to_numpy() for name in table.columns if name != "influence"}
        of["similarity and disagreement"] = _units(unlike_N) + _units(of["disagreement"])
        of["similarity and loss"] = _units(unlike_N) + _units(of["loss"])
        number = int(is_wrong_N.sum())
        lines = [f"| score, {number} wrong of {len(rows)} | average precision | among the worst "
                 f"{number} |", "|---|---:|---:|"]  # fmt: skip
        for name, score_N in of.items():
            precision = average_precision_score(is_wrong_N, score_N)
            worst = is_wrong_N[np.argsort(-score_N)[:number]].mean()
            lines.append(f"| {name} | {precision:.3f} | {worst:.0%} |")
        below = unlike_N > -PipelineConfig().filter.min_similarity  # type: ignore[operator]
        worst_N = table["disagreement"].rank(ascending=False).to_numpy() <= SHARE_BESIDE * len(rows)
        for name, is_dropped_N in {
            "similarity below 0.1": below,
            f"worst {SHARE_BESIDE:.0%} by disagreement": worst_N,
            "either": below | worst_N,
        }.items():
            hits, dropped = int((is_dropped_N & is_wrong_N).sum()), int(is_dropped_N.sum())
            share = f"precision {hits / dropped:.2f} | recall {hits / number:.2f}"
            lines.append(f"| {name}: drops {dropped} | {share} |")
        return "\n".join(lines) + "\n"

    def run(self) -> str:
        """Everything, as Markdown."""
        everything = self.shards("everything", min_similarity=None)
        run = self.trained("everything", everything, 0)
        heldout = self.download / "heldout"
        if not self.influence.exists() and gigagan(
            ["influence", "--run", str(run), "--shards", str(everything), "--heldout", str(heldout),
             "--out", str(self.influence), "--device", "cpu"]
        ):  # fmt: skip
            raise SystemExit("influence failed, and has said why")
        text = self.found()
        print(text, flush=True)
        return f"{text}\n{self.retrained()}" if self.seeds else text

    def retrained(self) -> str:
        """What bases are worth that were trained on what each rule leaves."""
        by = {"influence": str(self.influence)}
        rules: Mapping[str, Mapping[str, Any]] = {
            "everything": {"min_similarity": None},
            "similarity": {},
            "influence": {"min_similarity": None, "drop_influence": SHARE_ALONE, **by},
            "both": {"drop_influence": SHARE_BESIDE, **by},
        }
        heads = ["trained on", "pictures", *METRICS.values()]
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for name, settings in rules.items():
            shards = self.shards(name, **settings)
            kept = pq.read_metadata(self.out / name / "kept.parquet").num_rows
            results = [self.measured(name, shards, seed) for seed in range(self.seeds)]
            cells = [_cell([r["metrics"][metric] for r in results], metric) for metric in METRICS]
            lines.append(f"| {name} | {kept} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
        return "\n".join(lines) + "\n"


def _units(x_N: np.ndarray) -> np.ndarray:
    return (x_N - x_N.mean()) / x_N.std()


def _cell(values: list[float], metric: str) -> str:
    """Each seed's value, and their mean."""
    scaled = [1e3 * v if metric == "kid" else v for v in values]
    form = ".1f" if metric == "kid" else ".3f"
    return " · ".join(f"{v:{form}}" for v in scaled) + f" (mean {mean(scaled):{form}})"


def main() -> None:
    """Do what was asked for."""
    root = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root.add_argument("--download", type=Path, required=True, help="output of that stage")
    root.add_argument("--scores", type=Path, required=True, help="output of the score stage")
    root.add_argument("--out", type=Path, required=True)
    root.add_argument("--images", type=int, default=20_000, help="per training (%(default)s)")
    root.add_argument("--seeds", type=int, default=2, help="of retraining; 0: none (%(default)s)")
    study = Study(root.parse_args())
    study.out.mkdir(parents=True, exist_ok=True)
    (study.out / "cleaning.md").write_text(study.run())


if __name__ == "__main__":
    main()
