import numpy as np
import pytest
from PIL import Image

from gigagan.inference import pictures
from gigagan.inference.pictures import PictureError, open_picture, read_about, save_picture


def opened(image, path, **settings):
    image.save(path, **settings)
    return np.asarray(open_picture(path))


def test_one_channel_and_sixteen_bits_become_the_same_grey(tmp_path):
    grey = np.array([[0, 128, 255]], np.uint8)
    eight = opened(Image.fromarray(grey), tmp_path / "8.png")
    sixteen = opened(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "16.png")
    assert eight[0, :, 0].tolist() == sixteen[0, :, 2].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / "x.tiff"
    Image.new(mode, (5, 3)).save(path)
    found = open_picture(path)
    assert (found.mode, found.size) == ("RGB", (5, 3))


def test_a_single_pixel_is_a_picture(tmp_path):
    assert opened(Image.new("RGB", (1, 1), "red"), tmp_path / "x.png").tolist() == [[[255, 0, 0]]]


def test_transparency_is_white_and_exif_turns(tmp_path):
    assert opened(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), tmp_path / "a.png").min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert opened(Image.new("RGB", (5, 3)), tmp_path / "b.jpg", exif=exif).shape == (5, 3, 3)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    for name, message in (
        ("text.png", "text.png is not a picture"),
        ("cut.png", "cut.png is damaged"),
        ("none.png", "none.png: there is no such file"),
    ):
        with pytest.raises(PictureError, match=message):
            open_picture(tmp_path / name)


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(PictureError, match=r"huge\.png is .*the limit is 67,108,864 pixels"):
        open_picture(tmp_path / "huge.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10)
    Image.new("RGB", (11, 1)).save(tmp_path / "x.png")
    with pytest.raises(PictureError, match="11 × 1"):
        open_picture(tmp_path / "x.png")


def test_what_a_picture_is_told_is_read_back_in_any_script(tmp_path):
    about = {"prompt": "كمان 🎻 “violin”", "seed": 3, "edit": {"how": "mix"}}
    path = tmp_path / "new" / "x.png"
    save_picture(path, Image.new("RGB", (2, 2)), about)
    assert read_about(path) == about
    with Image.open(path) as image:
        assert image.text["Description"] == about["prompt"]
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_other_pictures_tell_nothing(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    (tmp_path / "y.png").write_text("no picture")
    assert read_about(tmp_path / "x.png") is read_about(tmp_path / "y.png") is None
