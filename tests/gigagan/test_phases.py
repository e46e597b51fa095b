"""The warm start: what each phase trains, how fast, and that nothing shows where a run was cut."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from gigagan import losses
from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    OptimizerConfig,
    TrainBaseConfig,
    TrainUpsamplerConfig,
    WarmStartConfig,
)
from gigagan.config.presets import PRESETS, preset
from gigagan.models.discriminator import Discriminator
from gigagan.models.generator import Generator
from gigagan.models.layers import DownBlock, MappingNetwork, halve_by_mean
from gigagan.training import step
from gigagan.training.inputs import split
from gigagan.training.phases import Phase, phase_at

from .test_training import BASE, ShadeBatch, draw, players, run

pytestmark = pytest.mark.usefixtures("without_charts")
WARM = BASE.model_copy(
    update={
        "warm_start": WarmStartConfig(
            images=20, lr=0.05, regression=3.0, gradients=0.25, head_start_images=8,
            ramp_images=8, adversarial=0.5,
        ),
        "optimizer": BASE.optimizer.model_copy(
            update={"warmup_images": 4, "lr": 0.01, "generator_rate": 0.5}
        ),
        "sample_images": 1_000,
    }
)  # fmt: skip


def rates(config, *positions):
    phases = [phase_at(config, position) for position in positions]
    return [phase.generator_lr for phase in phases], [phase.discriminator_lr for phase in phases]


def test_without_a_warm_start_both_networks_train_at_full_weight_from_the_first_step():
    config = BASE.model_copy(
        update={"optimizer": OptimizerConfig(lr=0.02, generator_rate=0.25, warmup_images=16)}
    )
    first = Phase(generator_lr=0.02 / 4 * 4 / 16, discriminator_lr=0.02 * 4 / 16)
    assert phase_at(config, 0) == first
    assert phase_at(config, 40) == Phase(generator_lr=0.02 / 4, discriminator_lr=0.02)
    assert (first.adversarial, first.regression, first.has_discriminator) == (1.0, 0.0, True)


def test_weights_and_rates_of_a_warm_start_follow_the_position():
    has_d = [phase_at(WARM, position).has_discriminator for position in (0, 16, 20, 44)]
    assert has_d == [False, False, True, True]
    weights = [phase_at(WARM, position).adversarial for position in (0, 16, 20, 28, 32, 36, 44)]
    assert weights == [0, 0, 0, 0, 0.25, 0.5, 0.5]
    assert {phase_at(WARM, position).regression for position in range(0, 48, 4)} == {3.0}
    # G's rate falls over the last fifth (4 of 20 images) to that of what follows; D warms up.
    config = WARM.model_copy(update={"batch_size": 2})
    g, d = rates(config, 2, 16, 18, 20, 22)
    assert g == pytest.approx([0.05, 0.05, (0.05 + 0.005) / 2, 0.005, 0.005])
    assert d == pytest.approx([0, 0, 0, 0.005, 0.01])


def test_rates_cool_down_to_nothing_over_the_last_images():
    optimizer = OptimizerConfig(lr=0.02, warmup_images=4, cooldown_images=16)
    config = BASE.model_copy(update={"optimizer": optimizer})  # 48 images, 4 a step
    g, d = rates(config, 28, 32, 40, 44)
    assert g == d == pytest.approx([0.02, 0.02, 0.01, 0.005])


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if "paper" in name or "imagenet" in name]
)
def test_the_papers_presets_have_no_warm_start(name):
    config = preset(name)
    assert config.warm_start.images == 0
    assert config.optimizer.discriminator_every == 1
    assert config.discriminator.halving == "low-pass"


def test_the_discriminator_takes_no_part_in_a_warm_start(tmp_path, monkeypatch):
    config = WARM.model_copy(update={"total_images": 20})
    before = {name: x.clone() for name, x in players(config).discriminator.state_dict().items()}
    worked = []
    trunk = Discriminator.trunk

    def watched(self, *arguments, **settings):
        worked.append(torch.is_grad_enabled())
        return trunk(self, *arguments, **settings)

    monkeypatch.setattr(Discriminator, "trunk", watched)
    made = run(config, tmp_path)
    assert not any(worked)  # but for the vital signs of the last image's look
    for name, x in made.discriminator.state_dict().items():
        assert torch.equal(x, before[name]), name
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("g/regression" in x for x in lines)
    assert not any("d/real" in x for x in lines)


class TwoShades(ShadeBatch):
    """Dark and light in turns, as their captions say."""

    def __init__(self, position, size, side):
        super().__init__(position, size, side)
        is_light = [(position + i) % 2 for i in range(size)]
        self.captions = self.planned_captions = [("dark", "light")[x] for x in is_light]
        shades = torch.tensor([(40, 220)[x] for x in is_light], dtype=torch.uint8)
        self.images_BCHW = shades[:, None, None, None].expand(size, 3, side, side).clone()


def test_pictures_come_nearer_to_their_captions_in_a_warm_start():
    warm = WARM.warm_start.model_copy(update={"images": 4_000, "lr": 0.02})
    config = WARM.model_copy(update={"warm_start": warm, "total_images": 4_000})
    made = players(config)
    optimizer = torch.optim.Adam(made.generator.parameters(), lr=0.02, betas=(0.0, 0.99))
    seen = []
    for position in range(0, 160, 4):
        inputs = draw(config, made, TwoShades(position, 4, 8), position)
        optimizer.zero_grad()
        loss, metrics = step.generator_loss(
            made, config, inputs, step.synthesize(made.generator, inputs),
            auxiliary_strength=0, phase=phase_at(config, position),
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        seen.append(metrics["g/regression"].item())
    assert sum(seen[-5:]) < sum(seen[:5]) / 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing cuts."""
    return run(WARM, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("cut", [16, 20, 40])
def test_a_run_cut_in_any_phase_ends_bit_for_bit_like_one_that_was_not(whole, tmp_path, cut):
    run(WARM.model_copy(update={"total_images": cut}), tmp_path / "parts")
    again = run(WARM, tmp_path / "parts")
    for a, b in ((whole.generator, again.generator), (whole.discriminator, again.discriminator)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name


def test_the_log_says_where_the_discriminator_comes_in(tmp_path, capsys):
    run(WARM, tmp_path)
    assert "20 images seen: the warm start ends, D comes in" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = {x["images"]: x["phase/adversarial"] for x in lines if "phase/adversarial" in x}
    assert (shown[16], shown[48]) == (0, 0.5)


def test_an_upsampler_starts_warm_by_its_fidelity_alone():
    config = TrainUpsamplerConfig.model_validate(
        {
            "warm_start": {"images": 8, "regression": 0},
            "lpips": 0,
            "pixel": 2.0,
            "upsampler": {
                "input_resolution": 8, "down_channels": [8], "up_channels": [8, 8],
                "kernels": [1, 2], "blocks": [1, 1], "attention": [0, 0],
                "text": BASE.generator.text.model_dump(),
            },
            "discriminator": {
                "channels": [8, 8, 8], "levels": 2, "blocks": [0, 0, 0], "attention": [0, 0, 0],
                "text": BASE.generator.text.model_dump(),
            },
            "loss": {"level_weights": [0.5, 0.5], "contrastive": 0, "vision": 0},
            "batch_size": 4,
        }
    )  # fmt: skip
    made = players(config)
    inputs = draw(config, made, ShadeBatch(3, 4, 16), 0)
    assert len(inputs.real) == config.network.num_images == 2
    fakes = step.synthesize(made.generator, inputs)
    loss, metrics = step.generator_loss(
        made, config, inputs, fakes, auxiliary_strength=0, phase=phase_at(config, 0)
    )
    loss.backward()
    assert set(metrics) == {"g/pixel"}
    wanted = 2 * (fakes[0] - inputs.real[0]).abs().mean()
    bank = made.generator.levels[-1].to_rgb.bank
    theirs = torch.autograd.grad(
        2 * (step.synthesize(made.generator, inputs)[0] - inputs.real[0]).abs().mean(), bank
    )[0]
    assert wanted > 0
    torch.testing.assert_close(bank.grad, theirs)


def test_a_warm_start_without_a_loss_is_refused():
    with pytest.raises(ValidationError, match="G would have no loss until then"):
        TrainBaseConfig(warm_start=WarmStartConfig(images=8, regression=0))
    with pytest.raises(ValidationError, match="G would have no loss until then"):
        TrainUpsamplerConfig(
            warm_start=WarmStartConfig(images=8, regression=0), pixel=0.0, lpips=0.0
        )


def test_regression_equals_its_definition_in_double_precision():
    random = torch.Generator().manual_seed(0)
    images, targets = (
        [torch.randn(2, 3, side, side, generator=random).double() for side in (6, 3)]
        for _ in range(2)
    )
    total = 0.0
    for x, y in zip(images, targets, strict=True):
        e = (x - y).numpy()
        level = abs(e).mean()
        across = [abs(e[..., i, j + 1] - e[..., i, j]).mean()
                  for i in range(e.shape[2]) for j in range(e.shape[3] - 1)]  # fmt: skip
        down = [abs(e[..., i + 1, j] - e[..., i, j]).mean()
                for i in range(e.shape[2] - 1) for j in range(e.shape[3])]  # fmt: skip
        level += 0.7 * (sum(across) / len(across) + sum(down) / len(down))
        total += level / 2
    found = losses.regression(images, targets, gradients=0.7)
    assert found.item() == pytest.approx(total, rel=1e-12)
    assert losses.regression(images, images, gradients=0.7).item() == 0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_discriminator_steps_every_so_often(tmp_path, monkeypatch, every):
    optimizer = BASE.optimizer.model_copy(
        update={"discriminator_every": every, "r1_every": 2 * every}
    )
    config = BASE.model_copy(update={"optimizer": optimizer, "sample_images": 1000})
    called, penalties = [], []
    original, r1 = step.discriminator_loss, step.r1_loss

    def count(players, config, inputs, *rest, **settings):
        called.append(inputs.images_seen)
        return original(players, config, inputs, *rest, **settings)

    def count_r1(players, inputs, **settings):
        penalties.append(inputs.images_seen)
        return r1(players, inputs, **settings)

    monkeypatch.setattr(step, "discriminator_loss", count)
    monkeypatch.setattr(step, "r1_loss", count_r1)
    run(config, tmp_path)
    assert called == list(range(0, 48, 4 * every))
    assert penalties == called[::2]


def test_penalties_between_two_steps_of_the_discriminator_are_refused():
    with pytest.raises(ValidationError, match="r1_every = 16 is no multiple of"):
        OptimizerConfig(discriminator_every=3)


def test_latents_count_as_much_as_they_are_given():
    torch.manual_seed(0)
    z, other, text = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 16)

    def effect(gain):
        torch.manual_seed(1)
        network = MappingNetwork(BASE.generator.model_copy(update={"latent_gain": gain}))
        return (network(z, text) - network(other, text)).square().mean().item()

    assert effect(0.0) == 0
    assert effect(0.3) < effect(1.0) / 4


def test_halving_by_the_mean_averages_two_by_two_pixels():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 4)
    slow = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    torch.testing.assert_close(halve_by_mean(x), slow)
    block = DownBlock(3, 5, gain=0.4, halve=halve_by_mean)
    wanted = block.trunk(slow) + F.leaky_relu(
        block.second(halve_by_mean(F.leaky_relu(block.first(x), 0.2))), 0.2
    )
    torch.testing.assert_close(block(x), wanted)


