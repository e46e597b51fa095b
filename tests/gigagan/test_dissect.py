"""Dissection: masks, IoU against chance, and units switched, also of a unit that was planted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gigagan.__main__ import main
from gigagan.config import EvaluateConfig, TextConfig
from gigagan.config.stylegan_t import StyleTConfig
from gigagan.evaluation import dissect, setting
from gigagan.evaluation.findings import Findings
from gigagan.evaluation.heldout import read_heldout
from gigagan.evaluation.probing import BACKGROUND, STYLE, THING, Change, Grid, Probe, level_of
from gigagan.evaluation.report import page, units
from gigagan.evaluation.switching import on_the_way
from gigagan.models import snapshot
from gigagan.models.base import base_generator
from gigagan.models.encoders import TextEncoder, TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.text import Text

from . import shapes, small

WORDS = ["bar", "dot", "square"]
PLACES = {"bar": np.s_[1:3, 0:16], "dot": np.s_[12:16, 0:8], "square": np.s_[5:11, 9:15]}
LOUDNESS = {"bar": 0.9, "dot": 0.9, "square": 1.0}


class Mentions(TextEncoder):
    """Which of the words a caption has."""

    name, width, pooled_width, max_tokens = "test:mentions", 3, 3, 16

    def count_tokens(self, caption):
        return len(caption.split())

    def encode(self, captions):
        has = torch.tensor(
            [[float(word in caption.split()) for word in WORDS] for caption in captions]
        )
        return TextFeatures(has[:, None], torch.ones(len(captions), 1, dtype=torch.bool), has)


class Planted(nn.Module):
    """Units 0 to 2 draw a word's shape in a colour of its own; 3 to 6 are noise, and not drawn."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(resolution=16, latent_dim=5)
        self.levels = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.weight = nn.Parameter(torch.zeros(()))

    def read(self, features):
        return Text(global_BT=features.pooled_BD)

    def style(self, z_BZ, text):
        return z_BZ

    def synthesize(self, style_BS, text):
        maps = torch.zeros(len(style_BS), 7, 16, 16)
        loud_B = 1 + 0.05 * style_BS[:, 0].tanh()
        for unit, word in enumerate(WORDS):
            has_B11 = (text.global_BT[:, unit] * loud_B)[:, None, None] * LOUDNESS[word]
            maps[(slice(None), unit, *PLACES[word])] = has_B11
        waves = torch.arange(256).view(16, 16) * style_BS[:, 1, None, None]
        for unit in range(3, 7):
            maps[:, unit] = (7 * unit * waves + unit).sin()
        return [2 * self.levels[1](maps)[:, :3] - 1]


def planted_grid():
    return Grid.fill("a {concept} on white", {"concept": WORDS})


@pytest.fixture(scope="module")
def planted():
    return dissect.dissect(Planted(), Mentions(), planted_grid(), level=16, latents=12, off=1)


# ---- a unit that was planted


def test_a_planted_unit_is_found_and_chance_is_far_below(planted):
    agreement = planted.agreements["concept"]
    for unit in range(3):
        assert agreement.iou_UK[unit].argmax() == unit
        assert agreement.iou_UK[unit, unit] > 0.95, WORDS[unit]
    assert agreement.iou_UK[3:].max() < 0.15
    assert agreement.null < 0.5
    top = planted.units()[:3]
    assert {(row["unit"], row["concept"]) for row in top} == set(enumerate(WORDS))
    told = planted.told()
    assert told["axes"]["concept"]["units_above_null_99"] == 3
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_switching_the_planted_unit_off_removes_its_shape_and_no_other(planted):
    square = planted.switched[WORDS.index("square")]
    assert square.units == [2]
    assert square.effect.inside > 0.3  # one of three colours goes from about 1 to −1
    assert square.effect.outside == 0
    assert (square.effect.kept, square.random.kept) == (0, 1)
    assert square.random.inside == 0
    own, off, _, other, on, _ = square.pictures
    assert own[2][PLACES["square"]].min() > 0.8
    assert torch.equal(off, torch.full_like(off, -1))
    assert on[2][PLACES["square"]].min() > 0.8
    assert torch.equal(on[:2], other[:2])  # what else is there stays
    assert square.effect.ace > 0.5


