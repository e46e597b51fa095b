"""One test for each way in which public implementations are known to fail."""

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from gigagan import losses
from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    TextConfig,
    TrainBaseConfig,
    TrainUpsamplerConfig,
    UpsamplerConfig,
)
from gigagan.config.presets import PRESETS, preset
from gigagan.models.attention import AttentionBlock, SelfAttention, split_heads
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageEncoder, ImageFeatures, TextEncoder, TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import (
    AdaptiveConv,
    adaptive_conv2d,
    demodulation,
    filter_energy,
    pyramid,
)
from gigagan.models.upsampler import Upsampler
from gigagan.models.vision import VisionAidedDiscriminator
from gigagan.training import checkpoint, loop, step
from gigagan.training.auxiliary import Auxiliary
from gigagan.training.captions import CaptionFeatures, RecentCaptions
from gigagan.training.distributed.world import World
from gigagan.training.inputs import Inputs, draw
from gigagan.training.logs import Log
from gigagan.training.probes import Look
from gigagan.training.run import Run
from tests.gigagan.narrow import width_scaled

T = 16
TEXT = TextConfig(
    encoder="test:shades", encoder_width=T, pooled_width=T, width=T, head_width=8, depth=1
)
BASE = TrainBaseConfig(
    generator=GeneratorConfig(
        channels=(8, 8), kernels=(1, 2), blocks=(1, 1), attention=(0, 1), head_width=8,
        latent_dim=5, style_dim=12, text=TEXT,
    ),
    discriminator=DiscriminatorConfig(
        channels=(8, 8), levels=2, blocks=(1, 0), attention=(0, 1), head_width=8, text=TEXT
    ),
    loss=LossConfig(
        level_weights=(0.6, 0.4), auxiliary_start_images=0, ramp_images=1, auxiliary_every=1,
        vision_resolution=32, generator_matching=0.5,
    ),
    optimizer=OptimizerConfig(r1_weight=0, warmup_images=1_000),
    total_images=18, batch_size=6, checkpoint_images=18, sample_images=18, log_images=6,
)  # fmt: skip
UPSAMPLER = TrainUpsamplerConfig(
    upsampler=UpsamplerConfig(
        input_resolution=8, down_channels=(8, 8), up_channels=(8, 8, 8), kernels=(1, 1, 2),
        blocks=(1, 1, 1), attention=(1, 0, 0), head_width=8, latent_dim=5, style_dim=12, text=TEXT,
        noise_augmentation=0.0,
    ),
    discriminator=DiscriminatorConfig(
        channels=(8, 8, 8), levels=2, blocks=(0, 0, 0), attention=(0, 0, 0), head_width=8,
        text=TEXT,
    ),
    loss=LossConfig(level_weights=(0.6, 0.4)),
    lpips=1.0, lpips_samples=6, total_images=12, batch_size=6, checkpoint_images=12,
    sample_images=12, log_images=6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- pictures, captions and networks in which a grey value can be read everywhere


def name_of(shades):
    """Grey values in [−1, 1] as the numbers 0 … 255 that captions spell."""
    return ((shades.detach().float() + 1) * 127.5).round().int().tolist()


class ShadeEncoder(TextEncoder):
    """A caption is a number; its first feature is that grey value in [−1, 1]."""

    name = "test:shades"
    width = pooled_width = T
    max_tokens = 2

    def count_tokens(self, caption):
        return len(caption.split())

    def encode(self, captions):
        pooled = torch.ones(len(captions), T)
        pooled[:, 0] = torch.tensor([int(c) / 127.5 - 1 for c in captions])
        return TextFeatures(pooled[:, None], torch.ones(len(captions), 1, dtype=torch.bool), pooled)


class ShadeBatch:
    """Flat images with their grey value as caption, each value twice."""

    def __init__(self, position, size, side):
        values = [20 + (position // 2 + i // 2) * 37 % 200 for i in range(size)]
        self.captions = self.planned_captions = [str(v) for v in values]
        shades = torch.tensor(values, dtype=torch.uint8)
        self.images_BCHW = shades[:, None, None, None].expand(size, 3, side, side).clone()


class ShadeGenerator(Generator):
    """Draws what its caption says, with a trace of what the network draws."""

    def forward(self, z_BZ, features):
        shade = features.pooled_BD[:, :1, None, None]
        drawn = super().forward(z_BZ, features)
        return [shade + 0.004 * (x - x.mean((1, 2, 3), keepdim=True)) for x in drawn]


class Told(NamedTuple):
    """What a discriminator is told of one image beside one caption."""

    is_generated: bool
    is_own_caption: bool
    is_fake: bool


class Ledger:
    """What both discriminators are told, by the sign of the gradient of each logit."""

    def __init__(self):
        self.of_d, self.of_heads, self.of_generator = Counter(), Counter(), Counter()

    def watch(self, found, logits, image_B, spread_B, caption_B):
        shades, captions = name_of(image_B), name_of(caption_B)
        is_generated = (spread_B > 1e-5).tolist()

        def note(gradient):
            signs = gradient.flatten(1).sum(1).sign().tolist()
            for shade, caption, generated, sign in zip(
                shades, captions, is_generated, signs, strict=True
            ):
                assert sign != 0
                found[Told(generated, shade == caption, sign > 0)] += 1

        logits.register_hook(note)


class RecordingDiscriminator(Discriminator):
    """Writes the grey value of image and caption into what it passes on, and reads it there."""

    def __init__(self, config, ledger):
        super().__init__(config)
        self.ledger = ledger

    def read(self, features):
        return torch.cat([features.pooled_BD[:, :1], super().read(features)[:, 1:]], dim=1)

    def trunk(self, images, **how):
        found = []
        for seen in super().trunk(images, **how):
            image, maps = images[seen.level].detach(), seen.maps_BCHW
            tags = torch.stack([image.mean((1, 2, 3)), image.std((1, 2, 3))], dim=1)
            tags = tags[:, :, None, None].expand(-1, -1, *maps.shape[2:])
            found.append(seen._replace(maps_BCHW=torch.cat([tags, maps[:, 2:]], dim=1)))
        return found

    def predict(self, features, text_BT):
        logits = super().predict(features, text_BT)
        trains_d = self.from_rgb[0].weight.requires_grad
        found = self.ledger.of_d if trains_d else self.ledger.of_generator
        for seen, logit in zip(features, logits, strict=True):
            tags = seen.maps_BCHW[:, :2, 0, 0]
            self.ledger.watch(found, logit, tags[:, 0], tags[:, 1], text_BT[:, 0])
        return logits


class RecordingHeads(VisionAidedDiscriminator):
    """Notes what it is told; the encoder's first two maps are mean and spread of the image."""

    def __init__(self, ledger):
        super().__init__(PixelEncoder.stage_channels, text_width=T)
        self.ledger = ledger

    def forward(self, stages, text_BT, *, num_sets=1):
        logits = super().forward(stages, text_BT, num_sets=num_sets)
        mean, spread = stages[0][:, 0, 0, 0], stages[0][:, 1, 0, 0]
        trains_heads = self.heads[0].conv.weight.requires_grad
        found = self.ledger.of_heads if trains_heads else self.ledger.of_generator
        for logit in logits:
            self.ledger.watch(found, logit, mean, spread, text_BT[:, 0])
        return logits


FROZEN = 12_345.0
"""Marks every weight of the frozen encoder."""


class PixelEncoder(ImageEncoder):
    """Mean and spread of an image, and weights that no file may hold."""

    name = "test:pixels"
    width = T
    stage_channels = (3,)
    image_size = None

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(50, 50)
        for parameter in self.frozen.parameters():
            nn.init.constant_(parameter, FROZEN)

    def forward(self, x_BCHW):
        mean, spread = x_BCHW.mean((1, 2, 3)), x_BCHW.detach().std((1, 2, 3))
        flat = torch.stack([mean, spread, mean], dim=1)[:, :, None, None].expand(-1, -1, 4, 4)
        return ImageFeatures(mean[:, None] * torch.ones(T), [flat + 0 * x_BCHW[:, :, :4, :4]])


class ShadeSpace:
    """Images and captions of one grey value meet; both sides are kept."""

    scale = 10.0

    def __init__(self):
        self.met = []

    def embed_images(self, pooled_BD):
        self.images = pooled_BD
        return pooled_BD + torch.arange(T)

    def embed_captions(self, captions, text):
        self.met.append((name_of(self.images[:, 0]), [int(c) for c in captions]))
        return text.pooled_BD + torch.arange(T)


class NoProbe:
    def look(self, generator):
        return Look(Image.new("RGB", (2, 2)), {"probe/looked": 1.0})


def weights_of(config):
    return losses.prediction_weights(
        config.discriminator.pairs,
        config.loss.level_weights,
        intermediate=config.loss.intermediate,
    )


def train(config, players, run_dir, *, side):
    """The real training loop on grey pictures."""
    captions = CaptionFeatures(ShadeEncoder(), torch.device("cpu"))

    class Loader:
        def batches(self, images_seen=0):
            for position in itertools.count(images_seen, config.batch_size):
                yield ShadeBatch(position, config.batch_size, side)

        def captions_between(self, start, stop):
            return ShadeBatch(start, stop - start, side).captions if stop > start else []

    log = Log(run_dir, config.total_images)
    with mock.patch.object(Run, "vital_signs", return_value={}):  # they are not recorded
        loop.train(config, players, captions, Loader(), NoProbe(), run_dir, log, World())
    log.close()


def recording_players(config):
    ledger = Ledger()
    auxiliary = Auxiliary(config.loss, PixelEncoder(), ShadeSpace(), RecordingHeads(ledger))
    d = RecordingDiscriminator(config.discriminator, ledger)
    return ledger, step.Players(
        ShadeGenerator(config.generator), d, weights_of(config), auxiliary, None
    )


def changed(config, **sections):
    """A configuration with some fields of its sections replaced."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=u) for name, u in sections.items()}
    )


# ---- 1: pairs of image and caption


@pytest.mark.parametrize(
    ("images", "real_others", "generated_others"), [("real", 6, 0), ("half", 3, 3), ("both", 6, 6)]
)
def test_only_a_real_image_with_its_own_caption_is_told_real(
    images, real_others, generated_others, tmp_path
):
    config = changed(BASE, loss={"matching_images": images})
    ledger, players = recording_players(config)
    train(config, players, tmp_path, side=8)
    steps, predictions = 3, 3
    steps_of_heads = 2  # their strength is still 0 at the first
    of_d = {
        Told(is_generated=False, is_own_caption=True, is_fake=False): 6,
        Told(is_generated=True, is_own_caption=True, is_fake=True): 6,
        Told(is_generated=False, is_own_caption=False, is_fake=True): real_others,
        Told(is_generated=True, is_own_caption=False, is_fake=True): generated_others,
    }
    assert ledger.of_d == Counter({told: n * steps * predictions for told, n in of_d.items()})
    # The heads of the vision-aided loss see own captions only.
    of_heads = {
        Told(is_generated=False, is_own_caption=True, is_fake=False): 6,
        Told(is_generated=True, is_own_caption=True, is_fake=True): 6,
    }
    assert ledger.of_heads == Counter({told: n * steps_of_heads for told, n in of_heads.items()})
    # The generator wants to pass for real with its own captions only.
    of_generator = {
        Told(is_generated=True, is_own_caption=True, is_fake=False): (
            6 * (steps * predictions + steps_of_heads)
        ),
        Told(is_generated=True, is_own_caption=False, is_fake=True): 6 * steps * predictions,
    }
    assert ledger.of_generator == Counter(of_generator)


def test_the_contrastive_loss_meets_each_generated_image_with_its_own_caption(tmp_path):
    _, players = recording_players(BASE)
    train(BASE, players, tmp_path, side=8)
    met = players.auxiliary.space.met
    assert len(met) == 2
    assert all(images == captions for images, captions in met)


# ---- 2: overflow and half precision (the losses at extreme logits: test_losses.py)


def test_r1_is_computed_in_float32_where_the_rest_is_bf16(tmp_path):
    class Watching(Discriminator):
        def trunk(self, images, **how):
            found = super().trunk(images, **how)
            dtypes.add((how.get("double_backward", False), found[0].maps_BCHW.dtype))
            return found

    dtypes = set()
    one_stage = {"channels": (8,), "blocks": (1,), "attention": (1,)}
    config = changed(
        BASE,
        generator=one_stage | {"kernels": (2,)},
        discriminator=one_stage | {"levels": 1},
        loss={"level_weights": (1.0,)},
        optimizer={"r1_weight": 1.0, "r1_every": 1},
    ).model_copy(update={"precision": "bf16", "total_images": 6})
    d = Watching(config.discriminator)
    players = step.Players(Generator(config.generator), d, weights_of(config), None, None)
    train(config, players, tmp_path, side=4)
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_run_in_bf16_has_finite_losses_and_gradients(tmp_path):
    config = BASE.model_copy(update={"precision": "bf16", "total_images": 6})
    d = Discriminator(config.discriminator)
    players = step.Players(Generator(config.generator), d, weights_of(config), None, None)
    train(config, players, tmp_path, side=8)  # stops where anything is not finite
    assert (tmp_path / "snapshot.safetensors").is_file()


@pytest.mark.parametrize("num_kernels", [1, 3])
@pytest.mark.parametrize("style", [1e-4, 1.0, 1e4, 1e9])
def test_demodulated_maps_are_of_unit_variance_in_bf16_for_huge_and_small_styles(
    style, num_kernels
):
    x, bank = torch.randn(2, 32, 8, 8), torch.randn(num_kernels, 16, 32, 3, 3)
    scale = (style * torch.randn(2, 32)).requires_grad_()
    select = torch.randn(2, num_kernels).softmax(1)
    bank.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = adaptive_conv2d(x, bank, select, scale)
    assert y.dtype == torch.bfloat16
    assert 0.8 < y.float().std() < 1.2
    y.float().square().sum().backward()
    assert scale.grad.isfinite().all()
    assert bank.grad.isfinite().all()


@pytest.mark.parametrize("num_kernels", [1, 3])
def test_demodulation_stays_in_float32_under_autocast(num_kernels):
    filters, scale = torch.randn(num_kernels, 16, 32, 3, 3), torch.randn(num_kernels, 32)
    each = torch.eye(num_kernels)
    expected = demodulation(filter_energy(filters.double(), each.double()), scale.double())
    with torch.autocast("cpu", torch.bfloat16):
        factor = demodulation(filter_energy(filters, each), scale)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-5, atol=0)


def test_the_selection_of_a_filter_stays_in_float32_under_autocast():
    layer, style = AdaptiveConv(4, 4, style_dim=T, num_kernels=3), 100 * torch.randn(5, T)
    with torch.autocast("cpu", torch.bfloat16):
        select, _ = layer.read(style)
    assert select.dtype == torch.float32
    torch.testing.assert_close(select.sum(1), torch.ones(5))


# ---- 3: a latent that moves nothing


def captions_of(config, size):
    """Random captions, or classes, for a network."""
    if config.text is None:
        return None if config.classes is None else torch.arange(size)
    return TextFeatures(
        torch.randn(size, 6, config.text.encoder_width),
        torch.ones(size, 6, dtype=torch.bool),
        torch.randn(size, config.text.pooled_width),
    )


def repeated(features, times):
    """Each caption several times in a row."""
    if isinstance(features, torch.Tensor):
        return features.repeat_interleave(times, 0)
    return features and TextFeatures(*(x.repeat_interleave(times, 0) for x in features))


def small_twin(name):
    """A preset's drawing network, narrow enough for this machine."""
    config = preset(name)
    config = config.generator if isinstance(config, TrainBaseConfig) else config.upsampler
    if not name.startswith("small"):
        config = width_scaled(config, 2 if name.startswith("ladder") else 16)
    if isinstance(config, GeneratorConfig):
        return Generator(config)
    # No layer knows the side of the input.
    side = 4 << (len(config.down_channels) - 1)
    network = Upsampler(config.model_copy(update={"input_resolution": side}))
    for level in network.levels:
        if level.to_rgb is not None:  # which starts at zero: the enlarged input is left alone
            nn.init.normal_(level.to_rgb.bank)
    return network


@torch.no_grad()
def variances(network, num):
    """Mean variance of a pixel over z at a fixed caption, and over captions at a fixed z."""
    z = torch.randn(num, network.config.latent_dim).repeat(num, 1)
    text = repeated(captions_of(network.config, num), num)
    if isinstance(network, Upsampler):
        side = network.config.input_resolution
        small, noise = torch.randn(2, 1, 3, side, side).expand(-1, num * num, -1, -1, -1)
        images = network(small, noise, z, text)
    else:
        images = network(z, text)
    grid = images[0].unflatten(0, (num, num))
    return grid.var(dim=1).mean().item(), grid.var(dim=0).mean().item()


OF_GIGAGAN = [name for name in PRESETS if not name.startswith("stylegan_t")]


@pytest.mark.parametrize("name", [name for name in OF_GIGAGAN if name != "imagenet_64_to_256"])
def test_latent_and_prompt_both_move_the_image(name):
    network = small_twin(name)
    by_z, by_prompt = variances(network, 6 if network.config.resolution < 128 else 4)
    assert 0.2 < by_z / (by_z + by_prompt) < 0.8


def test_without_a_prompt_the_latent_moves_the_image():
    by_z, by_prompt = variances(small_twin("imagenet_64_to_256"), 4)
    assert by_prompt == 0
    assert by_z > 0.01


# ---- 4 and 5: attention


def self_weight(layer, positions, *, scale):
    """Mean weight of a position on itself, for independent positions of unit variance."""
    channels = layer.to_qk.weight.shape[1]
    keys = split_heads(layer.to_qk(torch.randn(1, positions, channels)), layer.head_width)
    weights = (-scale * torch.cdist(keys, keys).square()).softmax(-1)
    return weights.diagonal(dim1=-2, dim2=-1).mean().item()


@pytest.mark.parametrize("head_width", [32, 64])
def test_attention_is_not_the_identity_at_initialisation_as_it_would_be_with_root_d(head_width):
    layer = SelfAttention(2 * head_width, head_width=head_width, scale=None, style_dim=None)
    assert 2 / 256 < self_weight(layer, 256, scale=layer.scale) < 0.1
    assert self_weight(layer, 256, scale=head_width**-0.5) > 0.9


@pytest.mark.parametrize("name", OF_GIGAGAN)
def test_every_preset_leaves_attention_its_scale(name):
    config = preset(name)
    drawing = config.generator if isinstance(config, TrainBaseConfig) else config.upsampler
    for network in (drawing, config.discriminator):
        assert network.attention_scale is None or network.attention_scale <= 2 / network.head_width


def draw_with(network, seed=1):
    """The largest image of a network for fixed noise."""
    torch.manual_seed(seed)
    size, dtype = 2, next(network.parameters()).dtype
    tokens, mask, pooled = captions_of(network.config, size)
    inputs = (
        torch.randn(size, network.config.latent_dim, dtype=dtype),
        TextFeatures(tokens.to(dtype), mask, pooled.to(dtype)),
    )
    if isinstance(network, Upsampler):
        side = network.config.input_resolution
        return network(*torch.randn(2, size, 3, side, side, dtype=dtype), *inputs)[0]
    return network(*inputs)[0]


@pytest.mark.parametrize("name", ["small_32", "small_32_to_128", "paper_64"])
def test_self_attention_is_by_distance(name):
    """Distances do not change where all tied queries and keys are moved; dot products do."""
    network = small_twin(name).double()
    before = draw_with(network)
    layers = [m for m in network.modules() if isinstance(m, SelfAttention)]
    assert len(layers) == sum(network.config.attention) > 0
    for layer in layers:
        moved = 2 * torch.randn(layer.to_qk.weight.shape[0], dtype=torch.double)
        layer.to_qk.register_forward_hook(lambda layer, inputs, qk, moved=moved: qk + moved)
    torch.testing.assert_close(draw_with(network), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["small_32", "small_32_to_128", "paper_64"])
def test_the_style_takes_part_in_every_self_attention_of_a_generator(name):
    network = small_twin(name)
    before = draw_with(network).detach()
    layers = [m for m in network.modules() if isinstance(m, SelfAttention)]
    assert len(layers) == sum(network.config.attention) > 0
    for layer in layers:
        # Another w for this token alone.
        hook = layer.style_token.register_forward_hook(lambda layer, inputs, token: token.flip(1))
        assert (draw_with(network) - before).abs().max() > 1e-5
        hook.remove()


def test_branches_of_attention_are_added_with_a_reduced_gain():
    config = GeneratorConfig(text=TEXT, head_width=8)
    block = AttentionBlock(32, config, style_dim=T, text_width=T)
    x = torch.randn(2, 32, 8, 8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    y = block(x, torch.randn(2, T), torch.randn(2, 3, T), mask)
    # Four branches of gain 1 would leave the trunk a quarter of the standard deviation.
    assert (x * y).mean() / (x.std() * y.std()) > 0.8


@pytest.mark.parametrize("name", ["small_32", "small_32_to_128"])
def test_every_weight_has_an_equalized_learning_rate(name):
    """Weights start with unit variance, whatever their fan-in; their layer scales them."""
    drawn = small_twin(name)
    for network in (drawn, Discriminator(preset(name).discriminator)):
        slow = getattr(network.config, "mapping_lr_multiplier", 1.0)
        found = 0
        for path, weight in network.named_parameters():
            if weight.dim() > 1 and weight.numel() > 1_000:
                unit = 1 / slow if path.startswith("mapping") else 1.0
                assert weight.std().item() == pytest.approx(unit, rel=0.1), path
                found += 1
        assert found > 20


# ---- 6: the discriminator's levels

THREE = DiscriminatorConfig(
    channels=(8, 16, 16), levels=3, blocks=(1, 0, 2), attention=(0, 1, 1), head_width=8, text=TEXT,
    minibatch_std=True,
)  # fmt: skip


def three_images(**how):
    return [torch.randn(3, 3, side, side, **how) for side in (16, 8, 4)]


@pytest.mark.parametrize("double_backward", [False, True])
def test_a_level_has_no_gradient_at_all_from_the_predictions_of_another(double_backward):
    d = Discriminator(THREE)
    images = three_images(requires_grad=True)
    logits = d(images, captions_of(THREE, 3), double_backward=double_backward)
    for (level, _), logit in zip(THREE.pairs, logits, strict=True):
        gradients = torch.autograd.grad(
            logit.sum(), images, retain_graph=True, materialize_grads=True
        )
        assert [bool(g.any()) for g in gradients] == [i == level for i in range(3)]


def test_levels_that_leave_after_one_stage_share_its_predictor():
    d = Discriminator(THREE)
    assert len(d.predictors) == 3
    assert len(THREE.pairs) == 6
    images, text = three_images(), captions_of(THREE, 3)
    before = d(images, text)
    for stage, predictor in enumerate(d.predictors.values()):
        with torch.no_grad():
            kept = [p.clone() for p in predictor.parameters()]
            for p in predictor.parameters():
                p.zero_()
            after = d(images, text)
            for p, value in zip(predictor.parameters(), kept, strict=True):
                p.copy_(value)
        for (_, j), a, b in zip(THREE.pairs, before, after, strict=True):
            assert torch.equal(b, a if j != stage else torch.zeros_like(a))


def test_r1_covers_every_level():
    config = BASE.model_copy(update={"discriminator": THREE})
    d = Discriminator(THREE)
    players = step.Players(nn.Module(), d, [1 / 6] * 6, None, None)
    text = captions_of(THREE, 3)
    inputs = Inputs(
        three_images(), ["a"] * 3, text, torch.randn(3, 5), text,
        torch.ones(3, dtype=torch.bool),
    )  # fmt: skip
    step.r1_loss(players, inputs).loss.backward()
    assert config.discriminator.levels == len(d.from_rgb) == 3
    # Where only one level's gradient is penalised, no other level's first layer enters it.
    assert all(layer.weight.grad.any() for layer in d.from_rgb)


# ---- 7: batch and tokens swapped in open_clip's blocks


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_captions_features_stay_its_own_where_batch_and_tokens_are_as_many(batch_first):
    from open_clip.transformer import Transformer

    from gigagan.models.openclip import OpenClipText

    size = tokens = 5
    model = SimpleNamespace(
        transformer=Transformer(width=8, layers=3, heads=2, batch_first=batch_first).eval(),
        token_embedding=nn.Embedding(50, 8),
        positional_embedding=torch.randn(7, 8),
        attn_mask=torch.full((7, 7), float("-inf")).triu(1),
        ln_final=nn.LayerNorm(8),
        context_length=7,
    )

    def tokenizer(captions):
        ids = torch.zeros(len(captions), 7, dtype=torch.long)
        for row, caption in enumerate(captions):
            words = [int(w) for w in caption.split()]
            ids[row, : len(words) + 1] = torch.tensor([*words, 49])
        return ids

    encoder = OpenClipText("test", model, tokenizer)
    captions = [" ".join(str(1 + 7 * i + j) for j in range(tokens - 1)) for i in range(size)]
    together = encoder.encode(captions)
    assert together.tokens_BLD.shape == (size, tokens - 1, 8)
    for row, caption in enumerate(captions):
        alone = encoder.encode([caption])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs)


# ---- 8 and 10: what is saved


def tensors_in(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def num_elements(tensors):
    return sum(t.numel() for t in tensors)


def test_no_file_holds_a_frozen_encoder_and_a_checkpoint_holds_all_else(tmp_path):
    _, players = recording_players(BASE)
    train(BASE, players, tmp_path, side=8)
    networks = {
        "generator": players.generator,
        "discriminator": players.discriminator,
        "heads": players.auxiliary.heads,
    }
    saved = torch.load(checkpoint.latest(tmp_path / "checkpoints"), weights_only=True)
    assert saved.keys() == {*networks, "opt_g", "opt_d", "ema", "guard", "ada"}
    for name, network in networks.items():
        assert saved[name].keys() == network.state_dict().keys()
    assert saved["ema"].keys() == players.generator.state_dict().keys()
    # Every trained parameter has its second moment (and a first one, of β = 0).
    trained = {
        "opt_g": list(players.generator.parameters()),
        "opt_d": [
            *players.discriminator.parameters(), *players.auxiliary.heads.parameters()
        ],
    }  # fmt: skip
    for name, parameters in trained.items():
        moments = saved[name]["state"].values()
        assert num_elements(m["exp_avg_sq"] for m in moments) == num_elements(parameters)

    with safe_open(tmp_path / "snapshot.safetensors", framework="pt") as file:
        snapshot = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert snapshot.keys() == players.generator.state_dict().keys()
    expected = num_elements(players.generator.state_dict().values())
    assert num_elements(snapshot.values()) == expected == num_elements(tensors_in(saved["ema"]))
    assert not any((t == FROZEN).any() for t in tensors_in([saved, snapshot]))


@pytest.mark.parametrize("network", [Generator(BASE.generator), Discriminator(THREE),
                                     Upsampler(UPSAMPLER.upsampler)])  # fmt: skip
def test_a_state_dict_holds_what_is_trained_and_means(network):
    extra = network.state_dict().keys() - dict(network.named_parameters()).keys()
    means = {"text.mean_token_D", "text.mean_pooled_P"}
    assert extra == means | ({"style_mean"} if isinstance(network, Generator) else set())


# ---- 9: the pyramids' filters


def low_pass(x_BCHW):
    """Halve the side with [1, 3, 3, 1] / 8 in both directions, written out."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (row[:, None] * row)[None, None].expand(3, 1, 4, 4)
    return F.conv2d(x_BCHW, kernel, stride=2, padding=1, groups=3)


def test_the_real_pyramid_is_low_passed_and_the_generated_one_by_the_transpose():
    x = torch.randn(2, 3, 16, 16)
    levels = pyramid(x, 3)
    for large, small in itertools.pairwise(levels):
        inner = (..., slice(1, -1), slice(1, -1))  # the border is weighted otherwise
        torch.testing.assert_close(small[inner], low_pass(large)[inner])
    finest = torch.ones(1, 3, 16, 16)
    finest[..., ::2, :] = -1
    assert pyramid(finest, 2)[1].abs().max() < 0.3  # without a low-pass it would be 1 everywhere

    g = Generator(BASE.generator)
    nn.init.zeros_(g.levels[1].to_rgb.bank)
    large, small = g(torch.randn(2, 5), captions_of(BASE.generator, 2))
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    kernel = (row[:, None] * row)[None, None].expand(3, 1, 4, 4)
    expected = F.conv_transpose2d(small, kernel, stride=2, padding=1, groups=3)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(large[inner], expected[inner])


def test_the_discriminator_of_a_run_is_shown_such_pyramids(tmp_path):
    class Seeing(Discriminator):
        def trunk(self, images, **how):
            seen.append([x.detach() for x in images])
            return super().trunk(images, **how)

    class Noise(ShadeBatch):
        def __init__(self, position, size, side):
            super().__init__(position, size, side)
            self.images_BCHW = torch.randint(0, 256, self.images_BCHW.shape, dtype=torch.uint8)

    seen = []
    d = Seeing(BASE.discriminator)
    players = step.Players(Generator(BASE.generator), d, weights_of(BASE), None, None)
    batch = Noise(0, 6, 8)
    captions = CaptionFeatures(ShadeEncoder(), torch.device("cpu"))
    inputs = draw(BASE, players.augment, captions, RecentCaptions(9), batch, 0, World())
    fakes = step.synthesize(players.generator, inputs)
    step.discriminator_loss(players, BASE, inputs, fakes, auxiliary_strength=0.0).loss.backward()
    ((large, small),) = seen
    torch.testing.assert_close(large[:6], batch.images_BCHW / 127.5 - 1)
    torch.testing.assert_close(small[:6, :, 1:-1, 1:-1], low_pass(large[:6])[..., 1:-1, 1:-1])
    torch.testing.assert_close([large[6:], small[6:]], [x.detach() for x in fakes])


# ---- 11: gradients nobody uses


def test_each_step_of_a_run_leaves_the_other_networks_gradients_alone(tmp_path, monkeypatch):
    _, players = recording_players(changed(BASE, optimizer={"r1_weight": 1.0, "r1_every": 1}))
    g, judges = players.generator, (players.discriminator, players.auxiliary.heads)

    def gradients(*modules):
        return [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]

    def equal(before, after):
        return all(
            (a is None) == (b is None) and (a is None or torch.equal(a, b))
            for a, b in zip(before, after, strict=True)
        )

    calls, before = [], {}

    def watched(name, others):
        original = getattr(step, name)

        def noted(*args, **how):
            calls.append(name)
            before[name[0]] = gradients(*others)
            if name == "generator_loss":
                assert not any(p.requires_grad for m in judges for p in m.parameters())
            return original(*args, **how)

        monkeypatch.setattr(step, name, noted)

    others = {"d": [g], "g": judges}
    judge = Run.judge

    def after_backward(run, name, *rest):
        assert equal(before[name], gradients(*others[name])), name
        return judge(run, name, *rest)

    monkeypatch.setattr(Run, "judge", after_backward)
    watched("discriminator_loss", others["d"])
    watched("generator_loss", others["g"])
    train(BASE, players, tmp_path, side=8)
    assert calls == ["discriminator_loss", "generator_loss"] * 3
    assert all(p.grad is not None for p in g.parameters())


# ---- 12: the upsampler's input


def test_the_upsampler_is_fed_and_measured_with_the_images_of_its_targets(tmp_path):
    class Fed(Upsampler):
        def forward(self, small_BCHW, noise_BCHW, z_BZ, features):
            pairs.append((small_BCHW.mean((1, 2, 3)), features.pooled_BD[:, 0]))
            return super().forward(small_BCHW, noise_BCHW, z_BZ, features)

    class Perceptual(nn.Module):
        def forward(self, fake, real):
            # Untrained, it enlarges what it is given.
            pairs.append((fake.mean((1, 2, 3)), real.mean((1, 2, 3))))
            return (fake - real).square().mean((1, 2, 3))

    pairs = []
    d = Discriminator(UPSAMPLER.discriminator)
    players = step.Players(
        Fed(UPSAMPLER.upsampler), d, weights_of(UPSAMPLER), None, Perceptual()
    )  # fmt: skip
    train(changed(UPSAMPLER, optimizer={"lr": 1e-9}), players, tmp_path, side=16)
    assert len(pairs) == 4
    for one, other in pairs:
        assert name_of(one) == name_of(other)
        assert len(set(name_of(one))) == 3
