"""Which features tell generated pictures from real ones? Fits the probe that the package ships.

Real pictures are those of a gallery, generated ones what the package's networks draw for the same
captions, at 32 px and enlarged to 128. Both go through the same sizes and encodings first, so that
neither sharpness nor JPEG tells them apart; crops of scikit-learn's two photographs join, as they
are and by way of the package's upsampler. A quarter of the concepts is for testing alone, and so
are the networks named by `--unseen` and the photographs of `--photographs`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import sklearn
import torch
from PIL import Image
from scipy.fft import dctn
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from gigagan.common.files import sha256_of
from gigagan.evaluation.heldout import read_gallery
from gigagan.inference.sampler import load
from gigagan.models import generated, pretrained, tensors

Pictures = list[Image.Image]
Features = Callable[[Pictures], np.ndarray]
SIDES = (32, 48, 64, 96, 128, 128, 128)
ENCODINGS = ("PNG", "PNG", "JPEG", "JPEG", "WEBP")
RING = 32
"""Bins of the radial spectrum."""
TRAINING_PHOTOS = sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
PHOTOGRAPHS = "other photographs"
PENALTY = 0.1
"""Inverse strength of the logistic regression's L2, on features of unit variance."""


def resized(picture: Image.Image, side: int) -> Image.Image:
    """To `side` px by Lanczos."""
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def encoded(picture: Image.Image, codec: str, quality: int) -> Image.Image:
    """Written and read again."""
    buffer = io.BytesIO()
    picture.save(buffer, codec, quality=quality)
    return Image.open(buffer).convert("RGB")


def varied(pictures: Pictures, seed: int) -> Pictures:
    """Each made smaller and large again, and encoded, by chance."""
    chance = random.Random(seed)
    found = []
    for picture in pictures:
        small = resized(picture, chance.choice(SIDES))
        codec = chance.choice(ENCODINGS)
        found.append(encoded(resized(small, generated.SIDE), codec, chance.randint(60, 95)))
    return found


def spectrum(pictures: Pictures) -> np.ndarray:
    """Log magnitude of the DCT of luma over rings of equal frequency (Frank et al. 2020), N R."""
    gray = [np.asarray(generated.crop(p).convert("L"), np.float32) / 127.5 - 1 for p in pictures]
    log_NHW = np.log(np.abs(dctn(np.stack(gray), axes=(1, 2), norm="ortho")) + 1e-3)
    down_HW, across_HW = np.indices(log_NHW.shape[1:])
    radius_HW = np.hypot(down_HW, across_HW)
    ring = np.minimum(radius_HW / radius_HW.max() * RING, RING - 1).astype(int).ravel()
    sums = [np.bincount(ring, log_HW.ravel(), RING) for log_HW in log_NHW]
    return np.stack(sums) / np.bincount(ring, minlength=RING)


def readers() -> dict[str, Features]:
    """What is compared, the shipped probe's features first."""
    cpu = torch.device("cpu")
    encoder = pretrained.image_encoder("embedded:efficientnet-lite0")
    early = pretrained.probe_encoder(cpu)

    def of(read: generated.Read) -> Features:
        return lambda pictures: generated.features(pictures, generated.crop, read, cpu).numpy()

    return {
        "strides 2, 4, 8": of(generated.stage_statistics(early)),
        "pooled vector": of(lambda x: encoder(x).pooled_BD),
        "DCT spectrum": spectrum,
    }


def drawn(captions: Sequence[str], base: str | None, upsampler: str | None, seed: int) -> Pictures:
    """What a network makes of captions, enlarged by Lanczos if it is small; none: the package's."""
    sampler = load(base, upsampler)
    pictures = sampler.sample(captions, seed=seed, upscale=sampler.upsampler is not None)
    return [p if p.width == generated.SIDE else resized(p, generated.SIDE) for p in pictures]


def small(pictures: Pictures) -> Pictures:
    """As of 32 px, enlarged."""
    return [resized(resized(p, 32), generated.SIDE) for p in pictures]


def crops(photos: Sequence[Path], count: int, seed: int) -> Pictures:
    """Squares of photographs at random places and scales, `count` of each."""
    chance, found = random.Random(seed), []
    for path in photos:
        photo = Image.open(path).convert("RGB")
        for _ in range(count):
            side = chance.randint(generated.SIDE, min(photo.size))
            left, top = (chance.randint(0, whole - side) for whole in photo.size)
            found.append(resized(photo.crop((left, top, left + side, top + side)), generated.SIDE))
    return found


def reinvented(pictures: Pictures, upsampler: str | None = None) -> Pictures:
    """Made small, and enlarged by an upsampler: generated texture on anybody's content."""
    sampler = load(*(None, None) if upsampler is None else (published_base(), upsampler))
    tiny = [resized(picture, sampler.base.config.resolution) for picture in pictures]
    return sampler.upscale(tiny, ["a photograph"] * len(tiny), faithful=False)


def published_base() -> str:
    """The package's base alone."""
    return str(load().snapshots["base"])


