"""Terms of the literature beside the losses: their maths, and trainings with them."""

import math

import pytest
import torch

from gigagan import losses
from gigagan.config import AugmentConfig, OptionsConfig, TrainBaseConfig, TrainUpsamplerConfig
from gigagan.models.generator import Generator
from gigagan.models.options import OptionHeads
from gigagan.models.text import scattered
from gigagan.training import inputs, loop, step
from gigagan.training.augment import Augment, Draws
from gigagan.training.captions import CaptionFeatures, RecentCaptions
from gigagan.training.distributed.world import World
from gigagan.training.logs import Log
from gigagan.training.options import Chance
from gigagan.training.tasks import task_of

from .small import BASE, UPSAMPLER, WordEncoder
from .test_projected import CONFIG as PROJECTED
from .test_text import CLASSES, NONE, Shades, conditioned, reader
from .test_training import NoProbe, ShadeLoader

pytestmark = pytest.mark.usefixtures("without_charts")

CPU = torch.device("cpu")
ALL = {"adaptive_mix": 1.0, "augself": 1.0, "augself_generator": 0.5, "entropy": 0.1}
DIFFAUGMENT = {"diffaugment": ("color", "translation", "cutout")}


def with_options(config, options, **changes):
    tree = config.model_dump()
    tree["options"].update(options)
    if "conditioning_kl" in options:
        tree["generator"]["text"]["conditioning_augmentation"] = True
    return type(config).model_validate({**tree, "augment": DIFFAUGMENT, **changes})


TEXT = with_options(BASE, {**ALL, "conditioning_kl": 1.0}, total_images=24)
BY_CLASS = with_options(conditioned(CLASSES), {**ALL, "classifier": 0.5}, total_images=24)
HEADS = with_options(PROJECTED, ALL, total_images=32)
EVERY = pytest.mark.parametrize("config", [TEXT, BY_CLASS, HEADS], ids=["text", "class", "heads"])


def players(config, world=None):
    torch.manual_seed(config.seed)
    task = task_of(config)
    g, d = task.generator(), task.discriminator()
    weights, encoder, augment = task.prediction_weights(d), task.encoder(CPU), config.augment
    return step.Players(g, d, weights, None, None, Augment(augment), encoder, world or World())


def read(config):
    return CaptionFeatures(WordEncoder(), CPU) if config.network.text else reader(config)


def loader(config, rank=0, size=1):
    kinds = {} if config.network.text else {"batch": Shades}
    return ShadeLoader(config.network.resolution, config.batch_size, rank, size, **kinds)


def given_to(config, made, world):
    batch = next(loader(config, world.rank, world.size).batches(0))
    return inputs.draw(config, made.augment, read(config), RecentCaptions(9), batch, 0, world)


def drawn_inputs(config, made):
    return given_to(config, made, World())


def train(config, run_dir):
    made = players(config)
    run_dir.mkdir(exist_ok=True)
    log = Log(run_dir, config.total_images)
    loop.train(config, made, read(config), loader(config), NoProbe(), run_dir, log, World())
    return made


def d_loss(made, config, given, fakes):
    return step.discriminator_loss(made, config, given, fakes, auxiliary_strength=0)


def g_loss(made, config, given, fakes):
    return step.generator_loss(made, config, given, fakes, auxiliary_strength=0)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


# The maths, in double precision, term by term.


def test_adaptive_mix_is_one_minus_the_cosine_to_the_mix_of_features():
    mixed, first, second, noise = (doubles(3, 5) for _ in range(4))
    share = torch.rand(3, dtype=torch.double)
    total = 0.0
    for m, a, b, n, s in zip(mixed, first, second, noise, share, strict=True):
        target = s * a + (1 - s) * b + n
        total += 1 - (m @ target / (m.norm() * target.norm())).item()
    loss = losses.adaptive_mix(mixed, first, second, share, noise.detach())
    assert loss.item() == pytest.approx(total / 3)
    loss.backward()
    assert first.grad is None
    assert second.grad is None
    assert mixed.grad.abs().sum() > 0


def test_the_error_of_a_told_augmentation_is_a_mean_over_all_pictures_of_those_augmented():
    told, parameters = [doubles(3, 2), doubles(3, 5)], [torch.rand(3, 2), torch.rand(3, 5)]
    is_on = torch.tensor([True, False, True])
    expected = 0.0
    for a, b in zip(told, parameters, strict=True):
        rows = [sum((x - y) ** 2 for x, y in zip(*row, strict=True)) / len(row[0]) for row in
                zip(a.tolist(), b.double().tolist(), strict=True)]  # fmt: skip
        expected += (rows[0] + rows[2]) / 3
    assert losses.augmentation_error(told, parameters, is_on).item() == pytest.approx(expected)


