"""README's layout names what is there, and nothing that is not."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = (ROOT / "README.md").read_text().partition("## Layout\n\n```\n")[2].partition("```")[0]
ROOMS = {name: re.split(rf"(?m)^{name}/", LAYOUT)[1] for name in ("flows", "data", "gigagan")}
ROOMS = {name: re.split(r"(?m)^\w+/", text)[0] for name, text in ROOMS.items()}


def words(text):
    return set(re.findall(r"[a-z_0-9]+", text))


@pytest.mark.parametrize("room", ROOMS)
def test_every_folder_and_module_of_a_room_is_in_its_layout(room):
    found = [path for path in (ROOT / room).iterdir() if not path.name.startswith(("_", "."))]
    names = {path.stem for path in found if path.suffix == ".py" or path.is_dir()}
    assert names - words(ROOMS[room]) == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_line_of_the_layout_names_modules_that_are_there(room):
    for line in ROOMS[room].splitlines()[1:]:
        names = re.findall(r"(?<=  )[a-z_]+(?=  |$| ·|\n)", f"  {line.strip()}".partition(":")[0])
        for name in names:
            there = [*(ROOT / room).rglob(f"{name}.py"), *(ROOT / room).rglob(name)]
            assert name == "top" or there, f"{room}: {name}"


TESTED = {"common": "gigagan/common", "data": "data", "flows": "flows", "gigagan": "gigagan"}
"""Folder of tests → the room whose modules they are called by."""


@pytest.mark.parametrize("folder", TESTED)
def test_tests_are_called_by_a_module_or_folder_of_their_room(folder):
    """What spans modules lies in `tests/faults` and `tests/agreement`."""
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*")}
    room = [path for path in (ROOT / TESTED[folder]).rglob("*") if path.name != "__pycache__"]
    names = {path.stem.strip("_") for path in room if path.suffix == ".py" or path.is_dir()}
    assert tests - names == set()
