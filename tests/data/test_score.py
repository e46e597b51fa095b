from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.config import ScoreConfig
from data.executor import TaskError
from data.layout import image_shards
from data.originals import DamagedError
from data.schema import SCORES
from data.score import run as score
from data.score.language import language
from data.score.shard import colourfulness
from gigagan.common import decoders
from tests import forks

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # workers import by name, and other packages are called `tests`
import bombs  # noqa: E402
import fake  # noqa: E402
import score_tasks as tasks  # noqa: E402

CONFIG = ScoreConfig(batch_size=3, take_over=("watermark",))


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory) -> Path:
    """Two parts of three and two shards, 5 to 7 rows each, some of them failed or broken."""
    number = iter(range(1000))
    rows = [
        [[fake.row(next(number)) for _ in range(size)] for size in sizes]
        for sizes in ((7, 5, 6), (5, 7))
    ]
    rows[0][0][2] = fake.row(2, None)
    rows[0][0][3] |= {"watermark": 0.25, "unsafe": 0.125, "aesthetic": 5.5, "phash": 2**63 + 5}
    rows[0][0][3] |= {"similarity_b32": 0.375, "similarity_l14": 0.3125}
    rows[0][1][1] = fake.row(8, b"<html>gone")
    rows[0][1][4] = fake.row(11, fake.encoded(fake.noise(11))[:90])
    rows[1][0] = [fake.row(next(number), None) for _ in range(5)]
    rows[1][1][0] = fake.row(30, fake.encoded(fake.noise(30, (90, 50)), "JPEG"), caption="")
    rows[1][1][1]["caption"] = "ein rotes Fahrrad lehnt an der Wand"
    return fake.download(tmp_path_factory.mktemp("download"), rows)


