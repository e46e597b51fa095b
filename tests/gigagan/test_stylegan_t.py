"""StyleGAN-T's generator against its equations, one sample at a time in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from gigagan.config import TextConfig
from gigagan.config.stylegan_t import StyleTConfig
from gigagan.models.baking import bake
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Late
from gigagan.models.layers import AdaptiveConv, upsample
from gigagan.models.stylegan_t import (
    FourierInput,
    ResidualLayer,
    SecondOrderConv,
    SecondOrderStyle,
    StyleGANT,
)
from gigagan.models.text import PooledText, TextBranch
from tests.agreement import reference as naive

TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=13, width=13, depth=0)
CONFIG = StyleTConfig(channels=(12, 10, 6), blocks=2, groups=4, latent_dim=5, text=TEXT)
B, S = 3, 18


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.double)


def captions(count=B):
    mask = torch.ones(count, 4, dtype=torch.bool)
    return TextFeatures(randn(count, 4, 11), mask, randn(count, 13))


def randomized(network):
    """In double precision, with parameters that start at zero, or near it, moved away from it."""
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.fixture
def network():
    """Averages and noise included, away from its start; in evaluation."""
    made = randomized(StyleGANT(CONFIG)).eval()
    made.text.centre(randn(11), randn(13))
    made.style_mean.copy_(randn(S))
    return made


def assert_close(ours, theirs, atol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# The equations, without a batch


def scales(style, w_S):
    """s₁ s₂ + s₃, one number after the other."""
    weight_PS, bias_P = style.parts.weight, style.parts.bias
    p_P = [sum(row_S * w_S) / math.sqrt(S) + b for row_S, b in zip(weight_PS, bias_P, strict=True)]
    maps = len(p_P) // 3
    return torch.stack([p_P[i] * p_P[maps + i] + p_P[2 * maps + i] for i in range(maps)])


def convolve(conv, x_IHW, w_S, *, demodulate=True):
    """The filters of one sample, each written out."""
    filters = conv.bank[0] * scales(conv.to_scale, w_S)[None, :, None, None]
    if demodulate:
        filters = torch.stack([f / (f.square().sum() + 1e-8).sqrt() for f in filters])
    else:
        filters = filters / math.sqrt(conv.bank.shape[2])
    return F.conv2d(x_IHW[None], filters, padding=filters.shape[-1] // 2)[0]


def synthesis_layer(layer, x_IHW, w_S, noise_HW):
    y_OHW = convolve(layer.conv, x_IHW, w_S)
    y_OHW = y_OHW + layer.noise_strength * noise_HW + layer.conv.bias[:, None, None]
    return naive.activate(y_OHW)


def group_norm(norm, x_CHW):
    size = len(x_CHW) // norm.num_groups
    groups = []
    for start in range(0, len(x_CHW), size):
        group = x_CHW[start : start + size]
        groups.append((group - group.mean()) / (group.var(correction=0) + 1e-5).sqrt())
    return torch.cat(groups) * norm.weight[:, None, None] + norm.bias[:, None, None]


def residual_layer(block, x_CHW, w_S, noise_HW):
    y_CHW = synthesis_layer(block.layer, group_norm(block.norm, x_CHW), w_S, noise_HW)
    return math.sqrt(2) * (x_CHW + block.gamma[:, None, None] * y_CHW)


def fourier_input(module, w_S, bandwidth):
    """Wave by wave and pixel by pixel, with StyleGAN3's damping and its matrices."""
    cos, sin, right, down = module.to_pose.weight @ w_S / math.sqrt(S) + module.to_pose.bias
    length = (cos**2 + sin**2).sqrt()
    cos, sin = cos / length, sin / length
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rotation = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one]).view(3, 3)
    translation = torch.stack([one, zero, -right, zero, one, -down, zero, zero, one]).view(3, 3)
    pose = rotation @ translation
    waves = []
    for f_2, phase in zip(module.frequencies, module.phases, strict=True):
        phase = phase + f_2 @ pose[:2, 2]
        f_2 = f_2 @ pose[:2, :2]
        damping = (1 - (f_2.norm() - bandwidth) / (8 / 2 - bandwidth)).clamp(0, 1)
        wave = [
            [f_2[0] * ((column + 0.5) / 8 - 0.5) + f_2[1] * ((row + 0.5) / 8 - 0.5) + phase]
            for row in range(8)
            for column in range(8)
        ]
        turns = torch.stack([x for (x,) in wave]).view(8, 8)
        waves.append(damping * torch.sin(2 * math.pi * turns))
    C = len(waves)
    return torch.einsum("oc,chw->ohw", module.mix.weight, torch.stack(waves)) / math.sqrt(C)


