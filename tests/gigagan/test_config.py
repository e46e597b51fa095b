import functools
import math
import re

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from gigagan import losses
from gigagan.__main__ import main
from gigagan.config import (
    ClassConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    ProjectedConfig,
    StyleTConfig,
    TextConfig,
    TrainBaseConfig,
    TrainStage,
    TrainUpsamplerConfig,
    UpsamplerConfig,
)
from gigagan.config.presets import LADDER, PRESETS, PUBLISHED, ladder, preset
from gigagan.models.attention import EXTRA_WIDTH
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import ImageEncoder, ImageFeatures, TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.heads import ProjectedHeads
from gigagan.models.layers import pyramid
from gigagan.models.stylegan_t import StyleGANT
from gigagan.models.summary import summarize
from gigagan.models.upsampler import Upsampler
from gigagan.models.vision import VisionAidedDiscriminator
from gigagan.training import loop, step
from gigagan.training.auxiliary import Auxiliary
from gigagan.training.distributed.world import World
from gigagan.training.inputs import Inputs
from gigagan.training.run import adamw

from .narrow import width_scaled

TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=13, width=16, head_width=8)


def drawing(config):
    """The network that draws."""
    return config.generator if isinstance(config, TrainBaseConfig) else config.upsampler


counted = functools.cache(summarize)  # the ladder's rows share networks


def summaries(name):
    """Of the drawing network and of its discriminator."""
    config = preset(name)
    return counted(drawing(config)), counted(config.discriminator)


def features(text, size):
    """Random features of captions as wide as a text branch wants them."""
    return TextFeatures(
        torch.randn(size, 5, text.encoder_width),
        torch.ones(size, 5, dtype=torch.bool),
        torch.randn(size, text.pooled_width),
    )


# ---- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_survives_json(name):
    config = preset(name)
    read = TypeAdapter(TrainStage).validate_json(config.model_dump_json())
    assert type(read) is type(config)
    assert read == config


ON_PYRAMIDS = [name for name in PRESETS if not name.startswith("stylegan_t")]


@pytest.mark.parametrize("name", ON_PYRAMIDS)
def test_the_networks_of_a_preset_fit_together(name):
    """The summaries come from a forward pass of each network on the meta device."""
    levels = preset(name).discriminator.levels
    drawn, judged = summaries(name)
    made = [row.shapes.split("×")[1:] for row in drawn.rows if row.name.endswith("to_rgb")]
    read = [row.shapes.split("×")[1:] for row in judged.rows if row.name.startswith("from_rgb")]
    assert made[::-1][:levels] == read
    assert len(read) == levels


@pytest.mark.parametrize("name", PRESETS)
def test_a_summary_has_every_parameter_and_multiply_add_in_one_row(name):
    config = preset(name)
    kinds = {
        GeneratorConfig: Generator,
        StyleTConfig: StyleGANT,
        UpsamplerConfig: Upsampler,
        DiscriminatorConfig: Discriminator,
        ProjectedConfig: ProjectedHeads,
    }
    with torch.device("meta"):
        networks = [kinds[type(one)](one) for one in (drawing(config), config.discriminator)]
    for network, found in zip(networks, summaries(name), strict=True):
        count = sum(p.numel() for p in network.parameters())
        assert all(p.is_meta for p in network.parameters())
        assert found.parameters == sum(row.parameters for row in found.rows) == count
        assert found.multiply_adds == sum(row.multiply_adds for row in found.rows)


@pytest.mark.parametrize(
    ("name", "network"), [(name, network) for name in PUBLISHED for network in PUBLISHED[name]]
)
def test_networks_of_the_paper_have_its_number_of_parameters(name, network):
    (found,) = [s for s in summaries(name) if s.network == network]
    # The paper counts its base generator without T.
    ours = found.parameters - (found.parameters_of_text if network == "Generator" else 0)
    assert ours == pytest.approx(PUBLISHED[name][network], rel=0.01)


def test_the_base_generator_is_counted_without_its_text_branch():
    with torch.device("meta"):
        text = Generator(GeneratorConfig.paper_64()).text
    found, _ = summaries("paper_64")
    assert found.parameters_of_text == sum(p.numel() for p in text.parameters()) > 25e6


def test_the_papers_discriminator_makes_fifteen_predictions():
    assert len(preset("paper_64").discriminator.pairs) == 15


# ---- describe


