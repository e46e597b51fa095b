from __future__ import annotations

import io
import random
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from gigagan.common import pictures as decoding
from gigagan.common.pictures import UndecodableError, decode, open_picture, square

sys.path.append(str(Path(__file__).parents[1] / "data"))  # several folders are called `tests`
import bombs

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
    ("kind", "data"),
    [
        ("not a picture", b""),
        ("not a picture", b"<!doctype html><p>gone"),
        ("not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("not a picture", bytes(range(256))),
        ("not a picture", encoded(Image.new("RGB", (8, 8)), "EPS")),
        ("truncated", encoded(Image.effect_noise((32, 32), 50))[:400]),
        ("truncated", encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900]),
        ("truncated", encoded(Image.effect_noise((64, 64), 50), "GIF")[:900]),
        ("broken", encoded(Image.effect_noise((64, 64), 50), "WEBP")[:600]),
    ],
    ids=["empty", "html", "svg", "random", "program", "png", "jpeg", "gif", "webp"],
)
def test_what_is_no_whole_picture_is_refused_with_a_reason(kind, data):
    with pytest.raises(UndecodableError, match=rf"^{kind}: .") as refused:
        decode(data)
    assert refused.value.kind == kind
    assert " at 0x" not in str(refused.value)  # the same bytes give the same row


def test_too_many_pixels_are_refused_from_the_header():
    data = encoded(Image.new("1", (12_000, 12_000)))  # 144 million in 20 kB
    before = psutil.Process().memory_info().rss
    with pytest.raises(UndecodableError, match=r"too many pixels: 12000 × 12000, at most 100,000"):
        decode(data)
    assert psutil.Process().memory_info().rss - before < 50e6
    with pytest.raises(UndecodableError, match="too many pixels: 7 × 5, at most 34 "):
        decode(encoded(Image.new("RGB", (7, 5))), max_pixels=34)
    assert decode(encoded(Image.new("RGB", (7, 5))), max_pixels=35).size == (7, 5)


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(monkeypatch):
    assert decode(bombs.progressive_bomb(24, 16, 100)).size == (24, 16)
    data = bombs.progressive_bomb(80, 80, 4000)
    monkeypatch.setattr(decoding, "_loaded", pytest.fail)
    with pytest.raises(UndecodableError, match=r"^too many scans: 4,000, at most 100"):
        decode(data)


def test_what_only_looks_like_a_scan_is_none():
    note, film = b"\xff\xda" * 300, b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 300
    data = encoded(Image.new("RGB", (16, 8), (200, 40, 90)), "JPEG", comment=note) + film
    assert decode(data).size == (16, 8)


def test_threads_decode_great_pictures_one_at_a_time_and_small_ones_meanwhile(monkeypatch):
    monkeypatch.setattr(decoding, "GREAT_PIXELS", 34)
    great, small = encoded(Image.new("RGB", (7, 5))), encoded(Image.new("RGB", (17, 2)))
    with decoding.alone:
        thread = threading.Thread(target=decode, args=(great,))
        thread.start()
        assert decode(small).size == (17, 2)
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive()


# ---- modes


