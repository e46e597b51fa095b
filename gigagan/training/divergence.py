"""The report of a run that gave up: what was wrong, what was tried, the last lines and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gigagan.training.guard import Alarm

NUM_LINES = 20
NUM_PICTURES = 2
COLUMNS = (
    "d/real",
    "d/fake",
    "d/logit_real",
    "d/logit_fake",
    "d/r1",
    "d/gradient_norm",
    "g/adversarial",
    "g/gradient_norm",
    "health/skipped_share_d",
    "health/skipped_share_g",
)


def write_report(
    run_dir: Path,
    alarms: Sequence[Alarm],
    history: Sequence[Mapping[str, Any]],
    pictures: Sequence[Path] | None = None,
) -> Path:
    """Write `divergence/report.md` for people and `report.json`, with copies of the pictures.

    Without `pictures`, the newest samples of the run. Returns the path of the page.
    """
    if pictures is None:
        pictures = sorted((run_dir / "samples").glob("*.png"))[-NUM_PICTURES:]
    directory = run_dir / "divergence"
    directory.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copyfile(picture, directory / picture.name)
    lines = _last_lines(run_dir / "metrics.jsonl", NUM_LINES)
    names = [picture.name for picture in pictures]
    about = {
        "alarms": [dataclasses.asdict(alarm) for alarm in alarms],
        "rollbacks": list(history),
        "last_lines": lines,
        "pictures": names,
    }
    (directory / "report.json").write_text(json.dumps(_strict(about), indent=2) + "\n")
    page = directory / "report.md"
    page.write_text(_page(run_dir.name, alarms, history, lines, names))
    return page


def _page(
    run_name: str,
    alarms: Sequence[Alarm],
    history: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, float]],
    pictures: Sequence[str],
) -> str:
    """The report in Markdown."""
    position = max((alarm.images_seen for alarm in alarms), default=0)
    parts = [f"# Run {run_name} diverged at {position:,} images", "## What was wrong"]
    parts.append("\n".join(f"- {alarm}" for alarm in alarms) or "Nothing was noted.")
    parts.append("## What was tried")
    rollbacks = [
        f"{i}. At {entry['images_seen']:,} images back to {entry['to_images']:,}, learning rate "
        f"× {entry['rate_factor']:g} since: {'; '.join(entry['alarms'])}"
        for i, entry in enumerate(history, start=1)
    ]
    parts.append("\n".join(rollbacks) or "No return to a checkpoint.")
    parts.append("## The last lines of the log")
    parts.append(_table(lines))
    if pictures:
        parts += ["## The last pictures", *(f"![{name}]({name})" for name in pictures)]
    parts.append("## What to change")
    parts.append(
        "A lower `optimizer.lr` or `optimizer.max_grad_norm` where gradient norms rose first; a "
        "higher `optimizer.r1_weight` where the logits of real and generated images drifted apart "
        "first. Where every step is bad from one position on, look at the data there. All figures "
        "are in `report.json`, and in `metrics.jsonl` of the run."
    )
    return "\n\n".join(parts) + "\n"


def _table(lines: Sequence[Mapping[str, float]]) -> str:
    """The main figures, one row per position."""
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(int(line["images"]), {}).update(line)
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    if not columns:
        return "There are none."
    head = ["images", *columns]
    body = [
        [f"{images:,}", *(f"{row[c]:.4g}" if c in row else "" for c in columns)]
        for images, row in rows.items()
    ]
    ruled = [head, ["---:"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ruled)


def _last_lines(path: Path, count: int) -> list[dict[str, float]]:
    """The newest complete lines of a log."""
    if not path.exists():
        return []
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines()[-count - 1 :]:
        with contextlib.suppress(ValueError):  # a torn last line
            line = json.loads(text)
            if isinstance(line, dict) and "images" in line:
                lines.append(line)
    return lines[-count:]


def _strict(value: Any) -> Any:
    """JSON has no word for what is not finite: it becomes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return value
