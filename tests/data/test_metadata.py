from __future__ import annotations

import csv
import gzip
import json
import os
import time
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DownloadConfig
from data.lists import metadata, prefilter, scatter
from data.lists.sources import find
from data.schema import LIST, MetadataError, resolve
from tests import forks

LAION = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"]
RELAION = [
    "url",
    "caption",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "md5",
    "similarity",
    "hash",
    "punsafe",
    "pwatermark",
]
COYO = [
    "id",
    "url",
    "text",
    "width",
    "height",
    "image_phash",
    "text_length",
    "word_count",
    "num_tokens_bert",
    "num_tokens_gpt",
    "num_faces",
    "clip_similarity_vitb32",
    "clip_similarity_vitl14",
    "nsfw_score_opennsfw2",
    "nsfw_score_gantman",
    "watermark_score",
    "aesthetic_score_laion_v2",
]
DATACOMP = [
    "uid",
    "url",
    "text",
    "original_width",
    "original_height",
    "clip_b32_similarity_score",
    "clip_l14_similarity_score",
    "face_bboxes",
    "sha256",
]

ANY = {
    "min_side": None,
    "max_aspect": None,
    "max_unsafe": None,
    "max_watermark": None,
    "min_caption_words": 0,
    "min_caption_chars": 0,
}
"""Rules that read nothing but the URL."""


def config(**changes) -> DownloadConfig:
    changes = {"rows_per_shard": 1, "allow_withdrawn": True, **changes}
    return DownloadConfig(source="metadata", metadata=("x",), **changes)


def write(path, **columns) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def urls_of(n: int, start: int = 0) -> dict[str, list[str]]:
    numbers = range(start, start + n)
    return {"url": [f"http://a/{i}" for i in numbers], "caption": [f"a b c {i}" for i in numbers]}


def listed(out: Path) -> pa.Table:
    """All parts in order."""
    parts = json.loads((out / "lists" / "index.json").read_text())["parts"]
    paths = sorted((out / "lists").glob("*.parquet"))
    tables = [pq.read_table(path) for path in paths]
    assert [len(table) for table in tables] == parts
    assert all(table.schema.equals(LIST) for table in tables)
    assert sorted(p.name for p in (out / "lists").iterdir()) == [
        *(p.name for p in paths),
        "index.json",
    ]
    return pa.concat_tables(tables)


def prepared(out: Path, *files: str, **changes) -> tuple[dict[str, int], pa.Table]:
    """Rows dropped by step, and the rows kept."""
    funnel = metadata.prepare(files, out, config(**changes))
    for before, after in pairwise(funnel):
        assert before.rows - after.dropped == after.rows
    table = listed(out)
    assert funnel[-1].rows == len(table)
    return {step.step: step.dropped for step in funnel if step.dropped}, table


# ---- columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (LAION, {"url": "URL", "caption": "TEXT", "width": "WIDTH", "unsafe": "punsafe"}),
        (RELAION, {"caption": "caption", "width": "original_width", "md5": "md5"}),
        (COYO, {"similarity_b32": "clip_similarity_vitb32", "phash": "image_phash"}),
        (DATACOMP, {"similarity_l14": "clip_l14_similarity_score", "sha256": "sha256"}),
        (["url", "caption"], {"url": "url", "caption": "caption"}),
    ],
    ids=["laion", "relaion", "coyo", "datacomp", "plain"],
)
def test_each_source_resolves_to_our_columns(columns, expected):
    found = resolve(columns, "file")
    assert expected.items() <= found.items()
    assert "hash" not in found.values()


def test_a_missing_url_column_names_file_and_remedy():
    with pytest.raises(MetadataError, match=r"list\.parquet: no url column.*found link, text"):
        resolve(["link", "text"], "list.parquet")


@pytest.mark.parametrize("columns", [["url", "URL", "text"], ["url", "text", "caption"]])
def test_ambiguous_columns_are_refused(tmp_path, columns):
    path = write(tmp_path / "a.parquet", **{column: ["x"] for column in columns})
    with pytest.raises(MetadataError, match=r"a\.parquet: columns .* could all be"):
        metadata.prepare((path,), tmp_path, config(**ANY))


