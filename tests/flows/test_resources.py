"""What stages may ask for, and what is refused before anything starts."""

import pytest

from flows.config import PipelineConfig, Resources
from flows.resources import is_secret
from gigagan.common.settings import SettingsError

CLUSTER = {"image": "train:1", "claim": "store", "mount_path": "/store"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("download.backend", "slurm", r"download\.backend = 'slurm' has no effect"),
        ("score.backend", "torchrun", r"score\.backend = 'torchrun' has no effect"),
        ("filter.gpus", 1, r"filter\.gpus = 1\.0 has no effect: .* executor, processes"),
        ("filter.env.A", "b", r"filter\.env"),
        ("download.executor", "ray", r"download\.executor = 'ray' has no effect"),
        ("train_base.executor", "ray", r"train_base\.executor"),
        ("train_base.nodes", 2, "only a cluster's job has it"),
        ("train_base.deadline_hours", 1, "only a cluster's job has it"),
        ("train_base.backend", "kubernetes", r"needs kubernetes\.image"),
        ("train_base.env.HUB_TOKEN", "hidden", "HUB_TOKEN looks like a secret"),
        ("train_base.env.PROXY", "http://u:hidden@proxy", "PROXY looks like a secret"),
        ("train_base.slurm.setup", ["export API_KEY=hidden"], "API_KEY looks like a secret"),
        ("train_base.kubernetes.env_from_secrets.A", "hidden", "SECRET/KEY"),
        ("train_base.slurm.parameters.--x", "", "without dashes"),
    ],
)
def test_what_would_have_no_effect_or_leak_is_refused(key, value, message):
    with pytest.raises(SettingsError, match=message) as error:
        PipelineConfig().override({f"resources.{key}": value})
    assert "hidden" not in str(error.value)


def test_one_plain_process_is_not_several():
    asked = {"resources.train_base.backend": "inline", "resources.train_base.processes": 2}
    with pytest.raises(SettingsError, match="choose auto, torchrun, slurm or kubernetes"):
        PipelineConfig().override(asked)


def test_an_evaluation_works_in_one_process():
    asked = {"resources.evaluate.backend": "torchrun", "resources.evaluate.processes": 2}
    with pytest.raises(SettingsError, match="evaluate has 2 processes"):
        PipelineConfig().override(asked)


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "KEYBOARD", "AUTHOR"])
def test_harmless_names_are_not_taken_for_secrets(name):
    assert not is_secret(name, "http://mlflow:5000")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "KEY"])
def test_names_of_secrets_are_known(name):
    assert is_secret(name, "")


def test_resources_do_not_enter_a_key(tmp_path):
    from flows.stage import Need  # noqa: F401
    from flows.stages import download, train_base
    from flows.storage.store import Store

    plain = PipelineConfig(store=str(tmp_path))
    remote = plain.override(
        {"resources.train_base": Resources(backend="slurm", nodes=4).model_dump(mode="json")}
    )
    store = Store(tmp_path)
    for stage in (download.STAGE, train_base.STAGE):
        assert store.key(stage, plain, {}) == store.key(stage, remote, {})


def test_a_profile_of_a_cluster_is_set_by_dotted_keys():
    changed = PipelineConfig().override(
        {
            "resources.train_base.backend": "kubernetes",
            "resources.train_base.nodes": 4,
            "resources.train_base.kubernetes.node_selector.gpu": "h100",
            **{f"resources.train_base.kubernetes.{key}": value for key, value in CLUSTER.items()},
        }
    )
    asked = changed.resources.train_base
    assert (asked.nodes, asked.kubernetes.node_selector) == (4, {"gpu": "h100"})
