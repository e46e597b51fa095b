import numpy as np
import pytest
import torch
from PIL import Image

from gigagan.inference import walk
from gigagan.inference.editing import Edit, interpolate, slerp
from gigagan.inference.prompts import PromptError
from gigagan.inference.sampler import Sampler
from gigagan.models.generator import Generator, Late
from gigagan.models.text import Text
from gigagan.models.upsampler import Upsampler

from . import small

ONE, TWO = "a red cat", "a blue house on a hill"


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    return Sampler(Generator(small.GENERATOR).eval(), Upsampler(small.UPSAMPLER).eval())


@pytest.fixture(scope="module")
def attentive():
    """Networks whose attention and text decide what one sees."""
    torch.manual_seed(0)
    config = small.UPSAMPLER.model_copy(
        update={"input_resolution": 16, "attention": (0, 1), "head_width": 8}
    )
    networks = Generator(small.GENERATOR).eval(), Upsampler(config).eval()
    for network in networks:
        for name, value in network.named_parameters():
            if any(part in name for part in ("attention.to_v", "attention.to_out.w", "rgb.bank")):
                torch.nn.init.normal_(value, std=2)
    return Sampler(*networks)


def drawn(sampler, prompt=ONE, **settings):
    (picture,) = sampler.sample([prompt], **{"seed": 3, "upscale": False} | settings)
    return np.asarray(picture).astype(int)


def same(a, b):
    return np.abs(a - b).max() <= 1


def test_the_ends_of_an_interpolation_are_the_two_prompts(sampler):
    ends = [drawn(sampler, edit=Edit(TWO, "interpolate", amount=a)) for a in (0, 1)]
    assert same(ends[0], drawn(sampler))
    assert same(ends[1], drawn(sampler, TWO))
    middle = drawn(sampler, edit=Edit(TWO, "interpolate", amount=0.5))
    assert not same(middle, ends[0])
    assert not same(middle, ends[1])


def test_mixing_from_the_first_level_is_the_second_prompt_and_beyond_the_last_the_first(sampler):
    assert same(drawn(sampler, edit=Edit(TWO, crossover=0)), drawn(sampler, TWO))
    assert same(drawn(sampler, edit=Edit(TWO, crossover=3)), drawn(sampler))
    mixed = drawn(sampler, edit=Edit(TWO))
    assert not same(mixed, drawn(sampler))
    assert not same(mixed, drawn(sampler, TWO))


def test_a_style_of_another_seed_swaps_fine_levels_and_leaves_coarse_ones(sampler):
    assert same(drawn(sampler, edit=Edit(how="style", seed=8, crossover=0)), drawn(sampler, seed=8))
    assert same(drawn(sampler, edit=Edit(how="style", seed=8, crossover=3)), drawn(sampler))
    generator = sampler.base
    text = generator.read(sampler.encoder.encode([ONE]))
    styles = [generator.style(sampler.latents(1, seed), text) for seed in (3, 8)]
    plain = generator.synthesize(styles[0], text)
    swapped = generator.synthesize(styles[0], text, Late(styles[1], text, level=2))
    assert torch.equal(plain[1], swapped[1])  # 8 px, of levels 0 and 1
    assert not torch.equal(plain[0], swapped[0])


def test_interpolated_texts_hold_every_token_of_both_by_its_part():
    a = Text(torch.ones(1, 2, 3), torch.tensor([[True, False]]), torch.zeros(1, 3))
    b = Text(torch.full((1, 3, 3), 5.0), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3))
    mixed = interpolate(a, b, 0.25)
    assert mixed.local_BLT[0, :, 0].tolist() == [1, 1, 5, 5, 5]
    torch.testing.assert_close(mixed.mask_BL.exp(), torch.tensor([[0.75, 0, 0.25, 0.25, 0.25]]))
    assert mixed.global_BT.tolist() == [[0.25] * 3]
    assert interpolate(a, b, 0) is a


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_an_interpolation_does_not_jump_at_its_ends(attentive, end):
    amounts = [end, abs(end - 1e-4), 0.5]
    there, near, far = (
        drawn(attentive, edit=Edit(TWO, "interpolate", amount=a), upscale=True) for a in amounts
    )
    assert np.abs(far - there).max() > 20
    assert np.abs(near - there).max() <= 1


