import copy
import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from gigagan import losses
from gigagan.config import TextConfig
from gigagan.config.projected import ENCODER_STAGES, ProjectedConfig
from gigagan.models.encoders import TextFeatures
from gigagan.models.heads import BatchNormLocal, FixedConv, ProjectedHeads, SpectralConv
from gigagan.models.pretrained import critic_encoder

TEXT = TextConfig(encoder="test:none", encoder_width=5, pooled_width=8, width=8, depth=0)
MAPS, TOKENS = "embedded:efficientnet-lite0", "dino:vits16"
CHANNELS = (5, 7)


def small(**settings):
    return ProjectedConfig(**{"maps": 3, "virtual_batch": 2, "text": TEXT} | settings)


def stages_of(heads, pictures):
    """Random features: maps of 6×4 and 3×2 px, or sequences of 11 tokens."""
    if heads.has_tokens:
        return [torch.randn(pictures, 11, channels) for channels in CHANNELS]
    sides = ((6, 4), (3, 2))
    return [torch.randn(pictures, c, *side) for c, side in zip(CHANNELS, sides, strict=True)]


# ---- what a head computes


def normalized(conv):
    """W / uᵀWv of a convolution."""
    norm = conv.parametrizations.weight
    matrix = norm.original.flatten(1)
    return norm.original / (norm[0]._u @ matrix @ norm[0]._v)


def convolved(x, weight, bias=None):
    """Zeros around maps, sequences closed to a ring: one tap after the other."""
    reach = weight.shape[-1] // 2
    if weight.ndim == 3:
        taps = [x.roll(reach - k, dims=2) for k in range(weight.shape[2])]
        y = sum(torch.einsum("bcn,oc->bon", t, weight[..., k]) for k, t in enumerate(taps))
    else:
        H, W = x.shape[2:]
        wide = x.new_zeros(*x.shape[:2], H + 2 * reach, W + 2 * reach)
        wide[:, :, reach : reach + H, reach : reach + W] = x
        y = 0
        for i, j in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
            part = wide[:, :, i : i + H, j : j + W]
            y = y + torch.einsum("bchw,oc->bohw", part, weight[..., i, j])
    return y if bias is None else y + bias.view(-1, *(1,) * (x.ndim - 2))


def batch_normed(x, norm, groups):
    """Groups of picture numbers, one channel at a time."""
    y = torch.empty_like(x)
    for rows, channel in itertools.product(groups, range(x.shape[1])):
        part = x[rows, channel]
        mean = part.sum() / part.numel()
        variance = ((part - mean) ** 2).sum() / part.numel()
        y[rows, channel] = (part - mean) / (variance + norm.eps).sqrt() * norm.weight[
            channel
        ] + norm.bias[channel]
    return y


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize("encoder", [MAPS, TOKENS])
@pytest.mark.parametrize("projected", [True, False])
@torch.no_grad()
def test_logits_are_those_of_the_formula(encoder, projected):
    torch.manual_seed(0)
    heads = ProjectedHeads(small(encoder=encoder, random_projection=projected), CHANNELS)
    heads = heads.double().eval()
    for parameter in heads.parameters():  # also norms and biases, which start at 1 and 0
        parameter.add_(0.3 * torch.randn_like(parameter))
    stages = [x.double() for x in stages_of(heads, 4)]
    text = torch.randn(4, 8, dtype=torch.double)
    logits = heads(stages, text)
    for i, (x, head) in enumerate(zip(stages, heads.heads, strict=True)):
        x = x.mT if encoder == TOKENS else x
        if heads.projection is not None:
            x = convolved(x, heads.projection.channels[i].weight)
        groups = [[0, 1], [2, 3]]
        h = leaky(batch_normed(convolved(x, normalized(head.first)), head.first_norm, groups))
        branch = convolved(h, normalized(head.second))
        branch = leaky(batch_normed(branch, head.second_norm, groups))
        maps = convolved((h + branch) / 2**0.5, normalized(head.to_maps), head.to_maps.bias)
        read = heads.to_logit[i].from_text
        meant = text @ read.weight.T / math.sqrt(8) + read.bias
        expected = torch.einsum("bmn,bm->bn", maps.flatten(2), meant) / math.sqrt(3)
        torch.testing.assert_close(logits[i], expected, atol=1e-10, rtol=1e-10)


