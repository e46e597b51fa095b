"""Bytes of any picture → RGB as its author saw it: one way for scores, training, judges and use.

Hostile bytes end in UndecodableError and nothing else; what they may claim of memory is bounded by
the pixel cap, which is read from the header. Of time only the scans of a JPEG are bounded here: the
rest is for decoders.py.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM", "QOI", "ICO")
"""Pillow's readers of what is fetched and decoded. Others run programs (EPS), or are for no
photographs."""
MAX_PIXELS = 100_000_000
MAX_BYTES = 1_000_000_000
"""Of a file: 100 megapixels with four channels of 16 bits, not packed, are 800 million."""
MAX_SCANS = 100
"""Passes over a JPEG, each over all of its pixels though it may have next to no bytes. Progressive
ones have some 10; libtiff stops at as many as this for JPEGs in a TIFF."""
GREAT_PIXELS = 16_000_000
"""A picture with more of them is decoded while no other such is: that takes 8 to 25 bytes each."""
MAX_PROFILE_BYTES = 4_000_000
"""A longer ICC profile is ignored; those of presses have up to 3 MB."""
MAX_NOTE_BYTES = 16_000_000
"""Longer texts in a PNG are passed over, unpacked and all together."""
ICON_PX = 256
"""Longest side of a bitmap in an ICO."""

JPEG = b"\xff\xd8"
"""How one begins."""

Image.init()  # all codecs: those it loads on demand are missing where threads come first
# A PNG with a text or profile longer than this is no picture to Pillow.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_PROFILE_BYTES)
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; set once: threads decode


class UndecodableError(ValueError):
    """Bytes that are not a whole picture. The text is `kind: why`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(kind, why)  # which is how it goes from process to process
        self.kind = kind
        """`not a picture`, `truncated`, `too many pixels`, `too many bytes`, `too many scans`,
        `too slow`, or `broken`."""

    def __str__(self) -> str:
        return ": ".join(self.args)


alone: AbstractContextManager[object] = threading.Lock()
"""Held while a picture of more than GREAT_PIXELS is decoded: a lock of this process's threads, or,
in those of decoders.py, one of them all."""


class Picture(NamedTuple):
    """A decoded picture."""

    image: Image.Image
    """RGB, perhaps reduced."""
    width: int
    """Width in px of the whole picture, the right way up."""
    height: int


def opened(data: bytes) -> Image.Image:
    """A picture of which only the header has been read, with one of FORMATS.

    Raises:
        UndecodableError: an icon that is none, or more than MAX_SCANS.
        Exception: whatever Pillow's readers raise on hostile bytes.
    """
    if data.startswith(_ICO):
        data = _out_of_icon(data)
    if data.startswith(JPEG) and (scans := _scans(data)) > MAX_SCANS:
        raise UndecodableError("too many scans", f"{scans:,}, at most {MAX_SCANS} are decoded")
    return Image.open(io.BytesIO(_without_long_notes(data)), formats=FORMATS)


def check(data: bytes, max_pixels: int) -> None:
    """Read the header alone.

    Raises:
        UndecodableError: `too many pixels`, `too many scans` or `not a picture`.
    """
    # Pillow has a limit for the whole process, at twice this: ours goes before it.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        with opened(data) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise UndecodableError("too many pixels", str(error)) from error
    except UndecodableError:
        raise
    except Exception as error:  # a hostile header may raise anything
        raise UndecodableError("not a picture", f"begins with {data[:8]!r}") from error
    if width * height > max_pixels:
        raise UndecodableError("too many pixels", f"{width * height}, {max_pixels} allowed")


def read(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, as `decode` makes it.

    Raises:
        UndecodableError: as `decode`, or more than MAX_BYTES.
        OSError: the file cannot be read.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UndecodableError("too many bytes", f"{size:,}, at most {MAX_BYTES:,} are read")
    return decode(path.read_bytes(), max_pixels=max_pixels)


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Image.Image:
    """Decode to mode RGB: see `open_picture`."""
    return open_picture(data, max_pixels=max_pixels, at_least=at_least).image


def open_picture(
    data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Picture:
    """Decode to RGB in sRGB, turned as EXIF says, 16 bits scaled to 8, transparency on white.

    Of an animation it is the first frame. With `at_least`, a picture whose short side is twice
    that or more is reduced by a whole factor to no less than it, JPEGs while they are decoded.

    Raises:
        UndecodableError: broken, truncated, more than `max_pixels`, or of no kind in FORMATS.
    """
    try:
        source = opened(data)
        width, height = source.size
        if width * height > max_pixels:
            raise UndecodableError(
                "too many pixels", f"{width} × {height}, at most {max_pixels:,} are decoded"
            )
        turn = _turn(source)
        with alone if width * height > GREAT_PIXELS else nullcontext():
            image = _upright(_loaded(source, at_least), turn)
        return Picture(image, *((height, width) if turn in _SIDEWAYS else (width, height)))
    except UndecodableError:
        raise
    except UnidentifiedImageError as error:  # its text has an address in memory
        raise UndecodableError("not a picture", f"begins with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise UndecodableError("too many pixels", str(error)) from error
    except Exception as error:  # codecs raise anything on hostile bytes
        kind = "truncated" if "truncated" in str(error).lower() else "broken"
        raise UndecodableError(kind, f"{type(error).__name__}: {error}") from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what undoes it."""
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn it upright. Broken EXIF says nothing: the picture itself may be whole."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _loaded(image: Image.Image, at_least: int | None) -> Image.Image:
    """All of its pixels, RGB, reduced."""
    if at_least is not None:
        short = min(image.size)
        wanted = tuple(-(-side * at_least // short) for side in image.size)
        image.draft(None, (wanted[0], wanted[1]))  # only JPEG can; never goes below
    image.load()
    if image.mode not in ("P", "1") and not image.mode.startswith(("I", "F")):
        return as_rgb(_reduced(image, at_least))
    return _reduced(as_rgb(image), at_least)  # these modes cannot be averaged


def _reduced(image: Image.Image, at_least: int | None) -> Image.Image:
    factor = 1 if at_least is None else min(image.size) // at_least
    if factor < 2:
        return image
    profile, reduced = image.info, image.reduce(factor)
    reduced.info = profile
    return reduced


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode as RGB in sRGB: 16 bits scaled to 8, transparency on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        image = canvas
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = _in_srgb(image, profile)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> np.ndarray:
    """Deep gray to uint8: 16-bit values by their range, others by the range they seem to have.

    Pillow's own conversion clips at 255, which turns a 16-bit picture white.
    """
    deep_HW = np.asarray(image)
    top = float(np.max(deep_HW, initial=0, where=np.isfinite(deep_HW)))
    if image.mode.startswith("I;16"):
        top = 65535.0
    elif image.mode == "F" and top <= 1:
        top = 1.0
    elif top <= 65535:
        top = 255.0 if top <= 255 else 65535.0
    flat_HW = np.empty(deep_HW.shape, np.uint8)
    for start in range(0, len(deep_HW), 64):  # rows at a time: a whole one of floats is 8 × as big
        with np.errstate(invalid="ignore", over="ignore"):  # of floats that are no numbers
            rows = np.nan_to_num(deep_HW[start : start + 64] * (255 / top))
        flat_HW[start : start + 64] = np.rint(np.clip(rows, 0, 255))
    return flat_HW


# ---- colour ------------------------------------------------------------------------------------

_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile → mode of the pictures that it is for."""


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours as the profile means them. One that is broken, or for other pictures, is ignored."""
    if len(profile) > MAX_PROFILE_BYTES:
        return image
    try:
        transform = _to_srgb(profile)
        if transform is not None and transform.input_mode == image.mode:
            return ImageCms.applyTransform(image, transform) or image
    except Exception:  # as for a browser, the picture is worth more than its profile
        pass
    return image


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The way to sRGB, or None from sRGB itself."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    description = source.profile.profile_description or ""
    mode = _SPACES.get(source.profile.xcolor_space)
    if mode is None or description.startswith("sRGB"):
        return None
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(source, target, mode, "RGB")


# ---- crops -------------------------------------------------------------------------------------


def square(image: Image.Image, side: int) -> Image.Image:
    """Centre-crop to the short side and resize to `side` px, antialiased (Lanczos).

    It is the identity for a picture of that size already.
    """
    middle = centre(image, min(image.size))
    return middle if middle.width == side else middle.resize((side, side), Image.Resampling.LANCZOS)


def centre(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle; half a pixel goes to the even side, as in torchvision's crop."""
    left, top = (round((whole - side) / 2) for whole in image.size)
    return image.crop((left, top, left + side, top + side))


# ---- what Pillow would trip over ---------------------------------------------------------------

_PNG, _ICO = b"\x89PNG\r\n\x1a\n", b"\0\0\1\0"
_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


_START_OF_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""What begins a segment with a length; in between are compressed pixels."""


def _scans(data: bytes) -> int:
    """Scans of a JPEG, up to its end: what follows may be a film."""
    if data.count(_START_OF_SCAN) <= MAX_SCANS:  # also those inside of segments
        return data.count(_START_OF_SCAN)
    scans, found = 0, _MARKER.search(data, len(JPEG))
    while found and found[0] != b"\xff\xd9":
        scans += found[0] == _START_OF_SCAN
        length = int.from_bytes(data[found.end() : found.end() + 2])
        found = _MARKER.search(data, found.end() + length)
    return scans


def _without_long_notes(data: bytes) -> bytes:
    """A PNG without texts and profiles longer than Pillow reads; anything else as it is.

    Editors write down a picture's whole history, and generators how they made it.
    """
    if not data.startswith(_PNG):
        return data
    kept, begin, at, left = [], 0, len(_PNG), MAX_NOTE_BYTES
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if kind in _NOTES and end <= len(data):
            limit = min(MAX_PROFILE_BYTES, left)
            size = _note_bytes(kind, data[at + 8 : end - 4], limit)
            left -= size
            if size >= limit:
                kept.append(data[begin:at])
                begin = end
        at = end
    return b"".join([*kept, data[begin:]]) if kept else data


def _note_bytes(kind: bytes, body: bytes, limit: int) -> int:
    """Bytes of a text or a profile, unpacked as far as `limit`."""
    rest = body.partition(b"\0")[2]
    packed = rest[1:]
    if kind == b"tEXt" or (kind == b"iTXt" and not rest.startswith(b"\1")):
        return min(len(body), limit)
    if kind == b"iTXt":
        packed = rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, limit)) if limit else 0
    except zlib.error:  # a note that is broken is none
        return 0


def _out_of_icon(data: bytes) -> bytes:
    """The largest picture of an ICO: its PNG, or an ICO of it alone.

    Pillow decodes one as soon as it is opened, whatever its size is.
    """
    entries = [
        data[at : at + 16] for at in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16)
    ]
    entry = max(entries, key=lambda e: ((e[0] or ICON_PX) * (e[1] or ICON_PX), e[6:8]))
    size, start = struct.unpack("<II", entry[8:])
    picture = data[start : start + size]
    if picture.startswith(_PNG):
        return picture
    is_old = picture.startswith(b"\x0c\0\0\0")
    width, height = struct.unpack_from("<HH" if is_old else "<ii", picture, 4)
    if abs(width) > ICON_PX or abs(height) > 2 * ICON_PX:  # its mask counts
        raise UndecodableError("broken", f"a bitmap of {width} × {height} in an icon")
    return data[:4] + b"\1\0" + entry[:12] + struct.pack("<I", 22) + picture