def test_an_interpolation_does_not_jump_in_its_middle(attentive):
    before, after = (
        drawn(attentive, edit=Edit(TWO, "interpolate", amount=a), upscale=True)
        for a in (0.4999, 0.5001)
    )
    assert same(before, after)


def test_slerp_keeps_the_norm_and_meets_its_ends():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, 0.5).norm(), torch.tensor(3.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "mix"}, "second prompt"),
        ({"how": "style"}, "another seed"),
        ({"prompt": TWO, "how": "interpolate", "amount": 2}, "amount=2"),
    ],
)
def test_an_edit_that_lacks_something_says_so(settings, message):
    with pytest.raises(ValueError, match=message):
        Edit(**settings)


def test_a_level_that_the_network_lacks_is_refused(sampler):
    with pytest.raises(ValueError, match="levels 0 to 2"):
        drawn(sampler, edit=Edit(TWO, crossover=4))


def test_pixels_that_are_no_numbers_are_no_picture(sampler):
    with pytest.raises(ValueError, match="NaN instead of a picture"):
        drawn(sampler, latents_BZ=torch.full((1, sampler.base.config.latent_dim), torch.nan))


def test_truncation_to_nothing_leaves_the_global_mean_whatever_the_prompt(sampler):
    texts = [sampler.base.read(sampler.encoder.encode([p])) for p in (ONE, TWO)]
    found = [sampler._style(text, sampler.latents(1, 1), 0.0) for text in texts]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], sampler.base.style_mean)


# ---- walks


def test_a_walk_that_loops_has_small_steps_and_comes_back(sampler):
    frames = walk.walk(sampler, [ONE, TWO], seed=1, frames=24)
    arrays = [np.asarray(f).astype(float) for f in frames]
    steps = [np.abs(a - b).mean() for a, b in zip(arrays, arrays[1:] + arrays[:1], strict=True)]
    assert max(steps) < 0.5 * max(np.abs(a - arrays[0]).mean() for a in arrays)


def test_walks_are_written_as_gif_and_mp4(sampler, tmp_path):
    frames = walk.walk(sampler, [ONE], seed=1, frames=3)
    about = {"prompts": [ONE, "小提琴"], "seed": 1}
    walk.save(tmp_path / "w.gif", frames, about=about)
    assert walk.read_about(tmp_path / "w.gif") == about
    with Image.open(tmp_path / "w.gif") as gif:
        assert gif.n_frames == 3
    av = pytest.importorskip("av")
    walk.save(tmp_path / "w.mp4", frames, about=about)
    assert walk.read_about(tmp_path / "w.mp4") == about
    with av.open(str(tmp_path / "w.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 3
    with pytest.raises(ValueError, match=r"\.gif or \.mp4"):
        walk.save(tmp_path / "w.avi", frames, about=about)
    assert {p.name for p in tmp_path.iterdir()} == {"w.gif", "w.mp4"}


# ---- prompts


def test_emoji_and_right_to_left_text_are_prompts(sampler):
    for prompt in ("🎻 on teal", "كمان على خلفية زرقاء", "כינור", "小提琴"):
        assert drawn(sampler, prompt).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ("a\x07b", "control character"),
        ("word " * 400, r"402 tokens, embedded:minilm-l6 reads 256"),
        ("x" * 5000, "5,000 characters"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_says_why(sampler, prompt, message):
    with pytest.raises(PromptError, match=message):
        drawn(sampler, prompt)


def test_a_long_prompt_is_drawn_when_cutting_is_asked_for(sampler):
    assert same(drawn(sampler, "word " * 400, cut=True), drawn(sampler, "word " * 500, cut=True))
