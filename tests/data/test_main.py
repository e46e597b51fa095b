from __future__ import annotations

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.__main__ as command
from data import coco, report
from data.config import DownloadConfig, FilterConfig, ScoreConfig
from data.lists import metadata
from data.schema import SCORES
from data.score.encoders import EncoderFactory
from gigagan.common import settings

REPORT = report.Report(
    {"ok": 3}, [report.Step("listed", 0, 5), report.Step("dead", 2, 3)], {"x": 0.5}
)


@pytest.fixture
def calls(monkeypatch):
    """The steps' functions, replaced by ones that note how they are called."""
    noted = []

    def nothing(out):
        return {}

    def stand_in(name, outcome):
        module, function = name.rsplit(".", 1)

        def called(*arguments, progress, **settings):
            progress("rows", 1, 2)
            noted.append((name, arguments, settings))
            return outcome

        monkeypatch.setitem(
            sys.modules,
            f"data.{module}",
            SimpleNamespace(**{function: called}, listed=nothing, begun=nothing),
        )
        monkeypatch.setattr(f"data.{module}", sys.modules[f"data.{module}"], raising=False)

    import data.filter.run  # noqa: F401  # what it imports must not be a stand-in

    stand_in("lists.metadata.prepare", REPORT.funnel)
    stand_in("download.run.run", REPORT)
    stand_in("score.run.run", REPORT)
    stand_in("filter.run.run", REPORT)
    stand_in("shards.write.write", {})
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
    assert (name, files, out) == ("lists.metadata.prepare", ("a.parquet", "s3://b/*.csv"), tmp_path)
    assert config == DownloadConfig(source="metadata", metadata=files, min_side=7)
    assert settings_ == {"workers": 3, "backend": "processes"}
    assert capsys.readouterr().out == REPORT.table() + "\n"


def test_metadata_without_lists_is_an_error(calls, tmp_path, capsys):
    assert command.main(["metadata", str(tmp_path)]) == 1
    assert "error: no lists" in capsys.readouterr().err


def test_a_list_that_is_named_as_a_setting_is_a_list_of_the_user_s(calls, tmp_path):
    assert command.main(["metadata", str(tmp_path), "--set", "metadata=[a.csv]"]) == 0
    assert calls[0][1][2] == DownloadConfig(source="metadata", metadata=("a.csv",))


def test_download_takes_processes_and_threads(calls, tmp_path, capsys):
    words = ["--workers", "2", "--threads", "5"]
    assert command.main(["download", str(tmp_path), *words]) == 0
    assert command.main(["download", str(tmp_path), *words, "--verify"]) == 0
    pace = {"processes": 2, "threads": 5}
    assert [settings_ for _, _, settings_ in calls] == [
        {**pace, "verify": is_read} for is_read in (False, True)
    ]
    assert calls[0][:2] == ("download.run.run", (tmp_path, DownloadConfig()))
    assert capsys.readouterr().out == 2 * (REPORT.table() + "\nx: 0.5\n")


def test_a_factory_of_encoders_can_be_sent_to_a_worker():
    factory = EncoderFactory(f"{__name__}:encoders", ScoreConfig(batch_size=3))
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


def test_scores_go_on_with_the_same_settings_and_download_only(calls, tmp_path, capsys):
    for name, url in (("d", "http://a/1"), ("same", "http://a/1"), ("other", "http://a/2")):
        (tmp_path / name / "lists").mkdir(parents=True)
        pq.write_table(pa.table({"url": [url]}), tmp_path / name / "lists" / "00000.parquet")

    def score(download, *settings):
        words = ["--download", str(tmp_path / download), "--encoders", "json:dumps"]
        return command.main(["score", str(out), *words, *settings])

    out = tmp_path / "out"
    (out / "scores").mkdir(parents=True)
    assert score("d", "--set", "seed=1") == 0
    assert score("same", "--set", "seed=1", "--set", "batch_size=3") == 0
    assert score("same", "--set", "seed=2") == 1
    assert "out was begun with another seed (see plan.json)" in capsys.readouterr().err
    assert score("other", "--set", "seed=1") == 1
    assert "another download" in capsys.readouterr().err
    assert len(calls) == 2


def test_a_step_that_fails_before_it_begins_leaves_no_folder(tmp_path, capsys):
    words = ["--download", str(tmp_path / "none"), "--encoders", "json:dumps"]
    assert command.main(["score", str(tmp_path / "a" / "b"), *words]) == 1
    assert "is not a finished download" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_download_takes_the_lists_of_its_folder_with_their_settings(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("url,caption\nhttp://127.0.0.1:9/1.jpg,a b c d\n")
    out = str(tmp_path / "out")
    off = [f"--set={name}=null" for name in ("max_aspect", "max_unsafe", "max_watermark")]
    lists = [str(tmp_path / "a.csv"), "--set", "min_side=null", *off]
    assert command.main(["metadata", out, *lists]) == 0
    taken = settings.load(
        DownloadConfig, "download", None, ["seed=0"], metadata.listed(tmp_path / "out")
    )
    assert (taken.source, taken.metadata) == ("metadata", (str(tmp_path / "a.csv"),))
    assert (taken.min_side, taken.max_unsafe) == (None, None)
    assert command.main(["download", out]) == 1
    assert "download.contact is null" in capsys.readouterr().err
    assert command.main(["download", out, "--set", "source=embedded"]) == 1
    assert "and download.source is 'embedded'" in capsys.readouterr().err


def test_a_begun_download_goes_on_with_its_settings(tmp_path, calls, monkeypatch):
    plan = {"seed": 3, "embedded": {"size_px": 96}, "of_another_version": 1}
    monkeypatch.setattr(sys.modules["data.download.run"], "begun", lambda out: plan)
    assert command.main(["download", str(tmp_path)]) == 0
    assert command.main(["download", str(tmp_path), "--set", "embedded.seed=5"]) == 0
    found = [config for _, (_, config), _ in calls]
    assert [(c.seed, c.embedded.size_px, c.embedded.seed) for c in found] == [
        (3, 96, 0),
        (3, 96, 5),
    ]


@pytest.mark.parametrize(
    ("step", "model"),
    [("download", DownloadConfig), ("score", ScoreConfig), ("filter", FilterConfig)],
)
def test_the_help_of_a_step_tells_every_setting(capsys, step, model):
    with pytest.raises(SystemExit):
        command.main([step, "--help"])
    told = capsys.readouterr().out
    for name in model.model_fields:
        assert f"  {name}: " in told


def test_filter_and_shards_get_their_folders(calls, tmp_path):
    arguments = ["--download", "d", "--set", "resolutions=[8, 16]"]
    assert command.main(["filter", str(tmp_path), "--scores", "s", *arguments]) == 0
    pq.write_table(SCORES.empty_table(), tmp_path / "kept.parquet")
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
        ("min_sde=3", "'download.min_sde', did you mean 'download.min_side'"),
        ("embedded.sede=3", "'download.embedded.sede', did you mean 'download.embedded.seed'"),
        ("min_side=0", "download.min_side = 0: "),
        ("min_side", "write key=value"),
        ("min_side=[", "not YAML"),
        ("source=metadata", "download.metadata is empty"),
    ],
)
def test_a_wrong_setting_is_named(assignment, message):
    with pytest.raises(settings.SettingsError, match=message):
        settings.load(DownloadConfig, "download", None, [assignment])


@pytest.mark.parametrize("content", ["[1, 2]", "{", "seed: [", "", "# seed: 3"])
def test_a_file_that_holds_no_settings_is_named(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(settings.SettingsError, match=r"run\.yaml"):
        settings.load(DownloadConfig, "download", file, [])
