"""What collect.py replaces in img2dataset is there, in the installed version, and is called."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
from pathlib import Path

import pytest

from data.config import DownloadConfig
from data.download import collect
from data.download.processes import Job
from data.web.fetch import FetchSettings

main = importlib.import_module("img2dataset.main")
downloader, writer = collect.downloader, collect.writer
CHANGED = (
    f"img2dataset {importlib.metadata.version('img2dataset')} is not the one that "
    "data/download/collect.py patches: {}. Read its docstring, mend what it says, and only then "
    "allow the version in pyproject.toml"
)


def parameters(function) -> list[str]:
    return [*inspect.signature(function).parameters]


SIGNATURES = {
    downloader.download_image: [
        "row", "timeout", "user_agent_token", "disallowed_header_directives",
    ],
    downloader.Downloader.__call__: ["self", "row"],
    writer.WebDatasetSampleWriter.write: ["self", "img_str", "key", "caption", "meta"],
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_what_is_replaced_takes_what_it_took(function):
    found = parameters(function)
    what = f"{function.__qualname__} takes {found}"
    assert found == SIGNATURES[function], CHANGED.format(what)


def test_what_is_replaced_is_looked_up_when_it_is_called():
    retry, download = downloader.download_image_with_retry, main.download
    called = {"Downloader", "LoggerProcess", "glob"}
    for function, names in ((retry, {"download_image"}), (download, called)):
        absent = names - {*function.__code__.co_names}
        assert not absent, CHANGED.format(f"{function.__qualname__} calls no {absent}")
    assert main.Downloader is downloader.Downloader, CHANGED.format("it has two downloaders")
    source = inspect.getsource(downloader.Downloader)
    assert "download_image_with_retry(" in source, CHANGED.format("it fetches in another way")
    assert "self.sample_writer_class(" in source, CHANGED.format("it writes in another way")


def test_a_writer_has_what_ours_writes_to():
    source = inspect.getsource(writer.WebDatasetSampleWriter.__init__)
    for name in ("tarwriter", "buffered_parquet_writer", "encode_format"):
        assert f"self.{name} = " in source, CHANGED.format(f"a writer has no {name}")


def test_a_logger_has_what_our_thread_runs_and_tells():
    source = inspect.getsource(collect.logger.LoggerProcess)
    for part in ("def run(self)", "self.q.get(False)", 'self.q.put("stop")'):
        assert part in source, CHANGED.format(f"its logger has no {part}")


def test_it_takes_every_argument_that_it_is_given(tmp_path):
    config = DownloadConfig()
    job = Job(
        requests=Path("requests.parquet"), images=tmp_path, rows_per_shard=7, processes=2,
        threads=3, distributor="multiprocessing", fetch=FetchSettings.of(config), pulses=tmp_path,
        parent=os.getpid(),
    )  # fmt: skip
    unknown = {*collect._arguments(job)} - {*parameters(main.download)}
    assert not unknown, CHANGED.format(f"its `download` takes no {sorted(unknown)}")
    assert "sample_writer_class" in parameters(downloader.Downloader), CHANGED.format(
        "a downloader takes no sample_writer_class"
    )