def test_a_rule_without_its_column_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", **urls_of(1))
    with pytest.raises(MetadataError, match=r"a\.parquet: no column for width.*min_side.*null"):
        metadata.prepare((path,), tmp_path, config())


def test_old_laion_sizes_in_floats_become_integers(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        URL=["http://a/1", "http://a/2", "http://a/3"],
        TEXT=["a b cccc"] * 3,
        WIDTH=[100.0, float("nan"), float("inf")],
        HEIGHT=[90.0, 90.0, 90.0],
        similarity=[0.3, 0.3, 0.3],
        hash=[1, 2, 3],
        punsafe=[0.1] * 3,
        pwatermark=[0.1] * 3,
    )
    dropped, table = prepared(tmp_path, path)
    assert dropped == {"null width": 2}
    assert table.to_pylist()[0].items() >= {"width": 100, "md5": None, "row": 0}.items()


def test_relaion_is_cut_by_original_sizes_and_keeps_its_md5_in_lower_case(tmp_path):
    path = write(
        tmp_path / "relaion2B-en-research-safe" / "part-00003.snappy.parquet",
        **urls_of(4),
        status=["success", "success", "failed_to_download", None],
        error_message=[None, None, "404", None],
        width=[384] * 4,
        height=[384] * 4,
        original_width=pa.array([800, 50, None, 300], pa.int32()),
        original_height=pa.array([600, 600, None, 300], pa.int32()),
        md5=["AB" * 16, "ab" * 16, None, "ab" * 15],
        similarity=[0.3] * 4,
        hash=[5] * 4,
        punsafe=pa.array([0.1] * 4, pa.float32()),
        pwatermark=pa.array([0.1] * 4, pa.float32()),
    )
    dropped, table = prepared(tmp_path / "out", path, allow_withdrawn=False)
    assert dropped == {"not fetched by the source": 1, "min_side": 1}
    by_row = {row["row"]: row for row in table.to_pylist()}
    assert (by_row[0]["md5"], by_row[3]["md5"]) == ("ab" * 16, None)
    assert (by_row[0]["width"], by_row[0]["source"]) == (800, "part-00003.snappy")


def test_coyo_phash_is_read_from_hexadecimal_and_datacomp_sha256_is_kept(tmp_path):
    coyo = write(tmp_path / "coyo.parquet", **urls_of(2), image_phash=["fF00000000000001", "?"])
    datacomp = write(tmp_path / "dc.parquet", **urls_of(2, 2), sha256=["0A" * 32, "0a" * 16])
    _, table = prepared(tmp_path / "out", coyo, datacomp, **ANY)
    by_url = {row["url"][-1]: row for row in table.to_pylist()}
    assert [by_url[n]["phash"] for n in "01"] == [0xFF00000000000001, None]
    assert [by_url[n]["sha256"] for n in "23"] == ["0a" * 32, None]


@pytest.mark.parametrize(
    ("name", "columns", "withdrawn"),
    [
        ("part-0.parquet", LAION, True),
        ("laion2B-en-aesthetic/part-0.parquet", ["URL", "TEXT", "WIDTH"], True),
        ("laion400m-meta/part-0.parquet", ["url", "caption"], True),
        ("relaion2B-en-research-safe/part-0.parquet", RELAION, False),
        ("laion2B-en/part-0.parquet", RELAION, False),
        ("coyo/part-0.parquet", COYO, False),
        ("mine.parquet", ["URL", "TEXT"], False),
    ],
)
def test_withdrawn_laion_releases_are_refused_without_the_flag(tmp_path, name, columns, withdrawn):
    said = {"status": "success", "md5": "ab" * 16, "image_phash": "ff"}
    path = write(tmp_path / name, **{column: [said.get(column, "a b c")] for column in columns})
    refusing = config(**ANY, allow_withdrawn=False)
    if withdrawn:
        with pytest.raises(MetadataError, match=r"part-0\.parquet.*withdrawn.*allow_withdrawn"):
            metadata.prepare((path,), tmp_path / "out", refusing)
    else:
        metadata.prepare((path,), tmp_path / "out", refusing)
    metadata.prepare((path,), tmp_path / "allowed", config(**ANY))
    embedded = refusing.model_copy(update={"source": "embedded"})
    metadata.prepare((path,), tmp_path / "embedded", embedded)


