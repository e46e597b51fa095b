"""The fast forms of networks and losses equal the naive ones of `reference`, in double precision.

Values to 1e-10, gradients of a random weighted sum of them to 1e-9, and none of these is zero.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from gigagan import losses
from gigagan.config import (
    BlockConfig,
    ClassConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    StyleConfig,
    TextConfig,
    TrainBaseConfig,
    TrainUpsamplerConfig,
    UpsamplerConfig,
)
from gigagan.models.attention import AttentionBlock, CrossAttention, SelfAttention, l2_attention
from gigagan.models.baking import bake
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageFeatures, TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import (
    AdaptiveConv,
    EqualConv2d,
    EqualLinear,
    MappingNetwork,
    downsample,
    upsample,
)
from gigagan.models.text import Text, TextBranch
from gigagan.models.upsampler import Upsampler
from gigagan.models.vision import VisionAidedDiscriminator
from gigagan.training import step
from gigagan.training.auxiliary import Auxiliary
from gigagan.training.inputs import Inputs
from tests.agreement import reference as naive

TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=13, width=16, head_width=8)
CONDITIONS = {
    "text": {"text": TEXT},
    "classes": {"text": None, "classes": ClassConfig(number=7, width=10)},
    "nothing": {"text": None},
}
G = GeneratorConfig(
    channels=(16, 16, 8), kernels=(1, 2, 3), blocks=(1, 2, 1), attention=(0, 1, 0),
    head_width=8, latent_dim=5, style_dim=12, text=TEXT,
)  # fmt: skip
D = DiscriminatorConfig(
    channels=(6, 8, 16), levels=2, blocks=(1, 0, 2), attention=(0, 1, 0), head_width=8,
    head_layers=2, text=TEXT,
)  # fmt: skip
U = UpsamplerConfig(
    input_resolution=8, down_channels=(6, 8), up_channels=(16, 8, 5), kernels=(1, 3, 2),
    blocks=(1, 2, 1), attention=(1, 0, 0), head_width=8, latent_dim=5, style_dim=12, text=TEXT,
    noise_augmentation=0.3,
)  # fmt: skip
B = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.double)


def leaf(*shape):
    return randn(*shape).requires_grad_()


def randomized(network):
    """In double precision, with parameters that start at zero moved away from it."""
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in network.named_buffers():
            if "mean_" in name:  # of the captions' features
                buffer += 0.3 * torch.randn_like(buffer)
    return network


def captions(*lengths):
    """Features of captions of these lengths; what stands at padding is no zero."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(leaf(*mask.shape, 11), mask, leaf(len(lengths), 13))


def condition(kind, count=B):
    """What a network of this kind reads, and the tensors of it that have gradients."""
    if kind == "text":
        features = captions(*(4, 7, 2)[:count])
        return features, [features.tokens_BLD, features.pooled_BD]
    return (torch.tensor([5, 0, 3])[:count] if kind == "classes" else None), []


def assert_close(ours, theirs, atol=1e-10):
    torch.testing.assert_close(list(ours), list(theirs), rtol=0, atol=atol)


def assert_agree(fast, slow, inputs):
    """Outputs and their gradients in every input are equal, and every input has a gradient."""
    assert_close(fast, slow)
    seeds = [torch.randn_like(x) for x in fast]
    ours, theirs = (torch.autograd.grad(out, inputs, seeds) for out in (list(fast), list(slow)))
    assert_close(ours, theirs, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in ours)


# Layers


@pytest.mark.parametrize("side", [2, 4, 10])
def test_resampling_is_written_out_as_1331_at_the_border_too(side):
    x = randn(2, 3, side, side)
    assert_close(upsample(x), map(naive.upsample, x))
    assert_close(downsample(x), map(naive.downsample, x))


