import json
import re

import pytest

from gigagan.config import ProjectedConfig
from gigagan.config.presets import LADDER
from studies import _ladder, _queue, ladder
from studies._compare import Interval


@pytest.fixture
def results(tmp_path):
    """Records of three rows with two seeds each, the second better than the first."""
    folder = tmp_path / "results"
    folder.mkdir()
    cost = dict.fromkeys(ladder.ROWS, 10.0)
    terms = {"images": 5_000, "minutes": 3.0, "milliseconds": cost}
    (folder / "cost.json").write_text(json.dumps(terms))
    for row, kid in {"stylegan2": 0.3, "larger": 0.35, "tuned": 0.2, "attention": 0.2}.items():
        for seed in (0, 1):
            metrics = dict.fromkeys(_ladder.METRICS, 0.25)
            metrics |= {"kid": kid * (1 + seed / 20), "fid": 300 * kid, "shape_rank": kid}
            reading = {"metrics": metrics, "images": 5_000, "peak_mb": 900}
            reading["reference"] = {
                "real": {"kid": 0.0, "fid": 95.0},
                "chance": {"shape_rank": 0.5},
            }
            record = {"about": {"row": row, "seed": seed}, "parameters": 2_000_000}
            record["readings"] = {"images": reading, "time": {**reading, "images": 18_000}}
            (folder / f"{row}-seed-{seed}.json").write_text(json.dumps(record))
    return folder


def test_every_row_of_the_table_is_a_preset_and_every_preset_a_row():
    assert list(_ladder.PAPER) == list(LADDER)
    assert [*LADDER, *_ladder.OURS] == list(ladder.ROWS)


@pytest.mark.parametrize("row", ladder.ROWS)
def test_losses_that_begin_late_begin_within_the_shortest_run(row):
    config = ladder.config_of(row)
    begins = config.loss.auxiliary_start_images + config.loss.ramp_images
    if config.loss.contrastive or config.loss.vision:
        assert begins < ladder.IMAGES // 2
    assert config.warm_start.images < ladder.IMAGES // 2


def test_the_last_two_rows_are_what_they_are_called():
    assert ladder.config_of("warm-start").warm_start.images > 0
    assert isinstance(ladder.config_of("projected").discriminator, ProjectedConfig)
    full = ladder.config_of("vision")
    assert ladder.config_of("projected").generator == full.generator
    assert not any(ladder.config_of(row).warm_start.images for row in LADDER)


def test_equal_time_is_equal_time():
    cost = dict.fromkeys(ladder.ROWS, 10.0) | {"larger": 50.0, "warm-start": 2.0, "vision": 20.0}
    terms = ladder.Terms(1_000, 1.0, cost)
    assert terms.in_time("stylegan2") == 6_000
    assert terms.in_time("larger") == 1_200
    spent = 400 * 2 + (terms.in_time("warm-start") - 400) * 20
    assert abs(spent - 60_000) <= 8 * 20


def test_without_a_time_only_equal_images_are_compared(results):
    cost = json.loads((results / "cost.json").read_text())
    (results / "cost.json").write_text(json.dumps(cost | {"minutes": 0}))
    assert {tuple(one.readings) for one in ladder.trainings(results)} == {("images",)}


