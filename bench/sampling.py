"""Drawing and enlarging against gigagan-pytorch and aura-sr: latency, throughput, megapixels.

Networks and rules are those of `bench model` (parameters alike, processes of their own, candidates
in turns). `draw-N` makes N pictures of 64 px from text (theirs: without) in one call: one picture
is latency, the best of the others throughput. `large-S` makes one picture of S × S px from one of a
quarter of the side, in tiles of 64 px: ours overlap by three eighths and share a style, aura-sr's
own `upscale_4x_overlapped` goes over the picture twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from bench import model, rivals
from bench.model import BASES, CONFIGS, OURS, UPSAMPLER, UPSAMPLERS, compete, measured, median
from bench.rivals import Calls, Parts, without_gradients
from gigagan.inference import tiles
from gigagan.models.baking import bake
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler

SIDE = 64
BATCHES = (1, 4, 16, 64)
LARGE = (1024, 2048, 4096)
TASKS = {
    "draw": tuple(f"draw-{batch}" for batch in BATCHES),
    "large": tuple(f"large-{side}" for side in LARGE),
}
CANDIDATES = tuple(dict.fromkeys(BASES + UPSAMPLERS))


def draw(batch: int) -> tuple[Parts, Calls]:
    """Ours from latents and text; baked where there is one style."""
    network = Generator(CONFIGS[SIDE].generator).eval().requires_grad_(False)
    z_BZ, features = torch.randn(batch, network.config.latent_dim), model.features(batch)
    calls: Calls = {"draw": lambda: without_gradients(lambda: network(z_BZ, features))}
    if batch == 1:
        text = network.read(features)
        baked = bake(network, network.style(z_BZ, text)[0], text)
        calls["draw, baked"] = lambda: without_gradients(baked)
    return {"G": network}, calls


def large(side: int) -> tuple[Parts, Calls]:
    """Ours over one picture of a quarter of `side`."""
    network = Upsampler(UPSAMPLER).eval().requires_grad_(False)
    tile = network.config.input_resolution
    factor = network.config.resolution // tile
    small_CHW = torch.rand(3, side // factor, side // factor) * 2 - 1
    noise_CHW = torch.randn_like(small_CHW)
    text = network.read(TextFeatures(*(part[:1] for part in model.features(1))))
    style_1S = network.style(torch.randn(1, network.config.latent_dim), text)
    baked = bake(network, style_1S[0], text)

    def over(step: Callable[..., Any]) -> object:
        settings = {"tile": tile, "factor": factor, "overlap": tiles.usual_overlap(tile)}
        return without_gradients(lambda: tiles.enlarge(small_CHW, noise_CHW, step, **settings))

    return {"upsampler": network}, {
        "enlarge": lambda: over(lambda x, n: network.synthesize(x, n, style_1S, text)[0]),
        "enlarge, baked": lambda: over(lambda x, n: baked(x, n)[0]),
    }


def rivals_draw(layout: str, batch: int) -> tuple[Parts, Calls]:
    """gigagan-pytorch from latents."""
    parts, calls = rivals.sample(layout, SIDE, batch)
    return parts, {"draw": calls["sample"]}


def rivals_large(side: int) -> tuple[Parts, Calls]:
    """aura-sr over one picture, as its own package does it."""
    from aura_sr import AuraSR

    upscaler = AuraSR(dict(rivals.AURA_SR), device="cpu")
    network = upscaler.upsampler.eval()
    small = Image.effect_noise((side // 4, side // 4), 60).convert("RGB")
    call = lambda: without_gradients(lambda: upscaler.upscale_4x_overlapped(small))  # noqa: E731
    return {"upsampler": network}, {"enlarge": call}


def child(candidate: str, task: str) -> dict[str, Any]:
    """Measure one task of this file in this process."""
    kind, size = task.split("-")
    if candidate == OURS:
        build = {"draw": draw, "large": large}[kind]
        return measured(candidate, lambda: build(int(size)), with_gmac=False)
    if kind == "draw":
        return measured(candidate, lambda: rivals_draw(candidate, int(size)), with_gmac=False)
    return measured(candidate, lambda: rivals_large(int(size)), with_gmac=False)


def main(
    rounds: int = 3, what: Sequence[str] = tuple(TASKS), candidates: Sequence[str] = CANDIDATES
) -> None:
    """Latency, throughput and megapixels against gigagan-pytorch and aura-sr."""
    for kind in what:
        of_kind = UPSAMPLERS if kind.startswith("large") else BASES
        for task in TASKS.get(kind, (kind,)):
            found = compete(__name__, task, of_kind, {OURS, *candidates}, rounds)
            show(task, found)


def show(task: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians a picture or a megapixel, and how many times those of ours; peak memory."""
    kind, size = task.split("-")
    count = int(size) if kind == "draw" else int(size) ** 2 / 1e6
    unit = "picture" if kind == "draw" else "megapixel"
    print(f"\n{kind}, {'batch ' + size if kind == 'draw' else size + ' px a side'}")
    ours = None
    for name, runs in found.items():
        million = sum(runs[0]["parameters"].values()) / 1e6
        for row in runs[0]["rows"]:
            ms, mb = (median(run["rows"][row][key] for run in runs) for key in ("ms", "mb"))
            new_mb = mb - median(run["before"] for run in runs)
            ours = ours or ms
            print(
                f"  {name + ', ' + row:40}{million:7.2f} M {ms / count:9.1f} ms a {unit} "
                f"(×{ms / ours:.2f})  peak {mb:5.0f} MB, new {new_mb:5.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.sampling")
    parser.add_argument("--candidate", required=True, choices=CANDIDATES)
    parser.add_argument("--task", required=True)
    arguments = parser.parse_args()
    print(json.dumps(child(arguments.candidate, arguments.task)))
