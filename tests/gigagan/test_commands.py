import json

import pytest
import torch
from PIL import Image

from gigagan.__main__ import main
from gigagan.inference import onnx_export
from gigagan.inference.pictures import read_about
from gigagan.models import snapshot
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler

from . import small

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("snapshots")
    files = folder / "base.safetensors", folder / "up.safetensors"
    up = small.UPSAMPLER.model_copy(update={"input_resolution": 16})
    snapshot.save(files[0], Generator(small.GENERATOR), {})
    snapshot.save(files[1], Upsampler(up), {})
    return ["--base", str(files[0]), "--upsampler", str(files[1])]


def told(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_line_of_json_and_the_png_tell_the_same(networks, tmp_path, capsys):
    out = str(tmp_path / "o")
    assert main(["sample", *networks, PROMPT, "--count", "2", "--seed", "5", "--out", out]) == 0
    lines = told(capsys)
    assert [line["number"] for line in lines] == [0, 1]
    for line in lines:
        about = read_about(line["path"])
        assert about == {k: v for k, v in line.items() if k not in ("path", "skipped")}
        assert (about["prompt"], about["seed"], about["upscaled"]) == (PROMPT, 5, True)
        assert all(len(digest) == 64 for digest in about["snapshots"].values())


def test_a_batch_goes_on_where_it_ended_with_the_same_pictures(networks, tmp_path, capsys):
    file, out = tmp_path / "prompts.txt", tmp_path / "o"
    file.write_text("# of two\na cat\n\na dog\na house\n")
    command = ["sample", *networks, "--from-file", str(file), "--out", str(out)]
    assert main([*command, "--batch-size", "3"]) == 0
    first = [path.read_bytes() for path in sorted(out.glob("*.png"))]
    assert len(first) == 3
    sorted(out.glob("*.png"))[1].unlink()
    capsys.readouterr()
    assert main([*command, "--batch-size", "3"]) == 0
    assert [line["skipped"] for line in told(capsys)] == [True, True, False]
    again = [Image.open(path).tobytes() for path in sorted(out.glob("*.png"))]
    (tmp_path / "x.png").write_bytes(first[1])
    with Image.open(tmp_path / "x.png") as before:
        difference = [abs(a - b) for a, b in zip(before.tobytes(), again[1], strict=True)]
    assert max(difference) <= 1


def test_pictures_of_other_settings_are_not_taken_for_these(networks, tmp_path, capsys):
    command = ["sample", *networks, PROMPT, "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 1
    assert "made otherwise" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--overwrite"]) == 0


def test_a_bad_line_is_named_and_the_others_are_drawn(networks, tmp_path, capsys):
    file, out = tmp_path / "prompts.txt", tmp_path / "o"
    file.write_text("a cat\n" + "word " * 400 + "\na dog\n")
    assert main(["sample", *networks, "--from-file", str(file), "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "prompts.txt:2" in err
    assert "402 tokens" in err
    assert "1 of 3 prompts were not drawn" in err
    assert [p.name for p in sorted(out.iterdir())] == ["000000.png", "000002.png"]
    assert main(["sample", *networks, "--from-file", str(file), "--out", str(out), "--cut"]) == 0


def test_no_prompts_are_an_error(networks, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# nothing\n")
    assert main(["sample", *networks, "--from-file", str(empty)]) == 1
    assert "no prompts" in capsys.readouterr().err
    assert main(["sample", *networks, ""]) == 1
    assert "empty" in capsys.readouterr().err


def test_drawn_pictures_are_enlarged_by_their_own_prompts(networks, tmp_path, capsys):
    drawn, large = tmp_path / "drawn", tmp_path / "large"
    assert main(["sample", *networks, PROMPT, "--no-upscale", "--out", str(drawn)]) == 0
    Image.new("L", (5, 3)).save(drawn / "mute.png")
    (drawn / "broken.png").write_text("no picture")
    capsys.readouterr()
    assert main(["upscale", *networks, str(drawn), "--out", str(large), "--times", "2"]) == 1
    out, err = capsys.readouterr()
    (line,) = (json.loads(text) for text in out.splitlines())
    assert (line["prompt"], line["width"]) == (PROMPT, 16 * 4)
    assert "mute.png does not say what it shows: give --prompt" in err
    assert "2 of 3 pictures were not enlarged" in err
    named = [str(drawn / "mute.png"), "--prompt", "x", "--out", str(large)]
    assert main(["upscale", *networks, *named]) == 0
    assert Image.open(large / "mute.png").size == (10, 6)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["interpolate", "a cat", "a dog", "--steps", "3"], 3),
        (["mix", "a cat", "a dog"], 3),
        (["swap", "a cat", "--style-seed", "4"], 3),
        (["truncate", "a cat", "--steps", "4"], 4),
    ],
)
def test_every_edit_writes_its_pictures_and_a_strip(networks, tmp_path, capsys, words, count):
    assert main(["edit", words[0], *networks, *words[1:], "--out", str(tmp_path)]) == 0
    assert len(told(capsys)) == count
    assert len(list(tmp_path.glob("0*.png"))) == count
    assert (tmp_path / "strip.png").is_file()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("0*.png")}
    assert main(["edit", words[0], *networks, *words[1:], "--out", str(tmp_path)]) == 0
    assert [line["skipped"] for line in told(capsys)] == [True] * count
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("0*.png")} == before


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OTHERS = {
    "sample": (["sample", PROMPT, "--out", "."], "000000.png"),
    "grid": (["sample", PROMPT, "--grid", "--out", "."], "grid.png"),
    "mix": (["edit", "mix", PROMPT, "a dog", "--out", "."], "001.png"),
    "strip": (["edit", "truncate", PROMPT, "--out", "."], "strip.png"),
    "gif": (["edit", "walk", PROMPT, "--frames", "2", "--out", "w.gif"], "w.gif"),
    "mp4": (["edit", "walk", PROMPT, "--frames", "2", "--out", "w.mp4"], "w.mp4"),
    "upscale": (["upscale", "in/x.png", "--prompt", PROMPT, "--out", "."], "x.png"),
    "snapshot": (["export", "BASE", "small.safetensors"], "small.safetensors"),
    "onnx": (["export", "BASE", "x.onnx", "--prompt", PROMPT], "x.onnx"),
}


