"""Where a run's numbers and pictures go: JSON lines always, MLflow when a run id is given.

The only module of the package that imports MLflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gigagan.config import HealthConfig
from gigagan.training.charts import draw_health


class Log:
    """Averages metrics between two lines; writes them by images seen; prints a live line."""

    def __init__(self, run_dir: Path, total_images: int, *, is_main: bool = True) -> None:
        self.run_dir = run_dir
        self.total_images = total_images
        self.is_main = is_main
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since: tuple[float, int] | None = None
        self._mlflow = _MlflowRun.from_environment() if is_main else None

    def start(self, images_seen: int) -> None:
        """Forget lines of a previous attempt beyond this position, and start the clock."""
        path = self.run_dir / "metrics.jsonl"
        if self.is_main and path.exists():
            kept = [
                line for line in path.read_text().splitlines() if _position(line) <= images_seen
            ]
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)
        self._since = (time.monotonic(), images_seen)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Collect metrics of a step; nothing is read from the device."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def line(
        self, images_seen: int, *, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float]:
        """Write the means since the last line, print progress, and return them.

        Every rank must call this; `mean` averages a tensor over ranks.
        """
        sums = [total.double() / self._counts[name] for name, total in self._sums.items()]
        values = mean(torch.stack(sums)).tolist() if sums else []
        means = dict(zip(self._sums, values, strict=True))
        self._sums, self._counts = {}, {}
        assert self._since is not None, "start() comes first"
        now = time.monotonic()
        rate = (images_seen - self._since[1]) / max(now - self._since[0], 1e-9)
        self._since = (now, images_seen)
        means["images_per_second"] = rate
        means["cpu_seconds"] = time.process_time()
        self.scalars(images_seen, means)
        left = max(self.total_images - images_seen, 0) / max(rate, 1e-9)
        shown = "  ".join(
            f"{name} {means[name]:.3f}"
            for name in ("d/real", "d/fake", "d/mismatch", "g/adversarial", "g/lpips")
            if name in means
        )
        self.say(
            f"{images_seen:,}/{self.total_images:,} images  {rate:.1f}/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left  {shown}"
        )
        return means

    def pause(self, seconds: float) -> None:
        """Leave time spent on pictures and probes out of the rate."""
        assert self._since is not None
        self._since = (self._since[0] + seconds, self._since[1])

    def scalars(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Write numbers at a position."""
        if not self.is_main:
            return
        with self.spare("metrics"), (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"images": images_seen, **values}) + "\n")
        if self._mlflow is not None:
            self._mlflow.scalars(images_seen, values)

    def picture(self, images_seen: int, name: str, image: Image.Image) -> Path:
        """Save a picture under samples/ and show it in MLflow with a step slider."""
        path = self.run_dir / "samples" / f"{name}-{images_seen:09d}.png"
        with self.spare("a picture"):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        if self._mlflow is not None:
            self._mlflow.picture(images_seen, name, image)
        return path

    def health(self, limits: HealthConfig) -> None:
        """Draw the page of health charts anew, and show it in MLflow."""
        path = self.run_dir / "health.png"
        with self.spare("the health page"):
            draw_health(self.run_dir / "metrics.jsonl", path, limits)
            if self._mlflow is not None:
                self._mlflow.file(path)

    @contextlib.contextmanager
    def spare(self, what: str) -> Iterator[None]:
        """A full disk costs a line or a picture, and a warning, but not the run."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: {what} could not be written ({error}); training goes on")

    def say(self, text: str) -> None:
        """Print a line in the main process."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        """Wait until MLflow has everything."""
        if self._mlflow is not None:
            self._mlflow.close()


def _position(line: str) -> int:
    """Images seen of a line; a torn last line counts as beyond everything."""
    try:
        return int(json.loads(line)["images"])
    except (ValueError, KeyError):
        return 1 << 62


class _MlflowRun:
    """One MLflow run, by id: its status is the business of whoever created it."""

    def __init__(self, run_id: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.run_id = run_id

    @classmethod
    def from_environment(cls) -> _MlflowRun | None:
        """The run of MLFLOW_RUN_ID, where MLFLOW_TRACKING_URI is set too."""
        run_id = os.environ.get("MLFLOW_RUN_ID")
        return cls(run_id) if run_id and os.environ.get("MLFLOW_TRACKING_URI") else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics: list[Any] = [Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=False)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.client.log_image(self.run_id, image, key=name, step=step, synchronous=False)

    def file(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))

    def close(self) -> None:
        import mlflow

        mlflow.flush_async_logging()
        mlflow.flush_artifact_async_logging()
