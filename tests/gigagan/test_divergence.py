import json
import math

from PIL import Image

from gigagan.training.divergence import write_report
from gigagan.training.guard import Alarm

from .test_guard import lived


def test_a_report_can_be_read_and_parsed(tmp_path):
    run = tmp_path / "run7"
    (run / "samples").mkdir(parents=True)
    for position in (3, 5, 8):
        Image.new("RGB", (2, 3)).save(run / f"samples/samples-{position:09d}.png")
    lines = [json.dumps({"images": 10 * i, "d/real": 0.1 * i, "d/r1": math.nan}) for i in range(30)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"images": 300, "d/re')
    alarms = [Alarm("d/real", math.nan, math.inf, 290, is_fatal=True)]
    page = write_report(run, alarms, lived().history)
    text = page.read_text()
    assert page == run / "divergence/report.md"
    assert "Run run7 diverged at 290 images" in text
    assert "d/real = nan is not finite" in text
    assert "At 9 images back to 4, learning rate × 0.5" in text
    assert "| 290 | 2.9 | nan |" in text
    assert "| 90 |" not in text
    assert sorted(p.name for p in page.parent.glob("*.png")) == [
        "samples-000000005.png",
        "samples-000000008.png",
    ]

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    report = json.loads((page.parent / "report.json").read_text(), parse_constant=refuse)
    assert len(report["last_lines"]) == 20
    assert report["alarms"][0]["value"] == "nan"


def test_a_run_that_wrote_nothing_yet_has_a_report_too(tmp_path):
    assert "There are none." in write_report(tmp_path, [], []).read_text()
