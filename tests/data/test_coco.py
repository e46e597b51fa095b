from __future__ import annotations

import json

import pytest

from data import coco


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


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not in COCO's captions format"):
        coco.read(write(tmp_path, {"pictures": []}))
