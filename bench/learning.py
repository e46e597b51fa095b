"""`python -m bench.learning`: has a run of the base generator learned what its captions say?

Snapshots along a run are measured on four sets of captions, each beside real pictures and chance:

- training: one caption of each of N concepts, by a judge that has not seen their pictures;
- look-alikes: training captions of one background and style, told apart by pictures alone;
- compositional: training concepts on a background that they never had in that style;
- held-out: captions of concepts that nobody trained on.

The captions must be worded as those of the embedded source. Everything that was drawn or encoded
is kept below `OUT/cache`, so that the same command goes on where it was stopped.

Shape letters: N pictures, P prompts, Z latents per prompt, H W image, C colour, D features.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from torch import Tensor

from data.demo import PALETTE, STYLES, TEMPLATES
from data.loader import ShardLoader
from gigagan.evaluation import alignment, report
from gigagan.evaluation.distances import frechet_distance, kernel_distance
from gigagan.evaluation.features import image_vectors, inception_features, square, text_vectors
from gigagan.evaluation.heldout import read_heldout
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner, fit_aligner

JUDGES = {"inception": "inception-2015-12-05", "efficientnet": "embedded:efficientnet-lite0"}
TEXT = "embedded:minilm-l6"
KID = {"subset_size": 100, "num_subsets": 50}
DIVERSITY_PROMPTS, DIVERSITY_LATENTS = 12, 4
RANKS = (1, 10)
CHUNK = 64  # pictures between two lines of progress, each kept when it is encoded
GRID, CELL = 32, 96
_STARTED = time.monotonic()


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.monotonic() - _STARTED:6.0f} s  {text}", flush=True)


# What is known about the captions, and which of them are drawn.


class Caption(NamedTuple):
    """A caption taken apart."""

    text: str
    name: str
    style: str
    background: str


_PATTERNS = [
    re.compile(
        re.escape(template)
        .replace(r"\{name\}", "(?P<name>.+)")
        .replace(r"\{style\}", f"(?P<style>{'|'.join(STYLES)})")
        .replace(r"\{background\}", f"(?P<background>{'|'.join(PALETTE)})")
    )
    for template in TEMPLATES
]


def take_apart(text: str) -> Caption:
    """Concept, style and background of a caption of the embedded source.

    Raises:
        ValueError: no template words it.
    """
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            return Caption(text, **match.groupdict())
    raise ValueError(f"{text!r} is worded by no template of the embedded source")


class Sample(NamedTuple):
    """A real picture."""

    image_HWC: np.ndarray
    caption: Caption


def read_samples(shards: Path, seed: int) -> list[Sample]:
    """All samples of a folder of shards, in the order of the first epoch of that seed."""
    loader = ShardLoader(shards, batch_size=1, seed=seed)
    batches = itertools.islice(loader.batches(), loader.num_samples)
    return [
        Sample(b.images_BCHW[0].permute(1, 2, 0).numpy().copy(), take_apart(b.captions[0]))
        for b in batches
    ]


@dataclass(frozen=True)
class Group:
    """Look-alikes: real pictures of one style on one background, each of another concept."""

    keys: list[Sample]
    asked: list[Sample]
    """The first half of the keys: their captions are drawn."""
    other_background: list[Sample]
    """Of each concept that is asked for, in the same style."""
    other_style: list[Sample]
    unseen: list[Caption]
    """The same concepts in the same style, on a background that training never showed so."""


@dataclass(frozen=True)
class Plan:
    """Which captions are drawn, and which real pictures they are compared with."""

    training: list[Sample]
    """One of each concept, left out of the judge's fit."""
    reference: list[Sample]
    """As many others, for distances."""
    fit: list[Sample]
    """What the judge is fitted on, spread evenly over the concepts."""
    fitted: list[Sample]
    """Of the concepts in `training`, one each of what the judge was fitted on."""
    groups: list[Group]
    heldout: list[Sample]
    heldout_pictures: list[np.ndarray]

    @property
    def unseen(self) -> list[Caption]:
        """The compositional prompts."""
        return [caption for group in self.groups for caption in group.unseen]


