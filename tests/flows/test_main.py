"""The command line: every known failure is one message and a status."""

import errno
import os
import subprocess
import sys

import pytest

from flows.__main__ import explain, main
from flows.commands.pipeline import pictures
from flows.config import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "dmo"], "did you mean 'demo'"),
        (["run", "--set", "filter.min_sid=3"], "did you mean 'filter.min_side'"),
        (["run", "--set", "filter.min_side"], "KEY=VALUE"),
        (["run", "--set", "filter.min_side=x"], "filter.min_side = 'x'"),
        (["run", "--stages", "train"], "unknown stage 'train': the stages are download"),
        (["run", "--force", "trian-base"], "unknown stage 'trian-base'"),
        (["run", "--store", "{file}/store"], "cannot be written"),
        (["submit", "--preset", "dmo"], "did you mean 'demo'"),
    ],
)
def test_a_mistake_is_one_message_and_status_1(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("{file}", str(tmp_path / "file")) for argument in arguments]
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed.replace("\n", " ")
    assert "Traceback" not in printed


def test_debug_raises(capsys):
    with pytest.raises(ValueError, match="unknown preset"):
        main(["run", "--preset", "dmo", "--debug"])


def test_a_full_disk_and_a_missing_package_have_a_remedy():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    assert "make room" in explain(full)
    assert "make demo" in explain(ModuleNotFoundError("No module named 'lpips'", name="lpips"))
    ours = ModuleNotFoundError("the embedded source needs the package 'x': install the extra")
    assert explain(ours) == str(ours)


def test_the_first_cause_is_told_not_what_followed_from_it():
    consequence = RuntimeError("the status could not be written")
    consequence.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "images")
    assert "no space left on the disk for images" in explain(consequence)
    assert "make room" in explain(RuntimeError("(OperationalError) database or disk is full"))


def test_a_taken_port_is_named(capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--prefect-port", str(port)]) == 1
    assert f"port {port} is in use" in capsys.readouterr().err


def test_a_dry_run_shows_settings_and_plan_and_writes_nothing(tmp_path, capsys):
    assert main(["run", "--preset", "smoke", "--store", str(tmp_path / "s"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert '"total_images"' in printed
    assert "train-upsampler" in printed
    assert not list(tmp_path.iterdir())


def test_presets_are_listed_with_their_deployments(capsys):
    assert main(["presets"]) == 0
    assert "full-pipeline/laion-64" in capsys.readouterr().out


def test_help_needs_neither_prefect_nor_torch():
    code = (
        "import sys; from flows.__main__ import parser; parser().format_help();"
        "print([name for name in ('prefect', 'mlflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_pictures_are_those_at_the_top_and_the_newest_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    for age, name in enumerate(["grid.png", "samples/images-3.png", "samples/images-10.png"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "report.json").touch()
    names = [str(path.relative_to(tmp_path)) for path in pictures(tmp_path)]
    assert names == ["grid.png", "samples/images-10.png"]
