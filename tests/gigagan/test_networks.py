import pytest
import torch

from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    TextConfig,
    UpsamplerConfig,
)
from gigagan.models import snapshot
from gigagan.models.discriminator import Discriminator, append_minibatch_std
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.upsampler import Upsampler

TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=13, width=16, head_width=8)
G = GeneratorConfig(
    channels=(16, 16, 8), kernels=(1, 2, 3), blocks=(1, 2, 1), attention=(0, 1, 0),
    head_width=8, latent_dim=5, style_dim=24, text=TEXT,
)  # fmt: skip
D = DiscriminatorConfig(
    channels=(8, 16, 16), levels=2, blocks=(1, 0, 0), attention=(0, 1, 0), head_width=8, text=TEXT
)
U = UpsamplerConfig(
    input_resolution=8, down_channels=(8, 16), up_channels=(16, 8, 8), kernels=(1, 2, 2),
    blocks=(1, 1, 1), attention=(1, 0, 0), head_width=8, latent_dim=5, style_dim=12, text=TEXT,
)  # fmt: skip
B = 3


def features(*lengths):
    lengths = lengths or (4, 7, 5)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), max(lengths), 11)
    return TextFeatures(tokens, mask, torch.randn(len(lengths), 13))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_generator_returns_a_pyramid_from_the_output_down_to_four_pixels():
    images = Generator(G)(torch.randn(B, 5), features())
    assert [tuple(i.shape) for i in images] == [(B, 3, 16, 16), (B, 3, 8, 8), (B, 3, 4, 4)]
    assert 0.1 < images[0].std() < 2


def test_latent_moves_the_image_at_a_fixed_prompt_and_the_prompt_at_a_fixed_latent():
    g, text, z = Generator(G), features(6, 6), torch.randn(2, 5)
    same_text = TextFeatures(*(part[:1].expand(2, *part.shape[1:]) for part in text))
    by_z = g(z, same_text)[0]
    by_text = g(z[:1].expand(2, -1), text)[0]
    for pair in (by_z, by_text):
        assert (pair[0] - pair[1]).std() > 0.05


def test_padding_tokens_change_nothing():
    g, z, short = Generator(G).eval(), torch.randn(1, 5), features(4)
    padded = TextFeatures(
        torch.cat([short.tokens_BLD, torch.randn(1, 3, 11)], 1),
        torch.cat([short.mask_BL, torch.zeros(1, 3, dtype=torch.bool)], 1),
        short.pooled_BD,
    )
    torch.testing.assert_close(g(z, short)[0], g(z, padded)[0], rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    g, z, text = Generator(G), torch.randn(B, 5), features()
    alone = g(z[1:2], TextFeatures(*(part[1:2] for part in text)))[0]
    torch.testing.assert_close(g(z, text)[0][1:2], alone, rtol=1e-4, atol=1e-5)


def test_discriminator_predicts_after_every_stage_from_where_a_level_enters():
    d = Discriminator(D)
    maps = d.trunk([torch.randn(B, 3, 16, 16), torch.randn(B, 3, 8, 8)])
    assert [(f.level, f.stage) for f in maps] == [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    logits = d.predict(maps, d.read(features()))
    assert [x.shape[-1] for x in logits] == [8, 4, 4, 1, 1]


def test_levels_do_not_leak_into_each_other():
    d, text = Discriminator(D), features()
    images = [torch.randn(B, 3, 16, 16), torch.randn(B, 3, 8, 8)]
    before = d(images, text)
    after = d([images[0], torch.randn(B, 3, 8, 8)], text)
    levels = [f.level for f in d.trunk(images)]
    for level, a, b in zip(levels, before, after, strict=True):
        assert torch.allclose(a, b, atol=1e-5) == (level == 0)


def test_text_moves_the_logits_and_an_unconditional_term_remains_without_it():
    d = Discriminator(D)
    maps = d.trunk([torch.randn(B, 3, 16, 16), torch.randn(B, 3, 8, 8)])
    a, b = d.predict(maps, d.read(features())), d.predict(maps, d.read(features()))
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(a, b, strict=True))
    for p in d.predictors.values():
        torch.nn.init.zeros_(p.to_logit.bank)
    silent = d.predict(maps, d.read(features()))
    assert all(x.std() > 1e-3 for x in silent)


def test_logits_can_begin_without_the_caption_and_learn_of_it():
    d = Discriminator(D.model_copy(update={"caption_std": 0.0}))
    maps = d.trunk([torch.randn(B, 3, 16, 16), torch.randn(B, 3, 8, 8)])
    a, b = d.predict(maps, d.read(features())), d.predict(maps, d.read(features()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    sum(x.sum() for x in a).backward()
    scales = [p for name, p in d.named_parameters() if name.endswith("to_scale.weight")]
    assert scales
    assert all(p.grad.abs().sum() > 0 for p in scales)


def test_discriminator_can_be_differentiated_twice():
    d = Discriminator(D)
    images = [torch.randn(B, 3, s, s, requires_grad=True) for s in (16, 8)]
    logits = d(images, features(), double_backward=True)
    grads = torch.autograd.grad(sum(x.mean() for x in logits), images, create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    assert d.from_rgb[1].weight.grad.abs().sum() > 0


def test_both_paths_of_the_discriminator_agree():
    d, text = Discriminator(D), features()
    images = [torch.randn(B, 3, 16, 16), torch.randn(B, 3, 8, 8)]
    for a, b in zip(d(images, text), d(images, text, double_backward=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_minibatch_statistics_never_mix_sets():
    x = torch.cat([torch.randn(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)])
    appended = append_minibatch_std(x, num_groups=2)[:, -1, 0, 0]
    assert (appended[:3] > 0.5).all()
    assert (appended[3:] < 1e-3).all()


def test_upsampler_returns_levels_from_its_output_down_to_its_input():
    images = Upsampler(U)(*torch.randn(2, B, 3, 8, 8), torch.randn(B, 5), features())
    assert [i.shape[-1] for i in images] == [16, 8]


def test_an_untrained_upsampler_enlarges_its_input():
    small = torch.rand(B, 3, 8, 8) * 2 - 1
    large = Upsampler(U)(small, torch.randn_like(small), torch.randn(B, 5), features())[0]
    plain = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(large, plain)


def test_state_dicts_hold_learned_weights_only():
    names = [n for net in (Generator(G), Discriminator(D), Upsampler(U)) for n in net.state_dict()]
    assert not [n for n in names if "encoder" in n]
    assert len(names) == len(set(names)) + sum(
        n in Upsampler(U).state_dict() for n in Generator(G).state_dict()
    ) + sum(n in Generator(G).state_dict() for n in Discriminator(D).state_dict())


@pytest.mark.parametrize("network", [Generator(G), Upsampler(U)])
def test_snapshot_opens_as_the_same_network(network, tmp_path):
    snapshot.save(tmp_path / "s.safetensors", network, {"images_seen": 7})
    opened, about = snapshot.load(tmp_path / "s.safetensors")
    assert type(opened) is type(network)
    assert about == {"images_seen": 7}
    for name, value in network.state_dict().items():
        assert torch.equal(value, opened.state_dict()[name])
    assert not any(p.requires_grad for p in opened.parameters())


def test_what_is_no_snapshot_is_refused_by_name(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(snapshot.SnapshotError, match="no such snapshot"):
        snapshot.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(snapshot.SnapshotError, match="no readable safetensors"):
        snapshot.load(path)