@pytest.mark.parametrize("num_styles", [1, B])
@pytest.mark.parametrize("num_kernels", [1, 3])
@pytest.mark.parametrize(("size", "demodulate"), [(3, True), (1, False)])
def test_adaptive_convolution_equals_a_written_out_filter_for_every_sample(
    num_styles, num_kernels, size, demodulate
):
    layer = AdaptiveConv(
        5, 7, style_dim=4, num_kernels=num_kernels, size=size, demodulate=demodulate, gain=0.7
    )
    randomized(layer)
    x, style = leaf(B, 5, 6, 4), leaf(num_styles, 4)
    slow = [
        naive.adaptive_convolution(layer, x[b], style[b % num_styles], demodulate=demodulate)
        for b in range(B)
    ]
    fast = layer(x, style) / 0.7
    assert_agree([fast], [torch.stack(slow)], [x, style, *layer.parameters()])


@pytest.mark.parametrize("kind", ["text", "nothing"])
def test_mapping_network_equals_its_equations(kind):
    config = StyleConfig(latent_dim=5, style_dim=7, **CONDITIONS[kind])
    network = randomized(MappingNetwork(config))
    z, t = leaf(B, 5), leaf(B, 16) if kind == "text" else None
    slow = [naive.mapping(network, config, z[b], None if t is None else t[b]) for b in range(B)]
    inputs = [z, *network.parameters()] + ([] if t is None else [t])
    assert_agree([network(z, t)], [torch.stack(slow)], inputs)


@pytest.mark.parametrize("depth", [0, 2])
def test_text_branch_equals_one_caption_at_a_time_without_padding(depth):
    config = BlockConfig(text=TEXT.model_copy(update={"depth": depth}))
    branch = randomized(TextBranch(config.text, attends=True))
    features, inputs = condition("text")
    fast = branch(features)
    slow = [naive.caption(branch, config, features, b) for b in range(B)]
    assert torch.equal(fast.mask_BL, features.mask_BL)
    assert_agree(
        [fast.global_BT, fast.local_BLT[fast.mask_BL]],
        [torch.stack([s.global_T for s in slow]), torch.cat([s.local_MT for s in slow])],
        [*inputs, *branch.parameters()],
    )


@pytest.mark.parametrize("double_backward", [True, False])
@pytest.mark.parametrize("num_styles", [None, 1, B])
def test_self_attention_equals_softmax_of_written_out_distances(num_styles, double_backward):
    style_dim = None if num_styles is None else 4
    layer = randomized(SelfAttention(6, head_width=2, scale=0.3, style_dim=style_dim))
    x = leaf(B, 7, 6)
    style = None if num_styles is None else leaf(num_styles, 4)
    slow = [
        naive.self_attention(
            layer, x[b], None if style is None else style[b % num_styles], head_width=2, scale=0.3
        )
        for b in range(B)
    ]
    fast = layer(x, style, double_backward=double_backward)
    inputs = [x, *layer.parameters()] + ([] if style is None else [style])
    assert_agree([fast], [torch.stack(slow)], inputs)


@pytest.mark.parametrize("num_captions", [1, B])
def test_cross_attention_equals_attention_to_real_tokens_alone(num_captions):
    layer = randomized(CrossAttention(6, text_width=5, head_width=2))
    x, text = leaf(B, 7, 6), leaf(num_captions, 4, 5)
    mask = torch.arange(4) < torch.tensor([[3], [1], [4]])[:num_captions]
    slow = [
        naive.cross_attention(
            layer, x[b], text[b % num_captions][mask[b % num_captions]], head_width=2
        )
        for b in range(B)
    ]
    assert_agree([layer(x, text, mask)], [torch.stack(slow)], [x, text, *layer.parameters()])