# ---- places ------------------------------------------------------------------------------------


def test_a_file_named_twice_is_counted_once_and_equal_names_do_not_clash(tmp_path):
    first = write(tmp_path / "a" / "list.parquet", **urls_of(3))
    write(tmp_path / "b" / "list.parquet", **urls_of(5, 3))
    pattern = str(tmp_path / "*" / "list.parquet")
    _, table = prepared(tmp_path / "out", first, pattern, f"file://{first}", **ANY)
    assert len(table) == 8
    assert {*table["source"].to_pylist()} == {"list"}


def test_a_pattern_without_a_file_is_refused_with_where_it_was_looked_for(tmp_path):
    for pattern in (f"{tmp_path}/none*.parquet", str(tmp_path), "memory://none/*.parquet"):
        with pytest.raises(MetadataError, match=r"no file matches|is a folder: name the"):
            find((pattern,))


def test_lists_are_read_through_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    with memory.open("/lists/a.parquet", "wb") as file:
        pq.write_table(pa.table(urls_of(3)), file)
    with memory.open("/lists/b.csv", "wb") as file:
        file.write(b"url,caption\nhttp://a/9,a b c\n")
    _, table = prepared(tmp_path, "memory://lists/*", **ANY)
    assert sorted(table["url"].to_pylist()) == [f"http://a/{i}" for i in (0, 1, 2, 9)]
    before = metadata.fingerprint(("memory://lists/*",))
    with memory.open("/lists/b.csv", "wb") as file:
        file.write(b"url,caption\nhttp://a/8,a b c\n")
    assert metadata.fingerprint(("memory://lists/*",)) != before


def test_an_fsspec_package_that_is_missing_is_named():
    with pytest.raises(MetadataError, match=r"gcsfs.*install the package that reads gs://"):
        find(("gs://bucket/*.parquet",))
    with pytest.raises(MetadataError, match="nowhere"):
        find(("nowhere://bucket/a.parquet",))


def test_a_place_that_denies_access_is_told(monkeypatch):
    def denied(*_, **__):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "isfile", denied)
    with pytest.raises(MetadataError, match=r"memory://x/a\.parquet.*403.*credentials"):
        find(("memory://x/a.parquet",))


def test_the_fingerprint_of_lists_follows_their_content_and_not_their_folder(tmp_path):
    def written(folder, urls):
        path = tmp_path / folder / "a.parquet"
        write(path, url=urls, caption=["x y z"] * len(urls))
        return metadata.fingerprint((str(path.parent / "*.parquet"),))

    first = written("one", ["http://a/1", "http://a/2"])
    assert first == written("two", ["http://a/1", "http://a/2"])
    assert first != written("three", ["http://a/1", "http://a/3"])
    assert first != metadata.fingerprint((str(tmp_path / "nothing" / "*.parquet"),))


# ---- broken lists ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv.gz"])
@pytest.mark.parametrize("body", [b"", b"PAR1 and \xff\xfe\x00 then nothing"])
def test_a_file_that_is_not_what_its_suffix_says_is_refused(tmp_path, name, body):
    path = tmp_path / name
    path.write_bytes(body)
    with pytest.raises(MetadataError, match=rf"{name}: not a readable.*fetch it again"):
        metadata.prepare((str(path),), tmp_path / "out", config(**ANY))


