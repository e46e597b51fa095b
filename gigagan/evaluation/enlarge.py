"""An upsampler's evaluation: real pictures made small, enlarged again, held against themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from gigagan.common.files import sha256_of
from gigagan.common.progress import Progress, silent
from gigagan.config import EvaluateConfig
from gigagan.evaluation import drawing, judging, measure, protocol
from gigagan.evaluation.devices import Device
from gigagan.evaluation.findings import Findings, assemble, describe_rules
from gigagan.evaluation.heldout import Asks, Heldout, read_heldout, subset
from gigagan.evaluation.judges import fidelity
from gigagan.evaluation.judges.features import open_rgb, square
from gigagan.evaluation.report import looks
from gigagan.evaluation.setting import Setting, setting
from gigagan.models import pretrained

PLAIN = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Enlargement without a network, by Pillow: what an upsampler has to beat."""

Upscale = Callable[[list[Image.Image], list[str], int], list[Image.Image]]
"""(small pictures, captions, seed) → large ones."""


def evaluate(
    upscale: Upscale,
    heldout: Path,
    out: Path,
    config: EvaluateConfig,
    *,
    asks: Asks = "text",
    classes: Sequence[str] = (),
    snapshots: Mapping[str, Path] | None = None,
    devices: Sequence[Device] = ("cpu",),
    statistics: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure an upsampler by FID, KID, patch-FID, LPIPS, PSNR and SSIM; writes as `measure` does.

    Small versions are Pillow Lanczos of the centre square; each is enlarged with its own caption,
    or class, or with nothing, as `asks` says that the upsampler reads.
    LPIPS, PSNR and SSIM of plain enlargement stand beside them as `bilinear_…`, `bicubic_…` and
    `lanczos_…`.

    Raises:
        ProtocolError: settings or counts that the protocol does not allow; nothing is drawn.
        PictureError: unreadable pictures in the reference.
    """
    at = setting(config, out, devices=devices, statistics=statistics, progress=progress)
    if at.rules.task != "upsample":
        raise protocol.ProtocolError(f"{at.rules.name} does not measure upsamplers")
    small_px = at.rules.input_resolution
    assert small_px is not None, "every protocol for upsamplers names its input"
    everything = read_heldout(heldout).told(asks, classes)
    chosen = subset(everything, at.config.num_images, config.seed)
    protocol.check_counts(
        at.rules, num_generated=len(chosen.captions), num_real=len(everything.all_pictures)
    )
    (out / "results.json").unlink(missing_ok=True)
    findings = Findings()
    drawn, seconds = drawing.draw(
        lambda rows, seed: upscale(
            [square(picture, small_px) for picture in chosen.pictures[rows]],
            chosen.captions[rows],
            seed,
        ),
        len(chosen.captions),
        at,
    )
    findings.add("seconds_per_image", seconds)
    sets = judging.features_of(drawn, everything.all_pictures, at)
    judging.measure_distances(findings, sets, at)
    if at.rules.patch is not None:
        value = judging.patch_distance(drawn, everything.all_pictures, at)
        findings.add("patch_fid", value)
    _measure_fidelity(findings, drawn, chosen, small_px, at)

    facts = describe_rules(at, chosen.captions, everything.all_pictures, drawn)
    names = ("inception-2015-12-05", "lpips-alex")
    facts |= {
        "input_resolution": small_px,
        "patch": at.rules.patch,
        "shrink": f"Pillow Lanczos of the centre square to {small_px} px",
        "weights_sha256": {name: pretrained.sha256(name) for name in names},
        "snapshots_sha256": {n: sha256_of(path) for n, path in (snapshots or {}).items()},
    }
    results = assemble(findings, facts)
    subject = looks.Subject(drawn, everything, chosen, [], None, None)
    looks.write(results, subject, at)
    measure.finish(results, at)
    return results


def _measure_fidelity(
    findings: Findings, drawn: Sequence[Path], chosen: Heldout, small_px: int, at: Setting
) -> None:
    """Pairs of output and target, a few at a time, and plain enlargements of the same input."""
    network = pretrained.lpips("alex", at.device)
    ours: dict[str, list[np.ndarray]] = {}
    plain: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(drawn), at.config.batch_size):
        rows = slice(start, start + at.config.batch_size)
        real_NHWC = judging.pixels(chosen.pictures[rows], at.px)
        small = [square(picture, small_px) for picture in chosen.pictures[rows]]
        made_NHWC = judging.pixels([open_rgb(p) for p in drawn[rows]], at.px)
        for name, values_N in compare(made_NHWC, real_NHWC, network).items():
            ours.setdefault(name, []).append(values_N)
        for method in PLAIN:
            made_NHWC = plainly(small, at.px, method)
            for name, values_N in compare(made_NHWC, real_NHWC, network).items():
                plain.setdefault(f"{method}_{name}", []).append(values_N)
    for name, parts in ours.items():
        findings.add_mean(name, np.concatenate(parts), at.config)
    for name, parts in plain.items():
        findings.add(name, float(np.concatenate(parts).mean()))


def plainly(small: Sequence[Image.Image], px: int, method: str) -> np.ndarray:
    """Pictures enlarged to `px` by one of `PLAIN`, uint8 N H W C."""
    return np.stack([np.asarray(picture.resize((px, px), PLAIN[method])) for picture in small])


def compare(
    made_NHWC: np.ndarray, real_NHWC: np.ndarray, network: nn.Module
) -> dict[str, np.ndarray]:
    """LPIPS by `network`, PSNR in dB and SSIM [N] of pairs of uint8 pictures, by their names."""
    return {
        "lpips": fidelity.lpips_pairs(made_NHWC, real_NHWC, network),
        "psnr": fidelity.psnr(made_NHWC, real_NHWC),
        "ssim": fidelity.ssim(made_NHWC, real_NHWC),
    }
