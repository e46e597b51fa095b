from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import coco
from data.web.archives import Archive, ArchiveError, unpack


def write(tmp_path, document):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").touch()
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    return path


def test_captions_find_their_pictures_in_the_order_of_annotations(tmp_path):
    path = write(
        tmp_path,
        {
            "info": {"palette": {"red": [255, 0, 0]}},
            "images": [{"id": 7, "file_name": "b.png", "width": 1, "height": 1}],
            "annotations": [
                {"id": 1, "image_id": 7, "caption": "eine Geige", "concept": "violin"},
                {"id": 2, "image_id": 7, "caption": "a fiddle"},
            ],
        },
    )
    found = coco.read(path)
    assert found.captions == ["eine Geige", "a fiddle"]
    assert [p.name for p in found.paths] == ["b.png", "b.png"]
    assert found.extras == [{"concept": "violin"}, {}]
    assert found.palette == {"red": (255, 0, 0)}


def test_a_picture_that_is_not_there_is_named(tmp_path):
    document = {
        "images": [{"id": 7, "file_name": "c.png"}],
        "annotations": [{"image_id": 7, "caption": "x"}],
    }
    with pytest.raises(ValueError, match=r"lists c\.png, which is not in"):
        coco.read(write(tmp_path, document))


def test_missing_pictures_are_counted_and_the_first_are_named(tmp_path):
    document = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(5)],
        "annotations": [{"image_id": n // 2, "caption": "x"} for n in range(10)],
    }
    with pytest.raises(ValueError, match=r"lists 0\.png, 1\.png, 2\.png and 2 more, which are not"):
        coco.read(write(tmp_path, document))


IMAGE = {"id": 7, "file_name": "b.png"}


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"pictures": []}, "no list 'images'"),
        ([], "no list 'images'"),
        ({"images": [IMAGE], "annotations": {}}, "no list 'annotations'"),
        ({"images": [IMAGE, {"id": 8}], "annotations": []}, r"images\[1\] has no 'file_name'"),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 7, "caption": None}]},
            r"annotations\[0\] has no 'caption'",
        ),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 6, "caption": "x"}]},
            r"annotations\[0\] is of a picture that is not listed",
        ),
        ({"images": [{"id": 1, "file_name": "../b.png"}], "annotations": []}, "leaves its folder"),
    ],
)
def test_another_format_is_refused_with_the_place(tmp_path, document, place):
    with pytest.raises(ValueError, match=f"not in COCO's captions format.*{place}"):
        coco.read(write(tmp_path, document))


def test_a_file_cut_short_is_refused_with_the_place(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"not in COCO's captions format.*line 1 column 13"):
        coco.read(path)


# ---- the captions of an evaluation


@pytest.fixture
def annotations(tmp_path):
    """Seven pictures with three captions each, and one without any."""
    document = {
        "info": {"year": 2014},
        "images": [{"id": 10 * n, "file_name": f"{n}.jpg"} for n in range(8)],
        "annotations": [
            {"id": 100 * n + m, "image_id": 10 * n, "caption": f" caption {m}\n of {n} "}
            for m in range(3)
            for n in range(7)
        ],
    }
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(document))
    return path


def test_the_caption_list_of_a_seed_never_changes(annotations):
    chosen = coco.evaluation_captions(annotations, 5, seed=0)
    assert chosen.lines.decode().splitlines()[0] == FROZEN_FIRST
    assert chosen.sha256 == FROZEN_SHA256


FROZEN_FIRST = '{"image_id":0,"annotation_id":0,"file_name":"0.jpg","caption":"caption 0 of 0"}'
FROZEN_SHA256 = "01807bde721988c0f15f98d819e44805ad4ecee3048094549905a50af0634f93"