def generate(g, z_Z, pooled_P, noise_N):
    """z and caption of one picture → its pixels."""
    hidden_Z = naive.normalize(z_Z)
    first, last = g.mapping.layers
    hidden_Z = math.sqrt(2) * naive.activate(naive.linear(first, hidden_Z, lr_multiplier=0.01))
    x_Z = naive.linear(last, hidden_Z, lr_multiplier=0.01)
    c_T = naive.normalize(pooled_P - g.text.mean_pooled_P)
    w_S = torch.cat([x_Z, naive.normalize(c_T)])  # twice, for ε
    x, image, used = fourier_input(g.input, w_S, CONFIG.bandwidth), None, 0
    for number, level in enumerate(g.levels):
        if number:
            x = naive.upsample(x)
        for place, layer in enumerate(level.layers):
            size = x.shape[-1] ** 2
            noise = noise_N[used : used + size].view(x.shape[1:])
            used += size
            if isinstance(layer, ResidualLayer):
                x = residual_layer(layer, x, w_S, noise)
            else:
                x = synthesis_layer(layer, x, w_S, noise)
            if number and not place:
                x = x * math.sqrt(2)
        rgb = convolve(level.to_rgb, x, w_S, demodulate=False)
        rgb = rgb + level.to_rgb.bias[:, None, None]
        image = rgb if image is None else naive.upsample(image) + rgb
    assert used == len(noise_N)
    return image


# Layers


def test_second_order_style_is_a_product_and_a_sum():
    style, w = randomized(SecondOrderStyle(S, 7)), randn(B, S)
    assert_close(style(w), torch.stack([scales(style, x) for x in w]))


def test_second_order_style_is_two_where_w_says_nothing():
    assert_close(SecondOrderStyle(S, 7)(torch.zeros(1, S)), torch.full((1, 7), 2.0))


@pytest.mark.parametrize("num_styles", [1, B])
@pytest.mark.parametrize(("size", "demodulate"), [(3, True), (1, False)])
def test_modulated_convolution_equals_a_written_out_filter(num_styles, size, demodulate):
    conv = SecondOrderConv(5, 7, style_dim=S, size=size, demodulate=demodulate)
    randomized(conv)
    torch.nn.init.zeros_(conv.bias)
    x, w = randn(B, 5, 6, 4), randn(num_styles, S)
    slow = [convolve(conv, x[b], w[b % num_styles], demodulate=demodulate) for b in range(B)]
    assert_close(conv(x, w), torch.stack(slow))


def test_demodulated_maps_have_unit_variance_whatever_the_style():
    conv = SecondOrderConv(64, 48, style_dim=S)
    y = conv(torch.randn(B, 64, 24, 24), 10 * torch.randn(B, S))[..., 1:-1, 1:-1]
    assert_close(y.var((1, 2, 3)), torch.ones(B), atol=0.1)


def test_enlarging_before_or_behind_the_convolution_is_the_same_but_at_the_border():
    x, filters = randn(1, 4, 6, 6), randn(5, 4, 3, 3)
    spread = torch.zeros(1, 4, 12, 12).double()
    spread[..., ::2, ::2] = x  # what the code's strided transposed convolution starts from
    line = torch.tensor([1.0, 3, 3, 1]).double() / 4
    blur = (line[:, None] * line).expand(5, 1, 4, 4)
    behind = F.conv2d(F.pad(F.conv2d(spread, filters, padding=1), (2, 1, 2, 1)), blur, groups=5)
    before = F.conv2d(upsample(x), filters, padding=1)
    assert_close(before[..., 3:-3, 3:-3], behind[..., 3:-3, 3:-3])


@pytest.mark.parametrize(("maps", "groups"), [(12, 4), (6, 4), (7, 32)])
def test_residual_layer_equals_its_equation(maps, groups):
    config = CONFIG.model_copy(update={"groups": groups})
    layer = randomized(ResidualLayer(maps, config=config))
    assert layer.norm.num_groups == math.gcd(maps, groups)
    x, w, noise = randn(B, maps, 6, 4), randn(B, S), randn(B, 1, 6, 4)
    slow = [residual_layer(layer, x[b], w[b], noise[b, 0]) for b in range(B)]
    assert_close(layer(x, w, noise), torch.stack(slow))


def test_residual_layer_is_its_trunk_at_the_start():
    x = torch.randn(B, 12, 6, 4)
    y = ResidualLayer(12, config=CONFIG)(x, torch.randn(B, S), torch.randn(B, 1, 6, 4))
    torch.testing.assert_close(y, math.sqrt(2) * x, rtol=1e-3, atol=1e-4)


# The Fourier input