def test_a_truncated_and_a_damaged_parquet_are_refused_by_name(tmp_path):
    path = Path(write(tmp_path / "a.parquet", **urls_of(5000)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MetadataError, match=r"a\.parquet: not a readable Parquet"):
        metadata.prepare((str(path),), tmp_path / "out", config(**ANY))
    path.write_bytes(whole[:100] + bytes(1000) + whole[1100:])
    with pytest.raises(MetadataError, match=r"a\.parquet: cannot be read to its end"):
        metadata.prepare((str(path),), tmp_path / "out", config(**ANY))


def test_a_list_without_rows_adds_none(tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table(urls_of(1)).slice(1), empty)
    (tmp_path / "b.csv").write_text("url,caption\n")
    full = write(tmp_path / "a.parquet", **urls_of(2))
    _, table = prepared(tmp_path / "out", str(empty), str(tmp_path / "b.csv"), full, **ANY)
    assert len(table) == 2


def test_every_csv_row_that_cannot_be_read_is_counted_and_costs_itself_only(tmp_path):
    rows = [
        b'http://a/0,"a, ""quoted"" and\nbroken caption"',
        b"http://a/1,too,many",
        b"http://a/2",
        b"http://a/3,caf\xe9 in latin-1",
        b'http://a/4,"never closed',
        b"http://a/5,fine",
        b"http://a/6," + b"x" * (1 << 21),
        b"",
        b'http://a/7,"closed" twice',
        "http://a/8,größe 東京".encode(),
        b"http://a/9,nul \x00 inside",
    ]
    body = b"\xef\xbb\xbfurl,caption\r\n" + b"\r\n".join(rows)
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(body)
    dropped, table = prepared(tmp_path / "out", str(tmp_path / "a.csv.gz"), **ANY)
    assert dropped == {"unreadable row": 6, "control characters in caption": 1}
    kept = {row["url"][-1]: (row["caption"], row["row"]) for row in table.to_pylist()}
    assert kept["0"] == ('a, "quoted" and broken caption', 0)
    assert {url: row for url, (_, row) in kept.items()} == {"0": 0, "5": 5, "8": 8}
    assert kept["8"][0] == "größe 東京"
    assert {*table["source"].to_pylist()} == {"a"}


def test_a_torn_gzip_is_refused(tmp_path):
    whole = gzip.compress(
        b"url,caption\n" + b"".join(os.urandom(9).hex().encode() + b",x y z\n" for _ in range(9999))
    )
    (tmp_path / "a.csv.gz").write_bytes(whole[:-5000])
    with pytest.raises(MetadataError, match=r"a\.csv\.gz: cannot be read to its end"):
        metadata.prepare((str(tmp_path / "a.csv.gz"),), tmp_path / "out", config(**ANY))


def test_lists_in_zstandard_are_read_whatever_is_installed(tmp_path):
    halves = ["url,caption\nhttp://a/0,größe\n", "http://a/1,two words\n"]
    frames = [pa.Codec("zstd").compress(half.encode(), asbytes=True) for half in halves]
    path = tmp_path / "a.CSV.ZST"
    path.write_bytes(b"".join(frames))
    dropped, table = prepared(tmp_path / "out", str(path), **ANY)
    assert dropped == {}
    assert sorted(table["caption"].to_pylist()) == ["größe", "two words"]
    path.write_bytes(frames[0] + frames[1][:-5])
    with pytest.raises(MetadataError, match=r"a\.CSV\.ZST: .*Truncated"):
        metadata.prepare((str(path),), tmp_path / "torn", config(**ANY))


def test_numbers_of_a_tsv_are_read_as_numbers(tmp_path):
    text = "url\ttext\twidth\theight\n" + "".join(
        f"http://a/{i}\ta b ccc\t{width}\t200\n" for i, width in enumerate(["300.0", "", "wide"])
    )
    (tmp_path / "a.tsv").write_text(text)
    dropped, table = prepared(
        tmp_path, str(tmp_path / "a.tsv"), max_unsafe=None, max_watermark=None
    )
    assert dropped == {"null width": 2}
    assert table["width"].to_pylist() == [300]


def test_parquet_text_that_is_not_utf8_is_an_unreadable_row(tmp_path):
    captions = pa.array([b"a b c", b"caf\xe9", None, b"d e f"], pa.binary())
    table = pa.table({"url": urls_of(4)["url"], "caption": captions})
    strings = table.set_column(1, "caption", pa.StringArray.from_buffers(4, *_string(captions)))
    for name, content in (("binary", table), ("text", strings)):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(content, path)
        dropped, kept = prepared(tmp_path / name, str(path), **ANY)
        assert dropped == {"unreadable row": 1, "null caption": 1}
        assert sorted(kept["row"].to_pylist()) == [0, 3]


def _string(array: pa.Array) -> tuple:
    valid, offsets, data = array.buffers()
    return offsets, data, valid


def test_odd_characters_pass_through_and_captions_as_long_as_pages_do_not(tmp_path):
    odd = ["%_\\'", "ein \u202ebidi", "'quote' \"", "😀 é\u200d", "x" * 10_001]
    urls = ["http://a/\x00", "http://a/\n", "http://é/ b", "http://a/%", "http://a/long"]
    path = write(tmp_path / "a'b.parquet", url=urls, caption=odd)
    dropped, table = prepared(tmp_path / "o'ut", path, **ANY)
    assert dropped == {"caption too long": 1}
    assert dict(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)) == dict(
        zip(urls[:4], odd[:4], strict=True)
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_blanks_of_every_kind_become_one_and_control_characters_drop_the_row(tmp_path, suffix):
    blank = ["a\tb\r\nc ", "\u3000a\xa0\u2028b  c", "\x0ba b\x0cc\x85"]
    broken = ["a\x00b c", "\x1b[31mred one", "a b\x7fc", "a b\x9bc", "a\x1cb c"]
    rows = [(f"http://a/{n}", caption) for n, caption in enumerate([*blank, *broken])]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("url", "caption"), *rows])
    else:
        write(path, url=[url for url, _ in rows], caption=[caption for _, caption in rows])
    dropped, table = prepared(tmp_path, str(path), **ANY)
    assert dropped == {"control characters in caption": len(broken)}
    assert table["caption"].to_pylist() == ["a b c"] * len(blank)


