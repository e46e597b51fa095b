"""What an index and its sidecars say of classes, and what a loader makes of it."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.config import FilterConfig
from data.shards import write as shards
from data.shards.loader import ShardLoader
from data.shards.manifest import SIDECAR, Index, ManifestError, parse_index

sys.path.append(str(Path(__file__).parent))  # several folders are called `tests`
from kept_rows import key_at, kind, write_kept

NUM = 17
CONFIG = FilterConfig(resolutions=(8,), samples_per_shard=5)


def some(place: int) -> str | None:
    return None if place % 4 == 2 else kind(place)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Shards of which all, some or no samples are labelled."""
    made = {}
    for name, label in (("all", kind), ("some", some), ("none", lambda place: None)):
        out = tmp_path_factory.mktemp(name)
        shards.write(*write_kept(out, NUM, label=label), out / "shards", CONFIG)
        made[name] = out / "shards" / "008"
    return made


def index(folder: Path) -> Index:
    return parse_index((folder / "index.json").read_bytes(), "index.json")


# Shards


def test_the_index_tells_the_classes_sorted_as_text_and_the_samples_without_one(folders):
    assert (index(folders["all"]).classes, index(folders["all"]).unlabelled) == (
        ("10", "11", "9"),
        0,
    )
    assert (index(folders["some"]).classes, index(folders["some"]).unlabelled) == (
        ("10", "11", "9"),
        4,
    )
    assert (index(folders["none"]).classes, index(folders["none"]).unlabelled) == ((), NUM)


def test_each_sample_has_its_label_in_the_sidecar(folders):
    found = {}
    for sidecar in folders["some"].glob("*.parquet"):
        table = pq.read_table(sidecar)
        assert table.schema.remove_metadata() == SIDECAR
        found |= dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert found == {key_at(place): some(place) for place in range(NUM)}


@pytest.mark.parametrize("gone", ["train-00000.tar", "train-00003.parquet", "index.json"])
def test_what_is_missing_is_written_again_to_the_same_bytes(tmp_path, folders, gone):
    kept, download = write_kept(tmp_path, NUM, label=some)
    out = tmp_path / "shards"
    shutil.copytree(folders["some"].parent, out)
    (out / "008" / gone).unlink()
    shards.write(kept, download, out, CONFIG)
    for path in folders["some"].iterdir():
        assert (out / "008" / path.name).read_bytes() == path.read_bytes()


def test_other_labels_make_other_shards(tmp_path, folders):
    kept, download = write_kept(tmp_path, NUM, label=kind)
    shutil.copytree(folders["some"].parent, tmp_path / "shards")
    shards.write(kept, download, tmp_path / "shards", CONFIG)
    assert index(tmp_path / "shards" / "008") == index(folders["all"])


def test_shards_of_a_version_without_classes_are_told_apart(tmp_path, folders):
    copy = shutil.copytree(folders["all"], tmp_path / "copy")
    document = json.loads((copy / "index.json").read_text())
    del document["classes"], document["unlabelled"]
    (copy / "index.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="written by an older version: run the filter stage"):
        ShardLoader(copy, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"classes": ["9", "10", "11"]}, "not sorted"),
        ({"classes": ["10", "10"]}, "listed twice"),
        ({"classes": []}, "contradict one another"),
        ({"unlabelled": NUM}, "contradict one another"),
        ({"classes": ["10", "9"]}, r"label '11' is not in its index"),
    ],
)
def test_classes_that_cannot_be_are_refused(tmp_path, folders, change, why):
    copy = shutil.copytree(folders["all"], tmp_path / "copy")
    document = json.loads((copy / "index.json").read_text()) | change
    (copy / "index.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=why):
        ShardLoader(copy, batch_size=1, seed=0, reads="label").captions_between(0, NUM)


# Batches


def test_what_a_loader_of_labels_calls_captions_are_labels(folders):
    loader = ShardLoader(folders["all"], batch_size=5, seed=0, reads="label")
    texts = ShardLoader(folders["all"], batch_size=5, seed=0)
    assert loader.classes == texts.classes == ("10", "11", "9")
    assert loader.captions(limit=0) == ["10", "11", "9"]
    label_of = {key_at(place): kind(place) for place in range(NUM)}
    for batch, same in islice(zip(loader.batches(), texts.batches(), strict=True), 4):
        assert batch.keys == same.keys
        assert batch.captions == batch.planned_captions == [label_of[key] for key in batch.keys]
        assert all(caption.startswith("colour") for caption in same.captions)
    assert loader.captions_between(0, 5) == next(loader.batches()).captions


@pytest.mark.parametrize(("name", "how_many"), [("some", "4 of 17"), ("none", "17 of 17")])
def test_labels_that_samples_lack_are_refused_with_the_setting(folders, name, how_many):
    with pytest.raises(ManifestError, match=f"{how_many} samples have no label.*filter.labels"):
        ShardLoader(folders[name], batch_size=5, seed=0, reads="label")
    assert ShardLoader(folders[name], batch_size=5, seed=0).captions()
