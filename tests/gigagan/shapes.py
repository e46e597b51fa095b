"""A held-out folder as the download stage writes it, of shapes that are told apart at a glance."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

PX = 32
PALETTE = {"red": [220, 40, 40], "sky": [150, 200, 250], "white": [255, 255, 255]}
STYLES = ("flat", "outlined")
TRAINED = ("disc", "bar", "cross", "ring")
UNSEEN = ("corner", "dots")
_INK = {"flat": (20, 90, 20), "outlined": (20, 20, 20)}


def draw(shape: str, style: str, background: str) -> np.ndarray:
    """uint8 [PX, PX, 3]."""
    y, x = np.mgrid[:PX, :PX] - PX / 2
    inside = {
        "disc": x**2 + y**2 < 100,
        "bar": abs(y) < 4,
        "cross": (abs(x) < 3) | (abs(y) < 3),
        "ring": abs(np.hypot(x, y) - 9) < 2,
        "corner": (x < -4) | (y > 6),
        "dots": (x // 4 % 2 == 0) & (y // 4 % 2 == 0),
    }[shape] & (np.maximum(abs(x), abs(y)) < 13)
    return np.where(inside[..., None], _INK[style], PALETTE[background]).astype(np.uint8)


def caption(shape: str, style: str, background: str) -> str:
    return f"{style} emoji of a {shape} on a {background} background"


def taken_apart(text: str) -> tuple[str, str, str]:
    """Shape, style and background of a caption."""
    style, _, _, _, shape, _, _, background, _ = text.split()
    return shape, style, background


def split_of(shape: str, style: str, background: str) -> str:
    """Of each trained shape one background is never trained in either style."""
    if shape in UNSEEN:
        return "unseen"
    never = list(PALETTE)[TRAINED.index(shape) % len(PALETTE)]
    return "combination" if background == never else "trained"


def write(folder: Path) -> Path:
    """captions.json has the 8 combinations, gallery.json all 36, of which 16 are trained."""
    (folder / "images").mkdir(parents=True)
    looks = [
        (shape, style, background)
        for shape in TRAINED + UNSEEN
        for style in STYLES
        for background in PALETTE
    ]
    images, annotations = [], []
    for number, look in enumerate(looks, 1):
        name = f"{'-'.join(look)}.png"
        Image.fromarray(draw(*look)).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": PX, "height": PX})
        said = dict(zip(("concept", "style", "background"), look, strict=True))
        annotations.append(
            {"id": number, "image_id": number, "caption": caption(*look), "split": split_of(*look)}
            | said
        )
    info = {"palette": PALETTE}
    for file, wanted in (
        ("gallery", {"trained", "combination", "unseen"}),
        ("captions", {"combination"}),
    ):
        rows = [a for a in annotations if a["split"] in wanted]
        content = {"info": info, "images": [images[a["id"] - 1] for a in rows], "annotations": rows}
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder
