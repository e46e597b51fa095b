"""Which files are pictures: by the fetch and by the decoder alike, whatever is written in them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms

from data.web.addresses import RefusedError
from data.web.fetch import _checked
from gigagan.common.pictures import FORMATS, MAX_PROFILE_BYTES, UndecodableError, decode

RED = (200, 40, 90)
PICTURE = Image.new("RGB", (32, 24), RED)


def encoded(image: Image.Image, codec: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


ACCEPTED = {
    "jpeg": encoded(PICTURE, "JPEG"),
    "progressive jpeg": encoded(PICTURE, "JPEG", progressive=True),
    "two jpegs in one file": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
    "png": encoded(PICTURE, "PNG"),
    "webp": encoded(PICTURE, "WEBP"),
    "gif": encoded(PICTURE, "GIF"),
    "avif": encoded(PICTURE, "AVIF"),
    "tiff": encoded(PICTURE, "TIFF"),
    "bmp": encoded(PICTURE, "BMP"),
    "jp2": encoded(PICTURE, "JPEG2000"),
    "j2k": encoded(PICTURE, "JPEG2000", no_jp2=True),
    "ppm": encoded(PICTURE, "PPM"),
    "pgm": encoded(PICTURE.convert("L"), "PPM"),
    "qoi": encoded(PICTURE, "QOI"),
    "ico of png": encoded(PICTURE, "ICO", sizes=[(16, 12), (32, 24)]),
    "ico of bitmaps": encoded(PICTURE, "ICO", sizes=[(16, 12), (32, 24)], bitmap_format="bmp"),
}
REFUSED = {
    "eps": encoded(PICTURE, "EPS"),
    "pdf": encoded(PICTURE, "PDF"),
    "dds": encoded(PICTURE, "DDS"),
    "icns": encoded(PICTURE.resize((128, 128)), "ICNS"),
    "pcx": encoded(PICTURE, "PCX"),
    "sgi": encoded(PICTURE, "SGI"),
    "tga": encoded(PICTURE, "TGA"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "html": b"<!doctype html><p>gone",
    "an icon of nothing": b"\0\0\1\0\0\0",
    "an icon cut short": b"\0\0\1\0\1\0\x10\x10",
    "nothing": b"",
}


def test_every_accepted_format_has_a_reader_in_this_pillow():
    assert {*FORMATS} <= Image.OPEN.keys()


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_fetch_accepts_is_decoded(name):
    assert _checked(ACCEPTED[name], 32 * 24) == ACCEPTED[name]
    image = decode(ACCEPTED[name])
    assert (image.mode, image.size) == ("RGB", (32, 24))
    expected = decode(ACCEPTED["png"]).convert("L").convert("RGB") if name == "pgm" else PICTURE
    difference = np.asarray(image).astype(int) - np.asarray(expected)
    np.testing.assert_allclose(difference, 0, atol=6)
    with pytest.raises(RefusedError) as refused:
        _checked(ACCEPTED[name], 32 * 24 - 1)
    assert refused.value.fate == "too_many_pixels"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_decoder_refuses_is_not_fetched(name):
    with pytest.raises(RefusedError) as refused:
        _checked(REFUSED[name], 10**9)
    assert refused.value.fate == "not_an_image"
    with pytest.raises(UndecodableError):
        decode(REFUSED[name])


def test_more_pixels_than_pillow_allows_by_itself_are_a_matter_of_the_setting(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    data = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(RefusedError) as refused:
        _checked(data, 199_999_999)
    assert str(refused.value) == "200000000, 199999999 allowed"
    assert _checked(data, 200_000_000) == data


# ---- notes in PNGs -----------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def noted(*notes: bytes, after: bytes = b"") -> bytes:
    """A PNG with chunks before and after its pixels."""
    data = encoded(PICTURE, "PNG")
    head, pixels, tail = data[:33], data[33:-12], data[-12:]
    return head + b"".join(notes) + pixels + after + tail


LONG = b"{}" * 5_000_000
PACKED = zlib.compress(LONG)
NOTES = {
    "zTXt": chunk(b"zTXt", b"w\0\0" + PACKED),
    "iTXt": chunk(b"iTXt", b"w\0\1\0en\0w\0" + PACKED),
    "plain iTXt": chunk(b"iTXt", b"w\0\0\0en\0w\0" + LONG),
    "tEXt": chunk(b"tEXt", b"w\0" + LONG),
    "profile": chunk(b"iCCP", b"w\0\0" + PACKED),
    "many": b"".join(chunk(b"zTXt", b"w\0\0" + zlib.compress(LONG[:900_000])) for _ in range(99)),
    "broken": chunk(b"zTXt", b"w\0\0" + PACKED[:50] + b"!" * 50),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_png_is_a_picture_whatever_is_written_in_it(name):
    for data in (noted(NOTES[name]), noted(after=NOTES[name])):
        assert _checked(data, 32 * 24) == data
        assert decode(data).getpixel((3, 5)) == RED


def test_a_bomb_in_a_note_is_unpacked_no_further_than_is_read():
    bomb = chunk(b"zTXt", b"w\0\0" + zlib.compress(bytes(2**28)))
    data = noted(*[bomb] * 20)
    before = psutil.Process().memory_info().rss
    assert decode(data).size == (32, 24)
    assert psutil.Process().memory_info().rss - before < 50e6


def test_a_short_note_beside_a_long_one_is_still_read():
    turned = Image.Exif()
    turned[0x0112] = 6
    hexadecimal = turned.tobytes().hex().encode()
    raw = b"\nexif\n%8d\n" % (len(hexadecimal) // 2) + hexadecimal  # as ImageMagick writes it
    short = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))
    assert decode(noted(NOTES["zTXt"], short)).size == (24, 32)


def test_a_profile_as_long_as_those_of_presses_is_used():
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = plain.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    swapped = (
        other.replace(b"rXYZ", b"tmpX", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmpX", b"gXYZ", 1)
    )
    for size, is_used in ((3_000_000, True), (MAX_PROFILE_BYTES, False)):
        long = swapped + bytes(size - len(swapped))
        long = struct.pack(">I", len(long)) + long[4:]
        red, green, _ = decode(encoded(PICTURE, "PNG", icc_profile=long)).getpixel((0, 0))
        assert (green > red) == is_used


# ---- icons -------------------------------------------------------------------------------------


def icon(*pictures: bytes, sides: tuple[int, ...] = (16, 0)) -> bytes:
    """An ICO that says `sides` of its pictures; 0 stands for 256."""
    start = 6 + 16 * len(pictures)
    entries, body = b"", b""
    for side, picture in zip(sides, pictures, strict=False):
        place = struct.pack("<II", len(picture), start + len(body))
        entries += struct.pack("<BBBBHH", side, side, 0, 0, 1, 32) + place
        body += picture
    return b"\0\0\1\0" + struct.pack("<H", len(pictures)) + entries + body


def test_an_icon_is_its_largest_picture():
    small, large = (Image.new("RGB", (side, side), c) for side, c in ((16, "blue"), (256, RED)))
    data = icon(encoded(small, "PNG"), encoded(large, "PNG"))
    image = decode(data)
    assert (image.size, image.getpixel((9, 9))) == ((256, 256), RED)


def test_an_icon_that_is_larger_than_it_says_is_refused_before_it_is_decoded():
    data = icon(encoded(Image.new("1", (12_000, 12_000)), "PNG"))
    before = psutil.Process().memory_info().rss
    with pytest.raises(RefusedError) as refused:
        _checked(data, 100_000_000)
    assert refused.value.fate == "too_many_pixels"
    with pytest.raises(UndecodableError, match="too many pixels: 12000 × 12000"):
        decode(data)
    bitmap = struct.pack("<IiiHHIIiiII", 40, 12_000, 24_000, 1, 24, 0, 0, 0, 0, 0, 0)
    with pytest.raises(UndecodableError, match="a bitmap of 12000 × 24000 in an icon"):
        decode(icon(bitmap))
    assert psutil.Process().memory_info().rss - before < 50e6
