"""Latent walks: from picture to picture in small steps, as frames, GIF or MP4."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from gigagan.common.files import filled_aside
from gigagan.inference.editing import Edit, slerp

if TYPE_CHECKING:
    from gigagan.inference.sampler import Sampler


def walk(
    sampler: Sampler,
    prompts: Sequence[str],
    *,
    seed: int,
    frames: int = 32,
    truncation: float = 1.0,
    loop: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """At least 2 pictures along a way through latents and prompts.

    With several prompts each leg leads from one to the next at a latent of its own; with one, the
    latent alone moves, through as many legs as keep it interesting (4). z goes along the sphere,
    text and style straight. All frames share the upsampler's latent and noise, so that nothing
    flickers.
    """
    stops = list(prompts) if len(prompts) > 1 else list(prompts) * (4 if loop else 2)
    legs = len(stops) if loop else len(stops) - 1
    z_BZ = sampler.latents(len(stops), seed)
    pictures = []
    for number in range(frames):
        place = number * legs / (frames if loop else frames - 1)
        leg = min(int(place), legs - 1)
        here, there, amount = leg, (leg + 1) % len(stops), place - leg
        z_1Z = slerp(z_BZ[here : here + 1], z_BZ[there : there + 1], amount)
        edit = None
        if stops[here] != stops[there]:
            edit = Edit(stops[there], "interpolate", amount)
        pictures += sampler.sample(
            [stops[here]], seed=seed, truncation=truncation, edit=edit, latents_BZ=z_1Z
        )
        progress(number + 1, frames)
    return pictures


def check(path: Path, *, frames: int, fps: int) -> None:
    """Whether a walk can be written there; ValueError says what cannot be."""
    if frames < 2:
        raise ValueError(f"frames={frames}: give 2 or more")
    if not 1 <= fps <= 60:
        raise ValueError(f"fps={fps}: give 1 to 60")
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path}: a walk is written as .gif or .mp4")
    if path.suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise ValueError("an .mp4 needs the package av: `pip install -e .[use]`")


def save(
    path: Path, pictures: Sequence[Image.Image], *, fps: int = 12, about: Mapping[str, Any]
) -> None:
    """Write frames as .gif or .mp4 with their provenance inside, whole or not at all.

    Raises:
        ValueError: another name, rate, or number of frames than `check` lets through.
    """
    check(path, frames=len(pictures), fps=fps)
    comment = json.dumps(dict(about), sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled_aside(path) as partial:
        if path.suffix == ".mp4":
            _mp4(partial, pictures, fps, comment)
            return
        first, *others = pictures
        first.save(
            partial,
            "GIF",
            save_all=True,
            append_images=others,
            duration=round(1000 / fps),
            loop=0,
            comment=comment.encode(),
        )


def read_about(path: Path) -> dict[str, Any] | None:
    """What `save` was told; None for any other file."""
    try:
        if path.suffix == ".gif":
            with Image.open(path) as image:
                about = json.loads(image.info["comment"])
        else:
            import av

            with av.open(str(path)) as container:
                about = json.loads(container.metadata["comment"])
    except Exception:  # codecs raise anything
        return None
    return about if isinstance(about, dict) else None


def _mp4(path: Path, pictures: Sequence[Image.Image], fps: int, comment: str) -> None:
    import av

    width, height = (side + side % 2 for side in pictures[0].size)  # the codec wants even sides
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for picture in pictures:
            frame = av.VideoFrame.from_image(picture.resize((width, height)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