def test_attention_block_equals_its_branches_with_default_scale_on_oblong_maps():
    config = BlockConfig(head_width=8, attention_gain=0.5, text=TEXT)
    block = randomized(AttentionBlock(16, config, style_dim=4, text_width=5))
    x, style, text = leaf(2, 16, 3, 2), leaf(2, 4), leaf(2, 4, 5)
    mask = torch.arange(4) < torch.tensor([[3], [4]])
    slow = [
        naive.attention_block(block, config, x[b], style[b], text[b][mask[b]]) for b in range(2)
    ]
    inputs = [x, style, text, *block.parameters()]
    assert_agree([block(x, style, text, mask)], [torch.stack(slow)], inputs)


def test_explicit_attention_can_be_differentiated_twice():
    q, k, v = leaf(1, 2, 2, 3), leaf(1, 2, 3, 3), leaf(1, 2, 3, 3)

    def f(q, k, v):
        return l2_attention(q, k, v, scale=0.3, double_backward=True)

    assert gradcheck(f, (q, k, v))
    assert gradgradcheck(f, (q, k, v))


def test_extra_head_dimension_has_the_second_derivatives_of_explicit_attention():
    tensors = leaf(2, 3, 5, 4), leaf(2, 3, 7, 4), leaf(2, 3, 7, 4)
    seeds = randn(2, 3, 5, 4), *(torch.randn_like(x) for x in tensors)
    second = []
    for explicit in (True, False):
        # Of the kernels behind the fused call only this one can be differentiated twice.
        with contextlib.nullcontext() if explicit else sdpa_kernel(SDPBackend.MATH):
            out = l2_attention(*tensors, scale=0.3, double_backward=explicit)
            first = torch.autograd.grad(out, tensors, seeds[0], create_graph=True)
            second.append(torch.autograd.grad(first, tensors, seeds[1:]))
    assert_close(*second, atol=1e-9)


# Networks


@pytest.mark.parametrize("kind", CONDITIONS)
def test_generator_equals_its_equations(kind):
    has_constant = {"constant_input": True, "linear_style": False}
    config = G.model_copy(
        update=CONDITIONS[kind] | has_constant | {"style_input": kind != "classes"}
    )
    g = randomized(Generator(config))
    z, (features, inputs) = leaf(B, 5), condition(kind)
    slow = naive.generator(g, z, features)
    assert [x.shape[-1] for x in slow] == [16, 8, 4]
    assert_agree(g(z, features), slow, [z, *inputs, *g.parameters()])


def test_generator_without_constant_and_with_a_linear_style_equals_its_equations():
    text = G.text.model_copy(update={"centred": False})
    config = G.model_copy(update={"constant_input": False, "linear_style": True, "text": text})
    g = randomized(Generator(config))
    assert g.constant is None
    z, (features, inputs) = leaf(B, 5), condition("text")
    assert_agree(g(z, features), naive.generator(g, z, features), [z, *inputs, *g.parameters()])


@pytest.mark.parametrize("kind", CONDITIONS)
def test_upsampler_equals_its_equations(kind):
    u = randomized(Upsampler(U.model_copy(update=CONDITIONS[kind])))
    small, noise, z = leaf(2, 3, 8, 8), leaf(2, 3, 8, 8), leaf(2, 5)
    features, inputs = condition(kind, 2)
    slow = naive.upsampler(u, small, noise, z, features)
    assert [x.shape[-1] for x in slow] == [16, 8]
    fast = u(small, noise, z, features)
    assert_agree(fast, slow, [small, noise, z, *inputs, *u.parameters()])


def test_upsampler_serves_several_images_with_one_style_and_caption():
    u = randomized(Upsampler(U))
    small, noise, z = leaf(2, 3, 8, 8), leaf(2, 3, 8, 8), leaf(1, 5)
    features, inputs = condition("text", 1)
    text = u.read(features)
    fast = u.synthesize(small, noise, u.style(z, text), text)
    same = TextFeatures(*(part.expand(2, *part.shape[1:]) for part in features))
    slow = naive.upsampler(u, small, noise, z.expand(2, -1), same)
    assert_agree(fast, slow, [small, noise, z, *inputs, *u.parameters()])


