"""Verdicts on small tables of scores, one file per shard as the score stage leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.config import FilterConfig
from data.filter import duplicates, select
from data.filter.rules import RULES, UnscoredError
from data.look.tables import describe_tables
from data.schema import SCORES

ROWS_A_FILE = 4


def table(**columns) -> pa.Table:
    """Score rows that pass everything but for what `columns` say."""
    num = len(next(iter(columns.values())))
    usual = {
        "key": [f"00000{row // ROWS_A_FILE:05d}{row % ROWS_A_FILE}" for row in range(num)],
        "url": [f"http://a/{row}" for row in range(num)],
        "caption": ["a thing"] * num,
        "sha256": [f"{row:064x}" for row in range(num)],
        "width": [100] * num,
        "height": [100] * num,
        "aesthetic": [50.0] * num,
        "unsafe": [0.1] * num,
        "similarity": [0.5] * num,
        "phash": [0x1111111111111111 * (row % 15) ^ row // 15 * 0xFF0 for row in range(num)],
        "miniature": [bytes(48)] * num,
    }
    given = {**usual, **columns}
    nothing = [None] * num
    return pa.table([pa.array(given.get(f.name, nothing), f.type) for f in SCORES], schema=SCORES)


def write(rows: pa.Table, scores: Path) -> Path:
    """The rows as files of ROWS_A_FILE rows below `scores`."""
    folder = scores / "scores" / "00000"
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, rows.num_rows, ROWS_A_FILE):
        part = rows.slice(start, ROWS_A_FILE)
        pq.write_table(part, folder / f"{start // ROWS_A_FILE:05d}.parquet")
    return scores


def embed(scores: Path, rows: pa.Table, vectors: np.ndarray, places) -> None:
    """Embeddings of these rows, of all in one file."""
    folder = scores / "embeddings" / "00000"
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.array(list(vectors.astype(np.float16)), pa.list_(pa.float16()))
    keys = rows["key"].take(pa.array(places))
    pq.write_table(pa.table({"key": keys, "image": image}), folder / "00000.parquet")


@pytest.fixture
def chosen(tmp_path):
    """rows, settings → (verdicts, selection) of a fresh selection."""
    number = iter(range(100))

    def choose(rows: pa.Table, **settings):
        folder = tmp_path / f"run[{next(number)}] it's"
        config = FilterConfig(**{"min_similarity": 0.2, **settings})
        found = select.select(folder / "out", write(rows, folder / "in"), config)
        verdicts = pq.read_table(folder / "out" / "verdicts.parquet")
        assert verdicts["key"].to_pylist() == sorted(rows["key"].to_pylist())
        return verdicts["verdict"].to_pylist(), found

    return choose


def test_a_row_is_counted_at_the_first_rule_it_breaks(chosen):
    rows = table(
        width=[100, 40, 100, 100, 100, None],
        height=[100, 400, 300, 100, 100, None],
        unsafe=[0.1, 0.9, 0.1, 0.9, 0.1, None],
        similarity=[0.5, 0.5, 0.5, 0.0, 0.0, None],
        error=[None, None, None, None, None, "truncated"],
    )
    verdicts, found = chosen(rows)
    expected = ["ok", "min_side", "max_aspect", "max_unsafe", "min_similarity", "undecodable"]
    assert verdicts == expected
    assert found.counts == dict.fromkeys(expected, 1)
    assert found.missing == {}


@pytest.mark.parametrize(
    ("column", "values", "settings", "expected"),
    [
        ("watermark", [0.3, 0.7, None], {"max_watermark": 0.5}, ["ok", "max_watermark"]),
        ("language", ["en", "de", None], {"languages": ("en", "fr")}, ["ok", "languages"]),
        ("aesthetic", [5.0, 4.5, None], {"min_aesthetic": 5}, ["ok", "min_aesthetic"]),
        ("aesthetic", [5.0, 4.5, None], {"top_aesthetic": 0.5}, ["ok", "top_aesthetic"]),
        ("similarity", [0.5, 0.1, None], {"top_similarity": 0.5}, ["ok", "min_similarity"]),
        ("similarity", [0.5, 0.3, float("nan")], {"min_similarity": 0.4}, ["ok", "min_similarity"]),
    ],
)
def test_a_null_in_a_column_that_a_rule_reads_breaks_it_and_is_counted_apart(
    chosen, column, values, settings, expected
):
    verdicts, found = chosen(table(**{column: values}), **settings)
    assert verdicts == [*expected, expected[-1]]
    assert found.missing == {expected[-1]: 1}
    verdicts, _ = chosen(table(**{column: values}), min_similarity=None)
    assert verdicts == ["ok"] * 3


def test_labels_are_kept_or_required(chosen):
    rows = table(label=["cat", None, "dog"])
    assert chosen(rows)[0] == ["ok"] * 3
    verdicts, found = chosen(rows, labels="require")
    assert verdicts == ["ok", "labels", "ok"]
    assert (found.counts["labels"], found.missing) == (1, {"labels": 1})
    assert found.thresholds["labels"] == "require"
    steps = select.funnel(found.counts, FilterConfig(labels="require"))
    assert ("labels", 1, 2) in steps
    assert "labels" not in [s.step for s in select.funnel({"ok": 3}, FilterConfig())]


def test_requiring_labels_where_there_are_none_names_the_remedy(chosen):
    why = "filter.labels is require, but none of the 2.*has a 'label'.*columns.label.*to keep"
    with pytest.raises(UnscoredError, match=why):
        chosen(table(label=[None, None]), labels="require")


CAPTIONS = [
    "a red bicycle by the wall", "caption " * 40, "two words", "No no NO no no no", "word",
    "word " * 5,
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value", "dropped"),
    [
        ("min_caption_words", 2, [4]),
        ("max_caption_words", 6, [1]),
        ("min_caption_chars", 9, [4]),
        ("max_caption_chars", 25, [1]),
        ("min_distinct_words", 0.3, [1, 3, 5]),
        ("min_distinct_words", 0.1, [1]),
    ],
)
def test_captions_are_judged_by_length_and_repetition_where_that_is_set(
    chosen, setting, value, dropped
):
    captions = [caption.strip() for caption in CAPTIONS]
    rows = table(
        caption=captions,
        caption_words=[len(caption.split()) for caption in captions],
        caption_chars=[len(caption) for caption in captions],
    )
    assert chosen(rows)[0] == ["ok"] * len(captions)
    verdicts, found = chosen(rows, **{setting: value})
    assert [place for place, verdict in enumerate(verdicts) if verdict == setting] == dropped
    assert found.counts == {"ok": len(captions) - len(dropped), setting: len(dropped)}
    assert found.thresholds[setting] == value


def test_empty_captions_and_such_with_control_characters_are_dropped_whatever_is_set(chosen):
    broken = [None, "", " \t\n\u3000\xa0", "a\0b", "\x1b[31mred", "del\x7f", "c1 \x9b"]
    good = ["line\nbreak\ttab", "😀 é\u200d", "中文"]
    verdicts, found = chosen(table(caption=[*broken, *good]))
    assert verdicts == ["broken caption"] * len(broken) + ["ok"] * len(good)
    assert "broken caption" not in found.thresholds


def test_a_look_at_scores_tells_how_long_captions_are_and_how_many_are_broken(tmp_path):
    rows = table(caption=["two words", "a\0b", "", "x"], caption_words=[2, None, 0, 1])
    path = tmp_path / "a.parquet"
    pq.write_table(rows, path)
    told = [" ".join(line.split()) for line in describe_tables([path]).splitlines()]
    assert "caption string 2 empty or with control characters" in told
    assert "caption_words int32 1 null 0 to 2" in told


def test_bounds_on_captions_that_nothing_fulfils_are_refused():
    with pytest.raises(ValueError, match="min_caption_words is 5 and max_caption_words 3"):
        FilterConfig(min_caption_words=5, max_caption_words=3)


def test_nothing_kept_for_want_of_pictures_names_no_setting(chosen):
    with pytest.raises(select.NothingKeptError, match=r"'undecodable' dropped most \(2\): look"):
        chosen(table(error=["cut", "cut"]))


def test_a_changed_picture_goes_and_one_without_a_listed_hash_stays(chosen):
    rows = table(phash=[0, 1 << 40, 1 << 63], listed_phash=[0b111, 0b11, None])
    verdicts, _ = chosen(rows, max_phash_change=2, max_phash_distance=None)
    assert verdicts == ["max_phash_change", "max_phash_change", "ok"]
    verdicts, _ = chosen(rows, max_phash_change=3, max_phash_distance=None)
    assert verdicts == ["ok"] * 3
    verdicts, _ = chosen(rows, max_phash_change=None, max_phash_distance=None)
    assert verdicts == ["ok"] * 3


def test_a_score_equal_to_a_threshold_passes_although_scores_are_float32(chosen):
    rows = table(unsafe=[0.8, 0.80001, 0.1], similarity=[0.1, 0.5, 0.09999])
    verdicts, found = chosen(rows, max_unsafe=0.8, min_similarity=0.1)
    assert verdicts == ["ok", "max_unsafe", "min_similarity"]
    assert found.thresholds["max_unsafe"] == 0.8


def test_a_share_keeps_just_that_many_of_the_scored_pictures(chosen):
    similarity = (np.random.default_rng(0).permutation(23) / 100).tolist()
    similarity[3] = None
    errors = [None] * 22 + ["broken"]
    rows = table(similarity=similarity, error=errors)
    verdicts, found = chosen(rows, top_similarity=0.3, min_similarity=None, max_phash_distance=None)
    assert verdicts.count("ok") == round(0.3 * 21)
    least = found.thresholds["top_similarity"]["least"]
    kept = [s for s, verdict in zip(similarity, verdicts, strict=True) if verdict == "ok"]
    assert min(kept) == pytest.approx(least)
    assert sorted(s for s in similarity[:22] if s is not None)[-6:] == sorted(kept)


def test_ties_at_the_edge_of_a_share_all_pass(chosen):
    rows = table(similarity=[0.9, 0.5, 0.5, 0.5, 0.3])
    verdicts, _ = chosen(rows, top_similarity=0.4)
    assert verdicts == ["ok", "ok", "ok", "ok", "top_similarity"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_watermark": 0.5}, r"max_watermark is 0\.5.*of the 3.*'watermark': name watermark"),
        ({"languages": ("en",)}, r"filter\.languages.*score\.language"),
        ({"min_duplicate_cosine": 0.9}, r"min_duplicate_cosine is 0\.9.*no embedding"),
        ({"decontaminate": ("x",), "max_phash_distance": None}, r"max_phash_distance is null"),
    ],
)
def test_a_rule_on_what_was_never_scored_names_setting_and_remedy(chosen, settings, text):
    with pytest.raises((UnscoredError, ValueError), match=text):
        chosen(table(width=[100, 101, 102]), **settings)


def test_the_default_rule_on_unsafe_pictures_is_an_error_where_none_is_scored(chosen):
    with pytest.raises(UnscoredError, match=r"max_unsafe is 0\.8.*score\.nsfw.*take_over"):
        chosen(table(unsafe=[None, None]))
    assert chosen(table(unsafe=[None, None]), max_unsafe=None)[0] == ["ok", "ok"]


def test_no_scores_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(UnscoredError, match=r"no scores in .*scores: score"):
        select.select(tmp_path / "out", tmp_path, FilterConfig())


def test_of_equal_bytes_the_first_stays_and_of_near_duplicates_the_largest(chosen):
    rows = table(
        sha256=["a", "a", "b", "c", "d"],
        phash=[0, 0, 0xFF00FF00, 0xFF00FF01, 0xFF00FF11],
        width=[100, 100, 80, 100, 90],
    )
    verdicts, _ = chosen(rows, max_phash_distance=1)
    assert verdicts == ["ok", "same bytes", "near duplicate", "ok", "near duplicate"]
    verdicts, _ = chosen(rows, max_phash_distance=None)
    assert verdicts == ["ok", "same bytes", "ok", "ok", "ok"]


def test_twins_name_who_each_duplicate_yields_to(tmp_path):
    rows = table(
        sha256=["a", "b", "a", "c"], phash=[0, 255 << 30, 0, 255 << 30], width=[100, 90, 100, 99]
    )
    select.select(tmp_path / "out", write(rows, tmp_path / "in"), FilterConfig())
    keys = rows["key"].to_pylist()
    twins = pq.read_table(tmp_path / "out" / "twins.parquet").to_pylist()
    assert twins == [{"key": keys[1], "twin": keys[3]}, {"key": keys[2], "twin": keys[0]}]


def test_equal_hashes_of_other_colours_are_no_duplicates(chosen):
    rows = table(phash=[5, 5], miniature=[bytes(48), bytes([200] * 48)])
    assert chosen(rows)[0] == ["ok", "ok"]
    assert chosen(rows, max_colour_distance=200)[0] == ["ok", "near duplicate"]


def test_a_wrong_caption_never_pushes_out_the_right_one(chosen):
    rows = table(sha256=["x", "x", "y"], similarity=[0.0, 0.5, 0.1], phash=[1, 1, 1])
    assert chosen(rows)[0] == ["min_similarity", "ok", "min_similarity"]


def test_rows_without_hash_or_digest_break_the_rules_that_compare_them(chosen):
    rows = table(sha256=["x", None, "y"], phash=[1, 2 << 40, None])
    verdicts, found = chosen(rows, max_phash_change=None)
    assert verdicts == ["ok", "same bytes", "near duplicate"]
    assert found.missing == {"same bytes": 1, "near duplicate": 1}


def test_near_embeddings_go_and_rows_without_one_are_counted_apart(tmp_path):
    rows = table(width=[100, 100, 120, 100, 100, 40])
    vectors = np.random.default_rng(0).standard_normal((5, 7))
    vectors[2] = vectors[0] * 3
    scores = write(rows, tmp_path / "in")
    embed(scores, rows, vectors[::-1], [5, 3, 2, 1, 0])
    config = FilterConfig(min_duplicate_cosine=0.99)
    found = select.select(tmp_path / "out", scores, config)
    verdicts = pq.read_table(tmp_path / "out" / "verdicts.parquet")["verdict"].to_pylist()
    near = "near duplicate (embedding)"
    assert verdicts == [near, "ok", "ok", "ok", near, "min_side"]
    assert found.missing == {near: 1}
    assert not list((tmp_path / "out").glob("*.spool"))


def test_pictures_of_an_evaluation_set_are_contaminated(tmp_path):
    (tmp_path / "images").mkdir()
    picture = Image.effect_noise((60, 60), 90).convert("RGB")
    picture.save(tmp_path / "images" / "7.png")
    document = {
        "images": [{"id": 7, "file_name": "7.png"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "noise"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(document))
    phash, miniature = duplicates.fingerprint(picture)
    rows = table(
        phash=[phash ^ 0b101, 1, phash, phash],
        miniature=[miniature, miniature, bytes(48), miniature],
        unsafe=[0.1, 0.1, 0.1, 0.9],
    )
    config = FilterConfig(decontaminate=(str(tmp_path / "captions.json"),))
    select.select(tmp_path / "out", write(rows, tmp_path / "in"), config)
    verdicts = pq.read_table(tmp_path / "out" / "verdicts.parquet")["verdict"].to_pylist()
    assert verdicts == ["contaminated", "ok", "ok", "max_unsafe"]
    twins = pq.read_table(tmp_path / "out" / "twins.parquet")["twin"].to_pylist()
    assert twins == [str(tmp_path / "images" / "7.png")]


def test_kept_rows_are_those_that_passed_with_every_column_as_it_was(tmp_path):
    rows = table(
        similarity=[0.5, 0.0, 0.4, 0.6, 0.7],
        asked_from=[1_700_000_000_123 + row for row in range(5)],
        listed_phash=[0, None, None, None, None],
        source=["part-7"] * 5,
    )
    select.select(tmp_path / "out", write(rows, tmp_path / "in"), FilterConfig())
    kept = pq.read_table(tmp_path / "out" / "kept.parquet")
    assert kept.equals(rows.filter(pa.array([True, False, True, True, True])))


def test_an_empty_result_names_the_strictest_rule(chosen):
    rows = table(similarity=[0.0, 0.1, 0.5], width=[100, 100, 10])
    with pytest.raises(select.NothingKeptError, match=r"none of 3.*'min_similarity'.*\(2\)"):
        chosen(rows)
    rows = table(error=["broken", "broken"], similarity=[None, None])
    with pytest.raises(select.NothingKeptError, match=r"none of 2.*'undecodable'"):
        chosen(rows)


def test_a_finished_selection_is_made_again_only_if_settings_or_scores_differ(tmp_path):
    rows = table(similarity=[0.5, 0.3, 0.4])
    scores, out = write(rows, tmp_path / "in"), tmp_path / "out"
    first = select.select(out, scores, FilterConfig())
    written = (out / "verdicts.parquet").stat().st_ino
    assert select.select(out, scores, FilterConfig(resolutions=(8,), codec="jpg")) == first
    assert (out / "verdicts.parquet").stat().st_ino == written
    changed = select.select(out, scores, FilterConfig(min_similarity=0.4))
    assert changed.counts == {"ok": 2, "min_similarity": 1}
    write(table(similarity=[0.5, 0.6, 0.7, 0.8]), scores)
    assert select.select(out, scores, FilterConfig(min_similarity=0.4)).counts == {"ok": 4}


def test_an_interrupted_selection_is_made_anew(tmp_path, monkeypatch):
    scores = write(table(similarity=[0.5, 0.0]), tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(select, "_write_kept", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            select.select(tmp_path / "out", scores, FilterConfig())
    assert not (tmp_path / "out" / "selection.json").exists()
    select.select(tmp_path / "out", scores, FilterConfig())
    assert pq.read_table(tmp_path / "out" / "kept.parquet").num_rows == 1


def test_the_funnel_has_the_rules_asked_for_and_adds_up():
    config = FilterConfig(max_watermark=0.5, max_phash_distance=None)
    steps = select.funnel({"ok": 5, "max_watermark": 3, "min_side": 2}, config)
    names = [step.step for step in steps]
    assert names == sorted(names[1:], key=RULES.index) or names[0] == "downloaded"
    assert "near duplicate" not in names
    assert "top_similarity" not in names
    assert [steps[0].rows, steps[-1].rows] == [10, 5]


def test_histograms_count_every_decodable_scored_picture_once(chosen):
    similarity = [0.2, 0.3, float("nan"), None, 0.9, 0.9]
    _, found = chosen(table(similarity=similarity))
    histogram = found.histograms["similarity"]
    assert sum(histogram["counts"]) == 4
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert histogram["counts"][-1] == 2
    assert sum(found.histograms["aesthetic"]["counts"]) == 6
    assert "watermark" not in found.histograms
