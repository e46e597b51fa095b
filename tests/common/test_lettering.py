import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from data.look.sheet import Tile, contact_sheet
from gigagan.common.lettering import length, wrapped, write

PAIRS = {  # of letters that are as wide: boxes for both would be equal pictures
    "German": ("ü", "ö"), "Chinese": ("猫", "犬"), "Japanese": ("あ", "お"), "Korean": ("고", "기"),
    "Arabic": ("ب", "ت"), "Hebrew": ("ח", "ה"), "Hindi": ("क", "फ"), "Thai": ("ก", "ถ"),
    "Tamil": ("ந", "த"), "Bengali": ("ব", "র"), "Khmer": ("ឆ", "ម"), "Georgian": ("კ", "პ"),
    "Greek": ("γ", "λ"), "emoji": ("🐈", "🐕"), "newer than Python": ("\U0001fae8", "\U0001fae9"),
}  # fmt: skip


def drawn(text, px=24):
    image = Image.new("L", (200, 60), "white")
    write(ImageDraw.Draw(image), (20, 10), text, px, "black")
    return np.asarray(image)


@pytest.mark.parametrize("script", PAIRS)
def test_letters_of_every_script_are_told_apart(script):
    one, other = (drawn(letter) for letter in PAIRS[script])
    assert (one < 128).any()
    assert not np.array_equal(one, other)


def test_a_line_of_several_scripts_is_as_long_as_what_is_drawn():
    for text in ("cat 猫 кот", "बिल्ली cat", "🐈 a cat"):
        right = (drawn(text) < 250).any(axis=0).nonzero()[0].max()
        assert right == pytest.approx(20 + length(text, 24), abs=3)


def test_letters_of_one_line_stand_on_one_base_line():
    bottoms = [(drawn(text) < 128).any(axis=1).nonzero()[0].max() for text in ("H", "H एH", "Hカ")]
    assert max(bottoms) - min(bottoms) <= 2


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow finds no FriBiDi")
def test_arabic_letters_are_joined_and_run_to_the_left():
    assert length("ببب", 24) < 2 * length("ب", 24)
    ink = drawn("اب") < 128  # an upright stroke, then a wide letter to the left of it
    columns = ink.any(axis=0).nonzero()[0]
    tall = ink.sum(axis=0)
    assert tall[columns.max() - 4 :].max() > 2 * np.median(tall[columns])


def test_parts_in_several_fonts_follow_the_direction_of_the_first_letter():
    def half(text):
        ink = (drawn(text) < 128).sum(axis=0)
        columns = ink.nonzero()[0]
        return ink[columns.min() : columns.min() + 12].tolist()

    cat = half("🐈")
    assert half("🐈 ب") != half("ب 🐈")
    assert half("ب 🐈") == cat  # read from the right, the cat comes last


@pytest.mark.parametrize("text", ["a cat on a chair " * 9, "猫" * 50, "बिल्ली" * 20, "w" * 90])
def test_lines_fit_and_together_are_the_text(text):
    lines = list(wrapped(text, 12, 100))
    assert len(lines) > 3
    assert all(length(line, 12) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert not [line for line in lines if unicodedata.category(line[0])[0] == "M"]


def test_what_cannot_be_drawn_is_marked_and_what_joins_stays():
    assert list(wrapped("a\x00b\ud800 \t\u2028c", 12, 500)) == ["a�b� c"]
    family = "👨\u200d👩\u200d👧"
    assert list(wrapped(family, 12, 500)) == [family]


def test_sheets_show_captions_of_every_script():
    one, other = (contact_sheet([Tile(None, [text])], title=text) for text in ("猫", "犬"))
    assert not np.array_equal(one, other)
