"""What files the evaluation and the upsampler are given, whoever wrote them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gigagan.common.pictures import decode
from gigagan.evaluation.judges.features import extract, open_rgb, reference
from gigagan.inference.pictures import PictureError, open_picture, read_about

GREY = np.array([[0, 128, 255], [7, 64, 200]], np.uint8)
DEEP = {
    "16 bits": (GREY.astype(np.uint16) * 257, "PNG"),
    "dark 16 bits": (GREY.astype(np.uint16), "PNG"),
    "16 bits in a TIFF": (GREY.astype(np.uint16) * 257, "TIFF"),
    "32 bits": (GREY.astype(np.int32) * 2**23, "TIFF"),
    "8 bits in 32": (GREY.astype(np.int32), "TIFF"),
    "unit floats": (GREY.astype(np.float32) / 255, "TIFF"),
    "byte floats": (GREY.astype(np.float32), "TIFF"),
    "no numbers": (np.array([[np.nan, np.inf, 3]], np.float32), "TIFF"),
}


def encoded(image: Image.Image, codec: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_judged_as_it_was_trained_on(tmp_path, name):
    values, codec = DEEP[name]
    path = tmp_path / "x"
    path.write_bytes(encoded(Image.fromarray(values), codec))
    trained_on = np.asarray(decode(path.read_bytes()))
    assert np.array_equal(np.asarray(open_rgb(path)), trained_on)
    assert np.array_equal(np.asarray(open_picture(path)), trained_on)
    if "dark" not in name and "no numbers" not in name:
        assert np.array_equal(trained_on[..., 0], GREY)


def test_a_turned_and_a_transparent_picture_are_judged_as_they_were_trained_on(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    for codec, image in (("JPEG", pixels[..., :3]), ("PNG", pixels)):
        path = tmp_path / codec
        path.write_bytes(encoded(Image.fromarray(image), codec, exif=exif))
        trained_on = np.asarray(decode(path.read_bytes()))
        assert trained_on.shape == (5, 3, 3)
        assert np.array_equal(np.asarray(open_rgb(path)), trained_on)
        assert np.array_equal(np.asarray(open_picture(path)), trained_on)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_other_mode_is_rgb(mode):
    assert open_rgb(Image.new(mode, (5, 3))).mode == "RGB"


class Mean:
    """A judge that sees the mean colour."""

    name, weights, width, lanes = "mean", "inception-2015-12-05", 3, 1

    def prepare(self, image):
        return np.asarray(image, np.float32).mean((0, 1))

    def __call__(self, batch):
        return batch


def test_sixteen_bits_and_eight_have_the_same_features(tmp_path):
    for name, values in (("8.png", GREY), ("16.png", GREY.astype(np.uint16) * 257)):
        (tmp_path / name).write_bytes(encoded(Image.fromarray(values)))
    files = [tmp_path / "8.png", tmp_path / "16.png"]
    found = extract(files, [Mean()], transform=open_rgb, folder=tmp_path / "features")["mean"]
    assert found[0] == pytest.approx(GREY.mean())
    assert np.array_equal(found[0], found[1])


def test_features_kept_from_another_reading_of_files_are_not_used(tmp_path, monkeypatch):
    (tmp_path / "8.png").write_bytes(encoded(Image.fromarray(GREY)))
    settings = {"transform": open_rgb, "transform_name": "as it is", "cache": tmp_path / "kept"}
    names = []
    for reading in ("clipped", "16 bits scaled", "16 bits scaled"):
        monkeypatch.setattr("gigagan.evaluation.judges.features._READING", reading)
        reference([tmp_path / "8.png"], [Mean()], **settings)
        names.append({path.name for path in (tmp_path / "kept").glob("*.npy")})
    assert [len(found) for found in names] == [1, 2, 2]


# ---- PNGs with much text -----------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def noted(note: bytes) -> bytes:
    data = encoded(Image.new("RGB", (8, 8), (200, 40, 90)))
    return data[:33] + note + data[33:]


TEXT = b"{}" * 5_000_000


@pytest.mark.parametrize(
    "note",
    [
        chunk(b"zTXt", b"w\0\0" + zlib.compress(TEXT)),
        chunk(b"iTXt", b"w\0\1\0en\0w\0" + zlib.compress(TEXT)),
        chunk(b"tEXt", b"w\0" + TEXT),
        chunk(b"iCCP", b"w\0\0" + zlib.compress(TEXT)),
    ],
    ids=["zTXt", "iTXt", "tEXt", "profile"],
)
def test_a_png_with_megabytes_of_text_is_a_picture(tmp_path, note):
    path = tmp_path / "big.png"
    path.write_bytes(noted(note))
    assert open_rgb(path).getpixel((3, 5)) == (200, 40, 90)
    assert open_picture(path).getpixel((3, 5)) == (200, 40, 90)
    assert read_about(path) is None


def test_whatever_is_wrong_with_a_picture_its_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    path = tmp_path / "big.png"
    path.write_bytes(noted(chunk(b"zTXt", b"w\0\0" + zlib.compress(TEXT[:2000]))))
    with pytest.raises(PictureError, match=r"big\.png is damaged"):
        open_picture(path)
    assert read_about(path) is None


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("codec", ["TIFF", "PNG", "JPEG2000"])
def test_a_file_that_is_cut_anywhere_is_a_picture_or_is_named(tmp_path, codec):
    path, refusals = tmp_path / "cut.xyz", []
    whole = encoded(Image.effect_noise((24, 18), 90), codec)
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        try:
            open_picture(path)
        except PictureError as error:
            refusals.append(str(error))
    assert len(refusals) > 9
    assert all("cut.xyz" in text for text in refusals)


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xffrest"
    (tmp_path / "x.jpg").write_bytes(encoded(Image.new("RGB", (6, 4), "red"), "JPEG", exif=exif))
    assert open_picture(tmp_path / "x.jpg").size == (6, 4)
