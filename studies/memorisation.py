"""Do the networks draw their training pictures again, and does z change the answer?

- `run` draws captions of three kinds (trained; never-trained combinations; concepts never trained)
  with two latents each, finds the nearest training picture of each by three encoders, and writes a
  JSON file a network, one of the real pictures, and a sheet. Networks that have a file are skipped.
- `report` prints the tables of docs/paper.md and draws the curves, from these files alone.

A picture is a near-copy if it is nearer to a training picture than all but 5 % of the training
pictures are to one of another concept. The three samples are those of Meehan et al. 2020: training,
drawn, and real but independent.

Shape letters: N drawn pictures, M training pictures, R real pictures, P captions, C concepts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps

from gigagan.common.files import sha256_of
from gigagan.evaluation.heldout import SPLITS, Work, read_heldout, training_pictures
from gigagan.evaluation.judges.features import square
from gigagan.evaluation.judges.neighbours import chance_limit, closest, copying
from gigagan.evaluation.judges.statistics import bootstrap, share_interval
from gigagan.evaluation.naming import choose
from gigagan.evaluation.report.results import caption_grid, write_json
from gigagan.inference.sampler import PUBLISHED, Sampler, load
from studies import _memorisation, _queue
from studies._copies import ENCODERS, PX, Pictures, changes
from studies._memorisation import report as report
from studies._queue import Record
from studies.learning import Snapshot

RESULTS, IMAGES = Path("docs/paper/memorisation"), Path("docs/images")
ROWS = ("stylegan2", "multi-scale", "vision", "warm-start", "projected")
"""Of the ladder."""
SHARE = 0.05
"""Of training pictures that are as near to one of another concept: what chance finds."""
CAPTIONS, PLANTED, LATENTS = 192, 256, 2
SHOWN, SHOWN_BY, CELL_PX = 4, "LPIPS", 70
"""Captions of each kind in the sheet, and by which encoder they are the nearest."""


@dataclass(frozen=True)
class Trained:
    """The training pictures, and what each shows."""

    pictures: Pictures
    works: Sequence[Work]
    features: Mapping[str, np.ndarray]
    """By encoder [M, D]."""
    limits: Mapping[str, float]
    """Squared distance by encoder, below which a picture is a near-copy."""

    @classmethod
    def read(cls, shards: Path, works: Sequence[Work]) -> Trained:
        """All of a folder such as shards/032; kept.parquet of its filter tells what each shows.

        Raises:
            ValueError: there are none, or some are not among these works.
        """
        kept = shards.parent.parent / "kept.parquet"
        if not kept.is_file():
            raise ValueError(f"there is no {kept}: give shards of the stage filter")
        rows = pq.read_table(kept, columns=["key", "url"]).to_pylist()
        work_of = {work.picture.stem: work for work in works}
        named = {row["key"]: work_of.get(Path(row["url"]).stem) for row in rows}
        pairs = training_pictures(shards, len(rows))
        found = [work for key, _ in pairs if (work := named.get(key)) is not None]
        if not found or len(found) < len(pairs):
            raise ValueError(
                f"{len(found)} of the {len(pairs)} pictures in {shards} are in the gallery: give "
                "the held-out pictures of the same download"
            )
        pictures = [square(picture, PX) for _, picture in pairs]
        features = {name: encode(pictures) for name, encode in ENCODERS.items()}
        concept_M = concepts(found)
        limits = {name: chance_limit(x_MD, concept_M, SHARE) for name, x_MD in features.items()}
        return cls(pictures, found, features, limits)

    def find(self, encoder: str, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared distance [N] to the nearest training picture, and its row [N]."""
        far_N1, row_N1 = closest(x_ND, self.features[encoder])
        return far_N1[:, 0], row_N1[:, 0]


@dataclass(frozen=True)
class Real:
    """Real pictures of one kind of captions, none of which was trained on."""

    works: Sequence[Work]
    far: Mapping[str, np.ndarray]
    """Squared distance [R] to the nearest training picture, by encoder."""

    @classmethod
    def of(cls, works: Sequence[Work], trained: Trained) -> Real:
        """How far they are."""
        pictures = real_pictures(works)
        far = {name: trained.find(name, encode(pictures))[0] for name, encode in ENCODERS.items()}
        return cls(works, far)


