"""The filter stage as a whole, over a small download and its scores made by hand."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import demo
from data.config import FilterConfig, ScoreConfig
from data.filter import duplicates, pictures
from data.filter import run as filter_stage
from data.filter.truth import against_truth
from data.layout import ImageShard
from data.schema import FATES, SCORES
from data.score import run as score
from data.shards import write as shards
from data.shards.loader import ShardLoader

sys.path.append(str(Path(__file__).parent))  # several folders are called `tests`
import score_tasks

PER_SHARD, NUM_SHARDS = 7, 3
CONFIG = FilterConfig(min_side=30, resolutions=(8, 16), samples_per_shard=5, languages=("en",))
CLASS = ["ok", "ok", "undecodable", "small", "unlike", "copy", "unknown"]
"""What the rows of each shard are; `copy` is the first picture of the next shard, shrunk."""

PLANTED = {"unlike": "wrong_caption", "ok": "none"}


def picture(seed: int, width: int = 60, height: int = 50) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def drawn(place: int) -> Image.Image:
    kind = CLASS[place % PER_SHARD]
    if kind == "small":
        return picture(place, 33, 20)
    if kind == "copy":
        first = (place // PER_SHARD + 1) % NUM_SHARDS * PER_SHARD
        return picture(first, 48, 40)
    return picture(place)


def encoded(place: int) -> bytes:
    buffer = io.BytesIO()
    drawn(place).save(buffer, "PNG")
    broken = CLASS[place % PER_SHARD] == "undecodable"
    return buffer.getvalue()[:60] if broken else buffer.getvalue()


def score_row(place: int, key: str) -> dict:
    kind = CLASS[place % PER_SHARD]
    known = {
        "key": key, "url": f"http://a/{place}", "caption": f"thing number {place} of a long list",
        "sha256": hashlib.sha256(encoded(place)).hexdigest(), "source": "list", "row": place,
        "caption_words": 7, "caption_chars": 30,
    }  # fmt: skip
    if kind == "undecodable":
        return {**known, "error": "truncated: image file is truncated"}
    image = drawn(place)
    phash, miniature = duplicates.fingerprint(image)
    return {
        **known, "width": image.width, "height": image.height, "phash": phash,
        "miniature": miniature, "similarity": 0.0 if kind == "unlike" else 0.5, "unsafe": 0.1,
        "aesthetic": float(place), "language": None if kind == "unknown" else "en",
    }  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(scores, download): folders as the stages before leave them."""
    download, scores = tmp_path_factory.mktemp("download"), tmp_path_factory.mktemp("scores")
    (download / "fates").mkdir()
    (scores / "scores" / "00000").mkdir(parents=True)
    with pq.ParquetWriter(download / "fates" / "00000.parquet", FATES) as fates:
        for number in range(NUM_SHARDS):
            shard = ImageShard(download, 0, number)
            shard.tar.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            with tarfile.open(shard.tar, "w") as archive:
                for inner in range(PER_SHARD):
                    place = number * PER_SHARD + inner
                    rows.append(score_row(place, f"{shard.name}{inner}"))
                    data = encoded(place)
                    member = tarfile.TarInfo(shard.member(rows[-1]["key"]))
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            known = [{k: row[k] for k in ("key", "url", "caption", "sha256")} for row in rows]
            fates.write_table(pa.Table.from_pylist(known, schema=FATES))
            table = pa.Table.from_pylist(rows, schema=SCORES)
            pq.write_table(table, scores / "scores" / "00000" / f"{number:05d}.parquet")
    (download / "site").mkdir()
    truth = [
        {"url": f"http://a/{place}", "caption": f"thing number {place} of a long list",
         "defect": kind, "twin": None}
        for place in range(PER_SHARD * NUM_SHARDS)
        for kind in [PLANTED.get(CLASS[place % PER_SHARD], "other")]
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(truth), download / "site" / "truth.parquet")
    return scores, download


@pytest.fixture(scope="module")
def filtered(stages, tmp_path_factory):
    out = tmp_path_factory.mktemp("filter")
    return out, filter_stage.run(out, *stages, CONFIG)


