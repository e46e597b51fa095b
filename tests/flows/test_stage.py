"""The stage contract, on stages that write small files."""

import json
import math
from pathlib import Path

import pytest

from flows import stage as contract
from flows.config import PipelineConfig
from flows.stage import Context, MissingInputError, Need, Stage
from flows.storage.store import Store


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
                self.store.place(stage.name, found.key).discard()
            elif self.store.manifest(stage, found.key):
                self.store.place(stage.name, found.key).discard(keep=stage.scratch)
            section = getattr(self.config, stage.section)
            self.store.place(stage.name, found.key).resume()
            context = Context(self.store.place(stage.name, found.key).folder, section, found.paths)
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


def damage(store, stage, key, **options):
    return store.place(stage.name, key).damage(store.manifest(stage, key), **options)


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
    from flows.stages.train_base import STAGE

    def key(**overrides):
        return bench.store.key(STAGE, bench.config.override(overrides), {})

    plain = key()
    assert key(**{"train_base.health.patience": 3, "train_base.system.accumulate": 2}) == plain
    assert key(**{"train_base.log_images": 7, "train_base.prompts": ["a bell"]}) == plain
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
    assert "0.tar" in damage(bench.store, bench.download, output.key)
    with pytest.raises(MissingInputError, match=r"0\.tar"):
        bench.up_to_date(bench.filter)
    bench.all()
    assert victim.read_text() == "0"
    assert bench.runs == {"download": 2, "filter": 1}


def test_a_flipped_file_is_found_by_verification(bench):
    output = bench.up_to_date(bench.download)
    write(output.path / "images/0.tar", "9")
    assert damage(bench.store, bench.download, output.key) is None
    assert "sha256" in damage(bench.store, bench.download, output.key, verify=True)
    assert bench.store.lookup(bench.download, output.key, verify=True) is None


def test_checkpoints_may_be_deleted_and_outlive_a_damaged_output(bench):
    output = bench.up_to_date(bench.download)
    bench.store.place(bench.download.name, output.key).discard(keep=bench.download.scratch)
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


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(contract.StageError, match=r"file/store.*store"):
        Store(tmp_path / "file/store").prepare()


def test_a_run_that_failed_late_goes_on_there_when_a_later_setting_changes(bench, monkeypatch):
    bench.up_to_date(bench.download)

    def fail(context: Context) -> None:
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        bench.up_to_date(Stage("filter", 1, fail, bench.filter.needs))
    bench.config = bench.config.override({"filter.min_side": 77})
    bench.all()
    assert bench.runs == {"download": 1, "filter": 1}


def test_a_failed_stage_goes_on_in_its_folder_when_an_unkeyed_setting_changes(bench):
    def half(context: Context) -> None:
        write(context.path / "checkpoints/1.pt", "half")
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        bench.up_to_date(Stage("download", 1, half, unkeyed=lambda config: ("stall_s",)))
    bench.config = bench.config.override({"download.stall_s": 7000})
    again = Stage("download", 1, bench.download.run, unkeyed=lambda config: ("stall_s",))
    bench.store.resolve(again, bench.config)
    folder = bench.store.place(again.name, bench.store.resolve(again, bench.config).key).folder
    assert (folder / "checkpoints/1.pt").read_text() == "half"


def test_the_filter_knows_the_digests_of_its_tars_and_sidecars(tmp_path, monkeypatch):
    import hashlib

    from flows.stages import filter

    write(tmp_path / "shards/064/train-00000.tar", "tar")
    write(tmp_path / "shards/064/train-00000.parquet", "sidecar")
    listed = {
        "name": "train-00000.tar",
        "sha256": hashlib.sha256(b"tar").hexdigest(),
        "index_sha256": hashlib.sha256(b"sidecar").hexdigest(),
    }

    class Report:
        metrics: dict[str, float] = {}  # noqa: RUF012

    def run(out: Path, *rest: object, **options: object) -> Report:
        write(out / "shards/064/index.json", json.dumps({"shards": [listed]}))
        return Report()

    monkeypatch.setattr("data.filter.run.run", run)
    (tmp_path / "in/x").mkdir(parents=True)
    inputs = {"scores": tmp_path / "in/x", "fates": tmp_path / "in/x"}
    context = Context(tmp_path, PipelineConfig().filter, inputs)
    filter.run(context)
    assert context.digests == {
        "shards/064/train-00000.tar": listed["sha256"],
        "shards/064/train-00000.parquet": listed["index_sha256"],
    }


