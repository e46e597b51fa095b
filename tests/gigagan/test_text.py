"""Class-conditional and unconditional networks, trained."""

import pytest
import torch

from gigagan.config import (
    ClassConfig,
    ProjectedConfig,
    StyleTConfig,
    TrainBaseConfig,
    TrainUpsamplerConfig,
    with_class_names,
)
from gigagan.models import snapshot
from gigagan.models.base import base_generator
from gigagan.models.classes import ClassNumbers, Nothing, UnknownClassError
from gigagan.models.text import Text, rows_of
from gigagan.training import auxiliary, inputs, loop, step
from gigagan.training.captions import RecentCaptions
from gigagan.training.distributed.world import World
from gigagan.training.logs import Log
from gigagan.training.tasks import task_of

from .small import BASE, UPSAMPLER
from .test_training import NoProbe, ShadeLoader

pytestmark = pytest.mark.usefixtures("without_charts")

CPU = torch.device("cpu")
NAMES = ("black", "white")
CLASSES = {"text": None, "classes": {"number": 2, "width": 8, "names": NAMES}}
NONE = {"text": None, "classes": None}


def conditioned(kind, config=BASE, **changes):
    """The section with both networks conditioned so; without classes nothing can be mismatched."""
    tree = config.model_dump()
    for name in ("generator", "upsampler", "discriminator"):
        tree.get(name, {}).update(kind)
    if kind is NONE:
        tree["loss"]["matching"] = 0
    return type(config).model_validate({**tree, **changes})


BY_CLASS, UNTOLD = conditioned(CLASSES), conditioned(NONE)


class Shades:
    """Black and white pictures, by their classes' names."""

    def __init__(self, position, size, side):
        values = [(position + i) % 2 for i in range(size)]
        self.captions = self.planned_captions = [NAMES[v] for v in values]
        shades = torch.tensor(values, dtype=torch.uint8) * 255
        self.images_BCHW = shades[:, None, None, None].expand(size, 3, side, side).clone()


def reader(config):
    classes = config.network.classes
    return Nothing(CPU) if classes is None else ClassNumbers(classes, CPU)


def players(config):
    torch.manual_seed(config.seed)
    task = task_of(config)
    d = task.discriminator()
    encoder = task.encoder(CPU)
    return step.Players(
        task.generator(), d, task.prediction_weights(d), None, None, encoder=encoder
    )


def train(config, run_dir):
    made = players(config)
    run_dir.mkdir(exist_ok=True, parents=True)
    loader = ShadeLoader(config.network.resolution, config.batch_size, batch=Shades)
    log = Log(run_dir, config.total_images)
    loop.train(config, made, reader(config), loader, NoProbe(), run_dir, log, World())
    return made


