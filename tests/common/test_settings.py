from typing import Annotated, Literal

import pytest
from pydantic import Discriminator, Tag

from gigagan.common.settings import Frozen, SettingsError, dotted_keys, load, nearest, unknown


class Part(Frozen):
    seed: int = 1


class Section(Frozen):
    side: int = 7
    part: Part = Part()
    other: Part | None = None


def loaded(*assignments, file=None, **given):
    return load(Section, "score", file, list(assignments), **given)


def test_later_sources_go_before_earlier_ones(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("score: {side: 2, part: {seed: 3}}\nfilter: {side: 9}")
    assert loaded(file=file) == Section(side=2, part=Part(seed=3))
    assert loaded("part.seed=5", "score.side=11", file=file, usual={"side": 1}) == Section(
        side=11, part=Part(seed=5)
    )
    assert loaded("side=3", side=5) == Section(side=5)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sid=1", "unknown setting 'score.sid', did you mean 'score.side'?"),
        ("seed=1", "unknown setting 'score.seed', did you mean 'score.part.seed'?"),
        ("part.sede=1", "unknown setting 'score.part.sede', did you mean 'score.part.seed'?"),
        ("side=wide", "score.side = 'wide': Input should be a valid integer"),
        ("side", "--set side: write key=value"),
        ("=1", "--set =1: write key=value"),
        ("side=[", "--set side=[: the value is not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest(assignment, message):
    with pytest.raises(SettingsError) as error:
        loaded(assignment)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(("", "holds nothing"), ("[1]", "holds list"), ("{", "is not a settings file")),
        ("side: x", "score.side = 'x'"),
    ],
)
def test_a_file_that_cannot_be_is_named(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=rf"x\.yaml.*{message}"):
        loaded(file=file)


def test_every_key_of_parts_is_known_also_of_those_that_may_be_absent():
    assert list(dotted_keys(Section)) == ["side", "part", "part.seed", "other", "other.seed"]


def test_what_is_like_nothing_has_no_hint():
    assert nearest("qqq", ["side"]) == ""
    assert unknown("qqq", ["side"]) == "unknown setting 'qqq'"


class Round(Frozen):
    kind: Literal["round"]
    radius: int = 1


def kind_of(section):
    return section.get("kind", "part") if isinstance(section, dict) else "part"


class WithUnion(Frozen):
    shape: Annotated[
        Annotated[Part, Tag("part")] | Annotated[Round, Tag("round")], Discriminator(kind_of)
    ] = Part()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("shape.sede=1", "unknown setting 'score.shape.sede', did you mean 'score.shape.seed'?"),
        ("shape.seed=x", "score.shape.seed = 'x': Input should be a valid integer"),
        ("shape={kind: round, radius: x}", "score.shape.radius = 'x': Input should be a valid"),
        ("shape.kind=oval", "score.shape.kind = 'oval': choose one of 'part', 'round'"),
    ],
)
def test_a_section_of_several_kinds_is_named_without_pydantics_tags(assignment, message):
    with pytest.raises(SettingsError) as error:
        load(WithUnion, "score", None, [assignment])
    assert message in str(error.value)
    assert list(dotted_keys(WithUnion)) == [
        *("shape", "shape.seed", "shape.kind", "shape.radius"),
    ]