@pytest.mark.parametrize("pose", [(1, 0, 0, 0), (0, 2, 0, 0), (-0.6, 0.3, 0.2, -0.7)])
def test_fourier_input_equals_its_waves_one_by_one(pose):
    module = FourierInput(6, style_dim=S, bandwidth=2.5).double()
    torch.nn.init.normal_(module.to_pose.weight, std=0.5)
    module.to_pose.bias.data = torch.tensor(pose).double()
    w = randn(B, S)
    assert_close(module(w), torch.stack([fourier_input(module, x, 2.5) for x in w]))


def test_fourier_input_does_not_depend_on_the_style_at_the_start():
    maps = FourierInput(6, style_dim=S, bandwidth=2)(torch.randn(2, S))
    assert torch.equal(maps[0], maps[1])


def shown_at(right=0.0, down=0.0, cos=1.0, sin=0.0):
    """The maps of one module, of which w sets the pose."""
    torch.manual_seed(1)
    module = FourierInput(6, style_dim=4, bandwidth=2).double()
    module.to_pose.bias.data.zero_()
    module.to_pose.weight.data = 2 * torch.eye(4).double()  # times 1 / √4
    return module(torch.tensor([[cos, sin, right, down]]).double())


def test_a_shift_in_w_moves_the_maps_right_and_down():
    still = shown_at()
    assert_close(shown_at(right=2 / 8)[..., :, 2:], still[..., :, :-2])
    assert_close(shown_at(down=3 / 8)[..., 3:, :], still[..., :-3, :])


def test_a_quarter_turn_in_w_turns_the_maps_against_the_clock():
    assert_close(shown_at(cos=0.0, sin=1.0), shown_at().rot90(1, (2, 3)))


def test_frequencies_lie_within_the_band_in_all_directions():
    f = FourierInput(4_000, style_dim=S, bandwidth=2).frequencies
    assert 1.9 < f.norm(dim=1).max() <= 2
    assert_close(f.mean(0), torch.zeros(2), atol=0.1)


# The network


def test_network_equals_its_equations_for_every_picture(network):
    z, features, noise = randn(B, 5), captions(), randn(B, CONFIG.noise_dim)
    slow = [generate(network, z[b], features.pooled_BD[b], noise[b]) for b in range(B)]
    (fast,) = network(z, features, noise)
    assert fast.shape == (B, 3, 32, 32)
    assert_close(fast, torch.stack(slow), atol=1e-8)


def test_text_is_the_centred_pooled_vector_at_unit_rms_and_learns_nothing(network):
    features = captions()
    text = network.read(features)
    assert isinstance(network.text, TextBranch)  # what training centres
    assert not list(PooledText(TEXT).parameters())
    assert text.local_BLT is None
    assert_close(text.global_BT.square().mean(1), torch.ones(B).double(), atol=1e-6)
    centred = features.pooled_BD - network.text.mean_pooled_P
    assert_close(F.cosine_similarity(text.global_BT, centred), torch.ones(B).double())


def test_latent_and_caption_change_the_picture_at_the_start():
    g, z, features = StyleGANT(CONFIG).eval(), torch.randn(2, 5), captions(2)
    features = TextFeatures(*(x.float() if x.is_floating_point() else x for x in features))
    same_text = TextFeatures(*(x[:1].expand_as(x) for x in features))
    by_z, by_text = g(z, same_text)[0], g(z[:1].expand(2, -1), features)[0]
    for pair in (by_z, by_text):
        assert 0.1 < pair.std() < 2
        assert (pair[0] - pair[1]).std() > 0.05


def test_a_picture_in_evaluation_depends_on_no_other_and_on_no_random_number(network):
    z, features = randn(B, 5), captions()
    (together,) = network(z, features)
    torch.manual_seed(7)
    (alone,) = network(z[1:2], TextFeatures(*(x[1:2] for x in features)))
    assert_close(alone, together[1:2])


def test_noise_in_training_is_new_for_every_picture_unless_it_is_given(network):
    network.train()
    z, features = randn(1, 5).expand(2, -1), captions(1)
    features = TextFeatures(*(x.expand(2, *x.shape[1:]) for x in features))
    (drawn,) = network(z, features)
    assert (drawn[0] - drawn[1]).std() > 0.01
    noise = randn(1, CONFIG.noise_dim).expand(2, -1)
    (given,) = network(z, features, noise)
    assert_close(given[0], given[1])
    assert torch.equal(given, network(z, features, noise)[0])


def test_every_parameter_has_a_finite_gradient_that_is_not_zero():
    g = StyleGANT(CONFIG).double()  # as it starts
    g(randn(B, 5), captions())[0].square().sum().backward()
    for name, parameter in g.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_mean_of_x_follows_the_batches_of_training_alone():
    g, text = StyleGANT(CONFIG).double(), StyleGANT(CONFIG).double().read(captions())
    z = randn(2, B, 5)
    mean = torch.zeros(5).double()
    for batch in z:
        mean = 0.995 * mean + 0.005 * g.style(batch, text)[:, :5].mean(0)
    assert_close(g.style_mean[:5], mean)
    assert not g.style_mean[5:].any()
    before = g.style_mean.clone()
    g.eval().style(z[0], text)
    assert torch.equal(g.style_mean, before)