@pytest.mark.parametrize("name", ["paper_64", "small_32_to_128"])
def test_describe_prints_every_layer_and_the_totals(name, capsys):
    assert main(["describe", name]) == 0
    printed = capsys.readouterr().out
    for found in summaries(name):
        assert f"{name}: {found.network}" in printed
        table = printed.partition(f"{name}: {found.network}")[2].partition("└")[0]
        cells = [re.split(r"\s*│\s*", line.strip("│ ")) for line in table.splitlines()]
        rows = {c[0]: c[1:] for c in cells if len(c) == 5}
        for row in found.rows:
            numbers = [f"{row.parameters:,}", f"{row.multiply_adds:,}"]
            assert rows[row.name] == [row.kind, row.shapes, *numbers]
        assert rows["all"][2:] == [f"{found.parameters:,}", f"{found.multiply_adds:,}"]
        if found.network in PUBLISHED.get(name, {}):
            assert rows["paper"][2] == f"{PUBLISHED[name][found.network]:,.0f}"


def test_describe_refuses_an_unknown_preset_with_the_nearest_name(capsys):
    assert main(["describe", "papr_64"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"unknown preset 'papr_64', did you mean 'paper_64'", captured.err)
    assert "ladder-vision" in captured.err
    assert not captured.out


# ---- multiply-adds, counted by hand


def test_multiply_adds_of_a_generator_equal_a_count_by_hand():
    config = GeneratorConfig(
        channels=(5, 7), kernels=(1, 3), blocks=(1, 1), attention=(0, 0), style_input=False,
        constant_input=True, latent_dim=2, style_dim=3, mapping_layers=2, text=None,
    )  # fmt: skip
    found = {row.name: row.multiply_adds for row in summarize(config).rows if row.multiply_adds}

    def adaptive(i, o, size, pixels, kernels, *, demodulate=True):
        mixing = kernels * i * o * size**2 + 3 * kernels if kernels > 1 else 0
        energy = i * o * (kernels**2 if kernels > 1 else 0)  # of the filters, two by two
        demodulation = energy + i * o if demodulate else 0
        return i * o * size**2 * pixels + 3 * i + mixing + demodulation

    assert found == {
        "mapping": 2 * 3 + 3 * 3,
        "levels.0.blocks.0": adaptive(5, 5, 3, 16, 1),
        "levels.0.to_rgb": adaptive(5, 3, 1, 16, 1, demodulate=False),
        "levels.1.blocks.0": adaptive(5, 7, 3, 64, 3) + adaptive(7, 7, 3, 64, 3),
        "levels.1.to_rgb": adaptive(7, 3, 1, 64, 1, demodulate=False),
    }


def test_multiply_adds_of_a_discriminator_equal_a_count_by_hand():
    config = DiscriminatorConfig(
        channels=(8, 16), levels=2, blocks=(1, 0), attention=(0, 1), head_width=8, mlp_ratio=3,
        text=None,
    )  # fmt: skip
    found = {row.name: row.multiply_adds for row in summarize(config).rows if row.multiply_adds}
    maps, positions, levels, heads = 16, 16, 2, 2
    projections = 3 * positions * maps**2
    # L2 attention carries the norm of a key in an extra part of a head.
    attention = 2 * heads * positions**2 * (8 + EXTRA_WIDTH)
    mlp = 2 * positions * maps * 3 * maps
    assert found == {
        "from_rgb.0": 3 * 8 * 64,
        "from_rgb.1": 3 * 16 * 16,
        "stages.0.out": 8 * 8 * 9 * 64 + 8 * 16 * 9 * 16 + 8 * 16 * 16,
        "stages.1.attention.0": levels * (projections + attention + mlp),
        "stages.1.out": levels * maps * maps * 16,
        "predictors.0": maps * 16,
        "predictors.1": levels * maps,
    }


# ---- bad configurations


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (GeneratorConfig, {"kernels": (1, 1, 4, 0)}, r"kernels\.3\n.*than or equal to 1.*=0,"),
        (GeneratorConfig, {"blocks": (1, 1, 0, 1)}, r"blocks\.2\n.*than or equal to 1.*=0,"),
        (
            GeneratorConfig,
            {"attention": (0, 1, 0, 0, 2)},
            r"attention = \(0, 1, 0, 0, 2\) has 5 entries, .* 4, 8, 16, 32 px: entry 4 = 2 .* does "
            "not exist",
        ),
        (
            GeneratorConfig,
            {"attention": (0, 1, 0)},
            r"attention = \(0, 1, 0\) has 3 entries: give one for each of the 4 resolutions",
        ),
        (GeneratorConfig, {"channels": ()}, "channels is empty: give"),
        (GeneratorConfig, {"chanels": (8, 8)}, r"chanels\n.*Extra inputs are not permitted"),
        (
            GeneratorConfig,
            {"channels": (128, 100, 48, 24)},
            "attention over 100 channels does not divide into heads of head_width = 32: use",
        ),
        (
            GeneratorConfig,
            {"classes": ClassConfig()},
            "text and classes are both set: set one of them to null",
        ),
        (
            TextConfig,
            {"width": 40, "head_width": 16},
            "width = 40 does not divide into heads of head_width = 16: use a multiple",
        ),
        (
            TextConfig,
            {"encoder": "embedded:minilm-l6", "encoder_width": 768},
            "encoder_width = 768 does not match the encoder embedded:minilm-l6: it gives 384",
        ),
        (
            TextConfig,
            {"encoder": "open_clip:ViT-L-14/openai"},
            "encoder_width = 384 does not match the encoder open_clip:ViT-L-14/openai: .* 768",
        ),
        (
            TextConfig,
            {"encoder": "open_clip:ViT-L-14/openai", "encoder_width": 768},
            "pooled_width = 384 does not match the encoder open_clip:ViT-L-14/openai: .* 768",
        ),
        (
            DiscriminatorConfig,
            {"levels": 5},
            "levels = 5, but channels has only 4 resolutions",
        ),
        (
            DiscriminatorConfig,
            {"channels": (24, 48, 100, 128)},
            "attention over 100 channels does not divide into heads of head_width = 32",
        ),
        (
            DiscriminatorConfig,
            {"blocks": (1, 1, 0)},
            r"blocks = \(1, 1, 0\) has 3 entries: .* 32, 16, 8, 4 px",
        ),
        (
            UpsamplerConfig,
            {"input_resolution": 34},
            "input_resolution = 34 cannot be halved 2 times, .*: use a multiple of 4",
        ),
        (
            UpsamplerConfig,
            {"up_channels": (32, 32, 32), "kernels": (1, 1, 1), "blocks": (1, 1, 1),
             "attention": (0, 0, 0)},
            "up_channels has 3 resolutions .* 32 px, which is not above input_resolution = 32: add",
        ),
        (
            UpsamplerConfig,
            {"attention": (1, 0, 0, 0, 0, 1)},
            "attention = .* has 6 entries, .* 8, 16, 32, 64, 128 px: entry 5 = 1",
        ),
        (
            TrainUpsamplerConfig,
            {"upsampler": {"input_resolution": 24}},
            "makes 96 px but the discriminator's 6 resolutions start at 128 px",
        ),
        (
            TrainUpsamplerConfig,
            {
                "discriminator": {"channels": (32,) * 6, "blocks": (0,) * 6, "attention": (0,) * 6,
                                  "levels": 4},
                "loss": {"level_weights": (0.25,) * 4},
            },
            "levels = 4, but the generator makes only 3 levels",
        ),
        (
            TrainBaseConfig,
            {"generator": {"kind": "stylegan-t"}},
            "levels = 3, but the generator makes only 1 level of a pyramid",
        ),
        (
            TrainBaseConfig,
            {"discriminator": {"kind": "projected"}},
            r"optimizer\.r1_weight = 3\.0, but the heads of .* have no such term: set it to 0",
        ),
        (
            TrainUpsamplerConfig,
            {"loss": {"guidance": 0.2}},
            r"loss\.guidance = 0\.2, but an upsampler is trained without an encoder of images: set",
        ),
        (
            TrainBaseConfig,
            {"discriminator": {"text": TEXT}},
            "different encoders, embedded:minilm-l6 and test:words: set text.encoder of both",
        ),
        (
            TrainBaseConfig,
            {"generator": {"text": None}},
            "different encoders, None and embedded:minilm-l6: set text.encoder of both",
        ),
        (
            TrainBaseConfig,
            {
                "generator": {"text": None, "classes": ClassConfig(number=7)},
                "discriminator": {"text": None, "classes": ClassConfig(number=5)},
                "loss": {"matching": 0, "contrastive": 0},
            },
            "know 7 and 5 classes: set classes.number of both",
        ),
        *(
            (
                TrainBaseConfig,
                {
                    "generator": {"text": None},
                    "discriminator": {"text": None},
                    "loss": {"matching": 0, "contrastive": 0, name: 0.5},
                },
                f"loss.{name} = 0.5 needs captions.*, but text .*null: set it to 0",
            )
            for name in ("matching", "generator_matching", "contrastive")
        ),
        (
            TrainBaseConfig,
            {"loss": {"level_weights": (0.5, 0.5)}},
            "loss.level_weights has 2 entries for 3 discriminator levels",
        ),
        (
            TrainBaseConfig,
            {"loss": {"vision_heads": "projected", "vision_resolution": 72}},
            "vision_resolution = 72, but embedded:efficientnet-lite0 halves .* multiple of 32",
        ),
        (
            TrainBaseConfig,
            {"loss": {"vision_heads": "projected", "vision_encoder": "open_clip:RN50/openai"}},
            "vision_encoder = 'open_clip:RN50/openai': no heads are known for it, choose one of",
        ),
        (TrainBaseConfig, {"loss": {"maching": 1.0}}, r"loss\.maching\n.*Extra inputs are not"),
        (TrainBaseConfig, {"precision": "fp16"}, "precision\n.*'auto', 'fp32' or 'bf16'.*'fp16'"),
        (TrainBaseConfig, {"batch_size": 1}, "batch_size\n.*greater than or equal to 2.*=1,"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused_by_name_value_and_remedy(section, changes, message):
    with pytest.raises(ValidationError, match=message):
        section.model_validate(changes)


# ---- the ladder

ROWS = [
    "stylegan2", "larger", "tuned", "attention", "matching-d", "matching-gd", "adaptive", "deeper",
    "clip", "multi-scale", "vision", "scale-up",
]  # fmt: skip


def test_the_ladder_has_the_rows_of_the_papers_ablation_in_its_order():
    assert list(LADDER) == ROWS
    assert [name for name in PRESETS if name.startswith("ladder-")] == [f"ladder-{r}" for r in ROWS]


def flat(tree, prefix=""):
    """Every value under its dotted path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


CHANNELS = {"generator.channels", "discriminator.channels"}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ("larger", CHANNELS),
        (
            "tuned",
            CHANNELS | {"generator.mapping_layers", "generator.mapping_lr_multiplier",
             "generator.style_input", "discriminator.head_layers", "optimizer.lr",
             "optimizer.r1_weight"},
        ),
        (
            "attention",
            {"generator.attention", "generator.text.depth", "generator.channels",
             "discriminator.attention", "discriminator.text.depth"},
        ),
        ("matching-d", {"loss.matching", "loss.matching_images"}),
        ("matching-gd", {"loss.matching_images"}),
        ("adaptive", {"generator.kernels"}),
        ("deeper", {"generator.blocks", "discriminator.blocks"}),
        ("clip", {"loss.contrastive"}),
        (
            "multi-scale",
            {"discriminator.levels", "discriminator.every_stage", "discriminator.minibatch_std",
             "loss.level_weights"},
        ),
        ("vision", {"loss.vision"}),
        ("scale-up", CHANNELS),
    ],
)  # fmt: skip
def test_a_row_changes_in_the_row_before_it_what_its_name_says(row, fields):
    before = dict(flat(ladder(ROWS[ROWS.index(row) - 1]).model_dump()))
    after = dict(flat(ladder(row).model_dump()))
    assert {name for name in after if after[name] != before[name]} == fields


@pytest.mark.parametrize(
    ("row", "has"),
    [
        ("attention", lambda c: any(c.generator.attention) and any(c.discriminator.attention)),
        ("matching-d", lambda c: c.loss.matching > 0),
        ("matching-gd", lambda c: c.loss.matching > 0 and c.loss.matching_images == "both"),
        ("adaptive", lambda c: max(c.generator.kernels) > 1),
        ("deeper", lambda c: max(c.generator.blocks) > 1 and max(c.discriminator.blocks) > 1),
        ("clip", lambda c: c.loss.contrastive > 0),
        ("multi-scale", lambda c: c.discriminator.levels > 1 and c.discriminator.every_stage),
        ("vision", lambda c: c.loss.vision > 0),
    ],
)
def test_a_row_is_the_first_to_have_what_its_name_says_and_later_ones_keep_it(row, has):
    assert [has(ladder(r)) for r in ROWS] == [i >= ROWS.index(row) for i in range(len(ROWS))]


def test_the_ladder_grows_where_table_1_does():
    sizes = [
        sum(s.parameters - s.parameters_of_text for s in summaries(f"ladder-{r}")) for r in ROWS
    ]
    of = dict(zip(ROWS, sizes, strict=True))
    assert of["larger"] / of["stylegan2"] == pytest.approx(5.7, rel=0.2)  # as the paper's
    assert of["tuned"] < of["attention"] < of["adaptive"] < of["deeper"]
    assert of["attention"] == of["matching-d"] == of["matching-gd"]
    assert of["deeper"] == of["clip"] <= of["multi-scale"] == of["vision"]
    assert of["scale-up"] / of["vision"] == pytest.approx(652.5 / 164, rel=0.5)


# ---- every row trains

SIZE = 4


class TinyEncoder(ImageEncoder):
    """Two fixed convolutions."""

    name = "test:pixels"
    width = 7
    stage_channels = (5, 6)
    image_size = None

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        shapes = ((5, 3, 4, 4), (6, 5, 2, 2), (6, 7))
        self.weights = [torch.randn(s, generator=random) / s[0] for s in shapes]

    def forward(self, x_BCHW):
        first, second, pooled = self.weights
        fine = F.conv2d(x_BCHW, first, stride=4).tanh()
        coarse = F.conv2d(fine, second, stride=2)
        return ImageFeatures(coarse.mean((2, 3)) @ pooled, [fine, coarse])


class TinySpace:
    scale = 10.0

    def embed_images(self, pooled_BD):
        return pooled_BD

    def embed_captions(self, captions, text):
        return text.pooled_BD[:, :7]


def narrowed(config):
    """The same layers a quarter as wide: which are trained does not hang on their widths."""
    networks = {name: getattr(config, name) for name in ("generator", "discriminator")}
    return config.model_copy(update={k: width_scaled(v, 4) for k, v in networks.items()})


def ladder_players(config):
    torch.manual_seed(0)
    g, d = Generator(config.generator), Discriminator(config.discriminator)
    weights = losses.prediction_weights(
        d.config.pairs, config.loss.level_weights, intermediate=config.loss.intermediate
    )
    auxiliary = None
    if config.loss.contrastive or config.loss.vision:
        heads = VisionAidedDiscriminator(
            TinyEncoder.stage_channels, text_width=config.discriminator.condition_width
        )
        auxiliary = Auxiliary(config.loss, TinyEncoder(), TinySpace(), heads)
    return step.Players(g, d, weights, auxiliary, None)


def random_inputs(config):
    text = config.generator.text
    real = torch.rand(SIZE, 3, config.generator.resolution, config.generator.resolution) * 2 - 1
    return Inputs(
        pyramid(real, config.discriminator.levels),
        ["caption"] * SIZE,
        features(text, SIZE),
        torch.randn(SIZE, config.generator.latent_dim),
        features(text, SIZE),
        torch.ones(SIZE, dtype=torch.bool),
    )


def with_gradient(**networks):
    """Names of the parameters that a gradient has reached."""
    return {
        f"{network}.{name}"
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_row_trains_every_parameter_with_finite_losses(row):
    config = narrowed(ladder(row))
    players = ladder_players(config)
    g, d = players.generator, players.discriminator
    heads = players.auxiliary.heads if players.auxiliary else torch.nn.Module()
    opt_g, opt_d = adamw(config, World(), g), adamw(config, World(), d, heads)
    trained, expected = set(), set()
    for _ in range(2):
        inputs = random_inputs(config)
        fakes = step.synthesize(g, inputs)
        loop._require_grad(True, d, heads)
        opt_d.zero_grad()
        loss, metrics = step.discriminator_loss(
            players, config, inputs, fakes, auxiliary_strength=1.0
        )
        penalty, more = step.r1_loss(players, inputs)
        (loss + config.optimizer.r1_weight * penalty).backward()
        trained |= with_gradient(d=d, heads=heads)
        opt_d.step()
        loop._require_grad(False, d, heads)
        opt_g.zero_grad()
        loss, terms = step.generator_loss(players, config, inputs, fakes, auxiliary_strength=1.0)
        loss.backward()
        metrics |= more | terms
        trained |= with_gradient(g=g)
        opt_g.step()
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    for network, module in {"g": g, "d": d, "heads": heads}.items():
        expected |= {f"{network}.{name}" for name, _ in module.named_parameters()}
        assert all(p.isfinite().all() for p in module.parameters())
    assert trained == expected
    wanted = {"matching": "d/mismatch", "contrastive": "g/contrastive", "vision": "g/vision"}
    assert all(term in metrics for loss, term in wanted.items() if getattr(config.loss, loss) > 0)
