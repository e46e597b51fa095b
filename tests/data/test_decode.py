from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.decode import UndecodableError, decode, square

GRADIENT_HW = np.linspace(0, 255, 35, dtype=np.uint8).reshape(5, 7)


def encoded(image: Image.Image, codec: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


def test_sixteen_bit_gray_keeps_its_picture():
    data = encoded(Image.fromarray(GRADIENT_HW.astype(np.uint16) * 257))
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    image = decode(data)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 1], GRADIENT_HW)


def test_a_dark_sixteen_bit_picture_stays_dark():
    values = np.full((3, 5), 2000, np.uint16)  # of 65535
    assert np.asarray(decode(encoded(Image.fromarray(values)))).max() == round(2000 * 255 / 65535)


def test_exif_orientation_is_applied():
    upright = Image.new("RGB", (6, 4), "white")
    upright.paste("red", (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (4, 3), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    if mode == "P":
        image = Image.new("P", (4, 3), 0)
        image.putpalette([0, 0, 0])
    assert np.asarray(decode(encoded(image, **options))).min() == 255


@pytest.mark.parametrize("codec", ["JPEG", "WEBP", "PNG", "GIF", "AVIF"])
def test_the_web_s_codecs_decode_to_rgb(codec):
    image = decode(encoded(Image.new("RGB", (16, 8), (200, 40, 90)), codec))
    assert (image.mode, image.size) == ("RGB", (16, 8))
    np.testing.assert_allclose(np.asarray(image).mean((0, 1)), (200, 40, 90), atol=6)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_colour_spaces_of_jpeg_become_rgb(mode):
    image = decode(encoded(Image.new("RGB", (16, 8), (120, 120, 120)).convert(mode), "JPEG"))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).mean((0, 1)), 120, atol=4)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!doctype html><p>gone",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bytes(range(256)),
        encoded(Image.effect_noise((32, 32), 50))[:400],
    ],
    ids=["empty", "html", "svg", "random", "truncated"],
)
def test_what_is_no_whole_picture_is_refused_with_a_reason(data):
    with pytest.raises(UndecodableError, match=r"\w+Error: "):
        decode(data)


def test_square_takes_the_middle():
    image = Image.new("RGB", (9, 3), "white")
    image.paste("blue", (3, 0, 6, 3))
    assert (np.asarray(square(image, 2)) == (0, 0, 255)).all()