def make_plan(samples: list[Sample], heldout: Path, num: int, num_fit: int, seed: int) -> Plan:
    """Choose by seed alone, whatever the snapshots are."""
    rng = np.random.default_rng([seed, 0])
    shuffled = [samples[i] for i in rng.permutation(len(samples))]
    by_concept: dict[str, list[Sample]] = defaultdict(list)
    for sample in shuffled:
        by_concept[sample.caption.name].append(sample)
    names = [str(name) for name in rng.permutation(sorted(by_concept))]
    training = [by_concept[name][0] for name in names[:num] if len(by_concept[name]) > 1]
    groups = _groups(by_concept, num, rng)

    judged = {id(s) for s in training} | {id(s) for g in groups for s in g.other_background}
    rest = [s for s in shuffled if id(s) not in judged]
    fit = _spread(rest, num_fit)
    first = {s.caption.name: s for s in reversed(fit)}
    asked = {id(s) for s in training}
    reference = [s for s in shuffled if id(s) not in asked][-len(training) :]
    fitted = [first[s.caption.name] for s in training if s.caption.name in first]

    side = samples[0].image_HWC.shape[0]
    found = read_heldout(heldout)
    pictures = {p: np.asarray(square(p, side)) for p in found.all_pictures}
    pairs = zip(found.captions, found.pictures, strict=True)
    return Plan(
        training,
        reference,
        fit,
        fitted,
        groups,
        [Sample(pictures[path], take_apart(caption)) for caption, path in pairs],
        list(pictures.values()),
    )


def _spread(samples: Iterable[Sample], num: int) -> list[Sample]:
    """A first one of every concept, then a second one, and so on, until there are `num`."""
    met: dict[str, int] = defaultdict(int)
    numbered = []
    for sample in samples:
        numbered.append((met[sample.caption.name], sample))
        met[sample.caption.name] += 1
    return [sample for _, sample in sorted(numbered, key=lambda pair: pair[0])[:num]]


def _groups(
    by_concept: Mapping[str, list[Sample]], num: int, rng: np.random.Generator
) -> list[Group]:
    """A group of `num` keys in each style, on two backgrounds; no concept is asked for twice."""
    backgrounds = rng.permutation(list(PALETTE))[: len(STYLES)]
    taken: set[str] = set()
    groups = []
    for style, background in zip(STYLES, backgrounds, strict=True):
        keys: list[Sample] = []
        others: list[Sample] = []
        styles: list[Sample] = []
        unseen: list[Caption] = []
        for name in rng.permutation(sorted(by_concept)):
            looks = {(s.caption.style, s.caption.background): s for s in by_concept[name]}
            key = looks.get((style, str(background)))
            if key is None or len(keys) == num:
                continue
            other = next((s for (a, b), s in looks.items() if a == style and s is not key), None)
            swapped = next((s for (a, _), s in looks.items() if a != style), None)
            missing = [b for b in PALETTE if (style, b) not in looks]
            is_asked = len(unseen) < num // len(STYLES)
            if is_asked and (name in taken or not (other and swapped and missing)):
                continue
            keys.append(key)
            if is_asked and other is not None and swapped is not None:
                chosen = str(rng.choice(missing))
                text = TEMPLATES[0].format(style=style, name=name, background=chosen)
                unseen.append(Caption(text, str(name), style, chosen))
                others.append(other)
                styles.append(swapped)
                taken.add(str(name))
        groups.append(Group(keys, keys[: len(unseen)], others, styles, unseen))
    return groups


# Features, kept on disk.

Pictures = Sequence[np.ndarray] | np.ndarray
"""uint8 H W C each."""


def _save(path: Path, keys: list[str], features_ND: np.ndarray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, keys=np.array(keys), features=features_ND)
    partial.replace(path)


