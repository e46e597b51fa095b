"""Training with heads on a frozen encoder, and with StyleGAN-T's generator."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from gigagan.config import ProjectedConfig, StyleTConfig, TextConfig, TrainBaseConfig
from gigagan.models import pretrained, snapshot
from gigagan.models.heads import ProjectedHeads
from gigagan.models.stylegan_t import StyleGANT
from gigagan.training import inputs, loop, step
from gigagan.training.augment import Augment
from gigagan.training.auxiliary import auxiliary_losses, see
from gigagan.training.captions import CaptionFeatures, RecentCaptions
from gigagan.training.distributed.world import World
from gigagan.training.logs import Log
from gigagan.training.tasks import task_of

from .small import GENERATOR, WordEncoder
from .test_training import NoProbe, ShadeBatch, ShadeLoader

pytestmark = pytest.mark.usefixtures("without_charts")

TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=11, width=11, depth=0)
CONFIG = TrainBaseConfig.model_validate(
    {
        "generator": StyleTConfig(channels=(8, 8), latent_dim=5, text=TEXT),
        "discriminator": ProjectedConfig(side=32, maps=4, virtual_batch=4, text=TEXT),
        "loss": {
            "adversarial": "hinge", "vision": 0, "contrastive": 0, "matching": 0.5,
            "hard_mismatches": 0, "matching_images": "both",
        },
        "optimizer": {"r1_weight": 0, "warmup_images": 8, "ema_half_life_images": 20},
        "augment": {"diffaugment": ("translation", "cutout")},
        "total_images": 32, "batch_size": 8, "checkpoint_images": 16, "sample_images": 16,
        "log_images": 16,
    }
)  # fmt: skip


def players(config):
    task = task_of(config)
    encoder = task.encoder(torch.device("cpu"))
    torch.manual_seed(config.seed)
    g, d = task.generator(), task.discriminator()
    weights = task.prediction_weights(d)
    return step.Players(g, d, weights, None, None, Augment(config.augment), encoder)


def drawn_inputs(config, made):
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    batch = ShadeBatch(0, config.batch_size, config.network.resolution)
    recent = RecentCaptions(9)
    return inputs.draw(config, made.augment, captions, recent, batch, 0, World())


def run(config, run_dir):
    made = players(config)
    run_dir.mkdir(exist_ok=True)
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    log = Log(run_dir, config.total_images)
    loader = ShadeLoader(config.network.resolution, size=config.batch_size)
    loop.train(config, made, captions, loader, NoProbe(), run_dir, log, World())
    return made


def gradients(*modules):
    parameters = itertools.chain(*(module.parameters() for module in modules))
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    whole = run(CONFIG, tmp_path / "whole")
    run(CONFIG.model_copy(update={"total_images": 16}), tmp_path / "parts")
    again = run(CONFIG, tmp_path / "parts")
    for a, b in ((whole.generator, again.generator), (whole.discriminator, again.discriminator)):
        assert any("_u" in name for name in whole.discriminator.state_dict())  # spectral norm's
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    network, _ = snapshot.load(tmp_path / "parts/snapshot.safetensors")
    assert isinstance(network, StyleGANT)
    assert network.style_mean[:5].abs().sum() > 0


def test_one_pass_of_the_encoder_serves_both_steps(monkeypatch):
    made = players(CONFIG)
    given = drawn_inputs(CONFIG, made)
    seen = []
    made.encoder.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    fakes = step.synthesize(made.generator, given)
    settings = {"auxiliary_strength": 0.0}
    step.discriminator_loss(made, CONFIG, given, fakes, **settings).loss.backward()
    assert seen == [8, 8]  # real and generated
    assert all(p.grad is None for p in made.generator.parameters())
    made.discriminator.requires_grad_(False)
    step.generator_loss(made, CONFIG, given, fakes, **settings).loss.backward()
    assert len(seen) == 2
    found = gradients(made.generator)

    made.generator.zero_grad()
    made.discriminator.eval()  # the power method's vectors stay
    again = list(step.synthesize(made.generator, given))  # a list knows of no features
    made.discriminator.train()
    step.generator_loss(made, CONFIG, given, again, **settings).loss.backward()
    assert len(seen) == 3
    for a, b in zip(found, gradients(made.generator), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_losses_are_those_of_the_formula():
    made = players(CONFIG)
    made.discriminator.eval()
    given = drawn_inputs(CONFIG, made)
    fakes = step.synthesize(made.generator, given)
    found = step.discriminator_loss(made, CONFIG, given, fakes, auxiliary_strength=0.0)

    def stages(images, draws):
        (seen,) = made.augment.apply([images], draws, 0)
        large = F.interpolate(seen, size=32, mode="bilinear", align_corners=False, antialias=True)
        return [x.detach() for x in made.encoder(large).stages]

    heads = made.discriminator
    real, drawn = stages(given.real[0], given.draws[0]), stages(fakes[0], given.draws[1])
    own, other = heads.read(given.text), heads.read(given.other_text)
    expected = 0.0
    for images, sign in ((real, 1), (drawn, -1)):
        expected += sum(F.relu(1 - sign * x).mean() for x in heads(images, own)) / 4
    assert all(given.has_other_B)
    for images in (real, drawn):
        rows = sum(F.relu(1 + x).mean() for x in heads(images, other)) / 4
        expected += CONFIG.loss.matching * rows  # two batches of B, over B
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)

    found = step.generator_loss(made, CONFIG, given, fakes, auxiliary_strength=0.0)
    expected = -sum(x.mean() for x in heads(drawn, own)) / 4
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_have_the_gradient_of_the_whole():
    """As ranks have: parts of a multiple of the virtual batch share its statistics."""
    made = players(CONFIG)
    made.discriminator.eval()
    whole = drawn_inputs(CONFIG, made)
    settings = {"auxiliary_strength": 0.0}

    def both(part, share):
        fakes = step.synthesize(made.generator, part)
        d = step.discriminator_loss(made, CONFIG, part, fakes, **settings).loss
        g = step.generator_loss(made, CONFIG, part, fakes, **settings).loss
        (share * d).backward(retain_graph=True)
        d_gradients = gradients(made.discriminator)
        (share * g).backward()
        return d_gradients

    both(whole, 1.0)
    expected = gradients(made.generator)
    made.generator.zero_grad()
    for part in inputs.split(whole, 2):
        both(part, 0.5)
    for a, b in zip(expected, gradients(made.generator), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_noise_is_drawn_from_seed_and_position():
    made = players(CONFIG)
    one, again = drawn_inputs(CONFIG, made), drawn_inputs(CONFIG, made)
    assert one.noise_BN.shape == (8, CONFIG.generator.noise_dim)
    assert torch.equal(one.noise_BN, again.noise_BN)
    assert abs(float(one.noise_BN.std()) - 1) < 0.05
    part = inputs.split(one, 2)[1]
    assert torch.equal(part.noise_BN, one.noise_BN[4:])


class Shades:
    """A set of pictures of a known size."""

    num_samples = 32

    def __init__(self, side):
        self.loader = ShadeLoader(side, size=8)

    def batches(self, images_seen=0):
        return self.loader.batches(images_seen)


def test_guidance_draws_pictures_towards_their_captions(tmp_path):
    loss = CONFIG.loss.model_copy(update={"guidance": 0.2, "vision_resolution": 32})
    loss = loss.model_copy(update={"auxiliary_start_images": 0, "ramp_images": 1})
    config = CONFIG.model_copy(update={"loss": loss})
    made = players(config)
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    log = Log(tmp_path, config.total_images)
    found = auxiliary_losses(config, Shades(16), captions, tmp_path, World(), log)
    assert not list(found.heads.parameters())  # the critic has its own
    made = dataclasses.replace(made, auxiliary=found)
    given = drawn_inputs(config, made)
    fakes = step.synthesize(made.generator, given)
    strength = {"auxiliary_strength": 0.5}
    with_it = step.generator_loss(made, config, given, fakes, **strength)
    without = step.generator_loss(made, CONFIG, given, fakes, **strength)
    seen = see(found.encoder, fakes[0], side=32).pooled_BD
    images, texts = found.space.embed_images(seen), found.space.embed_captions([], given.text)
    angle = torch.nn.functional.cosine_similarity(images, texts).arccos().square().mean()
    torch.testing.assert_close(with_it.metrics["g/guidance"], angle, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_it.loss, without.loss + 0.5 * 0.2 * angle, rtol=1e-4, atol=1e-5)
    made.generator.zero_grad()
    angle.backward()
    assert sum(float(x.abs().sum()) for x in gradients(made.generator)) > 0


def test_the_vision_aided_loss_can_have_heads_of_this_kind(tmp_path):
    """Beside the multi-scale discriminator, whose reading of the caption they share."""
    text = TextConfig(
        encoder="test:words", encoder_width=11, pooled_width=11, width=16, head_width=8
    )
    config = TrainBaseConfig.model_validate(
        {
            "generator": GENERATOR.model_copy(update={"text": text}).model_dump(),
            "discriminator": {
                "channels": (8, 8, 8), "levels": 1, "blocks": (0, 0, 0), "attention": (0, 0, 0),
                "text": text,
            },
            "loss": {
                "level_weights": (1,), "vision": 1, "vision_heads": "projected", "contrastive": 0,
                "vision_resolution": 32, "auxiliary_start_images": 0, "ramp_images": 1,
            },
            "batch_size": 8,
        }
    )  # fmt: skip
    captions = CaptionFeatures(WordEncoder(), torch.device("cpu"))
    log = Log(tmp_path, config.total_images)
    auxiliary = auxiliary_losses(config, Shades(16), captions, tmp_path, World(), log)
    assert isinstance(auxiliary.heads, ProjectedHeads)
    assert len(auxiliary.heads.heads) == 4  # strides 4 to 32
    made = dataclasses.replace(players(config), auxiliary=auxiliary)
    given = drawn_inputs(config, made)
    fakes = step.synthesize(made.generator, given)
    with torch.no_grad():
        text_BT = made.discriminator.read(given.text)
        auxiliary.heads.eval()  # the power method's vectors stay
        logits = [
            auxiliary.heads(auxiliary.see(x).stages, text_BT) for x in (given.real[0], fakes[0])
        ]
    expected = sum(
        F.softplus(sign * x).mean() / 4
        for sign, of_images in zip((-1, 1), logits, strict=True)
        for x in of_images
    )
    loss = auxiliary.discriminator_loss(given.real[0], fakes[0].detach(), text_BT)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    step.discriminator_loss(made, config, given, fakes, auxiliary_strength=1.0).loss.backward()
    assert all(p.grad is not None for p in auxiliary.heads.parameters())
    assert all(p.grad is None for p in made.generator.parameters())
    step.generator_loss(made, config, given, fakes, auxiliary_strength=1.0).loss.backward()
    assert any(p.grad is not None for p in made.generator.parameters())


def test_pictures_in_half_precision_can_be_seen():
    """A CPU that multiplies bf16 draws them so, and has no antialiased filter for them."""
    made = players(CONFIG)
    images = torch.rand(2, 3, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = see(made.encoder, images, side=32).pooled_BD
    pooled.float().sum().backward()
    assert images.grad.abs().sum() > 0


def test_pixels_beyond_the_range_of_pictures_have_a_gradient():
    made = players(CONFIG)
    images = (1.2 + torch.rand(1, 3, 32, 32)).requires_grad_()
    see(made.encoder, images, side=32).pooled_BD.sum().backward()
    assert (images.grad != 0).any()


def test_guidance_looks_at_a_crop_of_large_pictures():
    large = CONFIG.model_copy(
        update={
            "generator": StyleTConfig(channels=(8, 8, 8, 8, 8), latent_dim=5, text=TEXT),
            "loss": CONFIG.loss.model_copy(update={"guidance": 0.2}),
        }
    )
    crops = {
        task_of(large).given(torch.zeros(8, 3, 128, 128), random, World()).crop
        for random in (torch.Generator().manual_seed(seed) for seed in range(20))
    }
    assert len(crops) > 10
    assert all(0 <= top <= 64 and 0 <= left <= 64 for top, left in crops)


def test_there_is_no_r1():
    made = players(CONFIG)
    with pytest.raises(TypeError, match="R1 is not defined"):
        step.r1_loss(made, drawn_inputs(CONFIG, made))


def test_the_encoder_is_not_trained_and_not_saved():
    made = players(CONFIG)
    assert not any(p.requires_grad for p in made.encoder.parameters())
    assert sum(x.numel() for x in made.discriminator.state_dict().values()) < 10_000
    assert made.encoder is pretrained.critic_encoder("embedded:efficientnet-lite0")