def test_counts_add_up_from_pictures_to_samples(filtered):
    out, report = filtered
    assert report.counts == {
        "ok": 6, "undecodable": 3, "min_side": 3, "languages": 3, "min_similarity": 3,
        "near duplicate": 3,
    }  # fmt: skip
    assert [report.funnel[0].rows, report.funnel[-1].rows] == [PER_SHARD * NUM_SHARDS, 6]
    assert json.loads((out / "report.json").read_text())["counts"] == report.counts
    for side in CONFIG.resolutions:
        index = json.loads((out / "shards" / f"{side:03d}" / "index.json").read_text())
        assert index["samples"] == 6


def test_the_report_tells_thresholds_nulls_and_what_was_planted(filtered):
    _, report = filtered
    assert report.details["nulls"] == {"languages": {"dropped": 3, "without a value": 3}}
    assert report.details["thresholds"]["min_similarity"] == 0.1
    assert report.metrics["recall/wrong_caption"] == 1
    assert report.metrics["false_alarms/none"] == 0
    assert report.metrics["kept"] == 6
    assert set(report.details["histograms"]) == {"similarity", "aesthetic", "unsafe"}


def test_every_verdict_has_a_sheet_that_is_not_blank(filtered):
    out, _ = filtered
    names = {path.stem for path in (out / "sheets").glob("*.png")}
    assert names == {
        "kept", "undecodable", "min_side", "languages", "min_similarity", "near_duplicate",
    }  # fmt: skip
    for path in [out / "funnel.png", *(out / "sheets").glob("*.png")]:
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path


def test_a_duplicate_stands_left_of_the_one_it_yields_to(stages, filtered, tmp_path, monkeypatch):
    out, _ = filtered
    drawn_sheets = {}

    def noted(tiles, *, columns, title):
        drawn_sheets[title.partition(":")[0]] = tiles
        return Image.new("RGB", (3, 2))

    monkeypatch.setattr(pictures, "contact_sheet", noted)
    for name in ("verdicts", "twins"):
        (tmp_path / f"{name}.parquet").write_bytes((out / f"{name}.parquet").read_bytes())
    pictures.sheets(tmp_path, *stages)
    pairs = drawn_sheets["near duplicate"]
    assert [tile.image.size for tile in pairs] == [(48, 40), (60, 50)] * 3
    assert pairs[0].lines[1].endswith("bits apart")
    assert all(tile.image is None for tile in drawn_sheets["undecodable"])
    assert "truncated" in drawn_sheets["undecodable"][0].lines[1]
    assert drawn_sheets["languages"][0].lines[1] == "language None"
    assert drawn_sheets["min_similarity"][0].lines[1] == "similarity 0.000"


def test_another_threshold_makes_no_score_anew_and_other_shards(stages, filtered, tmp_path):
    config = CONFIG.model_copy(update={"min_similarity": None})
    report = filter_stage.run(tmp_path, *stages, config)
    assert report.counts["ok"] == 9
    first, _ = filtered
    kept = pq.read_table(first / "kept.parquet")["key"].to_pylist()
    assert set(kept) < set(pq.read_table(tmp_path / "kept.parquet")["key"].to_pylist())


def test_a_run_killed_in_the_shards_keeps_its_verdicts(stages, filtered, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            filter_stage.run(tmp_path, *stages, CONFIG)
    made = (tmp_path / "verdicts.parquet").stat().st_ino
    out, report = filtered
    assert filter_stage.run(tmp_path, *stages, CONFIG) == report
    assert (tmp_path / "verdicts.parquet").stat().st_ino == made
    for path in (out / "shards").rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / path.relative_to(out)).read_bytes()


def test_pictures_that_were_kept_and_are_damaged_are_counted(stages, tmp_path, monkeypatch):
    lost = {"a": "damaged original", "b": "undecodable original: cut", "c": "damaged original"}
    written = shards.write
    monkeypatch.setattr(shards, "write", lambda *a, **k: written(*a, **k) | lost)
    report = filter_stage.run(tmp_path, *stages, CONFIG)
    counts = (report.counts[name] for name in ("ok", "damaged original", "undecodable original"))
    assert [*counts, report.funnel[-1].rows, report.metrics["kept"]] == [3, 2, 1, 3, 3]
    assert sum(report.counts.values()) == PER_SHARD * NUM_SHARDS