def test_without_text_the_last_convolution_is_the_logit():
    torch.manual_seed(0)
    heads = ProjectedHeads(small(text=None), CHANNELS)
    assert heads.read(None) is None
    assert not [name for name, _ in heads.named_parameters() if "text" in name]
    assert [x.shape for x in heads(stages_of(heads, 4), None)] == [(4, 24), (4, 6)]


@pytest.mark.parametrize("bias_std", [0.0, 1.0])
def test_captions_begin_with_the_share_of_the_published_heads(bias_std):
    torch.manual_seed(0)
    text = TEXT.model_copy(update={"pooled_width": 400, "width": 400})
    judge = ProjectedHeads(small(maps=300, text=text, bias_std=bias_std), CHANNELS).to_logit[0]
    caption = torch.randn(50, 400)  # of unit rms; the code's have unit norm
    meant = judge.from_text(caption) - judge.from_text(torch.zeros(1, 400))
    assert meant.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert judge.from_text.bias.std().item() == pytest.approx(bias_std, rel=0.1)


def test_what_a_caption_says_is_its_pooled_vector_and_nothing_is_learned_of_it():
    heads = ProjectedHeads(small(), CHANNELS)
    pooled = torch.randn(3, 8)
    features = TextFeatures(torch.randn(3, 2, 5), torch.ones(3, 2, dtype=torch.bool), pooled)
    expected = pooled / pooled.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(heads.read(features), expected)
    assert not list(heads.text.parameters())