@pytest.fixture(scope="module")
def scored(downloaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    return out, score.run(out, downloaded, CONFIG, tasks.fitted)


def table(out: Path, name: str = "scores"):
    return pq.ParquetDataset(out / name).read().sort_by("key")


def rows(out: Path, name: str = "scores") -> dict[str, dict]:
    return {one["key"]: one for one in table(out, name).to_pylist()}


def test_every_ok_row_has_one_row_of_scores_sorted_by_key_in_its_shard(scored, downloaded):
    out, report = scored
    assert (
        report.counts
        == {
            "scored": 22,
            "undecodable: not a picture": 1,
            "undecodable: truncated": 1,
        }
        or sum(report.counts.values()) == 24
    )
    expected = []
    for shard in image_shards(downloaded):
        fates = shard.fates().to_pylist()
        keys = [one["key"] for one in fates if one["fate"] == "ok"]
        file = out / "scores" / f"{shard.part:05d}" / f"{shard.number:05d}.parquet"
        found = pq.read_table(file)
        assert found.schema.equals(SCORES)
        assert found["key"].to_pylist() == keys
        expected += keys
    assert list(rows(out)) == expected
    assert json.loads((out / "report.json").read_text())["counts"] == report.counts


def test_pictures_and_captions_are_joined_by_key_though_tars_are_in_another_order(scored):
    for one in rows(scored[0]).values():
        number = one["row"]
        if number in (8, 11):
            continue
        assert one["url"].endswith(f"/{number}.png")
        if number != 30:
            image = fake.noise(number)
            assert one["phash"] == int(str(imagehash.phash(image)), 16)
            assert one["aesthetic"] == pytest.approx(colourfulness(image), rel=1e-5)
            assert one["unsafe"] == pytest.approx(image.getpixel((0, 0))[0] / 255)
            assert (one["width"], one["height"]) == image.size
        assert len(one["caption"]) == one["caption_chars"]


def test_generated_is_null_unless_a_detector_was_given_and_then_of_decodable_pictures(
    scored, downloaded, tmp_path
):
    assert {one["generated"] for one in rows(scored[0]).values()} == {None}
    score.run(tmp_path, downloaded, CONFIG, tasks.detecting)
    for one in rows(tmp_path).values():
        expected = None if one["error"] else pytest.approx(1 - one["unsafe"])
        assert one["generated"] == expected


def test_an_undecodable_picture_keeps_its_row_with_the_reason_and_without_scores(scored):
    by_row = {one["row"]: one for one in rows(scored[0]).values()}
    assert by_row[8]["error"].startswith("not a picture: ")
    assert by_row[11]["error"].startswith("truncated: ")
    for number in (8, 11):
        seen = ("width", "height", "phash", "miniature", "similarity", "aesthetic", "unsafe")
        assert [by_row[number][name] for name in seen] == [None] * len(seen)
        assert by_row[number]["caption_words"] == 6
    whole = [one for one in by_row.values() if one["error"] is None]
    assert all(one["similarity"] is not None for one in whole)


def test_what_metadata_brings_is_taken_over_and_only_that(scored, downloaded, tmp_path):
    (one,) = (one for one in rows(scored[0]).values() if one["row"] == 3)
    assert (one["watermark"], one["listed_phash"]) == (0.25, 2**63 + 5)
    assert one["unsafe"] != 0.125
    taken = ("similarity_l14", "unsafe", "watermark", "aesthetic")
    config = ScoreConfig(batch_size=4, take_over=taken, language=False)
    score.run(tmp_path, downloaded, config, lambda worker: score.Encoders())
    found = rows(tmp_path)
    (one,) = (one for one in found.values() if one["row"] == 3)
    values = (one["similarity"], one["unsafe"], one["watermark"], one["aesthetic"])
    assert values == (0.3125, 0.125, 0.25, 5.5)
    assert one["phash"] is not None
    assert one["language"] is None
    assert sum(one["similarity"] is not None for one in found.values()) == 1
    assert not list((tmp_path / "embeddings").rglob("*.parquet"))


def test_embeddings_are_half_precision_and_carry_their_keys(scored):
    found = rows(scored[0], "embeddings")
    seen = {key: one for key, one in rows(scored[0]).items() if one["error"] is None}
    assert found.keys() == seen.keys()
    for key, one in seen.items():
        if one["row"] == 30:
            continue
        expected = tasks.image_features([fake.noise(one["row"])])[0].astype(np.float16)
        np.testing.assert_array_equal(np.float16(found[key]["image"]), expected)
        assert found[key]["text"][0] == len(one["caption"])
    assert str(table(scored[0], "embeddings").schema.field("image").type.value_type) == "halffloat"


def test_a_fitted_similarity_sees_all_pairs_in_the_order_of_keys(scored):
    found = rows(scored[0])
    embeddings = table(scored[0], "embeddings")
    images_ND = np.stack(embeddings["image"].to_numpy())
    expected = tasks.fit_similarity(images_ND, np.zeros((len(images_ND), 1)))
    similarity = [found[key]["similarity"] for key in embeddings["key"].to_pylist()]
    np.testing.assert_allclose(similarity, expected, rtol=1e-5, atol=1e-6)


def test_a_similarity_of_pairs_and_an_aesthetic_of_embeddings_are_scored_by_shard(
    downloaded, tmp_path
):
    config = ScoreConfig(encoder="open_clip:ViT-L-14/openai", aesthetic="laion-v2", batch_size=4)
    score.run(tmp_path, downloaded, config, tasks.pairwise)
    embeddings = rows(tmp_path, "embeddings")
    for key, one in rows(tmp_path).items():
        if one["error"] is None:
            features = np.float32(embeddings[key]["image"])
            assert one["similarity"] == pytest.approx(features[0] + len(one["caption"]), rel=1e-3)
            assert one["aesthetic"] == pytest.approx(features.sum(), rel=1e-3)


def test_captions_have_a_language_words_and_characters(scored):
    by_row = {one["row"]: one for one in rows(scored[0]).values()}
    assert (by_row[30]["language"], by_row[30]["caption_words"]) == (None, 0)
    german = next(one for one in by_row.values() if one["caption"].startswith("ein rotes"))
    assert (german["language"], german["caption_words"], german["caption_chars"]) == ("de", 7, 35)
    assert by_row[4]["language"] == "en"
    assert scored[1].details["languages"][""] == 1
    assert language("2048 × 1024") is None


def test_histograms_count_every_score(scored):
    histograms = scored[1].details["histograms"]
    assert sum(histograms["similarity"]["counts"]) == scored[1].counts["scored"]
    assert sum(histograms["watermark"]["counts"]) == 1
    values = np.array([o["aesthetic"] for o in rows(scored[0]).values() if not o["error"]])
    expected, _ = np.histogram(values, bins=40)
    assert np.abs(np.array(histograms["aesthetic"]["counts"]) - expected).sum() <= 4  # at edges
    assert len(histograms["aesthetic"]["edges"]) == 41


def test_a_second_run_scores_nothing_again(scored, downloaded):
    out, report = scored
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}

    def no_encoders(worker):
        raise AssertionError

    assert score.run(out, downloaded, CONFIG, no_encoders) == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == before


