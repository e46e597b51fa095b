"""The download stage, with the real img2dataset over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data import download

FATES = {
    "none": {"ok"},
    "wrong_caption": {"ok"},
    "missing": {"http_404"},
    "no_host": {"dns"},
    "opt_out": {"opt_out"},
    "web_page": {"not_an_image"},
    "truncated": {"ok", "not_an_image"},  # a whole header passes; decoding finds out
    "small": {"ok"},
    "long": {"ok"},
    "sixteen_bit": {"ok"},
    "rotated": {"ok"},
    "duplicate_row": {"ok"},
    "same_bytes": {"ok"},
    "near_duplicate": {"ok"},
}


def test_each_planted_defect_ends_with_its_fate(downloaded):
    out, _ = downloaded
    truth = pq.read_table(out / "site" / "truth.parquet").to_pylist()
    kind = {(row["url"], row["caption"]): row["defect"] for row in truth}
    fates = defaultdict(set)
    for row in pq.read_table(out / "fates.parquet").to_pylist():
        fates[kind[row["url"], row["caption"]]].add(row["fate"])
    assert set(fates) <= set(FATES)  # the other kinds never get past the metadata
    assert len(fates) > 10
    assert all(found <= FATES[defect] for defect, found in fates.items()), fates


def test_counts_add_up_from_listed_rows_to_pictures(downloaded):
    out, report = downloaded
    listed = sum(
        pq.read_metadata(out / "site" / f"{n}.parquet").num_rows for n in ("laion", "coyo")
    )
    assert report.funnel[0].rows == listed
    assert report.funnel[-1].rows == report.counts["ok"]
    assert sum(report.counts.values()) == pq.read_metadata(out / "metadata.parquet").num_rows
    assert sum(step.dropped for step in report.funnel) + report.counts["ok"] == listed
    assert json.loads((out / "report.json").read_text())["counts"] == report.counts


def test_the_tars_hold_exactly_the_pictures_that_are_ok(downloaded):
    out, report = downloaded
    keys = _keys(out)
    ok = pq.read_table(out / "fates.parquet", filters=[("fate", "=", "ok")])
    assert sorted(keys) == sorted(ok["key"].to_pylist())
    assert None not in ok["sha256"].to_pylist()
    assert report.counts["ok"] == len(keys)


def test_running_again_fetches_nothing(downloaded, config):
    out, report = downloaded
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert download.run(out, config) == report
    assert before == {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}


def test_another_shard_size_on_resume_is_refused(downloaded, config):
    out, _ = downloaded
    changed = config.model_copy(update={"rows_per_shard": 60})
    with pytest.raises(ValueError, match=r"begun with other settings \(download\.rows_per_shard\)"):
        download.run(out, changed)


@pytest.mark.slow
def test_a_killed_download_resumes_to_every_row_exactly_once(downloaded, config, tmp_path):
    reference, report = downloaded
    script = (
        "import sys; from pathlib import Path\n"
        "from data import config, download\n"
        "chosen = config.DownloadConfig.model_validate_json(sys.argv[2])\n"
        "download.run(Path(sys.argv[1]), chosen, threads=1)\n"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(tmp_path), config.model_dump_json()]
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("images/*_stats.json")):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline, "no shard was finished in a minute"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again = download.run(tmp_path, config)
    assert again.counts == report.counts
    assert Counter(_keys(tmp_path)) == Counter(_keys(reference))


def _keys(out: Path) -> list[str]:
    keys = []
    for path in (out / "images").glob("*.tar"):
        with tarfile.open(path) as archive:
            keys += [n.removesuffix(".jpg") for n in archive.getnames() if n.endswith(".jpg")]
    return keys
