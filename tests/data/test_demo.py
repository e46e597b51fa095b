from __future__ import annotations

import io
import urllib.error
import urllib.request

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import coco, demo
from data.config import EmbeddedConfig
from data.decode import decode

SMALL = EmbeddedConfig(max_concepts=8, pictures_per_style=2, size_px=48, heldout_fraction=0.25)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    demo.build(out, SMALL)
    return out


def test_concepts_are_those_of_both_sets_without_skin_tones():
    names = [concept.name for concept in demo.concepts()]
    assert len(names) == len(set(names)) > 1800
    assert "violin" in names
    assert "flag of France" in names
    assert not any("skin tone" in name for name in names)


def test_training_and_heldout_concepts_are_disjoint():
    train, heldout = demo.split(SMALL)
    assert (len(train), len(heldout)) == (6, 2)
    assert not {c.name for c in train} & {c.name for c in heldout}


def test_a_caption_tells_style_name_and_background():
    train, _ = demo.split(SMALL)
    for picture in demo._pictures(train[0], SMALL):
        for word in (demo.STYLES[picture.style], train[0].name, picture.background):
            assert word in picture.caption


def test_pictures_of_a_concept_differ_in_background_and_size():
    train, _ = demo.split(SMALL)
    looks = demo._pictures(train[0], SMALL)
    assert len({look.background for look in looks}) == len(looks) == 4
    assert len({look.scale for look in looks}) == 4


def test_heldout_is_a_coco_set_on_its_named_backgrounds(built):
    heldout = coco.read(built / "heldout" / "captions.json")
    assert len(heldout) == 4
    for path, extra in zip(heldout.paths, heldout.extras, strict=True):
        corner = np.asarray(Image.open(path).convert("RGB"))[0, 0]
        assert tuple(corner) == heldout.palette[extra["background"]]


def test_every_picture_that_should_be_there_is_served(built):
    rows = pq.read_table(built / "site" / "truth.parquet").to_pylist()
    with demo.serve(built / "site") as port:
        for row in rows:
            url = row["url"].replace(demo.HOST, f"127.0.0.1:{port}")
            if row["defect"] in ("missing", "no_host", "web_page", "truncated"):
                continue
            with urllib.request.urlopen(url) as answer:
                Image.open(io.BytesIO(answer.read())).load()
                assert bool(answer.headers["X-Robots-Tag"]) == (row["defect"] == "opt_out")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/../truth.parquet")


@pytest.mark.parametrize(("kind", "codec"), [("sixteen_bit", "png"), ("rotated", "jpg")])
def test_odd_encodings_decode_to_the_picture(kind, codec):
    train, _ = demo.split(SMALL)
    picture = demo._pictures(train[0], SMALL)[0]
    [row] = demo._plant(picture, kind, picture, 48, np.random.default_rng(0))
    glyph = demo.render(train[0].glyphs[0], 48)
    data = demo._bytes_of(row, glyph, 48)
    plain = demo.draw(row.picture, glyph, (48, 48))
    plain = plain.convert("L").convert("RGB") if kind == "sixteen_bit" else plain
    error = np.abs(np.asarray(decode(data), float) - np.asarray(plain, float)).mean()
    assert error < (0.6 if codec == "png" else 6)


def test_building_again_changes_nothing(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    demo.build(built, SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*") if p.is_file()}


def test_the_source_is_a_function_of_its_seed(built, tmp_path):
    demo.build(tmp_path, SMALL)
    for name in ("laion", "coyo", "truth"):
        first, second = (pq.read_table(o / "site" / f"{name}.parquet") for o in (built, tmp_path))
        assert first.equals(second)
    for path in (built / "site" / "files" / "pictures").iterdir():
        assert path.read_bytes() == (tmp_path / "site/files/pictures" / path.name).read_bytes()
