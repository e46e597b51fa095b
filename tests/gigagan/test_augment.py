import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter
from torch.autograd import gradcheck, gradgradcheck

from gigagan.config import AugmentConfig
from gigagan.models.layers import pyramid
from gigagan.training import augment
from gigagan.training.augment import Ada, Augment

ALL = ("color", "translation", "cutout")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(ALL, n)]
B = 7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def levels_of(*sides, batch=B, dtype=torch.double):
    """Unrelated images, as a generator could make them."""
    made = [torch.rand(batch, 3, h, w, generator=seeded(h), dtype=dtype) for h, w in sides]
    return [2 * x - 1 for x in made]


def drawn(policy, *, probability=1.0, batch=B, seed=0):
    made = Augment(AugmentConfig(diffaugment=policy)).draw(batch, seeded(seed), probability)
    assert made is not None
    return made


def apply(policy, levels, draws):
    return Augment(AugmentConfig(diffaugment=policy)).apply(levels, draws, 0)


def naive(policy, image_CHW, draws, b, steps):
    """One image of one level, a pixel at a time, for sides that are multiples of `steps`."""
    x = image_CHW.numpy().astype(np.float64)
    _, H, W = x.shape
    if "color" in policy:
        x = x + float(draws.brightness_B[b])
        grey = x.mean(0, keepdims=True)
        x = grey + (x - grey) * float(draws.saturation_B[b])
        x = x.mean() + (x - x.mean()) * float(draws.contrast_B[b])
    sizes = list(zip((H, W), steps, strict=True))
    if "translation" in policy:
        down, right = (
            (math.floor(float(u) * (2 * (n // 8) + 1)) - n // 8) * side // n
            for u, (side, n) in zip(draws.shift_B2[b], sizes, strict=True)
        )
        wide = np.pad(x, ((0, 0), (H, H), (W, W)), mode="symmetric")
        x = wide[:, H - down : 2 * H - down, W - right : 2 * W - right]
    if "cutout" in policy:
        middle = [
            math.floor(float(u) * (n + 1)) * side // n
            for u, (side, n) in zip(draws.cutout_B2[b], sizes, strict=True)
        ]
        x = x.copy()
        for i, j in itertools.product(range(H), range(W)):
            inside = (
                middle[0] - H // 4 <= i < middle[0] + H // 4,
                middle[1] - W // 4 <= j < middle[1] + W // 4,
            )
            if all(inside):
                x[:, i, j] = 0
    return x


@pytest.mark.parametrize("policy", SUBSETS)
def test_every_level_is_what_one_image_at_a_time_would_be(policy):
    levels = levels_of((32, 48), (16, 24))
    draws = drawn(policy)
    augmented = apply(policy, levels, draws)
    for before, after in zip(levels, augmented, strict=True):
        expected = np.stack([naive(policy, before[b], draws, b, (16, 24)) for b in range(B)])
        np.testing.assert_allclose(after.numpy(), expected, atol=1e-12)


def test_whole_pixels_are_moved_without_any_rounding():
    levels = levels_of((48, 112), (24, 56), batch=40, dtype=torch.float32)
    draws = drawn(("translation",), batch=40)
    for before, after in zip(levels, apply(("translation",), levels, draws), strict=True):
        expected = [naive(("translation",), before[b], draws, b, (24, 56)) for b in range(40)]
        assert torch.equal(after, torch.tensor(np.stack(expected), dtype=torch.float32))
        assert not torch.equal(after, before)


@pytest.mark.parametrize("smallest", [8, 16, 24])
def test_translation_commutes_with_halving_away_from_the_edges(smallest):
    # A multiple of the coarsest pixel for every level; reflection differs at the edges alone.
    largest = levels_of((4 * smallest, 4 * smallest))[0]
    draws = drawn(("translation",))
    first = apply(("translation",), pyramid(largest, 3), draws)
    second = pyramid(first[0], 3)
    for level, (one, other) in enumerate(zip(first, second, strict=True)):
        edge = smallest * 2 ** (2 - level) // 8 + 1
        inner = (..., slice(edge, -edge), slice(edge, -edge))
        torch.testing.assert_close(one[inner], other[inner], rtol=0, atol=1e-12)


@pytest.mark.parametrize("smallest", [2, 4, 6])
def test_levels_below_8_px_move_by_the_same_share_of_their_side(smallest):
    """A ramp moves by slope times shift, whole pixels or not."""
    draws = drawn(("translation",), batch=64)
    sides = [smallest * 2**k for k in (3, 2, 1, 0)]
    ramps = [(torch.arange(s, dtype=torch.double) + 0.5).div(s).expand(64, 3, s, s) for s in sides]
    moves = [
        (ramp - moved)[:, 0, 0, ramp.shape[-1] // 2]
        for ramp, moved in zip(ramps, apply(("translation",), ramps, draws), strict=True)
    ]
    for move in moves[:-1]:  # at 2 px every pixel is at an edge
        torch.testing.assert_close(move, moves[0])
    assert 0 < moves[0].abs().max() <= 1 / 8


def test_shifts_reach_an_eighth_either_way_and_centres_the_whole_side():
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])[:, None].expand(3, 2)
    assert augment.shifts(uniform, (16, 40)).tolist() == [[-2, -5], [0, 0], [2, 5]]
    assert augment.centres(uniform, (16, 40)).tolist() == [[0, 0], [8, 20], [16, 40]]


@pytest.mark.parametrize("smallest", [2, 4, 8])
def test_a_cut_out_square_covers_the_same_share_of_every_level(smallest):
    draws = drawn(("cutout",), batch=20)
    ones = [torch.ones(20, 3, s, s, dtype=torch.double) for s in (4 * smallest, 2 * smallest)]
    ones.append(torch.ones(20, 3, smallest, smallest, dtype=torch.double))
    kept = [x.mean((1, 2, 3)) for x in apply(("cutout",), ones, draws)]
    for share in kept[1:]:
        torch.testing.assert_close(share, kept[0])
    assert float(kept[0].min()) == pytest.approx(0.75)
    assert kept[0].max() > 0.8


def test_augmentation_can_be_differentiated_twice():
    draws = drawn(ALL, batch=2)
    levels = [x.requires_grad_() for x in levels_of((6, 4), (3, 2), batch=2)]

    def f(*levels):
        config = AugmentConfig(diffaugment=ALL, blur_sigma=1)
        return tuple(Augment(config).apply(list(levels), draws, 0))

    assert gradcheck(f, levels)
    assert gradgradcheck(lambda *xs: [y**2 for y in f(*xs)], levels)


def test_gradients_reach_only_what_is_still_seen():
    draws = drawn(("cutout",))
    level = levels_of((16, 16))[0].requires_grad_()
    (cut,) = apply(("cutout",), [level], draws)
    cut.sum().backward()
    assert torch.equal(level.grad == 0, cut == 0)
    assert bool((cut == 0).any())


def test_probability_0_and_an_empty_policy_give_back_the_same_list():
    levels = levels_of((16, 16), (8, 8))
    for policy, probability in ((ALL, 0.0), ((), 1.0)):
        chosen = Augment(AugmentConfig(diffaugment=policy))
        draws = chosen.draw(B, seeded(), probability)
        assert draws is None
        assert chosen.apply(levels, draws, 0) is levels


def test_an_empty_policy_draws_nothing():
    random = seeded()
    before = random.get_state()
    Augment(AugmentConfig()).draw(B, random, 1.0)
    assert torch.equal(random.get_state(), before)


def test_half_of_the_images_change_fully_and_the_others_not_by_a_bit():
    batch = 400
    levels = levels_of((16, 16), (8, 8), batch=batch, dtype=torch.float32)
    draws = drawn(ALL, probability=0.5, batch=batch)
    augmented = apply(ALL, levels, draws)
    always = apply(ALL, levels, drawn(ALL, batch=batch))
    assert 0.42 < draws.is_on_B.float().mean() < 0.58
    for before, after, full in zip(levels, augmented, always, strict=True):
        is_changed = (before != after).flatten(1).any(1)
        assert torch.equal(is_changed, draws.is_on_B)
        assert torch.equal(after[is_changed], full[is_changed])


def test_draws_depend_on_the_seed_alone():
    first, again, other = drawn(ALL), drawn(ALL), drawn(ALL, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first[1:], other[1:], strict=True))
    rarer = drawn(ALL, probability=0.5)
    assert all(torch.equal(x, y) for x, y in zip(first[1:], rarer[1:], strict=True))


def test_ranks_together_augment_as_one_process_does():
    levels = levels_of((16, 16), (8, 8), batch=6)
    draws = drawn(ALL, batch=6)
    whole = apply(ALL, levels, draws)
    for rank in range(3):
        rows = slice(rank, None, 3)
        part = apply(ALL, [x[rows] for x in levels], draws.shared(lambda x, rows=rows: x[rows]))
        for one, other in zip(part, whole, strict=True):
            torch.testing.assert_close(one, other[rows], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_stay_and_autocast_does_not_round_translations(dtype):
    levels = levels_of((16, 16), (8, 8), dtype=dtype)
    draws = drawn(("translation",))
    plain = apply(("translation",), levels, draws)
    with torch.autocast("cpu", torch.bfloat16):
        cast = apply(("translation",), levels, draws)
        blurred = augment.blur(levels, 2.0)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))
    assert {x.dtype for x in plain + blurred} == {dtype}


@pytest.mark.parametrize("sigma", [0.4, 1.5, 9.0])
def test_blur_is_scipys_gaussian_at_every_level(sigma):
    levels = levels_of((20, 12), (10, 6), (5, 3))
    for before, after, s in zip(
        levels, augment.blur(levels, sigma), (sigma, sigma / 2, sigma / 4), strict=True
    ):
        radius = math.ceil(4 * s)
        expected = gaussian_filter(before.numpy(), s, mode="reflect", radius=radius, axes=(2, 3))
        assert after.shape == before.shape
        np.testing.assert_allclose(after.numpy(), expected if s >= 0.1 else before, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 30.0])
