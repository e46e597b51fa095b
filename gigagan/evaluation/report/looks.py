"""What one looks at beside the numbers: grids, truncation curve, speed, neighbours, failures.

It fills the page of an evaluation, and adds to the results what the page draws as numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan.evaluation.dissect import Dissection
from gigagan.evaluation.heldout import Heldout, training_pictures
from gigagan.evaluation.judges.alignment import clip_score_per_picture, similarities
from gigagan.evaluation.judges.distances import frechet_distance, kernel_distance
from gigagan.evaluation.judges.features import extract, extractor, open_rgb, reference, text_vectors
from gigagan.evaluation.judges.neighbours import Memorisation, memorisation, nearest
from gigagan.evaluation.naming import Drawn
from gigagan.evaluation.report import page, sweeps, units
from gigagan.evaluation.report.categories import CategoryRow, by_category, categories
from gigagan.evaluation.report.results import caption_grid
from gigagan.evaluation.setting import (
    INCEPTION,
    Sample,
    Setting,
    Variants,
    embedded,
    seed_of,
)
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner

_GRID_PAIRS = 24
_GRID_PROMPTS = 8
_MAX_NEIGHBOUR_SAMPLES = 256


@dataclass(frozen=True)
class Subject:
    """What was drawn, and what it is held against."""

    generated: Sequence[Path]
    everything: Heldout
    chosen: Heldout
    variants: Variants
    agreement: np.ndarray | None
    """How well each of the first pictures agrees with its caption, by the judge there was."""
    judge: Aligner | None
    drawn: Sequence[Drawn] = ()
    """Pictures that are to be named, of sets with a gallery."""
    dissection: Dissection | None = None

    @property
    def title(self) -> str:
        """What the captions have in common, by the gallery, and nobody trained on."""
        if self.chosen.asks != "text":
            return _TITLES[self.chosen.asks]
        gallery = self.chosen.gallery
        splits = set()
        if gallery is not None:
            places = [gallery.places.get(caption) for caption in self.chosen.captions]
            splits = {None if i is None else gallery.works[i].split for i in places}
        return _TITLES[splits.pop()] if len(splits) == 1 else _TITLES[None]

    @property
    def unseen(self) -> list[tuple[str, Path, Path]]:
        """Caption, generated and real picture of concepts never trained, beside the captions."""
        if self.chosen.gallery is None or self.title == _TITLES["unseen"]:
            return []
        works = [(self.chosen.gallery.works[one.work], one.picture) for one in self.drawn]
        return [(w.caption, drawn, w.picture) for w, drawn in works if w.split == "unseen"]


_TITLES: dict[str | None, str] = {
    None: "Held-out captions",
    "class": "By the names of classes",
    "nothing": "Drawn without being told anything",
    "trained": "Captions trained on",
    "combination": "Never-trained combinations of concept, style and background",
    "unseen": "Concepts never trained",
}


def write(
    results: dict[str, Any],
    subject: Subject,
    at: Setting,
    *,
    sample: Sample | None = None,
    shards: Path | None = None,
) -> None:
    """Write grid.png, latents.png and report.html; add sweep, speed and memorisation to `results`.

    unseen.png shows concepts never trained, of sets that know which these are. Without a sampler
    there is neither a curve nor a speed, without shards there are no neighbours: `absent` says so.
    """
    absent: dict[str, str] = results["absent"]
    _draw_grids(subject, at)
    curve = _curve(subject, at, sample, absent)
    speeds = _speeds(subject, at, sample, absent)
    neighbours, memory = _neighbours(subject, at, shards, absent)
    rows = _failures(subject, at)
    results["truncation_curve"] = [asdict(point) for point in curve or []]
    results["truncation_metric"] = "fid" if at.rules.curve else "kid"
    results["speed"] = [asdict(speed) for speed in speeds or []]
    results["memorisation"] = None if memory is None else asdict(memory)
    results["categories"] = [
        {"name": row.name, "count": row.count, "mean": row.mean, "low": row.low, "high": row.high}
        for row in rows or []
    ]
    dissected = None if subject.dissection is None else units.looks(subject.dissection)
    if dissected is not None and subject.dissection is not None:
        results["dissection"] = subject.dissection.told()
        dissected.sheet().save(at.out / "dissect.png", optimize=True)
    figures = page.Figures(
        grid=_pairs(subject, at),
        title=subject.title,
        unseen=_unseen(subject, at),
        latents=subject.variants[:_GRID_PROMPTS],
        curve=curve,
        speeds=speeds,
        neighbours=neighbours,
        memorisation=memory,
        categories=rows,
        worst=_worst(rows, subject, at),
        dissected=dissected,
    )
    page.write_page(at.out / "report.html", results, figures)


def _pairs(subject: Subject, at: Setting) -> list[page.Pair]:
    """Rows of the grid: by lot of a fixed seed, and none of them chosen.

    A list that goes over its concepts again and again would show few of them at even distances.
    """
    real = dict(zip(subject.chosen.paired, subject.chosen.pictures, strict=True))
    lot = np.random.default_rng(0).permutation(len(subject.generated))[:_GRID_PAIRS]
    return [
        (
            subject.chosen.captions[i],
            open_rgb(subject.generated[i]),
            at.square(real[i]) if i in real else None,
        )
        for i in sorted(lot.tolist())
    ]


def _unseen(subject: Subject, at: Setting) -> list[page.Pair]:
    return [
        (caption, open_rgb(drawn), at.square(real))
        for caption, drawn, real in subject.unseen[:_GRID_PAIRS]
    ]


def _draw_grids(subject: Subject, at: Setting) -> None:
    """grid.png and unseen.png: generated beside real; latents.png: several of each prompt."""
    for name, title, pairs in (
        ("grid.png", subject.title, _pairs(subject, at)),
        ("unseen.png", _TITLES["unseen"], _unseen(subject, at)),
    ):
        rows = [
            (caption, [at.square(drawn), *([] if real is None else [real])])
            for caption, drawn, real in pairs
        ]
        (at.out / name).unlink(missing_ok=True)
        if rows:
            has_real = any(real is not None for *_, real in pairs)
            shown = f"{title}: generated (left), real (right)" if has_real else title
            grid = caption_grid(rows, title=shown, columns=4)
            grid.save(at.out / name)
    if subject.variants:
        grid = caption_grid(
            subject.variants[:_GRID_PROMPTS], title="One caption, several latents", columns=2
        )
        grid.save(at.out / "latents.png")


def _curve(
    subject: Subject, at: Setting, sample: Sample | None, absent: dict[str, str]
) -> list[sweeps.CurvePoint] | None:
    config, rules = at.config, at.rules.curve
    psis = rules.truncations if rules else config.sweep
    if sample is None or not psis:
        absent["truncation_curve"] = "no sampler" if sample is None else "evaluate.sweep is empty"
        return None
    if subject.judge is None and at.clip is None:
        absent["truncation_curve"] = "neither an aligner nor a CLIP to judge agreement by"
        return None
    count = rules.num_captions if rules else config.sweep_captions
    captions = _spread(subject.chosen.captions, count)
    inception = extractor(f"{INCEPTION}/{at.rules.resize}", *at.devices)
    real_ND = reference(
        subject.everything.all_pictures,
        [inception],
        transform=at.square,
        transform_name=at.transform,
        cache=at.statistics,
        batch_size=config.batch_size,
    )[inception.name]

    def draw(prompts: list[str], psi: float) -> list[Image.Image]:
        drawn: list[Image.Image] = []
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            drawn += sample(batch, seed_of(config, start), psi)
        return drawn

    def distance(pictures: Sequence[Image.Image]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            found = extract(
                list(pictures),
                [inception],
                transform=at.square,
                folder=Path(folder),
                batch_size=config.batch_size,
            )
            features_ND = np.array(found[inception.name])
            if rules is not None:
                return frechet_distance(features_ND, real_ND)
            return kernel_distance(features_ND, real_ND, num_subsets=1).value

    return sweeps.truncation_curve(
        draw,
        captions,
        psis,
        distance=distance,
        alignment=lambda pictures, texts: float(agreement(subject, at)(pictures, texts).mean()),
        progress=lambda done, total: at.progress("truncations", done, total),
    )


Agreement = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]


def agreement(subject: Subject, at: Setting) -> Agreement:
    """Pictures and captions → cosine of each pair, by CLIP where there is one, else the aligner."""

    def by_clip(pictures: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        assert at.clip is not None
        return clip_score_per_picture(
            pictures, captions, at.clip, prefix=at.rules.clip_prefix, device=at.device
        )

    def by_aligner(pictures: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        assert subject.judge is not None
        encoder = pretrained.text_encoder(subject.judge.text_encoder, at.device)
        texts_NE = subject.judge.embed_texts(text_vectors(list(captions), encoder))
        return similarities(embedded(subject.judge, list(pictures), at), texts_NE)

    return by_clip if at.clip is not None else by_aligner


def _speeds(
    subject: Subject, at: Setting, sample: Sample | None, absent: dict[str, str]
) -> list[sweeps.Speed] | None:
    config = at.config
    if sample is None or not config.speed_batches:
        absent["speed"] = "no sampler" if sample is None else "evaluate.speed_batches is empty"
        return None
    return sweeps.speeds(
        lambda captions: sample(captions, config.seed, config.truncation),
        subject.chosen.captions,
        config.speed_batches,
    )


Neighbours = list[tuple[str, Image.Image, list[tuple[Image.Image, float]]]]


def _neighbours(
    subject: Subject, at: Setting, shards: Path | None, absent: dict[str, str]
) -> tuple[Neighbours | None, Memorisation | None]:
    """The nearest training pictures of samples, and whether samples are nearer than real ones."""
    config = at.config
    if not config.neighbours or shards is None:
        absent["memorisation"] = "no training pictures were given"
        return None, None
    training = [picture for _, picture in training_pictures(shards, config.neighbour_pool)]
    if len(training) < 2:
        absent["memorisation"] = f"{shards} holds no tars with pictures"
        return None, None
    samples = _spread(list(subject.generated), _MAX_NEIGHBOUR_SAMPLES)
    captions = _spread(subject.chosen.captions, _MAX_NEIGHBOUR_SAMPLES)
    real = _spread(subject.everything.all_pictures, _MAX_NEIGHBOUR_SAMPLES)
    samples_ND, real_ND, training_ND = (_vectors(x, subject, at) for x in (samples, real, training))
    found = nearest(samples_ND, training_ND, k=3)
    shown: Neighbours = []
    for i in _spread(list(range(len(samples))), config.neighbours):
        pictures = [(training[n.index], n.cosine) for n in found[i]]
        shown.append((captions[i], open_rgb(samples[i]), pictures))
    return shown, memorisation(samples_ND, real_ND, training_ND)


def _vectors(pictures: Sequence[Path | Image.Image], subject: Subject, at: Setting) -> np.ndarray:
    """Features for neighbours: the aligner's space, or Inception's where there is none."""
    if subject.judge is not None:
        return embedded(subject.judge, pictures, at).numpy()
    inception = extractor(f"{INCEPTION}/{at.rules.resize}", *at.devices)
    with tempfile.TemporaryDirectory() as folder:
        settings: Mapping[str, Any] = {"transform": at.square, "folder": Path(folder)}
        return np.array(extract(list(pictures), [inception], **settings)[inception.name])


def _failures(subject: Subject, at: Setting) -> list[CategoryRow] | None:
    if subject.agreement is None:
        return None
    captions = subject.chosen.captions[: len(subject.agreement)]
    labels = None
    if subject.chosen.backgrounds is not None:
        known = zip(subject.chosen.paired, subject.chosen.backgrounds, strict=True)
        labels = {"background": dict(known)}
    groups = categories(captions, labels)
    return by_category(subject.agreement.tolist(), groups)


def _worst(
    rows: list[CategoryRow] | None, subject: Subject, at: Setting
) -> list[tuple[str, str, Image.Image, float]] | None:
    if rows is None or subject.agreement is None:
        return None
    return [
        (row.name, subject.chosen.captions[i], open_rgb(subject.generated[i]), float(value))
        for row in rows
        for i, value in [(row.worst[0], subject.agreement[row.worst[0]])]
    ]


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly over the list."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
