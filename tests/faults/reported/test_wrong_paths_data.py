"""Every path that `python -m data` is given, and every wrong thing that may lie there.

Each is one line of error that names the thing, and leaves the folder as it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.__main__ as command
from data.config import ScoreConfig
from data.score import run as score

sys.path.append(str(Path(__file__).parents[2] / "data"))  # as the tests there
import fake
import score_tasks as tasks

from .wrong import CONTENTS as COMMON

OFF = [f"--set={name}=null" for name in ("min_side", "max_aspect", "max_unsafe", "max_watermark")]
TINY = ["--set", "min_similarity=null", "--set", "min_side=8", "--set", "resolutions=[8]"]
SCORED = ["--download", "GOOD", "--encoders", "json:dumps"]
FILTERED = ["--scores", "SCORES", "--download", "GOOD"]
COMMANDS: dict[str, list[str]] = {
    "the lists": ["metadata", "OUT", "WRONG", *OFF],
    "settings of metadata": ["metadata", "OUT", "a.csv", "--config", "WRONG"],
    "settings of download": ["download", "OUT", "--config", "WRONG", "--set", "seed=-"],
    "settings of score": ["score", "OUT", *SCORED, "--config", "WRONG"],
    "settings of filter": ["filter", "OUT", *FILTERED, "--config", "WRONG"],
    "settings of shards": ["shards", "OUT", "--download", "GOOD", "--config", "WRONG"],
    "the download to score": ["score", "OUT", "--download", "WRONG", "--encoders", "json:dumps"],
    "the scores": ["filter", "OUT", "--scores", "WRONG", "--download", "GOOD"],
    "the download to filter": ["filter", "OUT", "--scores", "SCORES", "--download", "WRONG"],
    "evaluation captions": ["filter", "OUT", *FILTERED, *TINY, "--set", "decontaminate=[WRONG]"],
    "kept rows": ["shards", "OUT", "--download", "GOOD", "--kept", "WRONG"],
    "captions of COCO": ["coco", "captions", "WRONG", "--num", "1", "--out", "OUT"],
}
FOLDERS: dict[str, list[str]] = {
    "metadata": ["metadata", "WRONG", "a.csv", *OFF],
    "download": ["download", "WRONG"],
    "score": ["score", "WRONG", *SCORED],
    "filter": ["filter", "WRONG", *FILTERED],
    "shards": ["shards", "WRONG", "--download", "GOOD"],
    "coco fetch": ["coco", "fetch", "WRONG"],
}
"""Where a folder is written."""
FILES: dict[str, list[str]] = {
    "coco captions": ["coco", "captions", "coco.json", "--num", "1", "--out", "WRONG"],
    "coco heldout": ["coco", "captions", "coco.json", "--num", "1", "--heldout", "WRONG"],
    "contact sheet": ["inspect", "GOOD", "--out", "WRONG"],
}
"""Where a file is written."""
CONTENTS = COMMON | {
    "picture.png": fake.encoded(fake.noise(1)),
    "garbage.parquet": b"PAR1" + b"\xfe\x01" * 90 + b"PAR1",
}
NO_FILES = ("missing", "folder", "link to itself", "file/below", "other.parquet")


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> tuple[Path, Path]:
    """A download and its scores."""
    root = tmp_path_factory.mktemp("stages")
    fake.download(root / "d", [[[fake.row(n) for n in range(3)]]])
    score.run(root / "s", root / "d", ScoreConfig(), tasks.pairwise)
    return root / "d", root / "s"


def make(kind: str, folder: Path) -> Path:
    """The wrong thing, under a name of its own."""
    path = folder / f"wrong {kind}"
    path.parent.mkdir(exist_ok=True, parents=True)
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "file/below":
        path.parent.rmdir()
        path.parent.write_text("a file")
    elif kind == "other.parquet":
        pq.write_table(pa.table({"x": [1]}), path)
    return path


def run(words: list[str], kind: str, stages, folder: Path, monkeypatch, capsys) -> str:
    """What one command says of the wrong thing, after it is seen that it left no trace."""
    wrong = make(kind, folder)
    monkeypatch.chdir(folder)
    (folder / "a.csv").write_text("url,caption\nhttp://127.0.0.1:9/1.jpg,a b c d\n")
    note = {"id": 1, "image_id": 1, "caption": "x"}
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [note]}
    (folder / "coco.json").write_text(json.dumps(coco))
    names = {"OUT": "out", "WRONG": str(wrong), "GOOD": str(stages[0]), "SCORES": str(stages[1])}
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}
    folders = {path for path in folder.rglob("*") if path.is_dir()}
    assert command.main(words) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: "), said
    assert said.err.count("\n") == 1, said
    assert wrong.name in said.err, said
    after = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}
    assert after == before
    assert {path for path in folder.rglob("*") if path.is_dir()} == folders
    return said.err


@pytest.mark.parametrize("kind", [*CONTENTS, *NO_FILES])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_thing_to_read_is_named_and_nothing_is_written(
    tmp_path, stages, monkeypatch, capsys, name, kind
):
    said = run(COMMANDS[name], kind, stages, tmp_path, monkeypatch, capsys)
    assert "Error: " not in said, "an error that is not written for people"


@pytest.mark.parametrize("kind", ["text", "picture.png", "link to itself", "file/below"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_where_a_folder_is_to_be_written_stays_what_it_is(
    tmp_path, stages, monkeypatch, capsys, name, kind
):
    run(FOLDERS[name], kind, stages, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["folder", "file/below"])
@pytest.mark.parametrize("name", FILES)
def test_a_folder_where_a_file_is_to_be_written_stays_what_it_is(
    tmp_path, stages, monkeypatch, capsys, name, kind
):
    run(FILES[name], kind, stages, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["missing", "folder", "link to itself", "file/below"])
def test_what_is_to_be_inspected_and_is_not_there_is_named(
    tmp_path, stages, monkeypatch, capsys, kind
):
    run(["inspect", "WRONG", "--out", "OUT.png"], kind, stages, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["garbage.parquet", "text"])
def test_damage_inside_of_a_folder_is_named(tmp_path, stages, monkeypatch, capsys, kind):
    lists = tmp_path / "out" / "lists"
    lists.mkdir(parents=True)
    (lists / "index.json").write_bytes(CONTENTS[kind])
    (tmp_path / "a.csv").write_text("url,caption\nhttp://127.0.0.1:9/1.jpg,a b c d\n")
    monkeypatch.chdir(tmp_path)
    for words in (["metadata", "out", "a.csv", *OFF], ["download", "out"]):
        assert command.main(words) == 1
        said = capsys.readouterr().err
        assert "index.json is not what `python -m data metadata` writes" in said
        assert said.count("\n") == 1
