"""Every path that `python -m gigagan` is given, and every wrong thing that may lie there.

Each is one line of error that names the thing, and leaves the folder as it was.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from gigagan.__main__ import main

from .wrong import CONTENTS as COMMON

PROMPT = "flat emoji of a bell"
COMMANDS: dict[str, list[str]] = {
    "sample: base": ["sample", PROMPT, "--base", "WRONG"],
    "sample: upsampler": ["sample", PROMPT, "--upsampler", "WRONG"],
    "sample: prompts": ["sample", "--from-file", "WRONG"],
    "upscale: picture": ["upscale", "WRONG", "--prompt", PROMPT],
    "upscale: upsampler": ["upscale", "good.png", "--prompt", PROMPT, "--upsampler", "WRONG"],
    "edit: base": ["edit", "mix", PROMPT, PROMPT, "--base", "WRONG"],
    "export: snapshot": ["export", "WRONG", "OUT/small.safetensors"],
    "evaluate: captions": ["evaluate", "--heldout", "WRONG"],
    "evaluate: settings": ["evaluate", "--heldout", "good", "--config", "WRONG"],
    "evaluate: drawn": ["evaluate", "--heldout", "good", "--drawn", "WRONG"],
    "evaluate: aligner": [
        "evaluate",
        "--heldout",
        "good",
        "--drawn",
        "drawn",
        "--aligner",
        "WRONG",
    ],
    "evaluate: results": ["evaluate", "--compare", "WRONG"],
    "blind: gallery": ["blind", "--heldout", "WRONG", "--real"],
    "blind: answers": ["blind", "--answers", "WRONG"],
    "train: settings": ["train", "--config", "WRONG", "--shards", ".", "--run-dir", "OUT"],
    "play: base": ["play", "--base", "WRONG"],
}
CONTENTS = COMMON | {"cut.safetensors": b"\x40\0\0\0\0\0\0\0{"}
NO_FILES = ("missing", "folder", "file/below")
FINE = {
    ("sample: prompts", "text"),
    ("sample: prompts", "object.json"),
    ("sample: prompts", "list.json"),
    ("sample: prompts", "torn.json"),
}
"""A line of any text is a prompt."""
CASES = [(n, k) for n in COMMANDS for k in (*CONTENTS, *NO_FILES) if (n, k) not in FINE]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one good thing of each kind."""
    root = tmp_path_factory.mktemp("place")
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(pixels).save(root / "good.png")
    for folder in ("good/images", "drawn/fake_images"):
        (root / folder).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    (root / "drawn/captions.txt").write_text("one\ntwo\n")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "annotations": [
            {"id": n, "image_id": n, "caption": c} for n, c in enumerate(("one", "two"))
        ],
    }
    (root / "good/captions.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_wrong_thing_is_one_line_that_names_it_and_leaves_nothing(
    place, tmp_path, monkeypatch, capsys, name, kind
):
    monkeypatch.chdir(place)
    path = tmp_path / "wrong" / kind
    (tmp_path / "wrong").mkdir()
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "file/below":
        path.parent.write_text("a file")
    out = tmp_path / "out"
    words = [w.replace("WRONG", str(path)).replace("OUT", str(out)) for w in COMMANDS[name]]
    if words[0] in ("sample", "upscale", "edit", "evaluate", "blind") and "--compare" not in words:
        words += ["--out", str(out)]
    before = sorted(p for p in place.rglob("*"))
    monkeypatch.setattr("faulthandler.enable", lambda: None)  # it wants a real standard error
    try:
        status = main(words)
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr().err
    assert status not in (0, None), said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert 1 <= len(errors) <= 2, said  # of a picture or prompt, and how many of them
    assert any(str(path) in line for line in said.splitlines()), said
    assert sorted(p for p in place.rglob("*")) == before
    assert not out.exists() or not any(p.is_file() for p in out.rglob("*"))
