"""The trilemma's tables say what its records say, and never rank what was not measured here."""

import json

import pytest

from studies import _trilemma, trilemma
from studies._trilemma import MODELS, PUBLISHED, SPEED, front, report

INTERVALS = {"kid": [0.01, 0.03], "fid": [50, 70], _trilemma.NAMING: [0.2, 0.4]}


def write(results, name, *, px=32, asks="text", kid=0.02, coverage=0.5, times=None):
    """A record of a model; `times`: milliseconds of a picture and of a batch of 10."""
    (results / MODELS).mkdir(parents=True, exist_ok=True)
    metrics = {"kid": kid, "fid": 60.0, "recall": 0.25, "coverage": coverage}
    told, chance = INTERVALS, {}
    if asks == "text":
        metrics[_trilemma.NAMING], chance = 0.3, {_trilemma.NAMING: 0.002}
    else:
        told = {key: INTERVALS[key] for key in ("kid", "fid")}
    about = {"px": px, "asks": asks, "parameters": 2_100_000, "images": 5_000, "cpu_seconds": 180}
    record = {"about": about, "metrics": metrics, "intervals": told, "reference": {}}
    record["reference"]["chance"] = chance
    (results / MODELS / f"{name}.json").write_text(json.dumps(record))
    file = results / SPEED
    speed = {"batch": 10, "milliseconds": {}}
    if file.exists():
        speed = json.loads(file.read_text())
    if times:
        speed["milliseconds"][name] = dict(zip(("picture", "batch"), times, strict=True))
        if asks == "text":
            speed["milliseconds"][name]["caption"] = 7.0
    for upsampler in ("ours", "aura-sr"):
        speed["milliseconds"][upsampler] = {"enlarge": 33, "parameters": 45_000_000}
    file.write_text(json.dumps(speed))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "trilemma"
    write(folder, "real", asks="nothing", kid=-0.0001, coverage=0.9)
    write(folder, "vision", kid=0.3, coverage=0.1, times=(5, 50))
    write(folder, "package", kid=0.05, coverage=0.6, times=(20, 100))
    write(folder, "gigagan-pytorch", asks="nothing", kid=0.4, coverage=0.1, times=(9, 90))
    write(folder, "real-128", px=128, asks="nothing")
    write(folder, "package-128", px=128, times=(40, 400))
    one = {"model": "Elsewhere", "family": "GAN", "fid": 9.09, "seconds": 0.13, "px": 512}
    one |= {"device": "A100", "billion": 1.0, "source": ["Paper"]}
    other = one | {"model": "Unknown", "seconds": None, "device": None}
    content = {"rules": "FID-30k", "sources": {"Paper": "Table 2"}, "models": [one, other]}
    (folder / PUBLISHED).write_text(json.dumps(content))
    return folder


def line_of(table, start):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_front_holds_what_nothing_beats_in_all():
    points = {"a": (1, 5, 3), "b": (2, 5, 3), "c": (2, 4, 3), "d": (5, 5, 2), "worst": (7, 7, 7)}
    assert front(points) == {"a", "c", "d"}


def test_equal_points_are_both_on_the_front():
    assert front({"a": (1, 2), "b": (1, 2), "c": (2, 2)}) == {"a", "b"}


def test_a_row_has_the_figures_of_its_record_and_its_speed(results, tmp_path):
    cells = line_of(report(results, tmp_path)["trilemma"], "the package's base")
    assert cells[1:7] == ["2.1", "5,000", "3.0", "50 [10, 30]", "60 [50, 70]", "30.0 [20.0, 40.0]"]
    assert cells[7:12] == ["0.250", "0.600", "100", "20.0", "7.0"]  # 10 pictures in 100 ms


def test_who_is_on_the_front_is_marked_and_real_pictures_are_not(results, tmp_path):
    table = report(results, tmp_path)["trilemma"]
    marks = {start: line_of(table, start)[-1] for start in ("`vision`", "the package's")}
    assert marks == {"`vision`": "●", "the package's": "●"}
    assert line_of(table, "gigagan-pytorch")[-1] == ""  # slower than vision, and no better
    assert line_of(table, "real")[-1] == ""


def test_equal_networks_are_equally_fast_whatever_the_clock_said(results, tmp_path):
    write(results, "warm-start", kid=0.2, coverage=0.1, times=(5, 50.3))
    table = report(results, tmp_path)["trilemma"]
    assert line_of(table, "`vision` + warm")[9] == line_of(table, "`vision` |")[9]
    assert line_of(table, "`vision` |")[-1] == ""  # as fast, and worse