def test_workers_batches_and_a_killed_worker_change_no_byte(scored, downloaded, tmp_path):
    out, report = scored
    config = CONFIG.model_copy(update={"batch_size": 5})
    killer = tasks.Killed(tmp_path / "once")
    assert score.run(tmp_path / "out", downloaded, config, killer, workers=2) == report
    assert (tmp_path / "once").exists()
    for path in out.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(out)).read_bytes()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_where_it_stopped(scored, downloaded, tmp_path, workers):
    out, report = scored
    arguments = (tmp_path / "out", downloaded, CONFIG, tasks.Slow(tmp_path / "mark"))
    run = forks.context.Process(target=score.run, args=arguments, kwargs={"workers": workers})
    run.start()
    while not list((tmp_path / "out").glob("scores/*/*.parquet")):
        assert run.is_alive()
        time.sleep(0.02)
    run.kill()
    run.join()
    time.sleep(0.2)  # its workers end with it
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("embeddings/*/*.parquet")}
    assert len(done) < len(list((out / "embeddings").rglob("*.parquet")))
    assert score.run(tmp_path / "out", downloaded, CONFIG, tasks.fitted) == report
    assert table(tmp_path / "out").equals(table(out))
    assert table(tmp_path / "out", "embeddings").equals(table(out, "embeddings"))
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_interrupted_fit_is_done_anew_as_a_whole(scored, downloaded, tmp_path, monkeypatch):
    out, report = scored
    fill_in, filled = score._fill_in, []

    def interrupted(path, *arguments):
        if len(filled) == 2:
            raise KeyboardInterrupt
        filled.append(path)
        fill_in(path, *arguments)

    monkeypatch.setattr(score, "_fill_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score.run(tmp_path, downloaded, CONFIG, tasks.fitted)
    monkeypatch.undo()
    assert table(tmp_path)["similarity"].null_count > table(out)["similarity"].null_count
    assert score.run(tmp_path, downloaded, CONFIG, tasks.fitted) == report
    assert table(tmp_path).equals(table(out))


def test_a_fit_to_too_many_pictures_is_refused(downloaded, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "MAX_FITTED", 10)
    with pytest.raises(ValueError, match=r"at most 10.*open_clip:"):
        score.run(tmp_path, downloaded, CONFIG, tasks.fitted)


def flip(tar: Path, name: str) -> None:
    """One bit in the middle of a member."""
    with tarfile.open(tar) as archive:
        member = archive.getmember(name)
    data = bytearray(tar.read_bytes())
    data[member.offset_data + member.size // 2] ^= 1
    tar.write_bytes(data)


def test_a_damaged_picture_is_a_row_and_is_scored_once_it_is_whole(scored, downloaded, tmp_path):
    root = shutil.copytree(downloaded, tmp_path / "download")
    first, *_ = image_shards(root)
    flip(first.tar, "000004.jpg")
    report = score.run(tmp_path / "out", root, CONFIG, tasks.fitted)
    assert (report.counts["damaged"], report.counts["scored"]) == (1, 21)
    assert sum(report.counts.values()) == 24
    assert report.funnel[1] == ("damaged", 1, 23)
    found = rows(tmp_path / "out")["00000000004"]
    assert found["error"] == "damaged: gone, or not the bytes that were downloaded"
    assert (found["width"], found["phash"], found["similarity"]) == (None, None, None)
    (whole, *_) = image_shards(downloaded)
    shutil.copy(whole.tar, first.tar)
    kept = (tmp_path / "out" / "embeddings" / "00000" / "00001.parquet").stat().st_mtime_ns
    assert score.run(tmp_path / "out", root, CONFIG, tasks.fitted) == scored[1]
    assert table(tmp_path / "out").equals(table(scored[0]))
    other = tmp_path / "out" / "embeddings" / "00000" / "00001.parquet"
    assert other.stat().st_mtime_ns == kept


@pytest.mark.parametrize("damage", ["another tar", "no tar", "cut tar"])
def test_more_damage_than_a_few_pictures_is_an_error_with_its_remedy(downloaded, tmp_path, damage):
    root = shutil.copytree(downloaded, tmp_path / "download")
    first, second, *_ = image_shards(root)
    if damage == "another tar":
        shutil.copy(second.tar, first.tar)
    elif damage == "no tar":
        first.tar.unlink()
    else:
        os.truncate(first.tar, 600)
    with pytest.raises(DamagedError, match=r"6 of 24 .*00000000000\).*data download .* --verify"):
        score.run(tmp_path / "out", root, CONFIG, tasks.fitted)
    assert len(rows(tmp_path / "out")) == 24
    assert not (tmp_path / "out" / score.FITTED).exists()  # it is not done


def test_a_picture_that_takes_too_long_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "shared", lambda: quick)
    quick = decoders.Decoders(seconds=0.4)
    slow = bombs.gif_of_comments(400_000)
    scans = bombs.progressive_bomb(800, 800, 4000)
    shards = [[[fake.row(0), fake.row(1, slow), fake.row(2, scans)]]]
    root = fake.download(tmp_path / "in", shards)
    report = score.run(tmp_path / "out", root, CONFIG, tasks.pairwise)
    quick.close()
    kinds = dict.fromkeys(["undecodable: too many scans", "undecodable: too slow"], 1)
    assert report.counts == {"scored": 1, **kinds}
    errors = [one["error"] for one in rows(tmp_path / "out").values()]
    assert errors == [
        None,
        "too slow: more than 0.4 s of a processor",
        "too many scans: 4,000, at most 100 are decoded",
    ]


def test_an_unfinished_download_is_refused(downloaded, tmp_path):
    root = shutil.copytree(downloaded, tmp_path / "download")
    (root / "fates" / "00001.parquet").unlink()
    with pytest.raises(ValueError, match="1 of 2 parts have their fates"):
        score.run(tmp_path / "out", root, CONFIG, tasks.fitted)


def test_encoders_that_cannot_give_a_similarity_are_refused(downloaded, tmp_path):
    with pytest.raises(ValueError, match="either similarity or fit_similarity"):
        score.Encoders(tasks.image_features, tasks.text_features)
    with pytest.raises(TaskError, match="no image_features"):
        score.run(tmp_path, downloaded, CONFIG, lambda worker: score.Encoders())


def test_great_and_very_long_pictures_reach_encoders_reduced_but_keep_their_size(tmp_path):
    seen = []

    def features(images):
        seen.extend(image.size for image in images)
        return tasks.image_features(images)

    def encoders(worker):
        return score.Encoders(features, tasks.text_features, tasks.similarity)

    large = fake.encoded(fake.noise(1, (1700, 1300)), "JPEG")
    long = fake.encoded(fake.noise(2, (5000, 400)))
    root = fake.download(tmp_path / "in", [[[fake.row(0, large), fake.row(1, long)]]])
    score.run(tmp_path / "out", root, CONFIG, encoders)
    assert sorted(seen) == [(850, 650), (1536, 123)]
    sizes = [(one["width"], one["height"]) for one in rows(tmp_path / "out").values()]
    assert sizes == [(1700, 1300), (5000, 400)]


def test_colourfulness_is_nothing_for_gray_and_grows_with_colour():
    gray = Image.new("RGB", (7, 5), (90, 90, 90))
    vivid = gray.copy()
    vivid.paste((255, 0, 0), (0, 0, 3, 5))
    assert colourfulness(gray) == 0
    assert colourfulness(vivid) > 50
