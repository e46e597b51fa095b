import json

import pytest
import torch
from PIL import Image

from gigagan.__main__ import main
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
    assert "drawn otherwise" in capsys.readouterr().err
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


def test_a_direction_is_found_and_moved_along(networks, tmp_path, capsys):
    file, out = tmp_path / "d.safetensors", tmp_path / "o"
    pairs = ["--without", "a cat", "a dog", "--having", "a red cat", "a red dog"]
    assert main(["edit", "direction", *networks, *pairs, "--out", str(file)]) == 0
    along = ["--along", str(file), "--strengths", "-1", "0.5"]
    assert main(["edit", "move", *networks, "a cat", *along, "--out", str(out)]) == 0
    assert read_about(out / "001.png")["along"] == {"file": "d.safetensors", "strength": 0.5}


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
