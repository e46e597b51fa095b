import pytest
import torch

from gigagan.config import DiscriminatorConfig, GeneratorConfig, UpsamplerConfig
from gigagan.models.attention import SelfAttention, split_heads
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import AdaptiveConv, pyramid, rms_normalize
from gigagan.models.upsampler import Upsampler
from gigagan.training.guard import Guard
from gigagan.training.vitals import selection_entropy, vital_signs

from .test_guard import CPU, HEALTH, STYLE, TEXT


def networks():
    torch.manual_seed(1)
    g = Generator(
        GeneratorConfig(channels=(8, 16), kernels=(3, 2), blocks=(1, 2), attention=(0, 1), **STYLE)
    )
    d = Discriminator(
        DiscriminatorConfig(
            channels=(8, 8), levels=2, blocks=(1, 0), attention=(0, 1), head_width=8, text=TEXT
        )
    )
    return g, d


def batch(size=3, side=8):
    random = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    features = TextFeatures(draw(size, 4, 11), torch.ones(size, 4).bool(), draw(size, 11))
    return draw(size, 5), features, pyramid(draw(size, 3, side, side), 2)


def test_vital_signs_have_a_value_for_each_part_of_the_networks():
    found = vital_signs(*networks(), *batch())
    assert set(found) == {
        "health/selection_entropy",
        "health/attention_self_g",
        "health/attention_self_d",
        "health/z_effect",
        "health/weight_norm_g",
        "health/weight_norm_d",
    }
    assert 0.05 < found["health/selection_entropy"] < 1
    assert 0 < found["health/attention_self_g"] < 0.95
    assert found["health/z_effect"] > 0.01


def test_a_selection_that_always_takes_one_filter_has_no_entropy_and_an_even_one_all():
    one = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert selection_entropy(one) == 0
    assert selection_entropy(torch.full((2, 3), 1 / 3)) == pytest.approx(1)


def test_selection_entropy_sees_a_network_that_uses_one_filter_of_each_bank():
    g, d = networks()
    for layer in g.modules():
        if isinstance(layer, AdaptiveConv) and layer.to_select is not None:
            layer.to_select.bias.data[1] = 50.0
    found = vital_signs(g, d, *batch())
    assert found["health/selection_entropy"] < 0.05
    assert Guard(HEALTH, CPU).check_vitals(found, 1)[0].name == "health/selection_entropy"


@pytest.mark.parametrize("style_dim", [None, 7])
def test_self_weight_is_the_diagonal_of_the_attention_that_the_layer_applies(style_dim):
    torch.manual_seed(3)
    layer = SelfAttention(6, head_width=3, scale=0.4, style_dim=style_dim)
    x_BLC = torch.randn(2, 5, 6)
    style_BS = None if style_dim is None else torch.randn(2, style_dim)
    tokens = rms_normalize(x_BLC)
    if style_BS is not None:
        token = rms_normalize(layer.style_token(style_BS))
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    keys = split_heads(layer.to_qk(tokens), 3)
    squares = (keys[:, :, :5, None] - keys[:, :, None]).square().sum(-1)
    weights_BHLM = (-0.4 * squares).softmax(-1)
    expected = sum(weights_BHLM[:, :, i, i].mean() for i in range(5)) / 5
    torch.testing.assert_close(layer.self_weight(x_BLC, style_BS), expected)


def test_a_generator_that_ignores_its_latent_has_no_z_effect():
    g, d = networks()
    first = g.mapping.layers[0]
    first.weight.data[:, :5] = 0
    assert vital_signs(g, d, *batch())["health/z_effect"] < 1e-9


def test_looking_at_vital_signs_leaves_hooks_modes_gradients_and_random_numbers_as_found():
    g, d = networks()
    d.eval()
    g.levels[0].eval()
    before = [m.training for net in (g, d) for m in net.modules()]
    state = torch.get_rng_state()
    z_BZ, features, real = batch()
    vital_signs(g, d, z_BZ, features, real)
    with pytest.raises(ValueError, match="pyramid levels"):
        vital_signs(g, d, z_BZ, features, real[:1])
    assert [m.training for net in (g, d) for m in net.modules()] == before
    assert not any(m._forward_pre_hooks for net in (g, d) for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in g.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_vital_signs_of_an_upsampler_are_taken_on_its_small_images():
    torch.manual_seed(4)
    up = Upsampler(
        UpsamplerConfig(
            input_resolution=8, down_channels=(8, 16), up_channels=(16, 8, 8), kernels=(1, 3, 2),
            blocks=(1, 1, 1), attention=(1, 0, 0), **STYLE,
        )
    )  # fmt: skip
    z_BZ, features, real = batch(side=16)
    small = real[1], torch.randn(real[1].shape)
    d = networks()[1]
    # Its discriminator is not asked for a resolution of its own here.
    found = vital_signs(up, d, z_BZ, features, batch()[2], small)
    assert 0 < found["health/selection_entropy"] < 1
    assert 0 < found["health/attention_self_g"] < 1
    assert found["health/z_effect"] >= 0


def test_vital_signs_of_compiled_networks_are_those_of_plain_ones():
    g, d = networks()
    z_BZ, features, real = batch()
    expected = vital_signs(g, d, z_BZ, features, real)
    for level in g.levels:
        level.compile(backend="eager")
    g(z_BZ, features)
    assert vital_signs(g, d, z_BZ, features, real) == expected