def test_masks_are_where_a_picture_is_unlike_most_others():
    grid = planted_grid()
    drawn = Probe(Planted(), Mentions(), grid, px=16, latents=2).draw(range(6))
    mask_NHW = dissect.masks(grid, drawn.pictures_NCHW)["concept"]
    for n, word in enumerate(WORDS * 2):
        expected = torch.zeros(16, 16, dtype=torch.bool)
        expected[PLACES[word]] = True
        assert torch.equal(mask_NHW[n], expected), word


def test_a_thing_is_what_stays_when_the_background_changes():
    axes = {THING: ["disc", "bar"], STYLE: ["flat", "outlined"], BACKGROUND: list(shapes.PALETTE)}
    grid = Grid.fill(f"{{{STYLE}}} emoji of a {{{THING}}} on a {{{BACKGROUND}}} background", axes)
    looks = [shapes.draw(*shapes.taken_apart(caption)) for caption in grid.captions]
    pictures = torch.from_numpy(np.stack(looks)).permute(0, 3, 1, 2) / 127.5 - 1
    found = dissect.masks(grid, pictures.repeat(2, 1, 1, 1))
    for n, caption in enumerate(grid.captions * 2):
        shape, style, background = shapes.taken_apart(caption)
        other = next(name for name in shapes.PALETTE if name != background)
        same = (shapes.draw(shape, style, background) == shapes.draw(shape, style, other)).all(-1)
        assert np.array_equal(found[THING][n].numpy(), same), caption
        assert np.array_equal(found[BACKGROUND][n].numpy(), ~same)
        assert np.array_equal(
            found[STYLE][n].numpy(), same
        )  # its ink is what tells the styles apart


# ---- figures


def test_iou_is_that_of_a_naive_loop():
    random = np.random.default_rng(0)
    unit, mask = random.random((2, 7, 5, 3)) < np.array([0.2, 0.6])[:, None, None, None]
    concept = np.array([0, 1, 1, 2, 0, 2, 2])
    found = dissect.iou(dissect.packed(unit), dissect.packed(mask), concept, 4)
    for k in range(4):
        both = either = 0
        for n in range(7):
            for y in range(5):
                for x in range(3):
                    there = mask[n, y, x] and concept[n] == k
                    both += unit[n, y, x] and there
                    either += unit[n, y, x] or there
        assert found[k] == pytest.approx(both / either)


def test_units_that_know_nothing_agree_as_chance_has_it():
    grid = Grid.fill("{concept}", {"concept": ["a", "b", "c"]})
    random = np.random.default_rng(1)
    mask = torch.from_numpy(random.random((60, 7, 5)) < 0.3)
    maps = [dissect.packed(random.random((60, 7, 5)) < dissect.SHARE) for _ in range(50)]
    found = dissect.agree(grid, "concept", maps, mask)
    assert found.iou_UK.max(axis=1).mean() == pytest.approx(found.null_UR.mean(), rel=0.05)
    assert found.told()["units_above_null_99"] <= 3
    assert found.area_K.sum() == pytest.approx(float(mask.float().mean()))


def test_otsus_threshold_is_the_one_of_least_variance_within():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(0.2, 0.05, 300), random.normal(0.9, 0.1, 70)])

    def within(t):
        parts = values[values <= t], values[values > t]
        return sum(len(part) * part.var() for part in parts if len(part))

    best = min(np.linspace(values.min(), values.max(), 200), key=within)
    assert within(dissect.otsu(values)) == pytest.approx(within(best), rel=1e-3)
    assert ((values > dissect.otsu(values)) == (np.arange(370) >= 300)).mean() > 0.99


