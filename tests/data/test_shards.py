from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.config import FilterConfig
from data.originals import DamagedError
from data.schema import SCORES
from data.shards import write as shards
from data.shards.write import ShardError, ShardJob
from gigagan.common.pictures import decode, square
from tests import forks

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # several folders are called `tests`
import shard_worker  # noqa: E402
from kept_rows import key_at, member, noisy, row, shard_at, write_kept  # noqa: E402

NUM = 44
CONFIG = FilterConfig(resolutions=(5, 8), samples_per_shard=6)


def is_kept(place: int) -> bool:
    return place % 4 != 1


PLACES = [place for place in range(NUM) if is_kept(place)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(kept, download): 33 of 44 pictures, in three parts of the download."""
    return write_kept(tmp_path_factory.mktemp("source"), NUM, noisy, is_kept)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    shards.write(*source, out, CONFIG)
    return out


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def samples(tar: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for one in archive:
            key, _, kind = one.name.partition(".")
            found.setdefault(key, {})[kind] = archive.extractfile(one).read()
    return found


def all_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    index = json.loads((folder / "index.json").read_text())
    return {k: v for e in index["shards"] for k, v in samples(folder / e["name"]).items()}


def test_every_resolution_has_the_kept_keys_in_their_order_in_shards_of_one_size(whole):
    for side in (5, 8):
        folder = whole / f"{side:03d}"
        index = json.loads((folder / "index.json").read_text())
        assert (index["resolution"], index["codec"], index["samples"]) == (side, "png", 33)
        assert [e["samples"] for e in index["shards"]] == [6, 6, 6, 6, 6, 3]
        assert [*all_samples(folder)] == [key_at(place) for place in PLACES]


def test_a_sample_is_its_picture_resized_once_its_caption_and_its_provenance(whole):
    found = all_samples(whole / "008")
    for place in PLACES:
        sample = found[key_at(place)]
        expected = np.asarray(square(decode(noisy(place)), 8))
        assert (np.asarray(Image.open(io.BytesIO(sample["png"]))) == expected).all()
        assert sample["txt"].decode() == f"colour {place % 7}"
    assert json.loads(found[key_at(3)]["json"]) == {
        "key": key_at(3),
        "label": "9",
        "source": "list-0",
        "row": 103,
        "url": "http://host0.example/3.png",
        "sha256": hashlib.sha256(noisy(3)).hexdigest(),
        "picture_sha256": hashlib.sha256(found[key_at(3)]["png"]).hexdigest(),
        "width": 9,
        "height": 8,
        "similarity": 0.103,
        "aesthetic": None,
        "unsafe": 0.25,
        "watermark": None,
        "phash": "8000000000000003",
        "language": "en",
        "opt_out": {
            "checked_from": "2026-03-05T12:00:03.000+00:00",
            "checked_until": "2026-03-05T12:00:03.250+00:00",
            "honour_opt_outs": True,
            "honour_robots_txt": None,
        },
    }
    for sample in found.values():
        text = sample["json"].decode()
        assert text == json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)


def test_index_and_sidecars_tell_sizes_digests_and_where_pictures_lie(whole):
    folder = whole / "005"
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        sidecar = (folder / entry["name"]).with_suffix(".parquet")
        told = sidecar.read_bytes()
        assert len(told) == entry["index_bytes"]
        assert hashlib.sha256(told).hexdigest() == entry["index_sha256"]
        inside = samples(folder / entry["name"])
        rows = pq.read_table(sidecar).to_pylist()
        assert [r["key"] for r in rows] == [*inside]
        for r in rows:
            picture = data[r["offset"] : r["offset"] + r["size"]]
            assert picture == inside[r["key"]]["png"]
            assert r["sha256"] == hashlib.sha256(picture).hexdigest()
            assert r["caption"].encode() == inside[r["key"]]["txt"]


def test_tar_headers_know_nothing_of_this_machine_or_day(whole):
    with tarfile.open(whole / "005" / "train-00000.tar") as archive:
        for one in archive:
            assert (one.mtime, one.uid, one.gid, one.uname, one.gname) == (0, 0, 0, "", "")


@pytest.mark.parametrize("workers", [1, 3])
def test_another_run_with_any_number_of_workers_gives_the_same_bytes(
    source, whole, tmp_path, workers
):
    shards.write(*source, tmp_path, CONFIG, workers=workers)
    assert contents(tmp_path) == contents(whole)


def test_each_shard_can_be_written_alone_in_any_order(source, whole, tmp_path):
    for side in (5, 8):
        (tmp_path / f"{side:03d}").mkdir()
    for number in (4, 1):
        job = ShardJob(*source, tmp_path, number, 6 * number, 6 * number + 6, (5, 8), "png")
        shards.write_shard(job)
        for name in (f"005/train-{number:05d}.tar", f"008/train-{number:05d}.parquet"):
            assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "kill_at", ["train-00002.tar", "train-00002.parquet", "train-00005.parquet", "index.json"]
)
def test_after_a_kill_the_same_call_ends_with_the_same_bytes(source, whole, tmp_path, kill_at):
    root = source[0].parent
    arguments = (root, tmp_path, CONFIG, kill_at)
    run = forks.context.Process(target=shard_worker.write, args=arguments)
    run.start()
    run.join()
    assert run.exitcode == -9
    assert not (tmp_path / "005" / "index.json").exists()
    shards.write(*source, tmp_path, CONFIG)
    assert contents(tmp_path) == contents(whole)


def test_a_second_call_writes_nothing(source, tmp_path):
    shards.write(*source, tmp_path, CONFIG)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    seen = []
    shards.write(*source, tmp_path, CONFIG, progress=lambda *told: seen.append(told))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert seen[-1] == ("writing training shards", 33, 33)


def test_other_rows_or_settings_rewrite_what_they_change_and_leave_no_stray(source, tmp_path):
    kept, download = source
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    shards.write(*source, out, CONFIG)
    fewer = tmp_path / "fewer.parquet"
    table = pq.read_table(kept)
    pq.write_table(pa.concat_tables([table.slice(0, 13), table.slice(20)]), fewer)
    for change in ({}, {"codec": "jpg"}, {"samples_per_shard": 11}):
        config = CONFIG.model_copy(update=change)
        shards.write(fewer, download, out, config)
        anew = fresh / "-".join(["with", *change])
        shards.write(fewer, download, anew, config)
        assert contents(out) == contents(anew)


def test_jpg_pictures_keep_the_colour_of_every_pixel(source, tmp_path):
    shards.write(*source, tmp_path, CONFIG.model_copy(update={"codec": "jpg"}))
    for place, sample in zip(PLACES, all_samples(tmp_path / "008").values(), strict=True):
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert (image.format, image.layer) == ("JPEG", [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)])
        expected = np.asarray(square(decode(noisy(place)), 8)).astype(int)
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < 8


def damaged(tmp_path, change) -> tuple[Path, Path]:
    kept, download = write_kept(tmp_path, 9, noisy)
    tar = shard_at(download, 2).tar
    names = {name: data for name, data in _members(tar) if name.endswith(".jpg")}
    change(names, shard_at(download, 2).member(key_at(2)))
    with tarfile.open(tar, "w") as archive:
        for name, data in names.items():
            archive.addfile(*member(name, data))
    return kept, download


def _members(tar: Path):
    with tarfile.open(tar) as archive:
        for one in archive:
            yield one.name, archive.extractfile(one).read()


def lose(names, name):
    del names[name]


def break_off(names, name):
    names[name] = names[name][:-40]


def swap(names, name):
    names[name] = noisy(500)


@pytest.mark.parametrize("change", [lose, break_off, swap])
def test_a_picture_that_is_gone_or_another_costs_itself_until_it_is_back(tmp_path, change):
    kept, download = damaged(tmp_path, change)
    out = tmp_path / "out"
    assert shards.write(kept, download, out, CONFIG) == {key_at(2): "damaged original"}
    for side in ("005", "008"):
        index = json.loads((out / side / "index.json").read_text())
        assert [e["samples"] for e in index["shards"]] == [5, 3]
        assert index["samples"] == 8
        assert [*all_samples(out / side)] == [key_at(p) for p in range(9) if p != 2]
    assert shards.write(kept, download, out, CONFIG) == {key_at(2): "damaged original"}
    for name in ("mended", "fresh"):
        write_kept(tmp_path / name, 9, noisy)
    whole = tmp_path / "mended" / "download"
    assert shards.write(kept, whole, out, CONFIG) == {}
    shards.write(kept, whole, tmp_path / "fresh", CONFIG)
    assert contents(out) == {
        name: data
        for name, data in contents(tmp_path / "fresh").items()
        if name.startswith(("005", "008"))
    }


def test_a_training_shard_without_any_picture_left_is_not_there(tmp_path):
    kept, download = damaged(tmp_path, lose)
    config = CONFIG.model_copy(update={"samples_per_shard": 1})
    shards.write(kept, download, tmp_path / "out", config)
    index = json.loads((tmp_path / "out" / "005" / "index.json").read_text())
    assert (index["samples"], len(index["shards"])) == (8, 8)
    assert "train-00002.tar" not in {path.name for path in (tmp_path / "out" / "005").iterdir()}


def test_kept_pictures_that_no_longer_decode_cost_themselves_however_many(tmp_path):
    def picture(place: int) -> bytes:
        return noisy(place)[:-40] if place in (2, 3) else noisy(place)

    kept, download = write_kept(tmp_path, 5, picture)
    lost = shards.write(kept, download, tmp_path / "out", CONFIG)
    assert [*lost] == [key_at(2), key_at(3)]  # to fetch them again would not help
    assert all(why.startswith("undecodable original: truncated: ") for why in lost.values())
    assert len(all_samples(tmp_path / "out" / "008")) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_image_shard_is_an_error_with_its_remedy(tmp_path, workers):
    kept, download = write_kept(tmp_path, 9, noisy)
    shard_at(download, 8).tar.unlink()
    with pytest.raises(DamagedError, match=rf"2 of 9 .*{key_at(7)}\).*data download .* --verify"):
        shards.write(kept, download, tmp_path / "out", CONFIG, workers=workers)
    assert not (tmp_path / "out" / "005" / "index.json").exists()


class _Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def test_a_pickle_among_the_downloads_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept, download = write_kept(tmp_path, 5, noisy)
    with tarfile.open(shard_at(download, 0).tar, "a") as archive:
        archive.addfile(*member("000000.pkl", pickle.dumps(_Trap())))
        archive.addfile(*member("../../evil.jpg", noisy(7)))
    shards.write(kept, download, tmp_path / "out", CONFIG)
    assert not (tmp_path / "trapped").exists()
    assert not [*tmp_path.parent.rglob("evil*")]
    assert len(all_samples(tmp_path / "out" / "005")) == 5


@pytest.mark.parametrize("key", ["../evil", "0000000000/", "a.b", ""])
def test_a_key_that_could_be_a_path_is_refused(tmp_path, key):
    table = pa.Table.from_pylist([{**row(0, b"", "x"), "key": key}], SCORES)
    pq.write_table(table, tmp_path / "kept.parquet")
    job = ShardJob(tmp_path / "kept.parquet", tmp_path, tmp_path, 0, 0, 1, (8,), "png")
    with pytest.raises(ShardError, match="none of ours"):
        shards.write_shard(job)


def test_unsorted_rows_are_refused(tmp_path):
    table = pa.Table.from_pylist([row(place, b"", "x") for place in (3, 2)], SCORES)
    pq.write_table(table, tmp_path / "kept.parquet")
    job = ShardJob(tmp_path / "kept.parquet", tmp_path, tmp_path, 0, 0, 2, (8,), "png")
    with pytest.raises(ShardError, match="do not ascend: sort it by key"):
        shards.write_shard(job)


def test_a_shard_reads_only_its_rows_of_a_long_table(tmp_path):
    kept = tmp_path / "kept.parquet"
    row_at = row(0, b"", "x")
    names = [f"{i:013d}" for i in range(70_000)]
    table = pa.Table.from_pylist([row_at] * len(names), SCORES)
    table = table.set_column(0, "key", pa.array(names))
    for size in (70_000, 999):
        pq.write_table(table, kept, row_group_size=size)
        job = ShardJob(kept, tmp_path, tmp_path, 0, 50_000, 50_007, (8,), "png")
        assert [r["key"] for r in shards._rows(job)] == names[50_000:50_007]
