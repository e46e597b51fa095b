"""The command line: every known failure is one message and a status."""

import errno
import os
import subprocess
import sys

import pytest
from rich.console import Console

from flows.__main__ import explain, main
from flows.commands.pipeline import _show_results, pictures
from flows.config import PipelineConfig
from flows.record import compare
from tests.flows.conftest import new_record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "dmo"], "did you mean 'demo'"),
        (["run", "--set", "filter.min_sid=3"], "did you mean 'filter.min_side'"),
        (["run", "--set", "filter.min_side"], "write key=value"),
        (["run", "--set", "filter.min_side=x"], "filter.min_side = 'x'"),
        (["run", "--stages", "train"], "unknown stage 'train': the stages are download"),
        (["run", "--force", "trian-base"], "unknown stage 'trian-base'"),
        (["run", "--store", "{file}/store"], "is a file: give a folder"),
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


LAION = ["--preset", "laion-64", "--set", "filter.decontaminate=[none.json]"]


def test_a_dry_run_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GIGAGAN_WEIGHTS", raising=False)
    assert main(["run", *LAION, "--store", str(tmp_path / "s"), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    missing = [line.removeprefix("missing for ") for line in printed if line.startswith("missing")]
    assert [line.partition(" is ")[0] for line in missing if "is null" in line] == [
        "download: download.contact"
    ]
    assert any("no file matches 'metadata/relaion2B" in line for line in missing)
    assert any(line.startswith("score: open_clip:ViT-L-14/openai is in no") for line in missing)
    assert any("filter.decontaminate: there is no file 'none.json'" in line for line in missing)
    assert any("evaluate.captions: there is no file" in line for line in missing)


def test_a_run_that_is_sure_to_fail_is_refused_before_anything_starts(tmp_path, capsys):
    assert main(["run", *LAION, "--store", str(tmp_path / "s")]) == 1
    assert "download.contact is null: give an e-mail" in capsys.readouterr().err
    arguments = ["--store", str(tmp_path / "s"), "--stages", "evaluate"]
    assert main(["run", "--set", "evaluate.captions=none.json", *arguments]) == 1
    assert "evaluate.captions: there is no file 'none.json'" in capsys.readouterr().err


def test_presets_are_listed_with_their_deployments(capsys):
    assert main(["presets"]) == 0
    assert "full-pipeline/laion-64" in capsys.readouterr().out


def test_help_needs_neither_prefect_nor_torch():
    code = (
        "import sys; from flows.__main__ import parser; parser().format_help();"
        "print([name for name in ('prefect', 'mlflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("is_served", [True, False])
def test_a_run_ends_with_the_pages_of_its_own_store(tmp_path, capsys, monkeypatch, is_served):
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_UI_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compare, "shows", lambda *_: is_served)
    config = PipelineConfig(store=str(tmp_path / "st [v1]"))
    new_record(tmp_path / "mlflow.db")
    _show_results(Console(), config, {}, [])
    _, prefect, mlflow = capsys.readouterr().out.splitlines()[-3:]
    own = f"`python -m flows ui --store '{tmp_path}/st [v1]'` opens it"
    assert prefect == f"  Prefect  {own}"
    if is_served:
        assert mlflow.startswith("  MLflow   http://127.0.0.1:5000/#/experiments/")
    else:
        assert mlflow == f"  MLflow   {own}"


def test_pictures_are_those_at_the_top_and_the_newest_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    for age, name in enumerate(["grid.png", "samples/images-3.png", "samples/images-10.png"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "report.json").touch()
    names = [str(path.relative_to(tmp_path)) for path in pictures(tmp_path)]
    assert names == ["grid.png", "samples/images-10.png"]