def test_a_units_mask_takes_its_share_of_all_pictures_and_is_enlarged():
    map_Nhw = torch.randn(11, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = dissect.above_threshold(map_Nhw, 16)
    assert mask.shape == (11, 16, 16)
    assert mask.mean() == pytest.approx(dissect.SHARE, abs=1 / mask.size)
    n, y, x = np.unravel_index(int(map_Nhw.argmax()), map_Nhw.shape)
    assert mask[n, 4 * y + 1 : 4 * y + 3, 4 * x + 1 : 4 * x + 3].all()
    assert not dissect.above_threshold(torch.zeros(3, 4, 4), 8).any()  # a dead unit


def test_on_the_way_is_0_at_the_start_and_1_at_the_end():
    start, end = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.25, 1.0):
        far = on_the_way(start.lerp(end, share), end, start)
        assert torch.allclose(far, torch.full((5,), share), atol=1e-6)
    assert torch.equal(on_the_way(start, start, start), torch.zeros(5))


# ---- both recipes


VECTOR = TextConfig(encoder="test:words", encoder_width=11, pooled_width=11, width=11, depth=0)
RECIPES = [
    small.BASE.generator,
    StyleTConfig(channels=(12, 8), blocks=1, groups=4, latent_dim=5, text=VECTOR),
]


