"""Captions or small pictures to files, a batch on each device at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from PIL import Image

from gigagan.evaluation.devices import deal
from gigagan.evaluation.setting import Sample, Setting, Variants, seed_of

Make = Callable[[slice, int], Sequence[Image.Image]]
"""(rows of the list, seed) → a picture for each row."""


def draw(
    make: Make, count: int, at: Setting, *, folder: Path | None = None, first: int = 0
) -> tuple[list[Path], float]:
    """Write 000000.png… to a folder (images/); return the files and the median seconds per picture.

    What is drawn depends on batch size, seed and `first`, the position from which seeds are
    counted, not on the number of devices.
    """
    folder, size = folder or at.out / "images", at.config.batch_size
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier evaluation, perhaps a larger one
    folder.mkdir(parents=True)

    def batch(start: int) -> tuple[list[Path], float]:
        rows = slice(start, min(start + size, count))
        began = time.perf_counter()
        pictures = make(rows, seed_of(at.config, first + start))
        seconds = (time.perf_counter() - began) / (rows.stop - start)
        if len(pictures) != rows.stop - start:
            raise ValueError(f"{len(pictures)} pictures came back for {rows.stop - start} captions")
        paths = [folder / f"{number:06d}.png" for number in range(start, rows.stop)]
        for path, picture in zip(paths, pictures, strict=True):
            picture.save(path)
        return paths, seconds

    paths: list[Path] = []
    seconds = []
    for written, each in deal(batch, range(0, count, size), len(at.devices)):
        paths += written
        seconds.append(each)
        at.progress("pictures", len(paths), count)
    return paths, median(seconds)


def variants(sample: Sample, captions: list[str], at: Setting) -> Variants:
    """Draw a few captions, evenly spread over the list, with several latents each."""
    config = at.config
    num_prompts = min(config.diversity_prompts, len(captions))
    drawn = []
    for number in range(num_prompts):
        caption = captions[number * len(captions) // num_prompts]
        # Beyond the seeds of the captions themselves.
        seed = seed_of(config, len(captions) + number)
        pictures = sample([caption] * config.diversity_seeds, seed, config.truncation)
        drawn.append((caption, pictures))
        at.progress("variants", number + 1, num_prompts)
    return drawn