def test_the_entropy_is_the_mean_log_distance_to_the_nearest_direction():
    x = doubles(7, 3)
    rows = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in x.tolist()]
    logs = []
    for i in range(7):
        others = [rows[j] for j in range(7) if j != i]
        squared = [sum((a - b) ** 2 for a, b in zip(rows[i], o, strict=True)) for o in others]
        logs.append(math.log(min(squared) + 1e-6))
    assert losses.neighbour_entropy(x).item() == pytest.approx(sum(logs) / 14)
    torch.autograd.gradcheck(losses.neighbour_entropy, x)


def test_the_entropy_of_equal_pictures_is_finite_and_so_is_its_gradient():
    x = torch.ones(5, 3, requires_grad=True)
    entropy = losses.neighbour_entropy(x)
    entropy.backward()
    assert entropy.isfinite()
    assert x.grad.isfinite().all()


def test_raising_the_entropy_spreads_directions():
    random = torch.Generator().manual_seed(0)
    x = (torch.ones(6, 3) + 0.05 * torch.randn(6, 3, generator=random)).requires_grad_()
    before = losses.neighbour_entropy(x).item()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-losses.neighbour_entropy(x)).backward()
        optimizer.step()
    assert losses.neighbour_entropy(x).item() > before + 2


def test_adc_losses_are_log_probabilities_among_twice_the_classes():
    real, fake, classes = doubles(5, 6), doubles(5, 6), torch.tensor([0, 2, 1, 1, 0])
    total, drawn = 0.0, 0.0
    for r, f, k in zip(real.tolist(), fake.tolist(), classes.tolist(), strict=True):
        log_real = r[k] - math.log(sum(map(math.exp, r)))
        log_fake = f[3 + k] - math.log(sum(map(math.exp, f)))
        as_real = f[k] - math.log(sum(map(math.exp, f)))
        total -= log_real + log_fake
        drawn -= as_real - log_fake
    assert losses.adc_discriminator(real, fake, classes).item() == pytest.approx(total / 5)
    assert losses.adc_generator(fake, classes).item() == pytest.approx(drawn / 5)
    torch.autograd.gradcheck(lambda x: losses.adc_generator(x, classes), fake)


def test_the_divergence_is_that_of_torch_distributions():
    mean, log_variance = doubles(3, 5), doubles(3, 5)
    normal = torch.distributions.Normal
    own = normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(own, normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.gaussian_kl(mean, log_variance), expected)


# What D is to tell.


def draws_of(**changes):
    given = {
        "brightness_B": -0.5, "saturation_B": 2.0, "contrast_B": 1.0, "shift_B2": (0.999, 0.0),
        "cutout_B2": (0.5, 0.999),
    }  # fmt: skip
    rows = {name: torch.tensor([value]) for name, value in {**given, **changes}.items()}
    return Draws(is_on_B=torch.tensor([True]), **rows)


def test_an_augmentation_is_told_by_numbers_from_0_to_1_in_the_order_of_the_policy():
    levels = [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16)]
    augment = Augment(AugmentConfig(diffaugment=("cutout", "color", "translation")))
    cutout, color, translation = augment.parameters(levels, draws_of())
    assert color.tolist() == [[0.0, 1.0, 0.5]]
    assert translation.tolist() == [[1.0, 0.0]]
    assert cutout.tolist() == [[0.5, 1.0]]


def test_what_moves_a_picture_alike_is_told_alike():
    augment = Augment(AugmentConfig(diffaugment=("translation",)))
    levels = [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 8, 8)]
    told = {}
    for uniform in torch.linspace(0, 0.99, 23).tolist():
        draws = draws_of(shift_B2=(uniform, 0.5))
        moved = augment.apply(levels, draws, 0)[0].numpy().tobytes()
        (parameters,) = augment.parameters(levels, draws)
        told.setdefault(moved, set()).add(parameters[0, 0].item())
    assert sorted(value for values in told.values() for value in values) == [0.0, 0.5, 1.0]
    assert len(told) == 3


# Conditioning augmentation.


def test_without_noise_a_caption_is_its_mean_and_what_networks_see_has_unit_mean_square():
    torch.manual_seed(0)
    network = Generator(TEXT.generator)
    torch.nn.init.normal_(network.text.augmentation.to_log_variance.weight)
    text = network.read(CaptionFeatures(WordEncoder(), CPU)(["one thing", "another"]))
    torch.testing.assert_close(scattered(text, torch.zeros(2, 16)).global_BT, text.global_BT)
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 16, generator=random)
    drawn = scattered(text, noise)
    expected = text.mean_BT + (0.5 * text.log_variance_BT).exp() * noise
    expected = expected / expected.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(drawn.global_BT, expected, rtol=1e-4, atol=1e-4)
    assert drawn.local_BLT is text.local_BLT


