import random
from collections import Counter

import pytest
import torch

from gigagan.models.encoders import TextEncoder, TextFeatures
from gigagan.training.captions import CaptionFeatures, RecentCaptions, derange, mismatch


def drawn_batch(rng, size):
    """Captions of which some are likely to be equal, an order, and a number in [0, 1)."""
    kinds = rng.randint(1, size)
    captions = [f"caption {rng.randrange(kinds)}" for _ in range(size)]
    return captions, rng.sample(range(size), size), rng.random()


@pytest.mark.parametrize("size", range(2, 18))
def test_a_derangement_gives_nobody_its_own_caption_or_an_equal_one(size):
    rng = random.Random(size)
    for _ in range(200):
        captions, order, uniform = drawn_batch(rng, size)
        partners = derange(captions, order, uniform)
        given = [p for p in partners if p is not None]
        assert all(captions[p] != captions[i] for i, p in enumerate(partners) if p is not None)
        assert len(set(given)) == len(given), "nobody's caption is given twice"
        # Only what the largest group has above half of the batch goes without.
        largest = max(Counter(captions).values())
        assert partners.count(None) == max(2 * largest - size, 0)
        if 2 * largest <= size:
            assert sorted(given) == list(range(size)), "a permutation of the batch"


def test_where_one_caption_fills_most_of_a_batch_only_its_samples_go_without():
    captions = ["same"] * 5 + ["other", "third"]
    partners = derange(captions, range(7), 0.3)
    assert [captions[i] for i, p in enumerate(partners) if p is None] == ["same"] * 3
    assert None not in partners[5:]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999])
def test_equal_captions_leave_nobody_a_partner(uniform):
    assert derange(["same"] * 5, range(5), uniform) == [None] * 5


def all_partners(captions, draws):
    rng, size = random.Random(0), len(captions)
    found = [Counter() for _ in captions]
    for _ in range(draws):
        for i, p in enumerate(derange(captions, rng.sample(range(size), size), rng.random())):
            found[i][p] += 1
    return found


def test_every_other_caption_is_given_equally_often():
    draws = 6_000
    for own, partners in enumerate(all_partners(list("abcdefg"), draws)):
        assert partners.keys() == set(range(7)) - {own}
        # Six standard deviations of a count with p = 1/6.
        deviation = (draws * 1 / 6 * 5 / 6) ** 0.5
        assert all(abs(n - draws / 6) < 6 * deviation for n in partners.values())


def test_every_unequal_caption_is_given_beside_equal_ones():
    captions = list("aabbcde")
    for own, partners in enumerate(all_partners(captions, 2_000)):
        assert partners.keys() == {i for i, c in enumerate(captions) if c != captions[own]}


def test_the_largest_uniform_number_stays_within_the_batch():
    captions = list("abcd")
    partners = derange(captions, range(4), 1 - 2**-24)  # the largest float32 below 1
    assert partners == [3, 0, 1, 2]


def wrong_captions(captions, recent, *, hard=False, seed=0):
    rng = random.Random(seed)
    size = len(captions)
    return mismatch(
        captions,
        recent,
        rows=range(size),
        is_hard_B=[hard] * size,
        uniform_B=[rng.random() for _ in captions],
        order_B=rng.sample(range(size), size),
        rotation=rng.random(),
    )


def remembering(*captions, size=64):
    recent = RecentCaptions(size)
    recent.add(captions)
    return recent


def test_mismatched_captions_are_those_of_the_batch_unless_they_are_hard():
    recent = remembering("seen before")
    captions = ["one", "two", "three", "four"]
    for seed in range(20):
        wrong = wrong_captions(captions, recent, seed=seed)
        assert sorted(wrong) == sorted(captions)
        assert all(w != c for w, c in zip(wrong, captions, strict=True))


@pytest.mark.parametrize("hard", [False, True])
def test_no_mismatched_caption_is_ever_its_own(hard):
    rng = random.Random(1)
    for seed in range(300):
        captions, _, _ = drawn_batch(rng, rng.randint(2, 9))
        wrong = wrong_captions(captions, remembering(*captions), hard=hard, seed=seed)
        for own, other in zip(captions, wrong, strict=True):
            assert other != own
            assert (other is None) == (set(captions) == {own})


def test_hard_captions_share_as_many_of_their_words_as_any():
    words = ["red", "blue", "pale", "cat", "dog", "sun", "on", "in", "white", "teal"]
    rng = random.Random(2)
    captions = [" ".join(rng.sample(words, rng.randint(1, 5))) for _ in range(30)]
    recent = remembering(*captions)

    def shared(a, b):
        a, b = set(a.split()), set(b.split())
        return len(a & b) / len(a | b)

    for own, other in zip(captions, wrong_captions(captions, recent, hard=True), strict=True):
        assert other in captions
        assert shared(own, other) == max(shared(own, c) for c in captions if c != own)


def test_of_equally_near_captions_the_uniform_number_chooses():
    recent = remembering("red cat", "red dog", "red sun", "teal moon")
    found = recent.nearest(["red cat"] * 4, [0.0, 0.49, 0.5, 0.999])
    assert found == ["red dog", "red dog", "red sun", "red sun"]