# ---- rules and order ---------------------------------------------------------------------------


def test_every_row_is_counted_at_its_first_failing_rule(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        URL=[
            "http://a/1",
            "http://a/2",
            "http://a/3",
            None,
            "http://a/5",
            "http://a/6",
            "http://a/1",
        ],
        TEXT=["a b cccc"] * 5 + ["ab", "a b cccc"],
        WIDTH=pa.array([100, None, 100, 100, 30, 100, 100], pa.float64()),
        HEIGHT=pa.array([90, 90, 900, 90, 90, 90, 90], pa.float64()),
        punsafe=[0.1] * 7,
        pwatermark=[0.1] * 7,
    )
    dropped, table = prepared(tmp_path, path)
    assert dropped == {
        "no url": 1,
        "null width": 1,
        "min_side": 1,
        "max_aspect": 1,
        "caption too short": 1,
        "same url": 1,
    }
    assert table["url"].to_pylist() == ["http://a/1"]


def test_rows_are_unique_by_url_or_by_url_and_caption(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        url=["http://a/1"] * 3 + ["http://a/2"],
        caption=["one", "two", "one", "one"],
    )
    dropped, table = prepared(tmp_path / "url", path, **ANY)
    assert (dropped, len(table)) == ({"same url": 2}, 2)
    dropped, table = prepared(tmp_path / "both", path, **ANY, unique="url and caption")
    assert (dropped, len(table)) == ({"same url and caption": 1}, 3)


def test_max_rows_keeps_the_first_of_the_order_and_makes_no_more_parts(tmp_path):
    columns = urls_of(40)
    path = write(tmp_path / "a.parquet", **{k: v + v[:30] for k, v in columns.items()})
    _, everything = prepared(tmp_path / "all", path, **ANY, rows_per_part=7)
    for rows in (1, 13, 39, 40, 41):
        dropped, some = prepared(tmp_path / str(rows), path, **ANY, rows_per_part=7, max_rows=rows)
        assert some.equals(everything.slice(0, rows))
        assert sum(dropped.values()) == 70 - min(rows, 40)
        assert ("max_rows" in dropped) == (rows < 40)