def test_an_upsampler_draws_from_the_distribution_of_its_caption():
    text = {**BASE.generator.text.model_dump(), "conditioning_augmentation": True}
    config = TrainUpsamplerConfig.model_validate(
        {
            "upsampler": {**UPSAMPLER.model_dump(), "text": text},
            "discriminator": {**BASE.discriminator.model_dump(), "channels": (8, 8, 8)}
            | {"blocks": (1, 0, 0), "attention": (0, 0, 0)},
            "loss": {**BASE.loss.model_dump(), "level_weights": (0.6, 0.4)},
            "options": {"conditioning_kl": 1.0}, "lpips": 0, "batch_size": 4,
        }
    )  # fmt: skip
    made = players(config)
    torch.nn.init.normal_(made.generator.levels[-1].to_rgb.bank)  # else the input comes back
    given = drawn_inputs(config, made)
    fakes = step.synthesize(made.generator, given)
    still = given._replace(chance=Chance(condition_BT=torch.zeros_like(given.chance.condition_BT)))
    assert not torch.equal(fakes[0], step.synthesize(made.generator, still)[0])
    plain = made.generator(*given.given, given.z_BZ, given.text)
    torch.testing.assert_close(step.synthesize(made.generator, still)[0], plain[0])
    assert g_loss(made, config, given, fakes).metrics["g/conditioning_kl"] > 0


# Trainings.


def test_what_is_off_draws_nothing_and_learns_nothing():
    random = torch.Generator().manual_seed(3)
    before = random.get_state()
    assert Chance.draw(BASE, random) == Chance()
    assert torch.equal(random.get_state(), before)
    for config, on in ((BASE, TEXT), (PROJECTED, HEADS)):
        off, made = players(config), players(on)
        assert off.discriminator.options is None
        theirs = made.discriminator.state_dict()
        for name, value in off.discriminator.state_dict().items():  # drawn before the heads
            if name in theirs and config is not BASE:
                assert torch.equal(value, theirs[name]), name
        assert {name for name in theirs if name not in off.discriminator.state_dict()} == {
            "options.augmentation.weight", "options.augmentation.bias",
        }  # fmt: skip
    assert players(BASE).generator.text.augmentation is None


def test_one_option_changes_neither_what_others_draw_nor_their_losses():
    mixing = with_options(BASE, {"adaptive_mix": 1.0}, augment={})
    a, b = players(BASE), players(mixing)
    first, second = drawn_inputs(BASE, a), drawn_inputs(mixing, b)
    assert torch.equal(first.z_BZ, second.z_BZ)
    fakes = step.synthesize(a.generator, first)
    plain, mixed = d_loss(a, BASE, first, fakes), d_loss(b, mixing, second, fakes)
    for name, value in plain.metrics.items():
        assert torch.equal(value, mixed.metrics[name]), name
    extra = mixed.metrics["d/adaptive_mix"]
    torch.testing.assert_close(mixed.loss, plain.loss + extra)


@EVERY
def test_every_term_is_in_the_log_and_gives_gradients_to_its_network_alone(config, tmp_path):
    made = players(config)
    given = drawn_inputs(config, made)
    fakes = step.synthesize(made.generator, given)
    loss, metrics = d_loss(made, config, given, fakes)
    loss.backward()
    assert {"d/adaptive_mix", "d/augself"} <= metrics.keys()
    assert all(p.grad is None for p in made.generator.parameters())
    assert all(p.grad is not None for p in made.discriminator.options.parameters())
    made.discriminator.requires_grad_(False)
    heads = {p: p.grad.clone() for p in made.discriminator.parameters() if p.grad is not None}
    loss, metrics = g_loss(made, config, given, fakes)
    loss.backward()
    assert {"g/augself", "g/entropy"} <= metrics.keys()
    assert all(torch.equal(p.grad, before) for p, before in heads.items())
    own = {"class": {"g/classifier"}, "text": {"g/conditioning_kl"}}
    kind = "class" if config is BY_CLASS else "text" if config is TEXT else ""
    assert own.get(kind, set()) <= metrics.keys()


@pytest.mark.parametrize("name", ["augself", "classifier"])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name):
    options = {name: 1.0} | ({"augself_generator": 0.5} if name == "augself" else {})
    config = with_options(conditioned(CLASSES), options, batch_size=8)
    made = players(config)
    given = drawn_inputs(config, made)
    augmented = torch.arange(8) % 3 > 0  # parts with as many differ in which
    given = given._replace(draws=tuple(d._replace(is_on_B=augmented) for d in given.draws))

    def terms(part):
        fakes = step.synthesize(made.generator, part)
        d = d_loss(made, config, part, fakes).metrics[f"d/{name}"]
        return torch.stack([d, g_loss(made, config, part, fakes).metrics[f"g/{name}"]])

    parts = torch.stack([terms(part) for part in inputs.split(given, 2)])
    torch.testing.assert_close(parts.mean(0), terms(given), rtol=1e-4, atol=1e-5)