def real_pictures(works: Sequence[Work]) -> Pictures:
    """Of the gallery, at the size of training."""
    return [square(work.picture, PX) for work in works]


def concepts(works: Sequence[Work]) -> np.ndarray:
    """What each shows, by name."""
    return np.array([work.concept for work in works])


def mean(values_N: np.ndarray, group_N: np.ndarray) -> list[float]:
    """Mean, and its 95 % bootstrap interval over groups: pictures of one concept are alike.

    Where all are 0 or all 1, which bootstrap gives no width, it is Wilson's for that many groups.
    """
    _, place_N = np.unique(group_N, return_inverse=True)
    sums_C2 = np.stack([np.bincount(place_N, values_N), np.bincount(place_N)], axis=1)

    def ratio(rows_C2: np.ndarray) -> float:
        total, count = rows_C2.sum(axis=0)
        return float(total / count)

    value, C = ratio(sums_C2), len(sums_C2)
    if value in (0, 1):
        interval = share_interval(round(value) * C, C)
    else:
        interval = bootstrap(ratio, sums_C2, resamples=1000)
    return [value, interval.low, interval.high]


def kappa(one_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Agreement of two answers beyond chance (Cohen 1960); None where both always say the same."""
    a, b = one_N.mean(), other_N.mean()
    chance = a * b + (1 - a) * (1 - b)
    return None if chance == 1 else float(((one_N == other_N).mean() - chance) / (1 - chance))


def spread(far_N: np.ndarray, limit: float) -> list[float]:
    """Quantiles from 0 to 1 of distance ÷ that of the limit, both as distances, not squares."""
    found: list[float] = np.quantile(np.sqrt(far_N / limit), _memorisation.QUANTILES).tolist()
    return found


# ---- real pictures: are copies found, and nothing else? -----------------------------------------


def calibrated(trained: Trained, real: Mapping[str, Real]) -> Record:
    """Near-copies of real pictures, of half of training in the other, and of planted ones."""
    order = np.random.default_rng(0).permutation(len(trained.works))
    one, other = np.array_split(order, 2)
    planted, concept_M = order[:PLANTED], concepts(trained.works)
    changed = {
        name: [change(trained.pictures[i]) for i in planted] for name, change in changes().items()
    }
    found: Record = {}
    for name, encode in ENCODERS.items():
        limit, x_MD = trained.limits[name], trained.features[name]
        near = {
            kind: mean(some.far[name] < limit, concepts(some.works)) for kind, some in real.items()
        }
        halves_N = closest(x_MD[one], x_MD[other])[0][:, 0]
        near["half"] = mean(halves_N < limit, concept_M[one])
        copies = {}
        for change, pictures in changed.items():
            far_N, row_N = trained.find(name, encode(pictures))
            copies[change] = {
                "near": mean(far_N < limit, concept_M[planted]),
                "source": mean(row_N == planted, concept_M[planted]),
            }
        spreads = {kind: spread(some.far[name], limit) for kind, some in real.items()}
        found[name] = {"limit": limit, "near": near, "planted": copies, "spread": spreads}
    return found


# ---- drawn pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Nearest training pictures of N drawn ones by one encoder; P captions, with each latent."""

    limit: float
    """Squared distance of near-copies."""
    far_N: np.ndarray
    row_N: np.ndarray
    is_drawing_N: np.ndarray
    """The nearest one shows the caption's concept in its style, on whatever background."""
    is_own_N: np.ndarray
    """No picture is nearer, of training or the caption's real one, than the latter."""
    between_P: np.ndarray
    """Squared distance of a caption's two pictures."""

    @classmethod
    def by(cls, encoder: str, pictures: Pictures, works: Sequence[Work], trained: Trained) -> Found:
        """Of the pictures of these captions, which are all there once a latent."""
        x_ND, y_ND = (ENCODERS[encoder](some) for some in (pictures, real_pictures(works)))
        far_N, row_N = trained.find(encoder, x_ND)
        seen = [trained.works[row] for row in row_N]
        is_drawing_N = [
            (a.concept, a.style) == (b.concept, b.style) for a, b in zip(seen, works, strict=True)
        ]
        is_same_N = [a == b for a, b in zip(seen, works, strict=True)]
        is_nearer_N = np.square(x_ND - y_ND).sum(axis=1) < far_N
        first_PD, second_PD = np.split(x_ND, LATENTS)
        return cls(
            trained.limits[encoder],
            far_N,
            row_N,
            np.array(is_drawing_N),
            np.array(is_same_N) | is_nearer_N,
            np.square(first_PD - second_PD).sum(axis=1),
        )

    @property
    def is_near_N(self) -> np.ndarray:
        """Near-copies."""
        return self.far_N < self.limit

    def record(self, real_R: np.ndarray, concept_N: np.ndarray) -> Record:
        """Means with their intervals; `real_R` are real pictures' distances to training."""
        first_P, second_P = np.split(self.is_near_N, LATENTS)
        concept_P = concept_N[: len(first_P)]
        return {
            "near": mean(self.is_near_N, concept_N),
            "drawing": mean(self.is_drawing_N, concept_N),
            "own": mean(self.is_own_N, concept_N),
            "copying": mean(copying(self.far_N, real_R), concept_N),
            "latents_agree": mean(first_P == second_P, concept_P),
            "latents_near": mean(self.between_P < self.limit, concept_P),
            "spread": spread(self.far_N, self.limit),
        }

    def agreement(self, other: Found, concept_N: np.ndarray) -> Record:
        """Whether another encoder calls the same pictures near-copies."""
        one_N, other_N = self.is_near_N, other.is_near_N
        return {
            "same": mean(one_N == other_N, concept_N),
            "both": mean(one_N & other_N, concept_N),
            "kappa": kappa(one_N, other_N),
        }

    def strip(self, pictures: Pictures, trained: Trained) -> Image.Image:
        """Captions drawn nearest to training beside their neighbours, near-copies in frames."""
        order = np.argsort(self.far_N, kind="stable")
        _, firsts = np.unique(order % len(self.between_P), return_index=True)
        strip = Image.new("RGB", (2 * SHOWN * CELL_PX, CELL_PX), "white")
        for place, i in enumerate(order[np.sort(firsts)[:SHOWN]]):
            colour = "#d55e00" if self.is_near_N[i] else "white"
            pair = (pictures[i], trained.pictures[self.row_N[i]])
            for left, picture in enumerate(pair, start=2 * place):
                large = picture.resize((CELL_PX - 6,) * 2, Image.Resampling.NEAREST)
                strip.paste(ImageOps.expand(large, 3, colour), (left * CELL_PX, 0))
        return strip


def measured(
    sampler: Sampler, works: Sequence[Work], real_R: Mapping[str, np.ndarray], trained: Trained
) -> tuple[Record, Image.Image]:
    """What a network draws for these captions: a record, and a strip of the sheet.

    A latent is a seed; pictures are the base's own, not enlarged.
    """
    captions = [work.caption for work in works]
    rounds = [sampler.sample(captions, seed=z, upscale=False) for z in range(LATENTS)]
    pictures = [picture for some in rounds for picture in some]
    works = [*works] * LATENTS
    found = {name: Found.by(name, pictures, works, trained) for name in ENCODERS}
    concept_N = concepts(works)
    encoders = {name: one.record(real_R[name], concept_N) for name, one in found.items()}
    agreement = {
        f"{a}, {b}": found[a].agreement(found[b], concept_N) for a, b in combinations(ENCODERS, 2)
    }
    strip = found[SHOWN_BY].strip(pictures, trained)
    return {"captions": len(captions), "encoders": encoders, "agreement": agreement}, strip


# ---- all of it ----------------------------------------------------------------------------------


def snapshots(ladder: Path | None, rows: Sequence[str], seeds: int) -> dict[str, Path]:
    """The package's base, and what the ladder has trained so far, at equal images."""
    found = {"package-seed-0": PUBLISHED / "emoji-32.safetensors"}
    for row in rows if ladder is not None else ():
        for seed in range(seeds):
            path = Path(ladder or "", f"{row}-seed-{seed}", "images.safetensors")
            if path.is_file():
                found[path.parent.name] = path
    return found


def run(
    shards: Path, heldout: Path, networks: Mapping[str, Path], results: Path, strips: Path
) -> None:
    """Measure each network that has no file among the results yet, and real pictures for it.

    Raises:
        ValueError: pictures or snapshots are not there, or do not belong together.
    """
    everything = read_heldout(heldout)
    gallery = everything.gallery
    if gallery is None:
        raise ValueError(f"{heldout} has no gallery.json: give that of the embedded source")
    left = {name: path for name, path in networks.items() if not _is_measured(name, path, results)}
    if not left:
        return
    trained = Trained.read(shards, gallery.works)
    among = {
        "trained": {gallery.places[work.caption] for work in trained.works},
        "combination": {gallery.places[caption] for caption in everything.captions},
        "unseen": None,
    }
    works = {
        split: [gallery.works[i] for i in choose(gallery, split, among=among[split])]
        for split in SPLITS
    }
    never = {
        "combination": [gallery.works[i] for i in sorted(among["combination"] or ())],
        "unseen": [work for work in gallery.works if work.split == "unseen"],
    }
    real = {split: Real.of(some, trained) for split, some in never.items()}
    results.mkdir(parents=True, exist_ok=True)
    strips.mkdir(parents=True, exist_ok=True)
    data = {"index_sha256": sha256_of(shards / "index.json"), "pictures": len(trained.works)}
    about = {"data": data, "share": SHARE, "latents": LATENTS, **_queue.circumstances()}
    content = {"encoders": calibrated(trained, real), **about}
    write_json(results / "real.json", _queue.rounded(content))
    for name, path in left.items():
        sampler, splits = load(path), {}
        for split in SPLITS:
            reference = real["unseen" if split == "unseen" else "combination"]
            splits[split], strip = measured(sampler, works[split], reference.far, trained)
            strip.save(strips / f"{name}-{split}.png")
        row, seed = name.rsplit("-seed-", 1)
        seen = {"row": row, "seed": int(seed), "images": Snapshot(path).images_seen}
        content = {"about": {**seen, "sha256": sha256_of(path)}, "splits": splits, **about}
        write_json(results / f"{name}.json", _queue.rounded(content))
        print(f"{name}: measured", flush=True)


def _is_measured(name: str, path: Path, results: Path) -> bool:
    """Whether there is a record, of this very file."""
    file = results / f"{name}.json"
    return file.exists() and json.loads(file.read_text())["about"]["sha256"] == sha256_of(path)


def draw_sheet(path: Path, strips: Path, names: Sequence[str]) -> None:
    """Every network's pictures nearest to training ones, a row each, three kinds of captions."""
    rows = []
    for name in names:
        files = [strips / f"{name}-{split}.png" for split in SPLITS]
        if all(file.is_file() for file in files):
            whole = [Image.open(file) for file in files]
            cells = [
                strip.crop((left, 0, left + CELL_PX, CELL_PX))
                for strip in whole
                for left in range(0, strip.width, CELL_PX)
            ]
            rows.append((name, cells))
    title = f"drawn beside the nearest training picture: {SHOWN} of captions trained, of "
    title += "never-trained combinations, of concepts never trained; framed: near-copies"
    caption_grid(rows, title=title, cell_px=CELL_PX).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit status."""
    p = argparse.ArgumentParser(
        prog="python -m studies.memorisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("run", "report"))
    p.add_argument("--shards", type=Path, help="folder such as shards/032 of the stage filter")
    p.add_argument("--heldout", type=Path, help="held-out pictures of the stage download")
    p.add_argument("--ladder", type=Path, help="--out of the ladder, whose snapshots are measured")
    p.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="of the ladder")
    p.add_argument("--seeds", type=int, default=2, help="of each row (%(default)s)")
    p.add_argument(
        "--out", type=Path, default=Path("runs/memorisation"), help="strips (%(default)s)"
    )
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON files (%(default)s)")
    p.add_argument("--images", type=Path, default=IMAGES, help="sheet and curves (%(default)s)")
    args = p.parse_args(argv)
    if args.command == "run" and not (args.shards and args.heldout):
        p.error("give --shards and --heldout: what the stages filter and download left")
    try:
        if args.command == "run":
            networks = snapshots(args.ladder, args.rows, args.seeds)
            with torch.inference_mode():
                run(args.shards, args.heldout, networks, args.results, args.out)
            draw_sheet(args.images / "memorisation-sheet.png", args.out, list(networks))
        for name, table in report(args.results, args.images).items():
            print(f"\n{name}\n\n{table}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
