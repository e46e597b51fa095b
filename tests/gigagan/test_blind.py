"""The blind test: its sheet, and what is made of answers."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import gigagan.evaluation.report.results
import gigagan.inference.sampler
from gigagan.__main__ import main
from gigagan.commands.blind import KEY, TRAINED_ON, read_answers, score
from gigagan.evaluation.judges.statistics import matches_by_chance, share_interval
from gigagan.models import snapshot
from gigagan.models.generator import Generator

from . import shapes, small


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("shapes") / "heldout")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("snapshots") / "base.safetensors"
    snapshot.save(file, Generator(small.GENERATOR), {})
    return file


@pytest.fixture
def rows(monkeypatch):
    """What is put on sheets."""
    seen = []
    draw = gigagan.evaluation.report.results.caption_grid

    def caption_grid(rows, **settings):
        seen.append(rows)
        return draw(rows, **settings)

    monkeypatch.setattr(gigagan.evaluation.report.results, "caption_grid", caption_grid)
    return seen


def blind(out, *words):
    return main(["blind", "--out", str(out), *map(str, words)])


def key_of(out):
    return json.loads((out / KEY).read_text())


def test_the_sheet_shows_the_keys_real_pictures_and_tells_no_names(heldout, tmp_path, rows):
    assert blind(tmp_path, "--heldout", heldout, "--real", "--count", 4, "--seed", 5) == 0
    key = key_of(tmp_path)
    assert sorted(key["names"]) == sorted(shapes.TRAINED)
    (shown,) = rows
    assert [number for number, _ in shown] == ["1", "2", "3", "4"]
    for (_, (picture,)), name, caption in zip(shown, key["names"], key["captions"], strict=True):
        look = shapes.taken_apart(caption)
        assert look[0] == name
        assert shapes.split_of(*look) == "combination"
        assert np.array_equal(np.asarray(picture), shapes.draw(*look))
    names = (tmp_path / "names.txt").read_text().splitlines()
    assert sorted(names) == sorted(key["names"])
    assert names != key["names"]
    sheet = Image.open(tmp_path / "sheet.png")
    assert not sheet.info
    assert sheet.width > 4 * 5 * shapes.PX  # each enlarged five times


def test_a_seed_decides_the_sheet_and_another_makes_another(heldout, tmp_path):
    words = ["--heldout", heldout, "--real", "--count", 3, "--split", "trained"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert blind(tmp_path / name, *words, "--seed", seed) == 0
    captions = [key_of(tmp_path / name)["captions"] for name in "abc"]
    assert captions[0] == captions[1] != captions[2]
    assert {shapes.split_of(*shapes.taken_apart(c)) for c in captions[0]} == {"trained"}


def test_networks_draw_the_sheet_and_the_key_says_which(heldout, base, tmp_path, rows):
    words = ["--base", base, "--heldout", heldout, "--split", "unseen", "--count", 2]
    assert blind(tmp_path, *words) == 0
    assert [picture.size for _, (picture,) in rows[0]] == [(16, 16)] * 2
    key = key_of(tmp_path)
    assert len(key["snapshots"]["base"]) == 64
    assert (key["split"], key["truncation"], key["real"]) == ("unseen", 1.0, False)


def test_the_packages_networks_are_asked_for_what_their_list_says(base, tmp_path, monkeypatch):
    known = {
        "template": "{style} emoji of {name} on a {background} background",
        "styles": ["flat"],
        "backgrounds": ["teal", "pink"],
        "names": ["a padlock", "an owl", "scissors"],
    }
    monkeypatch.setattr(gigagan.inference.sampler, "PUBLISHED", tmp_path)
    shutil.copy(base, tmp_path / "emoji-32.safetensors")
    monkeypatch.setattr(
        gigagan.inference.sampler,
        "or_published",
        lambda *_: (tmp_path / "emoji-32.safetensors", None),
    )
    (tmp_path / TRAINED_ON).write_text(json.dumps(known))
    assert blind(tmp_path / "o", "--count", 3) == 0
    key = key_of(tmp_path / "o")
    assert sorted(key["names"]) == ["owl", "padlock", "scissors"]
    for name, caption in zip(key["names"], key["captions"], strict=True):
        article = {"owl": "an ", "padlock": "a ", "scissors": ""}[name]
        assert caption.startswith(f"flat emoji of {article}{name} on a ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--real"], "--real needs --heldout"),
        (["--split", "trained"], "--split needs --heldout"),
        (["--base", "b.safetensors"], "--base needs --heldout"),
        ([], "trained_on.json is not there.*--heldout"),
        (["--count", "1"], "--count 1: give 2 or more"),
        (["--heldout", "HELDOUT"], "--count 24, but .* has 4 concepts of the split 'combination'"),
        (["--heldout", "HELDOUT", "--split", "none"], "--split none: choose one of trained"),
        (["--heldout", "EMPTY"], "there is no gallery.json"),
    ],
)
def test_what_cannot_be_asked_is_said(heldout, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(gigagan.inference.sampler, "PUBLISHED", tmp_path)
    places = {"HELDOUT": heldout, "EMPTY": tmp_path}
    assert blind(tmp_path / "o", *(places.get(word, word) for word in words)) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()
    assert re.search(message, err), err


def test_a_sheet_under_way_is_not_replaced_unasked(heldout, tmp_path, capsys):
    words = ["--heldout", heldout, "--real", "--count", 3]
    assert blind(tmp_path, *words) == 0
    assert blind(tmp_path, *words) == 1
    assert "choose another --out, or --overwrite" in capsys.readouterr().err
    assert blind(tmp_path, *words, "--overwrite") == 0


# ---- answers

NAMES = ["padlock", "owl", "fire engine", "scissors", "an hour"]


@pytest.fixture
def answers(tmp_path):
    (tmp_path / KEY).write_text(json.dumps({"names": NAMES}))

    def write(text):
        (tmp_path / "answers.txt").write_text(text)
        return tmp_path / "answers.txt"

    return write


def test_right_answers_are_counted_and_wrong_ones_are_listed(answers, capsys):
    file = answers("# mine\n\n1: A Padlock\n2: the scissors\n3: fire engine\n4:\n5 : hour\n")
    assert main(["blind", "--answers", str(file)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("3 of 5 right: 60% (95 %: 23% to 88%). Guessing gives 0.8;")
    assert others == ["2: owl, answered: scissors", "4: scissors, answered: nothing"]


def test_an_empty_sheet_scores_nothing(answers):
    assert score(answers("1:\n2:\n")).startswith("0 of 5 right: 0%")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("owl", r"answers.txt:2: 'owl' is no answer: write `number: name`"),
        ("two: owl", r"answers.txt:2: 'two: owl' is no answer"),
        ("6: owl", r"answers.txt:2: there is no picture 6: give 1 to 5"),
        ("0: owl", r"there is no picture 0"),
        ("2: oul", r"answers.txt:2: 'oul' is none of the names: did you mean 'owl'\?"),
        ("2: zebra", r"'zebra' is none of the names: choose one of names.txt"),
        ("1: owl", r"answers.txt:2: 1 stands in line 1 already"),
        ("2: padlock", r"answers.txt:2: 'padlock' stands in line 1 already"),
    ],
)
def test_a_line_that_is_no_answer_is_named(answers, line, message):
    with pytest.raises(ValueError, match=message):
        read_answers(answers(f"1: padlock\n{line}\n"), NAMES)


def test_answers_without_their_key_or_of_no_text_are_refused(answers, tmp_path):
    file = answers("1: owl\n")
    file.write_bytes(b"1: \xff\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        score(file)
    for text in ("{", "[]", "{}", '{"names": []}', '{"names": [3]}'):
        (tmp_path / KEY).write_text(text)
        with pytest.raises(ValueError, match=r"key\.json is not a key that `blind` wrote"):
            score(file)
    (tmp_path / KEY).unlink()
    with pytest.raises(FileNotFoundError, match=r"no key\.json: leave the answers"):
        score(file)


# ---- how likely that is by chance


@pytest.mark.parametrize("answered", [2, 5])
def test_matches_by_chance_are_those_of_all_deals(answered):
    deals = list(itertools.permutations(range(5)))
    matches = [sum(deal[i] == i for i in range(answered)) for deal in deals]
    for right in range(answered + 1):
        expected = sum(found >= right for found in matches) / math.factorial(5)
        assert matches_by_chance(right, answered, 5) == pytest.approx(expected, abs=1e-15)
    with pytest.raises(ValueError, match="3 right of 2 answered"):
        matches_by_chance(3, 2, 5)


def test_the_interval_of_a_share_is_wilsons():
    low, high, _ = share_interval(17, 24)
    assert (low, high) == pytest.approx((0.5083, 0.8509), abs=1e-4)
    assert share_interval(0, 7).low == 0
    assert share_interval(7, 7).high == 1
    with pytest.raises(ValueError, match="8 of 7"):
        share_interval(8, 7)
