import json
import math

import pytest
from PIL import Image

from gigagan.config import HealthConfig
from gigagan.training import charts
from gigagan.training.charts import WIDTH_PX, draw_health, read_curves, rollback_positions

LINE = {"d/real": 0.6, "d/fake": 0.7, "d/logit_real": 0.3, "d/logit_fake": -0.4}


def write(path, lines, torn=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return path


def test_a_log_with_every_kind_of_line_becomes_one_picture_of_the_width_asked_for(tmp_path):
    lines = [{"images": 7 * i, **LINE, "d/r1": 0.0, "new/figure": i} for i in range(1, 6)]
    lines += [{"images": 35, "health/rollbacks": 1.0, "health/skipped_share_d": 0.2}]
    log = write(tmp_path / "metrics.jsonl", lines, torn='{"images": 42, "d/re')
    draw_health(log, tmp_path / "made" / "health.png")
    with Image.open(tmp_path / "made" / "health.png") as picture:
        assert picture.width == WIDTH_PX
        assert len(picture.convert("L").getcolors()) > 50


def test_a_run_of_hundreds_of_lines_is_drawn_too(tmp_path):
    lines = [{"images": 3 * i, **LINE} for i in range(1, 150)]
    draw_health(write(tmp_path / "metrics.jsonl", lines), tmp_path / "health.png")
    assert (tmp_path / "health.png").is_file()


def test_a_log_without_figures_is_refused(tmp_path):
    log = write(tmp_path / "metrics.jsonl", [], torn='{"images"')
    with pytest.raises(ValueError, match="no figure yet"):
        draw_health(log, tmp_path / "health.png")


def test_curves_skip_a_torn_line_and_what_is_not_finite_and_gain_the_logit_spread(tmp_path):
    lines = [
        {"images": 5, **LINE},
        {"images": 10, **LINE, "d/real": math.nan},
        {"images": 10, "probe/shape_rank": 0.4},
    ]
    curves = read_curves(write(tmp_path / "metrics.jsonl", lines, torn='{"images": 15, "d'))
    assert curves["d/real"] == ([5], [0.6])
    assert curves["d/fake"] == ([5, 10], [0.7, 0.7])
    assert curves["probe/shape_rank"] == ([10], [0.4])
    assert curves["spread"].values == pytest.approx([0.7, 0.7])


def test_a_rollback_lies_where_its_count_rises(tmp_path):
    counts = [0.0, 0.0, 1.0, 1.0, 3.0]
    lines = [{"images": 11 * i, "health/rollbacks": c} for i, c in enumerate(counts)]
    curves = read_curves(write(tmp_path / "metrics.jsonl", lines))
    assert rollback_positions(curves) == [22, 44]
    assert rollback_positions({}) == []


def test_there_are_panels_for_figures_that_exist_and_for_those_nobody_knows():
    curve = charts.Curve([1], [2.0])
    curves = dict.fromkeys(("d/r1", "new/figure", "health/rollbacks", "health/norm_limit_g"), curve)
    shown = charts._present(charts.panels(HealthConfig()), curves)
    assert [panel.title for panel in shown] == ["R1 penalty", "new/figure"]


def test_limits_are_those_of_the_configuration():
    limits = {p.title: p.limits for p in charts.panels(HealthConfig(max_r1=7, max_self_weight=0.5))}
    assert limits["R1 penalty"] == (7,)
    assert limits["attention: weight on oneself"] == (0.5,)


def test_a_rolling_median_follows_a_step_and_ignores_a_spike():
    assert charts.rolling_median([1, 1, 9, 1, 1], 3) == [1, 1, 1, 1, 1]
    assert charts.rolling_median([1, 1, 1, 4, 4, 4], 3) == [1, 1, 1, 4, 4, 4]


@pytest.mark.parametrize(
    ("images", "text"), [(0, "0"), (640, "640"), (12_500, "12.5k"), (3_000_000, "3M")]
)
def test_positions_are_written_short(images, text):
    assert charts._short(images) == text
