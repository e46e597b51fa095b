from __future__ import annotations

import re

from data import concepts


def test_concepts_are_those_of_both_sets_without_skin_tones():
    names = [concept.cldr for concept in concepts.concepts()]
    assert len(names) == len(set(names)) > 1800
    assert "violin" in names
    assert "flag of France" in names
    assert not any("skin tone" in name for name in names)


def test_no_two_concepts_are_called_alike():
    everything = concepts.concepts()
    assert len({concept.name for concept in everything}) == len(everything)


def test_the_list_names_hundreds_of_things_that_both_sets_draw_each_once():
    listed = concepts.nameable()
    assert len({concept.cldr for concept in listed}) == len(listed) >= 640


def test_concepts_come_in_the_order_of_the_list_under_everyday_names():
    first = concepts.nameable()[0]
    assert (first.cldr, first.phrase, first.name) == ("locked", "a padlock", "padlock")


def test_a_name_without_article_stays_whole():
    [scissors] = [c for c in concepts.nameable() if c.cldr == "scissors"]
    assert (scissors.phrase, scissors.name) == ("scissors", "scissors")


def test_articles_fit_the_words_after_them():
    sounds_unlike_its_letter = ("unicorn", "euro note", "hourglass", "X-ray")
    for concept in concepts.nameable():
        article, _, name = concept.phrase.partition(" ")
        if article in ("a", "an"):
            vowel = bool(re.match("[aeiouAEIOU]", name)) != (name in sounds_unlike_its_letter)
            assert (article == "an") == vowel, concept.phrase


def test_the_list_leaves_out_what_a_picture_of_32_px_does_not_tell():
    unlike = re.compile("flag of|clock face|o’clock|thirty|button|keycap|family|waxing|waning")
    assert not [c.cldr for c in concepts.nameable() if unlike.search(c.cldr)]