def test_blur_of_a_constant_is_the_constant(sigma):
    levels = [torch.full((2, 3, s, s), 0.7, dtype=torch.double) for s in (14, 7)]
    for before, after in zip(levels, augment.blur(levels, sigma), strict=True):
        torch.testing.assert_close(after, before)


def test_blur_fades_linearly_to_the_same_list():
    chosen = Augment(AugmentConfig(blur_sigma=2, blur_fade_images=1000))
    assert [chosen.blur_sigma(n) for n in (0, 250, 1000, 5000)] == [2, 1.5, 0, 0]
    levels = levels_of((16, 16), (8, 8), (4, 4))
    assert all(x is not y for x, y in zip(levels, chosen.apply(levels, None, 0), strict=True))
    late = chosen.apply(levels, None, 850)  # σ = 0.3, 0.15, 0.075
    assert [x is y for x, y in zip(levels, late, strict=True)] == [False, False, True]
    assert chosen.apply(levels, None, 960) is levels


def test_mean_sign_is_of_the_weighted_mean_logit_of_each_image():
    first = torch.tensor([3.0, -1.0, -1.0, 2.0, 0.5]).view(5, 1, 1).expand(5, 2, 3)
    second = torch.tensor([-2.0, -1.0, 2.0, 2.0, -0.25]).view(5, 1, 1)
    # Sums: 0.5, −1, 0.5, 2, 0.125.
    assert float(augment.mean_sign([first, second], [0.5, 0.5])) == pytest.approx(3 / 5)


