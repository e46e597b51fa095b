"""Writes training shards, and kills itself with the second tar of a resolution half in place."""

import os
import signal
import sys
from pathlib import Path

from data.config import FilterConfig
from data.shards import write as shards


def main() -> None:
    root, out, config, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    replace, seen = Path.replace, []

    def fatal(self: Path, target: Path) -> Path:
        seen.append(target.name)
        if target.name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = fatal
    shards.write(
        root / "kept.parquet",
        root / "download",
        out,
        FilterConfig.model_validate_json(config),
    )


main()