def images(side):
    """Three levels, which may be more than a discriminator looks at."""
    return [leaf(B, 3, side >> level, side >> level) for level in range(3)]


@pytest.mark.parametrize(
    ("kind", "levels", "every_stage", "minibatch_std", "double_backward"),
    [
        ("text", 2, True, True, False),
        ("text", 3, True, False, True),
        ("text", 2, False, False, False),
        ("classes", 3, False, True, True),
        ("nothing", 2, True, True, False),
    ],
)
def test_discriminator_equals_a_pass_of_its_own_for_every_level(
    kind, levels, every_stage, minibatch_std, double_backward
):
    update = {"levels": levels, "every_stage": every_stage, "minibatch_std": minibatch_std}
    d = randomized(Discriminator(D.model_copy(update=update | CONDITIONS[kind])))
    pyramid, (features, inputs) = images(16), condition(kind)
    slow = naive.discriminator(d, pyramid, features)
    fast = d(pyramid, features, double_backward=double_backward)
    assert_agree(fast, slow, [*pyramid[:levels], *inputs, *d.parameters()])


@pytest.mark.parametrize("minibatch_std", [True, False])
def test_two_sets_and_two_captions_in_one_pass_equal_passes_of_their_own(minibatch_std):
    update = {"minibatch_std": minibatch_std, "attention": (0, 0, 1)}
    d = randomized(Discriminator(D.model_copy(update=update)))
    real, fake = images(16), images(16)
    (own, own_inputs), (other, other_inputs) = condition("text"), condition("text")
    both = [torch.cat(level) for level in zip(real, fake, strict=True)]
    maps = d.trunk(both, num_sets=2)
    texts = d.read(own), d.read(other)
    fast = [x for t in texts for x in d.predict(maps, t.repeat(2, 1))]
    slow = []
    for text in (own, other):
        of_sets = [naive.discriminator(d, pyramid, text) for pyramid in (real, fake)]
        slow += [torch.cat(pair) for pair in zip(*of_sets, strict=True)]
    levels = [*real[:2], *fake[:2]]
    assert_agree(fast, slow, [*levels, *own_inputs, *other_inputs, *d.parameters()])


def test_vision_aided_heads_equal_their_equations():
    heads = randomized(VisionAidedDiscriminator((5, 7), text_width=4, maps=6))
    stages, text = [leaf(B, 5, 4, 3), leaf(B, 7, 2, 2)], leaf(B, 4)
    slow = naive.vision(heads, stages, text)
    assert_agree(heads(stages, text), slow, [*stages, text, *heads.parameters()])


# Networks with a fixed style


def of_first(text):
    return Text(*(x if x is None else x[:1] for x in text))


