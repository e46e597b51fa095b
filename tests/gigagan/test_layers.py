import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from gigagan.config import StyleConfig, TextConfig
from gigagan.models.attention import SelfAttention
from gigagan.models.layers import (
    AdaptiveConv,
    EqualLinear,
    MappingNetwork,
    adaptive_conv2d,
    demodulation,
    doubling,
    downsample,
    filter_energy,
    halving,
    pyramid,
    resample,
    upsample,
)

B, N, O, I, H, W = 2, 3, 5, 4, 7, 6


def arguments(num_kernels, *, requires_grad=False):
    torch.manual_seed(0)
    made = (
        torch.randn(B, I, H, W, dtype=torch.double),
        torch.randn(num_kernels, O, I, 3, 3, dtype=torch.double),
        torch.randn(B, num_kernels, dtype=torch.double).softmax(1),
        torch.randn(B, I, dtype=torch.double),
    )
    return tuple(t.requires_grad_(requires_grad) for t in made)


@pytest.mark.parametrize("num_kernels", [1, N])
def test_adaptive_convolution_can_be_differentiated_twice(num_kernels):
    def f(*tensors):
        return adaptive_conv2d(*tensors, demodulate=False)

    x, bank, select, scale = arguments(num_kernels, requires_grad=True)
    small = (x[:, :, :3, :3].detach().requires_grad_(), bank, select, scale)
    assert gradcheck(f, small)
    assert gradgradcheck(f, small)


def test_demodulated_maps_keep_unit_variance_whatever_the_style():
    torch.manual_seed(0)
    layer = AdaptiveConv(32, 16, style_dim=7, num_kernels=3)
    y = layer(torch.randn(3, 32, 16, 16), 5 * torch.randn(3, 7))
    assert 0.8 < y.std() < 1.2


def test_self_attention_is_not_the_identity_at_initialisation():
    torch.manual_seed(0)
    layer = SelfAttention(64, head_width=32, scale=None, style_dim=5)
    x = torch.nn.functional.normalize(torch.randn(2, 64, 64), dim=-1) * math.sqrt(64)
    keys = layer.to_qk(x).unflatten(-1, (2, 32)).transpose(1, 2)
    distances = torch.cdist(keys, keys).square()
    self_weight = (-layer.scale * distances).softmax(-1).diagonal(dim1=-2, dim2=-1).mean()
    assert 2 / 64 < self_weight < 0.5


def test_style_token_takes_part_in_self_attention():
    torch.manual_seed(0)
    layer = SelfAttention(32, head_width=16, scale=None, style_dim=5)
    x = torch.randn(1, 9, 32)
    a, b = layer(x, torch.randn(1, 5)), layer(x, torch.randn(1, 5))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(("latent_dim", "text_dim"), [(7, 96), (64, 64), (128, 16)])
def test_latent_and_text_both_move_the_style_at_every_width(latent_dim, text_dim):
    torch.manual_seed(0)
    text = TextConfig(width=text_dim, head_width=8)
    mapping = MappingNetwork(StyleConfig(latent_dim=latent_dim, text=text))
    z, t = torch.randn(64, latent_dim), torch.randn(64, text_dim)
    by_z = mapping(z, t[:1].expand(64, -1)).var(0).mean()
    by_text = mapping(z[:1].expand(64, -1), t).var(0).mean()
    assert 0.5 < by_z / by_text < 2


def test_learning_rate_multiplier_does_not_change_the_output():
    x = torch.randn(3, 5)
    torch.manual_seed(1)
    plain = EqualLinear(5, 7, bias=0.5)
    torch.manual_seed(1)
    slow = EqualLinear(5, 7, bias=0.5, lr_multiplier=0.01)
    torch.testing.assert_close(plain(x), slow(x))


def test_real_pyramid_and_generator_resample_with_the_same_filter():
    # The halving filter is the transpose of the doubling one (times 1/4), away from the border.
    x, y = torch.randn(1, 1, 16, 16).double(), torch.zeros(1, 1, 8, 8).double()
    y[..., 2:-2, 2:-2] = torch.randn(4, 4).double()
    left, right = (downsample(x) * y).sum(), (x * upsample(y)).sum() / 4
    torch.testing.assert_close(left, right)


def test_pyramid_halves_and_keeps_the_mean():
    x = torch.randn(2, 3, 16, 16)
    levels = pyramid(x, 3)
    assert [level.shape[-1] for level in levels] == [16, 8, 4]
    flat = pyramid(torch.full((1, 3, 8, 8), 0.3), 2)[1]
    torch.testing.assert_close(flat, torch.full((1, 3, 4, 4), 0.3))


@pytest.mark.parametrize(
    ("size", "matrix", "settings"),
    [
        ((5, 8), doubling, {"scale_factor": 2.0}),
        ((8, 4), doubling, {"scale_factor": 2.0}),
        ((8, 4), halving, {"scale_factor": 0.5, "antialias": True}),
        ((2, 16), halving, {"scale_factor": 0.5, "antialias": True}),
    ],
)
def test_products_resample_like_interpolate_gradients_and_all(size, matrix, settings):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(x, mode="bilinear", align_corners=False, **settings)
    found = resample(x, matrix)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # the matrices are float32
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_kernels", [1, 2, 5])
def test_the_energy_of_mixed_filters_needs_no_mixed_filters(num_kernels):
    bank = torch.randn(num_kernels, 4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    select = torch.randn(7, num_kernels, dtype=torch.float64).softmax(1)
    mixed = torch.einsum("bn,noihw->boihw", select, bank)
    expected = mixed.square().sum((3, 4))[: 1 if num_kernels == 1 else None]
    found = filter_energy(bank, select)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), bank)[0] for y in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_filters_that_cancel_each_other_have_no_energy_below_nothing():
    bank = torch.randn(1, 4, 6, 3, 3)
    found = filter_energy(torch.cat([bank, -bank]), torch.full((3, 2), 0.5))
    assert (found >= 0).all()
    assert demodulation(found, torch.ones(3, 6)).isfinite().all()