def test_the_order_is_that_of_the_seed(tmp_path):
    path = write(tmp_path / "a.parquet", **urls_of(11))
    orders = [
        prepared(tmp_path / f"{n}", path, **ANY, seed=seed)[1]["url"].to_pylist()
        for n, seed in enumerate((0, 0, 1))
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_no_shard_has_more_than_its_share_of_a_dominant_host(tmp_path):
    hosts = ["big" if i % 10 < 3 else f"h{i}" for i in range(20_000)]
    urls = [f"http://{host}.test/{i}" for i, host in enumerate(hosts)]
    path = write(tmp_path / "a.parquet", url=urls, caption=["x"] * len(urls))
    _, table = prepared(tmp_path / "out", path, **ANY, rows_per_part=3000)
    is_big = np.array(["//big." in url for url in table["url"].to_pylist()])
    shares = is_big.reshape(-1, 500).mean(1)
    assert np.abs(shares - 0.3).max() < 4 * (0.3 * 0.7 / 500) ** 0.5


def test_nothing_left_names_the_strictest_rule_and_loosening_it_mends_it(tmp_path):
    path = write(tmp_path / "a.parquet", url=["http://a/1"], text=["short"])
    chosen = config(**{**ANY, "min_caption_words": 3})
    with pytest.raises(MetadataError, match="'caption too short' dropped most"):
        metadata.prepare((path,), tmp_path / "out", chosen)
    assert len(prepared(tmp_path / "out", path, **ANY)[1]) == 1


def test_a_second_call_returns_the_funnel_and_other_settings_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", **urls_of(5))
    first = metadata.prepare((path,), tmp_path / "out", config(**ANY))
    Path(path).unlink()
    assert metadata.prepare((path,), tmp_path / "out", config(**ANY)) == first
    with pytest.raises(MetadataError, match=r"seed 0 → 1.*another folder"):
        metadata.prepare((path,), tmp_path / "out", config(**ANY, seed=1))
    ours = DownloadConfig(**ANY, rows_per_shard=1)
    with pytest.raises(MetadataError, match="source metadata → embedded"):
        metadata.prepare((path,), tmp_path / "out", ours)


def test_other_lists_into_the_same_folder_are_refused_and_the_same_ones_elsewhere_are_not(
    tmp_path, monkeypatch
):
    out, path = tmp_path / "out", tmp_path / "a.parquet"
    first = metadata.prepare((write(path, **urls_of(5)),), out, config(**ANY))
    other = write(tmp_path / "b.parquet", **urls_of(5, 7))
    with pytest.raises(MetadataError, match=r"made of .*a\.parquet, and .*b\.parquet would give"):
        metadata.prepare((other,), out, config(**ANY))
    with pytest.raises(MetadataError, match="no file matches"):
        metadata.prepare((str(tmp_path / "c.parquet"),), out, config(**ANY))
    moved = write(tmp_path / "moved" / "a.parquet", **urls_of(5))
    monkeypatch.chdir(tmp_path)
    for same in ("a.parquet", "./[a].parquet", moved):
        assert metadata.prepare((same,), out, config(**ANY)) == first
    write(path, **urls_of(5, 7))
    with pytest.raises(MetadataError, match="same names with other contents"):
        metadata.prepare((str(path),), out, config(**ANY))
    path.unlink()
    for gone in ("a.parquet", str(tmp_path / "*.parquet").replace("*", "[a]*")):
        assert metadata.prepare((gone,), out, config(**ANY)) == first


def test_lists_of_the_user_in_the_folder_to_write_to_are_not_deleted(tmp_path):
    path = write(tmp_path / "lists" / "00000.parquet", **urls_of(5))
    with pytest.raises(MetadataError, match=r"00000\.parquet is not ours.*another folder"):
        metadata.prepare((path,), tmp_path, config(**ANY))
    assert [*(tmp_path / "lists").iterdir()] == [Path(path)]
    assert pq.read_metadata(path).num_rows == 5


def test_lists_without_any_row_are_told_to_have_none(tmp_path):
    path = write(tmp_path / "a.parquet", url=pa.array([], "string"), text=pa.array([], "string"))
    with pytest.raises(MetadataError, match=r"a\.parquet has no rows"):
        metadata.prepare((path,), tmp_path / "out", config(**ANY))
    assert not (tmp_path / "out" / "lists").exists()


def test_progress_reaches_its_total(tmp_path):
    paths = tuple(write(tmp_path / f"{n}.parquet", **urls_of(10, 10 * n)) for n in range(3))
    seen: dict[str, list[tuple[int, int]]] = {}
    metadata.prepare(
        paths,
        tmp_path / "out",
        config(**ANY, rows_per_part=5),
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert seen == {
        "reading lists": [(n, 3) for n in range(4)],
        "writing lists": [(n, 6) for n in range(7)],
    }


# ---- against plain Python ----------------------------------------------------------------------

SCHEMAS = {
    "laion": ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark"),
    "relaion": (
        *("url", "caption", "original_width", "original_height"),
        *("similarity", "punsafe", "pwatermark"),
    ),
    "coyo": (
        *("url", "text", "width", "height"),
        *("clip_similarity_vitb32", "nsfw_score_opennsfw2", "watermark_score"),
    ),
}
OURS = ("url", "caption", "width", "height", "similarity_b32", "unsafe", "watermark")
RULED = {"min_side": 10, "max_aspect": 2.0, "min_similarity_b32": 0.25, "max_unsafe": 0.5}
urls = st.none() | st.sampled_from(["", "  ", "http://a/1", "http://a/2", "http://b/é"]) | st.text()
captions = (
    st.none()
    | st.sampled_from(["a b c", "one two three", " a  b\tc\n", "a b\0cdef", "ab"])
    | st.text()
)
scores = st.none() | st.sampled_from([0.25, 0.5, 0.1, float("nan"), float("inf"), -1.0])
sides = st.none() | st.integers(-2, 40) | st.just(2**31 - 1)
rows_of_a_list = st.lists(st.tuples(urls, captions, sides, sides, *[scores] * 3), max_size=25)


def is_kept(row: tuple) -> bool:
    """The rules, naively."""
    url, caption, width, height, similarity, unsafe, watermark = row
    numbers = (width, height, similarity, unsafe, watermark)
    if None in (url, caption, *numbers) or not all(map(np.isfinite, numbers)):
        return False
    short, long = sorted((width, height))
    caption = tidy(caption)
    return (
        short >= 10
        and long <= 2 * short
        and similarity >= 0.25
        and unsafe <= 0.5
        and watermark <= 0.8
        and url.strip(" ") != ""
        and not any(unicodedata.category(letter) == "Cc" for letter in caption)
        and len(caption.split(" ")) >= 3
        and len(caption) >= 6
    )


def tidy(caption: str) -> str:
    """Single blanks, naively."""
    blanks = "\t\n\x0b\f\r\x85"
    spaced = [" " if c in blanks or unicodedata.category(c)[0] == "Z" else c for c in caption]
    return " ".join(filter(None, "".join(spaced).split(" ")))


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=rows_of_a_list,
    schema=st.sampled_from(sorted(SCHEMAS)),
    cut=st.integers(0, 25),
    rows_per_part=st.integers(3, 30),
    unique=st.sampled_from(["url", "url and caption"]),
    seed=st.integers(0, 9),
)
def test_what_is_kept_is_what_plain_python_keeps(
    tmp_path_factory, rows, schema, cut, rows_per_part, unique, seed
):
    out = tmp_path_factory.mktemp("rows")
    rows = [*rows, ("http://sure/", "a sure thing", 20, 20, 0.5, 0.1, 0.1)]
    changes = {**RULED, "unique": unique, "seed": seed}
    whole = _written(out / "whole.parquet", schema, rows)
    halves = [_written(out / f"{n}.parquet", schema, half) for n, half in
              enumerate((rows[:cut], rows[cut:]))]  # fmt: skip
    dropped, table = prepared(out / "a", whole, **changes)
    again, split = prepared(out / "b", *halves, **changes, rows_per_part=rows_per_part)

    good = [(row[0], tidy(row[1]), *row[2:]) for row in rows if is_kept(row)]
    key = (lambda r: r[:1]) if unique == "url" else (lambda r: r[:2])
    width = 1 if unique == "url" else 2
    kept = list(zip(*(table[name].to_pylist() for name in OURS), strict=True))
    assert Counter(map(key, kept)) == Counter({*map(key, good)})
    assert {row[:4] for row in kept} <= {row[:4] for row in good}
    assert dropped.get(f"same {unique}", 0) == len(good) - len({row[:width] for row in good})
    assert sum(dropped.values()) == len(rows) - len(kept)
    assert split.drop_columns(["source", "row"]).equals(table.drop_columns(["source", "row"]))
    assert again == dropped
    for row in table.to_pylist():
        url, caption, *_ = rows[row["row"]]
        assert (url, tidy(caption)) == (row["url"], row["caption"])


def _written(path: Path, schema: str, rows: list[tuple]) -> str:
    sizes = pa.float64() if schema == "laion" else pa.int64()
    kinds = [pa.string(), pa.string(), sizes, sizes, pa.float64(), pa.float32(), pa.float32()]
    columns = zip(*rows, strict=True) if rows else [()] * len(kinds)
    names = SCHEMAS[schema]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    pq.write_table(pa.table(arrays, names=names), path)
    return str(path)


# ---- kills -------------------------------------------------------------------------------------


def snapshot(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "lists").rglob("*"))}


