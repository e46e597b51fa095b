"""An evaluation: pictures for captions, held against real ones, to one folder of results.

Captions nobody trained on are drawn (or a folder of drawn pictures is taken as it is) and compared
with the real pictures of the set, by the rules of a named protocol. All that a number depends on
stands beside it in results.json, written last; a metric that cannot be computed is absent with a
reason, never zero.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from gigagan.config import EvaluateConfig
from gigagan.evaluation import alignment, looks, protocol, report
from gigagan.evaluation.distances import cmmd, frechet_distance, kernel_distance, mmd2, prdc
from gigagan.evaluation.features import (
    Extractor,
    Progress,
    extract,
    extractor,
    reference,
    silent,
    square,
    text_vectors,
)
from gigagan.evaluation.heldout import Heldout, natural, read_drawn, read_heldout, subset
from gigagan.evaluation.setting import (
    INCEPTION,
    Sample,
    Setting,
    Variants,
    embedded,
    seed_of,
    setting,
)
from gigagan.evaluation.statistics import bootstrap, subsampled
from gigagan.models import pretrained
from gigagan.models.aligner import Aligner

HEADLINES = ("fid", "kid", "background_colour_accuracy", "pixel_probe_median_rank", "shape_rank")

_MAX_PAIRS = 1000
"""Retrieval and pixel metrics look at this many pairs: ranks among more say little more."""
_MAX_PRDC = 10_000
_MAX_SUBSAMPLES = 20
_MIN_PART, _MAX_PART = 4, 10_000
"""Rows of the parts behind the interval of a distance."""
_NEIGHBOURS = 5


@dataclass
class Findings:
    """What is measured, filled one metric at a time."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals over pictures, by the metrics' names."""
    real: dict[str, float] = field(default_factory=dict)
    """The same metric of real pictures: a floor or a ceiling."""
    chance: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        name: str,
        value: float,
        *,
        real: float | None = None,
        chance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Note one metric with what it is to be held against."""
        self.metrics[name] = float(value)
        for kind, other in ((self.real, real), (self.chance, chance)):
            if other is not None:
                kind[name] = float(other)
        if interval is not None:
            self.intervals[name] = (float(interval[0]), float(interval[1]))

    def add_mean(
        self,
        name: str,
        values: np.ndarray,
        config: EvaluateConfig,
        *,
        real: float | None = None,
        chance: float | None = None,
    ) -> None:
        """Note the mean over pictures with its bootstrap interval."""
        interval = None
        if config.resamples and len(values) > 1:
            found = bootstrap(_mean, values, resamples=config.resamples, seed=config.seed)
            interval = (found.low, found.high)
        self.add(name, float(np.mean(values)), real=real, chance=chance, interval=interval)


def evaluate(
    sample: Sample,
    heldout: Path,
    out: Path,
    config: EvaluateConfig,
    *,
    aligner: Path | None = None,
    shards: Path | None = None,
    snapshots: Mapping[str, Path] | None = None,
    is_cut: Callable[[str], bool] = lambda caption: False,
    device: torch.device | str = "cpu",
    statistics: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw captions, measure, and write images/, captions.txt, grids, report.html, results.json.

    `aligner` is the file fitted by the filter; `shards` holds training pictures, in which nearest
    neighbours are looked for; `snapshots` are the weight files under test, recorded by hash;
    `is_cut` tells captions that the generator does not read to their end, which are counted;
    `statistics` keeps features of reference sets over evaluations. Returns what results.json holds:
    `protocol`, `metrics` (flat floats), `intervals`, `reference` (`real` and `chance`, by the same
    names) and `absent` (reasons).

    Raises:
        ProtocolError: settings or counts that the protocol does not allow; nothing is drawn.
        PictureError: unreadable pictures in the reference.
    """
    at = setting(config, out, device=device, statistics=statistics, progress=progress)
    _refuse_task(at, "text")
    everything = read_heldout(heldout)
    chosen = subset(everything, at.config.num_images, config.seed)
    protocol.check_counts(
        at.rules, num_generated=len(chosen.captions), num_real=len(everything.all_pictures)
    )
    (out / "results.json").unlink(missing_ok=True)  # an older result beside newer pictures lies
    findings = Findings()

    generated, seconds = _generate(sample, chosen.captions, at)
    findings.add("seconds_per_image", seconds)
    judge = None if aligner is None else Aligner.load(aligner)
    agreement = _judge(findings, generated, everything, chosen, judge, at)
    variants = _variants(sample, chosen.captions, at)
    _measure_diversity(findings, variants, at)

    facts = _describe(at, everything, chosen, generated, judge, aligner)
    facts["captions_cut"] = sum(map(is_cut, chosen.captions))
    facts["snapshots_sha256"] = {name: sha256_of(path) for name, path in (snapshots or {}).items()}
    results = assemble(findings, facts)
    looking = looks.Subject(generated, everything, chosen, variants, agreement, judge)
    looks.write(results, looking, at, sample=sample, shards=shards)
    finish(results, at)
    return results