def _kept(folder: Path, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    path = folder / f"{name}.npy"
    if path.is_file():
        return np.load(path)
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, found)
    partial.replace(path)
    return found


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Encoders:
    """The frozen networks, with a memory in a folder."""

    cache: Path

    def inception(self, pictures: Pictures, what: str) -> np.ndarray:
        """Features [N, 2048] of pictures as they are, as `gigagan.evaluation` compares them.

        A picture that several sets share, or that an earlier run met, is encoded once.
        """
        keys = [_digest(f"{p.shape}", p.tobytes()) for p in pictures]
        known = self._known
        missing = {k: p for k, p in zip(keys, pictures, strict=True) if k not in known}
        for start in range(0, len(missing), CHUNK):
            chunk = dict(itertools.islice(missing.items(), start, start + CHUNK))
            features_ND = inception_features(list(chunk.values()))
            _save(self.cache / f"inception-{_digest(*chunk)}.npz", [*chunk], features_ND)
            known |= dict(zip(chunk, features_ND, strict=True))
            say(f"{what}: {start + len(chunk)} of {len(missing)} through Inception")
        return np.stack([known[k] for k in keys])

    @cached_property
    def _known(self) -> dict[str, np.ndarray]:
        """Inception features by the hash of a picture."""
        known: dict[str, np.ndarray] = {}
        for path in sorted(self.cache.glob("inception-*.npz")):
            with np.load(path) as content:
                known |= dict(zip(content["keys"].tolist(), content["features"], strict=True))
        return known

    def pooled(self, encoder: str, pictures: Pictures, px: int, what: str) -> Tensor:
        """What a judge with this image encoder looks at [N, D]."""
        if encoder == JUDGES["inception"]:
            return torch.from_numpy(self.inception(pictures, what))
        network = pretrained.image_encoder(encoder)
        key = _digest(pretrained.sha256(encoder), f"{px}", *(p.tobytes() for p in pictures))

        def compute() -> np.ndarray:
            say(f"{what}: {len(pictures)} through {encoder} at {px} px")
            return image_vectors(list(pictures), network, px=px).numpy()

        return torch.from_numpy(_kept(self.cache, f"pooled-{key}", compute))

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Pooled caption vectors [N, D]."""

        def compute() -> np.ndarray:
            say(f"{len(captions)} captions through {TEXT}")
            return text_vectors(captions, pretrained.text_encoder(TEXT)).numpy()

        key = _digest(pretrained.sha256(TEXT), *captions)
        return torch.from_numpy(_kept(self.cache, f"texts-{key}", compute))


@dataclass(frozen=True)
class Judge:
    """An aligner with the encoders that it needs."""

    aligner: Aligner
    encoders: Encoders

    def recall(
        self, pictures: Sequence[np.ndarray], captions: Sequence[Caption], what: str
    ) -> dict[int, float]:
        """Share of pictures whose caption is among the k nearest of all these captions."""
        judge = self.aligner
        seen = self.encoders.pooled(judge.image_encoder, pictures, judge.image_px, what)
        texts = self.encoders.texts([caption.text for caption in captions])
        images_NE, texts_NE = judge.embed_images(seen), judge.embed_texts(texts)
        return {k: alignment.recall_at(k, images_NE, texts_NE) for k in RANKS}


def fit_judge(name: str, plan: Plan, encoders: Encoders) -> Aligner:
    """A judge of our own, fitted on real training pictures of their own size."""
    encoder, side = JUDGES[name], plan.fit[0].image_HWC.shape[0]
    seen = encoders.pooled(encoder, _images(plan.fit), side, "the judge's fit")
    texts = encoders.texts([sample.caption.text for sample in plan.fit])
    return fit_aligner(seen, texts, image_encoder=encoder, text_encoder=TEXT, image_px=side)


def _images(samples: Sequence[Sample]) -> list[np.ndarray]:
    return [sample.image_HWC for sample in samples]


def _captions(samples: Sequence[Sample]) -> list[Caption]:
    return [sample.caption for sample in samples]


# Snapshots.


@dataclass(frozen=True)
class Snapshot:
    """Weights of a base generator at one moment of its training."""

    path: Path
    cache: Path

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def images_seen(self) -> int:
        """Real images that training had shown to D: from the name, else from the metadata.

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

    @cached_property
    def _sampler(self) -> Any:
        from gigagan.inference.sampler import load

        return load(self.path)

    def draw(self, prompts: Sequence[str], seed: int, what: str) -> np.ndarray:
        """One picture per prompt, without truncation: uint8 N H W C."""

        def compute() -> np.ndarray:
            say(f"{self.images_seen:,} images seen: drawing {len(prompts)} {what}")
            pictures = self._sampler.sample(list(prompts), seed=seed, batch_size=32)
            return np.stack([np.asarray(picture) for picture in pictures])

        return _kept(self.cache, f"drawn-{_digest(self.sha256, f'{seed}', *prompts)}", compute)


@dataclass(frozen=True)
class Drawn:
    """Everything that one snapshot drew."""

    training: np.ndarray
    lookalikes: list[np.ndarray]
    """Per group."""
    unseen: np.ndarray
    heldout: np.ndarray
    variants_PZHWC: np.ndarray


def _varied(plan: Plan) -> list[Caption]:
    """Prompts of several latents: training and held-out ones in turn."""
    half = DIVERSITY_PROMPTS // 2
    pairs = zip(_even(plan.training, half), _even(plan.heldout, half), strict=False)
    return [sample.caption for pair in pairs for sample in pair]