def fit(real: np.ndarray, fake: np.ndarray) -> Pipeline:
    """Logistic regression on standardised features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=5_000))
    is_fake = np.r_[np.zeros(len(real)), np.ones(len(fake))]
    return model.fit(np.concatenate([real, fake]), is_fake)


def save(model: Pipeline, path: Path, kept_back: Collection[str]) -> None:
    """The fitted probe as one affine map of raw features, as `generated.embedded` reads it.

    It says of which concepts no picture was fitted to.
    """
    scaler, linear = model.named_steps["standardscaler"], model.named_steps["logisticregression"]
    weight_D = linear.coef_[0] / scaler.scale_
    bias = linear.intercept_ - weight_D @ scaler.mean_
    about = {"networks": _package(), "kept_back": sorted(kept_back)}
    # A single entry: the order of several is not fixed, and equal weights shall be equal bytes.
    map_ = {"weight_D": torch.from_numpy(weight_D), "bias_1": torch.from_numpy(bias)}
    tensors.write(
        path, {name: value.float() for name, value in map_.items()}, {"probe": json.dumps(about)}
    )


def _package() -> dict[str, str]:
    return {name: sha256_of(path) for name, path in load().snapshots.items()}


def table(
    models: dict[str, tuple[Features, Pipeline]],
    real: dict[str, Pictures],
    fake: dict[str, Pictures],
) -> str:
    """AUC of generated against real pictures, and the share of real ones above one half."""
    heads = ["", *models]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * len(models)]
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
    for name, (read, model) in models.items():
        for kind, pictures in (real | fake).items():
            scores[name][kind] = model.predict_proba(read(pictures))[:, 1]
    for kind, pictures in fake.items():
        same = PHOTOGRAPHS if kind.startswith(PHOTOGRAPHS) else "emoji"
        is_fake = np.r_[np.zeros(len(real[same])), np.ones(len(pictures))]
        cells = [roc_auc_score(is_fake, np.r_[s[same], s[kind]]) for s in scores.values()]
        lines.append(f"| AUC, {kind} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    for kind in real:
        cells = [float((s[kind] > 0.5).mean()) for s in scores.values()]
        lines.append(f"| false alarms, {kind} | {' | '.join(f'{c:.0%}' for c in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, fit, test, and write both the weights and a table."""
    root = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root.add_argument("--heldout", type=Path, required=True, help="folder with a gallery.json")
    root.add_argument("--out", type=Path, required=True)
    root.add_argument("--pictures", type=int, default=500, help="of each kind (%(default)s)")
    root.add_argument(
        "--unseen", nargs="+", action="append", default=[], metavar=("NAME", "SNAPSHOT"),
        help="a name, a base, and perhaps an upsampler, to test on; may be repeated",
    )  # fmt: skip
    root.add_argument("--photographs", type=Path, nargs="*", default=[], help="to test on")
    args = root.parse_args()
    gallery = read_gallery(args.heldout)
    if gallery is None:
        raise SystemExit(f"{args.heldout} has no gallery.json: give the download's heldout folder")

    # One picture of every concept in every style, the concepts parted.
    works = [work for work in gallery.works if work.split != "unseen"]
    random.Random(0).shuffle(works)
    works = list({(work.concept, work.style): work for work in works}.values())[: args.pictures]
    concepts = sorted({work.concept for work in works})
    random.Random(1).shuffle(concepts)
    kept_back = set(concepts[: len(concepts) // 4])
    train = [work for work in works if work.concept not in kept_back]
    test = [work for work in works if work.concept in kept_back]
    captions = {"train": [w.caption for w in train], "test": [w.caption for w in test]}
    base = published_base()

    # The same encodings and sizes for both, and photographs among both.
    photos = crops(TRAINING_PHOTOS, args.pictures // 8, seed=7)
    real = [Image.open(work.picture).convert("RGB") for work in train] + photos
    large = drawn(captions["train"], None, None, seed=1) + reinvented(photos)
    tiny = drawn(captions["train"], base, None, seed=2) + reinvented(photos)
    fakes = [*large, *varied(large, 4), *varied(tiny, 5)]
    reals = [*real, *varied(real, 3), *varied(real, 6)]
    models = {name: (read, fit(read(reals), read(fakes))) for name, read in readers().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save(models["strides 2, 4, 8"][1], args.out / "generated-v1.safetensors", kept_back)

    # Concepts, networks, photographs and sizes that it has not seen.
    own = drawn(captions["test"], None, None, seed=3)
    unseen_photos = crops(args.photographs, args.pictures // 20, seed=8) if args.photographs else []
    fake = {
        "the package's pair": own,
        "… as JPEG of quality 75": [encoded(p, "JPEG", 75) for p in own],
        "the package's base, 32 px enlarged": drawn(captions["test"], base, None, seed=3),
    }
    held = [Image.open(work.picture).convert("RGB") for work in test]
    true = {
        "emoji": held,
        "emoji as JPEG of quality 75": [encoded(p, "JPEG", 75) for p in held],
        "emoji of 32 px, enlarged": small(held),
    }
    for name, *networks in args.unseen:
        unseen, upsampler = (*networks, None)[:2]
        fake[f"{name}, unseen"] = drawn(captions["test"], unseen, upsampler, seed=3)
    if unseen_photos:
        true[PHOTOGRAPHS] = unseen_photos
        true[f"{PHOTOGRAPHS} of 32 px, enlarged"] = small(unseen_photos)
        fake[f"{PHOTOGRAPHS} by the package's upsampler"] = reinvented(unseen_photos)
        for name, _, *upsampler in args.unseen:
            if upsampler:
                fake[f"{PHOTOGRAPHS} by {name}"] = reinvented(unseen_photos, upsampler[0])
    text = table(models, true, fake)
    (args.out / "generated.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
