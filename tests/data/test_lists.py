"""What lists of other makers hold: column types, quoting, bytes that are no text, names."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DownloadConfig, ListColumn
from data.lists import metadata
from data.schema import ALIASES, FATES, MetadataError, with_label

ANY = {
    "min_side": None, "max_aspect": None, "max_unsafe": None, "max_watermark": None,
    "min_caption_words": 0, "min_caption_chars": 0,
}  # fmt: skip
TEXT = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.binary_view(), pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]  # fmt: skip
NO_TEXT = [
    (pa.list_(pa.string()), ["a", "b"]), (pa.large_list(pa.string()), ["a"]),
    (pa.list_(pa.string(), 2), ["a", "b"]), (pa.struct([("en", pa.string())]), {"en": "a"}),
    (pa.map_(pa.string(), pa.string()), [("en", "a")]), (pa.int64(), 7), (pa.float64(), 0.5),
    (pa.bool_(), True), (pa.binary(3), b"abc"), (pa.date32(), 7), (pa.timestamp("us"), 7),
]  # fmt: skip
URLS = [f"http://a/{number}" for number in range(4)]
CAPTIONS = ["a b c", "größe 東京", None, "d e f"]


def kept(out: Path, *lists: Path, **changes) -> tuple[dict[str, int], list[dict]]:
    """Rows dropped by step, and those kept in the order of the lists."""
    config = DownloadConfig(source="metadata", metadata=("x",), **{**ANY, **changes})
    funnel = metadata.prepare(tuple(map(str, lists)), out, config)
    parts = json.loads((out / "lists" / "index.json").read_text())["parts"]
    rows = [
        row
        for number in range(len(parts))
        for row in pq.read_table(out / "lists" / f"{number:05d}.parquet").to_pylist()
    ]
    return (
        {step.step: step.dropped for step in funnel if step.dropped},
        sorted(rows, key=lambda row: row["row"]),
    )


def written(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def layouts(folder: Path, kinds: Iterable, columns) -> list[Path]:
    """A list for each kind, whose `columns(kind)` are given; its addresses are its own."""
    return [
        written(folder / f"{n}.parquet", **{"url": [f"{url}?{n}" for url in URLS], **columns(kind)})
        for n, kind in enumerate(kinds)
    ]


# ---- types of columns --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["url", "caption"])
def test_text_of_every_layout_is_read(tmp_path, name):
    def columns(kind: pa.DataType) -> dict:
        texts = [f"{kind}{url}" for url in URLS] if name == "url" else CAPTIONS
        is_bytes = "binary" in str(kind)
        values = [v.encode() if is_bytes and v is not None else v for v in texts]
        return {"caption": CAPTIONS, name: pa.array(values, kind)}

    dropped, rows = kept(tmp_path, *layouts(tmp_path, TEXT, columns))
    assert dropped == {"null caption": len(TEXT)}
    for number, kind in enumerate(TEXT):
        own = [row for row in rows if row["source"] == str(number)]
        assert [row["caption"] for row in own] == [CAPTIONS[i] for i in (0, 1, 3)], kind
        start = f"{kind}" if name == "url" else ""
        assert [row["url"].removesuffix(f"?{number}") for row in own] == [
            f"{start}{URLS[i]}" for i in (0, 1, 3)
        ], kind


def test_text_that_is_not_utf8_is_one_unreadable_row_in_every_layout(tmp_path):
    raw = [b"a b c", b"caf\xe9", None, b"d e f"]
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    as_bytes[pa.string_view()] = pa.binary_view()

    def columns(kind: pa.DataType) -> dict:
        buffers = pa.array(raw, as_bytes.get(kind, kind)).buffers()
        return {"caption": pa.Array.from_buffers(kind, len(raw), buffers)}

    kinds = TEXT[:6]
    dropped, rows = kept(tmp_path, *layouts(tmp_path, kinds, columns))
    assert dropped == {"unreadable row": len(kinds), "null caption": len(kinds)}
    for number, kind in enumerate(kinds):
        own = [(row["row"], row["caption"]) for row in rows if row["source"] == str(number)]
        assert own == [(0, "a b c"), (3, "d e f")], kind


@pytest.mark.parametrize(("kind", "value"), NO_TEXT, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("name", ["url", "caption"])
def test_what_is_no_text_is_refused_by_column_and_type(tmp_path, kind, value, name):
    columns = {"url": URLS[:1], "caption": CAPTIONS[:1], name: pa.array([value], kind)}
    path = written(tmp_path / "a.parquet", **columns)
    with pytest.raises(MetadataError) as refused:
        kept(tmp_path, path)
    for word in ("a.parquet", repr(name), str(pq.read_schema(path).field(name).type), "not text"):
        assert word in str(refused.value)


MD5 = [hashlib.md5(bytes([i])).digest() for i in range(4)]
SHA256 = [hashlib.sha256(bytes([i])).digest() for i in range(4)]


@pytest.mark.parametrize("name", ["md5", "sha256"])
def test_hashes_in_bytes_are_what_they_are_in_hexadecimal(tmp_path, name):
    digests = {"md5": MD5, "sha256": SHA256}[name]
    size, digits = len(digests[0]), [digest.hex() for digest in digests]
    stored = {
        "binary": (digests, pa.binary()),
        "large_binary": (digests, pa.large_binary()),
        "binary_view": (digests, pa.binary_view()),
        "fixed": (digests, pa.binary(size)),
        "fixed digits": ([text.encode() for text in digits], pa.binary(2 * size)),
        "digits in bytes": ([text.upper().encode() for text in digits], pa.binary()),
        "text": (digits, pa.string()),
        "large text": (digits, pa.large_string()),
        "view": (digits, pa.string_view()),
        "dictionary": (digits, pa.dictionary(pa.int32(), pa.string())),
    }

    def columns(case: str) -> dict:
        values, kind = stored[case]
        return {"caption": ["a b c"] * 4, name: pa.array([*values[:3], None], kind)}

    _, rows = kept(tmp_path, *layouts(tmp_path, stored, columns))
    for number, case in enumerate(stored):
        own = [row[name] for row in rows if row["source"] == str(number)]
        assert own == [*digits[:3], None], case


def test_a_perceptual_hash_keeps_its_64_bits_in_every_layout(tmp_path):
    hashes = [1, 2**63, 2**64 - 1, 7]
    digits = [f"{value:016x}" for value in hashes]
    stored = {
        "uint64": (hashes, pa.uint64()),
        "int64": ([value - (value >> 63 << 64) for value in hashes], pa.int64()),
        "text": (digits, pa.large_string()),
        "bytes": ([text.encode() for text in digits], pa.binary()),
        "fixed": ([text.encode() for text in digits], pa.binary(16)),
    }

    def columns(case: str) -> dict:
        values, kind = stored[case]
        return {"caption": ["a b c"] * 4, "image_phash": pa.array([*values[:3], None], kind)}

    _, rows = kept(tmp_path, *layouts(tmp_path, stored, columns))
    for number, case in enumerate(stored):
        own = [row["phash"] for row in rows if row["source"] == str(number)]
        assert own == [*hashes[:3], None], case


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("md5", pa.binary(20), b"x" * 20), ("md5", pa.int64(), 5), ("md5", pa.float64(), 0.5),
        ("md5", pa.list_(pa.uint8()), [1, 2]), ("sha256", pa.binary(16), b"x" * 16),
        ("sha256", pa.struct([("hex", pa.string())]), {"hex": "ab" * 32}),
        ("image_phash", pa.int32(), 5), ("image_phash", pa.float64(), 5.0),
        ("image_phash", pa.binary(8), b"x" * 8), ("width", pa.list_(pa.int32()), [1]),
        ("aesthetic", pa.struct([("score", pa.float32())]), {"score": 0.5}),
        ("height", pa.timestamp("us"), 5),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_other_columns_of_a_type_that_they_cannot_be_are_refused_unless_done_without(
    tmp_path, name, kind, value
):
    columns = {name: pa.array([value], kind)}
    path = written(tmp_path / "a.parquet", url=URLS[:1], caption=CAPTIONS[:1], **columns)
    ours = "phash" if name == "image_phash" else name
    with pytest.raises(MetadataError, match=rf"a\.parquet: the column '{name}'.*null to do"):
        kept(tmp_path / "refused", path)
    _, rows = kept(tmp_path / "out", path, columns={ours: None})
    assert rows[0][ours] is None


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
def test_a_column_of_hashes_of_which_none_fits_is_refused(tmp_path, kind):
    odd = pa.array(["cat", "dog", None, ""], pa.string()).cast(kind)
    path = written(tmp_path / "a.parquet", url=URLS, caption=["a b c"] * 4, md5=odd)
    with pytest.raises(MetadataError, match=r"a\.parquet: the column 'md5' holds no md5.* 2 val"):
        kept(tmp_path / "refused", path)
    assert len(kept(tmp_path / "out", path, columns={"md5": None})[1]) == 4
    one = pa.array(["cat", "ab" * 16, None, ""], pa.string()).cast(kind)
    path = written(tmp_path / "b.parquet", url=URLS, caption=["a b c"] * 4, md5=one)
    assert [row["md5"] for row in kept(tmp_path / "b", path)[1]] == [None, "ab" * 16, None, None]


def test_columns_without_a_value_and_without_a_type_are_null(tmp_path):
    path = written(
        tmp_path / "a.parquet", url=URLS, caption=["a b c"] * 4, md5=pa.nulls(4), width=pa.nulls(4)
    )
    dropped, rows = kept(tmp_path / "out", path)
    assert dropped == {}
    assert [(row["md5"], row["width"]) for row in rows] == [(None, None)] * 4
    path = written(tmp_path / "b.parquet", url=URLS, caption=pa.nulls(4))
    with pytest.raises(MetadataError, match="'null caption' dropped most"):
        kept(tmp_path / "b", path)


NUMBERS = [
    pa.int8(), pa.uint16(), pa.int64(), pa.float16(), pa.float64(), pa.decimal128(21, 2),
    pa.string(), pa.large_string(),
]  # fmt: skip


@pytest.mark.parametrize("is_doubted", [False, True])
def test_numbers_of_every_layout_are_read(tmp_path, is_doubted):
    def columns(kind: pa.DataType) -> dict:
        numbers = pa.array([100, 7, None, 64], pa.int64()).cast(kind)
        captions = [b"a b c"] * 3 + [b"\xff" if is_doubted else b"a b c"]
        return {"caption": pa.array(captions), "width": numbers, "aesthetic": numbers}

    _, rows = kept(tmp_path, *layouts(tmp_path, NUMBERS, columns))
    expected = [100, 7, None, 64][: 3 if is_doubted else 4]
    for number, kind in enumerate(NUMBERS):
        own = [row for row in rows if row["source"] == str(number)]
        assert [row["width"] for row in own] == [row["aesthetic"] for row in own] == expected, kind


def labels(tmp_path: Path, name: str, values: pa.Array, **changes) -> list[str | None]:
    urls = [f"http://a/{number}" for number in range(len(values))]
    columns = {"url": urls, "caption": ["a b c"] * len(urls), name: values}
    path = written(tmp_path / "a.parquet", **columns)
    return [row["label"] for row in kept(tmp_path / "out", path, **changes)[1]]


@pytest.mark.parametrize("name", ["label", "class", "class_name", "wnid", "WNID"])
def test_a_list_s_column_of_labels_is_known_by_several_names(tmp_path, name):
    values = pa.array(["n01440764", " größe 東京 ", None, "", "  ", "a\x07b"])
    assert labels(tmp_path, name, values) == ["n01440764", "größe 東京", None, None, None, None]


@pytest.mark.parametrize("type_", [pa.uint8(), pa.int64()])
def test_integers_become_their_decimal_text(tmp_path, type_):
    assert labels(tmp_path, "label", pa.array([7, None, 10], type_)) == ["7", None, "10"]


@pytest.mark.parametrize("values", [pa.array([0.5]), pa.array([True]), pa.array([["a"]])])
def test_labels_that_are_neither_text_nor_integers_are_refused_or_done_without(tmp_path, values):
    with pytest.raises(MetadataError, match=r"'label'.*not text or integers.*null to do without"):
        labels(tmp_path, "label", values)
    assert labels(tmp_path, "label", values, columns={"label": None}) == [None]


def test_fates_of_a_download_that_knew_of_no_labels_have_none():
    old = pa.Table.from_pylist([{"key": "0", "caption": "a"}], FATES).drop_columns(["label"])
    assert with_label(old).schema.names == FATES.names
    assert with_label(old)["label"].to_pylist() == [None]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([URLS, ["a"] * 4, ["b"] * 4], names=["url", "caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(MetadataError, match=r"two columns have one name in url, caption, caption"):
        kept(tmp_path, tmp_path / "a.parquet")


def test_a_list_may_have_a_column_that_is_called_as_duckdb_s_row_numbers(tmp_path):
    columns = {"file_row_number": [9, 9, 9, 9], "caption": ["a b c"] * 4}
    path = written(tmp_path / "a.parquet", url=URLS, **columns)
    assert [row["row"] for row in kept(tmp_path, path)[1]] == [0, 1, 2, 3]


def test_a_list_without_rows_is_read_in_doubt_too(tmp_path):
    empty = {"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}
    first = written(tmp_path / "a.parquet", **empty, md5=pa.array([], pa.binary(16)))
    second = written(tmp_path / "b.parquet", url=URLS, caption=["a b c"] * 4)
    assert len(kept(tmp_path / "out", first, second)[1]) == 4


# ---- chosen columns ----------------------------------------------------------------------------


def test_the_columns_that_can_be_chosen_are_those_that_are_known():
    assert get_args(ListColumn) == tuple(ALIASES)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_settings_choose_the_columns_of_a_list(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    columns = {"key.url": URLS[:2], "caption": ["a", "b"], "re caption": ['new "a"', "new b"]}
    if suffix == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    else:
        written(path, **columns)
    chosen = {"url": "key.url", "caption": "re caption"}
    _, rows = kept(tmp_path / "out", path, columns=chosen)
    assert [(row["url"], row["caption"]) for row in rows] == [
        ("http://a/0", 'new "a"'),
        ("http://a/1", "new b"),
    ]
    with pytest.raises(MetadataError, match=r"no column 'Caption', which download\.columns\.capt"):
        kept(tmp_path / "b", path, columns={**chosen, "caption": "Caption"})


def test_a_choice_ends_an_ambiguity_and_tells_upper_from_lower_case(tmp_path):
    path = written(
        tmp_path / "a.parquet",
        url=URLS[:1], caption=["lower case"], Caption=["upper case"], text=["other"],
    )  # fmt: skip
    with pytest.raises(MetadataError, match=r"could all be the caption; name one of them in downl"):
        kept(tmp_path / "none", path)
    for name, expected in (("caption", "lower"), ("Caption", "upper"), ("text", "other")):
        _, rows = kept(tmp_path / name, path, columns={"caption": name})
        assert rows[0]["caption"].startswith(expected)


def test_a_required_column_cannot_be_done_without():
    with pytest.raises(ValueError, match=r"download\.columns\.caption is null"):
        DownloadConfig(source="metadata", metadata=("x",), columns={"caption": None})


def test_other_columns_are_other_lists(tmp_path):
    path = written(tmp_path / "a.parquet", url=URLS[:1], caption=["one"], other=["two"])
    kept(tmp_path, path)
    with pytest.raises(MetadataError, match=r"columns \{\} → \{'caption': 'other'\}"):
        kept(tmp_path, path, columns={"caption": "other"})
    index = tmp_path / "lists" / "index.json"
    before = json.loads(index.read_text())
    del before["settings"]["columns"]  # as it was written before there was a choice
    index.write_text(json.dumps(before))
    assert len(kept(tmp_path, path)[1]) == 1


# ---- quoting -----------------------------------------------------------------------------------


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    captions = [
        "zero",
        '"Tower at dawn by a painter',
        "two",
        'frame 8 x 10"',
        'a "b" c',
        '"',
        '""x"',
    ]
    lines = [f"http://a/{i}\t{caption}" for i, caption in enumerate(captions)]
    (tmp_path / "a.tsv").write_text("\n".join(["url\tcaption", *lines]))
    dropped, rows = kept(tmp_path, tmp_path / "a.tsv")
    assert dropped == {}
    assert [row["caption"] for row in rows] == captions


def test_what_a_csv_writer_quotes_in_a_tsv_is_read_without_its_quotes(tmp_path):
    captions = ['a "big" dog', '"quoted"', "plain", ""]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, "excel-tab", quoting=csv.QUOTE_ALL)
        writer.writerows([("url", "caption"), *zip(URLS, captions, strict=True)])
    assert [row["caption"] for row in kept(tmp_path, tmp_path / "a.tsv")[1]] == captions


def test_every_line_of_a_tsv_with_too_few_or_too_many_tabs_is_counted(tmp_path):
    lines = ["url\ttext", "http://a/0\ta b c", "http://a/1\ta\tb", "http://a/2", "", "\t\t"]
    (tmp_path / "a.tsv").write_text("\r\n".join([*lines, "http://a/3\t" + "x" * (1 << 20), "u\tv"]))
    dropped, rows = kept(tmp_path, tmp_path / "a.tsv")
    assert dropped == {"unreadable row": 4}
    assert [(row["url"], row["row"]) for row in rows] == [("http://a/0", 0), ("u", 5)]


def csv_of(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in ["url,caption", *lines]))
    return path


@pytest.mark.parametrize(
    "closing", ['http://a/4,oak frame 8 x 10"', 'http://a/4,"oak" frame', "http://a/4,no quote", ""]
)
def test_a_stray_quote_in_a_csv_costs_its_own_row_only(tmp_path, closing):
    lines = ["http://a/0,zero", 'http://a/1,"Tower at dawn', "http://a/2,two", "http://a/3,three"]
    path = csv_of(tmp_path / "a.csv", *lines, closing, "http://a/5,five")
    dropped, rows = kept(tmp_path, path)
    kept_rows = [row["url"][-1] for row in rows]
    readable = closing and closing != 'http://a/4,"oak" frame'
    assert kept_rows == ["0", "2", "3", *("4" if readable else ""), "5"]
    assert dropped == {"unreadable row": 2 if closing and not readable else 1}


def test_a_quote_that_swallows_a_comma_too_many_gives_the_rows_back(tmp_path):
    lines = ['http://a/0,"one', 'x,y",http://a/1,two', "http://a/2,three"]
    dropped, rows = kept(tmp_path, csv_of(tmp_path / "a.csv", *lines))
    assert dropped == {"unreadable row": 2}
    assert [row["url"] for row in rows] == ["http://a/2"]


def test_a_caption_in_quotes_may_have_lines(tmp_path):
    caption = 'first line\n\nsee http://b.test, it says\n"so"'
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("url", "caption"), ("http://a/0", caption), ("http://a/1", "x")]
        )
    dropped, rows = kept(tmp_path, tmp_path / "a.csv")
    assert (dropped, [row["caption"] for row in rows]) == ({}, [" ".join(caption.split()), "x"])


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
        ),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\nsize 3\n", "no url column"),
        ("a.jsonl", b'{"url": "http://a/0", "caption": "a"}\n', "convert it to Parquet"),
        ("a.json", b' [{"url": "http://a/0"}]', "convert it to Parquet"),
        ("a.txt", b"http://a/0\n", "fetch it again"),
    ],
)
def test_a_file_that_is_no_list_is_told_what_it_is(tmp_path, name, content, remedy):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MetadataError, match=remedy):
        kept(tmp_path, tmp_path / name)


@pytest.mark.parametrize("folder", ["lists [v1]", "a*b", "q?", "year=2024", "caption=x", "{a,b}"])
def test_a_folder_may_be_called_like_a_pattern(tmp_path, folder):
    for name, url in ((folder, "http://a/0"), ("lists v", "http://b/1"), ("aXb", "http://b/2")):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "a[0].parquet", url=[url], caption=["a b c"])
        written(tmp_path / name / "a0.parquet", url=[url], caption=["a b c"])
    dropped, rows = kept(tmp_path / folder / "out", tmp_path / folder / "a[0].parquet")
    assert (dropped, [row["url"] for row in rows]) == ({}, ["http://a/0"])
    assert rows[0]["caption"] == "a b c"


def test_urls_that_differ_in_their_fragment_are_one(tmp_path):
    urls = ["http://a/0.png#left", "http://a/0.png", "http://a/0.png#", "http://a/1.png?x=1#top"]
    a = written(tmp_path / "a.parquet", url=urls, caption=["a b c"] * 4)
    dropped, rows = kept(tmp_path / "out", a)
    assert sum(dropped.values()) == 2
    assert {row["url"] for row in rows} == {"http://a/0.png", "http://a/1.png?x=1"}
