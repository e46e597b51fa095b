"""megatron-energon reads our shards as they are: a second pair of eyes for their format."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest

from data.config import FilterConfig
from data.shards import write as shards

energon = pytest.importorskip("megatron.energon", reason="needs megatron-energon")

sys.path.append(str(Path(__file__).parents[1] / "data"))
from kept_rows import colour, key_at, write_kept  # noqa: E402

NUM_SAMPLES = 23
CONFIG = FilterConfig(resolutions=(8,), samples_per_shard=5)
PLACE = {key_at(place): place for place in range(NUM_SAMPLES)}
DATASET = """
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: png
  caption: txt
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A copy of a set of shards beside which energon has put its own index, as its docs say."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    root = tmp_path_factory.mktemp("energon")
    shards.write(*write_kept(root, NUM_SAMPLES), root / "shards", CONFIG)
    copy = shutil.copytree(root / "shards" / "008", root / "copy")
    names = [entry["name"] for entry in json.loads((copy / "index.json").read_text())["shards"]]
    parts = WebdatasetPreparator.prepare_dataset(
        copy, names, split_parts_ratio=[("train", 1.0)], workers=1
    )
    assert parts == {"png", "txt", "json"}
    (copy / ".nv-meta" / "dataset.yaml").write_text(DATASET)
    return copy


def loader(path: Path):
    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        path, worker_config=config, batch_size=1, shuffle_buffer_size=None,
        max_samples_per_sequence=None,
    )  # fmt: skip
    return energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)


def shown(batch) -> tuple[str, str, tuple[int, ...]]:
    """(key, caption, colour) of a batch of one."""
    key = batch.__key__[0].rpartition("/")[2]
    pixel = (255 * batch.image[0, :, 0, 0]).round().int().tolist()
    return key, batch.caption[0], tuple(pixel)


def test_energon_counts_what_the_index_says(prepared):
    info = json.loads((prepared / ".nv-meta" / ".info.json").read_text())
    index = json.loads((prepared / "index.json").read_text())
    assert info["shard_counts"] == {e["name"]: e["samples"] for e in index["shards"]}


def test_energon_sees_every_sample_with_its_own_caption_and_picture(prepared):
    seen = [shown(batch) for batch in islice(loader(prepared), NUM_SAMPLES)]
    assert sorted(key for key, _, _ in seen) == sorted(PLACE)
    for key, caption, pixel in seen:
        assert caption == f"colour {PLACE[key] % 7}"
        assert pixel == colour(PLACE[key])


def test_energon_resumes_in_the_middle_of_our_shards(prepared):
    first = loader(prepared)
    stream = iter(first)
    head = [shown(next(stream)) for _ in range(9)]
    state = first.save_state_rank()
    expected = [shown(next(stream)) for _ in range(NUM_SAMPLES - 9)]
    second = loader(prepared)
    second.restore_state_rank(state)
    assert [shown(batch) for batch in islice(second, NUM_SAMPLES - 9)] == expected
    assert len({*head, *expected}) == NUM_SAMPLES
