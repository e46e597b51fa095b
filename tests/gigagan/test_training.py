import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.config import (
    DiscriminatorConfig,
    LossConfig,
    OptimizerConfig,
    TrainBaseConfig,
    TrainUpsamplerConfig,
    UpsamplerConfig,
)
from gigagan.models.discriminator import Discriminator
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler
from gigagan.training import __main__ as training_main
from gigagan.training import charts, checkpoint, inputs, logs, loop, step
from gigagan.training.captions import CaptionFeatures, RecentCaptions
from gigagan.training.distributed.world import World
from gigagan.training.ema import Ema
from gigagan.training.guard import Divergence
from gigagan.training.logs import Log
from gigagan.training.probes import Look
from gigagan.training.run import Run

from .small import BASE, TEXT, WordEncoder

pytestmark = pytest.mark.usefixtures("without_charts")


class ShadeBatch:
    """Images whose grey value is written in their caption."""

    def __init__(self, position, size, side):
        values = [(position + i) * 7 % 250 for i in range(size)]
        self.captions = [f"a shade of value{v}" for v in values]
        shades = torch.tensor(values, dtype=torch.uint8)
        self.planned_captions = self.captions
        self.images_BCHW = shades[:, None, None, None].expand(size, 3, side, side).clone()


class ShadeLoader:
    """An endless set of shades; `rank` of `world_size` gets its part of every batch."""

    def __init__(self, side, size=4, rank=0, world_size=1, batch=ShadeBatch):
        self.side, self.size, self.rank, self.local = side, size, rank, size // world_size
        self.batch = batch

    def batches(self, images_seen=0):
        for position in itertools.count(images_seen, self.size):
            batch = self.batch(position + self.rank * self.local, self.local, self.side)
            batch.planned_captions = self.captions_between(position, position + self.size)
            yield batch

    def captions_between(self, start, stop):
        return self.batch(start, stop - start, 1).captions


class NoProbe:
    def look(self, generator):
        assert not generator.training
        return Look(Image.new("RGB", (2, 2)), {"probe/looked": 1.0})


def players(config):
    torch.manual_seed(config.seed)
    is_base = isinstance(config, TrainBaseConfig)
    g = Generator(config.generator) if is_base else Upsampler(config.upsampler)
    d = Discriminator(config.discriminator)
    weights = [1 / 3] * 3 if is_base else None
    return step.Players(g, d, weights or _uniform(d), None, None)


def _uniform(d):
    count = sum(min(j + 1, d.config.levels) for j in range(len(d.stages)))
    return [1 / count] * count


def draw(config, made, batch, images_seen, world=World()):  # noqa: B008
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    recent = RecentCaptions(9)
    return inputs.draw(config, made.augment, captions, recent, batch, images_seen, world)


def run(config, run_dir, side=8):
    made = players(config)
    run_dir.mkdir(exist_ok=True)
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    log = Log(run_dir, config.total_images)
    loop.train(config, made, captions, ShadeLoader(side), NoProbe(), run_dir, log, World())
    return made


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    whole = run(BASE, tmp_path / "whole")
    run(BASE.model_copy(update={"total_images": 24}), tmp_path / "parts")
    again = run(BASE, tmp_path / "parts")
    for a, b in ((whole.generator, again.generator), (whole.discriminator, again.discriminator)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    a, b = ((tmp_path / d / "snapshot.safetensors").read_bytes() for d in ("whole", "parts"))
    assert a == b


COOLED = BASE.model_copy(
    update={
        "optimizer": BASE.optimizer.model_copy(update={"cooldown_images": 10}),
        "checkpoint_images": 24, "keep_checkpoints": 1, "sample_images": 14, "snapshot_images": 14,
    }
)  # fmt: skip


def test_a_run_made_longer_ends_bit_for_bit_like_one_that_was_as_long_from_its_start(tmp_path):
    run(COOLED, tmp_path / "whole")
    short = COOLED.model_copy(update={"total_images": 30})
    run(short, tmp_path / "parts")
    assert [p.name for p in sorted((tmp_path / "parts/checkpoints").glob("*.pt"))] == [
        "images-0000000024.pt",  # the last at full rates, kept for this
        "images-0000000032.pt",
    ]
    run(COOLED, tmp_path / "parts")
    a, b = ((tmp_path / d / "snapshot.safetensors").read_bytes() for d in ("whole", "parts"))
    assert a == b
    for folder in ("samples", "snapshots"):
        a, b = (
            sorted(p.name for p in (tmp_path / d / folder).iterdir()) for d in ("whole", "parts")
        )
        assert a == b


def test_a_run_made_longer_from_where_rates_had_fallen_says_so(tmp_path, capsys):
    run(COOLED.model_copy(update={"total_images": 30}), tmp_path)
    checkpoint.discard(
        tmp_path / "checkpoints", after=0, but=lambda about: about["images_seen"] > 30
    )
    run(COOLED, tmp_path)
    assert "learning rates had fallen towards the end at 30" in capsys.readouterr().out


def test_a_run_writes_lines_pictures_charts_checkpoints_and_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "draw_health", charts.draw_health)
    run(BASE, tmp_path)
    with Image.open(tmp_path / "health.png") as page:
        assert page.width == charts.WIDTH_PX
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["images"] for x in lines if "d/real" in x] == [8, 16, 24, 32, 40, 48]
    assert any("d/r1" in x for x in lines)
    assert all("d/mismatch" in x for x in lines if "d/real" in x)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("*.pt"))] == [
        "images-0000000040.pt",
        "images-0000000048.pt",
    ]
    assert (tmp_path / "snapshot.safetensors").is_file()


