"""Damaged pictures of a download: found, fetched again, and counted where they stay damaged."""

from __future__ import annotations

import io
import sys
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import originals
from data.config import DownloadConfig
from data.download import mend
from data.download.parts import Summary
from data.layout import image_shards
from data.web.fetch import FetchSettings

sys.path.append(str(Path(__file__).parent))  # several folders are called `tests`
import fake

ROWS = [[5, 7], [3]]
"""Rows of each shard of each part."""


def picture(number: int) -> bytes:
    return fake.encoded(fake.noise(number))


@pytest.fixture
def download(tmp_path) -> Path:
    """15 rows in two parts, of which number 2 failed."""
    numbers = iter(range(100))
    rows = [[[_row(next(numbers)) for _ in range(n)] for n in sizes] for sizes in ROWS]
    root = fake.download(tmp_path, rows)
    for part in (0, 1):  # as a download writes it
        mend._rewrite(root, part, {})
    return root


def _row(number: int) -> dict:
    url = f"http://pictures.test/{number}.png"
    return fake.row(number, None if number == 2 else picture(number), url=url)


def change(tar: Path, name: str, place: int, *, of_header: bool = False) -> None:
    """Flip a bit of a member's bytes, or of its header."""
    with tarfile.open(tar) as archive:
        member = archive.getmember(name)
    at = member.offset if of_header else member.offset_data
    data = bytearray(tar.read_bytes())
    data[at + place] ^= 4
    tar.write_bytes(data)


def keys(damaged: list[originals.Damage]) -> list[str]:
    return [key for _, key in damaged]


def test_whole_pictures_are_whole(download):
    assert originals.verify(download) == []


def test_a_flipped_bit_in_bytes_or_header_is_found_by_key_and_costs_no_other(download):
    first, second, _ = image_shards(download)
    change(first.tar, "000003.jpg", 30)
    change(second.tar, "000015.jpg", 3, of_header=True)
    damaged = originals.verify(download)
    assert damaged == [(first, "00000000003"), (second, "00000000015")]
    assert originals.verify(download, [second]) == damaged[1:]
    assert originals.verify(download, workers=2) == damaged


@pytest.mark.parametrize("cut", [0, 1])
def test_a_tar_that_is_cut_or_gone_lacks_what_was_in_it(download, cut):
    *_, last = image_shards(download)
    if cut:
        with last.tar.open("r+b") as file:
            file.truncate(700)
    else:
        last.tar.unlink()
    assert keys(originals.verify(download)) == ["00001000000", "00001000001", "00001000002"]


def test_a_tar_inside_of_a_damaged_one_leads_nowhere(tmp_path):
    evil = tarfile.TarInfo("000000.jpg")
    evil.size = 8**11 - 1
    nested = evil.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    root = fake.download(tmp_path, [[[fake.row(0, nested), fake.row(1)]]])
    (shard,) = image_shards(root)
    change(shard.tar, "000000.jpg", 3, of_header=True)
    assert keys(originals.verify(root)) == ["00000000000"]


def test_a_few_damaged_pictures_are_borne_and_more_are_an_error_with_a_remedy(tmp_path):
    originals.refuse_many(1, 7, "0", tmp_path)
    originals.refuse_many(3, 300, "0", tmp_path)
    with pytest.raises(originals.DamagedError, match=r"4 of 300 .*key 7\).* --verify` fetches"):
        originals.refuse_many(4, 300, "7", tmp_path)


# ---- fetched again -----------------------------------------------------------------------------


@pytest.fixture
def site():
    """The pictures' site: number 4 is gone by now, and number 6 is another."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            name = self.path.strip("/").removesuffix(".png")
            found = name.isdigit() and name != "4"
            body = picture(99 if name == "6" else int(name)) if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.asked = asked
    yield server
    server.shutdown()
    server.server_close()


def settings(site) -> FetchSettings:
    there = {"pictures.test": f"127.0.0.1:{site.server_address[1]}"}
    config = DownloadConfig(source="metadata", metadata=("x",), contact="me@example.org")
    return FetchSettings.of(config, there)


def in_tars(root: Path) -> dict[str, bytes]:
    return {
        key: data
        for shard in image_shards(root)
        for key, data in originals.whole(shard, originals.digests(shard))
    }


def test_damaged_pictures_alone_are_fetched_again_and_nothing_else_changes(download, site):
    before = in_tars(download)
    fates = [path.read_bytes() for path in sorted(download.glob("fates/*"))]
    first, second, third = image_shards(download)
    untouched = third.tar.stat().st_mtime_ns
    change(first.tar, "000003.jpg", 30)
    second.tar.unlink()  # its numbers are 5 to 11; 6 was damaged
    seen = []
    counts = mend.mend(
        download, originals.verify(download), settings(site), progress=lambda *t: seen.append(t)
    )
    assert counts == {"ok": 7, "hash_mismatch": 1}
    assert {p for p in site.asked if p.endswith("png")} == {f"/{n}.png" for n in (3, *range(5, 12))}
    assert seen[-1][1:] == (2, 2)
    assert originals.verify(download) == []
    lost = "00000000011"
    assert in_tars(download) == {k: d for k, d in before.items() if k != lost}
    assert third.tar.stat().st_mtime_ns == untouched
    assert [path.read_bytes() for path in sorted(download.glob("fates/*"))][1] == fates[1]


def test_what_cannot_be_had_again_has_a_fate_and_counts_add_up(download, site):
    first, *_ = image_shards(download)
    before = first.fates().to_pylist()
    change(first.tar, "000004.jpg", 11)
    assert mend.mend(download, originals.verify(download), settings(site)) == {"http_404": 1}
    rows = first.fates().to_pylist()
    assert rows[:4] == before[:4]
    assert (rows[4]["fate"], rows[4]["sha256"]) == ("http_404", None)
    assert rows[4]["asked_from"] > before[4]["asked_until"]
    assert rows[4]["url"] == before[4]["url"]
    summary = Summary.load(download / "fates" / "00000.parquet")
    assert summary.fates == {"ok": 10, "http_404": 2}
    assert summary.hosts == {"pictures.test": 2}
    assert originals.verify(download) == []


def test_a_mended_tar_is_as_long_as_img2dataset_s(download, site):
    (shard, *_) = image_shards(download)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|") as archive:
        for key, data in originals.whole(shard, originals.digests(shard)):
            info = tarfile.TarInfo(shard.member(key))
            info.size, info.mtime = len(data), 1_700_000_000.25
            info.uname = info.gname = "bigdata"
            archive.addfile(info, io.BytesIO(data))
    shard.tar.write_bytes(buffer.getvalue())
    change(shard.tar, "000003.jpg", 30)
    mend.mend(download, originals.verify(download), settings(site))
    assert shard.tar.stat().st_size == len(buffer.getvalue())