def test_costs_are_measured_once_and_keep_the_terms_they_began_with(tmp_path, monkeypatch):
    place = _queue.Place(tmp_path, tmp_path, tmp_path, tmp_path / "results")
    monkeypatch.setattr(ladder.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(ladder.torch, "set_num_threads", lambda *_: None)
    asked = []
    monkeypatch.setattr(_queue, "milliseconds", lambda config, _: asked.append(config) or 12.345)
    ladder.measure_cost(place, ["clip"], 700, 2.0)
    ladder.measure_cost(place, ["clip", "warm-start"], 5_000, 9.0)
    assert ladder.terms_of(place.results) == (700, 2.0, {"clip": 12.35, "warm-start": 12.35})
    assert [c.warm_start.images for c in asked] == [0, 280]
    assert asked[0].loss.auxiliary_start_images == 0, "a cost without the loss that comes later"


def test_the_queue_has_every_row_with_a_seed_before_the_next_seed(results):
    names = [one.name for one in ladder.trainings(results, seeds=2)]
    assert names[0] == "stylegan2-seed-0"
    assert len(names) == len(set(names)) == 2 * len(ladder.ROWS)
    assert all(name.endswith("seed-0") for name in names[: len(ladder.ROWS)])
    assert names[-1] == "scale-up-seed-1"
    assert {one.config.seed for one in ladder.trainings(results, seeds=2)} == {0, 1}


def test_without_costs_the_remedy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"studies\.ladder cost"):
        ladder.trainings(tmp_path)


def test_tables_have_means_over_seeds_and_intervals_around_them(results, tmp_path):
    tables = ladder.report(results, tmp_path)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    (line,) = (x for x in tables["ladder-images"].splitlines() if "`stylegan2`" in x)
    value, low, high = map(int, re.search(r"(\d+) \[(\d+), (\d+)\]", line).groups())
    assert low < value < high
    assert value in (307, 308)  # the geometric mean of 300 and 315
    assert "18,000" in tables["ladder-time"]
    assert all(len(set(map(len, _cells(table)))) == 1 for table in tables.values())


def test_rows_that_were_trained_longer_have_tables_of_their_own(results, tmp_path):
    longer = results / _ladder.LONGER
    longer.mkdir()
    (longer / "cost.json").write_text((results / "cost.json").read_text())
    for file in results.glob("*-seed-0.json"):
        record = json.loads(file.read_text())
        reading = record["readings"].pop("images")
        reading |= {"images": 40_000, "intervals": {"kid": [0.1, 0.3], "fid": [50.0, 70.0]}}
        record["readings"] = {"images": reading}
        (longer / file.name).write_text(json.dumps(record))
    tables = ladder.report(results, tmp_path)
    (line,) = (x for x in tables["ladder-longer-images"].splitlines() if "`tuned`" in x)
    assert "| 900 | 200 [100, 300] | 60 [50, 70] |" in line  # over the pictures of one network
    assert "ladder-longer-time" not in tables
    assert "equal images |" in tables["ladder-longer-agreement"]
    assert "equal time" not in tables["ladder-longer-agreement"]
    assert "equal time" in tables["ladder-agreement"]


def _cells(table):
    return [line.split("|") for line in table.splitlines()]


def test_steps_and_verdicts_follow_the_paper_s_signs(results, tmp_path):
    steps = ladder.report(results, tmp_path)["ladder-steps"]
    verdicts = {cells[1].strip(): cells[-2].strip() for cells in _cells(steps)[2:]}
    assert verdicts == {
        "`larger`": "yes · yes",
        "`tuned`": "yes · yes",
        "`attention`": "undecided · undecided",
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (Interval(-0.5, -0.7, -0.3), -0.1, "yes"),
        (Interval(0.5, 0.3, 0.7), -0.1, "no"),
        (Interval(0.5, -0.1, 1.1), -0.1, "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_that_knows_a_sign(ours, theirs, said):
    assert _ladder.verdict(ours, theirs) == said


def test_the_agreement_is_of_ranks_where_small_is_good_and_where_it_is_not(results, tmp_path):
    lines = ladder.report(results, tmp_path)["ladder-agreement"].splitlines()
    (kid,) = (x for x in lines if x.startswith("| KID"))
    assert float(re.search(r"[+-]\d\.\d\d", kid)[0]) > 0.9


def test_nothing_measured_is_said_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"studies\.ladder run"):
        ladder.report(tmp_path, tmp_path)


def test_status_needs_no_data(results, capsys):
    assert ladder.main(["status", "--results", str(results), "--out", str(results / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tuned-seed-1 +done", out)
    assert re.search(r"vision-seed-0 +waiting", out)
