from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import tracemalloc
import uuid
import warnings
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import FilterConfig
from data.shards import cache
from data.shards import write as shards
from data.shards.loader import CorruptShardsError, ShardLoader
from data.shards.manifest import SIDECAR, ManifestError
from data.shards.order import Order

sys.path.append(str(Path(__file__).parent))  # several folders are called `tests`
from kept_rows import colour, key_at, member, noisy, write_kept

NUM_SAMPLES = 47
CONFIG = FilterConfig(resolutions=(8,), samples_per_shard=5, min_similarity=None)
KEYS = [key_at(place) for place in range(NUM_SAMPLES)]
PLACE = {key: place for place, key in enumerate(KEYS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten shards of plain pictures, each of a colour that tells its place."""
    out = tmp_path_factory.mktemp("loader")
    shards.write(*write_kept(out, NUM_SAMPLES), out / "shards", CONFIG)
    return out / "shards" / "008"


def keys(loader: ShardLoader, seen: int, count: int) -> list[str]:
    return [key for batch in islice(loader.batches(seen), count) for key in batch.keys]


def test_a_batch_is_pictures_with_their_own_captions_and_keys(folder):
    loader = ShardLoader(folder, batch_size=6, seed=0)
    batch = next(loader.batches(0))
    assert (batch.images_BCHW.dtype, batch.images_BCHW.shape) == (torch.uint8, (6, 3, 8, 8))
    for image_CHW, caption, key in zip(*batch[:3], strict=True):
        assert tuple(image_CHW[:, 0, 0].tolist()) == colour(PLACE[key])
        assert caption == f"colour {PLACE[key] % 7}"
    assert loader.num_samples == NUM_SAMPLES
    assert loader.captions() == [f"colour {i}" for i in range(7)]


def test_an_epoch_sees_each_sample_once_and_the_next_in_another_order(folder):
    loader = ShardLoader(folder, batch_size=1, seed=0)
    epochs = [keys(loader, start, NUM_SAMPLES) for start in (0, NUM_SAMPLES)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == KEYS
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
    for picture in hit:
        data[picture.offset_data : picture.offset_data + picture.size] = bytes(picture.size)
    tar.write_bytes(data)
    return copy, [picture.name.removesuffix(".png") for picture in hit]


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


def test_shards_of_an_older_version_without_sidecars_are_refused(tmp_path):
    entry = {"name": "train-00000.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64}
    old = {"resolution": 8, "samples": 3, "shards": [entry]}
    (tmp_path / "index.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="written by an older version: run the filter stage again"):
        ShardLoader(tmp_path, batch_size=1, seed=0)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_sidecar_that_is_missing_or_cut_short_is_refused_at_once(folder, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "copy")
    sidecar = copy / "train-00003.parquet"
    data = sidecar.read_bytes()
    sidecar.unlink()
    if damage == "short":
        sidecar.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"train-00003\.parquet has (no|\d+) bytes, its index"):
        ShardLoader(copy, batch_size=1, seed=0)


def test_a_sidecar_of_the_right_size_with_other_bytes_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    sidecar = copy / "train-00003.parquet"
    data = bytearray(sidecar.read_bytes())
    data[40] ^= 1
    sidecar.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00003\.parquet has .* not those its index means"):
        keys(ShardLoader(copy, batch_size=1, seed=0), 0, NUM_SAMPLES)


def test_the_shards_are_plain_webdataset(folder, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset as wds

    paths = [
        str(folder / s["name"]) for s in json.loads((folder / "index.json").read_text())["shards"]
    ]
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert len(samples) == NUM_SAMPLES
    assert all(tuple(np.asarray(s["png"])[0, 0]) == colour(PLACE[s["__key__"]]) for s in samples)


# The order


def test_the_order_of_a_billion_samples_takes_no_list_of_them():
    sizes = np.full(100_000, 10_000)
    sizes[77] = 9_999
    tracemalloc.start()
    order = Order(sizes, seed=5, window=4)
    n = order.num_samples
    assert n == 10**9 - 1
    seen = [*order.places(7 * n + 123_456_789, 7 * n + 123_456_799)]
    across = [*order.places(8 * n - 3, 8 * n + 3)]
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    again = Order(sizes, seed=5, window=4)
    assert [*again.places(8 * n - 3, 8 * n), *again.places(8 * n, 8 * n + 3)] == across
    assert [*again.places(7 * n + 123_456_794, 7 * n + 123_456_799)] == seen[5:]


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=11),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    cut=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_every_sample_once_and_can_be_entered_anywhere(sizes, window, seed, cut):
    n, every = sum(sizes), {(s, p) for s, size in enumerate(sizes) for p in range(size)}
    order = Order(sizes, seed=seed, window=window)
    whole = [*order.places(0, 3 * n)]
    for epoch in range(3):
        assert set(whole[epoch * n : (epoch + 1) * n]) == every
    start = cut % (3 * n)
    assert [*Order(sizes, seed=seed, window=window).places(start, 3 * n)] == whole[start:]
    for position in range(3 * n):
        one = order.window(position)
        assert one.start <= position < one.stop
        assert whole[position][0] in one.shards
        assert len(one.shards) <= window


def test_samples_mix_within_a_window_and_windows_with_each_other():
    order = Order([50] * 12, seed=0, window=4)
    shards_seen = [shard for shard, _ in order.places(0, 600)]
    windows = [set(shards_seen[i : i + 200]) for i in range(0, 600, 200)]
    assert [len(window) for window in windows] == [4, 4, 4]
    assert set.union(*windows) == set(range(12))
    assert all(len(set(shards_seen[i : i + 30])) == 4 for i in range(0, 180, 30))
    later = [{s for s, _ in order.places(600 + i, 800 + i)} for i in range(0, 600, 200)]
    assert later != windows


# Captions


def test_captions_of_a_set_beyond_the_limit_are_not_gathered(folder):
    loader = ShardLoader(folder, batch_size=1, seed=0)
    assert loader.captions(limit=NUM_SAMPLES - 1) is None
    assert loader.captions(limit=NUM_SAMPLES) == loader.captions()


def test_captions_between_are_those_of_the_batches_and_need_no_tar(folder, tmp_path):
    batches = islice(ShardLoader(folder, batch_size=6, seed=2).batches(30), 9)
    expected = [caption for batch in batches for caption in batch.captions]
    copy = shutil.copytree(folder, tmp_path / "copy")
    loader = ShardLoader(copy, batch_size=6, seed=2)
    for tar in copy.glob("*.tar"):
        tar.unlink()
    assert loader.captions_between(30, 84) == expected


def test_each_rank_knows_the_captions_of_the_whole_batch(folder):
    alone = next(ShardLoader(folder, batch_size=6, seed=0).batches(12))
    assert alone.planned_captions == alone.captions
    for rank in range(3):
        loader = ShardLoader(folder, batch_size=6, seed=0, rank=rank, world_size=3)
        batch = next(loader.batches(12))
        assert batch.planned_captions == alone.captions
        assert batch.captions == alone.captions[2 * rank : 2 * rank + 2]


def test_only_a_few_sidecars_are_open_at_a_time(folder, monkeypatch):
    read = []
    original = ShardLoader._read_sidecar

    def counted(self, shard):
        read.append(shard)
        return original(self, shard)

    monkeypatch.setattr(ShardLoader, "_read_sidecar", counted)
    monkeypatch.setattr(ShardLoader, "AHEAD", 0)
    loader = ShardLoader(folder, batch_size=1, seed=0)
    assert read == []
    keys(loader, 0, 10)
    assert len(set(read)) <= ShardLoader.WINDOW


# Reading ahead


@pytest.mark.parametrize(("ahead", "threads", "task"), [(0, 1, 16), (1, 3, 2), (5, 2, 3)])
def test_reading_ahead_changes_nothing(folder, monkeypatch, ahead, threads, task):
    plain = ShardLoader(folder, batch_size=7, seed=1, cache_mb=0)
    expected = [*islice(plain.batches(3), 20)]
    monkeypatch.setattr(ShardLoader, "AHEAD", ahead)
    monkeypatch.setattr(ShardLoader, "TASK", task)
    loader = ShardLoader(folder, batch_size=7, seed=1, threads=threads)
    for ours, theirs in zip(islice(loader.batches(3), 20), expected, strict=True):
        assert ours[1:] == theirs[1:]
        assert torch.equal(ours.images_BCHW, theirs.images_BCHW)


def test_batches_are_decoded_ahead_but_no_more_than_a_few(folder, monkeypatch):
    begun = []
    original = ShardLoader._begin

    def counted(self, position):
        begun.append(position)
        return original(self, position)

    monkeypatch.setattr(ShardLoader, "_begin", counted)
    stream = ShardLoader(folder, batch_size=5, seed=0).batches(10)
    next(stream)
    assert begun == [10, 15, 20]
    next(stream)
    assert begun == [10, 15, 20, 25]
    stream.close()


def test_a_batch_stays_what_it_was_when_later_ones_are_read(folder):
    stream = ShardLoader(folder, batch_size=5, seed=0).batches(0)
    first = next(stream)
    before = first.images_BCHW.clone()
    for _ in range(12):
        next(stream).images_BCHW.fill_(7)  # nor does a change reach the cache
    assert torch.equal(first.images_BCHW, before)
    again = next(ShardLoader(folder, batch_size=5, seed=0).batches(0))
    assert torch.equal(again.images_BCHW, before)


# Shards of strangers


class _Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def rewritten(folder, tmp_path, change):
    """A copy with another index."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "../evil.tar", "/etc/passwd", "pipe:touch trapped", "pipe:touch trapped.tar",
        "a/b.tar", "s3://bucket/x.tar", "train-00000.tar\n", "train-00000.tar.gz", ".tar", "",
    ],
)  # fmt: skip
def test_a_name_that_could_be_a_path_or_a_command_is_refused(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    copy = rewritten(folder, tmp_path, lambda index: index["shards"][2].update(name=name))
    with pytest.raises(ManifestError, match=r"shards\.2\.name.*run the filter stage again"):
        ShardLoader(copy, batch_size=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_pipe_is_no_place_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("pipe:touch trapped", "pipe://touch trapped"):
        with pytest.raises(ValueError, match=r"cannot be read|no place that can be read"):
            ShardLoader(url, batch_size=1, seed=0, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda index: index.update(samples=46), "not the sum"),
        (lambda index: index.update(codec="pkl"), "codec"),
        (lambda index: index["shards"].append(index["shards"][0]), "samples|listed twice"),
        (lambda index: index["shards"][1].update(sha256="x"), r"shards\.1\.sha256"),
        (lambda index: index.update(resolution=10**9), "resolution"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(folder, tmp_path, change, why):
    with pytest.raises(ManifestError, match=why):
        ShardLoader(rewritten(folder, tmp_path, change), batch_size=1, seed=0)


def forged(folder, tmp_path, change):
    """A copy whose first sidecar has other rows, with an index that vouches for it."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    sidecar = copy / "train-00000.parquet"
    rows = pq.read_table(sidecar).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, SIDECAR), sidecar)
    index = json.loads((copy / "index.json").read_text())
    data = sidecar.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    index["shards"][0].update(index_bytes=len(data), index_sha256=digest)
    (copy / "index.json").write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: rows[1].update(key="../evil"), "'../evil' is none of ours"),
        (lambda rows: rows[1].update(offset=-512), "outside of train-00000.tar"),
        (lambda rows: rows[1].update(size=2**62), "outside of train-00000.tar"),
        (lambda rows: rows[1].update(offset=2**63 - 1), "outside of train-00000.tar"),
        (lambda rows: rows[1].update(caption=None), "empty cells"),
        (lambda rows: rows.pop(), "it has 4 samples, its index says 5"),
    ],
)
def test_a_forged_sidecar_is_refused(folder, tmp_path, change, why):
    with pytest.raises(ManifestError, match=why):
        keys(ShardLoader(forged(folder, tmp_path, change), batch_size=1, seed=0), 0, NUM_SAMPLES)


@pytest.mark.parametrize("kind", ["pickle", "gif", "big"])
def test_what_is_no_picture_of_the_codec_and_size_is_skipped_and_not_run(
    folder, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    picture, buffer = Image.new("RGB", (8, 8) if kind == "gif" else (4000, 3000)), io.BytesIO()
    picture.save(buffer, "GIF" if kind == "gif" else "PNG")
    bad = pickle.dumps(_Trap()) if kind == "pickle" else buffer.getvalue()
    copy = shutil.copytree(folder, tmp_path / "copy")
    tar = copy / "train-00000.tar"
    rows = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
    with tarfile.open(tar, "a") as archive:
        end = archive.offset
        archive.addfile(*member("evil.pkl", bad))
    victim = rows[1]["key"]
    digest = hashlib.sha256(bad).hexdigest()
    rows[1].update(offset=end + 512, size=len(bad), sha256=digest)
    pq.write_table(pa.Table.from_pylist(rows, SIDECAR), tar.with_suffix(".parquet"))
    told = tar.with_suffix(".parquet").read_bytes()
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0].update(
        bytes=tar.stat().st_size,
        index_bytes=len(told),
        index_sha256=hashlib.sha256(told).hexdigest(),
    )
    (copy / "index.json").write_text(json.dumps(index))
    loader = ShardLoader(copy, batch_size=1, seed=0)
    with pytest.warns(UserWarning, match=f"skipped {victim}"):
        assert victim not in keys(loader, 0, NUM_SAMPLES)
    assert not (tmp_path / "trapped").exists()


def test_whoever_uses_webdataset_beside_us_runs_no_pipes():
    assert os.environ["WDS_SECURE"] == "1"


@given(data=st.data())
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_files_give_valid_batches_or_errors_of_ours(folder, tmp_path, data):
    copy = tmp_path / uuid.uuid4().hex
    shutil.copytree(folder, copy)
    path = copy / data.draw(st.sampled_from(sorted(p.name for p in copy.iterdir())))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 20))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loader = ShardLoader(copy, batch_size=7, seed=0)
            for batch in islice(loader.batches(0), 7):
                assert batch.images_BCHW.shape == (7, 3, 8, 8)
                for image_CHW, caption, key in zip(*batch[:3], strict=True):
                    assert tuple(image_CHW[:, 0, 0].tolist()) == colour(PLACE[key])
                    assert caption == f"colour {PLACE[key] % 7}"
        except (ValueError, CorruptShardsError):
            pass
    shutil.rmtree(copy)


# Shards behind a URL


@pytest.fixture
def store(folder, monkeypatch):
    """(file system, URL) of the shards in a store that counts what is asked of it."""
    monkeypatch.setattr(cache, "PAUSE_S", 0.001)
    fs, name = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    fs.put(str(folder), f"{name}/008", recursive=True)
    asked: list[str] = []
    get_file, lock = type(fs).get_file, threading.Lock()

    def counted(self, source, target, **options):
        with lock:
            asked.append(Path(source).name)
        return get_file(self, source, target, **options)

    monkeypatch.setattr(type(fs), "get_file", counted)
    fs.asked = asked
    yield fs, f"memory:/{name}/008"
    fs.rm(name, recursive=True)


def test_remote_shards_give_what_local_ones_do_and_come_once(folder, store, tmp_path):
    fs, url = store
    expected = [*islice(ShardLoader(folder, batch_size=6, seed=0).batches(12), 30)]
    for _ in range(2):
        loader = ShardLoader(url, batch_size=6, seed=0, cache_mb=0, cache_dir=tmp_path)
        for ours, theirs in zip(islice(loader.batches(12), 30), expected, strict=True):
            assert ours[1:] == theirs[1:]
            assert torch.equal(ours.images_BCHW, theirs.images_BCHW)
    assert sorted(fs.asked) == sorted(p.name for p in folder.glob("train-*"))


def test_ranks_of_a_node_fetch_each_file_once_between_them(store, tmp_path):
    fs, url = store
    ranks = [
        ShardLoader(url, batch_size=6, seed=0, rank=r, world_size=3, cache_dir=tmp_path).batches()
        for r in range(3)
    ]
    threads = [
        threading.Thread(target=lambda stream=stream: [*islice(stream, 16)]) for stream in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fs.asked) == len(set(fs.asked)) == 20


def test_the_next_window_is_fetched_while_this_one_is_read(store, tmp_path):
    fs, url = store
    loader = ShardLoader(url, batch_size=1, seed=0, cache_dir=tmp_path)
    stream = loader.batches(0)
    next(stream)
    soon = loader._order.window(0).shards + loader._order.window(20).shards
    wanted = {loader._shards[shard].sha256 for shard in soon}
    arrived = threading.Event()
    for _ in range(1000):
        if all((tmp_path / digest).exists() for digest in wanted):
            arrived.set()
            break
        arrived.wait(0.01)
    assert arrived.is_set()
    assert len(wanted) == 8
    assert len([name for name in set(fs.asked) if name.endswith(".tar")]) == 8


def test_a_full_cache_loses_what_was_used_longest_ago_and_training_goes_on(folder, store, tmp_path):
    fs, url = store
    size = sum(p.stat().st_size for p in folder.glob("train-*"))
    options = {"cache_mb": 0, "cache_dir": tmp_path, "cache_gb": size * 0.85 / 1e9}
    loader = ShardLoader(url, batch_size=6, seed=0, **options)
    assert keys(loader, 0, 40) == keys(ShardLoader(folder, batch_size=6, seed=0), 0, 40)
    kept = sum(p.stat().st_size for p in tmp_path.iterdir() if p.is_file())
    assert kept < 0.95 * size
    assert len(fs.asked) > 20


def test_a_file_on_its_way_in_is_no_room_to_be_made(tmp_path):
    """Another process that makes room meanwhile takes neither it nor what has just arrived."""
    mine, other = cache.Cache(tmp_path, 10), cache.Cache(tmp_path, 10)

    def fetch(partial):
        partial.write_bytes(b"mine")
        os.close(other.open("b" * 64, lambda path: path.write_bytes(b"of the other")))

    with os.fdopen(mine.open("a" * 64, fetch), "rb") as file:
        assert file.read() == b"mine"
    with os.fdopen(mine.open("c" * 64, lambda path: path.write_bytes(b"a third")), "rb") as file:
        assert file.read() == b"a third"
    assert sorted(path.name[0] for path in tmp_path.iterdir() if path.is_file()) == ["c"]


def test_what_a_killed_process_left_unfinished_makes_room(tmp_path):
    left = tmp_path / ("a" * 64 + ".partial")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    os.close(cache.Cache(tmp_path, 10).open("b" * 64, lambda path: path.write_bytes(b"ten bytes!")))
    assert not left.exists()


def flaky(fs, monkeypatch, faults):
    """Some first attempts of each file fail or bring other bytes."""
    get_file, met = type(fs).get_file, dict.fromkeys(range(0), 0)
    lock = threading.Lock()

    def failing(self, source, target, **options):
        with lock:
            met[source] = met.get(source, 0) + 1
            fault = faults[met[source] - 1] if met[source] <= len(faults) else None
        if fault == "reset":
            raise ConnectionResetError("reset by peer")
        get_file(self, source, target, **options)
        if fault == "cut":
            os.truncate(target, 100)
        if fault == "bits":
            data = bytearray(Path(target).read_bytes())
            data[50] ^= 4
            Path(target).write_bytes(data)

    monkeypatch.setattr(type(fs), "get_file", failing)


def test_resets_and_damage_on_the_way_are_tried_again(folder, store, tmp_path, monkeypatch):
    fs, url = store
    flaky(fs, monkeypatch, ["reset", "cut", "bits", "reset"])
    loader = ShardLoader(url, batch_size=6, seed=0, cache_dir=tmp_path)
    assert keys(loader, 0, 20) == keys(ShardLoader(folder, batch_size=6, seed=0), 0, 20)
    assert loader.corrupt == set()


def test_a_store_that_stays_away_is_an_error_that_names_it(store, tmp_path, monkeypatch):
    fs, url = store
    flaky(fs, monkeypatch, ["reset"] * 10**4)
    loader = ShardLoader(url, batch_size=6, seed=0, cache_dir=tmp_path)
    with pytest.raises(OSError, match=r"memory://.*could not be fetched in 8 attempts.*reset by"):
        next(loader.batches(0))


def test_a_remote_tar_that_is_another_than_indexed_is_replaced_by_others(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(ShardLoader, "CORRUPT_SHARE", 0.3)
    fs, url = store
    root = url.removeprefix("memory:/")
    fs.pipe(f"{root}/train-00002.tar", b"other bytes")
    fs.rm(f"{root}/train-00004.tar")
    loader = ShardLoader(url, batch_size=1, seed=0, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="others take its pictures' place") as warned:
        seen = keys(loader, 0, NUM_SAMPLES)
    assert sorted(str(w.message).partition(": ")[0][-15:] for w in warned) == [
        "train-00002.tar", "train-00004.tar",
    ]  # fmt: skip
    assert loader.corrupt == {*KEYS[10:15], *KEYS[20:25]}
    assert not loader.corrupt & set(seen)


def test_a_remote_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"memory://nowhere/index\.json cannot be read"):
        ShardLoader("memory://nowhere/", batch_size=1, seed=0, cache_dir=tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("GIGAGAN_CACHE", str(tmp_path / "here"))
    assert cache.default_cache() == tmp_path / "here" / "shards", "all of it may go"
    monkeypatch.delenv("GIGAGAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache() == tmp_path / "gigagan" / "shards"


def test_a_file_url_is_a_local_folder(folder):
    loader = ShardLoader(f"file://{folder}", batch_size=3, seed=0)
    assert keys(loader, 0, 2) == keys(ShardLoader(folder, batch_size=3, seed=0), 0, 2)


@pytest.mark.parametrize("codec", ["png", "jpg"])
@pytest.mark.parametrize("side", [5, 131])
def test_pictures_of_either_codec_and_any_size_are_as_pillow_decodes_them(tmp_path, codec, side):
    config = FilterConfig(resolutions=(side,), samples_per_shard=3, codec=codec)
    shards.write(*write_kept(tmp_path, 4, noisy), tmp_path, config)
    shard = tmp_path / f"{side:03d}"
    batch = next(ShardLoader(shard, batch_size=4, seed=0).batches(0))
    expected = {}
    for tar in shard.glob("*.tar"):
        with tarfile.open(tar) as archive:
            for one in archive:
                if one.name.endswith(codec):
                    image = Image.open(io.BytesIO(archive.extractfile(one).read()))
                    expected[one.name[:-4]] = np.array(image.convert("RGB"))
    for image_CHW, key in zip(batch.images_BCHW, batch.keys, strict=True):
        assert (image_CHW.permute(1, 2, 0).numpy() == expected[key]).all()
