from __future__ import annotations

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

import data.__main__ as command
from data import coco, console, report, settings
from data.config import DownloadConfig, FilterConfig, ScoreConfig

REPORT = report.Report(
    {"ok": 3}, [report.Step("listed", 0, 5), report.Step("dead", 2, 3)], {"x": 0.5}
)


@pytest.fixture
def calls(monkeypatch):
    """The steps' functions, replaced by ones that note how they are called."""
    noted = []

    def stand_in(name, outcome):
        module, function = name.split(".")

        def called(*arguments, progress, **settings):
            progress("rows", 1, 2)
            noted.append((name, arguments, settings))
            return outcome

        monkeypatch.setitem(sys.modules, f"data.{module}", SimpleNamespace(**{function: called}))
        monkeypatch.setattr(f"data.{module}", sys.modules[f"data.{module}"], raising=False)

    import data.filter  # noqa: F401  # what it imports must not be a stand-in

    stand_in("metadata.prepare", REPORT.funnel)
    stand_in("download.run", REPORT)
    stand_in("score.run", REPORT)
    stand_in("filter.run", REPORT)
    stand_in("shards.write", None)
    return noted


def test_help_names_every_step_and_imports_nothing_heavy():
    code = (
        "import sys; from data.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'pyarrow', 'duckdb', 'pydantic', 'PIL', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    for step in ("metadata", "download", "score", "filter", "shards", "coco", "inspect"):
        assert f"    {step}  " in done.stdout or f"    {step:<10} " in done.stdout


@pytest.mark.parametrize(
    "step", ["metadata", "download", "score", "filter", "shards", "coco", "coco fetch", "inspect"]
)
def test_every_step_has_help(step, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([*step.split(), "--help"])
    assert ended.value.code == 0
    assert "usage: python -m data" in capsys.readouterr().out


def test_metadata_lists_go_to_prepare_and_the_funnel_is_printed(calls, tmp_path, capsys):
    arguments = ["a.parquet", "s3://b/*.csv", "--set", "min_side=7", "--workers", "3"]
    assert command.main(["metadata", str(tmp_path), *arguments]) == 0
    ((name, (files, out, config), settings_),) = calls
    assert (name, files, out) == ("metadata.prepare", ("a.parquet", "s3://b/*.csv"), tmp_path)
    assert config == DownloadConfig(source="metadata", metadata=files, min_side=7)
    assert settings_ == {"workers": 3, "backend": "processes"}
    assert capsys.readouterr().out == REPORT.table() + "\n"


def test_metadata_without_lists_is_an_error(calls, tmp_path, capsys):
    assert command.main(["metadata", str(tmp_path)]) == 1
    assert "error: no lists" in capsys.readouterr().err


def test_download_takes_processes_and_threads(calls, tmp_path, capsys):
    assert command.main(["download", str(tmp_path), "--workers", "2", "--threads", "5"]) == 0
    assert calls == [("download.run", (tmp_path, DownloadConfig()), {"processes": 2, "threads": 5})]
    assert capsys.readouterr().out == REPORT.table() + "\nx: 0.5\n"


def test_a_factory_of_encoders_can_be_sent_to_a_worker():
    factory = settings.EncoderFactory(f"{__name__}:encoders", ScoreConfig(batch_size=3))
    sent = pickle.loads(pickle.dumps(factory))
    assert (sent.place, sent.config) == (factory.place, factory.config)


def encoders(config, worker):
    return (config.batch_size, worker)


def test_score_makes_encoders_by_name(calls, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_encoders", SimpleNamespace(make=encoders))
    arguments = ["--download", "d", "--encoders", "some_encoders:make", "--set", "batch_size=7"]
    assert (
        command.main(["score", str(tmp_path), *arguments, "--backend", "ray", "--gpus", "0.5"]) == 0
    )
    ((_, (out, download, config, make), settings_),) = calls
    assert (out, str(download), config) == (tmp_path, "d", ScoreConfig(batch_size=7))
    assert make(2) == (7, 2)
    assert settings_ == {"workers": 1, "backend": "ray", "gpus": 0.5}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere_at_all:f", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
        ("json", "write MODULE:FUNCTION"),
        ("json:__name__", "not a function"),
    ],
)
def test_encoders_that_are_not_there_are_an_error_at_once(calls, tmp_path, capsys, place, message):
    arguments = ["score", str(tmp_path), "--download", "d", "--encoders", place]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert calls == []


def test_filter_and_shards_get_their_folders(calls, tmp_path):
    arguments = ["--download", "d", "--set", "resolutions=[8, 16]"]
    assert command.main(["filter", str(tmp_path), "--scores", "s", *arguments]) == 0
    (tmp_path / "kept.parquet").touch()
    assert command.main(["shards", str(tmp_path), *arguments]) == 0
    config = FilterConfig(resolutions=(8, 16))
    (_, filtered, _), (_, sharded, _) = calls
    assert [*map(str, filtered[:3]), filtered[3]] == [str(tmp_path), "s", "d", config]
    kept = tmp_path / "kept.parquet"
    assert [*map(str, sharded[:3]), sharded[3]] == [str(kept), "d", str(tmp_path), config]


def test_shards_without_kept_rows_is_an_error(calls, tmp_path, capsys):
    assert command.main(["shards", str(tmp_path), "--download", "d"]) == 1
    assert "kept.parquet is not there: run the filter" in capsys.readouterr().err


def test_an_error_is_one_line_and_its_traceback_is_for_the_asking(tmp_path, capsys, monkeypatch):
    def fail(options):
        raise KeyError("a\nb")

    monkeypatch.setattr(command, "_download", fail)
    assert command.main(["download", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: KeyError: 'a\\nb'\n"
    monkeypatch.setenv("GIGAGAN_DEBUG", "1")
    assert command.main(["download", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_download", stop)
    assert command.main(["download", str(tmp_path)]) == 130
    assert "same command" in capsys.readouterr().err


def test_coco_captions_prints_the_hashes(tmp_path, capsys):
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)],
        "annotations": [{"id": n, "image_id": n, "caption": "x"} for n in range(3)],
    }
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(document))
    out = tmp_path / "list.jsonl"
    assert command.main(["coco", "captions", str(path), "--num", "2", "--out", str(out)]) == 0
    chosen = coco.evaluation_captions(path, 2)
    printed = capsys.readouterr().out
    assert chosen.sha256 in printed
    assert chosen.text_sha256 in printed
    assert out.read_bytes() == chosen.lines


# ---- settings


def test_assignments_go_before_the_file_and_reach_into_parts(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("download:\n  seed: 3\n  embedded: {seed: 5, size_px: 64}\nscore: {seed: 9}\n")
    config = settings.load(DownloadConfig, "download", file, ["embedded.seed=7", "min_side=null"])
    assert (config.seed, config.embedded.seed, config.embedded.size_px) == (3, 7, 64)
    assert config.min_side is None


def test_a_file_may_hold_the_section_alone(tmp_path):
    file = tmp_path / "score.json"
    file.write_text('{"batch_size": 3}')
    assert settings.load(ScoreConfig, "score", file, ["score.seed=2"]).batch_size == 3


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("min_sde=3", "download.min_sde is not a setting; the nearest is min_side"),
        ("embedded.sede=3", "download.embedded.sede is not a setting; the nearest is seed"),
        ("min_side=0", r"download.min_side: .* \(given: 0\)"),
        ("min_side", "write key=value"),
        ("min_side=[", "not YAML"),
        ("source=metadata", "download.metadata is empty"),
    ],
)
def test_a_wrong_setting_is_named(assignment, message):
    with pytest.raises(settings.SettingsError, match=message):
        settings.load(DownloadConfig, "download", None, [assignment])


@pytest.mark.parametrize("content", ["[1, 2]", "{", "seed: ["])
def test_a_file_that_holds_no_settings_is_named(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(settings.SettingsError, match=r"run\.yaml"):
        settings.load(DownloadConfig, "download", file, [])


# ---- progress


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with console.shown(Console(force_terminal=False, width=200)) as progress:
        for share in (0, 1):
            progress("rows", 1000 * share, 4000)
            progress("a [b].zip, bytes", 2_500_000 * share, 10**9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rows 1,000/4,000")
    assert lines[1].startswith("a [b].zip 2.5 MB/1 GB")


def test_progress_is_bars_on_a_terminal(capsys):
    with console.shown(Console(force_terminal=True, width=100)) as progress:
        progress("rows", 1, None)
        progress("rows [x], bytes", 2_000, 10_000)
        progress("rows", 5, 5)
    assert "rows [x]" in capsys.readouterr().out


def test_amounts_read_well():
    assert console.amount(12_800) == "12,800"
    assert console.amount(0.314159) == "0.314"
    assert console.amount(6_645_013_297, True) == "6.65 GB"
    assert console.clock(3725) == "1:02:05"