@pytest.mark.parametrize("under", ["../other", "/etc", "a/../../b"])
def test_a_need_cannot_name_what_is_outside_the_output(bench, under):
    with pytest.raises(ValueError, match="not the name of a file"):
        Need(bench.download, under)
    with pytest.raises(ValueError, match="not the name of a file"):
        Need(bench.download, beside=(under,))


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "a//b", "a/./b", "a\nb", "."])
def test_a_manifest_that_names_files_outside_is_refused(bench, path):
    output = bench.up_to_date(bench.download)
    manifest = output.path / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"][0]["path"] = path
    manifest.write_text(json.dumps(tree))
    with pytest.raises(contract.DamagedError, match=r"manifest\.json.*files\.0\.path"):
        bench.store.lookup(bench.download, output.key)


def test_a_link_in_an_output_that_leads_out_is_not_committed_and_later_counts_as_damage(bench):
    def run(context: Context) -> None:
        (context.path / "images").symlink_to("/etc")

    with pytest.raises(contract.StageError, match="link"):
        bench.up_to_date(Stage("filter", 1, run))
    output = bench.up_to_date(bench.download)
    size = (output.path / "log.txt").stat().st_size
    write(output.path.parent / "outside", "x" * size)
    (output.path / "log.txt").unlink()
    (output.path / "log.txt").symlink_to(output.path.parent / "outside")
    assert "leads out" in damage(bench.store, bench.download, output.key)


def test_a_manifest_of_another_output_is_refused(bench):
    output = bench.up_to_date(bench.download)
    other = bench.store.place(bench.download.name, "f" * 64).folder
    write(other / "manifest.json", (output.path / "manifest.json").read_text())
    with pytest.raises(contract.DamagedError, match=output.key[:16]):
        bench.store.lookup(bench.download, "f" * 64)


def test_what_is_beside_a_need_is_read_with_it_and_no_part_of_the_key(bench):
    def key(*beside: str) -> str:
        stage = Stage(
            "filter",
            1,
            print,
            lambda config: {"log": Need(bench.download, "log.txt", False, beside)},
        )
        found = bench.store.resolve(stage, bench.config)
        read[beside] = [entry.path for entry in found.inputs["log"].files]
        return found.key

    read = {}
    bench.up_to_date(bench.download)
    assert key() == key("images", "not there")
    assert read == {(): ["log.txt"], ("images", "not there"): ["log.txt", "images/0.tar"]}


def test_a_figure_that_is_no_number_does_not_spoil_the_manifest(bench):
    def run(context: Context) -> None:
        context.metrics |= {"loss": float("nan"), "ratio": float("inf")}

    diverged = Stage("download", 1, run)
    key = bench.up_to_date(diverged).key
    metrics = bench.store.manifest(diverged, key).metrics
    assert math.isnan(metrics["loss"])
    assert metrics["ratio"] == math.inf


def test_limits_and_manners_of_a_download_are_no_part_of_its_key(bench):
    from flows.stages.download import STAGE

    def key(**overrides):
        return bench.store.key(STAGE, bench.config.override(overrides), {"metadata": "content"})

    plain = key(**{"download.source": "metadata", "download.metadata": ["lists/*.parquet"]})
    same = {"download.source": "metadata", "download.metadata": ["/elsewhere/a.parquet"]}
    manners = {"contact": "you@example.org", "timeout_s": 11, "retries": 3, "max_bytes": 7_000}
    for name, value in manners.items():
        assert key(**same, **{f"download.{name}": value}) == plain, name
    assert key(**same, **{"download.embedded.seed": 5}) == plain, "which is not read"
    for name, value in {"seed": 1, "min_side": 99, "columns": {"caption": "alt"}}.items():
        assert key(**same, **{f"download.{name}": value}) != plain, name


@pytest.mark.parametrize("setting", ["evaluate.captions", "filter.decontaminate"])
def test_captions_count_by_their_content_wherever_they_lie(bench, tmp_path, setting):
    from flows.stages import evaluate, filter

    stage = {"evaluate": evaluate, "filter": filter}[setting.partition(".")[0]].STAGE

    def key(name):
        value = name if setting == "evaluate.captions" else [name]
        config = bench.config.override({setting: value})
        return bench.store.key(stage, config, stage.external(config))

    for name, text in (("a.json", "{}"), ("other/b.json", "{}"), ("c.json", "[]")):
        write(tmp_path / name, text)
    a, b, c = (key(str(tmp_path / name)) for name in ("a.json", "other/b.json", "c.json"))
    assert a == b != c
    assert key(str(tmp_path / "absent.json")) not in (a, c)