def ada(**changes):
    config = AugmentConfig(diffaugment=("cutout",), ada=True, ada_every=3, ada_images=300)
    return Ada(config.model_copy(update=changes), 10, torch.device("cpu"))


def feed(adaptive, *signs):
    for sign in signs:
        adaptive.update(torch.tensor(sign), lambda x: x)
    return adaptive.probability


def test_ada_follows_the_mean_sign_up_and_down_every_few_steps():
    adaptive = ada()
    assert adaptive.probability == 0
    assert feed(adaptive, 0.9, 0.9) == 0
    assert feed(adaptive, 0.3) == pytest.approx(0.1)  # mean 0.7: 30 of 300 images
    assert feed(adaptive, 1.0, 0.9, 0.8) == pytest.approx(0.2)
    assert feed(adaptive, 0.9, 0.5, 0.3) == pytest.approx(0.1)  # mean 0.57


def test_ada_stays_between_0_and_1():
    adaptive = ada()
    assert feed(adaptive, *[0.0] * 6) == 0
    assert feed(adaptive, *[1.0] * 60) == 1
    assert feed(adaptive, *[-1.0] * 3) == pytest.approx(0.9)


def test_ada_moves_by_the_mean_over_ranks():
    signs = torch.tensor([1.0, -1.0])  # of two ranks; the target is 0.6
    adaptive = ada()
    for _ in range(30):
        adaptive.update(signs[0], lambda _: signs.mean())
    assert adaptive.probability == 0


def test_ada_goes_on_from_its_state_in_the_middle_of_an_interval():
    whole, stopped, resumed = ada(), ada(), ada()
    signs = [1.0, 0.9, 0.8, 1.0, -0.9, 0.2, 0.3]
    feed(whole, *signs)
    feed(stopped, *signs[:5])
    state = stopped.state_dict()
    feed(stopped, 0.0)
    resumed.load_state_dict(state)
    feed(resumed, *signs[5:])
    assert resumed.state_dict() == whole.state_dict()


def test_without_ada_the_share_is_the_configs_whatever_was_saved():
    fixed = ada(ada=False, probability=0.3)
    assert feed(fixed, *[1.0] * 9) == 0.3
    adaptive = ada()
    feed(adaptive, *[1.0] * 3)
    fixed.load_state_dict(adaptive.state_dict())
    assert fixed.probability == 0.3


@pytest.mark.parametrize(
    "wrong", [{"ada": True}, {"diffaugment": ("cutout", "cutout")}, {"diffaugment": ("flip",)}]
)
def test_configs_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        AugmentConfig(**wrong)