@pytest.mark.parametrize("config", RECIPES, ids=["gigagan", "stylegan-t"])
def test_the_maps_of_either_recipe_are_read_and_changed_and_the_network_stays_as_it_was(config):
    torch.manual_seed(0)
    network = base_generator(config).eval()
    px = config.resolution
    probe = Probe(network, small.WordEncoder(), planted_grid(), px=px, latents=2)
    plain = probe.draw(range(5))
    assert plain.pictures_NCHW.shape == (5, 3, px, px)
    assert plain.maps_NUhw.shape == (5, 8, px, px)
    half = torch.zeros(5, px, px, dtype=torch.bool)
    half[:, : px // 2] = True
    loud = probe.draw(range(5), Change(torch.tensor([2, 7]), torch.tensor([3.0, 9.0]), half))
    assert (loud.maps_NUhw[:, 7, : px // 2] == 9).all()
    assert torch.equal(loud.maps_NUhw[:, 2, px // 2 :], plain.maps_NUhw[:, 2, px // 2 :])
    assert torch.equal(loud.maps_NUhw[:, :2], plain.maps_NUhw[:, :2])
    assert not torch.equal(loud.pictures_NCHW, plain.pictures_NCHW)
    assert torch.equal(probe.draw(range(5)).pictures_NCHW, plain.pictures_NCHW)
    assert not any(module._forward_hooks for module in network.modules())
    alone = probe.draw([4])  # a picture does not depend on those that it is drawn with
    assert torch.allclose(alone.maps_NUhw, plain.maps_NUhw[4:], atol=1e-5)
    with pytest.raises(ValueError, match=r"choose .*8"):
        level_of(network, 7)


# ---- as a part of an evaluation


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("shapes") / "heldout")


def test_the_gallery_gives_trained_concepts_in_every_look(heldout):
    gallery = read_heldout(heldout).gallery
    grid = Grid.of_gallery(gallery, 20)
    assert grid.shape == (3, 2, 3)  # of 4 concepts as many as 20 captions allow
    assert set(grid.axes[THING]) <= set(shapes.TRAINED)
    expected = Grid.fill("{style} emoji of a {thing} on a {background} background", grid.axes)
    assert grid.captions == expected.captions
    with pytest.raises(ValueError, match="dissect_captions to 12"):
        Grid.of_gallery(gallery, 11)


def test_an_evaluation_has_the_figures_with_their_chance_or_a_reason(heldout, tmp_path):
    torch.manual_seed(0)
    generator = base_generator(small.BASE.generator).eval(), small.WordEncoder()
    everything = read_heldout(heldout)
    at = setting.setting(EvaluateConfig(dissect_captions=12), tmp_path)
    findings = Findings()
    found = dissect.measure(findings, generator, everything.gallery, at)
    names = {f"unit_iou_{axis}" for axis in (THING, STYLE, BACKGROUND)}
    assert findings.metrics.keys() == findings.chance.keys() == names
    assert findings.absent == {}

    results = {
        "protocol": {"name": "x", "num_generated": 1, "num_real": 1},
        "metrics": findings.metrics,
        "reference": {"real": {}, "chance": findings.chance},
        "absent": {},
        "dissection": found.told(),
    }
    figures = page.Figures(dissected=units.looks(found))
    text = page.write_page(tmp_path / "r.html", results, figures).read_text()
    assert "Which units draw which concept?" in text
    assert f"unit {found.units()[0]['unit']}: {found.units()[0]['concept']}" in text

    off = setting.setting(EvaluateConfig(dissect_captions=0), tmp_path)
    few = setting.setting(EvaluateConfig(dissect_captions=5), tmp_path)
    for given, reason in (
        ((generator, everything.gallery, off), "dissect_captions is 0"),
        ((generator, everything.gallery, few), "dissect_captions to 12"),
        ((generator, None, at), "no gallery.json"),
        ((None, everything.gallery, at), "no torch network"),
    ):
        findings = Findings()
        assert dissect.measure(findings, *given) is None
        assert reason in findings.absent["dissection"]
        assert not findings.metrics


# ---- the command


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)  # another than that of --untrained
    file = tmp_path_factory.mktemp("snapshots") / "base.safetensors"
    snapshot.save(file, Generator(small.GENERATOR), {})
    return str(file)


def test_the_command_writes_figures_and_sheet_and_does_not_write_over_them(base, tmp_path, capsys):
    out = tmp_path / "o"
    words = ["dissect", "--base", base, "--concepts", "a cat", "a dog", "--backgrounds", "teal"]
    words += ["--latents", "2", "--off", "2", "--units", "3", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "dissect.json").read_text())
    assert len(found["snapshots"]["base"]) == 64
    assert found["settings"]["level"] == 8
    assert list(found["axes"]) == ["thing", "style"]  # one background tells nothing
    assert len(found["units"]) == 8
    for row in found["units"][:3]:
        assert f"{row['iou']:.3f}  {row['concept']}" in shown
    assert Image.open(out / "dissect.png").width > 6 * units.CELL_PX
    assert main(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert json.loads((out / "dissect.json").read_text()) == found
    assert main([*words, "--overwrite", "--untrained"]) == 0
    other = json.loads((out / "dissect.json").read_text())
    assert other["snapshots"] == {}
    assert other["untrained"]
    assert other["units"] != found["units"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concepts", "a cat"], "'a cat' alone"),
        (["--concepts", "a cat", "a cat"], "given twice"),
        (["--concepts", "a cat", " "], "empty"),
        (["--concepts", "a cat", "a dog", "--level", "7"], "choose 4, 8, 16"),
        (["--concepts", "a cat", "a dog", "--level", "0"], "choose 4, 8, 16"),
        (["--concepts", "a cat", "a dog", "--off", "5"], "give 1 to 4"),
        (["--template", "a {} and {}", "--concepts", "a cat", "a dog"], "needs {} once"),
        (["--template", "a cat", "--concepts", "a cat", "a dog"], "needs {} once"),
        (["--template", "a {}"], "needs --concepts"),
        (["--template", "a {}", "--concepts", "cat", "--styles", "flat"], "leave --styles"),
        (["--latents", "0"], "--latents 0"),
        (["--units", "0"], "--units 0"),
        (["--concepts", "a cat", "a\adog"], "control character"),
    ],
)
def test_what_cannot_be_dissected_is_one_message(base, tmp_path, capsys, words, message):
    out = tmp_path / "o"
    assert main(["dissect", "--base", base, "--out", str(out), *words]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not out.exists()


def test_an_empty_list_is_a_mistake_of_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["dissect", "--concepts"])
    assert stopped.value.code == 2
    assert "--concepts" in capsys.readouterr().err
