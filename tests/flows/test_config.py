"""Presets and overrides."""

import pytest

from flows.config import PipelineConfig, Resources, presets
from gigagan.common.settings import SettingsError, parse_assignments
from gigagan.config.presets import ladder


def test_the_four_presets_are_there():
    assert presets() == ["demo", "emoji", "emoji-classes", "emoji-pure", "laion-64", "smoke"]


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_json(name):
    config = PipelineConfig.preset(name)
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", presets())
def test_every_preset_makes_the_shards_that_its_trainings_read(name):
    config = PipelineConfig.preset(name)
    base, upsampler = config.train_base.generator, config.train_upsampler.upsampler
    assert {base.resolution, upsampler.resolution} <= set(config.filter.resolutions)
    assert upsampler.input_resolution == base.resolution


@pytest.mark.parametrize("name", presets())
def test_every_preset_judges_only_levels_that_its_upsampler_makes(name):
    section = PipelineConfig.preset(name).train_upsampler
    smallest_judged = section.upsampler.resolution >> (section.discriminator.levels - 1)
    assert smallest_judged >= section.upsampler.input_resolution


def test_an_override_replaces_one_value_and_leaves_the_original():
    config = PipelineConfig()
    changed = config.override({"train_base.total_images": 7_000, "filter.min_similarity": None})
    assert changed.train_base.total_images == 7_000
    assert changed.filter.min_similarity is None
    assert changed.train_base.generator == config.train_base.generator
    assert config == PipelineConfig()


def test_a_training_section_may_start_from_a_networks_preset():
    changed = PipelineConfig.preset("demo").override(
        {"train_base.total_images": 7_000, "train_base.preset": "ladder-attention"}
    )
    rung = ladder("attention")
    assert changed.train_base == rung.model_copy(update={"total_images": 7_000})
    parsed = PipelineConfig.parse(
        {"train_base": {"preset": "ladder-attention", "optimizer": {"lr": 1e-4}}}
    )
    assert parsed.train_base.optimizer == rung.optimizer.model_copy(update={"lr": 1e-4})
    assert parsed.train_base.generator == rung.generator


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ladder-atention", "unknown preset 'ladder-atention', did you mean 'ladder-attention'"),
        ("paper_64_to_512", "that is one of train_upsampler"),
    ],
)
def test_a_networks_preset_that_is_unknown_or_of_the_other_section_is_refused(name, message):
    with pytest.raises(SettingsError, match=message):
        PipelineConfig().override({"train_base.preset": name})


def test_an_override_may_add_to_the_environment():
    changed = PipelineConfig().override({"resources.train_base.env.NCCL_DEBUG": "INFO"})
    assert changed.resources.train_base == Resources(env={"NCCL_DEBUG": "INFO"})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("filter.min_similarty", "filter.min_similarity"),
        ("min_similarity", "filter.min_similarity"),
        ("train_base.lr", "train_base.optimizer.lr"),
        ("train_base.generator.chanels", "train_base.generator.channels"),
        ("train_base.generator.text.encodr", "train_base.generator.text.encoder"),
        ("trainbase.total_images", "train_base.total_images"),
        ("resources.filter.proceses", "resources.filter.processes"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest):
    with pytest.raises(SettingsError, match=f"{key}.*did you mean '{nearest}'"):
        PipelineConfig().override({key: 1})


def test_a_key_below_a_value_is_unknown():
    with pytest.raises(SettingsError, match=r"name\.first"):
        PipelineConfig().override({"name.first": 1})


def test_a_wrong_value_is_named_with_its_key():
    with pytest.raises(SettingsError, match=r"filter\.min_side = 'wide'"):
        PipelineConfig().override({"filter.min_side": "wide"})


def test_every_problem_of_a_tree_is_listed():
    with pytest.raises(SettingsError) as error:
        PipelineConfig.parse({"nam": "x", "evaluate": {"num_images": 1}})
    assert "'nam', did you mean 'name'" in str(error.value)
    assert "evaluate.num_images = 1" in str(error.value)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'smoke'"):
        PipelineConfig.preset("smok")


def test_assignments_are_read_as_yaml():
    overrides = parse_assignments(["a.b=1", "c=[2, 3]", "d=null", "e=5e-4", "f=x=y"])
    assert overrides == {"a.b": 1, "c": [2, 3], "d": None, "e": "5e-4", "f": "x=y"}
    assert PipelineConfig().override(
        {"train_base.optimizer.lr": overrides["e"]}
    ).train_base.optimizer.lr == pytest.approx(5e-4)


def test_an_assignment_without_a_value_says_how_to_write_it():
    with pytest.raises(SettingsError, match="write key=value"):
        parse_assignments(["filter.min_side"])


def test_a_relative_store_is_so_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GIGAGAN_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert PipelineConfig().store_path == tmp_path / "runs/store"
    assert PipelineConfig(store="mine").store_path == tmp_path / "mine"
    assert PipelineConfig(store=str(tmp_path)).store_path == tmp_path
