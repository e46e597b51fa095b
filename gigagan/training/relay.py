"""A run folder's numbers and pictures on their way to MLflow.

The folder is the truth: metrics.jsonl and samples/ are written whether a server answers or not.
The relay reads them from there in a thread of its own, so a server that is gone costs training
nothing, and sends what it missed when it is back: later in the same run, in the next attempt, or
when `catch_up` is called on the folder. What is sent twice is recorded once. No torch in here.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigagan.common.files import write_aside

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

LINES = "metrics.jsonl"
SAMPLES = "samples"
TIME = "time"
"""Key of a line: seconds since 1970, when it was written."""
HEALTH = "health.png"
MARK = ".mlflow.json"
"""Hidden file beside the lines: how far which run has them. Not part of a stage's output."""
BATCH = 1000
"""Most metrics that MLflow takes in one request."""
MAX_PAUSE_S = 60.0
_PICTURE = re.compile(r"(?P<key>.+)-(?P<step>\d+)\.png")
_SHOWN = re.compile(r"(?P<key>.+?)[%+]step[%+](?P<step>\d+)[%+]")


class Relay:
    """Sends a run folder to one MLflow run; the run's status is its creator's business."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        client: MlflowClient | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        from mlflow import MlflowClient

        self.folder = folder
        self.run_id = run_id
        self.client = client or MlflowClient()
        self.warn = warn
        self.lock = threading.Lock()
        """Held by whoever cuts lines off, and while the mark is moved."""
        self._offset = _read_mark(folder, run_id)
        self._cuts = 0
        self._shown: set[tuple[str, int]] | None = None
        self._health_sent = 0
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, folder: Path, warn: Callable[[str], None]) -> Relay | None:
        """To the run of MLFLOW_RUN_ID, where MLFLOW_TRACKING_URI is set too."""
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if not run_id or not os.environ.get("MLFLOW_TRACKING_URI"):
            return None
        return cls(folder, run_id, warn=warn)

    def wake(self) -> None:
        """Something new lies in the folder."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow-relay", daemon=True)
            self._thread.start()
        self._news.set()

    def cut(self, size: int) -> None:
        """Lines beyond this many bytes are gone; call it with the lock held."""
        self._offset = min(self._offset, size)
        self._cuts += 1
        _write_mark(self.folder, self.run_id, self._offset)

    def close(self, seconds: float) -> bool:
        """Wait until the server has everything, or so long; says whether it has."""
        if self._thread is None:
            return True
        self._closing.set()
        self._news.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def catch_up(self) -> None:
        """Send what the server lacks, in this thread; raises what its client raises."""
        self._send_lines()
        self._send_pictures()
        self._send_health()

    def _work(self) -> None:
        failures = 0
        while True:
            self._news.wait()
            self._news.clear()
            is_last = self._closing.is_set()
            try:
                self.catch_up()
            except Exception as error:  # training goes on, whatever is wrong with the record
                if not failures:
                    self.warn(_outage(error, self.folder))
                failures += 1
                self._pause(failures)
                self._news.set()
                continue
            if failures:
                self.warn("MLflow answers again and has everything")
            failures = 0
            if is_last:
                return

    def _pause(self, failures: int) -> None:
        """Longer after each failure; short when somebody waits for the end."""
        if self._closing.wait(min(2.0**failures, MAX_PAUSE_S)):
            time.sleep(1.0)

    def _send_lines(self) -> None:
        with self.lock:
            start, cuts = self._offset, self._cuts
            lines, end = _complete_lines(self.folder / LINES, start)
        batch = [metric for line in lines for metric in _metrics(line)]
        for first in range(0, len(batch), BATCH):
            self.client.log_batch(self.run_id, metrics=batch[first : first + BATCH])
        with self.lock:
            if self._cuts == cuts and end != start:
                self._offset = end
                _write_mark(self.folder, self.run_id, end)

    def _send_pictures(self) -> None:
        found = [(path, _PICTURE.fullmatch(path.name)) for path in _files(self.folder / SAMPLES)]
        pictures = {(m["key"], int(m["step"])): path for path, m in found if m}
        if not pictures:
            return
        if self._shown is None:
            self._shown = self._shown_already()
        for (key, step), path in pictures.items():
            if (key, step) not in self._shown:
                from PIL import Image

                with Image.open(path) as image:
                    self.client.log_image(
                        self.run_id, image.convert("RGB"), key=key, step=step, synchronous=True
                    )
                self._shown.add((key, step))

    def _shown_already(self) -> set[tuple[str, int]]:
        names = [
            Path(entry.path).name for entry in self.client.list_artifacts(self.run_id, "images")
        ]
        found = (_SHOWN.match(name) for name in names)
        return {(match["key"], int(match["step"])) for match in found if match}

    def _send_health(self) -> None:
        page = self.folder / HEALTH
        version = page.stat().st_mtime_ns if page.is_file() else 0
        if version > self._health_sent:
            self.client.log_artifact(self.run_id, str(page))
            self._health_sent = version


def _metrics(line: dict[str, Any]) -> Iterable[Metric]:
    """A line as metrics; its own time makes a second sending equal to the first."""
    from mlflow.entities import Metric

    step, stamp = int(line["images"]), int(1000 * line[TIME])
    for name, value in line.items():
        if name not in ("images", TIME) and isinstance(value, int | float):
            yield Metric(name, float(value), stamp, step)


def _complete_lines(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Lines from a byte on, and where the last complete one ends; unreadable ones are left out."""
    try:
        with path.open("rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            file.seek(start)
            text = file.read()
    except FileNotFoundError:
        return [], start
    text = text[: text.rfind(b"\n") + 1]
    lines = []
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and "images" in line:
            lines.append({TIME: written, **line})
    return lines, start + len(text)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _read_mark(folder: Path, run_id: str) -> int:
    """Bytes of the lines that this run has."""
    try:
        mark = json.loads((folder / MARK).read_text())
        size = (folder / LINES).stat().st_size
    except (OSError, ValueError):
        return 0
    return min(int(mark.get("bytes", 0)), size) if mark.get("run_id") == run_id else 0


def _write_mark(folder: Path, run_id: str, size: int) -> None:
    write_aside(folder / MARK, json.dumps({"run_id": run_id, "bytes": size}))


def _outage(error: Exception, folder: Path) -> str:
    reason = re.sub(r"//[^@/\s]*@", "//", str(error).splitlines()[0] if str(error) else "")
    return (
        f"warning: MLflow does not take figures ({type(error).__name__}: {reason[:300]}); they are "
        f"kept in {folder / LINES} and sent when it does; training goes on"
    )