def test_several_captions_can_be_asked_of_one_pass():
    torch.manual_seed(0)
    heads = ProjectedHeads(small(), CHANNELS).eval()
    stages, text, other = stages_of(heads, 4), torch.randn(4, 8), torch.randn(4, 8)
    maps = heads.trunk(stages)
    rows = [2, 0]
    for mine, beside, whole in zip(
        heads.predict(maps, text),
        heads.predict([x[rows] for x in maps], other[rows]),
        zip(heads(stages, text), heads(stages, other), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, whole[0])
        torch.testing.assert_close(beside, whole[1][rows])


@pytest.mark.parametrize("encoder", [MAPS, TOKENS])
def test_real_and_generated_pictures_share_a_pass_but_no_statistics(encoder):
    torch.manual_seed(0)
    heads = ProjectedHeads(small(encoder=encoder, virtual_batch=8), CHANNELS).eval()
    real, fake, text = stages_of(heads, 3), stages_of(heads, 3), torch.randn(3, 8)
    both = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
    alone = zip(heads(real, text), heads(fake, text), strict=True)
    for found, parts in zip(heads(both, text.repeat(2, 1), num_sets=2), alone, strict=True):
        torch.testing.assert_close(found, torch.cat(parts))


# ---- batch norm


def naive(x, norm, groups):
    return batch_normed(x.flatten(2), norm, groups).view_as(x)


@pytest.mark.parametrize(
    ("pictures", "num_sets", "groups"),
    [
        (8, 1, [range(8)]),
        (16, 1, [range(8), range(8, 16)]),
        (6, 1, [range(6)]),  # fewer than a virtual batch are one group
        (12, 1, [range(6), range(6, 12)]),  # not 8 and 4
        (9, 1, [range(5), range(5, 9)]),
        (18, 2, [range(5), range(5, 9), range(9, 14), range(14, 18)]),
        (12, 2, [range(6), range(6, 12)]),
    ],
)
@torch.no_grad()
def test_groups_of_batch_norm_are_as_equal_as_can_be_and_never_of_two_sets(
    pictures, num_sets, groups
):
    torch.manual_seed(0)
    norm = BatchNormLocal(3, 8).double()
    norm.weight.copy_(torch.randn(3))
    norm.bias.copy_(torch.randn(3))
    x = torch.randn(pictures, 3, 2, 5, dtype=torch.double) * 3 + 2
    expected = naive(x, norm, [list(g) for g in groups])
    torch.testing.assert_close(norm(x, num_sets=num_sets), expected)
    if pictures % len(groups) == 0:  # what a GPU does
        torch.testing.assert_close(norm._at_once(x, num_sets, len(groups) // num_sets), expected)


def test_parts_of_a_batch_see_what_the_whole_would_if_they_are_of_virtual_batches():
    torch.manual_seed(0)
    heads = ProjectedHeads(small(virtual_batch=4), CHANNELS).eval()
    stages, text = stages_of(heads, 12), torch.randn(12, 8)
    parts = [heads([x[rows] for x in stages], text[rows]) for rows in (slice(0, 4), slice(4, 12))]
    for whole, pieces in zip(heads(stages, text), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces))


# ---- spectral norm and random projection


@pytest.mark.parametrize("size", [(1,), (9,), (1, 1), (3, 3)])
def test_the_largest_singular_value_is_one_after_a_few_passes(size):
    torch.manual_seed(0)
    conv = SpectralConv(7, 5, size)
    with torch.no_grad():
        conv.parametrizations.weight.original.copy_(4 * torch.randn(5, 7, *size))
    for _ in range(30):
        conv(torch.randn(2, 7, *(10 for _ in size)))
    weight = conv.weight.detach().flatten(1)
    assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(1, abs=0.01)


def test_a_reloaded_module_goes_on_as_the_saved_one():
    torch.manual_seed(0)
    heads = ProjectedHeads(small(), CHANNELS)
    stages, text = stages_of(heads, 4), torch.randn(4, 8)
    optimizer = torch.optim.Adam(heads.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        losses.hinge_real(heads(stages, text), [0.5, 0.5]).backward()
        optimizer.step()
    saved = copy.deepcopy(heads.state_dict())
    assert {"_u", "_v"} <= {name.rpartition(".")[2] for name in saved}
    assert "projection.channels.0.weight" in saved
    other = ProjectedHeads(small(), CHANNELS)
    other.load_state_dict(saved)
    for _ in range(2):  # each pass moves u and v
        for mine, its in zip(heads(stages, text), other(stages, text), strict=True):
            assert torch.equal(mine, its)


def test_spectral_norm_and_logits_keep_their_digits_in_half_precision():
    torch.manual_seed(0)
    heads = ProjectedHeads(small(), CHANNELS)
    twin = copy.deepcopy(heads)
    stages, text = stages_of(heads, 4), torch.randn(4, 8)
    plain = heads(stages, text)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = twin(stages, text)
    for name, value in heads.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    for whole, half in zip(plain, coarse, strict=True):
        assert half.dtype == torch.float32
        assert not torch.equal(whole, half)
        torch.testing.assert_close(whole, half, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("maps", "out"), [(3, 8), (8, 3)])
def test_random_projections_keep_angles_and_learn_nothing(maps, out):
    projection = FixedConv(maps, out)
    matrix = projection.weight.flatten(1)
    gram = matrix.T @ matrix if out > maps else matrix @ matrix.T
    torch.testing.assert_close(gram, torch.eye(3), atol=1e-6, rtol=0)
    assert not list(projection.parameters())


def test_mixing_adds_coarser_stages_from_the_coarsest_on():
    torch.manual_seed(0)
    heads = ProjectedHeads(small(mixing=True), CHANNELS)
    fine, coarse = stages_of(heads, 2)
    to_fine, to_coarse = (conv.weight for conv in heads.projection.channels)
    mix_fine, mix_coarse = (conv.weight for conv in heads.projection.scales)
    double = nn.Upsample(scale_factor=2, mode="bilinear")
    below = convolved(double(convolved(coarse, to_coarse)), mix_coarse)
    expected = [convolved(double(convolved(fine, to_fine) + below), mix_fine), below]
    for mine, formula in zip(heads.projection([fine, coarse]), expected, strict=True):
        torch.testing.assert_close(mine, formula)
    assert [x.shape for x in heads([fine, coarse], torch.randn(2, 8))] == [(2, 96), (2, 24)]


# ---- with an encoder


def test_one_pass_of_the_encoder_serves_both_steps():
    torch.manual_seed(0)
    encoder = critic_encoder(MAPS)
    heads = ProjectedHeads(ProjectedConfig(text=TEXT, maps=8))
    real, text = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, 8)
    drawn = (torch.rand(4, 3, 64, 64) * 2 - 1).requires_grad_()
    weights = [0.25] * 4
    stages = encoder(drawn).stages
    with torch.no_grad():
        real_stages, apart = encoder(real).stages, encoder(drawn).stages

    def d_gradients(fake_stages):
        network = copy.deepcopy(heads)
        both = [torch.cat(pair) for pair in zip(real_stages, fake_stages, strict=True)]
        logits = network(both, text.repeat(2, 1), num_sets=2)
        of_real, of_fake = zip(*(x.chunk(2) for x in logits), strict=True)
        loss = losses.hinge_real(of_real, weights) + losses.hinge_fake(of_fake, weights)
        loss.backward()
        return network, [p.grad for p in network.parameters()]

    network, shared = d_gradients([x.detach() for x in stages])
    for mine, alone in zip(shared, d_gradients(apart)[1], strict=True):
        torch.testing.assert_close(mine, alone, atol=1e-6, rtol=1e-6)
    assert drawn.grad is None

    torch.optim.Adam(network.parameters(), 0.01).step()
    network.requires_grad_(False)
    fresh = encoder(drawn).stages  # as a step would that sees its pictures anew
    kept, anew = (
        torch.autograd.grad(
            losses.hinge_generator(copy.deepcopy(network)(seen, text), weights), drawn
        )[0]
        for seen in (stages, fresh)
    )
    assert kept.abs().max() > 1e-4
    torch.testing.assert_close(kept, anew, atol=1e-6, rtol=1e-6)


# ---- settings


def test_the_stages_that_settings_know_are_those_of_the_encoders():
    import open_clip

    for name, stages in ENCODER_STAGES.items():
        config = ProjectedConfig(encoder=f"{name}/openai", side=stages.side or 64)
        assert config.stages is stages
        if name.startswith("open_clip:"):
            tower = open_clip.get_model_config(name.removeprefix("open_clip:"))["vision_cfg"]
            assert stages.channels == (tower["width"],) * 5
            assert (stages.multiple, stages.side) == (tower["patch_size"], tower["image_size"])
    encoder = critic_encoder(MAPS)
    assert ENCODER_STAGES[MAPS].channels == encoder.stage_channels


def test_the_published_critic_has_five_heads_on_384_channels():
    heads = ProjectedHeads(ProjectedConfig.stylegan_t())
    sizes = {sum(p.numel() for p in head.parameters()) for head in heads.heads}
    assert len(heads.heads) == 5
    assert sizes == {384 * 384 * (1 + 9) + 4 * 384 + 384 * 64 + 64}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "embedded:nothing"}, "no heads are known for it, choose one of embedded:eff"),
        ({"side": 80}, "side = 80.*multiple of 32"),
        ({"encoder": TOKENS, "side": 72}, "side = 72.*multiple of 16"),
        ({"encoder": "open_clip:ViT-B-16/openai"}, "side = 64.*set side to 224"),
        ({"encoder": TOKENS, "mixing": True}, "only projected feature maps"),
        ({"mixing": True, "random_projection": False}, "only projected feature maps"),
        ({"text": TextConfig(depth=1)}, "text.depth = 1.*set depth to 0 and width to"),
        ({"text": TextConfig(depth=0)}, "text.width = 128.*pooled_width = 384"),
    ],
)
def test_settings_that_cannot_be_get_one_message(settings, message):
    with pytest.raises(ValidationError, match=message) as caught:
        ProjectedConfig(**settings)
    assert caught.value.error_count() == 1