@pytest.mark.parametrize(
    ("lack", "is_marked"), [("scores", True), ("scores", False), ("similarity", False)]
)
def test_scores_of_a_part_of_the_shards_are_refused_by_name(stages, tmp_path, lack, is_marked):
    scores, download = tmp_path / "s", stages[1]
    shutil.copytree(stages[0], scores)
    (scores / "embeddings" / "00000").mkdir(parents=True)
    if is_marked:
        (scores / "similarity.json").write_text('{"shards": 3}')
    path = scores / "scores" / "00000" / "00001.parquet"
    rows = pq.read_table(path)
    if lack == "scores":
        path.unlink()
    else:  # the run was ended when it filled in what is fitted to all
        (scores / "embeddings" / "00000" / "00001.parquet").touch()
        at = rows.schema.get_field_index("similarity")
        pq.write_table(rows.set_column(at, "similarity", pa.nulls(len(rows), "float")), path)
    said = "scoring is not finished: 2 of 3 shards; run `python -m data score"
    with pytest.raises(ValueError, match=said):
        filter_stage.run(tmp_path / "out", scores, download, CONFIG)
    assert not (tmp_path / "out").exists()


def test_scores_of_another_download_are_refused(stages, tmp_path):
    scores, download = tmp_path / "s", stages[1]
    shutil.copytree(stages[0], scores)
    (scores / "scores" / "00001").mkdir()
    (scores / "scores" / "00001" / "00000.parquet").touch()
    with pytest.raises(ValueError, match=r"00001/00000\.parquet is of no shard"):
        filter_stage.run(tmp_path / "out", scores, download, CONFIG)


def test_a_selection_whose_tables_are_gone_is_made_again(stages, tmp_path):
    config = CONFIG.model_copy(update={"resolutions": (8,)})
    first = filter_stage.run(tmp_path, *stages, config)
    (tmp_path / "kept.parquet").unlink()
    assert filter_stage.run(tmp_path, *stages, config) == first


def test_the_copy_of_two_twins_is_the_planted_one(tmp_path):
    truth = tmp_path / "truth.parquet"
    rows = [
        {"url": "a", "caption": "x", "defect": "none", "twin": None},
        {"url": "b", "caption": "x", "defect": "same_bytes", "twin": "a"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), truth)
    verdicts = pa.table({"url": ["a", "b", "c"], "caption": ["x"] * 3,
                         "verdict": ["same bytes", "ok", "min_side"]})  # fmt: skip
    assert against_truth(verdicts, truth) == {
        "none": {"ok": 1}, "same_bytes": {"same bytes": 1}, "unlisted": {"min_side": 1},
    }  # fmt: skip


def test_labels_reach_the_batches_of_the_embedded_source(downloaded, config, tmp_path):
    download, _ = downloaded
    held = json.loads((download / "heldout" / "captions.json").read_text())["annotations"]
    assert all(note["label"] == note["concept"] for note in held)
    score.run(tmp_path / "scores", download, ScoreConfig(), score_tasks.fitted)
    rules = FilterConfig(min_similarity=None, labels="require", resolutions=(32,))
    report = filter_stage.run(tmp_path / "out", tmp_path / "scores", download, rules)
    loader = ShardLoader(tmp_path / "out" / "shards" / "032", batch_size=2, seed=0, reads="label")
    names = {row.label for row in demo.Plan.of(config.embedded).rows}
    assert {*loader.classes} <= names
    assert (report.metrics["classes"], report.metrics["unlabelled"]) == (len(loader.classes), 0)
    assert ["labels", 0] in [[step.step, step.dropped] for step in report.funnel]
    kept = pq.read_table(tmp_path / "out" / "kept.parquet").to_pylist()
    right = [row for row in kept if row["label"] in row["caption"]]
    assert len(right) > 0.7 * len(kept)
