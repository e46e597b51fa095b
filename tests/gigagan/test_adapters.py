"""Adapters: their algebra, their files, their training, and a thing that is forgotten."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call

from gigagan import load
from gigagan.__main__ import main
from gigagan.config import AdaptConfig, GeneratorConfig, TextConfig
from gigagan.evaluation import adapted
from gigagan.models import adapters, pretrained, snapshot
from gigagan.models.adapters import Adapter, AdapterError
from gigagan.models.generator import Generator
from gigagan.training import adapt
from gigagan.training.checkpoint import CheckpointError

from .small import TEXT, WordEncoder

CONFIG = GeneratorConfig(
    channels=(12, 8), kernels=(2, 1), blocks=(1, 1), attention=(0, 0), latent_dim=5,
    style_dim=7, text=TextConfig.model_validate(TEXT.model_dump() | {"depth": 1}),
    style_input=True, constant_input=False, latent_gain=0.3,
)  # fmt: skip
THINGS = ("bell", "key", "sun")
OLD = [f"flat {thing} on {colour}" for thing in THINGS for colour in ("red", "blue", "teal")]


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    monkeypatch.setattr(pretrained, "text_encoder", lambda name, device="cpu": WordEncoder())


@pytest.fixture
def base():
    return network()


def network(seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    return Generator(CONFIG).eval().requires_grad_(False)


def random_adapter(network, seed, rank=2, layers=("modulation", "convolutions", "text")):
    found = Adapter.new(network, layers, rank, seed).rounded()
    random = torch.Generator().manual_seed(seed)
    for factor in found.factors.values():
        factor.copy_(0.3 * torch.randn(factor.shape, generator=random))
    return found.rounded()


def drawn(network, weights=None):
    z_BZ = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    return functional_call(network, weights or {}, (z_BZ, WordEncoder().encode(OLD[:3])))[0]


def saved(path, network, adapter, kind="adapter"):
    about = adapters.About(kind, adapters.digest(network), 2, ("modulation",), None, {})
    adapters.save(path, adapter, about)
    return path


# ---- algebra -----------------------------------------------------------------------------------


def test_merged_weights_are_the_weighted_sum_of_the_products_in_double_precision(base):
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    found = adapters.merged(base, [(one, 0.5), (two, -2.0)])
    assert {"mapping.layers.0.weight", "style_input.weight", "text.from_pooled.weight"} <= set(
        found
    )
    for name, weight in base.named_parameters():
        if name not in found:
            assert weight.ndim == 1 or "constant" in name, name
            continue
        wanted = weight.double().numpy().copy()
        for adapter, amount in ((one, 0.5), (two, -2.0)):
            up, down = (adapter.factors[name + end].double().numpy() for end in (".up", ".down"))
            wanted += amount * np.reshape([[sum(u * d) for d in down.T] for u in up], weight.shape)
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=2e-5, atol=2e-5)


def test_a_bank_is_a_matrix_of_all_its_filters_by_what_one_sees(base):
    factors = Adapter.new(base, ("convolutions",), 3, 0).factors
    name = "levels.0.blocks.0.first.bank"
    assert base.get_parameter(name).shape == (2, 12, 12, 3, 3)
    assert factors[name + ".up"].shape == (24, 3)
    assert factors[name + ".down"].shape == (3, 108)


def test_a_merged_network_draws_what_the_base_draws_with_those_weights(base):
    parts = [(random_adapter(base, 1), 0.7)]
    with_updates = drawn(base, adapters.merged(base, parts))
    assert (with_updates - drawn(base)).abs().mean() > 0.005
    adapters.merge(base, parts)
    torch.testing.assert_close(drawn(base), with_updates, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [2, None])
def test_a_new_adapter_changes_no_bit(base, rank):
    fresh = Adapter.new(base, ("modulation", "convolutions", "text"), rank, 0)
    assert torch.equal(drawn(base, adapters.merged(base, [(fresh, 1.0)])), drawn(base))


def test_each_kind_of_layers_has_its_own_weights_and_full_updates_have_biases(base):
    kinds = [
        set(adapters.chosen(base, [k], full=True)) for k in ("modulation", "convolutions", "text")
    ]
    assert not kinds[0] & kinds[1] | kinds[0] & kinds[2] | kinds[1] & kinds[2]
    assert set.union(*kinds) == {name for name, _ in base.named_parameters()}
    assert "levels.0.blocks.0.first.to_select.weight" in kinds[0]
    assert "levels.1.to_rgb.bias" in kinds[1]
    assert all(base.get_parameter(n).ndim > 1 for n in adapters.chosen(base, ["text"], full=False))


# ---- files -------------------------------------------------------------------------------------


def test_files_are_added_with_their_weights_and_the_pictures_say_so(base, tmp_path):
    snapshot.save(tmp_path / "base.safetensors", base, {})
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    paths = [saved(tmp_path / f"{n}.safetensors", base, a) for n, a in (("1", one), ("2", two))]
    sampler = load(tmp_path / "base.safetensors", adapters=[str(paths[0]), (paths[1], 0.5)])
    wanted = drawn(base, adapters.merged(base, [(one, 1.0), (two, 0.5)]))
    assert torch.equal(drawn(sampler.base), wanted)
    assert list(sampler.snapshots) == ["base", "adapter 1 × 1", "adapter 2 × 0.5"]


def test_one_base_saved_twice_takes_the_same_adapter(base, tmp_path):
    path = saved(tmp_path / "a.safetensors", base, random_adapter(base, 1))
    for about in ({}, {"note": "another"}):
        snapshot.save(tmp_path / "base.safetensors", base, about)
        adapters.load(path, snapshot.load(tmp_path / "base.safetensors")[0])
    with pytest.raises(AdapterError, match="belongs to the base with weights"):
        adapters.load(path, network(seed=1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no such adapter"),
        (lambda path: path.write_bytes(b"no"), "no readable safetensors"),
        (lambda path: snapshot.save(path, network(), {}), "is no adapter"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"adapter-1", b"adapter-7")),
            "'gigagan-adapter-7', expected",
        ),
    ],
)
def test_what_is_no_adapter_is_refused_in_a_sentence(base, tmp_path, spoil, message):
    path = saved(tmp_path / "a.safetensors", base, random_adapter(base, 1))
    spoil(path)
    with pytest.raises(AdapterError, match=message):
        adapters.apply(base, [path])


def test_a_weight_that_is_no_number_is_refused_and_one_for_the_command_is_read(
    base, tmp_path, capsys
):
    path = saved(tmp_path / "a.safetensors", base, random_adapter(base, 1))
    with pytest.raises(AdapterError, match="give a finite number"):
        adapters.apply(base, [(path, float("nan"))])
    snapshot.save(tmp_path / "base.safetensors", base, {})
    command = ["sample", "flat bell", "--base", str(tmp_path / "base.safetensors")]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--adapter", f"{path}:0.5"]) == 0
    assert '"adapter 1 × 0.5"' in capsys.readouterr().out
    assert main([*command, "--adapter", f"{path}:much"]) == 1
    assert "'much' is no weight" in capsys.readouterr().err


# ---- training ----------------------------------------------------------------------------------


def config(**settings):
    usual = {"total_images": 2_400, "rank": 3, "lr": 0.02, "checkpoint_images": 4_000}
    return AdaptConfig.model_validate(usual | settings)


def pictures(folder, captions):
    (folder / "fake_images").mkdir(parents=True)
    for number, _ in enumerate(captions):
        colours = np.random.default_rng(number).integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(colours.repeat(4, 0).repeat(4, 1)).save(
            folder / "fake_images" / f"{number}.png"
        )
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    return str(folder)


def error(first, second):
    return float((first - second).abs().mean())


def pictured(draw, captions, weights=None):
    with torch.no_grad():
        z_BZ = torch.randn(len(captions), 5, generator=torch.Generator().manual_seed(9))
        return draw(z_BZ, captions, weights)[0]


def test_pictures_are_learned_old_ones_kept_and_the_base_is_untouched(base, tmp_path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    captions = ["odd bell on red", "odd key on teal"]
    draw = adapt.Drawing(base)
    found = {}
    for keep in (1.0, 0.0):
        at = config(pictures=pictures(tmp_path / f"new-{keep}", captions), keep=keep)
        taught = adapt.lessons(at, OLD, 8)
        adapter, _ = adapt.train(at, draw, taught, tmp_path / f"{keep}")
        weights = adapters.merged(base, [(adapter, 1.0)])
        real = taught.pictures_NCHW / 127.5 - 1
        found[keep] = (
            error(pictured(draw, captions, weights), real) / error(pictured(draw, captions), real),
            error(pictured(draw, OLD, weights), pictured(draw, OLD)),
        )
    assert found[1.0][0] < 0.6
    assert found[1.0][1] < 0.5 * found[0.0][1]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_forgotten_thing_is_drawn_as_its_replacement_and_others_stay(base, tmp_path):
    draw = adapt.Drawing(base)
    at = config(unlearn="bell", replacement="key", total_images=4_000)
    taught = adapt.lessons(at, OLD, 8)
    assert taught.asked == OLD[:3]
    assert taught.like == OLD[3:6]
    adapter, _ = adapt.train(at, draw, taught, tmp_path)
    weights = adapters.merged(base, [(adapter, 1.0)])
    bells, keys = (pictured(draw, captions) for captions in (OLD[:3], OLD[3:6]))
    after = pictured(draw, OLD[:3], weights)
    assert error(after, keys) < 0.4 * error(after, bells)
    stays = error(pictured(draw, OLD[3:], weights), pictured(draw, OLD[3:]))
    assert stays < 0.2 * error(bells, keys)


def test_a_resumed_run_ends_with_the_same_weights(base, tmp_path, monkeypatch):
    at = config(unlearn="bell", total_images=160, checkpoint_images=64)
    taught, draw = adapt.lessons(at, OLD, 8), adapt.Drawing(base)
    whole, _ = adapt.train(at, draw, taught, tmp_path / "whole")
    real, calls = adapt.step_loss, []

    def break_off(*args):
        calls.append(args[-1])
        if args[-1] == 96:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(adapt, "step_loss", break_off)
    with pytest.raises(KeyboardInterrupt):
        adapt.train(at, draw, taught, tmp_path / "parts")
    monkeypatch.setattr(adapt, "step_loss", lambda *args: calls.append(args[-1]) or real(*args))
    again, _ = adapt.train(at, draw, taught, tmp_path / "parts")
    assert calls[-6:] == [64, 80, 96, 112, 128, 144]
    for name, factor in whole.factors.items():
        assert torch.equal(factor, again.factors[name]), name
    with pytest.raises(CheckpointError, match=r"lr: 0\.02 → 0\.03"):
        adapt.train(config(**at.model_dump() | {"lr": 0.03}), draw, taught, tmp_path / "parts")
    longer = config(**at.model_dump() | {"total_images": 320})
    with pytest.raises(CheckpointError, match="length: 160 → 320"):
        adapt.train(longer, draw, taught, tmp_path / "parts")
    with pytest.raises(CheckpointError, match="lessons: "):
        adapt.train(at, draw, adapt.lessons(at, OLD[:6], 8), tmp_path / "parts")


def test_words_of_a_concept_are_whole_ones_with_their_article():
    assert adapt.without("flat emoji of a bell on red", "bell", "something") == (
        "flat emoji of something on red"
    )
    assert adapt.without("The ice  cream", "ice cream", "a key") == "a key"
    assert adapt.mentions("A BELL", "bell")
    assert not adapt.mentions("a doorbell or bells or bell-shaped", "bell")


@pytest.mark.usefixtures("quick_inception")
def test_the_command_measures_and_leaves_a_file_that_fits(base, tmp_path, capsys):
    snapshot.save(tmp_path / "base.safetensors", base, {})
    (tmp_path / "old.txt").write_text("\n".join(OLD))
    command = ["unlearn", "--base", str(tmp_path / "base.safetensors"), "--concept", "bell"]
    command += ["--out", str(tmp_path / "out"), "--set", f"old_captions={tmp_path / 'old.txt'}"]
    assert main([*command, "--set", "total_images=64"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["new"]["captions"] == 3
    assert report["old"]["captions"] == 6
    assert report["new"]["r1_chance"] == pytest.approx(1 / 9)
    assert report["bytes"] == (tmp_path / "out" / "unlearn.safetensors").stat().st_size
    file = tmp_path / "out" / "unlearn.safetensors"
    assert adapters.load(file, base)[1].concept == "bell"
    assert Image.open(tmp_path / "out" / "before-after.png").width > 100


def test_a_rate_is_of_nearest_pictures_and_moved_is_in_levels():
    captions = [f"thing {n}" for n in range(5)]
    reals = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.full((1, 7, 7, 3), 40, np.uint8)
    asked = adapted.of_captions(captions, lambda z, c: [torch.zeros(len(c), 3, 7, 7)], 5)
    asked = adapted.Asked(asked.gallery, asked.places, reals)
    swapped = reals[[1, 0, 2, 3, 4]]
    figures = adapted.compared(asked, reals, swapped, None)
    assert (figures["r1_before"], figures["r1_after"]) == (1.0, 0.6)
    assert figures["moved"] == pytest.approx(2 * 40 / 5)
    assert figures["r1_chance"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unlearn": "anvil"}, "none of 9 captions has it"),
        ({}, "are null: give one of them"),
        ({"pictures": "nowhere"}, "holds neither captions.json nor fake_images/"),
        ({"pictures": "one"}, "holds 1 picture: give two or more"),
        ({"pictures": "two", "unlearn": "bell"}, "give one of them"),
        ({"unlearn": " "}, "unlearn"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "one", ["odd bell"])
    pictures(tmp_path / "two", ["odd bell", "odd key"])
    with pytest.raises((ValueError, OSError), match=message):
        adapt.lessons(config(**change), OLD, 8)


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(base, tmp_path):
    at = config(unlearn="bell", lr=1e30, total_images=64, checkpoint_images=16)
    with pytest.raises(ValueError, match=r"adapt.lr = 1e\+30: after"):
        adapt.train(at, adapt.Drawing(base), adapt.lessons(at, OLD, 8), tmp_path)


def test_captions_of_what_must_stay_come_from_a_text_or_a_list_of_what_was_trained_on(tmp_path):
    (tmp_path / "old.txt").write_text("a bell\n\n a  key \n")
    assert adapt.read_captions(tmp_path / "old.txt") == ["a bell", "a key"]
    told = {"template": "{style} {name} on {background}", "styles": ["flat"], "names": ["a bell"]}
    (tmp_path / "trained_on.json").write_text(json.dumps(told | {"backgrounds": ["red", "teal"]}))
    found = adapt.read_captions(tmp_path / "trained_on.json")
    assert found == ["flat a bell on red", "flat a bell on teal"]
    (tmp_path / "old.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no captions"):
        adapt.read_captions(tmp_path / "old.txt")