def _even(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` items, evenly spaced."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


def draw_all(snapshot: Snapshot, plan: Plan, seed: int) -> Drawn:
    """Draw every set; equal seeds give all snapshots equal latents."""

    def draw(captions: Sequence[Caption], number: int, what: str) -> np.ndarray:
        return snapshot.draw([c.text for c in captions], seed * 1_000_003 + number, what)

    prompts = [caption for caption in _varied(plan) for _ in range(DIVERSITY_LATENTS)]
    variants = draw(prompts, 5, "variants")
    return Drawn(
        draw(_captions(plan.training), 1, "training captions"),
        [draw(_captions(g.asked), 10 + i, "look-alikes") for i, g in enumerate(plan.groups)],
        draw(plan.unseen, 3, "compositional captions"),
        draw(_captions(plan.heldout), 4, "held-out captions"),
        variants.reshape(-1, DIVERSITY_LATENTS, *variants.shape[1:]),
    )


# Numbers.

Metrics = dict[str, float]


@dataclass
class Reference:
    """What each metric is for real pictures, by what they are, and for chance."""

    real: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    chance: Metrics = field(default_factory=dict)


def _recalls(prefix: str, recall: Mapping[int, float]) -> Metrics:
    return {f"{prefix}_recall_at_{k}": value for k, value in recall.items()}


def _distances(prefix: str, found_ND: np.ndarray, real_ND: np.ndarray) -> Metrics:
    kid = kernel_distance(found_ND, real_ND, **KID)
    return {
        f"{prefix}/kid_x1000": kid.value * 1e3,
        f"{prefix}/kid_x1000_subset_std": kid.subset_std * 1e3,
        f"{prefix}/fid": frechet_distance(found_ND, real_ND),
    }


def _pixels(prefix: str, images: Sequence[np.ndarray], real: Sequence[Sample]) -> Metrics:
    drawn_NHWC, real_NHWC = np.stack(images), np.stack(_images(real))
    names = [sample.caption.background for sample in real]
    return {
        f"{prefix}/colour_accuracy": _colours(drawn_NHWC, _captions(real)),
        f"{prefix}/shape_rank": alignment.shape_rank(drawn_NHWC, real_NHWC, names),
        f"{prefix}/pixel_median_rank": alignment.pixel_probe_rank(
            drawn_NHWC, real_NHWC
        ).median_rank,
    }


def _colours(images: Pictures, captions: Sequence[Caption]) -> float:
    names = [caption.background for caption in captions]
    return alignment.background_colour_accuracy(np.stack(list(images)), names, PALETTE)


@dataclass(frozen=True)
class Bench:
    """The plan with the judges of it."""

    plan: Plan
    encoders: Encoders
    judges: Mapping[str, Judge]
    """By the prefix of their metrics."""

    def measure(self, drawn: Drawn, what: str) -> Metrics:
        """All metrics of one snapshot."""
        plan, metrics = self.plan, Metrics()
        for prefix, images, samples, real in (
            ("training", drawn.training, plan.training, _images(plan.reference)),
            ("heldout", drawn.heldout, plan.heldout, plan.heldout_pictures),
        ):
            features = [self.encoders.inception(x, f"{what}, {prefix}") for x in (images, real)]
            metrics |= _distances(prefix, *features)
            metrics |= _pixels(prefix, list(images), samples)
            metrics |= self._judged(prefix, list(images), _captions(samples), what)
        metrics["compositional/colour_accuracy"] = _colours(drawn.unseen, plan.unseen)
        metrics |= self._judged("compositional", list(drawn.unseen), plan.unseen, what)
        metrics |= self.by_picture("lookalikes", drawn.lookalikes, what)
        counts = [len(group.unseen) for group in plan.groups]
        unseen = np.split(drawn.unseen, np.cumsum(counts)[:-1])
        metrics |= self.by_picture("compositional", unseen, what)
        distance = pretrained.lpips("alex")
        metrics["variants/lpips_diversity"] = alignment.lpips_diversity(
            drawn.variants_PZHWC, distance
        )
        metrics["variants/z_sensitivity"] = alignment.z_sensitivity(drawn.variants_PZHWC)
        return metrics

    def _judged(
        self, prefix: str, images: Sequence[np.ndarray], captions: Sequence[Caption], what: str
    ) -> Metrics:
        metrics = Metrics()
        for name, judge in self.judges.items():
            found = judge.recall(images, captions, f"{what}, {prefix}")
            metrics |= _recalls(f"{prefix}/{name}", found)
        return metrics

    def by_picture(self, prefix: str, queries: Sequence[Pictures], what: str) -> Metrics:
        """Does the picture of a concept lie nearest the real one among all keys of its group?

        By cosine of Inception features less the mean of the keys; queries are in the order of
        each group's first keys. The share is that of all groups together.
        """
        shares: dict[int, list[float]] = {k: [] for k in RANKS}
        weights = [len(images) for images in queries]
        for group, images in zip(self.plan.groups, queries, strict=True):
            keys_ND = torch.from_numpy(self.encoders.inception(_images(group.keys), "keys"))
            found_PD = torch.from_numpy(self.encoders.inception(images, f"{what}, {prefix}"))
            mean_D = keys_ND.mean(dim=0)
            for k in RANKS:
                share = alignment.recall_among(
                    k, found_PD - mean_D, keys_ND - mean_D, range(len(images))
                )
                shares[k].append(share)
        pooled = {k: float(np.average(share, weights=weights)) for k, share in shares.items()}
        return _recalls(f"{prefix}/picture", pooled)

    def reference(self, seed: int) -> Reference:
        """The same metrics of real pictures, and by chance."""
        plan, found = self.plan, Reference()

        def add(what: str, metrics: Metrics) -> None:
            for name, value in metrics.items():
                found.real[name][what] = value

        # Distances between two sets of real pictures.
        sets = [
            self.encoders.inception(_images(x), "real") for x in (plan.training, plan.reference)
        ]
        add("other real pictures", _distances("training", *sets))
        everything = self.encoders.inception(plan.heldout_pictures, "real, held-out")
        order = np.random.default_rng(seed).permutation(len(everything))
        add("two halves", _distances("heldout", *np.array_split(everything[order], 2)))

        # Agreement with captions.
        for prefix, samples in (("training", plan.training), ("heldout", plan.heldout)):
            judged = self._judged(prefix, _images(samples), _captions(samples), "real")
            for name, value in judged.items():
                # What the aligner of the training was fitted on is all of its training pictures.
                is_left_out = prefix == "training" and "/judge_" in name
                kind = "same captions, left out of the fit" if is_left_out else "same captions"
                add(kind, {name: value})
            add("same captions", _pixels(prefix, _images(samples), samples))
        if len(plan.fitted) > 1:  # a small fit may hold none of these concepts
            fitted = self._judged("training", _images(plan.fitted), _captions(plan.fitted), "real")
            own = {name: value for name, value in fitted.items() if "/judge_" in name}
            add("of the fit, other captions of the concepts", own)
        others = [sample for group in plan.groups for sample in group.other_background]
        judged = self._judged("compositional", _images(others), _captions(others), "real")
        add("a background they had", judged)
        add(
            "a background they had",
            {"compositional/colour_accuracy": _colours(_images(others), _captions(others))},
        )

        # Agreement with pictures.
        for what, pictures in (
            ("other background", [_images(g.other_background) for g in plan.groups]),
            ("other style", [_images(g.other_style) for g in plan.groups]),
        ):
            for prefix in ("lookalikes", "compositional"):
                add(what, self.by_picture(prefix, pictures, "real"))

        # How different pictures of different concepts are.
        num = DIVERSITY_PROMPTS * DIVERSITY_LATENTS
        some = np.stack(_images(plan.training[:num]))
        some = some[: len(some) // DIVERSITY_LATENTS * DIVERSITY_LATENTS]
        some_PZHWC = some.reshape(-1, DIVERSITY_LATENTS, *some.shape[1:])
        diversity = alignment.lpips_diversity(some_PZHWC, pretrained.lpips("alex"))
        add("different concepts", {"variants/lpips_diversity": diversity})

        found.chance = self._chance()
        return found

    def _chance(self) -> Metrics:
        plan = self.plan
        chance = Metrics()
        sizes = {
            "training": len(plan.training),
            "heldout": len(plan.heldout),
            "compositional": len(plan.unseen),
        }
        for prefix, size in sizes.items():
            chance[f"{prefix}/colour_accuracy"] = 1 / len(PALETTE)
            for name in self.judges:
                chance |= _recalls(f"{prefix}/{name}", {k: min(1, k / size) for k in RANKS})
            if prefix != "compositional":
                chance[f"{prefix}/shape_rank"] = 0.5
                chance[f"{prefix}/pixel_median_rank"] = (size + 1) / 2
        weights = [len(group.asked) for group in plan.groups]
        for prefix in ("lookalikes", "compositional"):
            shares = {
                k: float(
                    np.average([min(1, k / len(g.keys)) for g in plan.groups], weights=weights)
                )
                for k in RANKS
            }
            chance |= _recalls(f"{prefix}/picture", shares)
        return chance


# What a reader gets: tables.


ABOUT = {
    "kid_x1000": "KID ×10³ (Inception)",
    "fid": "FID (Inception)",
    "judge_recall_at_1": "R@1 by the judge",
    "judge_recall_at_10": "R@10 by the judge",
    "training_judge_recall_at_1": "R@1 by the aligner of the training",
    "training_judge_recall_at_10": "R@10 by the aligner of the training",
    "picture_recall_at_1": "R@1 by picture",
    "picture_recall_at_10": "R@10 by picture",
    "colour_accuracy": "background colour accuracy",
    "shape_rank": "shape rank",
    "pixel_median_rank": "pixel probe, median rank",
    "lpips_diversity": "LPIPS between latents of a prompt",
    "z_sensitivity": "deviation of a pixel over latents",
}
SETS = {
    "training": "training captions",
    "lookalikes": "look-alikes",
    "compositional": "compositional",
    "heldout": "held-out captions",
    "variants": "several latents",
}


def _rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """(name, its set, what it is) in the order of a table."""
    return [
        (f"{prefix}/{kind}", SETS[prefix], ABOUT[kind])
        for prefix in SETS
        for kind in ABOUT
        if f"{prefix}/{kind}" in metrics
    ]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if "recall" in name or "accuracy" in name:
        return f"{100 * value:.1f} %"
    digits = {"kid_x1000": 1, "fid": 1, "pixel_median_rank": 1}.get(name.split("/")[1], 3)
    return f"{value:.{digits}f}"


def tables(results: Mapping[str, Any]) -> str:
    """The curve over the run, and the last snapshot beside real pictures and chance."""
    runs, reference, settings = results["snapshots"], results["reference"], results["settings"]
    rows = _rows(runs[-1]["metrics"])
    heads = [f"{run['images_seen']:,}" for run in runs]
    lines = ["# Has the run learned text?", "", *_explained(settings), ""]
    lines += ["## Over images seen", "", f"| set | metric | {' | '.join(heads)} | chance |"]
    lines += ["|---|---|" + "---:|" * (len(runs) + 1)]
    for name, where, what in rows:
        cells = [_number(name, run["metrics"].get(name)) for run in runs]
        chance = _number(name, reference["chance"].get(name))
        lines.append(f"| {where} | {what} | {' | '.join(cells)} | {chance} |")
    lines += ["", f"## After {heads[-1]} images", ""]
    lines += ["| set | metric | generated | real pictures | chance |", "|---|---|---:|---|---:|"]
    for name, where, what in rows:
        value = _number(name, runs[-1]["metrics"][name])
        if name.endswith("kid_x1000"):
            value += f" ± {runs[-1]['metrics'][name + '_subset_std']:.1f}"
        kinds = reference["real"].get(name, {}).items()
        real = "; ".join(f"{_number(name, v)} ({kind})" for kind, v in kinds) or "–"
        chance = _number(name, reference["chance"].get(name))
        lines.append(f"| {where} | {what} | {value} | {real} | {chance} |")
    return "\n".join(lines) + "\n"


def _explained(settings: Mapping[str, Any]) -> list[str]:
    counts, judges = settings["counts"], settings["judges"]
    keys = ", ".join(f"{number} {look}" for look, number in settings["groups"].items())
    lines = [
        f"Pictures of {settings['px']} px, seed {settings['seed']}, no truncation. "
        f"{counts['training']} training captions of as many concepts, {counts['heldout']} held-out "
        f"captions, {counts['compositional']} compositional ones.",
        "",
        f"- Distances: training captions against {counts['reference']} other real samples, "
        f"held-out ones against all {counts['heldout_pictures']} held-out pictures; ± is the "
        f"deviation over {KID['num_subsets']} subsets of at most {KID['subset_size']}. "
        "The real halves of the held-out set are half as large. FID of so few "
        "pictures is biased upwards; compare it within a row only.",
        f"- The judge: a ridge projection from {judges['judge']['image_encoder']} to "
        f"{judges['judge']['text_encoder']}, fitted here on {judges['judge']['num_fit']} real "
        "training pictures; those of the training captions were left out of its fit, another "
        f"picture of {counts['fitted']} of these concepts was in it. "
        + (
            "Its image encoder took part in training."
            if judges["judge"]["image_encoder"] == JUDGES["efficientnet"]
            else "Training has used neither it nor its image encoder."
        ),
        f"- By picture: Inception features of a drawing against real training pictures of one "
        f"style on one background ({keys}), each of another concept; the captions asked for are "
        "those of half of these pictures (look-alikes), or of the same concepts on a background "
        "that training never showed in that style (compositional).",
        "- Shape rank: 0 where every drawing finds its own real picture among those on the same "
        "background, 0.5 by chance. Pixel probe: rank among all, by coarse layout with colours.",
    ]
    if "training_judge" in judges:
        lines.append(
            "- The aligner of the training: the one that the run itself was guided or watched by; "
            "a model may have learned to please it."
        )
    return lines


# Pictures.


class Line(NamedTuple):
    """A curve of a panel."""

    name: str
    label: str
    colour: str
    marker: str


_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#777777"  # Okabe and Ito's
_KINDS = {
    "training": ("training captions", _BLUE, "o"),
    "lookalikes": ("training captions", _BLUE, "o"),
    "compositional": ("compositional", _GREEN, "^"),
    "heldout": ("held-out captions", _ORANGE, "s"),
}
_PANELS = (
    ("KID ×10³", "kid_x1000", ("training", "heldout"), "lower is better"),
    ("FID", "fid", ("training", "heldout"), "lower is better"),
    ("Shape rank", "shape_rank", ("training", "heldout"), "lower is better"),
    ("R@10 by the judge", "judge_recall_at_10", ("training", "compositional", "heldout"), ""),
    ("R@10 by picture", "picture_recall_at_10", ("lookalikes", "compositional"), ""),
    ("Background colour", "colour_accuracy", ("training", "compositional", "heldout"), ""),
)


def draw_curve(path: Path, results: Mapping[str, Any]) -> None:
    """Six panels over images seen; dashes are real pictures, dots chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    runs, reference = results["snapshots"], results["reference"]
    seen = [run["images_seen"] / 1000 for run in runs]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, kind, prefixes, hint) in zip(
        figure.subplots(2, 3).flat, _PANELS, strict=True
    ):
        for prefix in prefixes:
            name = f"{prefix}/{kind}"
            _, colour, marker = _KINDS[prefix]
            values = [run["metrics"][name] for run in runs]
            axes.plot(seen, values, color=colour, marker=marker, linewidth=1.8)
            real = next(iter(reference["real"].get(name, {}).values()), None)
            if real is not None:
                axes.axhline(real, color=colour, linestyle="--", linewidth=1, alpha=0.8)
            if name in reference["chance"]:
                axes.axhline(reference["chance"][name], color=_GREY, linestyle=":", linewidth=1.5)
        axes.set_title(f"{title} ({hint})" if hint else title, fontsize=11)
        axes.set_xlabel("thousand images seen")
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low), high + 0.04 * (high - min(0, low)))
        axes.grid(alpha=0.25)
        if "recall" in kind or "accuracy" in kind:
            axes.set_ylim(0, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles = [
        Line2D([], [], color=colour, marker=marker, label=label)
        for label, colour, marker in dict.fromkeys(_KINDS.values())
    ]
    handles += [
        Line2D([], [], color="black", linestyle="--", label="real pictures (in the set's colour)"),
        Line2D([], [], color=_GREY, linestyle=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)


def _tile(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image)


def draw_grids(out: Path, plan: Plan, last: Drawn) -> None:
    """What the last snapshot drew, beside real pictures."""
    others = [sample.image_HWC for group in plan.groups for sample in group.other_background]
    sheets: tuple[tuple[str, str, list[Caption], np.ndarray, list[np.ndarray]], ...] = (
        (
            "training",
            "Training captions: generated (left), the real picture of the caption (right)",
            _captions(plan.training),
            last.training,
            _images(plan.training),
        ),
        (
            "heldout",
            "Held-out captions: generated (left), the real picture, never trained on (right)",
            _captions(plan.heldout),
            last.heldout,
            _images(plan.heldout),
        ),
        (
            "compositional",
            "Combinations never trained on: generated (left), a real picture of the concept on a "
            "background that it had (right)",
            plan.unseen,
            last.unseen,
            others,
        ),
    )
    for name, title, captions, images, real in sheets:
        rows = [
            (captions[i].text, [_tile(images[i]), _tile(real[i])])
            for i in _even(range(len(captions)), GRID)
        ]
        report.caption_grid(rows, title=title, cell_px=CELL, columns=4).save(out / f"{name}.png")
    rows = [
        (caption.text, [_tile(image) for image in images])
        for caption, images in zip(_varied(plan), last.variants_PZHWC, strict=True)
    ]
    title = "One caption, several latents: training captions (left), held-out ones (right)"
    report.caption_grid(rows, title=title, cell_px=CELL, columns=2).save(out / "latents.png")


def draw_over_time(out: Path, plan: Plan, seen: Sequence[int], drawn: Sequence[Drawn]) -> None:
    """Eight prompts with their latents, one row each, a column a snapshot; the last is real."""
    rows = []
    for samples, pictures in (
        (plan.training, [d.training for d in drawn]),
        (plan.heldout, [d.heldout for d in drawn]),
    ):
        for i in _even(range(len(samples)), 4):
            tiles = [_tile(images[i]) for images in pictures] + [_tile(samples[i].image_HWC)]
            kind = "training" if samples is plan.training else "held-out"
            rows.append((f"{kind}: {samples[i].caption.text}", tiles))
    grid = report.caption_grid(rows, title="", cell_px=CELL)
    font = ImageFont.load_default(13)
    pen = ImageDraw.Draw(grid)
    for column, label in enumerate([*(_short(n) for n in seen), "real"]):
        pen.text((8 + column * (CELL + 2) + CELL // 2, 8), label, "black", font, anchor="ma")
    grid.save(out / "over-time.png")


def _short(images_seen: int) -> str:
    return f"{images_seen / 1e6:.2f} M" if images_seen >= 1e6 else f"{images_seen / 1e3:.1f} k"


# All of it.


def learned(
    snapshots: Sequence[Path],
    shards: Path,
    heldout: Path,
    out: Path,
    *,
    num: int = 384,
    num_fit: int = 3000,
    seed: int = 0,
    judge: str = "inception",
    aligner: Path | None = None,
) -> dict[str, Any]:
    """Measure every snapshot; write tables, curves and pictures; return what results.json holds."""
    encoders = Encoders(out / "cache")
    runs = sorted((Snapshot(p, encoders.cache) for p in snapshots), key=lambda s: s.images_seen)
    samples = read_samples(shards, seed)
    say(f"{len(samples)} samples of {len({s.caption.name for s in samples})} concepts")
    plan = make_plan(samples, heldout, num, num_fit, seed)

    # Pictures come first: they are quick, and say much.
    drawn = [draw_all(run, plan, seed) for run in runs]
    draw_grids(out, plan, drawn[-1])
    draw_over_time(out, plan, [run.images_seen for run in runs], drawn)
    say(f"wrote grids of pictures to {out}")

    # Judges, and what they say of real pictures.
    judges = {"judge": Judge(fit_judge(judge, plan, encoders), encoders)}
    if aligner is not None:
        judges["training_judge"] = Judge(Aligner.load(aligner), encoders)
    bench = Bench(plan, encoders, judges)
    reference = bench.reference(seed)
    say("real pictures are measured")

    # Every snapshot.
    measured = []
    for run, found in zip(runs, drawn, strict=True):
        what = f"{run.images_seen:,} images seen"
        metrics = bench.measure(found, what)
        about = {"file": run.path.name, "sha256": run.sha256, "images_seen": run.images_seen}
        measured.append({**about, "metrics": metrics})
        shown = ("training/kid_x1000", "heldout/kid_x1000", "training/judge_recall_at_10")
        say(f"{what}: " + ", ".join(f"{name} {metrics[name]:.3g}" for name in shown))

    results = {
        "settings": _settings(plan, judges, aligner, num, seed, shards),
        "snapshots": measured,
        "reference": {"real": reference.real, "chance": reference.chance},
    }
    report.write_json(out / "results.json", results)
    (out / "results.md").write_text(tables(results))
    draw_curve(out / "curve.png", results)
    say(f"wrote {out / 'results.md'}")
    return results


def _settings(
    plan: Plan,
    judges: Mapping[str, Judge],
    aligner: Path | None,
    num: int,
    seed: int,
    shards: Path,
) -> dict[str, Any]:
    """What the numbers depend on, beside the snapshots."""
    described: dict[str, dict[str, Any]] = {}
    for name, judge in judges.items():
        own = judge.aligner
        described[name] = {
            "image_encoder": own.image_encoder,
            "text_encoder": own.text_encoder,
            "image_px": own.image_px,
        }
    described["judge"] |= {"num_fit": len(plan.fit)}
    if aligner is not None:
        described["training_judge"]["sha256"] = hashlib.sha256(aligner.read_bytes()).hexdigest()
    weights = [JUDGES["inception"], "lpips-alex", TEXT]
    weights += [judge.aligner.image_encoder for judge in judges.values()]
    return {
        "num": num,
        "seed": seed,
        "px": plan.fit[0].image_HWC.shape[0],
        "kid": KID,
        "counts": {
            "training": len(plan.training),
            "fitted": len(plan.fitted),
            "reference": len(plan.reference),
            "compositional": len(plan.unseen),
            "heldout": len(plan.heldout),
            "heldout_pictures": len(plan.heldout_pictures),
        },
        "groups": {
            f"{g.keys[0].caption.style} on {g.keys[0].caption.background}": len(g.keys)
            for g in plan.groups
        },
        "judges": described,
        "shards_index_sha256": hashlib.sha256((shards / "index.json").read_bytes()).hexdigest(),
        "weights_sha256": {name: pretrained.sha256(name) for name in dict.fromkeys(weights)},
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m bench.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--snapshots", type=Path, nargs="+", required=True, metavar="FILE")
    root.add_argument("--shards", type=Path, required=True, help="folder such as shards/032")
    root.add_argument("--heldout", type=Path, required=True, help="folder with a captions.json")
    root.add_argument("--out", type=Path, required=True, help="results, and cache/ for the next")
    root.add_argument("--num", type=int, default=384, help="captions of a set, and concepts")
    root.add_argument("--num-fit", type=int, default=3000, help="pictures the judge is fitted on")
    root.add_argument("--seed", type=int, default=0)
    root.add_argument("--judge", choices=sorted(JUDGES), default="inception")
    root.add_argument("--aligner", type=Path, help="that of the run: it took part in training")
    return root


def main() -> None:
    """Do what was asked for."""
    torch.set_grad_enabled(False)
    arguments = vars(parser().parse_args())
    (arguments["out"] / "cache").mkdir(parents=True, exist_ok=True)
    learned(**arguments)


if __name__ == "__main__":
    main()
