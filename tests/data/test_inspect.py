from __future__ import annotations

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.look import inspect
from data.look.sheet import CELL_PX, Tile, contact_sheet


def picture(width, height, codec="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec)
    return buffer.getvalue()


def sample(key, width=7, height=5, codec="PNG", caption="a cat"):
    return {
        f"{key}.jpg": picture(width, height, codec),
        f"{key}.json": json.dumps({"caption": caption}).encode(),
        f"{key}.txt": caption.encode(),
    }


def write_tar(path, members):
    """`members`: name → bytes, or (name, bytes) pairs where names recur."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path):
    members = sample("00000000") | sample("00000001", 3, 2, "JPEG", "zwei Hunde")
    return write_tar(tmp_path / "00000.tar", members | sample("00000002", 7, 5, "WEBP", "x"))


def lines(text):
    """Row name → text."""
    rows = [line for line in text.splitlines()[1:] if not line.startswith("   ")]
    return {row[2:17].strip(): row[18:] for row in rows}


def test_what_is_in_a_shard_is_counted(shard):
    found = lines(inspect.look(shard))
    assert found["samples"] == "3"
    assert found["members"] == "jpg 3, json 3, txt 3"
    assert found["codecs"] == "PNG 1, JPEG 1, WEBP 1"
    assert found["sizes"].startswith("short side 2 to 5 px, median 5; most often 7×5 (2)")
    assert found["captions"] == "3, 1 to 10 characters, median 5"
    assert found["duplicate keys"] == found["damaged"] == "none"
    assert "broken tars" not in found


def test_a_folder_is_taken_as_one(tmp_path):
    for number in range(2):
        write_tar(tmp_path / "images" / f"{number}.tar", sample(f"0000{number}"))
    found = lines(inspect.look(tmp_path))
    assert found["tars"].startswith("2, ")
    assert found["samples"] == "2"


def test_damaged_members_are_counted_and_named(tmp_path):
    members = sample("0") | sample("1") | sample("2")
    members["1.jpg"] = members["1.jpg"][:60]
    members["2.jpg"] = b"<html>"
    members["2.json"] = b"{"
    members["2.txt"] = b"\xff\xfe"
    text = inspect.look(write_tar(tmp_path / "a.tar", members))
    assert lines(text)["damaged"] == "4"
    assert "a.tar:1.jpg: " in text
    assert "a.tar:2.jpg: not a picture" in text
    assert "a.tar:2.json is not JSON" in text
    assert "a.tar:2.txt is not UTF-8" in text


def test_the_quick_look_reads_headers_and_says_so(tmp_path):
    members = sample("1", 90, 80)
    members["1.jpg"] = members["1.jpg"][:900]
    path = write_tar(tmp_path / "a.tar", members)
    assert lines(inspect.look(path, quick=True))["damaged"] == "none (headers only: --quick)"
    assert lines(inspect.look(path))["damaged"] == "1"


@pytest.mark.parametrize("fault", ["cut in a member", "cut in a header", "no end", "overwritten"])
def test_a_broken_tar_tells_what_could_be_read_and_where_it_broke(tmp_path, shard, fault):
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[6].offset
        end = tar.getmembers()[8].offset_data + 512
    data = shard.read_bytes()
    broken = {
        "cut in a member": data[: third + 600],
        "cut in a header": data[: third + 100],
        "no end": data[:end],
        "overwritten": data[:third] + b"\1" * 512 + data[third + 512 :],
    }
    shard.write_bytes(broken[fault])
    text = inspect.look(shard, sheet=tmp_path / "sheet.png")
    assert lines(text)["samples"] == ("3" if fault == "no end" else "2")
    assert lines(text)["broken tars"] == "1"
    assert f"byte {end if fault == 'no end' else third:,}" in text
    assert (tmp_path / "sheet.png").is_file()


def test_a_file_that_is_no_tar_breaks_at_its_start(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"holds no sample: a\.tar breaks at byte 0"):
        inspect.look(path)


def test_keys_that_recur_are_named(tmp_path):
    members = [*sample("0").items(), *sample("1").items(), *sample("0").items()]
    text = inspect.look(write_tar(tmp_path / "a.tar", members))
    assert lines(text)["duplicate keys"] == "1"
    assert "a.tar:0" in text


def test_hostile_members_are_shown_and_never_used(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    members = sample("../../x") | {"0.pkl": pickle.dumps(Evil()), "0.pyd": b"", "/etc/0.txt": b"c"}
    members["a\x1b[31mb.jpg"] = picture(2, 3)
    path = write_tar(tmp_path / "in" / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    text = inspect.look(path, sheet=tmp_path / "sheet.png")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in", "sheet.png"]
    assert "\x1b" not in text
    assert "a.tar:../../x.jpg would leave its folder" in text
    assert lines(text)["strange"] == "5"
    assert "pkl 1" in text


def test_deeply_nested_json_is_damage(tmp_path):
    members = {"0.json": b"[" * 200_000, "0.txt": b"c", "0.png": picture(2, 3)}
    assert "0.json is not JSON" in inspect.look(write_tar(tmp_path / "a.tar", members))


def test_the_table_beside_a_shard_is_compared(shard):
    table = pa.table({"status": ["success"] * 4 + ["failed_to_download"]})
    pq.write_table(table, shard.with_suffix(".parquet"))
    text = inspect.look(shard)
    assert "1 Parquet, 5 rows: 4 of them should be in the tars" in text
    assert "success 4, failed_to_download 1" in text


def test_the_sheet_shows_a_seeded_choice(shard, tmp_path):
    def draw(name, **settings):
        inspect.look(shard, sheet=tmp_path / name, **settings)
        return (tmp_path / name).read_bytes()

    assert draw("a.png", num=2) == draw("b.png", num=2, quick=True)
    assert len({draw("c.png", num=1, seed=seed) for seed in range(5)}) > 1
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width < 3 * CELL_PX


def test_a_sheet_needs_pictures_and_a_known_suffix(shard, tmp_path):
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1]}), table)
    with pytest.raises(ValueError, match="needs a tar"):
        inspect.look(table, sheet=tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a contact sheet is a \.png or \.jpg"):
        inspect.look(shard, sheet=tmp_path / "a.exe")
    with pytest.raises(ValueError, match="no tar or Parquet"):
        inspect.look(tmp_path / "absent")


def test_a_table_is_described(tmp_path):
    table = pa.table(
        {
            "key": ["a", "b", "c\x1b"],
            "fate": ["ok", "ok", "dns"],
            "detail": [None, None, "long " * 99],
            "vector": [[0.5] * 9] * 3,
            "miniature": [bytes(48)] * 3,
        }
    )
    pq.write_table(table, tmp_path / "fates.parquet", row_group_size=2)
    text = inspect.look(tmp_path / "fates.parquet")
    assert "3 rows in 2 row groups" in text
    assert "detail     string  2 null" in text
    assert any(line.split() == ["ok", "2"] for line in text.splitlines())
    assert "[0.5, 0.5, 0.5, …] (9 values)" in text
    assert "(48 bytes)" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 130


def test_tables_of_one_schema_are_taken_together(tmp_path):
    for number in range(2):
        pq.write_table(pa.table({"fate": ["ok"] * 3}), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "2.parquet")
    text = inspect.look(tmp_path)
    assert "0.parquet and 1 more\n  6 rows in 2 row groups" in text
    assert "2.parquet\n  1 rows" in text


def test_a_table_without_rows_or_of_another_kind(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.int32())}), tmp_path / "a.parquet")
    assert "0 rows" in inspect.look(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet"):
        inspect.look(tmp_path / "b.parquet")


# ---- contact sheets


def test_a_sheet_has_a_cell_for_each_tile():
    tiles = [Tile(Image.new("RGB", (3, 2), "red"), ["c"]), Tile(None, ["gone"]), Tile(None)]
    sheet = contact_sheet(tiles, columns=2, title="three")
    assert CELL_PX * 2 < sheet.width < CELL_PX * 2.5
    assert CELL_PX * 2 < sheet.height < CELL_PX * 3
    colours = {colour for _, colour in sheet.getcolors(1 << 16)}
    assert (255, 0, 0) in colours


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 2), (176, 176), (177, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_of_any_size_and_mode_fit(size, mode):
    assert contact_sheet([Tile(Image.new(mode, size))]).width == CELL_PX + 24


def test_no_text_makes_a_sheet_burst():
    hostile = ["w" * 10**6, "\x00\x1b\n", "漢字 " * 500, "", "a b " * 10**5]
    short = contact_sheet([Tile(None, ["x"])])
    long = contact_sheet([Tile(None, hostile)])
    assert long.height < short.height + 8 * 15
    assert contact_sheet([Tile(None, [])], title="t" * 10**5).width == short.width


def test_no_tiles_make_a_small_sheet_and_no_columns_an_error():
    assert contact_sheet([]).height < 50
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet([], columns=0)