def test_lines_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    run(BASE.model_copy(update={"total_images": 24}), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 32, "d/real": 9}\n{"images": 4')
    run(BASE, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    positions = [x["images"] for x in lines if "d/real" in x]
    assert positions == sorted(set(positions))
    assert 9 not in [x.get("d/real") for x in lines]


def test_a_half_written_checkpoint_is_never_picked(tmp_path):
    network = torch.nn.Linear(2, 2)
    checkpoint.save(tmp_path, 8, {"n": network}, {}, keep=2)
    (tmp_path / "images-0000000016.partial").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "images-0000000008.pt"


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path, 8, {"n": torch.nn.Linear(2, 2)}, {}, keep=2)
    with pytest.raises(checkpoint.CheckpointError, match="lacks \\['m'\\]"):
        checkpoint.restore(path, {"m": torch.nn.Linear(2, 2)})
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        checkpoint.restore(path, {"n": torch.nn.Linear(3, 2)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoint.CheckpointError, match="has 100 bytes instead of"):
        checkpoint.restore(path, {"n": torch.nn.Linear(2, 2)})


def recorded_step(monkeypatch, batch_size=6):
    """One D step; returns the inputs and every (maps, text) that a predictor was asked about."""
    config = BASE.model_copy(update={"batch_size": batch_size})
    made = players(config)
    batch = ShadeBatch(0, batch_size, 8)
    inputs = draw(config, made, batch, 0)
    asked = []
    original = made.discriminator.predict

    def predict(features, text_BT):
        asked.append((features, text_BT))
        return original(features, text_BT)

    monkeypatch.setattr(made.discriminator, "predict", predict)
    fakes = step.synthesize(made.generator, inputs)
    step.discriminator_loss(made, config, inputs, fakes, auxiliary_strength=0.0).loss.backward()
    return made.discriminator, inputs, fakes, asked


def test_real_images_meet_their_own_captions_and_mismatched_ones_others(monkeypatch):
    d, inputs, fakes, asked = recorded_step(monkeypatch)
    own = d.read(inputs.text)
    (pair, text), (mismatched, other_text) = asked
    B = len(own)
    torch.testing.assert_close(text, own.repeat(2, 1))
    real = d.trunk(inputs.real)
    fake = d.trunk([f.detach() for f in fakes])
    for maps, of_real, of_fake in zip(pair, real, fake, strict=True):
        torch.testing.assert_close(maps.maps_BCHW[:B], of_real.maps_BCHW, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps.maps_BCHW[B:], of_fake.maps_BCHW, rtol=1e-4, atol=1e-4)
    # The first half of the mismatched pairs is real, the second generated; captions are others'.
    for maps, of_real, of_fake in zip(mismatched, real, fake, strict=True):
        expected = torch.cat([of_real.maps_BCHW[: B // 2], of_fake.maps_BCHW[B // 2 :]])
        torch.testing.assert_close(maps.maps_BCHW, expected, rtol=1e-4, atol=1e-4)
    assert ((other_text - own).abs().amax(1) > 1e-3).all()
    assert all(any(torch.allclose(o, t, atol=1e-5) for t in own) for o in other_text)


def test_text_features_are_those_of_the_images_own_captions():
    config = BASE
    batch = ShadeBatch(40, 4, 8)
    inputs = draw(config, players(config), batch, 0)
    shades = (inputs.real[0][:, 0, 0, 0] + 1) * 127.5
    for b, shade in enumerate(shades.round().int().tolist()):
        expected = WordEncoder().encode([f"a shade of value{shade}"]).pooled_BD[0]
        torch.testing.assert_close(inputs.text.pooled_BD[b], expected, rtol=1e-2, atol=1e-3)


def test_the_upsampler_is_fed_the_small_version_of_its_own_target(tmp_path):
    config = TrainUpsamplerConfig(
        upsampler=UpsamplerConfig(
            input_resolution=8, down_channels=(8, 8), up_channels=(8, 8, 8), kernels=(1, 1, 2),
            blocks=(1, 1, 1), attention=(1, 0, 0), head_width=8, latent_dim=5, style_dim=12,
            text=TEXT, noise_augmentation=0.0,
        ),
        discriminator=DiscriminatorConfig(
            channels=(8, 8, 8), levels=2, blocks=(0, 0, 0), attention=(0, 0, 0), head_width=8,
            text=TEXT, minibatch_std=True,
        ),
        loss=LossConfig(level_weights=(0.6, 0.4)),
        lpips=0, total_images=16, batch_size=4, checkpoint_images=16, sample_images=16,
        log_images=8,
    )  # fmt: skip
    made = players(config)
    inputs = draw(config, made, ShadeBatch(3, 4, 16), 0)
    torch.testing.assert_close(inputs.given[0], inputs.real[0][:, :, ::2, ::2])
    run(config, tmp_path, side=16)
    assert (tmp_path / "snapshot.safetensors").is_file()


def test_randomness_is_a_function_of_seed_and_position_and_shared_over_ranks():
    made = players(BASE)
    whole = draw(BASE, made, ShadeBatch(8, 4, 8), 8)
    again = draw(BASE, made, ShadeBatch(8, 4, 8), 8)
    later = draw(BASE, made, ShadeBatch(8, 4, 8), 12)
    assert torch.equal(whole.z_BZ, again.z_BZ)
    assert not torch.equal(whole.z_BZ, later.z_BZ)
    parts = [
        draw(BASE, made, next(ShadeLoader(8, 4, rank, 2).batches(8)), 8, World(rank, 2))
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([part.z_BZ for part in parts]), whole.z_BZ)
    assert torch.equal(torch.cat([part.real[0] for part in parts]), whole.real[0])
    others = torch.cat([part.other_text.pooled_BD for part in parts])
    assert torch.equal(others, whole.other_text.pooled_BD)


def test_generator_step_leaves_no_gradient_in_the_discriminator():
    made = players(BASE)
    inputs = draw(BASE, made, ShadeBatch(0, 4, 8), 0)
    loop._require_grad(False, made.discriminator)
    fakes = step.synthesize(made.generator, inputs)
    step.generator_loss(made, BASE, inputs, fakes, auxiliary_strength=0.0).loss.backward()
    assert all(p.grad is None for p in made.discriminator.parameters())
    assert all(p.grad is not None for p in made.generator.parameters())


def test_a_run_whose_every_step_is_not_finite_ends_with_a_report(tmp_path):
    made = players(BASE)
    with torch.no_grad():
        made.generator.style_input.weight.fill_(float("nan"))
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    log = Log(tmp_path, BASE.total_images)
    with pytest.raises(Divergence, match="skipped_share_d"):
        loop.train(BASE, made, captions, ShadeLoader(8), NoProbe(), tmp_path, log, World())
    assert checkpoint.latest(tmp_path / "checkpoints") is None
    assert "skipped_share_d" in (tmp_path / "divergence" / "report.md").read_text()
    assert all(p.isfinite().all() for p in made.discriminator.parameters())


def test_the_generator_learns_at_its_own_share_of_the_rate(tmp_path):
    optimizer = BASE.optimizer.model_copy(update={"generator_rate": 0.25, "warmup_images": 0})
    config = BASE.model_copy(update={"optimizer": optimizer})
    made = Run(config, players(config), tmp_path, Log(tmp_path, 8), World())
    assert made.enter_phase().discriminator_lr == optimizer.lr
    assert {group["lr"] for group in made.opt_d.param_groups} == {optimizer.lr}
    assert {group["lr"] for group in made.opt_g.param_groups} == {optimizer.lr / 4}


def test_average_follows_with_its_half_life():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    ema = Ema(network, OptimizerConfig(ema_half_life_images=100, ema_ramp=1e9))
    torch.nn.init.ones_(network.weight)
    for seen in range(10, 110, 10):
        ema.update(network, seen, 10)
    assert ema.network.weight.item() == pytest.approx(0.5, abs=1e-6)
    assert not ema.network.weight.requires_grad


def test_caption_features_are_computed_once_and_do_not_depend_on_the_batch():
    class Counting(WordEncoder):
        calls = 0

        def encode(self, captions):
            Counting.calls += len(captions)
            return super().encode(captions)

    captions = CaptionFeatures(Counting(), torch.device("cpu"))
    captions.warm(["one two", "three"])
    both = captions(["three", "one two", "three"])
    alone = captions(["three"])
    assert Counting.calls == 2
    torch.testing.assert_close(both.tokens_BLD[0], alone.tokens_BLD[0])
    assert both.mask_BL.sum(1).tolist() == [1, 2, 1]
    assert both.mask_BL[:, :2].tolist() == [[True, False], [True, True], [True, False]]


@pytest.mark.slow
def test_a_tiny_network_learns_which_shade_a_caption_names(tmp_path):
    class TwoShades(ShadeBatch):
        def __init__(self, position, size, side):
            values = [(position + i) % 2 for i in range(size)]
            self.captions = [("black", "white")[v] for v in values]
            shades = torch.tensor(values, dtype=torch.uint8) * 255
            self.images_BCHW = shades[:, None, None, None].expand(size, 3, side, side).clone()

    config = BASE.model_copy(
        update={"total_images": 960, "batch_size": 8, "checkpoint_images": 960,
                "sample_images": 960, "log_images": 480}
    )  # fmt: skip
    made = players(config)
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))

    log = Log(tmp_path, config.total_images)
    loop.train(
        config,
        made,
        captions,
        ShadeLoader(8, 8, batch=TwoShades),
        NoProbe(),
        tmp_path,
        log,
        World(),
    )
    with torch.no_grad():
        z = torch.randn(8, 5)
        dark, light = (made.generator(z, captions([c] * 8))[0].mean() for c in ("black", "white"))
    assert light - dark > 1.0
    assert np.isfinite([dark.item(), light.item()]).all()


def test_training_refuses_widths_that_are_not_the_encoders(monkeypatch):
    monkeypatch.setattr(
        training_main.pretrained, "text_encoder", lambda name, device: WordEncoder()
    )
    assert training_main._text_encoder(TEXT, World()).name == "test:words"
    wide = TEXT.model_copy(update={"pooled_width": 13})
    with pytest.raises(ValueError, match=r"text\.pooled_width = 13 .*test:words: it gives 11"):
        training_main._text_encoder(wide, World())


def test_shards_of_another_size_are_refused_by_both_sizes_before_anything_is_loaded(
    tmp_path, monkeypatch
):
    class Shards64:
        resolution = 64

        def __init__(self, *arguments, **settings):
            pass

    monkeypatch.setattr(training_main, "ShardLoader", Shards64)
    with pytest.raises(ValueError, match=r"shards/064 holds .* 64 px, .* 32 px: give .*032"):
        training_main.run(TrainBaseConfig(), tmp_path, "shards/064", None, World())


def test_the_largest_seed_trains(tmp_path):
    made = run(BASE.model_copy(update={"seed": 2**63 - 1, "total_images": 8}), tmp_path)
    assert all(value.isfinite().all() for value in made.generator.state_dict().values())
