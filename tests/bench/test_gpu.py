"""The command for GPU machines, as far as it can be tried without one."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.gpu import emoji, learn, pack, right, run
from bench.gpu.record import Record
from data.demo import PALETTE, TEMPLATES, Picture, draw, render
from flows.config import PipelineConfig
from gigagan.inference.sampler import load
from gigagan.models import pretrained
from gigagan.models.discriminator import Discriminator
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler
from gigagan.training.captions import CaptionFeatures

CPU = torch.device("cpu")
MILLION = 1e6


def lines_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def runs(pid):
    """Whether a process is there and not a zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


# ---- parts


def part(folder, name, text):
    """A stand-in for a part, found before the real one."""
    package = folder / "bench" / "gpu"
    package.mkdir(parents=True, exist_ok=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    source = Path(run.__file__).with_name("record.py").read_text()
    (package / "record.py").write_text(source)
    (package / f"{name}.py").write_text(textwrap.dedent(text))


def run_in(folder, monkeypatch, name, seconds):
    monkeypatch.chdir(folder)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    return run.run_part(name, seconds, pack_folder=folder, out=out, size="small"), out


def test_a_part_past_its_limit_ends_with_all_that_it_started_and_its_lines_stay(
    tmp_path, monkeypatch
):
    part(
        tmp_path,
        "right",
        """
        import subprocess, sys, time
        from bench.gpu.record import Record
        record = Record.of_environment("right")
        record.attempt("first", lambda: {"value": 7})
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        record.line("child", pid=child.pid)
        time.sleep(60)
    """,
    )
    began = time.monotonic()
    status, out = run_in(tmp_path, monkeypatch, "right", 4.0)
    assert status == "out of time"
    assert time.monotonic() - began < 40
    first, child, end = lines_of(out)
    assert (first["name"], first["status"], first["value"]) == ("first", "ok", 7)
    assert (end["name"], end["status"], end["part"]) == ("end", "out of time", "right")
    for _ in range(50):
        if not runs(child["pid"]):
            break
        time.sleep(0.1)
    assert not runs(child["pid"])


def test_a_part_that_ignores_the_signal_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    part(
        tmp_path,
        "fast",
        """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    """,
    )
    status, out = run_in(tmp_path, monkeypatch, "fast", 2.0)
    assert status == "out of time"
    assert lines_of(out)[-1]["exit"] == -signal.SIGKILL


def test_a_part_that_fails_is_a_line_and_the_next_one_runs(tmp_path, monkeypatch, capfd):
    part(tmp_path, "right", "raise SystemExit('no such card')")
    part(
        tmp_path,
        "fast",
        """
        from bench.gpu.record import Record
        Record.of_environment("fast").line("a", ms=1.5)
    """,
    )
    (tmp_path / "pack.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    arguments = ["--pack", ".", "--out", "out", "--parts", "right=20,fast=20"]
    assert run.main(arguments) == 1
    assert [(x["part"], x.get("status")) for x in lines_of(tmp_path / "out")] == [
        ("right", "failed"), ("fast", None), ("fast", "ok"),
    ]  # fmt: skip
    assert "no such card" in (tmp_path / "out" / "log.txt").read_text()


def test_a_check_that_fails_or_comes_too_late_is_a_line(tmp_path):
    record = Record("right", tmp_path, seconds=100)
    assert record.attempt("good", lambda: {"x": 1})
    assert not record.attempt("bad", lambda: 1 / 0)
    assert not record.attempt("late", lambda: {}, needs=1_000)
    good, bad, late = lines_of(tmp_path)
    assert (good["status"], bad["status"], late["status"]) == ("ok", "error", "left out")
    assert "ZeroDivisionError" in bad["error"]


@pytest.mark.parametrize(
    ("text", "named"), [("wrong", "wrong"), ("right=soon", "soon"), ("right=5,x=1", "x")]
)
def test_unknown_parts_and_times_are_refused_by_name(text, named):
    with pytest.raises(ValueError, match=named):
        run.parse_parts(text)


def test_without_a_packed_folder_it_says_how_to_get_one(tmp_path, capsys):
    assert run.main(["--pack", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "make gpu-pack" in capsys.readouterr().err


def test_the_command_needs_nothing_but_the_standard_library_to_start():
    code = "import sys; import bench.__main__, bench.gpu.run; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "pydantic", "prefect", "mlflow", "numpy"} & set(found)


# ---- the pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A pack of few things, without what would be downloaded or counted for minutes."""
    folder = tmp_path_factory.mktemp("gpu") / "pack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "_packages", lambda site: site.mkdir())
        patch.setattr(pack, "COUNTED", ())
        pack.lay_down(folder, num_things=60)
    return folder


def test_composed_pictures_are_those_of_the_embedded_source(packed):
    made = emoji.load(packed, 64, CPU)
    about = json.loads((packed / "pack.json").read_text())
    named = {c.cldr: c for c in pack.concepts()}
    for number in (3, 200, 550):
        look = made.looks[number]
        concept = named[about["things"][look.thing]["cldr"]]
        background = list(PALETTE)[look.background]
        glyph = render(concept.glyphs[look.style], 256)
        whole = draw(Picture(concept, look.style, background), glyph, (256, 256))
        expected = np.asarray(whole.resize((64, 64), Image.Resampling.LANCZOS), np.int16)
        found = made.compose([number])[0].permute(1, 2, 0).numpy().astype(np.int16)
        assert np.abs(found - expected).mean() < 1.0
        assert np.abs(found - expected).max() <= 32  # Lanczos overshoots; bytes cannot


def test_looks_are_divided_and_worded_as_the_embedded_source_does(packed):
    made = emoji.load(packed, 64, CPU)
    by = {split: [x for x in made.looks if x.split == split] for split in
          ("trained", "combination", "unseen")}  # fmt: skip
    known = {x.thing for x in by["trained"]}
    assert known == {x.thing for x in by["combination"]}
    assert not known & {x.thing for x in by["unseen"]}
    assert by["unseen"]
    assert len(by["combination"]) == len(known) * 4
    assert len({x.caption for x in made.looks}) == len(made.looks)
    held = [x.caption for x in by["combination"]]
    first = TEMPLATES[0].format(style="(flat|outlined)", name=".+", background=".+")
    assert all(re.fullmatch(first, caption) for caption in held)
    assert emoji.load(packed, 64, CPU).looks == made.looks


def test_the_packed_text_encoder_is_minilm_to_half_precision(packed):
    found = emoji.text_encoder(packed, CPU)
    expected = pretrained.text_encoder("embedded:minilm-l6")
    made = emoji.load(packed, 64, CPU)
    captions = [look.caption for look in made.looks[::100]]
    ours, theirs = found.encode(captions), expected.encode(captions)
    assert torch.equal(ours.mask_BL, theirs.mask_BL)
    assert float((ours.pooled_BD * theirs.pooled_BD).sum(1).min()) > 0.9999
    error = (ours.tokens_BLD - theirs.tokens_BLD).norm() / theirs.tokens_BLD.norm()
    assert float(error) < 0.01


def test_batches_are_a_function_of_the_position_and_hold_what_is_trained(packed):
    made = emoji.load(packed, 64, CPU)
    loader = emoji.EmojiLoader(made, batch_size=48)
    trained = {x.caption: i for i, x in enumerate(made.looks) if x.split == "trained"}
    epoch = [caption for _, batch in zip(range(len(trained) // 48), loader.batches(), strict=False)
             for caption in batch.captions]  # fmt: skip
    assert len(set(epoch)) == len(epoch)
    assert set(epoch) <= trained.keys()
    later = next(emoji.EmojiLoader(made, batch_size=48).batches(48 * 3))
    again = next(iter(list(zip(range(4), loader.batches(), strict=False))[3:]))[1]
    assert later.captions == again.captions == loader.captions_between(48 * 3, 48 * 4)
    assert torch.equal(later.images_BCHW, again.images_BCHW)
    assert torch.equal(later.images_BCHW, made.compose([trained[c] for c in later.captions]))


# ---- training


def configs():
    preset = PipelineConfig.preset("emoji")
    for size in (learn.FULL, learn.SMALL):
        base = learn.base_config(size["base"], preset.train_base.model_dump(mode="json"))
        up = learn.upsampler_config(
            size["upsampler"], preset.train_upsampler.model_dump(mode="json")
        )
        yield learn.planned(base, images=100_000, warm=60_000, rate=5_000.0)
        yield learn.planned(up, images=50_000, warm=50_000, rate=500.0)


def test_its_networks_fit_what_comes_back():
    for config in configs():
        with torch.device("meta"):
            is_base = config.kind == "base"
            g = Generator(config.generator) if is_base else Upsampler(config.upsampler)
            Discriminator(config.discriminator)
        assert sum(p.numel() for p in g.parameters()) < 7 * MILLION


def test_a_plan_is_made_of_whole_steps_with_the_warm_start_where_it_was_asked_for():
    for config in configs():
        for images in (config.total_images, config.warm_start.images, config.sample_images):
            assert images % config.batch_size == 0
        assert config.warm_start.images <= config.total_images
        since = config.total_images - config.warm_start.images
        assert config.warm_start.head_start_images + config.warm_start.ramp_images <= max(since, 1)


@pytest.mark.slow
def test_a_training_out_of_time_still_leaves_a_snapshot_and_a_picture(
    packed, tmp_path, monkeypatch
):
    monkeypatch.setattr(learn, "MARGIN", 50)
    record = Record("learn", tmp_path, seconds=1_000)
    captions = CaptionFeatures(emoji.text_encoder(packed, CPU), CPU)
    room = learn.Room(record, packed, tmp_path / "work", CPU, captions, is_small=True)
    made = emoji.load(packed, 64, CPU)
    preset = PipelineConfig.preset("emoji").train_base.model_dump(mode="json")
    config = learn.base_config(learn.SMALL["base"] | {"batch_size": 4}, preset)
    assert record.attempt("base", lambda: learn.one_training(room, "base", config, made, 1.0))
    line = lines_of(tmp_path)[-1]
    assert not line["whole"]
    assert line["images"] > 0
    (picture,) = load(tmp_path / "base.safetensors").sample([made.looks[0].caption], seed=0)
    assert picture.size == (64, 64)
    assert Image.open(tmp_path / "base.png").width > 300


# ---- right


def test_a_comparison_passes_on_the_same_device_and_fails_on_another_result():
    subject = right._adaptive(4)
    expected = right.gradients(subject, CPU, torch.float64, "fp32")
    found = right.compare(subject, expected, CPU, "fp32")
    assert found["gradient_error"] < 1e-5
    assert found["gradients"] == 8  # bank, bias, two of each reading of the style, and inputs
    with torch.no_grad():
        subject.module.bank[0] *= 1.1
    with pytest.raises(AssertionError, match="gradient_error"):
        right.compare(subject, expected, CPU, "fp32")


class Lossy(nn.Module):
    """Its gradient misses something."""

    def forward(self, x):
        return x.detach() * 2


def test_a_missing_gradient_is_no_agreement():
    x = torch.randn(3, dtype=torch.float64)
    whole = right.Subject(nn.Identity(), (x,), lambda m, x: (m(x) * 2).sum())
    lossy = right.Subject(Lossy(), (x,), lambda m, x: m(x).sum())
    expected = right.gradients(whole, CPU, torch.float64, "fp32")
    with pytest.raises(AssertionError, match="gradients of"):
        right.compare(lossy, expected, CPU, "fp32")


def test_every_subject_has_a_loss_with_gradients():
    for name, make in right.subjects().items():
        if "upsampler" in name or "step" in name:
            continue  # the same code on larger networks: minutes
        loss, found = right.gradients(make(), CPU, torch.float64, "fp32")
        assert loss.isfinite()
        assert found, name
