from contextlib import suppress

from gigagan.common.files import filled_aside, is_unfinished, sha256_of, write_aside


def test_a_file_appears_whole_and_nothing_stays_beside_it(tmp_path):
    for content in ("ünï", b"\0\1"):
        write_aside(tmp_path / "x.json", content, fsync=True)
    assert (tmp_path / "x.json").read_bytes() == b"\0\1"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    write_aside(tmp_path / "x", "old")
    with suppress(KeyError), filled_aside(tmp_path / "x") as partial:
        partial.write_text("half")
        assert partial.name == "x.partial"
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_rivals_write_beside_each_other_and_the_last_stays(tmp_path):
    path = tmp_path / "x"
    with filled_aside(path, has_rivals=True) as first, filled_aside(path, has_rivals=True) as other:
        assert first != other
        assert is_unfinished(first.name)
        assert is_unfinished(other.name)
        first.write_text("first")
        other.write_text("other")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "first")]


def test_a_name_is_unfinished_by_its_end_or_by_a_folder_of_it():
    assert is_unfinished("a/b.partial")
    assert is_unfinished("spill.partial/b")
    assert not is_unfinished("partial/b.partial.json")


def test_the_hash_is_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_of(tmp_path / "x") == empty
