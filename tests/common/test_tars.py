import io
import tarfile

import pytest

from gigagan.common.tars import DamagedTarError, members, read

FILES = {"0.jpg": b"a" * 700, "0.json": b"", "d/" + "n" * 90 + ".txt": b"c" * 512}


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as made:
        made.add(tmp_path, "d", recursive=False)
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # a fraction makes an extended header
            made.addfile(member, io.BytesIO(data))
    return path


def contents(path, **options):
    with path.open("rb", buffering=0) as file:
        return {member.name: read(file, member) for member in members(file, **options)}


@pytest.mark.parametrize("is_whole", [True, False])
def test_plain_files_are_found_with_their_bytes(tar, is_whole):
    assert contents(tar, is_whole=is_whole) == FILES


def test_a_damaged_header_costs_its_own_member(tar):
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as made:
        place = made.getmember("0.json").offset_data - 512
    data[place : place + 20] = b"\xff" * 20
    tar.write_bytes(data)
    assert contents(tar) == {name: FILES[name] for name in FILES if name != "0.json"}
    with pytest.raises(DamagedTarError, match="no header"):
        contents(tar, is_whole=True)


def test_a_tar_that_is_cut_short_gives_what_is_there_or_is_refused(tar):
    whole = tar.read_bytes()
    for end in range(0, len(whole), 512):
        tar.write_bytes(whole[:end])
        assert contents(tar).items() <= FILES.items()
        if not any(whole[end - 512 : end]) and end > 5000:
            continue  # the end mark is there
        with pytest.raises(DamagedTarError):
            contents(tar, is_whole=True)