def test_a_step_in_which_no_picture_is_augmented_has_no_augmentation_to_tell():
    made = players(TEXT)
    given = drawn_inputs(TEXT, made)._replace(draws=(None, None, None))
    fakes = step.synthesize(made.generator, given)
    assert d_loss(made, TEXT, given, fakes).metrics["d/augself"] == 0
    assert g_loss(made, TEXT, given, fakes).metrics["g/augself"] == 0


@EVERY
def test_an_interrupted_run_with_options_ends_bit_for_bit_like_an_uninterrupted_one(
    config, tmp_path
):
    whole = train(config, tmp_path / "whole")
    train(config.model_copy(update={"total_images": 16}), tmp_path / "parts")
    again = train(config, tmp_path / "parts")
    assert isinstance(whole.discriminator.options, OptionHeads)
    for a, b in ((whole.generator, again.generator), (whole.discriminator, again.discriminator)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("kind", [BASE, PROJECTED], ids=["multi-scale", "heads"])
@pytest.mark.parametrize(
    ("term", "direction"),
    [("d/adaptive_mix", -1), ("d/augself", -1), ("g/augself", -1), ("g/entropy", 1)],
)
def test_a_network_that_learns_a_term_moves_it_the_way_it_is_weighted(kind, term, direction):
    side, name = term.split("/")
    name = "augself_generator" if term == "g/augself" else name
    moves(with_options(kind, {name: 30.0} | ({"augself": 1.0} if "aug" in name else {})), term,
          side, direction)  # fmt: skip


@pytest.mark.parametrize("term", ["d/classifier", "g/classifier"])
def test_a_network_that_learns_to_classify_lowers_its_loss(term):
    moves(with_options(conditioned(CLASSES), {"classifier": 30.0}), term, term[0], -1)


def test_a_caption_s_distribution_moves_towards_the_prior():
    moves(with_options(BASE, {"conditioning_kl": 30.0}), "g/conditioning_kl", "g", -1)


def moves(config, term, side, direction):
    """On one batch, with the other network as it is at the start."""
    made = players(config)
    given = drawn_inputs(config, made)
    learns = {"d": made.discriminator, "g": made.generator}[side]
    optimizer = torch.optim.Adam(learns.parameters(), lr=2e-3)
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        fakes = step.synthesize(made.generator, given)
        loss, metrics = {"d": d_loss, "g": g_loss}[side](made, config, given, fakes)
        loss.backward()
        optimizer.step()
        found.append(metrics[term].item())
    assert direction * (found[-1] - found[0]) > 0.02 * abs(found[0])


# Refusals.


@pytest.mark.parametrize(
    ("config", "options", "changes", "message"),
    [
        (BASE, {"augself": 1}, {"augment": {}}, "options.augself = 1.0.*augment.diffaugment"),
        (BASE, {"augself_generator": 1}, {}, "options.augself_generator = 1.0.*options.augself"),
        (BASE, {"classifier": 1}, {}, "options.classifier = 1.0.*no classes"),
        (BASE, {"conditioning_kl": 1}, {"generator": BASE.generator.model_dump()},
         "options.conditioning_kl = 1.0.*set text.conditioning_augmentation"),
        (TEXT, {"conditioning_kl": 0}, {}, "options.conditioning_kl = 0.*set that to 1"),
        (BASE, {"entropy": -1}, {}, "options.entropy"),
        (BASE, {"entropie": 1}, {}, "options.entropie"),
        (conditioned(NONE), {"entropy": 1},
         {"discriminator": {"kind": "projected", "text": None},
          "optimizer": {"r1_weight": 0}}, "projected heads without text or classes"),
    ],
)  # fmt: skip
def test_options_with_nothing_to_work_on_are_refused(config, options, changes, message):
    with pytest.raises(ValueError, match=message):
        with_options(config, options, **changes)


@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_conditioning_augmentation_is_refused_where_captions_are_read_as_they_are(network):
    tree = PROJECTED.model_dump()
    tree[network]["text"]["conditioning_augmentation"] = True
    with pytest.raises(ValueError, match=r"conditioning_augmentation is true.*set it to false"):
        TrainBaseConfig.model_validate(tree)


def test_no_option_is_on_by_default():
    assert not any(OptionsConfig().model_dump().values())
    assert not OptionsConfig().reads_features