def test_sixteen_bit_colours_keep_their_picture():
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    row = b"\0" + b"".join(struct.pack(">HHH", 257 * v, 65535 - 257 * v, 999) for v in (0, 90, 255))
    header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    image = decode(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 255, 3), (90, 165, 3), (255, 0, 3)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[-3, np.nan, np.inf]], np.float32), [0, 0, 255]),
        (np.array([[0, 257 * 7, 65535]], np.int32), [0, 7, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
    ],
    ids=["unit floats", "byte floats", "no numbers", "sixteen bits", "more bits"],
)
def test_deep_tiffs_keep_their_picture(values, expected):
    image = decode(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_one_bit_palette_and_gray_become_rgb():
    bits = Image.new("1", (3, 2))
    bits.putpixel((2, 1), 1)
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert decode(encoded(bits)).getpixel((2, 1)) == (255, 255, 255)
    assert decode(encoded(palette)).getpixel((0, 0)) == (10, 200, 30)
    assert decode(encoded(Image.new("L", (3, 2), 77))).getpixel((0, 0)) == (77, 77, 77)


def test_half_transparency_is_half_white():
    image = decode(encoded(Image.new("RGBA", (3, 2), (0, 100, 200, 128))))
    np.testing.assert_allclose(image.getpixel((0, 0)), (127, 177, 227), atol=1)


def test_a_cmyk_jpeg_of_adobe_is_not_a_negative():
    data = encoded(Image.new("CMYK", (16, 8), (0, 200, 200, 0)), "JPEG", quality=95)
    assert b"Adobe" in data  # which says that its values are inverted
    red, green, blue = decode(data).getpixel((8, 4))
    assert red > 240
    assert max(green, blue) < 70


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "lime")]
    for codec in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], codec, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(decode(data).getpixel((2, 2)), (255, 0, 0), atol=9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_and_the_size_is_the_upright_one(orientation):
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste("red", (0, 0, 30, 20))
    done = {
        1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
        6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270",
    }[orientation]  # fmt: skip
    stored = upright if done is None else upright.transpose(Image.Transpose[done])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for at_least in (None, 20):
        picture = open_picture(encoded(stored, "PNG", exif=exif), at_least=at_least)
        assert picture[1:] == (60, 40)
        shown = picture.image.resize((6, 4), Image.Resampling.BOX)
        np.testing.assert_array_equal(shown, upright.resize((6, 4), Image.Resampling.BOX))


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(
        Image.new("RGB", (6, 4), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffrest"
    )
    assert decode(data).size == (6, 4)


# ---- reduction


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "GIF"])
@pytest.mark.parametrize(
    ("at_least", "short"), [(None, 90), (46, 90), (45, 45), (12, 12), (11, 11)]
)
def test_a_reduced_picture_is_no_less_than_asked_and_keeps_its_true_size(codec, at_least, short):
    noise_HW = np.random.default_rng(7).normal(128, 80, (5, 6)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise_HW).convert("RGB").resize((150, 90))
    picture = open_picture(encoded(image, codec), at_least=at_least)
    assert picture[1:] == (150, 90)
    found = min(picture.image.size)
    assert found >= (at_least or 90)
    assert found < 2 * short
    small = np.asarray(picture.image.resize((6, 5), Image.Resampling.BOX), float)
    np.testing.assert_allclose(small, np.asarray(image.resize((6, 5), 4), float), atol=40)


# ---- colour profiles