def test_a_discriminator_that_halves_by_the_mean_has_the_same_weights_and_other_logits():
    def made(halving):
        torch.manual_seed(0)
        return Discriminator(
            DiscriminatorConfig(
                channels=(8, 8, 16), levels=2, blocks=(1, 0, 0), attention=(0, 0, 0), text=None,
                halving=halving,
            )
        )  # fmt: skip

    mean, low_pass = made("mean"), made("low-pass")
    assert {n: x.shape for n, x in mean.state_dict().items()} == {
        n: x.shape for n, x in low_pass.state_dict().items()
    }
    torch.manual_seed(1)
    x = [torch.randn(2, 3, side, side) for side in (16, 8)]
    assert not torch.allclose(mean(x, None)[-1], low_pass(x, None)[-1])


def test_a_generator_of_single_filters_draws_the_same_in_either_memory_layout(monkeypatch):
    torch.manual_seed(0)
    generator = Generator(
        GeneratorConfig(
            channels=(16, 8, 8), kernels=(1, 1, 1), blocks=(1, 1, 1), attention=(0, 0, 0),
            text=None,
        )
    )  # fmt: skip
    z = torch.randn(3, 64)
    fast = generator(z, None)
    assert fast[0].shape == (3, 3, 16, 16)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self, **_: self)
    for a, b in zip(fast, generator(z, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_ranks_share_a_warm_start_with_one_process():
    """Each rank's part of the batch has the gradients of its part: their mean is the whole's."""
    made = players(WARM)
    whole = draw(WARM, made, ShadeBatch(0, 4, 8), 0)
    phase = phase_at(WARM, 0)
    fakes = step.synthesize(made.generator, whole)
    settings = {"auxiliary_strength": 0, "phase": phase}
    step.generator_loss(made, WARM, whole, fakes, **settings).loss.backward()
    expected = [p.grad.clone() for p in made.generator.parameters() if p.grad is not None]
    made.generator.zero_grad()
    for part in split(whole, 2):
        fakes = step.synthesize(made.generator, part)
        (0.5 * step.generator_loss(made, WARM, part, fakes, **settings).loss).backward()
    found = [p.grad for p in made.generator.parameters() if p.grad is not None]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_rank_measures_its_share_of_the_pictures_that_lpips_is_asked_for():
    config = TrainUpsamplerConfig.model_validate(
        {
            "lpips_samples": 4, "lpips_crop": 32, "batch_size": 8,
            "upsampler": {
                "input_resolution": 8, "down_channels": [8], "up_channels": [8, 8, 8],
                "kernels": [1, 1, 1], "blocks": [1, 1, 1], "attention": [0, 0, 0],
                "text": BASE.generator.text.model_dump(),
            },
            "discriminator": {
                "channels": [8, 8, 8, 8], "levels": 2, "blocks": [0] * 4, "attention": [0] * 4,
                "text": BASE.generator.text.model_dump(),
            },
            "loss": {"level_weights": [0.5, 0.5]},
        }
    )  # fmt: skip
    counts = []

    class Counting(torch.nn.Module):
        def forward(self, x, y):
            counts.append(len(x))
            return (x - y).square().mean((1, 2, 3))

    made = dataclasses.replace(players(config), perceptual=Counting())
    whole = draw(config, made, ShadeBatch(0, 8, 32), 0)
    for part in (whole, *split(whole, 2)):
        fakes = step.synthesize(made.generator, part)
        phase = Phase(True, 0.0, 0.0)
        step.generator_loss(made, config, part, fakes, auxiliary_strength=0, phase=phase)
    assert counts == [4, 2, 2]


# ---- several latents for a picture


def choosing(candidates, **more):
    warm = WARM.warm_start.model_copy(update={"candidates": candidates, **more})
    return WARM.model_copy(update={"warm_start": warm})


def test_each_picture_gets_the_latent_whose_small_drawing_is_nearest_to_it():
    config = choosing(5)
    made = players(config)
    inputs = draw(config, made, ShadeBatch(8, 4, 8), 8)
    chosen = step.with_nearest_latents(made.generator, inputs)
    for row in range(4):
        text = type(inputs.text)(*(part[row : row + 1] for part in inputs.text))
        errors = []
        for z_Z in inputs.candidates_BKZ[row]:
            with torch.no_grad():
                drawn = made.generator(z_Z[None], text)
            (small,) = [x for x in drawn if x.shape[-1] == 8]
            errors.append(float((small - inputs.real[0][row]).double().abs().mean()))
        best = min(range(5), key=errors.__getitem__)
        assert torch.equal(chosen.z_BZ[row], inputs.candidates_BKZ[row, best])
    assert torch.equal(draw(choosing(1), made, ShadeBatch(8, 4, 8), 8).z_BZ, inputs.z_BZ)
    halves = [step.with_nearest_latents(made.generator, part).z_BZ for part in split(inputs, 2)]
    assert torch.equal(torch.cat(halves), chosen.z_BZ)


class Unnamed(TwoShades):
    """The same pictures, of which captions say nothing."""

    def __init__(self, position, size, side):
        super().__init__(position, size, side)
        self.captions = self.planned_captions = ["a square"] * size


@pytest.mark.parametrize(("candidates", "is_told"), [(1, False), (6, True)])
def test_with_several_latents_a_caption_of_two_looks_is_drawn_as_either_and_not_as_their_mean(
    candidates, is_told
):
    config = choosing(candidates, images=4_000)
    made = players(config)
    optimizer = torch.optim.Adam(made.generator.parameters(), lr=0.01, betas=(0.0, 0.99))
    for position in range(0, 480, 4):
        inputs = draw(config, made, Unnamed(position, 4, 8), position)
        inputs = step.with_nearest_latents(made.generator, inputs)
        optimizer.zero_grad()
        step.generator_loss(
            made, config, inputs, step.synthesize(made.generator, inputs),
            auxiliary_strength=0.0, phase=phase_at(config, 0),
        ).loss.backward()  # fmt: skip
        optimizer.step()
    batch = draw(config, made, Unnamed(0, 4, 8), 0)
    z_NZ = torch.randn(64, config.generator.latent_dim, generator=torch.Generator().manual_seed(1))
    text = type(batch.text)(*(part[:1].expand(64, *part.shape[1:]) for part in batch.text))
    with torch.no_grad():
        shade_N = made.generator(z_NZ, text)[0].mean((1, 2, 3))
    assert (min((shade_N < -0.3).sum(), (shade_N > 0.3).sum()) >= 16) == is_told


def test_a_run_with_several_latents_goes_on_bit_for_bit(tmp_path):
    config = choosing(3)
    whole = run(config, tmp_path / "whole")
    run(config.model_copy(update={"total_images": 12}), tmp_path / "parts")
    again = run(config, tmp_path / "parts")
    for name, value in whole.generator.state_dict().items():
        assert torch.equal(value, again.generator.state_dict()[name]), name


def test_several_latents_are_refused_where_nothing_small_is_drawn():
    several = {"warm_start": {"images": 20, "candidates": 4}}
    with pytest.raises(ValidationError, match=r"candidates = 4, but only GigaGAN's generator"):
        TrainBaseConfig.model_validate(
            preset("stylegan_t_small_32").model_dump(mode="json") | several
        )
    with pytest.raises(ValidationError, match=r"candidates = 4, but what an upsampler draws"):
        TrainUpsamplerConfig.model_validate(several)
