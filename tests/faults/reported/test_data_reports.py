"""What people report of tools that fetch and judge data, tried as they would."""

import contextlib
import io
import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.__main__ import main
from gigagan.__main__ import main as gigagan

OFF = [f"--set={name}=null" for name in ("min_side", "max_aspect", "max_unsafe", "max_watermark")]
N = 20
URLS = [f"http://site{i}.example.org/{i}.jpg" for i in range(N)]
CAPTIONS = [f"a photo of thing number {i}" for i in range(N)]


def command(*words, expect=0, main=main):
    """Standard output and error of `python -m data …`, run here; nothing may be raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as left:
            status = left.code
    assert (status == 0) == (expect == 0), (status, out.getvalue(), err.getvalue())
    assert "Traceback" not in err.getvalue()
    return out.getvalue() + err.getvalue()


@pytest.fixture
def listed(tmp_path):
    """Writes a Parquet list and reads what `metadata` makes of it: (text, captions by URL)."""

    def run(expect=0, url=URLS, **columns):
        path = tmp_path / "list.parquet"
        pq.write_table(pa.table({"url": url, **columns}), path)
        said = command("metadata", tmp_path / "out", path, *OFF, expect=expect)
        if expect:
            return said, {}
        table = pa.concat_tables(
            [pq.read_table(f) for f in sorted((tmp_path / "out/lists").glob("*.parquet"))]
        )
        return said, dict(zip(*(table[n].to_pylist() for n in ("url", "caption")), strict=True))

    return run


@pytest.mark.parametrize(
    ("kind", "captions"),
    [
        ("list", [[c, c + " again"] for c in CAPTIONS]),
        ("struct", [{"en": c, "de": "ein Bild"} for c in CAPTIONS]),
        ("map", pa.array([[("en", c)] for c in CAPTIONS], pa.map_(pa.string(), pa.string()))),
        ("int64", list(range(N))),
    ],
)
def test_captions_of_another_kind_are_refused_by_column_and_type(listed, kind, captions):
    said, _ = listed(expect=1, caption=captions)
    assert "caption" in said
    assert kind in said


@pytest.mark.parametrize("kind", ["binary", "large_binary", "string", "large_string"])
def test_one_caption_that_is_not_text_costs_its_row_in_any_column(listed, kind):
    bad = [c.encode() for c in CAPTIONS]
    bad[3] = b"a photo of \xff broken text"
    wide = kind.startswith("large")
    stored = pa.array(bad, pa.large_binary() if wide else pa.binary())
    if kind.endswith("string"):
        kinds = pa.large_string() if wide else pa.string()
        stored = pa.Array.from_buffers(kinds, N, stored.buffers())
    said, captions = listed(caption=stored)
    assert captions == {u: c for i, (u, c) in enumerate(zip(URLS, CAPTIONS, strict=True)) if i != 3}
    assert "unreadable row" in said


def test_a_stray_quote_merges_no_rows(tmp_path):
    rows = ["a photo of thing zero", '"Tower at dawn by a painter', "a photo of thing two"]
    rows += ["a photo of thing three", 'oak picture frame 8 x 10"', "a photo of thing five"]
    lines = [f"http://s{i}.example.org/{i}.jpg\t{caption}" for i, caption in enumerate(rows)]
    (tmp_path / "q.tsv").write_text("\n".join(["url\tcaption", *lines]) + "\n")
    command("metadata", tmp_path / "out", tmp_path / "q.tsv", *OFF)
    kept = pq.read_table(tmp_path / "out/lists/00000.parquet")["caption"].to_pylist()
    assert sorted(kept) == sorted(rows)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("md5", pa.array([bytes([i] * 7) for i in range(N)], pa.binary(7))),
        ("sha256", pa.array([0] * N)),
    ],
)
def test_a_hash_column_that_would_verify_nothing_is_refused(listed, name, values):
    said, _ = listed(expect=1, caption=CAPTIONS, **{name: values})
    assert name in said


def test_hashes_in_bytes_are_the_hashes(listed, tmp_path):
    raw = [bytes([i] * 16) for i in range(N)]
    listed(caption=CAPTIONS, md5=pa.array(raw, pa.binary(16)))
    kept = pq.read_table(tmp_path / "out/lists/00000.parquet").to_pylist()
    expected = dict(zip(URLS, (value.hex() for value in raw), strict=True))
    assert {row["url"]: row["md5"] for row in kept} == expected


def test_an_alternative_caption_column_is_chosen_by_a_setting(listed, tmp_path):
    path = tmp_path / "r.parquet"
    columns = {"url": URLS, "caption": CAPTIONS, "re_caption": [c + " anew" for c in CAPTIONS]}
    pq.write_table(pa.table(columns), path)
    chosen = "--set=columns={caption: re_caption}"
    command("metadata", tmp_path / "out", path, chosen, *OFF)
    kept = pq.read_table(tmp_path / "out/lists/00000.parquet")["caption"].to_pylist()
    assert all(caption.endswith(" anew") for caption in kept)


def test_other_lists_into_the_same_folder_are_refused(tmp_path):
    for name in "ab":
        urls = [url.replace("site", name) for url in URLS]
        pq.write_table(pa.table({"url": urls, "caption": CAPTIONS}), tmp_path / f"{name}.parquet")
    command("metadata", tmp_path / "out", tmp_path / "a.parquet", *OFF)
    before = (tmp_path / "out/lists/00000.parquet").read_bytes()
    said = command("metadata", tmp_path / "out", tmp_path / "b.parquet", *OFF, expect=1)
    assert "would give other rows" in said
    assert (tmp_path / "out/lists/00000.parquet").read_bytes() == before
    (tmp_path / "b.parquet").replace(tmp_path / "a.parquet")  # another content, the same name
    command("metadata", tmp_path / "out", tmp_path / "a.parquet", *OFF, expect=1)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("rows.jsonl", '{"url": "http://a.example/1.jpg"}\n', "jsonl"),
        ("rows.json", "[]", "json"),
        ("rows.txt", "http://a.example/1.jpg\n", "txt"),
        ("rows.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS"),
    ],
)
def test_lists_of_another_format_are_called_by_it(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    said = command("metadata", tmp_path / "out", tmp_path / name, *OFF, expect=1)
    assert word in said


# ---- pictures --------------------------------------------------------------------------------


def test_a_png_with_a_megabyte_of_text_is_a_picture(tmp_path):
    from data.web.fetch import _checked
    from gigagan.evaluation.judges.features import open_rgb

    def chunk(tag, content):
        check = zlib.crc32(tag + content)
        return struct.pack(">I", len(content)) + tag + content + struct.pack(">I", check)

    raw = b"".join(b"\0" + bytes(range(256)) * 3 for _ in range(256))
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"w\0\0" + zlib.compress(b"{}" * 2_000_000))
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    _checked(data, 10**8)
    (tmp_path / "big.png").write_bytes(data)
    assert open_rgb(tmp_path / "big.png").size == (256, 256)


@pytest.mark.parametrize("kind", ["JPEG2000", "ICO"])
def test_every_named_format_passes_the_fetch(kind):
    from data.web.fetch import _checked

    stored = io.BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(stored, kind)
    _checked(stored.getvalue(), 10**8)


def test_sixteen_bit_grey_is_the_same_everywhere(tmp_path):
    from gigagan.common.pictures import decode
    from gigagan.evaluation.judges.features import open_rgb
    from gigagan.inference.pictures import open_picture

    path = tmp_path / "0002.png"
    Image.fromarray(np.linspace(0, 65_535, 4096).reshape(64, 64).astype(np.uint16)).save(path)
    means = [
        np.asarray(picture.convert("RGB")).mean()
        for picture in (open_rgb(path), open_picture(path), decode(path.read_bytes()))
    ]
    assert means == pytest.approx([127.5] * 3, abs=1)


def test_metadata_addresses_of_clouds_are_not_public():
    from data.web.addresses import is_public

    for address in ("192.0.0.192", "169.254.169.254", "100.100.100.200", "fd00:ec2::254",
                    "::ffff:192.0.0.192", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"):  # fmt: skip
        assert not is_public(address), address
    assert is_public("93.184.216.34")


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    from data.web.fetch import _checked
    from gigagan.common.pictures import decode

    stored = io.BytesIO()
    Image.new("RGB", (512, 512), "red").save(stored, "JPEG", progressive=True)
    data = stored.getvalue()
    start = data.rindex(b"\xff\xda")
    bomb = data[:start] + data[start:-2] * 3_000 + data[-2:]
    for look in (lambda: _checked(bomb, 10**8), lambda: decode(bomb)):
        with pytest.raises(Exception, match="at most 100 are decoded"):
            look()


def test_other_jsons_of_coco_are_refused_with_what_is_needed(tmp_path):
    image = {"id": 1, "file_name": "1.png"}
    contents = {
        "instances": {"images": [image], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]},
        "karpathy": {"images": [{"filename": "1.png", "imgid": 1, "sentences": []}]},
        "broken": {
            "images": [image],
            "annotations": [{"id": 7, "image_id": 1, "caption": "half \ud83d here"}],
        },
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        words = "evaluate", "--heldout", file, "--out", tmp_path / "o"
        assert file.name in command(*words, expect=1, main=gigagan)
