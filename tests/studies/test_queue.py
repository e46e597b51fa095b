import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from gigagan.common.exits import PREEMPTED
from gigagan.config import TrainBaseConfig
from gigagan.training import loop
from studies import _queue
from studies._queue import Place, Training

READINGS = {"time": 96, "images": 32}
"""Not in the order of their images."""
SECONDS = (1.0, 1.2, 9.0, 9.2, 0.5, 0.7)
"""Processor time at every 20 images; it measures after the second, and begins anew after the
fourth."""


def write_shards(folder, pictures, told="today"):
    """What is said of pictures beside them, in shards of three."""
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"told": told, "resolution": 32}))
    rows = [{"caption": f"picture {p}", "sha256": f"hash {p}", "told": told} for p in pictures]
    for start in range(0, len(rows), 3):
        table = pa.Table.from_pylist(rows[start : start + 3])
        pq.write_table(table, folder / f"train-{start:05}.parquet")


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path / "shards", tmp_path / "heldout", tmp_path / "out", tmp_path / "results")
    write_shards(place.shards, range(7))
    return place


@pytest.fixture
def trained(monkeypatch):
    """What a training was asked for; it only leaves a snapshot, and ends early if asked to."""
    asked = []

    def run(config, folder, shards, heldout, world, *, is_asked_to_stop):
        asked.append((folder.name, config.total_images, shards))
        if is_asked_to_stop():
            raise loop.Preempted("asked to stop")
        save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, folder / "snapshot.safetensors")
        lines = [{"images": 20 * i, "cpu_seconds": seconds} for i, seconds in enumerate(SECONDS)]
        text = "".join(f"{json.dumps(line)}\n" for line in [*lines, {"images": 99}])
        (folder / "metrics.jsonl").write_text(text)

    def measured(one, place, reading):
        return {"metrics": {"kid": 0.123456789}, "intervals": {}, "reference": {}}

    monkeypatch.setattr(_queue.training, "run", run)
    monkeypatch.setattr(_queue, "_measured", measured)
    return asked


def one(name="row-seed-3", **changes):
    return Training(name, {"row": "row", "seed": 3}, TrainBaseConfig(), READINGS, **changes)


def test_a_training_is_measured_at_each_reading_in_the_order_of_images(place, trained):
    _queue.train(one(), place, lambda: False)
    assert trained == [("row-seed-3", 32, place.shards), ("row-seed-3", 96, place.shards)]
    record = json.loads(place.record("row-seed-3").read_text())
    assert record["about"] == {"row": "row", "seed": 3}
    assert record["readings"]["images"]["images"] == 32
    assert record["readings"]["time"]["metrics"] == {"kid": 0.12346}
    assert record["parameters"] == 11
    assert record["milliseconds"] == pytest.approx(10)
    assert record["data"]["pictures"] == 7
    assert {"python", "torch"} <= set(record["versions"])
    assert record["readings"]["images"]["peak_mb"] > 0
    assert "peak_mb" not in record["readings"]["time"], "judges would count"
    assert record["readings"]["time"]["cpu_seconds"] >= record["readings"]["images"]["cpu_seconds"]


def test_a_training_that_was_stopped_leaves_no_record_and_goes_on_at_its_reading(place, trained):
    answers = iter([False, True, False])
    with pytest.raises(loop.Preempted):
        _queue.train(one(), place, lambda: next(answers))
    assert not place.record("row-seed-3").exists()
    _queue.train(one(), place, lambda: next(answers))
    assert [images for _, images, _ in trained] == [32, 96, 96]
    assert place.record("row-seed-3").exists()


def test_a_study_may_measure_something_else(place, trained):
    own = one(measure=lambda training, place, reading: {"loss": len(reading)})
    _queue.train(own, place, lambda: False)
    readings = json.loads(place.record("row-seed-3").read_text())["readings"]
    assert {name: reading["loss"] for name, reading in readings.items()} == {"images": 6, "time": 4}


def test_processor_time_adds_up_over_attempts(tmp_path):
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"seconds": 100.0, "noted": {"early": {"cpu_seconds": 40.0}}}))
    clock = _queue._Clock(file)
    with pytest.raises(KeyError), clock:
        raise KeyError
    assert json.loads(file.read_text())["seconds"] >= 100
    clock.note("late")
    assert clock.noted["early"] == {"cpu_seconds": 40.0}
    assert clock.noted["late"]["cpu_seconds"] >= 100


