"""A store may be called like a pattern: every stage reads its own files and no others."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from data.config import FilterConfig, ScoreConfig
from data.filter import run as filtering
from data.score import run as score

sys.path.append(str(Path(__file__).parents[1] / "data"))
import fake
import score_tasks as tasks


@pytest.mark.parametrize(
    ("name", "other"), [("runs [v1]", "runs v"), ("a*b?", "a bc"), ("width=3", "3")]
)
def test_scores_and_verdicts_are_those_of_their_own_folder(tmp_path, name, other):
    twin = tmp_path / other
    fake.download(twin / "download", [[[fake.row(n) for n in range(9)]]])
    score.run(twin / "scores", twin / "download", ScoreConfig(), tasks.fitted)
    root = tmp_path / name
    fake.download(root / "download", [[[fake.row(n) for n in range(5)]]])
    report = score.run(root / "scores", root / "download", ScoreConfig(), tasks.fitted)
    assert report.counts == {"scored": 5}
    config = FilterConfig(min_similarity=None, min_side=8, resolutions=(8,), samples_per_shard=5)
    report = filtering.run(root / "filtered", root / "scores", root / "download", config)
    assert report.metrics["pictures"] == 5
    assert (root / "filtered" / "sheets" / "kept.png").exists()


@pytest.mark.parametrize("name", ["runs [v1]", "a*b?", "plain"])
def test_a_resumed_download_sees_which_of_its_shards_are_done(tmp_path, monkeypatch, name):
    from data.download import collect

    monkeypatch.setattr(LocalFileSystem, "glob", LocalFileSystem.glob)
    for folder, shard in ((name, "00003"), ("runs v", "00007"), ("a bc", "00007")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{shard}_stats.json").touch()
    collect._take_literally(tmp_path / name)
    files = fsspec.filesystem("file")
    assert files.glob(f"{tmp_path / name}/*.json") == [f"{tmp_path / name}/00003_stats.json"]
    assert files.glob(f"{tmp_path}/runs v/*.json") == [f"{tmp_path}/runs v/00007_stats.json"]