def many(folder: Path) -> tuple[str, ...]:
    return tuple(write(folder / f"{n}" / "list.parquet", **urls_of(300, 250 * n)) for n in range(4))


KILLED = config(**ANY, rows_per_part=300, max_rows=900)


def test_lists_are_the_same_to_the_byte_wherever_a_run_is_ended(tmp_path, monkeypatch):
    files = many(tmp_path)
    expected = metadata.prepare(files, tmp_path / "whole", KILLED)
    replace, out = Path.replace, tmp_path / "killed"
    renames, again = iter(()), None

    class Ended(BaseException):
        pass

    def counted(self, target):
        if next(renames, None) is None:
            raise Ended
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    ends = 0
    while again is None:
        renames = iter(range(1 + ends % 3))
        try:
            again = metadata.prepare(files, out, KILLED)
        except Ended:
            ends += 1
    assert ends > 5
    assert again == expected
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.slow
def test_lists_are_the_same_to_the_byte_after_sigkills(tmp_path):
    files = many(tmp_path)
    metadata.prepare(files, tmp_path / "whole", KILLED)
    out = tmp_path / "killed"

    def done() -> int:  # os.walk, as folders vanish meanwhile
        names = [name for _, _, files in os.walk(out) for name in files]
        return sum(name.endswith((".json", ".parquet")) for name in names)

    kills = Counter()
    while not (out / "lists" / "index.json").exists():
        before, workers = done(), 1 + kills.total() % 2
        run = forks.context.Process(
            target=metadata.prepare, args=(files, out, KILLED), kwargs={"workers": workers}
        )
        run.start()
        while run.is_alive() and done() < before + 3:
            time.sleep(0.001)
        if run.is_alive():
            kills[workers] += 1
        else:
            assert run.exitcode == 0
        forks.kill(run)
    assert min(kills[1], kills[2]) >= 2
    metadata.prepare(files, out, KILLED, workers=2)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_an_unfinished_call_of_other_settings_or_lists_is_begun_anew(tmp_path, monkeypatch):
    files = many(tmp_path)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "_name_parts", stopped)
        with pytest.raises(KeyboardInterrupt):
            metadata.prepare(files, tmp_path / "out", KILLED)
    other = config(**ANY, rows_per_part=400, seed=1)
    metadata.prepare(files, tmp_path / "out", other)
    metadata.prepare(files, tmp_path / "fresh", other)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


@pytest.mark.slow
def test_workers_make_the_same_lists(tmp_path):
    files = many(tmp_path)
    metadata.prepare(files, tmp_path / "one", KILLED)
    metadata.prepare(files, tmp_path / "two", KILLED, workers=2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_small_batches_and_row_groups_give_the_same_rows(tmp_path, monkeypatch):
    files = many(tmp_path)
    _, expected = prepared(tmp_path / "a", *files, **ANY)
    monkeypatch.setattr(scatter, "BATCH_ROWS", 7)
    monkeypatch.setattr(prefilter, "BATCH_ROWS", 5)
    monkeypatch.setattr(scatter, "ROW_GROUP", 11)
    assert prepared(tmp_path / "b", *files, **ANY)[1].equals(expected)
