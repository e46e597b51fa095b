"""Where a run's numbers and pictures go: into its folder always, MLflow when a run id is given.

The folder is the truth; relay.py sends it on in a thread, and no outage there stops training.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gigagan.common.exits import PROGRESS, tell
from gigagan.common.files import filled_aside, write_aside
from gigagan.config import HealthConfig
from gigagan.training.charts import draw_health
from gigagan.training.relay import HEALTH, LINES, SAMPLES, TIME, Relay

SNAPSHOTS = "snapshots"

CLOSE_S = 30.0
"""How long the end of a run waits for MLflow; what it lacks then is sent later from the folder."""


class Log:
    """Averages metrics between two lines; writes them by images seen; prints a live line."""

    def __init__(self, run_dir: Path, total_images: int, *, is_main: bool = True) -> None:
        self.run_dir = run_dir
        self.total_images = total_images
        self.is_main = is_main
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since: tuple[float, int] | None = None
        self._relay = Relay.from_environment(run_dir, self.say) if is_main else None

    def start(self, images_seen: int) -> None:
        """Forget what a previous attempt wrote beyond this position, and start the clock."""
        path = self.run_dir / LINES
        if self.is_main:
            for folder in (SAMPLES, SNAPSHOTS):
                for written in (self.run_dir / folder).glob("*-[0-9]*.*"):
                    if _number(written) > images_seen:
                        written.unlink()
        if self.is_main and path.exists():
            with self._relay.lock if self._relay else contextlib.nullcontext():
                kept = _cut(path, images_seen)
                if self._relay is not None:
                    self._relay.cut(kept)
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
        tell(PROGRESS, ["images", images_seen, self.total_images], self.say)
        return means

    def pause(self, seconds: float) -> None:
        """Leave time spent on pictures and probes out of the rate."""
        assert self._since is not None
        self._since = (self._since[0] + seconds, self._since[1])

    def scalars(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Write numbers at a position."""
        if not self.is_main:
            return
        line = {"images": images_seen, TIME: round(time.time(), 3), **values}
        with self.spare("metrics"), (self.run_dir / LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._wake()

    def picture(self, images_seen: int, name: str, image: Image.Image) -> Path:
        """Save a picture under samples/ and show it in MLflow with a step slider."""
        path = self.run_dir / SAMPLES / f"{name}-{images_seen:09d}.png"
        with self.spare("a picture"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filled_aside(path) as partial:  # the relay must not meet half a picture
                image.save(partial, format="PNG")
        self._wake()
        return path

    def health(self, limits: HealthConfig) -> None:
        """Draw the page of health charts anew, and show it in MLflow."""
        with self.spare("the health page"):
            try:
                draw_health(self.run_dir / LINES, self.run_dir / HEALTH, limits)
            except ModuleNotFoundError as error:  # a machine that only trains
                self.say(f"warning: no health page ({error}); training goes on")
        self._wake()

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
            try:
                print(text, flush=True)
            except BrokenPipeError:  # who read it is dead; a last checkpoint is still due
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def close(self) -> None:
        """Wait until MLflow has everything, but not for long."""
        if self._relay is not None and not self._relay.close(CLOSE_S):
            self.say("warning: MLflow lacks figures of this run; its folder has them all")

    def _wake(self) -> None:
        if self._relay is not None:
            self._relay.wake()


def _cut(path: Path, images_seen: int) -> int:
    """Keep the lines up to a position; returns the bytes that are left."""
    kept = [line for line in path.read_text().splitlines() if _position(line) <= images_seen]
    text = "".join(line + "\n" for line in kept)
    write_aside(path, text)
    return len(text.encode())


def _number(written: Path) -> int:
    """Images seen, by the name of a picture or snapshot; -1 for other files."""
    digits = written.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _position(line: str) -> int:
    """Images seen of a line; a torn last line counts as beyond everything."""
    try:
        return int(json.loads(line)["images"])
    except (ValueError, KeyError):
        return 1 << 62
