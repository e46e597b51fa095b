"""Score, select and shards over what the small embedded source downloads."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import filter as filter_stage
from data import score, select
from data.config import FilterConfig

CONFIG = FilterConfig(
    min_side=64, min_similarity=None, min_aesthetic=None, resolutions=(8, 16), samples_per_shard=13
)


@pytest.fixture(scope="module")
def filtered(downloaded, tmp_path_factory, encoders):
    source, _ = downloaded
    out = tmp_path_factory.mktemp("filter")
    return out, filter_stage.run(out, source, CONFIG, encoders)


def table(**columns) -> pa.Table:
    """Score rows that pass everything but for what `columns` say."""
    num_rows = len(next(iter(columns.values())))
    usual = {
        "key": [f"{i:08d}" for i in range(num_rows)],
        "url": [f"http://a/{i}" for i in range(num_rows)],
        "caption": ["a"] * num_rows,
        "sha256": [f"{i}" for i in range(num_rows)],
        "width": [100] * num_rows,
        "height": [100] * num_rows,
        "aesthetic": [50.0] * num_rows,
        "unsafe": [0.1] * num_rows,
        "similarity": [0.5] * num_rows,
        "phash": pa.array([0x1111111111111111 * (i % 15) for i in range(num_rows)], pa.uint64()),
        "miniature": [bytes(48)] * num_rows,
        "error": pa.nulls(num_rows, pa.string()),
    }
    return pa.table({**usual, **columns})


def verdicts(rows: pa.Table, **changes) -> list[str]:
    config = FilterConfig(**{"min_similarity": 0.2, **changes})
    return select.select(rows, config)["verdict"].to_pylist()


def test_counts_add_up_from_pictures_to_samples(filtered, downloaded):
    out, report = filtered
    _, before = downloaded
    assert sum(report.counts.values()) == report.funnel[0].rows == before.counts["ok"]
    assert report.counts["ok"] == pq.read_metadata(out / "kept.parquet").num_rows
    saved = json.loads((out / "report.json").read_text())
    assert saved["funnel"][-1]["rows"] == report.counts["ok"]
    assert (out / "funnel.png").stat().st_size > 5000


def test_planted_defects_that_pixels_show_are_dropped(filtered):
    _, report = filtered
    planted = report.details["planted"]
    for defect in ("truncated", "small", "long", "same_bytes"):
        assert "ok" not in planted[defect], (defect, planted[defect])
    for harmless in ("none", "sixteen_bit", "rotated"):
        assert set(planted[harmless]) <= {"ok", "near duplicate"}, planted[harmless]


def test_kept_keys_ascend_and_each_shard_set_holds_them(filtered):
    out, _ = filtered
    keys = pq.read_table(out / "kept.parquet")["key"].to_pylist()
    assert keys == sorted(set(keys))
    for side in CONFIG.resolutions:
        folder = out / "shards" / f"{side:03d}"
        index = json.loads((folder / "index.json").read_text())
        assert (index["resolution"], index["samples"]) == (side, len(keys))
        names = []
        for entry in index["shards"]:
            with tarfile.open(folder / entry["name"]) as archive:
                names += archive.getnames()
                assert {member.mtime for member in archive} == {0}
        assert sorted(names) == sorted(
            f"{k}.{kind}" for k in keys for kind in ("png", "txt", "json")
        )


def test_shards_are_the_same_to_the_byte(filtered, downloaded, tmp_path, encoders):
    out, _ = filtered
    source, _ = downloaded
    filter_stage.run(tmp_path, source, CONFIG, encoders)
    first = sorted((out / "shards").rglob("*.tar"))
    assert len(first) > 4
    for path in first:
        assert path.read_bytes() == (tmp_path / path.relative_to(out)).read_bytes()


def test_scoring_resumes_after_the_shards_that_are_done(filtered, downloaded, tmp_path, encoders):
    source, _ = downloaded
    seen = []

    def counted(images):
        seen.extend(images)
        if len(seen) > 80:
            raise KeyboardInterrupt
        return encoders.image_features(images)

    broken = replace(encoders, image_features=counted)
    with pytest.raises(KeyboardInterrupt):
        score.score(source / "images", tmp_path, broken, CONFIG)
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["00000.parquet"]
    seen.clear()
    score.score(source / "images", tmp_path, broken, CONFIG)
    whole = pq.read_table(filtered[0] / "scores.parquet")
    assert len(seen) < whole.num_rows - whole["error"].null_count + whole.num_rows // 2
    assert pq.read_table(tmp_path / "scores.parquet").equals(whole)


def test_embeddings_are_kept_in_half_precision_beside_their_keys(filtered):
    rows = pq.read_table(filtered[0] / "embeddings.parquet")
    assert rows.schema.field("image").type.value_type == pa.float16()
    scored = pq.read_table(filtered[0] / "scores.parquet", filters=[("width", ">", 0)])
    assert rows["key"].to_pylist() == scored["key"].to_pylist()


def test_a_row_is_counted_at_the_first_rule_it_breaks():
    rows = table(
        width=[100, 40, 100, 100, 100],
        height=[100, 400, 300, 100, 100],
        unsafe=[0.1, 0.9, 0.1, 0.9, 0.1],
        similarity=[0.5, 0.5, 0.5, 0.0, 0.0],
    )
    assert verdicts(rows) == ["ok", "min_side", "max_aspect", "max_unsafe", "min_similarity"]


def test_a_null_in_a_column_that_a_rule_reads_drops_the_row():
    rows = table(similarity=[0.5, None], width=[100, 100])
    assert verdicts(rows) == ["ok", "min_similarity"]
    assert verdicts(table(similarity=[0.5, None]), min_similarity=None) == ["ok", "ok"]


def test_of_near_duplicates_the_largest_stays():
    rows = table(
        phash=pa.array([0b0111, 0b0000, 0xFFFF_0000_FFFF_0000], pa.uint64()),
        width=[80, 100, 100],
        height=[80, 100, 100],
    )
    assert verdicts(rows, max_phash_distance=3) == ["near duplicate", "ok", "ok"]
    assert verdicts(rows, max_phash_distance=2) == ["ok", "ok", "ok"]


def test_equal_hashes_of_other_colours_are_no_duplicates():
    rows = table(phash=pa.array([5, 5], pa.uint64()), miniature=[bytes(48), bytes([200] * 48)])
    assert verdicts(rows) == ["ok", "ok"]


def test_bands_find_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    phash = rng.integers(0, 2**63, 150, np.uint64)
    for row in range(50, 100):  # neighbours at 0 to 7 bits
        flips = rng.choice(64, rng.integers(8), replace=False).astype(np.uint64)
        phash[row] = phash[row - 50] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
    expected, kept = [], []
    for bits in phash:
        near = any(int(bits ^ other).bit_count() <= 5 for other in kept)
        expected.append("near duplicate" if near else "ok")
        if not near:
            kept.append(bits)
    assert verdicts(table(phash=pa.array(phash)), max_phash_distance=5) == expected
    assert 20 < expected.count("near duplicate") < 50


def test_a_wrong_caption_never_pushes_out_the_right_one():
    rows = table(sha256=["x", "x"], similarity=[0.0, 0.5])
    assert verdicts(rows) == ["min_similarity", "ok"]


def test_an_empty_result_names_the_strictest_rule():
    with pytest.raises(select.NothingKeptError, match=r"none of 3.*'min_similarity'.*\(2\)"):
        verdicts(table(similarity=[0.0, 0.1, 0.5], width=[100, 100, 10]))


def test_colourfulness_is_nothing_for_gray_and_grows_with_colour():
    gray = np.full((5, 7, 3), 90, np.uint8)
    vivid = gray.copy()
    vivid[:, ::2] = (255, 0, 0)
    assert score.colourfulness(gray) == 0
    assert score.colourfulness(vivid) > 50
