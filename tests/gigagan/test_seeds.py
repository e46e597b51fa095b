import numpy as np
import pytest
from pydantic import ValidationError

from data.config import DownloadConfig, EmbeddedConfig, ScoreConfig
from data.shards.order import Order
from gigagan import seeds
from gigagan.config import EvaluateConfig, TrainBaseConfig, TrainUpsamplerConfig

CONFIGS = [
    EmbeddedConfig, DownloadConfig, ScoreConfig, TrainBaseConfig, TrainUpsamplerConfig,
    EvaluateConfig,
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_every_section_takes_the_same_seeds(config):
    assert config(seed=0).seed == 0
    assert config(seed=2**63 - 1).seed == 2**63 - 1
    for bad in (-1, 2**63):
        with pytest.raises(ValidationError, match="seed"):
            config(seed=bad)


def test_derived_seeds_are_seeds_that_no_other_place_has():
    found = {seeds.derived(seed, place) for seed in range(40) for place in range(40)}
    assert len(found) == 1600
    assert all(0 <= seed <= seeds.LARGEST for seed in found)
    assert seeds.derived(1, 0) != seeds.derived(0, 1_000_003), "as by multiplication"
    assert seeds.derived(2**63 - 1, 7) == seeds.derived(2**63 - 1, 7)


def test_the_largest_seed_is_one_everywhere_on_the_way(tmp_path):
    np.random.default_rng([2**63 - 1, 1])
    assert Order([3, 5], seed=2**63 - 1, window=4) is not None