def test_many_are_found_as_one_at_a_time_by_counting_words():
    words = ["red", "Blue", "pale", "cat,", "dog", "sun", "on", "in"]
    rng = random.Random(5)
    seen = [" ".join(rng.sample(words, rng.randint(1, 6))) for _ in range(90)] + ["", ","]
    recent = remembering(*seen, size=64)
    asked = [*rng.sample(seen, 40), "a word that nobody else has", ""]
    uniform = [rng.random() for _ in asked]

    def of(text):
        return set(text.lower().replace(",", " ").split())

    for caption, u, found in zip(asked, uniform, recent.nearest(asked, uniform), strict=True):
        others = [c for c in seen[-64:] if c != caption]
        share = [len(of(caption) & of(c)) / max(len(of(caption) | of(c)), 1) for c in others]
        best = [c for c, part in zip(others, share, strict=True) if part == max(share)]
        assert found == best[int(u * len(best))]


class LetterEncoder(TextEncoder):
    """A token per letter, made of its number and place."""

    name, width, pooled_width, max_tokens = "letters", 3, 2, 99

    def __init__(self):
        self.asked = []

    def count_tokens(self, caption):
        return len(caption)

    def encode(self, captions):
        self.asked += captions
        longest = max(map(len, captions))
        tokens, mask = torch.zeros(len(captions), longest, 3), torch.zeros(len(captions), longest)
        for row, caption in enumerate(captions):
            for place, letter in enumerate(caption):
                tokens[row, place] = torch.tensor([ord(letter) / 128, place / 8, 0.5])
                mask[row, place] = 1
        pooled = torch.tensor([[len(c) / 16, ord(c[0]) / 128] for c in captions])
        return TextFeatures(tokens, mask.bool(), pooled)


def assert_features(found, captions):
    expected = LetterEncoder().encode(captions)
    length = expected.tokens_BLD.shape[1]
    assert found.tokens_BLD.shape[1] >= length
    assert found.tokens_BLD.shape[1] % 8 == 0
    assert torch.equal(found.mask_BL[:, :length], expected.mask_BL)
    assert not found.mask_BL[:, length:].any()
    assert torch.equal(found.tokens_BLD[:, :length], expected.tokens_BLD.half().float())
    assert torch.equal(found.pooled_BD, expected.pooled_BD.half().float())


CAPTIONS = ["a", "bb", "cat", "a longer caption than others", "dog", "e", "ff"]


@pytest.mark.parametrize("settings", [{}, {"max_captions": 2}, {"max_mb": 3 * 2 * 8 * 4 / 2**20}])
def test_features_are_the_encoders_whether_or_not_there_is_room_for_them(settings):
    captions = CaptionFeatures(LetterEncoder(), torch.device("cpu"), **settings)
    rng = random.Random(0)
    for _ in range(30):
        batch = [rng.choice(CAPTIONS) for _ in range(5)]
        assert_features(captions(batch), batch)


def test_what_is_known_is_not_encoded_again_and_survives_a_file(tmp_path):
    first = CaptionFeatures(LetterEncoder(), torch.device("cpu"))
    assert first.warm(CAPTIONS[:4]) == 4
    first(CAPTIONS)
    assert sorted(first.encoder.asked) == sorted(CAPTIONS)
    first.save(tmp_path / "features.pt")
    second = CaptionFeatures(LetterEncoder(), torch.device("cpu"))
    second.load(tmp_path / "features.pt")
    assert_features(second(CAPTIONS), CAPTIONS)
    assert second.encoder.asked == []


def test_a_small_table_stays_within_its_memory():
    captions = CaptionFeatures(LetterEncoder(), torch.device("cpu"), max_mb=3 * 2 * 8 * 4 / 2**20)
    assert captions.warm(["a", "b", "c"]) == 3
    captions(["d", "e"])
    captions(["a long one, for which every row would have to grow"])
    assert captions._tokens_NLD.nbytes <= captions.max_bytes


def test_case_and_commas_do_not_make_another_word():
    recent = remembering("a cat on WHITE, please", "a dog")
    assert recent.nearest(["A cat, on white"], [0.0]) == ["a cat on WHITE, please"]


def test_a_batch_of_one_caption_is_given_earlier_ones_or_none():
    assert wrong_captions(["same"] * 3, remembering("same", "earlier")) == ["earlier"] * 3
    assert wrong_captions(["same"] * 3, remembering("same", "same")) == [None] * 3
    assert wrong_captions(["same"] * 3, RecentCaptions(4)) == [None] * 3


def test_the_oldest_captions_are_forgotten_first():
    recent = remembering("red cat old", size=2)
    recent.add(["teal moon"])
    assert recent.nearest(["red cat"], [0.0]) == ["red cat old"]
    recent.add(["white sun"])
    assert recent.nearest(["red cat"], [0.0])[0] in {"teal moon", "white sun"}


def test_mismatched_captions_are_a_function_of_the_arguments_alone():
    captions = [f"a shade of {v}" for v in (1, 2, 2, 3, 5, 7)]
    found = []
    for seed in (0, 1):
        random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), torch.get_rng_state()
        found.append(wrong_captions(captions, remembering("a shade of 9"), seed=3))
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    assert found[0] == found[1]
    assert found[0] != wrong_captions(captions, remembering("a shade of 9"), seed=4)
