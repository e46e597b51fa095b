from __future__ import annotations

import io
import json
import shutil
import tarfile
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data import shards
from data.config import FilterConfig
from data.loader import CorruptShardsError, ShardLoader

NUM_SAMPLES = 47
CONFIG = FilterConfig(resolutions=(8,), samples_per_shard=5, min_similarity=None)


def colour(place: int) -> tuple[int, int, int]:
    return (5 * place, 255 - 5 * place, place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten shards of plain pictures, each of a colour that tells its place."""
    out = tmp_path_factory.mktemp("loader")
    (out / "images").mkdir()
    with tarfile.open(out / "images" / "00000.tar", "w") as archive:
        for place in range(NUM_SAMPLES):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 8), colour(place)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{place:08d}.jpg")
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    places = range(NUM_SAMPLES)
    kept = pa.table(
        {
            "key": [f"{place:08d}" for place in places],
            "url": ["http://a/"] * NUM_SAMPLES,
            "caption": [f"colour {place % 7}" for place in places],
            "sha256": ["0"] * NUM_SAMPLES,
        }
    )
    shards.write(kept, out / "images", out / "shards", CONFIG)
    return out / "shards" / "008"


def keys(loader: ShardLoader, seen: int, count: int) -> list[str]:
    return [key for batch in islice(loader.batches(seen), count) for key in batch.keys]


def test_a_batch_is_pictures_with_their_own_captions_and_keys(folder):
    loader = ShardLoader(folder, batch_size=6, seed=0)
    batch = next(loader.batches(0))
    assert (batch.images_BCHW.dtype, batch.images_BCHW.shape) == (torch.uint8, (6, 3, 8, 8))
    for image_CHW, caption, key in zip(*batch[:3], strict=True):
        assert tuple(image_CHW[:, 0, 0].tolist()) == colour(int(key))
        assert caption == f"colour {int(key) % 7}"
    assert loader.num_samples == NUM_SAMPLES
    assert loader.captions() == [f"colour {i}" for i in range(7)]


def test_an_epoch_sees_each_sample_once_and_the_next_in_another_order(folder):
    loader = ShardLoader(folder, batch_size=1, seed=0)
    epochs = [keys(loader, start, NUM_SAMPLES) for start in (0, NUM_SAMPLES)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"{i:08d}" for i in range(NUM_SAMPLES)]
    assert epochs[0] != epochs[1]


def test_another_seed_gives_another_order(folder):
    first, second = (keys(ShardLoader(folder, batch_size=8, seed=s), 0, 3) for s in (0, 1))
    assert first != second


@pytest.mark.parametrize("seen", [6, 42, 48, 300])
def test_resuming_at_a_position_continues_the_same_sequence(folder, seen):
    whole = keys(ShardLoader(folder, batch_size=6, seed=3), 0, 60)
    assert keys(ShardLoader(folder, batch_size=6, seed=3), seen, 3) == whole[seen : seen + 18]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_global_batch_as_one_process_would_see_it(folder, world_size):
    alone = keys(ShardLoader(folder, batch_size=6, seed=0), 12, 9)
    ranks = [
        ShardLoader(folder, batch_size=6, seed=0, rank=rank, world_size=world_size).batches(12)
        for rank in range(world_size)
    ]
    together = [key for _ in range(9) for rank in ranks for key in next(rank).keys]
    assert together == alone


def test_cache_and_threads_change_nothing(folder):
    plain = ShardLoader(folder, batch_size=5, seed=0, cache_mb=0)
    fast = ShardLoader(folder, batch_size=5, seed=0, threads=3)
    for a, b in islice(zip(plain.batches(0), fast.batches(0), strict=False), 25):
        assert a.keys == b.keys
        assert torch.equal(a.images_BCHW, b.images_BCHW)


def test_batch_size_must_suit_the_ranks(folder):
    with pytest.raises(ValueError, match="batch_size 5 over 2 ranks"):
        ShardLoader(folder, batch_size=5, seed=0, world_size=2)


def damage(folder, tmp_path, num_pictures):
    """A copy of the shards in which the first pictures of the first shard are noise."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tar = copy / "train-00000.tar"
    with tarfile.open(tar) as archive:
        hit = [m for m in archive if m.name.endswith(".png")][:num_pictures]
    data = bytearray(tar.read_bytes())
    for member in hit:
        data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    tar.write_bytes(data)
    return copy, [member.name.removesuffix(".png") for member in hit]


def test_a_corrupt_picture_is_skipped_with_a_warning_that_names_it(folder, tmp_path):
    copy, [bad] = damage(folder, tmp_path, 1)
    loader = ShardLoader(copy, batch_size=1, seed=0)
    with pytest.warns(UserWarning, match=bad):
        seen = keys(loader, 0, NUM_SAMPLES)
    assert bad not in seen
    assert (len(seen), loader.corrupt) == (NUM_SAMPLES, {bad})


def test_many_corrupt_pictures_are_an_error(folder, tmp_path):
    copy, _ = damage(folder, tmp_path, 3)
    loader = ShardLoader(copy, batch_size=1, seed=0)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(CorruptShardsError, match="2 of 47"),
    ):
        keys(loader, 0, NUM_SAMPLES)


def test_a_shard_cut_short_is_refused_at_once(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tar = copy / "train-00003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"train-00003\.tar has \d+ bytes, its index says"):
        ShardLoader(copy, batch_size=1, seed=0)


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"index\.json cannot be read.*shards/032"):
        ShardLoader(tmp_path, batch_size=1, seed=0)


def test_the_shards_are_plain_webdataset(folder, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset as wds

    paths = [
        str(folder / s["name"]) for s in json.loads((folder / "index.json").read_text())["shards"]
    ]
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert len(samples) == NUM_SAMPLES
    assert all(tuple(np.asarray(s["png"])[0, 0]) == colour(int(s["__key__"])) for s in samples)
