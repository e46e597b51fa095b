"""The stage contract, on stages that write small files."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows import stage as contract
from flows.config import PipelineConfig
from flows.stage import BusyError, Context, MissingInputError, Need, Stage, Store


class Bench:
    """A store, two chained stages and a count of how often each ran."""

    def __init__(self, root: Path):
        self.store = Store(root / "store")
        self.config = PipelineConfig()
        self.runs = {"download": 0, "filter": 0}
        self.download = Stage("download", 1, self._download, scratch=("checkpoints",))
        self.filter = Stage(
            "filter", 1, self._filter, lambda config: {"images": Need(self.download, "images")}
        )

    def _download(self, context: Context) -> None:
        self.runs["download"] += 1
        write(context.path / "images/0.tar", f"{context.config.seed % 2}")
        write(context.path / "log.txt", f"run {self.runs['download']}")
        write(context.path / "checkpoints/last.pt", "state")
        context.metrics["rows"] = 3.0

    def _filter(self, context: Context) -> None:
        self.runs["filter"] += 1
        write(context.path / "kept.txt", (context.inputs["images"] / "0.tar").read_text())

    def up_to_date(self, stage: Stage, *, force: bool = False) -> contract.StageOutput:
        """What the conductor does, without its services."""
        found = self.store.resolve(stage, self.config, check=True)
        if not force and (output := self.store.lookup(stage, found.key)):
            return output
        with self.store.lease(stage, found.key, stale_s=1.0):
            if force:
                self.store.discard(stage, found.key)
            elif self.store.manifest(stage, found.key):
                self.store.discard(stage, found.key, keep=stage.scratch)
            section = getattr(self.config, stage.section)
            context = Context(self.store.directory(stage, found.key), section, found.paths)
            stage.run(context)
            return self.store.commit(stage, found.key, context, inputs=found.contents)

    def all(self) -> tuple[contract.StageOutput, contract.StageOutput]:
        return self.up_to_date(self.download), self.up_to_date(self.filter)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_second_run_skips_every_stage(bench):
    first = bench.all()
    assert bench.all() == first
    assert bench.runs == {"download": 1, "filter": 1}


def test_equal_output_upstream_reruns_nothing_downstream(bench):
    bench.all()
    bench.config = bench.config.override({"download.seed": 2})  # another key, the same images
    bench.all()
    assert bench.runs == {"download": 2, "filter": 1}


def test_other_output_upstream_reruns_downstream(bench):
    bench.all()
    bench.config = bench.config.override({"download.seed": 1})
    bench.all()
    assert bench.runs == {"download": 2, "filter": 2}


def test_a_changed_setting_reruns_its_stage_only(bench):
    bench.all()
    bench.config = bench.config.override({"filter.min_side": 77})
    bench.all()
    assert bench.runs == {"download": 1, "filter": 2}


def test_going_back_to_old_settings_finds_the_old_output(bench):
    old, config = bench.all(), bench.config
    bench.config = bench.config.override({"filter.min_side": 77})
    bench.all()
    bench.config = config
    assert bench.all() == old
    assert bench.runs == {"download": 1, "filter": 2}


def test_force_runs_again_and_a_changed_log_reruns_nothing_downstream(bench):
    bench.all()
    bench.up_to_date(bench.download, force=True)
    bench.up_to_date(bench.filter)
    assert bench.runs == {"download": 2, "filter": 1}


def test_resources_name_and_store_are_no_part_of_a_key(bench):
    other = bench.config.override(
        {"name": "x", "store": "y", "resources.download.processes": 5, "evaluate.seed": 3}
    )
    assert bench.store.resolve(bench.download, other) == bench.store.resolve(
        bench.download, bench.config
    )


def test_settings_that_do_not_decide_the_output_are_no_part_of_a_key(bench):
    from flows.train_base import STAGE

    def key(**overrides):
        return bench.store.key(STAGE, bench.config.override(overrides), {})

    plain = key()
    assert key(**{"train_base.health.patience": 3, "train_base.system.accumulate": 2}) == plain
    assert key(**{"train_base.optimizer.lr": 0.001}) != plain


def test_a_new_version_of_a_stage_has_a_new_key(bench):
    newer = Stage("download", 2, bench.download.run)
    assert (
        bench.store.resolve(newer, bench.config).key
        != bench.store.resolve(bench.download, bench.config).key
    )


def test_a_missing_upstream_names_the_commands_that_make_it(bench):
    with pytest.raises(MissingInputError) as error:
        bench.up_to_date(bench.filter)
    assert "prefect deployment run download/download" in str(error.value)
    assert "python -m flows run --stages download" in str(error.value)


def test_a_folder_that_upstream_did_not_write_is_named_with_what_is_there(bench):
    bench.up_to_date(bench.download)
    needy = Stage("filter", 1, print, lambda config: {"shards": Need(bench.download, "shards/064")})
    with pytest.raises(MissingInputError, match=r"shards/064.*images"):
        bench.store.resolve(needy, bench.config)


def test_an_optional_input_that_is_not_there_is_left_out(bench):
    bench.up_to_date(bench.download)
    easy = Stage(
        "filter", 1, print, lambda config: {"h": Need(bench.download, "heldout", optional=True)}
    )
    assert bench.store.resolve(easy, bench.config).paths == {}


def test_a_name_that_begins_like_a_folder_is_not_part_of_it(bench):
    output = bench.up_to_date(bench.download)
    manifest = bench.store.manifest(bench.download, output.key)
    assert manifest.content_of("images") == manifest.content_of("images/0.tar")
    assert manifest.content_of("image") is None


def test_a_run_killed_before_its_manifest_goes_on_in_the_same_folder(bench):
    output = bench.up_to_date(bench.download)
    (output.path / "manifest.json").unlink()
    write(output.path / "images/1.tar", "made before the kill")
    again = bench.up_to_date(bench.download)
    assert again.path == output.path
    assert (again.path / "images/1.tar").exists()
    assert bench.runs["download"] == 2


@pytest.mark.parametrize("harm", ["delete", "truncate"])
def test_a_lost_or_cut_file_makes_the_stage_run_again(bench, harm):
    output = bench.up_to_date(bench.download)
    victim = output.path / "images/0.tar"
    victim.unlink() if harm == "delete" else victim.write_text("")
    assert "0.tar" in bench.store.damage(bench.download, output.key)
    with pytest.raises(MissingInputError, match=r"0\.tar"):
        bench.up_to_date(bench.filter)
    bench.all()
    assert victim.read_text() == "0"
    assert bench.runs == {"download": 2, "filter": 1}


def test_a_flipped_file_is_found_by_verification(bench):
    output = bench.up_to_date(bench.download)
    write(output.path / "images/0.tar", "9")
    assert bench.store.damage(bench.download, output.key) is None
    assert "sha256" in bench.store.damage(bench.download, output.key, verify=True)
    assert bench.store.lookup(bench.download, output.key, verify=True) is None


def test_checkpoints_may_be_deleted_and_outlive_a_damaged_output(bench):
    output = bench.up_to_date(bench.download)
    bench.store.discard(bench.download, output.key, keep=bench.download.scratch)
    assert [path.name for path in (output.path / "checkpoints").iterdir()] == ["last.pt"]
    bench.up_to_date(bench.download)
    (output.path / "checkpoints/last.pt").unlink()
    assert bench.store.lookup(bench.download, output.key)


def test_a_digest_given_by_the_writer_is_not_computed_again(bench):
    def run(context: Context) -> None:
        write(context.path / "big.tar", "terabytes")
        context.digests["big.tar"] = "f" * 64

    trusting = Stage("download", 1, run)
    output = bench.up_to_date(trusting)
    (entry,) = bench.store.manifest(trusting, output.key).files
    assert entry.sha256 == "f" * 64


def test_what_other_files_vouch_for_is_listed_by_size_and_not_read(bench):
    def run(context: Context) -> None:
        write(context.path / "images/0.tar", "terabytes")
        write(context.path / "fates/0.parquet", "their digests")

    vouching = Stage("download", 1, run, vouched=("images",))
    output = bench.up_to_date(vouching)
    fates, images = bench.store.manifest(vouching, output.key).files
    assert (images.path, images.size, images.sha256) == ("images/0.tar", 9, None)
    assert fates.sha256 is not None
    assert bench.store.lookup(vouching, output.key, verify=True)
    write(output.path / "images/0.tar", "cut")
    assert bench.store.lookup(vouching, output.key) is None


def test_the_manifest_lists_what_the_stage_wrote_and_nothing_else(bench):
    output = bench.up_to_date(bench.download)
    manifest = json.loads((output.path / "manifest.json").read_text())
    assert [file["path"] for file in manifest["files"]] == ["images/0.tar", "log.txt"]
    assert manifest["metrics"] == {"rows": 3.0}
    assert not list(output.path.glob("*manifest.json.*"))


def test_a_live_holder_keeps_others_out_and_is_named(bench):
    with (
        bench.store.lease(bench.download, "k" * 64, stale_s=1.0),
        pytest.raises(BusyError, match=f"process {os.getpid()}"),
        bench.store.lease(bench.download, "k" * 64, stale_s=5.0),
    ):
        pass
    with bench.store.lease(bench.download, "k" * 64, stale_s=1.0):
        pass


def test_a_holder_that_died_here_is_replaced_at_once(bench):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    leave_lease(bench, pid=child.pid, host=contract.socket.gethostname())
    with bench.store.lease(bench.download, "k" * 64, stale_s=60.0):
        pass


def test_a_holder_elsewhere_is_replaced_when_its_heart_stands_still(bench):
    path = leave_lease(bench, pid=1, host="elsewhere")
    with bench.store.lease(bench.download, "k" * 64, stale_s=0.4):
        assert "elsewhere" not in path.read_text()


def test_only_one_of_many_gets_a_stale_lease(bench):
    leave_lease(bench, pid=1, host="elsewhere")
    held, won, all_tried = [], [], threading.Event()

    def contend() -> None:
        try:
            with bench.store.lease(bench.download, "k" * 64, stale_s=0.5):
                won.append(1)
                all_tried.wait(10)
        except BusyError:
            held.append(1)
            if len(held) == 3:
                all_tried.set()

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(held)) == (1, 3)


def test_a_holder_that_was_replaced_does_not_commit(bench):
    with bench.store.lease(bench.download, "k" * 64, stale_s=60.0) as lease:
        lease.check()
        lease.path.write_text("another")
        with pytest.raises(BusyError, match="taken over"):
            lease.check()


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(contract.StageError, match=r"file/store.*store"):
        Store(tmp_path / "file/store").prepare()


def leave_lease(bench: Bench, **holder: object) -> Path:
    path = bench.store.directory(bench.download, "k" * 64) / contract.LEASE
    write(path, json.dumps({"since": "then", "token": "t", **holder}))
    return path