def test_what_reads_no_captions_is_not_said_to_follow_them(results, tmp_path):
    cells = line_of(report(results, tmp_path)["trilemma"], "gigagan-pytorch")
    assert (cells[6], cells[11]) == ("–", "–")


def test_a_kid_below_zero_is_shown_and_drawn(results, tmp_path):
    assert line_of(report(results, tmp_path)["trilemma"], "real")[4] == "0 [10, 30]"


def test_other_sizes_have_a_table_of_their_own(results, tmp_path):
    tables = report(results, tmp_path)
    assert "upsampler" not in tables["trilemma"]
    assert line_of(tables["trilemma-128"], "the package's base and upsampler")[-1] == "●"


def test_what_papers_publish_stands_in_its_own_table_alone(results, tmp_path):
    tables = report(results, tmp_path)
    measured = "".join(table for name, table in tables.items() if name != "trilemma-published")
    assert "Elsewhere" not in measured
    assert "9.09" not in measured
    published = tables["trilemma-published"]
    assert "not measured here" in published
    assert line_of(published, "Elsewhere")[4:] == ["0.13", "512", "A100", "Paper"]
    assert line_of(published, "Unknown")[4:7] == ["–", "–", "not said"]
    assert not any(_trilemma.TITLES[name] in published for name in ("vision", "package"))


def test_every_published_figure_of_the_repository_has_a_known_source():
    content = json.loads((trilemma.RESULTS / PUBLISHED).read_text())
    for one in content["models"]:
        assert one["source"], one["model"]
        assert set(one["source"]) <= set(content["sources"]), one["model"]


def test_the_picture_is_drawn(results, tmp_path):
    report(results, tmp_path)
    assert (tmp_path / "trilemma.png").stat().st_size > 10_000


def test_a_model_that_was_not_timed_is_named(results, tmp_path):
    write(results, "late")
    with pytest.raises(ValueError, match="late was judged, but not timed"):
        report(results, tmp_path)


def test_without_records_the_command_says_which_to_run(tmp_path, capsys):
    assert trilemma.main(["report", "--results", str(tmp_path), "--images", str(tmp_path)]) == 1
    assert "studies.trilemma judge" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no-path", "=file", "real=file", "a/b=file"])
def test_a_model_without_a_name_of_its_own_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        trilemma.main(["judge", "--shards", ".", "--heldout", ".", "--models", text])
    assert "give NAME=PATH" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        trilemma.main(["time", "--shards", ".", "--heldout", "/no/where"])
    assert "--heldout /no/where: give what" in capsys.readouterr().err


def test_a_core_that_others_use_is_not_timed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trilemma.rivals, "upsample", lambda name, batch: _upsampler())
    monkeypatch.setattr(trilemma.networks, "upsample", lambda batch: _upsampler())
    monkeypatch.setattr(trilemma, "PATIENCE", 0.05)
    idle = trilemma.Model(32, "nothing", _nothing, draw=lambda count: trilemma.time.sleep(0.02))
    with pytest.raises(ValueError, match="other processes had the core"):
        trilemma.measure_speed({"idle": idle}, tmp_path / "speed.json")
    assert not (tmp_path / "speed.json").exists()


def test_a_call_that_was_disturbed_is_made_again(monkeypatch):
    calls = []

    def busy():
        calls.append(None)
        if len(calls) == 1:
            trilemma.time.sleep(0.05)  # another process has the core
        ends = trilemma.time.process_time() + 0.002
        while trilemma.time.process_time() < ends:
            pass

    monkeypatch.setattr(trilemma, "FREE", 0.5)
    assert trilemma._undisturbed_ms(busy) < 50
    assert len(calls) >= 2


def _upsampler():
    return {"upsampler": trilemma.torch.nn.Linear(2, 3)}, {"upsample": lambda: None}


def _nothing(captions, seed, truncation):
    return []


def test_a_folder_without_a_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no state\.json: give what .*train-rival"):
        trilemma._rival(tmp_path)


def test_what_a_queue_measured_is_found_by_the_snapshots_folder(tmp_path):
    record = {"readings": {"time": {"metrics": {"kid": 0.1}}}, "versions": {}, "hardware": {}}
    (tmp_path / "vision-seed-0.json").write_text(json.dumps(record))
    snapshot = tmp_path / "runs" / "vision-seed-0" / "time.safetensors"
    found = trilemma._of_queue(snapshot, [tmp_path / "nowhere", tmp_path])
    assert found["metrics"] == {"kid": 0.1}
    assert trilemma._of_queue(snapshot.parent / "x" / "time.safetensors", [tmp_path]) is None
