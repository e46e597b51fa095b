"""`store ls | show | verify | gc`, and outputs that are named by hand."""

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest

from flows.__main__ import main
from flows.config import PipelineConfig
from flows.record.tracking import Tracker
from flows.stage import BusyError, Context, Need, Stage, StageError
from flows.stages import download
from flows.storage.housekeeping import (
    HousekeepingError,
    Record,
    delete,
    items,
    parse_age,
    pick,
    sweep,
    used_by,
)
from flows.storage.store import Store
from flows.storage.upstream import UpstreamError, locate

from .conftest import new_record, write


def _download(context: Context) -> None:
    write(context.path / "images/0.tar", "pictures")
    write(context.path / "fates/0.parquet", f"{context.config.seed}")


def _filter(context: Context) -> None:
    write(context.path / "shards/064/0.tar", "shard")


DOWNLOAD = Stage("download", 1, _download, vouched=("images",))
FILTER = Stage("filter", 1, _filter, lambda config: {"fates": Need(DOWNLOAD, "fates")})


def url_of(server) -> str:
    """A new store's."""
    return f"s3://{server.bucket()}/store"


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, monkeypatch):
    """A store of each kind."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GIGAGAN_STORE_CACHE", str(tmp_path / "cache"))
    is_folder = request.param == "folder"
    where = str(tmp_path / "store") if is_folder else url_of(request.getfixturevalue("s3"))
    return Store.of(PipelineConfig(store=where))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A store in a folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(tmp_path / "store")


def make(store: Store, stage: Stage, seed: int = 0, run_id: str | None = None, upstream=None):
    config = PipelineConfig().override({"download.seed": seed})
    found = store.resolve(stage, config, upstream=upstream)
    with store.lease(stage, found.key) as lease:
        store.place(stage.name, found.key).resume()
        section = getattr(config, stage.section)
        context = Context(store.place(stage.name, found.key).folder, section, found.paths)
        stage.run(context)
        facts = {"inputs": found.contents, "origins": found.origins, "mlflow_run_id": run_id}
        return store.commit(stage, found.key, context, check=lease.check, **facts)


def named(found, name: str):
    (item,) = [item for item in found if item.name.startswith(name)]
    return item


def record(referred=None, runs=(), keys=()) -> Record:
    return Record("the record", referred or {}, runs, keys)


def tracking(name: str, store: Store) -> Tracker:
    """A tracker on a new record beside a store."""
    new_record(store.root.parent / "mlflow.db")
    return Tracker(name, store.root)


def command(store: Store, *arguments: str) -> int:
    return main(["store", *arguments, "--store", str(store)])


def test_every_output_is_listed_with_its_state_and_its_users(store):
    download = make(store, DOWNLOAD)
    kept = make(store, FILTER)
    half = store.place("train-base", "a" * 64)
    half.resume()
    write(half.folder / "checkpoints/1.pt", "half")
    half.push()
    busy = store.place("evaluate", "b" * 64)
    busy.resume()
    write(busy.folder / "log", "x")
    busy.push()
    with store.lease("evaluate", "b" * 64):
        found = items(store)
    states = {item.stage: item.state for item in found}
    assert states == {
        "download": "complete",
        "filter": "complete",
        "train-base": "unfinished",
        "evaluate": "in use",
    }
    users = used_by(found)
    assert users[f"download/{download.key[:16]}"] == [f"filter/{kept.key[:16]}"]
    assert named(found, "filter").bytes > len("shard")


def test_a_cut_file_and_a_foreign_manifest_are_damaged(folder):
    output = make(folder, DOWNLOAD)
    other = folder.place("download", "c" * 64)
    other.folder.mkdir(parents=True)
    (other.folder / "manifest.json").write_text((output.path / "manifest.json").read_text())
    (output.path / "images/0.tar").write_text("cut")
    assert {item.state for item in items(folder)} == {"damaged"}


def test_verification_finds_a_flipped_byte_and_names_the_file(store, capsys, monkeypatch):
    seen = []

    def harm(folder, progress):
        progress("reading", 1, 1)
        seen.append((folder / "images/0.tar").read_text())
        return "1 pictures are not those" if len(seen) > 1 else None

    monkeypatch.setitem(vars(download.STAGE), "harm", harm)
    output = make(store, DOWNLOAD, seed=5)
    assert command(store, "verify") == 0
    assert ": good" in capsys.readouterr().out
    assert command(store, "verify") == 1
    assert "1 pictures are not those" in capsys.readouterr().out
    assert len(seen) == 2, "what is vouched for is read where it lies"
    if store.remote:
        store.remote.write(f"download/{output.key[:16]}/fates/0.parquet", b"6")
    else:
        (output.path / "fates/0.parquet").write_text("6")
    assert command(store, "verify", output.key[:6]) == 1
    assert "fates/0.parquet has another sha256" in capsys.readouterr().out


def test_a_digest_given_wrong_by_the_writer_is_found_by_verification(folder, capsys):
    def run(context: Context) -> None:
        write(context.path / "big.tar", "terabytes")
        context.digests["big.tar"] = "f" * 64

    make(folder, Stage("download", 1, run))
    assert command(folder, "verify") == 1
    assert "big.tar" in capsys.readouterr().out


def test_a_key_may_be_shortened_until_it_is_ambiguous(folder):
    found = [
        SimpleNamespace(name=f"{stage}/{key}", stage=stage, key=key)
        for stage, key in [("filter", "ab12" + "0" * 12), ("score", "ab13" + "0" * 12)]
    ]
    assert pick(found, "ab12").stage == "filter"
    assert pick(found, "score/ab").stage == "score"
    assert pick(found, "ab12" + "0" * 60).stage == "filter"
    with pytest.raises(UpstreamError, match=r"ab.*filter/ab12.*score/ab13"):
        pick(found, "ab")
    with pytest.raises(UpstreamError, match="no output"):
        pick(found, "ff")


@pytest.mark.parametrize("name", ["../../etc", "/etc", "", "XYZ", "filter/../ab", "ab\n", "%2e"])
def test_what_is_no_key_is_refused(name):
    with pytest.raises(HousekeepingError, match="not the beginning of a key"):
        pick([], name)


@pytest.mark.parametrize(
    ("text", "age"), [("7d", timedelta(days=7)), ("1.5h", timedelta(minutes=90))]
)
def test_an_age_is_read(text, age):
    assert parse_age(text) == age


def test_an_age_without_a_unit_is_refused():
    with pytest.raises(HousekeepingError, match="7d"):
        parse_age("7")


def test_show_tells_settings_inputs_and_files(store, capsys):
    make(store, DOWNLOAD)
    output = make(store, FILTER)
    assert command(store, "show", output.key[:7]) == 0
    printed = capsys.readouterr().out
    assert "shards/064/0.tar" in printed
    assert '"min_side"' in printed
    assert "download/" in printed


def test_a_list_as_json_is_what_scripts_read(store, capsys):
    output = make(store, DOWNLOAD)
    assert command(store, "ls", "--json") == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert (item["key"], item["state"]) == (output.key, "complete")


def test_what_mlflow_an_input_a_lease_or_its_age_keeps_is_kept(store):
    old = make(store, DOWNLOAD, seed=0)
    loose = make(store, DOWNLOAD, seed=1)
    kept = make(store, FILTER, seed=0)
    referred = record({kept.key[:16]: ["MLflow run r"]})
    reasons = {verdict.item.key: verdict.kept for verdict in sweep(store, referred)}
    assert reasons == {
        kept.key[:16]: "MLflow run r",
        old.key[:16]: f"input of filter/{kept.key[:16]}",
        loose.key[:16]: None,
    }
    young = sweep(store, record(), older_than=timedelta(days=1))
    assert {verdict.kept for verdict in young} == {"not old enough"}
    with store.lease("download", loose.key):
        (verdict,) = [v for v in sweep(store, referred) if v.item.key == loose.key[:16]]
        assert verdict.kept.startswith("in use by process")
        with pytest.raises(BusyError):
            delete(store, verdict.item)


def test_unfinished_work_goes_only_when_asked_for(store):
    place = store.place("train-base", "a" * 64)
    place.resume()
    write(place.folder / "checkpoints/1.pt", "half")
    place.push()
    begun = record(keys={"a" * 16})
    (verdict,) = sweep(store, begun)
    assert "--unfinished" in verdict.kept
    (verdict,) = sweep(store, begun, unfinished=True)
    assert verdict.kept is None


def test_what_the_record_has_no_run_of_is_kept_finished_or_not(store):
    foreign = make(store, DOWNLOAD, seed=1, run_id="f" * 32)
    known = make(store, DOWNLOAD, seed=2, run_id="e" * 32)
    place = store.place("train-base", "a" * 64)
    place.resume()
    write(place.folder / "checkpoints/1.pt", "half")
    place.push()
    verdicts = sweep(store, record(runs={"e" * 32}), unfinished=True)
    remedy = " (`store rm` deletes it)"
    assert {verdict.item.key: verdict.kept for verdict in verdicts} == {
        foreign.key[:16]: f"the record does not know its MLflow run {'f' * 32}{remedy}",
        known.key[:16]: None,
        "a" * 16: f"the record has no run of it{remedy}",
    }


def test_unfinished_work_that_went_on_since_it_was_looked_at_is_not_deleted(folder):
    place = folder.place("train-base", "a" * 64)
    write(place.folder / "checkpoints/1.pt", "half")
    (item,) = items(folder)
    write(place.folder / "checkpoints/2.pt", "more")
    with pytest.raises(BusyError, match="changed"):
        delete(folder, item)
    delete(folder, *items(folder))
    assert items(folder) == []


def test_an_output_that_changed_since_it_was_looked_at_is_not_deleted(folder):
    output = make(folder, DOWNLOAD)
    (item,) = items(folder)
    folder.place(DOWNLOAD.name, output.key).discard()
    make(folder, DOWNLOAD)
    with pytest.raises(BusyError, match="changed"):
        delete(folder, item)


@pytest.mark.slow
def test_gc_is_a_dry_run_until_yes_and_asks_mlflow(store, capsys):
    tracker = tracking("gc", store)
    loose = make(store, DOWNLOAD, seed=1)
    referred = make(store, DOWNLOAD, seed=2)
    registered = make(store, DOWNLOAD, seed=3)
    facts = {"parent": None, "fresh": True, "tags": {}}
    run_id = tracker.start_stage(DOWNLOAD, referred.key, {}, **facts)
    tracker.client.create_registered_model("gc")
    tracker.client.create_model_version("gc", "file:///x", tags={"base.key": registered.key})

    assert command(store, "gc") == 0
    said = capsys.readouterr().out
    assert f"asked {tracker.uri}, which knows 1 runs" in said
    printed = " ".join(said.split())
    assert f"would go download/{loose.key[:16]}" in printed
    assert f"kept download/{referred.key[:16]}" in printed
    assert f"MLflow run {run_id}" in printed
    assert "registered model gc version 1" in printed
    assert len(items(store)) == 3

    assert command(store, "gc", "--yes") == 0
    assert {item.key for item in items(store)} == {referred.key[:16], registered.key[:16]}
    assert not loose.path.exists()
    tracker.client.delete_run(run_id)
    assert command(store, "gc", "--yes") == 0
    assert {item.key for item in items(store)} == {registered.key[:16]}


def test_gc_deletes_nothing_where_there_is_no_record_and_makes_none(folder, capsys):
    make(folder, DOWNLOAD, run_id="f" * 32)
    assert command(folder, "gc", "--yes") == 1
    assert f"no record at sqlite:///{folder.root.parent}/mlflow.db" in capsys.readouterr().err
    assert [item.state for item in items(folder)] == ["complete"]
    assert not (folder.root.parent / "mlflow.db").exists()


def test_gc_deletes_nothing_by_a_record_that_holds_no_run(folder, capsys, monkeypatch):
    make(folder, DOWNLOAD, run_id="f" * 32)
    empty = folder.root.parent / "made just now.db"
    empty.touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{empty}")
    assert command(folder, "gc", "--yes") == 1
    assert f"the record at sqlite:///{empty} holds no run" in capsys.readouterr().err
    assert [item.state for item in items(folder)] == ["complete"]


@pytest.mark.slow
def test_gc_by_another_record_keeps_what_that_one_does_not_know(folder, capsys, monkeypatch):
    facts = {"parent": None, "fresh": True, "tags": {}}
    right = f"sqlite:///{folder.root.parent}/right.db"
    new_record(folder.root.parent / "right.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", right)
    tracker = Tracker("gc", folder.root)
    key = folder.resolve(DOWNLOAD, PipelineConfig()).key
    run_id = tracker.start_stage(DOWNLOAD, key, {}, **facts)
    output = make(folder, DOWNLOAD, run_id=run_id)
    tracker.client.delete_run(run_id)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking("gc", folder).start_stage(DOWNLOAD, "b" * 64, {}, **facts)
    assert command(folder, "gc", "--yes", "--unfinished") == 0
    assert f"does not know its MLflow run {run_id}" in capsys.readouterr().out
    assert output.path.is_dir()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", right)
    assert command(folder, "gc", "--yes") == 0
    assert f"asked {right}" in capsys.readouterr().out
    assert not output.path.exists()


@pytest.mark.parametrize("has_record", [True, False])
def test_an_output_whose_run_is_forgotten_goes_when_it_is_named(folder, capsys, has_record):
    output = make(folder, DOWNLOAD, run_id="f" * 32)
    other = make(folder, DOWNLOAD, seed=1)  # of no run: gc would delete it
    if has_record:
        facts = {"parent": None, "fresh": True, "tags": {}}
        tracking("rm", folder).start_stage(DOWNLOAD, "b" * 64, {}, **facts)
        assert command(folder, "gc") == 0
        assert "(`store rm` deletes it)" in capsys.readouterr().out
    assert command(folder, "rm", output.key[:9]) == 0
    assert f"would go download/{output.key[:16]}" in capsys.readouterr().out
    assert len(items(folder)) == 2
    assert command(folder, "rm", f"download/{output.key[:9]}", "--yes") == 0
    assert [item.key for item in items(folder)] == [other.key[:16]]


def test_what_is_named_stays_while_something_needs_it(folder, capsys, monkeypatch):
    download = make(folder, DOWNLOAD)
    kept = make(folder, FILTER)
    assert command(folder, "rm", "--yes", download.key) == 1
    assert f"input of filter/{kept.key[:16]}" in capsys.readouterr().out
    with folder.lease("filter", kept.key):
        assert command(folder, "rm", "--yes", kept.key, download.key) == 1
    assert "in use by" in capsys.readouterr().out
    tracker = tracking("rm", folder)
    facts = {"parent": None, "fresh": True, "tags": {}}
    run_id = tracker.start_stage(FILTER, kept.key, {}, **facts)
    assert command(folder, "rm", "--yes", kept.key, download.key) == 1
    assert f"MLflow run {run_id}" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert command(folder, "rm", "--yes", kept.key) == 1
    assert "cannot be asked" in capsys.readouterr().err
    assert len(items(folder)) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker.client.delete_run(run_id)
    assert command(folder, "rm", "--yes", kept.key, download.key) == 0
    assert items(folder) == []


def test_the_list_fits_80_columns_and_shows_brackets_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    odd = Store(tmp_path / "st [v1] [bold]")
    output = make(odd, DOWNLOAD, run_id="f" * 32)
    make(odd, FILTER)
    half = odd.place("train-upsampler", "a" * 64)
    half.resume()
    write(half.folder / "log [x]", "0" * 12_345_678)
    with odd.lease("evaluate", "b" * 64):
        assert command(odd, "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "key", "state", "size", "age", "MLflow", "users"]
    assert "…" not in "".join(lines)
    assert lines[-1].endswith(str(odd.root))
    assert command(odd, "show", output.key) == 0
    assert f"in {odd.place('download', output.key)}," in capsys.readouterr().out


def test_gc_refuses_when_mlflow_cannot_be_asked(folder, monkeypatch, capsys):
    make(folder, DOWNLOAD)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert command(folder, "gc", "--yes") == 1
    assert "MLflow" in capsys.readouterr().err
    assert len(items(folder)) == 1


def test_a_stage_reads_the_output_that_was_named_by_key_run_or_folder(folder, tmp_path):
    tracker = tracking("upstream", folder)
    own, other = make(folder, DOWNLOAD, seed=0), make(folder, DOWNLOAD, seed=1)
    facts = {"parent": None, "fresh": True, "tags": {}}
    run_id = tracker.start_stage(DOWNLOAD, other.key, {}, **facts)
    other.path.joinpath("log").touch()
    copy = tmp_path / "copy"
    other.path.rename(copy)
    by_folder = locate(folder, {"download": str(copy)}, tracker.output_of)
    copy.rename(other.path)
    assert by_folder["download"].folder == copy
    for where in (other.key[:10], other.key, run_id, str(other.path)):
        found = locate(folder, {"download": where}, tracker.output_of)
        resolved = folder.resolve(FILTER, PipelineConfig(), upstream=found)
        assert resolved.paths["fates"] == other.path / "fates"
        assert resolved.origins == {"fates": f"download/{other.key[:16]}"}
    output = make(folder, FILTER, upstream=found)
    assert output.key != folder.resolve(FILTER, PipelineConfig()).key
    assert folder.manifest(FILTER, output.key).origins == resolved.origins
    assert folder.resolve(FILTER, PipelineConfig()).paths["fates"] == own.path / "fates"


def test_an_output_of_another_store_is_fetched_from_its_url(s3, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GIGAGAN_STORE_CACHE", str(tmp_path / "cache"))
    far = Store.of(PipelineConfig(store=url_of(s3)))
    output = make(far, DOWNLOAD, seed=4)
    found = locate(folder, {"download": output.url}, lambda run: ("", ""))
    resolved = folder.resolve(FILTER, PipelineConfig(), upstream=found, check=True)
    folder.fetch(resolved)
    assert (resolved.paths["fates"] / "0.parquet").read_text() == "4"
    assert resolved.paths["fates"].is_relative_to(folder.root)


def test_an_upstream_that_is_unknown_unfinished_or_of_another_stage_is_refused(folder, tmp_path):
    output = make(folder, DOWNLOAD)
    unfinished = folder.place("download", "e" * 64)
    unfinished.resume()
    tracker = tracking("upstream", folder)

    def refused(stage: str, where: str, message: str) -> None:
        with pytest.raises(StageError, match=message):
            locate(folder, {stage: where}, tracker.output_of)

    refused("download", "e" * 8, "not complete")
    refused("filter", str(output.path), "is one of download")
    refused("filter", output.key[:8], "no output of filter")
    refused("dwnload", output.key, "the stages are download, score")
    refused("download", str(tmp_path / "nowhere"), "no manifest")
    refused("download", "not-a-key", "beginning of a key")
    (output.path / "images/0.tar").unlink()
    refused("download", output.key[:8], "0.tar is missing")


@pytest.mark.parametrize("item", ["filter", "filter=", "=abc"])
def test_an_upstream_of_the_command_line_needs_both_sides(item, capsys):
    assert main(["run", "--preset", "smoke", "--dry-run", "--upstream", item]) == 1
    assert "upstream" in capsys.readouterr().err