def longer(config, images, **changes):
    quiet = {"checkpoint_images": images, "sample_images": images, "log_images": images // 2}
    return config.model_copy(update={"total_images": images, "batch_size": 8, **quiet, **changes})


def shades(network, names, count=16):
    """The mean shade of what is drawn for each of these names (or for nothing)."""
    z = torch.randn(count, network.config.latent_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [network(z, read)[0].mean((1, 2, 3)) for read in names]


def test_a_tiny_network_learns_which_shade_a_class_is(tmp_path):
    made = train(longer(BY_CLASS, 960), tmp_path)
    dark, light = shades(made.generator, (torch.full((16,), v) for v in (0, 1)))
    assert light.mean() - dark.mean() > 1.0


@pytest.mark.parametrize("kind", [CLASSES, NONE], ids=["classes", "nothing"])
def test_heads_on_a_frozen_encoder_train_without_text(kind, tmp_path):
    tree = {
        "generator": {**BASE.generator.model_dump(), **kind},
        "discriminator": {"kind": "projected", "maps": 16, "side": 32, **kind},
        "loss": {"adversarial": "hinge", "matching": float(kind is CLASSES), "vision": 0}
        | {"contrastive": 0},
        "optimizer": {"r1_weight": 0, "lr": 2e-3, "warmup_images": 0},
    }
    config = TrainBaseConfig.model_validate(tree)
    made = train(longer(config, 320 if kind is CLASSES else 32), tmp_path)
    if kind is NONE:
        return
    real = [torch.tensor([-1.0, 1.0] * 4)[:, None, None, None].expand(8, 3, 8, 8)]
    critic = step.critic_of(made)
    blank = inputs.Inputs(real, NAMES, None, torch.zeros(8, 5), None, (True,) * 8)
    with torch.no_grad():
        own, other = (
            critic.judge(real, blank._replace(text=torch.tensor(numbers * 4)))
            for numbers in ([0, 1], [1, 0])
        )
    assert (own - other).mean() > 0.1


def test_an_unconditional_network_draws_both_shades_with_its_latent_alone(tmp_path):
    made = train(longer(UNTOLD, 1600), tmp_path)
    (drawn_N,) = shades(made.generator, [None], count=64)
    assert (drawn_N.max() - drawn_N.min()) > 0.5
    assert -0.7 < drawn_N.mean() < 0.7


def test_stylegan_ts_generator_takes_a_class_for_its_caption():
    config = StyleTConfig(channels=(8, 8), text=None, classes=ClassConfig(number=3, width=8))
    network = base_generator(config)
    assert "text.vectors" in dict(network.named_parameters())
    z = torch.randn(2, config.latent_dim)
    one, other = (network.style(z, network.read(torch.full((2,), n))) for n in (0, 2))
    assert torch.equal(one[:, : config.latent_dim], other[:, : config.latent_dim])
    assert not torch.equal(one, other)


UPSAMPLER_RUN = TrainUpsamplerConfig(
    upsampler=UPSAMPLER.model_copy(update={"text": BASE.generator.text}),
    discriminator={**BASE.discriminator.model_dump(), "channels": (8, 8, 8), "levels": 2,
                   "blocks": (1, 0, 0), "attention": (0, 1, 0)},
    loss=BASE.loss, optimizer=BASE.optimizer, lpips=0, total_images=24, batch_size=4,
    checkpoint_images=8, sample_images=24, log_images=8,
)  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [CLASSES, NONE], ids=["classes", "nothing"])
@pytest.mark.parametrize("what", ["base", "upsampler"])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(
    what, kind, accumulate, tmp_path
):
    config = conditioned(
        kind,
        BASE if what == "base" else UPSAMPLER_RUN,
        total_images=24,
        system={"accumulate": accumulate},
    )
    train(config, tmp_path / "whole")
    train(config.model_copy(update={"total_images": 16}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    a, b = ((tmp_path / d / "snapshot.safetensors").read_bytes() for d in ("whole", "parts"))
    assert a == b
    network, _ = snapshot.load(tmp_path / "whole/snapshot.safetensors")
    assert network.config.text is None
    assert network.config.classes == (
        ClassConfig(**CLASSES["classes"]) if kind is CLASSES else None
    )


def test_two_ranks_meet_the_classes_and_mismatches_that_one_process_does():
    config = BY_CLASS.model_copy(update={"batch_size": 4})
    made, found = players(config), []
    for rank, world_size in [(0, 1), (0, 2), (1, 2)]:
        loader = ShadeLoader(8, 4, rank, world_size, batch=Shades)
        world = World(rank=rank, size=world_size)
        drawn = inputs.draw(
            config, made.augment, reader(config), RecentCaptions(9), next(loader.batches()), 0,
            world,
        )  # fmt: skip
        assert not torch.equal(drawn.text, drawn.other_text)
        found.append(drawn)
    whole, *parts = found
    for name in ("text", "other_text"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert [torch.equal(a.text, b.text) for a, b in zip(inputs.split(whole, 2), parts, strict=True)]


def test_rows_of_nothing_are_nothing_and_of_numbers_numbers():
    assert rows_of(None, slice(1, 2)) is None
    assert rows_of(torch.tensor([3, 5, 7]), slice(1, 3)).tolist() == [5, 7]


@pytest.mark.parametrize("kind", [CLASSES, NONE], ids=["classes", "nothing"])
@pytest.mark.parametrize("heads", ["modulated", "projected"])
def test_vision_aided_heads_need_no_captions(kind, heads, tmp_path):
    loss = {**BASE.loss.model_dump(), "vision": 0.5, "vision_heads": heads,
            "vision_resolution": 32, "auxiliary_start_images": 0, "ramp_images": 1,
            "matching": 0}  # fmt: skip
    config = conditioned(kind, loss=loss)
    world, log = World(), Log(tmp_path, 8)
    torch.manual_seed(0)
    made = auxiliary.auxiliary_losses(config, ShadeLoader(8), reader(config), tmp_path, world, log)
    pictures = torch.randn(4, 3, 8, 8, requires_grad=True)
    text_BT = None if kind is NONE else torch.randn(4, 8)
    made.discriminator_loss(pictures, -pictures, text_BT).backward()
    assert all(p.grad is not None for p in made.heads.parameters())
    vision, contrastive = made.generator_losses(pictures, pictures, text_BT, [""] * 4, None)
    vision.backward()
    assert contrastive == 0
    assert pictures.grad.abs().sum() > 0


# ---- names and numbers -------------------------------------------------------------------------


def test_a_name_goes_before_a_number_and_a_class_that_is_none_names_the_nearest():
    known = ClassNumbers(ClassConfig(number=3, names=("tench", "1", "goldfish")), CPU)
    assert known(["tench", "goldfish", "1", "2"]).tolist() == [0, 2, 1, 2]
    assert known.find("0") == "tench"
    with pytest.raises(UnknownClassError, match=r"'goldfsh', did you mean 'goldfish'\?.* 0 to 2"):
        known.find("goldfsh")
    with pytest.raises(UnknownClassError, match="no class '3'"):
        known(["3"])


def test_classes_without_names_are_told_by_their_numbers():
    assert ClassNumbers(ClassConfig(number=3), CPU).find("2") == "2"


def test_the_shards_classes_are_filled_in_and_another_number_is_refused_with_both():
    config = conditioned({"text": None, "classes": {"number": 3}})
    filled = with_class_names(config, ["a", "b", "c"])
    assert filled.generator.classes.names == filled.discriminator.classes.names == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"generator\.classes\.number = 3, .* hold 2 classes"):
        with_class_names(config, NAMES)
    with pytest.raises(ValueError, match="2 different ones for number = 3"):
        ClassConfig(number=3, names=("a", "b", "a"))


@pytest.mark.parametrize(
    ("kind", "loss", "message"),
    [
        (CLASSES, {"contrastive": 0.1}, "contrastive = 0.1 needs captions, but text is null"),
        (CLASSES, {"guidance": 0.2}, "guidance = 0.2 needs captions, but text is null"),
        (NONE, {"matching": 1.0}, "matching = 1.0 needs captions or classes, but"),
        (NONE, {"generator_matching": 1.0}, "generator_matching = 1.0 needs captions or classes"),
    ],
)
def test_losses_that_ask_for_more_than_there_is_are_refused_by_name(kind, loss, message):
    tree = {
        **BY_CLASS.model_dump(),
        **{n: UNTOLD.model_dump()[n] for n in ("generator", "discriminator") if kind is NONE},
    }
    with pytest.raises(ValueError, match=f"loss.{message}"):
        TrainBaseConfig.model_validate({**tree, "loss": {**tree["loss"], "matching": 0, **loss}})


def test_heads_and_generators_refuse_text_and_classes_together():
    for section in (ProjectedConfig, StyleTConfig):
        with pytest.raises(ValueError, match="text and classes are both set"):
            section(classes=ClassConfig(number=2))


def test_an_unconditional_text_is_empty():
    assert all(part is None for part in base_generator(UNTOLD.generator).read(None))
    assert Text().repeat_interleave(3) == Text()