def assert_baked(network, baked, pictures, style, text):
    plain = (EqualLinear, EqualConv2d, AdaptiveConv)
    assert not [name for name, module in baked.named_modules() if isinstance(module, plain)]
    assert not [name for name, value in baked.named_parameters() if value.requires_grad]
    atol = 1e-10 if style.dtype == torch.double else 1e-5
    with torch.no_grad():
        assert_close(baked(*pictures), network.synthesize(*pictures, style, text), atol)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_baked_generator_equals_the_network(kind, dtype):
    g = randomized(Generator(G.model_copy(update=CONDITIONS[kind]))).to(dtype)
    before = {name: value.clone() for name, value in g.state_dict().items()}
    text = of_first(read(g, kind, dtype))
    style = g.style(randn(1, 5).to(dtype), text).detach()
    assert_baked(g, bake(g, style[0], text), (), style, text)
    assert all(torch.equal(value, before[name]) for name, value in g.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_baked_upsampler_equals_the_network_for_several_tiles(kind, dtype):
    u = randomized(Upsampler(U.model_copy(update=CONDITIONS[kind]))).to(dtype)
    text = of_first(read(u, kind, dtype))
    style = u.style(randn(1, 5).to(dtype), text).detach()
    tiles = randn(2, B, 3, 8, 8).to(dtype).unbind()
    assert_baked(u, bake(u, style, text), tiles, style, text)


def read(network, kind, dtype):
    features, _ = condition(kind)
    if kind == "text":
        tokens, mask, pooled = features
        features = TextFeatures(tokens.detach().to(dtype), mask, pooled.detach().to(dtype))
    with torch.no_grad():
        return network.read(features)


# Losses


def test_logistic_losses_equal_sums_over_every_level_and_stage():
    logits = [leaf(B, 1, 1), leaf(B, 4, 4), leaf(B, 2, 2)]
    config = D.model_copy(update={"channels": (6, 8)})
    assert config.pairs == [(0, 0), (0, 1), (1, 1)]
    weights = losses.prediction_weights(config.pairs, (0.7, 0.2), intermediate=0.3)
    same = naive.prediction_weights(config, (0.7, 0.2), 0.3)
    assert weights == pytest.approx(same, abs=1e-15)
    for fast, sign in ((losses.as_real, -1), (losses.as_fake, +1)):
        assert_agree([fast(logits, weights)], [naive.logistic(sign, logits, same)], logits)


def test_info_nce_equals_its_definition_for_every_pair():
    pictures, texts = leaf(B, 5), leaf(B, 5)
    fast, slow = losses.info_nce(pictures, texts, scale=7), naive.info_nce(pictures, texts, 7)
    assert_agree([fast], [slow], [pictures, texts])


# Steps

BASE = TrainBaseConfig(
    generator=GeneratorConfig(
        channels=(8, 8), kernels=(1, 2), blocks=(1, 1), attention=(0, 1), head_width=8,
        latent_dim=5, style_dim=12, text=TEXT,
    ),
    discriminator=DiscriminatorConfig(
        channels=(5, 8), levels=2, blocks=(1, 2), attention=(0, 1), head_width=8, text=TEXT,
        head_layers=1,
    ),
    loss=LossConfig(level_weights=(0.7, 0.2), matching=0.6, contrastive=0.9, vision=0.8),
)  # fmt: skip
ENLARGE = TrainUpsamplerConfig(
    upsampler=U,
    discriminator=D,
    loss=LossConfig(level_weights=(0.7, 0.2)),
    lpips=3.0,
    lpips_samples=2,
    pixel=0.7,
    batch_size=B,
)


class Eye(torch.nn.Module):
    """An image encoder of fixed random projections."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse, self.pool = randn(5, 3, 2, 2), randn(7, 5, 2, 2), randn(7, 6)

    def forward(self, x_BCHW):
        fine = torch.nn.functional.conv2d(x_BCHW, self.fine, stride=4)
        coarse = torch.nn.functional.conv2d(fine.tanh(), self.coarse, stride=2)
        return ImageFeatures(coarse.mean((2, 3)) @ self.pool, [fine, coarse])


class Space:
    """Where images and captions meet: six dimensions."""

    scale = 3.0

    def embed_images(self, pooled_BD):
        return pooled_BD

    def embed_captions(self, captions, text):
        return text.pooled_BD[:, :6].detach()


class Perceptual(torch.nn.Module):
    """A distance of two images that, as LPIPS, is B 1 1 1."""

    def forward(self, ours, theirs):
        return (ours.tanh() - theirs.tanh()).square().mean((1, 2, 3), keepdim=True)


def players(config):
    is_base = isinstance(config, TrainBaseConfig)
    g = randomized(Generator(config.generator) if is_base else Upsampler(config.upsampler))
    d = randomized(Discriminator(config.discriminator))
    weights = naive.prediction_weights(
        d.config, config.loss.level_weights, config.loss.intermediate
    )
    return step.Players(g, d, weights, None, None)


def inputs_of(config, has_other=(True, True, False)):
    side = config.discriminator.resolution
    given = () if isinstance(config, TrainBaseConfig) else (randn(B, 3, 8, 8), randn(B, 3, 8, 8))
    return Inputs(
        real=[x.detach() for x in images(side)],
        captions=["a", "b", "c"],
        text=captions(4, 7, 2),
        z_BZ=randn(B, 5),
        given=given,
        other_text=captions(3, 1, 5),
        has_other_B=tuple(has_other),
    )


def look(config):
    """Both losses that look through a frozen encoder, at images of twice the side."""
    side = 2 * config.discriminator.resolution
    # The encoders of a real configuration take no less than 32 px.
    loss = config.loss.model_copy(update={"vision_resolution": side})
    heads = randomized(VisionAidedDiscriminator((5, 7), text_width=16, maps=6))
    return Auxiliary(loss, Eye(), Space(), heads)


def seen(auxiliary, images_BCHW):
    """What the encoder makes of images that are brought to its side."""
    return auxiliary.encoder(torch.stack([naive.upsample(x) for x in images_BCHW]))


def vision_text(d, text):
    return torch.stack([naive.caption(d.text, d.config, text, b).global_T for b in range(B)])


def assert_accumulated(modules, loss):
    parameters = [p for module in modules for p in module.parameters()]
    expected = torch.autograd.grad(loss, parameters)
    assert_close([p.grad for p in parameters], expected, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in expected)


@pytest.mark.parametrize("minibatch_std", [True, False])
@pytest.mark.parametrize(
    ("matching_images", "has_other"),
    [
        ("real", (True, True, False)),
        ("half", (True, True, False)),
        ("both", (True, True, False)),
        ("both", (False, False, False)),
    ],
)
def test_discriminator_step_adds_the_gradients_of_the_written_out_loss(
    matching_images, has_other, minibatch_std
):
    loss = BASE.loss.model_copy(update={"matching_images": matching_images})
    judge = BASE.discriminator.model_copy(update={"minibatch_std": minibatch_std})
    config = BASE.model_copy(update={"loss": loss, "discriminator": judge})
    made, inputs = players(config), inputs_of(config, has_other)
    d = made.discriminator
    fakes = step.synthesize(made.generator, inputs)
    loss, metrics = step.discriminator_loss(made, config, inputs, fakes, auxiliary_strength=1.0)
    loss.backward()

    fake = [x.detach() for x in fakes]
    terms = naive.discriminator_terms(
        d, made.weights, inputs.real, fake, inputs.text, inputs.other_text, has_other,
        matching_images,
    )  # fmt: skip
    names = ["d/real", "d/fake", "d/mismatch"][: len(terms)]
    assert_close([metrics[name] for name in names], terms)
    assert any(has_other) or metrics["d/mismatch"] == 0
    assert_accumulated([d], terms[0] + terms[1] + 0.6 * sum(terms[2:]))
    assert all(p.grad is None for p in made.generator.parameters())


@pytest.mark.parametrize(
    ("generator_matching", "has_other"),
    [(0, (True, True, False)), (1, (True, True, False)), (1, (False, False, False))],
)
def test_generator_step_adds_the_gradients_of_the_written_out_loss(generator_matching, has_other):
    loss = BASE.loss.model_copy(update={"generator_matching": generator_matching})
    config = BASE.model_copy(update={"loss": loss})
    made, inputs = players(config), inputs_of(config, has_other)
    d = made.discriminator.requires_grad_(False)
    fakes = step.synthesize(made.generator, inputs)
    step.generator_loss(made, config, inputs, fakes, auxiliary_strength=1.0).loss.backward()

    fake = naive.generator(made.generator, inputs.z_BZ, inputs.text)
    total = naive.logistic(-1, naive.discriminator(d, fake, inputs.text), made.weights)
    picked = [b for b in range(B) if has_other[b]]
    if generator_matching and picked:
        wrong = naive.discriminator(d, fake, inputs.other_text)
        share = len(picked) / B  # one without another caption adds zero to the mean
        total = total + share * naive.logistic(+1, wrong, made.weights, picked)
    assert_accumulated([made.generator], total)


def test_both_steps_add_what_a_frozen_encoder_sees():
    made, inputs = players(BASE), inputs_of(BASE, (False, False, False))
    made = dataclasses.replace(made, auxiliary=look(BASE))
    g, d, auxiliary = made.generator, made.discriminator, made.auxiliary
    fakes = step.synthesize(g, inputs)
    step.discriminator_loss(made, BASE, inputs, fakes, auxiliary_strength=0.5).loss.backward()

    fake = naive.generator(g, inputs.z_BZ, inputs.text)
    text = vision_text(d, inputs.text).detach()
    total = 0.0
    for sign, pictures in ((-1, inputs.real[0]), (+1, fake[0].detach())):
        logits = naive.vision(auxiliary.heads, seen(auxiliary, pictures).stages, text)
        total = total + naive.logistic(sign, logits, [1 / 2, 1 / 2])
    assert_accumulated([auxiliary.heads], total)

    for network in (d, auxiliary.heads):
        network.requires_grad_(False)
    step.generator_loss(made, BASE, inputs, fakes, auxiliary_strength=0.5).loss.backward()
    total = naive.logistic(-1, naive.discriminator(d, fake, inputs.text), made.weights)
    pooled, stages = seen(auxiliary, fake[0])
    logits = naive.vision(auxiliary.heads, stages, text)
    total = total + 0.5 * 0.8 * naive.logistic(-1, logits, [1 / 2, 1 / 2])
    about = inputs.text.pooled_BD[:, :6].detach()
    total = total + 0.5 * 0.9 * naive.info_nce(pooled, about, 3.0)
    assert_accumulated([g], total)


def test_upsampler_step_adds_both_distances_to_the_target():
    made, inputs = players(ENLARGE), inputs_of(ENLARGE)
    made = dataclasses.replace(made, perceptual=Perceptual())
    d = made.discriminator.requires_grad_(False)
    fakes = step.synthesize(made.generator, inputs)
    step.generator_loss(made, ENLARGE, inputs, fakes, auxiliary_strength=0.0).loss.backward()

    fake = naive.upsampler(made.generator, *inputs.given, inputs.z_BZ, inputs.text)
    total = naive.logistic(-1, naive.discriminator(d, fake, inputs.text), made.weights)
    for b, (ours, theirs) in enumerate(zip(fake[0], inputs.real[0], strict=True)):
        total = total + 0.7 * (ours - theirs).abs().mean() / B
        if b < 2:
            total = total + 3.0 * made.perceptual(ours[None], theirs[None]).sum() / 2
    assert_accumulated([made.generator], total)


@pytest.mark.parametrize("minibatch_std", [True, False])
def test_r1_step_adds_the_gradients_of_image_by_image_penalties(minibatch_std):
    judge = BASE.discriminator.model_copy(update={"minibatch_std": minibatch_std})
    config = BASE.model_copy(update={"discriminator": judge})
    made, inputs = players(config), inputs_of(config)
    d = made.discriminator
    penalty, metrics = step.r1_loss(made, inputs)
    (0.7 * penalty).backward()
    slow = naive.r1(d, inputs.real, inputs.text, made.weights)
    assert_close([metrics["d/r1"]], [slow])
    # A bias with nothing but piecewise linear layers behind it has no part in R1.
    parameters = dict(d.named_parameters())
    expected = torch.autograd.grad(0.7 * slow, list(parameters.values()), materialize_grads=True)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    assert_close(found, expected, atol=1e-9)
    still = [name for name, x in zip(parameters, expected, strict=True) if not x.any()]
    assert all(name.endswith("bias") for name in still), still