def test_pictures_of_its_own_are_a_trainings_own(place, trained, tmp_path):
    own = tmp_path / "half"
    write_shards(own, range(4))
    _queue.train(one(shards=own), place, lambda: False)
    assert {shards for _, _, shards in trained} == {own}
    assert json.loads(place.record("row-seed-3").read_text())["data"]["pictures"] == 4


def test_pictures_are_known_by_themselves_and_their_captions_not_by_their_shards(tmp_path):
    for name, pictures, told in [("a", [0, 1, 2, 3], "today"), ("b", [3, 1, 0, 2], "tomorrow")]:
        write_shards(tmp_path / name, pictures, told)
    write_shards(tmp_path / "c", [0, 1, 2, 4])
    a, b, c = (_queue.data_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a["pictures"] == c["pictures"] == 4
    assert a["resolution"] == 32
    assert a["pictures_sha256"] != c["pictures_sha256"]


def test_captions_are_encoded_once_a_study(place, trained):
    place.out.mkdir()
    (place.out / "text-features.pt").write_text("features")
    _queue.train(one(), place, lambda: False)
    assert (place.folder("row-seed-3") / "text-features.pt").read_text() == "features"


@pytest.fixture
def ran(monkeypatch):
    """Names of what `work` gave to a process, which writes a record unless its name says not."""
    names = []

    def process(command, training, place, core, seconds):
        names.append((training.name, core))
        if "unfinished" not in training.name:
            place.results.mkdir(exist_ok=True)
            place.record(training.name).write_text("{}")

    monkeypatch.setattr(_queue, "_one", process)
    return names


def test_what_has_a_record_or_is_claimed_is_left_alone(place, ran):
    queue = [one("a-seed-0"), one("b-seed-0"), one("c-seed-0")]
    place.results.mkdir()
    place.record("a-seed-0").write_text("{}")
    with _queue.claimed(place.folder("b-seed-0")) as is_ours:
        assert is_ours
        with _queue.claimed(place.folder("b-seed-0")) as is_theirs:
            assert not is_theirs
        assert not _queue.work(queue, place, (), cores=[5], minutes=None)
        assert "b-seed-0" in _queue.status(queue, place)
        assert _queue.status(queue, place).splitlines()[1].endswith("running")
    assert ran == [("c-seed-0", 5)]
    assert _queue.work(queue, place, (), cores=[5], minutes=None)
    assert ran[1:] == [("b-seed-0", 5)]


def test_several_cores_share_a_queue_without_doing_anything_twice(place, ran):
    queue = [one(f"{i}-seed-0") for i in range(12)]
    assert _queue.work(queue, place, (), cores=[0, 1, 2], minutes=None)
    assert sorted(name for name, _ in ran) == sorted(training.name for training in queue)


def test_no_training_begins_when_time_is_up(place, ran):
    assert not _queue.work([one()], place, (), cores=[0], minutes=0)
    assert ran == []


def test_a_training_that_failed_names_its_log(place, tmp_path):
    with pytest.raises(RuntimeError, match=r"row-seed-3: status 1, .*log\.txt says why"):
        _queue.work([one()], place, ("no_such_module",), cores=[0], minutes=None)
    assert "no_such_module" in (place.folder("row-seed-3") / "log.txt").read_text()


def test_a_process_that_is_stopped_says_so_by_its_status(place, trained, monkeypatch):
    monkeypatch.setattr(_queue.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(_queue.signal, "signal", lambda *_: None)
    threads = torch.get_num_threads()
    try:
        assert _queue.do_one([one()], place, "row-seed-3", 0, seconds=-1) == PREEMPTED
        assert _queue.do_one([one()], place, "row-seed-3", 0, seconds=600) == 0
    finally:
        torch.set_num_threads(threads)


def test_records_are_of_trainings_alone(tmp_path):
    (tmp_path / "cost.json").write_text("{}")
    (tmp_path / "a-seed-0.json").write_text('{"about": 1}')
    assert _queue.records(tmp_path) == [{"about": 1}]
    assert _queue.records(Path(tmp_path / "nowhere")) == []