def score(
    drawn: Path,
    heldout: Path,
    out: Path,
    config: EvaluateConfig,
    *,
    aligner: Path | None = None,
    device: torch.device | str = "cpu",
    statistics: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure pictures that are there already, in the layout of the GigaGAN authors' evaluator.

    `drawn` holds `fake_images/` and `captions.txt`, whose lines are the captions of the pictures in
    natural-sorted order. What needs a sampler (diversity, truncation, speed) is absent.
    """
    at = setting(config, out, device=device, statistics=statistics, progress=progress)
    _refuse_task(at, "text")
    generated, captions = read_drawn(drawn)
    everything = read_heldout(heldout)
    protocol.check_counts(
        at.rules, num_generated=len(generated), num_real=len(everything.all_pictures)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    chosen = _with_their_pictures(captions, everything)
    findings = Findings()
    judge = None if aligner is None else Aligner.load(aligner)
    agreement = _judge(findings, generated, everything, chosen, judge, at)
    for name in ("seconds_per_image", "lpips_diversity", "z_sensitivity"):
        findings.absent[name] = "the pictures were there already: there is no sampler to ask"
    facts = _describe(at, everything, chosen, generated, judge, aligner)
    facts |= {"seed": None, "truncation": None, "batch_size": None, "snapshots_sha256": {}}
    results = assemble(findings, facts)
    looking = looks.Subject(generated, everything, chosen, [], agreement, judge)
    looks.write(results, looking, at)
    finish(results, at)
    return results


def finish(results: dict[str, Any], at: Setting) -> None:
    """Write results.json, last, and clear away what it was computed from."""
    shutil.rmtree(at.out / "features", ignore_errors=True)
    report.write_json(at.out / "results.json", results)


def _refuse_task(at: Setting, task: str) -> None:
    if at.rules.task != task:
        raise protocol.ProtocolError(
            f"{at.rules.name} measures {at.rules.task!r}, not {task!r}: pictures from captions and "
            "enlarged pictures have protocols of their own"
        )


def _with_their_pictures(captions: list[str], everything: Heldout) -> Heldout:
    """These captions with the real picture of each, where the reference has the caption."""
    if set(captions) <= set(everything.captions):
        rows = [everything.captions.index(c) for c in captions]
        names = everything.backgrounds
        return replace(
            everything,
            captions=captions,
            pictures=[everything.pictures[i] for i in rows],
            backgrounds=None if names is None else [names[i] for i in rows],
        )
    return Heldout(captions, [], everything.all_pictures, None, None)


def assemble(findings: Findings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds, with what one looks at first in front."""
    return {
        "protocol": dict(facts),
        "metrics": dict(sorted(findings.metrics.items(), key=_headlines_first)),
        "intervals": {name: list(pair) for name, pair in findings.intervals.items()},
        "reference": {"real": findings.real, "chance": findings.chance},
        "absent": findings.absent,
    }


# ---- drawing -----------------------------------------------------------------------------------


def _generate(sample: Sample, captions: list[str], at: Setting) -> tuple[list[Path], float]:
    """Write images/*.png and captions.txt; return the files and the median seconds per image."""
    folder, config = at.out / "images", at.config
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier evaluation, perhaps a larger one
    folder.mkdir(parents=True)
    paths, seconds = [], []
    for start in range(0, len(captions), config.batch_size):
        batch = captions[start : start + config.batch_size]
        began = time.perf_counter()
        pictures = sample(batch, seed_of(config, start), config.truncation)
        seconds.append((time.perf_counter() - began) / len(batch))
        for number, picture in enumerate(pictures, start=start):
            paths.append(folder / f"{number:06d}.png")
            picture.save(paths[-1])
        at.progress("pictures", start + len(batch), len(captions))
    if len(paths) != len(captions):
        raise ValueError(f"the sampler returned {len(paths)} pictures for {len(captions)} captions")
    (at.out / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    return paths, median(seconds)


def _variants(sample: Sample, captions: list[str], at: Setting) -> Variants:
    """Draw a few captions, evenly spread over the list, with several latents each."""
    config = at.config
    num_prompts = min(config.diversity_prompts, len(captions))
    variants = []
    for number in range(num_prompts):
        caption = captions[number * len(captions) // num_prompts]
        # Beyond the seeds of the captions themselves.
        seed = seed_of(config, len(captions) + number)
        pictures = sample([caption] * config.diversity_seeds, seed, config.truncation)
        variants.append((caption, pictures))
        at.progress("variants", number + 1, num_prompts)
    return variants


# ---- judging -----------------------------------------------------------------------------------


def _judge(
    findings: Findings,
    generated: list[Path],
    everything: Heldout,
    chosen: Heldout,
    judge: Aligner | None,
    at: Setting,
) -> np.ndarray | None:
    """Every metric of pictures and captions; returns the agreement of each picture, if measured."""
    sets = features_of(generated, everything.all_pictures, at)
    measure_distances(findings, sets, at)
    if chosen.pictures:
        pairs = slice(_MAX_PAIRS)
        drawn_NHWC = pixels(generated[pairs], at.px)
        real_NHWC = pixels(chosen.pictures[pairs], at.px)
        _measure_pixels(findings, drawn_NHWC, real_NHWC, chosen, at.px)
    else:
        findings.absent["pixel_probe_median_rank"] = "captions without real pictures of their own"
    by_aligner = _measure_alignment(findings, judge, generated, chosen, at)
    by_clip = _measure_clip(findings, generated, chosen, at)
    return by_aligner if by_clip is None else by_clip


def judges(at: Setting) -> dict[str, Extractor]:
    """The extractors that the settings ask for, by what they serve."""
    wanted = {"inception": f"{INCEPTION}/{at.rules.resize}", "cmmd": at.config.cmmd}
    wanted["dinov2"] = at.config.dinov2
    return {use: extractor(name, at.device) for use, name in wanted.items() if name is not None}


Sets = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Features of generated and of real pictures, by use."""


def features_of(generated: Sequence[Path], real: Sequence[Path], at: Setting) -> Sets:
    """Both sets through every judge, each picture decoded once."""
    used = judges(at)
    settings: dict[str, Any] = {"transform": at.square, "batch_size": at.config.batch_size}
    settings["progress"] = at.progress
    ours = extract(generated, list(used.values()), folder=at.out / "features", **settings)
    theirs = reference(
        real,
        list(used.values()),
        transform_name=at.transform,
        cache=at.statistics,
        **settings,
    )
    return {use: (ours[one.name], theirs[one.name]) for use, one in used.items()}


def measure_distances(findings: Findings, sets: Sets, at: Setting) -> None:
    """FID, KID, precision and recall; CMMD and FD-DINOv2 where asked for."""
    config = at.config
    generated_ND, real_ND = sets["inception"]
    kernel: dict[str, Any] = {"subset_size": config.kid_subset_size, "seed": config.seed}
    kernel["num_subsets"] = config.kid_subsets
    order = np.random.default_rng(config.seed).permutation(len(real_ND))
    halves = [real_ND[rows] for rows in np.array_split(order, 2)]
    has_floor = min(map(len, halves)) >= 2
    kid = kernel_distance(generated_ND, real_ND, **kernel)
    fid = frechet_distance(generated_ND, real_ND)
    findings.add(
        "fid",
        fid,
        real=frechet_distance(*halves) if has_floor else None,
        interval=_interval(frechet_distance, sets["inception"], fid, config),
    )
    findings.add(
        "kid",
        kid.value,
        real=kernel_distance(*halves, **kernel).value if has_floor else None,
        interval=_interval(mmd2, sets["inception"], kid.value, config),
    )
    findings.add("kid_subset_mean", kid.subset_mean)
    findings.add("kid_subset_std", kid.subset_std)
    for use, name, distance in (
        ("cmmd", f"cmmd_{label(config.cmmd)}", cmmd),
        ("dinov2", f"fd_{label(config.dinov2)}", frechet_distance),
    ):
        if use in sets:
            findings.add(name, distance(*sets[use]))
    generated_ND, real_ND = generated_ND[:_MAX_PRDC], real_ND[:_MAX_PRDC]
    if min(len(generated_ND), len(real_ND)) > _NEIGHBOURS:
        for name, value in prdc(real_ND, generated_ND, neighbours=_NEIGHBOURS)._asdict().items():
            findings.add(name, value)
    else:
        findings.absent["precision"] = f"needs more than {_NEIGHBOURS} pictures on both sides"


def patch_distance(generated: Sequence[Path], real: Sequence[Path], at: Setting) -> float:
    """Patch-FID: the Fréchet distance of crops of both sets, at full resolution.

    One random place per picture, the same in both sets' pictures of one number, so that no detail
    is lost to Inception's small input (Chai et al. 2022).
    """
    side = at.rules.patch
    assert side is not None
    random = np.random.default_rng(at.config.seed)
    places = {
        path: random.integers(0, max(1, at.px - side + 1), 2)
        for paths in zip(sorted(generated), sorted(real), strict=False)
        for path in paths
    }

    def crop(picture: Any) -> Image.Image:
        left, top = (int(x) for x in places[picture])
        return at.square(picture).crop((left, top, left + side, top + side))

    judge = extractor(f"{INCEPTION}/{at.rules.resize}", at.device)
    settings: dict[str, Any] = {"transform": crop, "batch_size": at.config.batch_size}
    settings["progress"] = at.progress
    sets = [
        extract(sorted(paths), [judge], folder=at.out / "features" / name, **settings)[judge.name]
        for name, paths in (("patches", generated), ("patches-real", real))
    ]
    return frechet_distance(*sets)


def _interval(
    distance: Callable[[np.ndarray, np.ndarray], float],
    sets: tuple[np.ndarray, np.ndarray],
    value: float,
    config: EvaluateConfig,
) -> tuple[float, float] | None:
    """95 % interval of a distance between sets; None where it is not asked for or too few."""
    if not config.resamples or min(map(len, sets)) < 2 * _MIN_PART:
        return None
    found = subsampled(
        distance,
        *sets,
        value=value,
        resamples=max(2, min(config.resamples, _MAX_SUBSAMPLES)),
        share=min(0.5, _MAX_PART / max(map(len, sets))),
        seed=config.seed,
    )
    return found.low, found.high


def label(name: str | None) -> str:
    """A model's name as a part of a metric's."""
    return (name or "").removeprefix("open_clip:").replace("/", "_").replace(":", "_")


def _measure_pixels(
    findings: Findings, drawn_NHWC: np.ndarray, real_NHWC: np.ndarray, chosen: Heldout, px: int
) -> None:
    probe = alignment.pixel_probe_rank(drawn_NHWC, real_NHWC)
    findings.add("pixel_probe_median_rank", probe.median_rank, real=1, chance=probe.chance)
    if chosen.backgrounds is None or chosen.palette is None:
        reason = "the captions name no background colours of a known palette"
        findings.absent["background_colour_accuracy"] = reason
        return
    names = chosen.backgrounds[: len(drawn_NHWC)]
    findings.add(
        "background_colour_accuracy",
        alignment.background_colour_accuracy(drawn_NHWC, names, chosen.palette),
        real=alignment.background_colour_accuracy(real_NHWC, names, chosen.palette),
        chance=1 / len(chosen.palette),
    )
    if len(set(names)) < len(names):
        shape = alignment.shape_rank(drawn_NHWC, real_NHWC, names)
        findings.add("shape_rank", shape, real=0, chance=0.5)
    else:
        findings.absent["shape_rank"] = "no two pictures share a background"


def _measure_alignment(
    findings: Findings,
    judge: Aligner | None,
    generated: Sequence[Path],
    chosen: Heldout,
    at: Setting,
) -> np.ndarray | None:
    if judge is None:
        findings.absent["aligner_similarity"] = "no aligner was given"
        return None
    captions = chosen.captions[:_MAX_PAIRS]
    drawn_NE = embedded(judge, generated[:_MAX_PAIRS], at)
    texts = text_vectors(captions, pretrained.text_encoder(judge.text_encoder, at.device))
    texts_NE = judge.embed_texts(texts)
    real_NE = embedded(judge, chosen.pictures[:_MAX_PAIRS], at) if chosen.pictures else None
    each_N = alignment.similarities(drawn_NE, texts_NE)
    other_NE = texts_NE.roll(len(captions) // 2, dims=0)
    findings.add_mean(
        "aligner_similarity",
        each_N,
        at.config,
        real=None if real_NE is None else alignment.mean_similarity(real_NE, texts_NE),
        chance=None if real_NE is None else alignment.mean_similarity(real_NE, other_NE),
    )
    _add_recall(findings, "aligner", drawn_NE, real_NE, texts_NE, at)
    return each_N


def _add_recall(
    findings: Findings,
    judge: str,
    drawn_ND: torch.Tensor,
    real_ND: torch.Tensor | None,
    texts_ND: torch.Tensor,
    at: Setting,
) -> None:
    """R@1 and R@10 of pictures for their own captions, among the first pairs."""
    drawn_ND, texts_ND = drawn_ND[:_MAX_PAIRS], texts_ND[:_MAX_PAIRS]
    real_ND = None if real_ND is None else real_ND[:_MAX_PAIRS]
    for k in (1, 10):
        findings.add_mean(
            f"{judge}_recall_at_{k}",
            alignment.recalled(k, drawn_ND, texts_ND),
            at.config,
            real=None if real_ND is None else alignment.recall_at(k, real_ND, texts_ND),
            chance=min(1, k / len(texts_ND)),
        )


def _measure_clip(
    findings: Findings, generated: Sequence[Path], chosen: Heldout, at: Setting
) -> np.ndarray | None:
    """The CLIP score and R@k under the same encoder."""
    if at.clip is None:
        return None
    settings: dict[str, Any] = {"prefix": at.rules.clip_prefix, "device": at.device}
    settings["batch_size"] = at.config.batch_size
    drawn_ND, texts_ND = alignment.clip_vectors(generated, chosen.captions, at.clip, **settings)
    each_N = alignment.similarities(drawn_ND, texts_ND)
    real_ND = None
    if chosen.pictures:
        pictures = chosen.pictures
        real_ND, _ = alignment.clip_vectors(pictures, chosen.captions, at.clip, **settings)
    findings.add_mean(
        f"clip_score_{label(at.clip)}",
        each_N,
        at.config,
        real=None if real_ND is None else alignment.mean_similarity(real_ND, texts_ND),
    )
    _add_recall(findings, f"clip_{label(at.clip)}", drawn_ND, real_ND, texts_ND, at)
    return each_N


def _measure_diversity(findings: Findings, variants: Variants, at: Setting) -> None:
    if not variants:
        findings.absent["lpips_diversity"] = "diversity_prompts is 0"
        return
    images_PZHWC = np.stack([pixels(pictures, at.px) for _, pictures in variants])
    distance = pretrained.lpips("alex", at.device)
    findings.add("lpips_diversity", alignment.lpips_diversity(images_PZHWC, distance))
    findings.add("z_sensitivity", alignment.z_sensitivity(images_PZHWC))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


def _headlines_first(item: tuple[str, float]) -> int:
    """Sort key: what one looks at first, then the rest as measured."""
    name = item[0]
    return HEADLINES.index(name) if name in HEADLINES else len(HEADLINES)


# ---- what the result file says -----------------------------------------------------------------


def _describe(
    at: Setting,
    everything: Heldout,
    chosen: Heldout,
    generated: Sequence[Path],
    judge: Aligner | None,
    aligner: Path | None,
) -> dict[str, Any]:
    """What was drawn, how both sets were prepared, and who judged."""
    config = at.config
    facts = describe_rules(at, chosen.captions, everything.all_pictures, generated)
    names = [INCEPTION]
    names += ["lpips-alex"] if config.diversity_prompts else []
    names += [judge.image_encoder, judge.text_encoder] if judge is not None else []
    names += [name for name in (at.clip, config.cmmd, config.dinov2) if name is not None]
    if at.rules.name in ("embedded-heldout", "coco-captions"):
        is_embedded = everything.palette is not None
        kind = config.protocol if is_embedded else "coco-captions"
        facts["name"] = f"{kind}-{at.px}"
    facts |= {
        "num_pairs": min(_MAX_PAIRS, len(chosen.captions)),
        "diversity": {"prompts": config.diversity_prompts, "seeds": config.diversity_seeds},
        "weights_sha256": {name: pretrained.sha256(name) for name in names},
        "aligner": None,
        "clip": None,
    }
    if judge is not None and aligner is not None:
        facts["aligner"] = {
            "image_encoder": judge.image_encoder,
            "text_encoder": judge.text_encoder,
            "image_px": judge.image_px,
            "sha256": sha256_of(aligner),
        }
    if at.clip is not None:
        facts["clip"] = {"model": at.clip, "prefix": at.rules.clip_prefix}
    return facts


def describe_rules(
    at: Setting, captions: Sequence[str], real: Sequence[Path], generated: Sequence[Path]
) -> dict[str, Any]:
    """The part of a result's `protocol` that every task has."""
    config = at.config
    lines = "".join(f"{caption}\n" for caption in captions)
    with Image.open(generated[0]) as first:
        generated_size = list(first.size)
    storage = sorted({path.suffix.lstrip(".").upper() for path in generated})
    return {
        "name": at.rules.name,
        "task": at.rules.task,
        "num_generated": len(generated),
        "num_real": len(real),
        "captions_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "reference_sha256": _content(real),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "truncation": config.truncation,
        "generated_size": generated_size,
        "resolution": at.px,
        "crop": "centre square of the short side, both sets",
        "resize": f"Pillow Lanczos to {at.px} px, then {_TO_299[at.rules.resize]} to 299 px",
        "storage": "+".join(storage),
        "kid": {"subset_size": config.kid_subset_size, "subsets": config.kid_subsets},
        "resamples": config.resamples,
    }


_TO_299 = {"clean": "clean-fid 'clean'", "legacy": "TensorFlow 1 bilinear (clean-fid 'legacy')"}


def _content(pictures: Sequence[Path]) -> str:
    """Hash of the pictures' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for picture in sorted(pictures, key=lambda path: natural(path.name)):
        digest.update(sha256_of(picture).encode())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixels(pictures: Sequence[Path | Image.Image], px: int) -> np.ndarray:
    """Pictures as the judges see them [N, H, W, 3]."""
    return np.stack([np.asarray(square(picture, px)) for picture in pictures])