def test_the_caption_list_has_one_caption_of_each_picture_in_order(annotations):
    chosen = coco.evaluation_captions(annotations, 5, seed=3)
    ids = [caption.image_id for caption in chosen.captions]
    assert len(chosen) == 5
    assert ids == sorted(set(ids))
    assert all(c.annotation_id // 100 == c.image_id // 10 for c in chosen.captions)
    assert all(re.fullmatch(r"caption \d of \d", c.caption) for c in chosen.captions)
    assert coco.evaluation_captions(annotations, 5, seed=4).sha256 != chosen.sha256


def test_the_caption_list_does_not_depend_on_the_order_of_the_file(annotations):
    before = coco.evaluation_captions(annotations, 4, seed=1).sha256
    document = json.loads(annotations.read_text())
    for part in ("images", "annotations"):
        document[part].reverse()
    annotations.write_text(json.dumps(document))
    assert coco.evaluation_captions(annotations, 4, seed=1).sha256 == before


def test_fewer_captions_are_a_part_of_more(annotations):
    images = [
        {c.image_id for c in coco.evaluation_captions(annotations, num, seed=2).captions}
        for num in (2, 5, 7)
    ]
    assert images[0] < images[1] < images[2]


def test_the_hash_is_that_of_the_written_file(annotations, tmp_path):
    chosen = coco.evaluation_captions(annotations, 5)
    chosen.write(tmp_path / "new" / "list.jsonl")
    content = (tmp_path / "new" / "list.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == chosen.sha256
    assert [*json.loads(content.splitlines()[0])] == [
        "image_id",
        "annotation_id",
        "file_name",
        "caption",
    ]


def test_the_heldout_file_has_the_chosen_captions_and_every_picture(annotations, tmp_path):
    chosen = coco.evaluation_captions(annotations, 5)
    coco.write_heldout(annotations, chosen, tmp_path / "captions.json")
    document = json.loads((tmp_path / "captions.json").read_text())
    ids = {note["id"] for note in document["annotations"]}
    assert ids == {caption.annotation_id for caption in chosen.captions}
    assert len(document["images"]) == 8
    assert document["info"]["captions_sha256"] == chosen.sha256


@pytest.mark.parametrize("num", [0, 8])
def test_more_captions_than_pictures_are_refused(annotations, num):
    with pytest.raises(ValueError, match=r"has 7 captioned pictures.*ask for 1 to 7"):
        coco.evaluation_captions(annotations, num)


# ---- as distributed


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Site:
    """Serves bytes with ranges; `cuts` are connections that end after so many bytes."""

    def __init__(self):
        self.files, self.asked, self.cuts, self.statuses = {}, [], [], []
        self.ranges = True
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler):
        wanted = handler.headers.get("Range")
        self.asked.append((handler.path, wanted))
        status = self.statuses.pop(0) if self.statuses else 200
        data = self.files.get(handler.path)
        if status != 200 or data is None:
            handler.send_error(404 if data is None else status)
            return
        start = int(wanted[6:-1]) if wanted and self.ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        stop = self.cuts.pop(0) if self.cuts else len(data)
        handler.wfile.write(data[start:stop])


@pytest.fixture
def site(monkeypatch):
    """A COCO of three pictures; its release is val2017."""
    site = Site()
    notes = {
        "images": [{"id": n, "file_name": f"{n:012}.jpg"} for n in range(3)],
        "annotations": [{"id": n, "image_id": n, "caption": f"no. {n}"} for n in range(3)],
    }
    pictures = {f"val2017/{n:012}.jpg": bytes([n]) * 3000 for n in range(3)}
    contents = {
        "annotations_trainval2017.zip": zipped(
            {
                "annotations/captions_val2017.json": json.dumps(notes),
                "annotations/instances_val2017.json": "{}",
            }
        ),
        "val2017.zip": zipped({"val2017/": "", **pictures}),
    }
    for name, data in contents.items():
        folder = "annotations" if name.startswith("annotations") else "zips"
        site.files[f"/{folder}/{name}"] = data
        archive = Archive(name, folder, len(data), hashlib.md5(data).hexdigest())
        monkeypatch.setitem(coco.ARCHIVES, name, archive)
    monkeypatch.setitem(coco.NUM_PICTURES, "val2017", 3)
    yield site
    site.server.shutdown()
    site.server.server_close()


ZIP = "/zips/val2017.zip"


def fetch(out, site, **settings):
    return coco.fetch(out, 2017, "val", base_url=site.url, pause_s=0, **settings)


def test_a_release_is_downloaded_and_unpacked_in_its_layout(site, tmp_path):
    told = []
    captions = fetch(tmp_path, site, progress=lambda *what: told.append(what))
    assert captions == tmp_path / "annotations" / "captions_val2017.json"
    assert sorted(p.name for p in (tmp_path / "val2017").iterdir()) == [
        f"{n:012}.jpg" for n in range(3)
    ]
    assert (tmp_path / "val2017" / "000000000002.jpg").read_bytes() == b"\2" * 3000
    assert not list(tmp_path.rglob("*.partial"))
    size = coco.ARCHIVES["val2017.zip"].size
    assert ("val2017.zip, bytes", size, size) in told


def test_a_release_that_is_there_asks_for_nothing(site, tmp_path):
    fetch(tmp_path, site)
    for path in tmp_path.glob("*.zip"):
        path.unlink()
    site.asked.clear()
    fetch(tmp_path, site)
    assert site.asked == []


def test_a_broken_transfer_goes_on_where_it_stopped(site, tmp_path):
    site.cuts = [10**6, 2000, 5000]  # the annotations come whole
    fetch(tmp_path, site)
    assert [wanted for path, wanted in site.asked if path == ZIP] == [
        None,
        "bytes=2000-",
        "bytes=5000-",
    ]


def test_another_process_goes_on_with_what_one_left(site, tmp_path):
    (tmp_path / "val2017.zip.partial").write_bytes(site.files[ZIP][:4000])
    fetch(tmp_path, site)
    assert (ZIP, "bytes=4000-") in site.asked


def test_a_server_without_ranges_sends_all_again(site, tmp_path):
    site.ranges = False
    (tmp_path / "val2017.zip.partial").write_bytes(b"x" * 4000)
    assert fetch(tmp_path, site).is_file()


def test_a_busy_server_is_asked_again_and_a_hopeless_one_is_not(site, tmp_path):
    site.statuses = [503, 429]
    fetch(tmp_path / "a", site)
    assert len(site.asked) == 4
    site.asked.clear()
    site.statuses = [403]
    with pytest.raises(ArchiveError, match=r"HTTP 403.*place annotations_trainval2017\.zip"):
        fetch(tmp_path / "b", site)
    assert len(site.asked) == 1


def test_without_network_the_error_says_which_file_to_place_by_hand(site, tmp_path):
    md5 = coco.ARCHIVES["annotations_trainval2017.zip"].md5
    with pytest.raises(ArchiveError, match=rf"place annotations_trainval2017\.zip .*md5 {md5}"):
        coco.fetch(tmp_path, 2017, "val", base_url="http://127.0.0.1:9", attempts=2, pause_s=0)


def test_zips_placed_by_hand_are_used(site, tmp_path):
    for path, data in site.files.items():
        (tmp_path / path.rpartition("/")[2]).write_bytes(data)
    fetch(tmp_path, site)
    assert site.asked == []


def test_other_bytes_under_the_name_are_an_error_and_stay(site, tmp_path):
    placed = tmp_path / "val2017.zip"
    placed.write_bytes(bytes(len(site.files[ZIP])))
    with pytest.raises(ArchiveError, match=r"val2017\.zip is not .* as published .*remove it"):
        fetch(tmp_path, site)
    assert placed.exists()


def test_downloaded_bytes_that_differ_do_not_stay(site, tmp_path):
    site.files[ZIP] = bytes(len(site.files[ZIP]))
    with pytest.raises(ArchiveError, match=r"it is removed: run again"):
        fetch(tmp_path, site)
    assert not list(tmp_path.glob("val2017.zip*"))


def test_unpacking_resumes_and_heals(site, tmp_path):
    fetch(tmp_path, site)
    pictures = sorted((tmp_path / "val2017").iterdir())
    kept = pictures[0].stat().st_mtime_ns
    pictures[1].unlink()
    pictures[2].write_bytes(b"short")
    fetch(tmp_path, site)
    assert pictures[0].stat().st_mtime_ns == kept
    assert [len(p.read_bytes()) for p in pictures] == [3000] * 3


def test_a_captions_file_with_other_numbers_is_refused(site, tmp_path, monkeypatch):
    monkeypatch.setitem(coco.NUM_PICTURES, "val2017", 4)
    with pytest.raises(ValueError, match=r"lists 3 pictures, not 4"):
        fetch(tmp_path, site)


def test_an_unknown_release_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no val2015: choose train2014, val2014"):
        coco.fetch(tmp_path, 2015, "val")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a\\evil", "a//evil"])
def test_no_member_of_a_zip_leaves_the_folder(tmp_path, name):
    path = tmp_path / "in" / "a.zip"
    path.parent.mkdir()
    path.write_bytes(zipped({"good": "x", name: "y"}))
    with pytest.raises(ArchiveError, match="leaves the folder"):
        unpack(path, tmp_path / "out", lambda member: True)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.zip"]


def test_a_zip_cut_short_is_an_error_with_the_remedy(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"good": "x" * 5000})[:3000])
    with pytest.raises(ArchiveError, match=r"cannot be unpacked.*remove it"):
        unpack(path, tmp_path, lambda member: True)


def test_the_published_archives_are_whole_entries():
    assert {archive.name for archive in coco.ARCHIVES.values()} == {*coco.ARCHIVES}
    assert all(re.fullmatch(r"[0-9a-f]{32}", archive.md5) for archive in coco.ARCHIVES.values())
    assert len({archive.md5 for archive in coco.ARCHIVES.values()}) == 6
