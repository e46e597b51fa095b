"""Phases of a training that train a part of G, and the text encoder that learns in the last."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gigagan import load
from gigagan.config import ProjectedConfig, StyleTConfig, TextConfig, TrainBaseConfig
from gigagan.inference.sampler import Sampler
from gigagan.models import pretrained, snapshot
from gigagan.models.base import features_of, text_encoder_of
from gigagan.models.encoders import LearnableTextEncoder, TextFeatures
from gigagan.models.stylegan_t import StyleGANT
from gigagan.training.phases import phase_at
from gigagan.training.tasks import task_of

from .small import UPSAMPLER, WordEncoder
from .test_projected import TEXT, drawn_inputs, players, run

pytestmark = pytest.mark.usefixtures("without_charts")

PHASES = (
    {"trains": "all", "until_images": 16},
    {"trains": "upper", "until_images": 32},
    {"trains": "text_encoder", "generator_lr": 0.01, "guidance": 50},
)
CONFIG = TrainBaseConfig.model_validate(
    {
        "generator": StyleTConfig(
            channels=(4, 4, 4, 4, 4), latent_dim=5, text=TEXT, own_text_encoder=True
        ),
        "discriminator": ProjectedConfig(side=32, maps=4, virtual_batch=4, text=TEXT),
        "loss": {"adversarial": "hinge", "vision": 0, "contrastive": 0, "matching": 0},
        "optimizer": {"r1_weight": 0, "warmup_images": 8, "ema_half_life_images": 20},
        "phases": PHASES,
        "total_images": 48, "batch_size": 8, "checkpoint_images": 8, "sample_images": 48,
        "log_images": 8,
    }
)  # fmt: skip


class LearnableWords(LearnableTextEncoder, WordEncoder):
    """`WordEncoder` behind one matrix."""

    def __init__(self):
        self.matrix_PP = torch.eye(11)

    def features(self, captions):
        tokens_BLD, mask_BL, pooled_BP = WordEncoder.encode(self, captions)
        return TextFeatures(tokens_BLD @ self.matrix_PP, mask_BL, pooled_BP @ self.matrix_PP)

    def weights(self):
        return {"matrix": self.matrix_PP}

    def with_weights(self, weights):
        encoder = type(self)()
        encoder.matrix_PP = weights["matrix"]
        return encoder


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    real, words = pretrained.text_encoder, LearnableWords()

    def text_encoder(name, *arguments, **settings):
        return words if name == "test:words" else real(name, *arguments, **settings)

    monkeypatch.setattr(pretrained, "text_encoder", text_encoder)


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The parameters of G at the start and at the end of each phase, and the whole run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        words = LearnableWords()
        patch.setattr(pretrained, "text_encoder", lambda name, *_, **__: words)
        folder = tmp_path_factory.mktemp("phases")
        found = [dict(players(CONFIG).generator.named_parameters())]
        for until in (16, 32, 48):
            made = run(CONFIG.model_copy(update={"total_images": until}), folder)
            found.append({name: p.clone() for name, p in made.generator.named_parameters()})
        whole = run(CONFIG, tmp_path_factory.mktemp("whole"))
    return found, folder, whole


def test_each_phase_trains_its_part_and_nothing_else(stages):
    (start, everything, upper, text), _, _ = stages
    assert changed(start, everything) == {n for n in start if not n.startswith("tower.")}
    learned = changed(everything, upper)
    assert {n.partition(".to_rgb")[0] for n in learned if ".to_rgb" in n} == {
        f"levels.{i}" for i in range(5)
    }
    assert {n.split(".")[1] for n in learned if ".to_rgb" not in n} == {"4"}  # 128 px
    assert changed(upper, text) == {"tower.weights.0"}


def test_a_run_cut_between_phases_ends_bit_for_bit_like_one_that_was_not(stages):
    (*_, last), _, whole = stages
    assert not changed(dict(whole.generator.named_parameters()), last)


def test_a_snapshot_draws_with_the_text_encoder_that_was_trained(stages):
    _, folder, _ = stages
    network, _ = snapshot.load(folder / "snapshot.safetensors")
    assert isinstance(network, StyleGANT)
    assert network.tower is not None
    captions = ["a shade of value7", "a shade of value14"]
    own, frozen = network.tower(captions), LearnableWords().encode(captions)
    assert not torch.allclose(own.pooled_BD, frozen.pooled_BD)
    encoder = text_encoder_of(network)
    assert torch.equal(encoder.encode(captions).pooled_BD, own.pooled_BD)
    assert encoder.name != LearnableWords.name  # features of both may be remembered by name

    sampler = load(folder / "snapshot.safetensors")
    drawn = sampler.sample(captions, seed=3)
    z_BZ = sampler.latents(2, 3)
    by_hand = network(z_BZ, own)[0]
    other = network(z_BZ, frozen)[0]
    shown = torch.stack([torch.from_numpy(np.array(picture)) for picture in drawn]).float()
    expected = (by_hand.clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1)
    assert (shown - expected).abs().max() <= 1
    assert not torch.equal(by_hand, other)


def test_an_upsampler_reads_the_frozen_encoder_beside_a_base_with_its_own(stages, monkeypatch):
    _, folder, _ = stages
    base, _ = snapshot.load(folder / "snapshot.safetensors")
    read = []
    text = TEXT.model_copy(update={"depth": 0})
    config = UPSAMPLER.model_copy(update={"input_resolution": 128, "text": text})

    class Larger:
        def __init__(self):
            self.config = config

    sampler = Sampler(base, Larger())
    monkeypatch.setattr(sampler, "_finish", lambda _, finest, __: read.append(finest) or [])
    captions = ["a shade of value7"]
    sampler.sample(captions, seed=0)
    assert torch.equal(read[0].features.pooled_BD, LearnableWords().encode(captions).pooled_BD)


def test_the_critic_and_guidance_keep_the_frozen_encoder():
    made = players(CONFIG)
    with torch.no_grad():
        made.generator.tower.weights[0].mul_(3.0)
    given = drawn_inputs(CONFIG, made)
    frozen = WordEncoder().encode(given.captions)
    torch.testing.assert_close(given.text.pooled_BD, frozen.pooled_BD, atol=2e-3, rtol=1e-3)
    own = features_of(made.generator, given.captions, lambda _: given.text)
    torch.testing.assert_close(own.pooled_BD, 3 * frozen.pooled_BD)


def test_a_phase_has_a_rate_and_a_weight_of_guidance_of_its_own():
    early, late = phase_at(CONFIG, 8), phase_at(CONFIG, 40)
    assert (early.trains, late.trains) == ("all", "text_encoder")
    assert (early.guidance, late.guidance) == (None, 50)
    assert early.generator_lr == CONFIG.optimizer.lr * CONFIG.optimizer.generator_rate
    assert late.generator_lr == 0.01
    assert late.discriminator_lr == CONFIG.optimizer.lr
    assert [phase_at(CONFIG, n).trains for n in (15, 16, 31, 32)] == [
        "all", "upper", "upper", "text_encoder",
    ]  # fmt: skip


def test_guidance_of_one_phase_alone_is_computed_and_asks_for_captions():
    assert CONFIG.is_guided
    assert task_of(CONFIG).has_auxiliary
    plain = CONFIG.model_copy(update={"phases": ()})
    assert not plain.is_guided
    assert not task_of(plain).has_auxiliary


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (({"until_images": 9},), r"phases\[0\]\.until_images = 9, but the last phase lasts"),
        (({}, {}), r"phases\[0\]\.until_images = None, but the next phase begins there"),
        (
            ({"until_images": 9}, {"until_images": 9}, {}),
            r"phases\[1\]\.until_images = 9, but the next .* more than 9",
        ),
        (({"trains": "text_encoder"},), r"phases\[0\]\.trains = text_encoder, but .* to true"),
        (({"trains": "upper"},), r"phases\[0\]\.trains = upper, but .* 16 px and has no blocks"),
    ],
)
def test_phases_that_make_no_sense_are_refused(phases, message):
    small = StyleTConfig(channels=(8, 8), text=TEXT)
    changes = {"generator": small, "phases": phases}
    with pytest.raises(ValidationError, match=message):
        TrainBaseConfig.model_validate({**CONFIG.model_dump(), **changes})


@pytest.mark.parametrize("trains", ["upper", "text_encoder"])
def test_phases_of_the_other_recipes_generator_are_refused(trains):
    with pytest.raises(ValidationError, match="a generator of GigaGAN trains as a whole"):
        TrainBaseConfig.model_validate({"phases": ({"trains": trains},)})


def test_an_own_text_encoder_without_text_is_refused():
    with pytest.raises(ValidationError, match="own_text_encoder is true, but text is null"):
        StyleTConfig(own_text_encoder=True, text=None)


def test_a_tower_begins_as_the_frozen_minilm_and_every_weight_learns():
    text = TextConfig(width=384, depth=0)
    network = StyleGANT(StyleTConfig(channels=(8,), text=text, own_text_encoder=True))
    captions = ["a red heart", "a far longer caption of a tree on a teal background"]
    frozen = pretrained.text_encoder("embedded:minilm-l6").encode(captions)
    own = network.tower(captions)
    for a, b in itertools.zip_longest(own, frozen):
        assert torch.equal(a, b)
    own.pooled_BD[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.tower.parameters())
    assert {id(p) for p in network.trained_in("text_encoder")} == {
        id(p) for p in network.tower.parameters()
    }
