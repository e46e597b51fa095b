"""Folders and lists of pictures as training shards, and what strangers may have put there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.__main__ as command
from data import folders
from data.config import FilterConfig
from data.folders import FoldersError
from data.shards.loader import ShardLoader
from data.shards.manifest import parse_index
from gigagan.evaluation.heldout import read_heldout

sys.path.append(str(Path(__file__).parent))  # several folders are called `tests`
from kept_rows import noisy

CONFIG = FilterConfig(resolutions=(5, 8), samples_per_shard=4)
CLASSES = {"n02_red fox": 3, "dog": 5, "größe_東京": 2}


@pytest.fixture
def src(tmp_path) -> Path:
    """Three classes of 3, 5 and 2 pictures, some of them deeper than others."""
    place = iter(range(100))
    for name, count in CLASSES.items():
        for number in range(count):
            path = tmp_path / "src" / name / ("a/b" if number % 2 else ".") / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noisy(next(place)))
    return tmp_path / "src"


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def samples(out: Path, side: int = 8) -> dict[str, tuple[str, str, str]]:
    """Key → (path, label, caption) of all samples."""
    found = {}
    for sidecar in sorted((out / f"{side:03d}").glob("*.parquet")):
        for row in pq.read_table(sidecar).to_pylist():
            found[row["key"]] = row["label"], row["caption"]
    paths = {row["key"]: row["url"] for row in pq.read_table(out / "kept.parquet").to_pylist()}
    return {key: (paths[key], *told) for key, told in found.items()}


def left(out: Path) -> dict[str, str]:
    return {r["path"]: r["reason"] for r in pq.read_table(out / folders.LEFT_OUT).to_pylist()}


def test_every_picture_below_a_class_s_folder_is_a_sample_of_it(src, tmp_path):
    out = tmp_path / "out"
    report = folders.shard(src, out, CONFIG)
    for side in (5, 8):
        index = parse_index((out / f"{side:03d}" / "index.json").read_bytes(), "index")
        assert index.classes == ("dog", "größe_東京", "n02_red fox")
        assert (index.samples, index.unlabelled, len(index.shards)) == (10, 0, 3)
    assert sorted(samples(out).values()) == sorted(
        (path.relative_to(src).as_posix(), path.parts[len(src.parts)], caption)
        for path in src.rglob("*.JPEG")
        for caption in [f"a photo of a {path.parts[len(src.parts)].replace('_', ' ')}"]
    )
    assert report.details["classes"] == CLASSES
    assert (report.counts["ok"], report.metrics["classes"], left(out)) == (10, 3, {})
    batch = next(ShardLoader(out / "008", batch_size=10, seed=0, reads="label").batches())
    assert sorted(batch.captions) == sorted(name for name, n in CLASSES.items() for _ in range(n))


def test_the_seed_decides_the_order_and_the_bytes_follow_it(src, tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        folders.shard(src, tmp_path / name, CONFIG, seed=seed, workers=workers)
    a, b, c = (tmp_path / name for name in "abc")
    assert contents(a) == contents(b)
    assert [*samples(a).values()] != [*samples(c).values()]
    assert sorted(samples(a).values()) == sorted(samples(c).values())


def test_a_second_call_writes_only_the_missing_shard(src, tmp_path):
    out = tmp_path / "out"
    folders.shard(src, out, CONFIG)
    whole = contents(out)
    (out / "008" / "train-00001.tar").unlink()
    before = (out / "008" / "train-00000.tar").stat().st_mtime_ns
    folders.shard(src, out, CONFIG)
    assert contents(out) == whole
    assert (out / "008" / "train-00000.tar").stat().st_mtime_ns == before


def test_held_out_pictures_of_each_class_are_in_no_shard(src, tmp_path):
    out = tmp_path / "out"
    report = folders.shard(src, out, CONFIG, heldout=1)
    assert (report.counts["held out"], report.counts["ok"]) == (3, 7)
    held = read_heldout(out / "heldout")
    notes = json.loads((out / "heldout" / "captions.json").read_text())["annotations"]
    assert sorted(note["label"] for note in notes) == sorted(CLASSES)
    assert held.captions == [f"a photo of a {n['label'].replace('_', ' ')}" for n in notes]
    trained = {(src / path).read_bytes() for path, _, _ in samples(out).values()}
    aside = {picture.read_bytes() for picture in held.pictures}
    assert len(trained) + len(aside) == 10
    assert not trained & aside


def test_holding_out_a_whole_class_is_refused(src, tmp_path):
    with pytest.raises(FoldersError, match=r"class 'größe_東京' has no.*lower --heldout"):
        folders.shard(src, tmp_path / "out", CONFIG, heldout=2)


def test_a_copy_of_a_held_out_picture_is_in_no_shard(src, tmp_path):
    for path in [*(src / "dog").rglob("*.JPEG")]:
        (src / "n02_red fox" / f"copy-{path.name}").write_bytes(path.read_bytes())
    report = folders.shard(src, tmp_path / "out", CONFIG, heldout=1)
    held = read_heldout(tmp_path / "out" / "heldout")
    aside = {picture.read_bytes() for picture in held.pictures}
    trained = {(src / path).read_bytes() for path, _, _ in samples(tmp_path / "out").values()}
    assert not trained & aside
    assert report.counts["same bytes"] >= 1


# Lists


def listed(tmp_path: Path, text: str, name: str = "list.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_says_labels_and_perhaps_captions(src, tmp_path):
    text = 'path,label,caption\ndog/0.JPEG,7,\n./dog/a/../2.JPEG,10,"a dog, asleep"\n'
    out = tmp_path / "out"
    folders.shard(src, out, CONFIG, listed=listed(tmp_path, text), caption="class {label}")
    assert sorted(samples(out).values()) == [
        ("dog/0.JPEG", "7", "class 7"),
        ("dog/2.JPEG", "10", "a dog, asleep"),
    ]
    assert parse_index((out / "008" / "index.json").read_bytes(), "").classes == ("10", "7")


def test_tsv_and_parquet_are_lists_too(src, tmp_path):
    tsv = listed(tmp_path, "label\tpath\nb\tdog/0.JPEG\na\tdog/2.JPEG\n", "list.tsv")
    table = pa.table({"path": ["dog/0.JPEG", "dog/2.JPEG"], "label": pa.array([1, 2], pa.int8())})
    pq.write_table(table, tmp_path / "list.parquet")
    folders.shard(src, tmp_path / "a", CONFIG, listed=tsv)
    folders.shard(src, tmp_path / "b", CONFIG, listed=tmp_path / "list.parquet")
    assert sorted(label for _, label, _ in samples(tmp_path / "a").values()) == ["a", "b"]
    assert sorted(label for _, label, _ in samples(tmp_path / "b").values()) == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("dog/2.JPEG,", "row 2 has no label"),
        (",cat", "row 2 has no path"),
        ("../secret.png,cat", r"row 2: path '\.\./secret\.png' leads out of"),
        ("/etc/passwd,cat", "row 2: path '/etc/passwd' leads out of"),
        ("dog/../..,cat", "leads out of"),
        ("dog/..,cat", "leads out of"),
        ("dog/2.JPEG,a/b", "label 'a/b' has a slash"),
        ("dog/2.JPEG,a\x07b", "label .* has control characters"),
        ("dog/\x002.JPEG,cat", "path .* has control characters"),
        ("dog/./0.JPEG,cat", "is that of row 1, and a picture is of one class"),
        ("dog/2.JPEG,cat,more", "is no list of pictures"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_its_number(src, tmp_path, row, why):
    text = f"path,label\ndog/0.JPEG,dog\n{row}\n"
    with pytest.raises(FoldersError, match=why):
        folders.shard(src, tmp_path / "out", CONFIG, listed=listed(tmp_path, text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("list.csv", "path,name\na,b\n"), ("list.txt", "path,label\na,b\n"), ("list.csv", "")],
)
def test_a_file_that_is_no_list_is_told_what_a_list_is(src, tmp_path, name, text):
    with pytest.raises(FoldersError, match=rf"{name} is no list.*columns path and label"):
        folders.shard(src, tmp_path / "out", CONFIG, listed=listed(tmp_path, text, name))


# What strangers may have put there


def test_what_cannot_be_read_is_told_with_its_reason(src, tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "secret.png")
    dog = src / "dog"
    (dog / "out.png").symlink_to(tmp_path / "secret.png")
    (dog / "inside.png").symlink_to(dog / "0.JPEG")
    (dog / "loop.png").symlink_to("loop.png")
    (dog / "up").symlink_to("..")
    (dog / "broken.jpg").write_bytes((dog / "0.JPEG").read_bytes()[:200])
    (dog / "notes.txt").write_text("no picture")
    (dog / ".hidden").write_text("no picture")
    os.mkfifo(dog / "pipe.jpg")
    (src / "readme.txt").write_text("no picture")
    (dog / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    report = folders.shard(src, tmp_path / "out", CONFIG)
    found = {path: why.partition(":")[0] for path, why in left(tmp_path / "out").items()}
    assert found == {
        "dog/out.png": "link",
        "dog/loop.png": "link",
        "dog/up": "link",
        "dog/broken.jpg": "undecodable original",
        "dog/notes.txt": "undecodable original",
        "dog/pipe.jpg": "no file",
        "dog/\\udcff.jpg": "name",
        "readme.txt": "stray",
    }
    assert (report.counts["ok"], report.counts["link"]) == (11, 3)
    assert "dog/inside.png" in {path for path, _, _ in samples(tmp_path / "out").values()}


def test_a_broken_picture_is_not_held_out(src, tmp_path):
    for path in (src / "dog").rglob("*.JPEG"):
        if path.name != "0.JPEG" and path.name != "1.JPEG":
            path.write_bytes(b"broken")
    report = folders.shard(src, tmp_path / "out", CONFIG, heldout=1)
    assert report.details["classes"]["dog"] == 1
    assert report.counts["undecodable original"] == 3


@pytest.mark.parametrize("fault", ["empty", "broken", "link"])
def test_a_class_without_a_readable_picture_is_refused_and_leaves_nothing_to_train_on(
    src, tmp_path, fault
):
    if fault == "link":
        (src / "cat").symlink_to(src / "dog")
    else:
        (src / "cat").mkdir()
    if fault == "broken":
        (src / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(FoldersError, match="class 'cat' has no picture to train on") as refused:
        folders.shard(src, tmp_path / "out", CONFIG)
    told = {"empty": "holds no file", "broken": "not a picture", "link": "not followed"}
    assert told[fault] in str(refused.value)
    assert not [*tmp_path.glob("out/*/index.json")]


@pytest.mark.parametrize("name", ["a\nb", os.fsdecode(b"\xff"), " "])
def test_a_folder_whose_name_is_no_label_is_refused(src, tmp_path, name):
    (src / name).mkdir()
    with pytest.raises(FoldersError, match=r"the folder .* has .*: give it another name"):
        folders.shard(src, tmp_path / "out", CONFIG)


def test_one_class_is_none_and_output_in_the_source_is_refused(src, tmp_path):
    with pytest.raises(FoldersError, match=r"1 class \(a\), and two at least"):
        folders.shard(src / "dog", tmp_path / "out", CONFIG)
    with pytest.raises(FoldersError, match="whose folders are classes"):
        folders.shard(src, src / "out", CONFIG)
    with pytest.raises(FoldersError, match="is no folder"):
        folders.shard(tmp_path / "gone", tmp_path / "out", CONFIG)
    with pytest.raises(FoldersError, match=r"write \{label\} where the class is to be named"):
        folders.shard(src, tmp_path / "out", CONFIG, caption="a photo")


# The command


def test_the_command_prints_the_funnel_and_where_things_are(src, tmp_path, capsys):
    (src / "dog" / "notes.txt").write_text("no picture")
    arguments = ["folders", str(src), str(tmp_path / "out"), "--resolutions", "8", "5", "8"]
    assert command.main([*arguments, "--codec", "jpg", "--heldout", "1"]) == 0
    told = capsys.readouterr().out
    assert [word in told for word in ("held out", "005", "008", "left-out.parquet")] == [True] * 4
    assert command.main([*arguments, "--heldout", "1", "--seed", "1"]) == 1
    assert "begun with another seed" in capsys.readouterr().err


def test_an_error_of_the_command_is_one_line(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    arguments = ["folders", str(tmp_path / "src"), str(tmp_path / "out"), "--resolutions", "8"]
    assert command.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert [*tmp_path.iterdir()] == [tmp_path / "src"]
