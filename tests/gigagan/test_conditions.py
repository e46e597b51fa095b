"""Snapshots of networks that are told a class or nothing: drawn, edited, enlarged, exported."""

import json

import pytest
import torch
from PIL import Image

import gigagan
from gigagan.__main__ import main
from gigagan.config import ClassConfig
from gigagan.inference.page import Controls, Table
from gigagan.inference.pictures import read_about
from gigagan.inference.prompts import PromptError
from gigagan.models import snapshot
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler

from .small import GENERATOR, UPSAMPLER

NAMES = ("bell", "heart", "1", "moon")
CLASSES = ClassConfig(number=4, width=9, names=NAMES)
UP = {"input_resolution": 16}


def network(kind, of=GENERATOR, **changes):
    condition = {"class": CLASSES, "other": CLASSES.model_copy(update={"names": tuple("abcd")})}
    told = {"text": None, "classes": condition.get(kind)}
    config = of.model_copy(update={**({} if kind == "text" else told), **changes})
    return (Generator if of is GENERATOR else Upsampler)(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("conditions")
    found = {}
    for kind in ("class", "nothing", "other", "text"):
        for what, made in (
            ("base", network(kind)),
            ("up", network(kind, UPSAMPLER, **UP)),
        ):
            found[what, kind] = folder / f"{what}-{kind}.safetensors"
            snapshot.save(found[what, kind], made, {})
    return found


def pixels(pictures):
    return [picture.tobytes() for picture in pictures]


def test_a_class_is_drawn_by_its_name_or_number_and_a_name_goes_before_a_number(files):
    sampler = gigagan.load(str(files["base", "class"]))
    by_name, by_number = (sampler.sample([said], seed=3) for said in ("heart", "3"))
    assert pixels(by_name) != pixels(by_number)
    assert pixels(by_number) == pixels(sampler.sample(["moon"], seed=3))
    assert sampler.condition.check("1") == "1" == NAMES[2]
    with pytest.raises(PromptError, match=r"no class 'hart', did you mean 'heart'\?"):
        sampler.sample(["hart"], seed=0)


def test_an_unconditional_network_is_given_a_number_and_no_prompt(files):
    sampler = gigagan.load(str(files["base", "nothing"]))
    two = sampler.sample(2, seed=3)
    assert pixels(two) == pixels(sampler.sample(["", ""], seed=3))
    assert pixels(two)[0] != pixels(two)[1]
    assert pixels(sampler.sample(1, seed=3, truncation=0.0)) != pixels(two)[:1]
    with pytest.raises(PromptError, match="unconditional and reads no prompt such as 'a cat'"):
        sampler.sample(["a cat"], seed=0)


@pytest.mark.parametrize("base", ["class", "nothing"])
@pytest.mark.parametrize("up", ["class", "nothing", "other", "text"])
def test_an_upsampler_goes_with_a_base_that_is_told_what_it_reads(base, up, files):
    pair = str(files["base", base]), str(files["up", up])
    if up not in (base, "nothing"):
        told = {"class": "4 classes", "nothing": "nothing"}[base]
        with pytest.raises(snapshot.SnapshotError, match=f"the base is told {told}"):
            gigagan.load(*pair)
        return
    (picture,) = gigagan.load(*pair).sample(["moon" if base == "class" else ""], seed=0)
    assert picture.size == (32, 32)


def test_two_classes_mix_from_one_to_the_other(files, tmp_path, capsys):
    pair = ["--base", str(files["base", "class"]), "--upsampler", str(files["up", "class"])]
    out = tmp_path / "mixed"
    asked = ["edit", "interpolate", "bell", "moon", "--steps", "3", "--out", str(out), *pair]
    assert main(asked) == 0
    first, middle, last = (Image.open(out / f"{n:03d}.png") for n in range(3))
    sampler = gigagan.load(str(files["base", "class"]), str(files["up", "class"]))
    assert pixels([first, last]) == [
        pixels(sampler.sample([name], seed=0))[0] for name in ("bell", "moon")
    ]
    assert middle.tobytes() not in pixels([first, last])
    assert read_about(out / "001.png")["edit"]["prompt"] == "moon"
    assert main(["edit", "mix", "bell", "3", "--out", str(tmp_path / "m"), *pair]) == 0
    assert main(["edit", "mix", "bell", "sun", "--out", str(tmp_path / "n"), *pair]) == 1
    assert "the network knows no class 'sun'" in capsys.readouterr().err


def test_commands_draw_and_resume_and_refuse_what_is_not_read(files, tmp_path, capsys):
    out, untold = str(tmp_path / "drawn"), ["--base", str(files["base", "nothing"])]
    assert main(["sample", "--count", "3", "--out", out, "--grid", *untold]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["skipped"]) for line in lines] == [("", False)] * 3
    assert main(["sample", "--count", "4", "--out", out, *untold]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["skipped"] for line in lines] == [True, True, True, False]

    assert main(["sample", "a cat", "--out", out, *untold]) == 1
    assert "reads no prompts, 1 were given: leave them out" in capsys.readouterr().err
    told = ["--base", str(files["base", "class"]), "--out", str(tmp_path / "classes")]
    assert main(["sample", *told]) == 1
    assert "no prompts: give some" in capsys.readouterr().err
    assert main(["sample", "moon", "0", "sun", *told]) == 1
    said = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in said.out.splitlines()] == ["moon", "bell"]
    assert "no class 'sun'" in said.err


def test_an_unconditional_upsampler_enlarges_a_picture_that_says_nothing(files, tmp_path, capsys):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "plain.png")
    pair = ["--base", str(files["base", "class"]), "--upsampler", str(files["up", "nothing"])]
    asked = ["upscale", str(tmp_path / "plain.png"), "--out", str(tmp_path / "up"), *pair]
    assert main(asked) == 0
    assert Image.open(tmp_path / "up/plain.png").size == (32, 32)
    assert main([*asked, "--prompt", "bell", "--overwrite"]) == 1
    assert "unconditional and reads no prompt such as 'bell'" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "prompt"), [("class", ["--prompt", "2"]), ("nothing", [])])
def test_both_kinds_export_to_onnx(kind, prompt, files, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    out = tmp_path / "g.onnx"
    assert main(["export", str(files["base", kind]), str(out), *prompt]) == 0
    if kind == "class":
        assert main(["export", str(files["base", kind]), str(tmp_path / "h.onnx")]) == 1
        assert "give --prompt" in capsys.readouterr().err


def test_the_page_draws_classes_and_is_not_for_networks_that_read_nothing(files, tmp_path):
    table = Table(gigagan.load(str(files["base", "class"])), tmp_path)
    path = table.draw(Controls("3", 0, 1.0, "a blend", "heart", 0.5, 1, 1, False))
    assert read_about(path)["edit"]["prompt"] == "heart"
    with pytest.raises(ValueError, match="the page is for prompts"):
        Table(gigagan.load(str(files["base", "nothing"])), tmp_path)


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("imagenet_256", "1,000 classes"),
        ("imagenet_64_to_256", "nothing"),
        ("small_32", "captions, by embedded:minilm-l6"),
    ],
)
def test_describe_says_what_a_network_is_conditioned_on(preset, said, capsys):
    assert main(["describe", preset]) == 0
    assert capsys.readouterr().out.startswith(f"Conditioned on {said}.")
