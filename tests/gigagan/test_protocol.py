from typing import get_args

import pytest

from gigagan.config import EvaluateConfig
from gigagan.evaluation.protocol import (
    DECISIVE,
    PROTOCOLS,
    ProtocolError,
    check_counts,
    check_settings,
    differing,
    named,
)

FIXED = [rules for rules in PROTOCOLS.values() if rules.num_generated is not None]


def test_the_settings_offer_exactly_the_protocols_that_there_are():
    offered = get_args(EvaluateConfig.model_fields["protocol"].annotation)
    assert set(offered) == set(PROTOCOLS)


@pytest.mark.parametrize("rules", FIXED, ids=lambda rules: rules.name)
def test_a_protocol_of_a_paper_leaves_nothing_that_decides_open(rules):
    assert rules.num_generated
    assert rules.num_real
    assert rules.resolution
    assert rules.published
    assert (rules.input_resolution is not None) == (rules.task == "upsample")


def test_the_papers_numbers_stand_beside_the_right_rules():
    ours = PROTOCOLS["gigagan-coco2014-256"]
    theirs = PROTOCOLS["stylegan-t-coco-256"]
    assert dict(ours.published)["GigaGAN (paper)"]["fid"] == 9.09
    assert (ours.resize, theirs.resize) == ("clean", "legacy")
    assert ours.clip_prefix == "A photo depicts "


def test_an_unknown_protocol_names_those_that_there_are():
    with pytest.raises(ProtocolError, match="coco2017-512"):
        named("coco2017")


def test_one_picture_too_few_is_refused_and_the_exact_count_is_not():
    rules = PROTOCOLS["coco2017-512"]
    check_counts(rules, num_generated=5_000, num_real=5_000)
    check_counts(PROTOCOLS["coco-captions"], num_generated=3, num_real=2)
    with pytest.raises(ProtocolError, match="5,000 reference pictures, there are 4,999"):
        check_counts(rules, num_generated=5_000, num_real=4_999)


def test_settings_that_repeat_the_protocol_are_fine():
    check_settings(PROTOCOLS["coco2017-512"], resolution=512, num_images=5_000)


@pytest.mark.parametrize("field", DECISIVE)
def test_every_decisive_field_keeps_two_results_apart(field):
    a = dict.fromkeys(DECISIVE, 1)
    assert differing(a, dict(a)) is None
    assert differing(a, a | {field: 2}) == (field, 1, 2)


def test_seed_and_truncation_are_the_models_owners():
    assert differing({"seed": 1, "truncation": 0.5}, {"seed": 2, "truncation": 1.0}) is None