def empty_onnx(path, *_):
    """A file that can be described and read: what is in it is looked at in test_export.py."""
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), str(path))


@pytest.mark.parametrize("name", OTHERS)
def test_no_command_writes_over_what_it_did_not_make(networks, tmp_path, capsys, monkeypatch, name):
    command, target = OTHERS[name]
    if name == "onnx":
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(onnx_export, "_trace", empty_onnx)
        monkeypatch.setattr(onnx_export, "_difference", lambda *_: 0.0)
    if command[0] == "export":
        command = [networks[1] if word == "BASE" else word for word in command]
    else:
        place = 2 if command[0] == "edit" else 1
        command = [*command[:place], *networks, *command[place:]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (3, 5)).save("in/x.png")
    (tmp_path / target).write_text("somebody's")
    before = contents(tmp_path)
    assert main(command) == 1
    err = capsys.readouterr().err
    assert f"{target} is there and" in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before
    assert main([*command, "--overwrite"]) == 0
    made = contents(tmp_path)
    assert made[tmp_path / target] != b"somebody's"
    assert main(command) == 0  # again: there already
    assert made.keys() == contents(tmp_path).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit", "mix", "a cat", "a dog", "--crossover", "99"], "crossover=99"),
        (["edit", "swap", "a cat", "--style-seed", "4", "--crossover", "-1"], "crossover=-1"),
        (["edit", "swap", "a cat", "--style-seed", "-4"], "--style-seed -4"),
        (["edit", "truncate", "a cat", "--truncation", "nan"], "--truncation nan"),
        (["edit", "truncate", "a cat", "--steps", "1"], "--steps 1"),
        (["edit", "interpolate", "a cat", "  "], "prompt is empty"),
        (["edit", "walk", "a cat", "--frames", "1", "--out", "o/w.gif"], "frames=1"),
        (["edit", "walk", "a cat", "--fps", "0", "--out", "o/w.gif"], "fps=0"),
        (["edit", "walk", "a cat", "--out", "o/w.avi"], "as .gif or .mp4"),
        (["sample", "a cat", "--count", "0"], "--count 0"),
        (["sample", "a cat", "--batch-size", "0"], "--batch-size 0"),
        (["sample", "a cat", "--seed", "-1"], "--seed -1"),
        (["sample", "a cat", "--seed", str(2**63)], "--seed 9223372036854775808"),
        (["sample", "a cat", "--truncation", "inf"], "--truncation inf"),
        (["upscale", "x.png", "--prompt", "a", "--times", "0"], "--times 0"),
        (["upscale", "x.png", "--prompt", "a", "--overlap", "16"], "overlap=16"),
        (["upscale", "x.png", "--prompt", ""], "prompt is empty"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    networks, tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 5)).save("x.png")
    place = 2 if words[0] == "edit" else 1
    assert main([*words[:place], *networks, *words[place:]]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_folder_is_enlarged_once_and_one_without_pictures_is_an_error(networks, tmp_path, capsys):
    drawn, out = tmp_path / "drawn", tmp_path / "large"
    assert main(["sample", *networks, PROMPT, "--count", "2", "--grid", "--out", str(drawn)]) == 0
    command = ["upscale", *networks, str(drawn), "--out", str(out)]
    capsys.readouterr()
    assert main(command) == 0
    assert len(told(capsys)) == 2  # grid.png is not a picture to enlarge
    before = contents(out)
    assert main(command) == 0
    assert [line["skipped"] for line in told(capsys)] == [True, True]
    assert contents(out) == before
    with Image.open(drawn / "000001.png") as picture:
        picture.rotate(180).save(drawn / "000001.png", pnginfo=None)
    assert main([*command, "--prompt", PROMPT]) == 1
    assert "000001.png is there and was made otherwise" in capsys.readouterr().err
    assert contents(out) == before
    (tmp_path / "empty").mkdir()
    assert main(["upscale", *networks, str(tmp_path / "empty"), "--out", str(out)]) == 1
    assert "empty holds no pictures" in capsys.readouterr().err


def test_a_file_is_not_replaced_by_what_is_made_of_it(networks, tmp_path, capsys):
    Image.new("RGB", (3, 5)).save(tmp_path / "x.png")
    up = ["upscale", *networks, str(tmp_path / "x.png"), "--prompt", "a", "--out", str(tmp_path)]
    assert main([*up, "--overwrite"]) == 1
    assert main(["export", networks[1], networks[1], "--overwrite"]) == 1
    assert capsys.readouterr().err.count("would be replaced by itself") == 2
    assert Image.open(tmp_path / "x.png").size == (3, 5)


@pytest.mark.parametrize("when", ["while modules are read", "at work"])
def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys, when):
    def interrupt(*_):
        raise KeyboardInterrupt

    what = "sample.add" if when == "while modules are read" else "describe.run"
    monkeypatch.setattr(f"gigagan.commands.{what}", interrupt)
    assert main(["describe", "demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_of_training_is_one_line_and_status_130(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("gigagan.training.__main__.main", interrupt)
    assert main(["train", "--config", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_without_the_encoders_weights_the_file_to_place_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GIGAGAN_WEIGHTS", raising=False)
    text = small.GENERATOR.text.model_copy(
        update={"encoder": "open_clip:ViT-L-14/openai", "encoder_width": 768, "pooled_width": 768}
    )
    config = small.GENERATOR.model_copy(update={"text": text})
    file = tmp_path / "clip.safetensors"
    snapshot.save(file, Generator(config), {})
    assert main(["sample", "--base", str(file), "a cat"]) == 1
    err = capsys.readouterr().err
    assert "GIGAGAN_WEIGHTS" in err
    assert "ViT-L-14-openai.safetensors" in err
