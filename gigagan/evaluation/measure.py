"""An evaluation: pictures for captions, held against real ones, to one folder of results.

Captions nobody trained on are drawn (or a folder of drawn pictures is taken as it is) and compared
with the real pictures of the set, by the rules of a named protocol. All that a number depends on
stands beside it in results.json, written last; a metric that cannot be computed is absent with a
reason, never zero.
"""

from __future__ import annotations

import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gigagan.common.files import sha256_of
from gigagan.common.progress import Progress, silent
from gigagan.config import EvaluateConfig
from gigagan.evaluation import dissect, drawing, naming, protocol
from gigagan.evaluation.classes import in_equal_shares
from gigagan.evaluation.devices import Device
from gigagan.evaluation.findings import Findings, assemble, describe
from gigagan.evaluation.heldout import Asks, Gallery, Heldout, read_drawn, read_heldout, subset
from gigagan.evaluation.judging import judge_all, measure_diversity
from gigagan.evaluation.naming import Drawn
from gigagan.evaluation.report import looks
from gigagan.evaluation.report.results import write_json
from gigagan.evaluation.setting import Sample, Setting, setting
from gigagan.models.aligner import Aligner


def evaluate(
    sample: Sample,
    heldout: Path,
    out: Path,
    config: EvaluateConfig,
    *,
    aligner: Path | None = None,
    shards: Path | None = None,
    snapshots: Mapping[str, Path] | None = None,
    generator: dissect.Generator | None = None,
    asks: Asks = "text",
    classes: Sequence[str] = (),
    is_cut: Callable[[str], bool] = lambda caption: False,
    devices: Sequence[Device] = ("cpu",),
    statistics: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw captions, measure, and write images/, captions.txt, grids, report.html, results.json.

    A set with a gallery also gets naming/, pictures of further captions that are to be named.

    `aligner` is the file fitted by the filter; `shards` holds training pictures, in which nearest
    neighbours are looked for; `snapshots` are the weight files under test, recorded by hash, and
    `generator` is dissected;
    `asks` says what the networks are told: with `class` the names of the held-out pictures'
    classes are drawn (or, by a protocol for classes, all `classes` in equal shares), with
    `nothing` empty prompts;
    `is_cut` tells captions that the generator does not read to their end, which are counted;
    `statistics` keeps features of reference sets over evaluations. Returns what results.json holds:
    `protocol`, `metrics` (flat floats), `intervals`, `reference` (`real` and `chance`, by the same
    names) and `absent` (reasons).

    Raises:
        ProtocolError: settings or counts that the protocol does not allow; nothing is drawn.
        PictureError: unreadable pictures in the reference.
    """
    at = setting(config, out, devices=devices, statistics=statistics, progress=progress)
    _refuse_condition(at, asks)
    everything = read_heldout(heldout).told(asks, classes)
    if asks != "text":
        at, aligner = replace(at, config=at.config.model_copy(update={"clip": None})), None
    chosen = _to_draw(everything, classes, at)
    protocol.check_counts(
        at.rules, num_generated=len(chosen.captions), num_real=len(everything.all_pictures)
    )
    (out / "results.json").unlink(missing_ok=True)  # an older result beside newer pictures lies
    findings = Findings()

    generated, seconds = drawing.draw(
        lambda rows, seed: sample(chosen.captions[rows], seed, config.truncation),
        len(chosen.captions),
        at,
    )
    lines = "".join(f"{caption}\n" for caption in chosen.captions)
    (out / "captions.txt").write_text(lines)
    findings.add("seconds_per_image", seconds)
    drawn = _to_name(everything.gallery, generated, chosen.captions, at, sample)
    judge = None if aligner is None else Aligner.load(aligner)
    agreement = judge_all(findings, generated, everything, chosen, judge, at, drawn)
    variants = drawing.variants(sample, chosen.captions, at)
    measure_diversity(findings, variants, at)
    dissection = dissect.measure(findings, generator, everything.gallery, at)

    facts = describe(at, everything, chosen, generated, judge, aligner)
    facts["captions_cut"] = sum(map(is_cut, chosen.captions))
    facts["snapshots_sha256"] = {name: sha256_of(path) for name, path in (snapshots or {}).items()}
    results = assemble(findings, facts)
    looking = looks.Subject(
        generated, everything, chosen, variants, agreement, judge, drawn, dissection
    )
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
    devices: Sequence[Device] = ("cpu",),
    statistics: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure pictures that are there already, in the layout of the GigaGAN authors' evaluator.

    `drawn` holds `fake_images/` and `captions.txt`, whose lines are the captions of the pictures in
    natural-sorted order. What needs a sampler (diversity, truncation, speed) is absent. Captions
    that are not held out have no real picture: what needs one is of the others, which are counted
    as `num_with_real`.
    """
    at = setting(config, out, devices=devices, statistics=statistics, progress=progress)
    _refuse_condition(at, "text")
    generated, captions = read_drawn(drawn)
    everything = read_heldout(heldout)
    protocol.check_counts(
        at.rules, num_generated=len(generated), num_real=len(everything.all_pictures)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    chosen = _chosen(captions, generated, everything)
    findings = Findings()
    judge = None if aligner is None else Aligner.load(aligner)
    to_name = _to_name(everything.gallery, generated, captions, at)
    agreement = judge_all(findings, generated, everything, chosen, judge, at, to_name)
    for name in ("seconds_per_image", "lpips_diversity", "z_sensitivity", "dissection"):
        findings.absent[name] = "the pictures were there already: there is no sampler to ask"
    facts = describe(at, everything, chosen, generated, judge, aligner)
    facts |= {"seed": None, "truncation": None, "batch_size": None, "snapshots_sha256": {}}
    results = assemble(findings, facts)
    looking = looks.Subject(generated, everything, chosen, [], agreement, judge, to_name)
    looks.write(results, looking, at)
    finish(results, at)
    return results


def _to_name(
    gallery: Gallery | None,
    generated: Sequence[Path],
    captions: list[str],
    at: Setting,
    sample: Sample | None = None,
) -> list[Drawn]:
    """Pictures for captions of the gallery: of those drawn anyway, and naming/ drawn beside them.

    Without a sampler there are only the former.
    """
    shutil.rmtree(at.out / "naming", ignore_errors=True)
    if gallery is None:
        return []
    asked_for: dict[str, Any] = {"count": at.config.naming_captions}
    asked_for["splits"] = at.config.naming_splits
    anyway, beside = naming.plan(gallery, captions, **asked_for)
    by_caption = dict(zip(captions, generated, strict=True))
    drawn = [Drawn(place, by_caption[gallery.works[place].caption]) for place in anyway]
    if sample is None or not beside:
        return drawn
    asked = [gallery.works[place].caption for place in beside]
    pictures, _ = drawing.draw(
        lambda rows, seed: sample(asked[rows], seed, at.config.truncation),
        len(asked),
        at,
        folder=at.out / "naming" / "images",
        first=len(captions) + at.config.diversity_prompts,
    )
    lines = "".join(f"{caption}\n" for caption in asked)
    (at.out / "naming" / "captions.txt").write_text(lines)
    return drawn + [Drawn(*pair) for pair in zip(beside, pictures, strict=True)]


def finish(results: dict[str, Any], at: Setting) -> None:
    """Write results.json, last, and clear away what it was computed from."""
    shutil.rmtree(at.out / "features", ignore_errors=True)
    write_json(at.out / "results.json", results)


def _refuse_condition(at: Setting, asks: Asks) -> None:
    """Refuse networks that are told what the protocol does not draw."""
    if at.rules.task == asks or (at.rules.is_ours and at.rules.task == "text"):
        return
    raise protocol.ProtocolError(
        f"{at.rules.name} measures {at.rules.task!r}, not {asks!r}: pictures from captions, of "
        "classes and enlarged ones have protocols of their own; embedded-heldout and coco-captions "
        "take networks that are told captions, classes or nothing"
    )


def _to_draw(everything: Heldout, classes: Sequence[str], at: Setting) -> Heldout:
    """What is drawn; the real picture beside it is its own, or of its class, or none."""
    if at.rules.task == "class":
        asked = in_equal_shares(classes, at)
        return replace(everything, captions=asked, pictures=[], rows=[], labels=asked)
    chosen = subset(everything, at.config.num_images, at.config.seed)
    return replace(chosen, pictures=[], rows=[]) if everything.asks == "nothing" else chosen


def _chosen(captions: list[str], drawn: Sequence[Path], everything: Heldout) -> Heldout:
    """The captions of drawn pictures with the real pictures of those that are held out."""
    places = _places(captions, drawn, everything)
    rows = [row for row, place in enumerate(places) if place is not None]
    found = [place for place in places if place is not None]
    names = everything.backgrounds
    return replace(
        everything,
        captions=captions,
        pictures=[everything.pictures[place] for place in found],
        backgrounds=None if names is None else [names[place] for place in found],
        rows=rows,
    )


def _places(
    captions: Sequence[str], drawn: Sequence[Path], everything: Heldout
) -> list[int | None]:
    """Place of each caption among the held-out ones, if it is there.

    Of a caption that describes several pictures a drawn one with the number of one of these in its
    name gets that one, and the others get those that are left, in their order.
    """
    left: dict[str, deque[int]] = {}
    for place, caption in enumerate(everything.captions):
        left.setdefault(caption, deque()).append(place)
    found: list[int | None] = [None] * len(captions)
    for by_number in (True, False):
        for row, (caption, picture) in enumerate(zip(captions, drawn, strict=True)):
            own = left.get(caption)
            if found[row] is not None or own is None:
                continue
            number = _number(picture)
            fit = (p for p in own if not by_number or _number(everything.pictures[p]) == number)
            taken = next(fit, None)
            if taken is not None:
                found[row] = taken
                own.remove(taken)
                own.append(taken)  # comes again once all are taken
    return found


def _number(picture: Path) -> int | None:
    """The number at the end of a name, as in COCO_val2014_000000000042.jpg."""
    digits = re.search(r"\d+$", picture.stem)
    return int(digits[0]) if digits else None