def other_profile() -> bytes:
    """A profile that swaps red and green, with nothing of sRGB in its name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    return (
        renamed.replace(b"rXYZ", b"tmpX", 1)
        .replace(b"gXYZ", b"rXYZ", 1)
        .replace(b"tmpX", b"gXYZ", 1)
    )


def test_colours_are_meant_as_their_profile_says():
    image = Image.new("RGB", (6, 4), (250, 20, 30))
    swapped = decode(encoded(image, icc_profile=other_profile()))
    np.testing.assert_allclose(swapped.getpixel((0, 0)), (20, 250, 30), atol=12)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(encoded(image, icc_profile=srgb)).getpixel((0, 0)) == (250, 20, 30)


def test_a_profile_that_is_broken_or_for_other_pictures_is_ignored():
    image = Image.new("RGB", (6, 4), (250, 20, 30))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"", b"junk", other_profile()[:300], lab, bytes(5_000_000)):
        assert decode(encoded(image, "TIFF", icc_profile=profile)).getpixel((0, 0)) == (250, 20, 30)
    gray = encoded(Image.new("L", (6, 4), 70), icc_profile=other_profile())
    assert decode(gray).getpixel((0, 0)) == (70, 70, 70)


def test_threads_share_a_profile():
    data = encoded(Image.effect_noise((300, 200), 90).convert("RGB"), icc_profile=other_profile())
    expected, found = decode(data).tobytes(), []
    threads = [
        threading.Thread(target=lambda: found.append(decode(data).tobytes())) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 5


# ---- hostile bytes

_PICTURE = Image.effect_noise((24, 18), 90).convert("RGB")
NOTES = PngImagePlugin.PngInfo()
NOTES.add_text("a", "short")
NOTES.add_itxt("b", "long " * 2_000_000, zip=True)
_ICC = {"icc_profile": other_profile()}
SEEDS = {
    "jpeg": encoded(_PICTURE, "JPEG", **_ICC),
    "progressive": encoded(_PICTURE, "JPEG", progressive=True),
    "cmyk": encoded(_PICTURE.convert("CMYK"), "JPEG"),
    "png": encoded(_PICTURE, "PNG", **_ICC),
    "palette": encoded(_PICTURE.quantize(7), "PNG", transparency=3),
    "deep": encoded(Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800)),
    "gif": encoded(_PICTURE, "GIF", save_all=True, append_images=[_PICTURE.rotate(90)]),
    "webp": encoded(_PICTURE, "WEBP"),
    "avif": encoded(_PICTURE, "AVIF"),
    "tiff": encoded(_PICTURE, "TIFF", compression="tiff_lzw"),
    "float": encoded(Image.fromarray(np.ones((5, 7), np.float32)), "TIFF"),
    "bmp": encoded(_PICTURE, "BMP"),
    "jpeg2000": encoded(_PICTURE, "JPEG2000"),
    "ppm": encoded(_PICTURE, "PPM"),
    "qoi": encoded(_PICTURE, "QOI"),
    "icon": encoded(_PICTURE, "ICO", sizes=[(24, 18)]),
    "bitmap icon": encoded(_PICTURE, "ICO", sizes=[(24, 18)], bitmap_format="bmp"),
    "noted": encoded(_PICTURE, "PNG", pnginfo=NOTES),
}


@st.composite
def mutated(draw) -> bytes:
    data = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, min(len(data) - 1, 700)))  # headers are the interesting part
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
        data = data or bytearray(b"\0")
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def _decodes_or_is_refused(data: bytes) -> None:
    for at_least in (None, 5):
        try:
            picture = open_picture(data, max_pixels=1_000_000, at_least=at_least)
        except UndecodableError as error:
            assert str(error).startswith(f"{error.kind}: ")  # noqa: PT017
        else:
            assert picture.image.mode == "RGB"
            assert picture.width * picture.height <= 1_000_000
            picture.image.tobytes()


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(mutated())
def test_mutated_files_decode_or_are_refused(data):
    before = psutil.Process().memory_info().rss
    _decodes_or_is_refused(data)
    assert psutil.Process().memory_info().rss - before < 200e6


def _mutated(chance: random.Random) -> bytes:
    """The same without Hypothesis, whose draws take ten times as long as a decoding."""
    data = bytearray(SEEDS[chance.choice(sorted(SEEDS))])
    for _ in range(chance.randint(0, 8)):
        at = chance.randint(0, min(len(data) - 1, 700))
        data[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        data = data or bytearray(b"\0")
    return bytes(data[: chance.randint(0, len(data))] if chance.random() < 0.5 else data)


@pytest.mark.slow
def test_many_mutated_files_decode_or_are_refused():
    process = psutil.Process()
    for seed in random.sample(range(2**32), 5000):  # others in each run
        before = process.memory_info().rss
        try:
            _decodes_or_is_refused(_mutated(random.Random(seed)))
        except BaseException as error:
            error.add_note(f"of _mutated(random.Random({seed}))")
            raise
        assert process.memory_info().rss - before < 200e6, f"_mutated(random.Random({seed}))"


@pytest.mark.parametrize("name", SEEDS)
def test_every_truncation_decodes_or_is_refused(name):
    data = SEEDS[name]
    for length in range(0, len(data), max(1, len(data) // 40)):
        _decodes_or_is_refused(data[:length])
    assert decode(data).mode == "RGB"


def test_a_codec_s_own_errors_do_not_get_out(monkeypatch):
    def fails(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(decoding, "_loaded", fails)
    with pytest.raises(UndecodableError, match="broken: MemoryError: no room"):
        decode(SEEDS["png"])


def test_square_takes_the_middle():
    image = Image.new("RGB", (9, 3), "white")
    image.paste("blue", (3, 0, 6, 3))
    assert (np.asarray(square(image, 2)) == (0, 0, 255)).all()


def test_half_a_pixel_of_a_crop_goes_to_the_even_side():
    for width, left in ((6, 2), (8, 2), (10, 4), (12, 4)):
        row = np.arange(width, dtype=np.uint8)[None, :, None].repeat(3, 2).repeat(3, 0)
        found = np.asarray(square(Image.fromarray(row), 3))
        assert found[0, :, 0].tolist() == [left, left + 1, left + 2], width


def test_a_file_is_read_as_its_bytes_are_but_for_huge_ones(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(SEEDS["png"])
    assert decoding.read(path).tobytes() == decode(SEEDS["png"]).tobytes()
    monkeypatch.setattr(decoding, "MAX_BYTES", 10)
    with pytest.raises(UndecodableError, match=r"too many bytes: .* at most 10 are read"):
        decoding.read(path)