def test_truncation_pulls_x_to_its_mean_and_leaves_the_caption(network):
    text = network.read(captions())
    w = network.style(randn(B, 5), text)
    typical = network.truncate(w, text, 0)
    assert torch.equal(typical[:, :5], network.style_mean[:5].expand(B, -1))
    assert torch.equal(typical[:, 5:], text.global_BT)
    assert torch.equal(network.truncate(w, text, 1), w)
    assert_close(network.truncate(w, text, 0.3), 0.3 * w + 0.7 * typical)


def test_late_levels_take_the_style_of_another_caption(network):
    first, second = (network.read(captions(1)) for _ in range(2))
    w, other = network.style(randn(1, 5), first), network.style(randn(1, 5), second)

    def drawn(level):
        return network.synthesize(w, first, Late(other, second, level))[0]

    assert torch.equal(drawn(3), network.synthesize(w, first)[0])
    assert torch.equal(drawn(0), network.synthesize(other, second)[0])
    far = [(drawn(level) - drawn(3)).std() for level in (0, 1, 2)]
    assert min(far) > 0.01
    # Only the finest level's part is another's: made small, the pictures are not so far apart.
    assert F.avg_pool2d(drawn(2) - drawn(3), 4).std() < F.avg_pool2d(drawn(0) - drawn(3), 4).std()


def test_without_text_the_latent_is_all():
    g = StyleGANT(CONFIG.model_copy(update={"text": None})).eval()
    assert g.config.style_dim == 5
    assert g(torch.randn(2, 5), None)[0].shape == (2, 3, 32, 32)


def test_a_state_dict_makes_the_same_network(network):
    torch.manual_seed(3)
    other = StyleGANT(CONFIG).double().eval()
    other.load_state_dict(network.state_dict())
    z, features = randn(B, 5), captions()
    assert torch.equal(network(z, features)[0], other(z, features)[0])


def test_baked_for_one_style_it_draws_the_same(network):
    text = network.read(captions(1))
    w = network.style(randn(1, 5), text)
    baked = bake(network, w, text)
    assert not [m for m in baked.modules() if isinstance(m, AdaptiveConv)]
    assert_close(baked()[0], network.synthesize(w, text)[0])


def test_autocast_keeps_the_image_and_the_style_in_float32():
    g, features = StyleGANT(CONFIG), captions()
    features = TextFeatures(*(x.float() if x.is_floating_point() else x for x in features))
    with torch.autocast("cpu", torch.bfloat16):
        text = g.read(features)
        w = g.style(torch.randn(B, 5), text)
        (rough,) = g.synthesize(w, text, noise_BN=torch.zeros(1, CONFIG.noise_dim))
    assert w.dtype == rough.dtype == torch.float32
    (exact,) = g.synthesize(w, text, noise_BN=torch.zeros(1, CONFIG.noise_dim))
    assert (rough - exact).std() < 0.05 * exact.std()


# Sizes


@pytest.mark.parametrize(
    ("preset", "millions", "channels"),
    [
        ("small_32", 2.874, (192, 96, 48)),
        ("lite_64", 74.557, (512, 512, 512, 512)),
        ("full_64", 975.556, (2048, 2048, 2048, 1024)),
    ],
)
def test_presets_have_the_parameters_that_they_say(preset, millions, channels):
    config = getattr(StyleTConfig, preset)()
    assert StyleTConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.channels == channels
    assert config.resolution == int(preset[-2:])
    with torch.device("meta"):
        g = StyleGANT(config)
    assert sum(p.numel() for p in g.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_config_counts_noise_and_style():
    assert CONFIG.layers == (4, 5, 5)
    assert CONFIG.noise_dim == 4 * 8**2 + 5 * 16**2 + 5 * 32**2
    assert (CONFIG.style_dim, CONFIG.condition_width) == (S, 13)
    assert (CONFIG.text_width, CONFIG.classes, CONFIG.num_images) == (None, None, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": ()}, "at least 1 item"),
        ({"text": {"depth": 0}}, "set depth to 0 and width to pooled_width = 384"),
        ({"text": {"width": 384}}, "text.depth = 1"),
        ({"bandwidth": 4.5}, "less than or equal to 4"),
        ({"style_mean_decay": 1}, "less than 1"),
        ({"kernels": (1, 1)}, "Extra inputs"),
        ({"kind": "gigagan"}, "stylegan-t"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        StyleTConfig.model_validate(settings)