def test_influences_count_by_their_content_wherever_they_lie(bench, tmp_path):
    from flows.stages.filter import STAGE

    def key(name):
        changes = {"filter.influence": str(tmp_path / name), "filter.drop_influence": 0.1}
        config = bench.config.override(changes)
        return bench.store.key(STAGE, config, STAGE.external(config))

    for name, text in (("a.parquet", "x"), ("other/b.parquet", "x"), ("c.parquet", "y")):
        write(tmp_path / name, text)
    a, b, c = (key(name) for name in ("a.parquet", "other/b.parquet", "c.parquet"))
    assert a == b != c
    assert key("absent.parquet") not in (a, c)


class Training:
    """A stage that counts to its length, from where its folder or a shorter run left off."""

    def __init__(self, bench):
        self.bench, self.begun = bench, []
        reached = lambda names: max(  # noqa: E731
            (int(n.split("-")[1]) for n in names if n.startswith("checkpoints/at-")), default=0
        )
        self.stage = Stage(
            "train-base", 1, self._run, scratch=("checkpoints",),
            length=contract.Length("total_images", reached),
        )  # fmt: skip
        self.reached, self.stops_at = reached, None

    def _run(self, context):
        files = [p.relative_to(context.path).as_posix() for p in context.path.rglob("*-*")]
        at = self.reached(files)
        self.begun.append(at)
        for images in range(at + 1, context.config.total_images + 1):
            write(context.path / f"checkpoints/at-{images}", "state")
            if images == self.stops_at:
                raise KeyboardInterrupt
        write(context.path / "snapshot", f"{context.config.total_images} {context.config.seed}")

    def to(self, images, *, fresh=False, **overrides):
        bench = self.bench
        overrides = {f"train_base.{name}": value for name, value in overrides.items()}
        config = bench.config.override({"train_base.total_images": images, **overrides})
        found = bench.store.resolve(self.stage, config)
        with bench.store.lease(self.stage, found.key, stale_s=1.0):
            place = bench.store.place(self.stage.name, found.key)
            place.resume()
            said = None if fresh else bench.store.go_on(self.stage, config, found)
            context = Context(place.folder, config.train_base)
            self.stage.run(context)
            bench.store.commit(self.stage, found.key, context, inputs=found.contents)
        return said


def test_a_longer_run_goes_on_from_what_a_shorter_one_left(bench):
    training = Training(bench)
    assert training.to(3) is None
    assert "came to 3 of train_base.total_images" in training.to(5)
    assert "came to 5" in training.to(9)
    assert training.begun == [0, 3, 5]
    assert training.to(4) is not None
    assert training.begun[-1] == 3, "nothing goes on from a longer one"
    assert training.to(11, seed=1) is None
    training.to(12, fresh=True)
    assert training.begun[-2:] == [0, 0]


def test_a_longer_run_goes_on_from_an_unfinished_shorter_one_that_went_further(bench):
    training = Training(bench)
    training.to(3)
    training.stops_at = 7
    with pytest.raises(KeyboardInterrupt):
        training.to(8)
    training.stops_at = None
    training.to(10)
    assert training.begun == [0, 3, 7]


def test_a_longer_run_leaves_alone_a_shorter_one_that_is_being_written(bench):
    training = Training(bench)
    training.to(3)
    shorter = bench.store.keys("train-base")[0]
    with bench.store.lease(training.stage, shorter):
        assert "begins anew" in training.to(5)
    assert training.begun == [0, 0]
    assert bench.store.place("train-base", shorter).names() == sorted(
        [*(f"checkpoints/at-{n}" for n in (1, 2, 3)), "manifest.json", "snapshot"]
    )


def test_a_take_over_that_was_interrupted_is_done_again(bench, monkeypatch):
    training = Training(bench)
    training.to(3)
    moved, replace = [], Path.replace

    def killed(path, target):
        if path.parent.name == ".taken":
            moved.append(path.name)
            if path.name == "checkpoints":
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            training.to(5)
    assert moved == ["snapshot", "checkpoints"], "what tells how far it is comes last"
    assert "came to 3" in training.to(5)
    assert training.begun == [0, 3]


def test_a_manifest_that_is_a_folder_is_named(bench):
    output = bench.up_to_date(bench.download)
    (output.path / contract.MANIFEST).unlink()
    (output.path / contract.MANIFEST).mkdir()
    with pytest.raises(contract.DamagedError, match=r"manifest\.json is a folder: delete it"):
        bench.store.lookup(bench.download, output.key)
