"""A store on S3: the pipeline over it, a second machine, savings of unfinished work, outages."""

import dataclasses
import json
import shutil
import threading
import uuid
from pathlib import Path

import pytest
import s3fs

from flows.config import USUAL, PipelineConfig, StageName
from flows.stage import Context, DamagedError, Manifest, MissingInputError
from flows.stages import download, filter, train_base
from flows.stages.full_pipeline import full_pipeline, plan
from flows.storage.objects import Remote, RemoteError
from flows.storage.place import RECORD, WORK, Place
from flows.storage.store import Store

from .conftest import new_record, write
from .gate import gate_to


@pytest.fixture
def bucket(s3):
    """A new bucket, as a file system and a URL."""
    fs = s3fs.S3FileSystem(**s3.options, use_listings_cache=False)
    return fs, f"s3://{s3.bucket()}/outputs"


@pytest.fixture
def on_machine(tmp_path, monkeypatch):
    """Go to a machine of that name: another folder for mirrors."""

    def go(name: str) -> Path:
        monkeypatch.setenv("GIGAGAN_STORE_CACHE", str(tmp_path / name))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        new_record(tmp_path / name / "mlflow.db")
        return tmp_path / name

    return go


def files(folder: Path) -> set[str]:
    """Files of all outputs of a mirror, without stage and key."""
    found = [path.relative_to(folder).parts[3:] for path in folder.glob("*/*/*/**/*")]
    return {"/".join(parts) for parts in found if parts and not parts[0].startswith(".")}


def test_a_url_is_mirrored_below_the_cache_folder_and_each_has_its_own(on_machine):
    cache = on_machine("a")
    first, second = (PipelineConfig(store=f"s3://bucket/{name}") for name in ("x-y", "x/y"))
    assert first.store_url == "s3://bucket/x-y"
    assert first.store_path.parent == second.store_path.parent == cache
    assert first.store_path != second.store_path
    assert PipelineConfig(store="file:///somewhere").store_path == Path("/somewhere")


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_other_machines_skip_what_is_there_and_fetch_only_what_is_looked_at_or_needed(
    config, ran, bucket, on_machine
):
    fs, url = bucket
    config = config.model_copy(update={"store": url})
    on_machine("a")
    first = full_pipeline(config=config)
    assert ran == list(USUAL)
    objects = {name.partition("/outputs/")[2] for name in fs.find(url)}
    for output in first.values():
        assert f"{output.stage}/{output.key[:16]}/manifest.json" in objects
        assert output.url == f"{url}/{output.stage}/{output.key[:16]}"
    assert not [name for name in objects if WORK in name]
    kept = {name.partition("/")[0] for name in objects if "checkpoints" in name}
    assert kept == {"train-base", "train-upsampler"}, "from which a longer run goes on"

    second = on_machine("b")
    ran.clear()
    assert [step.action for step in plan(config)] == ["skip"] * 6
    again = full_pipeline(config=config)
    assert ran == []
    assert {name: output.content for name, output in again.items()} == {
        name: output.content for name, output in first.items()
    }
    legible = {name for name in files(second) if "." in name}
    assert {"report.json", "results.json"} <= legible
    # The model card of the newly recorded champion reads the snapshots; no pictures come along.
    assert not [name for name in legible if name.endswith((".tar", ".parquet"))]

    third = on_machine("c")
    only = [StageName.TRAIN_UPSAMPLER]
    other = {"train_upsampler.seed": 77}
    full_pipeline(other, stages=only, config=config)
    assert ran == ["train-upsampler"]
    resolution = config.train_upsampler.upsampler.resolution
    shards = {name for name in files(third) if name.endswith(".tar")}
    assert shards == {f"shards/{resolution:03d}/train-00000.tar"}
    assert "aligner.safetensors" not in files(third)
    assert [step.action for step in plan(config.override(other), only)] == ["skip"]


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_what_a_failed_attempt_left_is_gone_on_from_on_another_machine(
    config, ran, bucket, on_machine, monkeypatch
):
    _, url = bucket
    config = config.model_copy(update={"store": url})
    only = [StageName.DOWNLOAD]

    def break_off(context):
        write(context.path / "work/half", "done")
        write(context.path / "images/0.tar", "picture")
        write(context.path / "images/1.tar.partial", "pic")
        raise OSError("no network")

    on_machine("a")
    with monkeypatch.context() as patch:
        patch.setitem(vars(download.STAGE), "run", break_off)
        with pytest.raises(OSError, match="no network"):
            full_pipeline(stages=only, config=config)
    second = on_machine("b")
    assert [step.action for step in plan(config, only)] == ["resume"]

    seen = []

    def go_on(context):
        seen.extend(sorted(files(second)))
        write(context.path / "fates/0.parquet", "x")

    monkeypatch.setitem(vars(download.STAGE), "run", go_on)
    full_pipeline(stages=only, config=config)
    assert [name for name in seen if "." in name or "half" in name] == ["images/0.tar", "work/half"]
    assert [step.action for step in plan(config, only)] == ["skip"]


KEY = "0123456789abcdef" * 4


def place(url: str, folder: Path) -> Place:
    return Place(folder, Remote(url).below("download/0123456789abcdef"))


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_longer_run_goes_on_on_another_machine(bucket, tmp_path, is_finished):
    _, url = bucket
    config = PipelineConfig()
    stage = dataclasses.replace(train_base.STAGE, needs=lambda config: {})
    work = "checkpoints/images-0000000007.pt"

    store, longer = Store(tmp_path / "a", Remote(url)), {"train_base.total_images": 9}
    short = config.override({"train_base.total_images": 8})
    found = store.resolve(stage, short)
    with store.lease(stage, found.key):
        store.place(stage.name, found.key).resume()
        assert store.go_on(stage, short, found) is None
        context = Context(store.place(stage.name, found.key).folder, short.train_base)
        write(context.path / work, "state")
        if is_finished:
            store.commit(stage, found.key, context, inputs=found.contents)
        else:
            store.place(stage.name, found.key).push()

    elsewhere, config = Store(tmp_path / "b", Remote(url)), config.override(longer)
    found = elsewhere.resolve(stage, config)
    with elsewhere.lease(stage, found.key):
        elsewhere.place(stage.name, found.key).resume()
        assert "came to 7" in elsewhere.go_on(stage, config, found)
    assert (elsewhere.place(stage.name, found.key).folder / work).read_text() == "state"


def test_unfinished_work_that_changed_is_sent_and_what_is_gone_is_gone_there_too(bucket, tmp_path):
    fs, url = bucket
    here = place(url, tmp_path / "a")
    here.resume()
    write(here.folder / "checkpoints/1.pt", "one")
    write(here.folder / "metrics.jsonl", "1\n")
    for unnamed in ("lists/00001.77.partial", "lists/_scatter/spill-77.partial/block.0"):
        write(here.folder / unnamed, "half")
    assert here.push() == 2
    assert here.push() == 0
    shutil.rmtree(here.folder / "lists")
    write(here.folder / "checkpoints/2.pt", "two")
    (here.folder / "checkpoints/1.pt").unlink()
    write(here.folder / "metrics.jsonl", "1\n2\n")
    assert here.push() == 2

    there = place(url, tmp_path / "b")
    there.resume()
    assert {p.name: p.read_text() for p in there.folder.rglob("*.*") if p.is_file()} | {
        RECORD: ""
    } == {"2.pt": "two", "metrics.jsonl": "1\n2\n", RECORD: ""}
    assert not [name for name in fs.find(url) if name.endswith("1.pt")]


def test_a_folder_goes_on_from_its_own_work_unless_another_machine_went_further(bucket, tmp_path):
    _, url = bucket
    first, second = place(url, tmp_path / "a"), place(url, tmp_path / "b")
    first.resume()
    write(first.folder / "step", "1")
    first.push()
    write(first.folder / "step", "2: not sent")
    first.resume()
    assert (first.folder / "step").read_text() == "2: not sent"
    second.resume()
    write(second.folder / "step", "9")
    second.push()
    write(first.folder / "left over", "x")
    first.resume()
    assert (first.folder / "step").read_text() == "9"
    assert not (first.folder / "left over").exists()


def test_savings_happen_during_the_work_and_stop_when_the_lease_is_lost(bucket, tmp_path):
    import time

    fs, url = bucket
    here = place(url, tmp_path / "a")
    here.resume()
    holds = True
    with here.pushing(0.05, may=lambda: holds, log=print):
        write(here.folder / "a", "1")
        deadline = time.monotonic() + 30
        while not fs.exists(f"{here.remote.url}/a"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        holds = False
        write(here.folder / "b", "2")
        time.sleep(0.5)
    assert not fs.exists(f"{here.remote.url}/b")


def finished(url: str, folder: Path, text: str = "shard") -> tuple[Place, Manifest]:
    """An output of one file, stored."""
    import hashlib
    from datetime import UTC, datetime

    here = place(url, folder)
    here.resume()
    write(here.folder / "images/0.tar", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = Manifest.model_validate(
        {
            **{"stage": "download", "version": 1, "key": KEY, "content": "c", "seconds": 0},
            **{"created": datetime.now(UTC), "config": {}, "inputs": {}, "metrics": {}},
            **{"mlflow_run_id": None, "origins": {}},
            "files": [{"path": "images/0.tar", "size": len(text), "sha256": digest}],
        }
    )
    here.publish(manifest)
    here.seal(manifest)
    return here, manifest


def test_a_stale_file_of_a_mirror_with_the_right_size_is_not_trusted(bucket, tmp_path):
    _, url = bucket
    old, _ = finished(url, tmp_path / "a", "OLD!!")
    _, manifest = finished(url, tmp_path / "b", "shard")
    assert old.pull(manifest, manifest.files) == 1
    assert (old.folder / "images/0.tar").read_text() == "shard"
    assert old.pull(manifest, manifest.files) == 0


def test_a_damaged_object_is_named_and_not_let_in(bucket, tmp_path):
    fs, url = bucket
    _, manifest = finished(url, tmp_path / "a")
    there = place(url, tmp_path / "b")
    fs.pipe_file(f"{there.remote.url}/images/0.tar", b"shArd")
    assert there.damage(manifest) is None
    assert "s3://" in there.damage(manifest, verify=True)
    with pytest.raises(DamagedError, match=r"s3://.*0\.tar has another sha256"):
        there.pull(manifest, manifest.files)
    assert not [path for path in there.folder.rglob("*") if path.is_file()]
    fs.rm(f"{there.remote.url}/images/0.tar")
    with pytest.raises(DamagedError, match="is missing"):
        there.pull(manifest, manifest.files)


def test_a_discarded_output_is_gone_there_and_a_mirror_of_it_is_not_gone_on_from(bucket, tmp_path):
    fs, url = bucket
    first, _ = finished(url, tmp_path / "a")
    place(url, tmp_path / "b").discard()
    assert fs.find(url) == []
    first.resume()
    assert not (first.folder / "images").exists()


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", ""])
def test_a_crafted_manifest_or_list_of_work_writes_nothing_outside(bucket, tmp_path, path):
    fs, url = bucket
    here, manifest = finished(url, tmp_path / "x/y/z")
    tree = json.loads(manifest.model_dump_json())
    tree["files"][0]["path"] = path
    fs.pipe_file(f"{here.remote.url}/manifest.json", json.dumps(tree).encode())
    with pytest.raises(DamagedError, match=r"manifest\.json is not one of ours \(files\.0\.path"):
        here.manifest()
    fs.pipe_file(f"{here.remote.url}/{WORK}", json.dumps({"id": "i", "files": {path: 1}}).encode())
    with pytest.raises(ValueError, match=r"not the name of a file"):
        place(url, tmp_path / "x/y/w").resume()
    assert not list(tmp_path.rglob("evil"))


def test_a_link_planted_in_a_mirror_is_not_written_through(bucket, tmp_path):
    _, url = bucket
    _, manifest = finished(url, tmp_path / "a")
    there = place(url, tmp_path / "b")
    there.folder.mkdir()
    (tmp_path / "outside").mkdir()
    (there.folder / "images").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out"):
        there.pull(manifest, manifest.files)
    assert not list((tmp_path / "outside").iterdir())


def test_crafted_names_of_objects_are_not_listed(bucket):
    fs, url = bucket
    name = url.removeprefix("s3://")
    for crafted in ("a//b", "../up", "good"):
        fs.call_s3("put_object", Bucket=name.split("/")[0], Key=f"outputs/{crafted}", Body=b"x")
    assert set(Remote(url).sizes()) == {"good"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket-here/x", "s3://no-such-bucket-here/x .*create the bucket"),
        ("nope://x/y", "nope://x/y.*s3://bucket/prefix"),
    ],
)
@pytest.mark.usefixtures("s3")
def test_a_store_that_is_not_there_is_named_with_a_remedy(url, message):
    with pytest.raises(RemoteError, match=message):
        Remote(url).prepare()


def test_a_protocol_without_its_package_names_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteError, match="gs://bucket/x needs a package"):
        Remote("gs://bucket/x")


def test_a_url_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(RemoteError, match="environment") as error:
        Remote("s3://user:hidden@bucket/x")
    assert "hidden" not in str(error.value)


def test_missing_credentials_are_an_error_at_once_with_the_variables_to_set(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RemoteError, match="AWS_ACCESS_KEY_ID"):
        Remote(f"s3://bucket-{uuid.uuid4().hex}/x").prepare()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_overwrites_where_it_should_create_is_refused(bucket, monkeypatch):
    _, url = bucket
    remote = Remote(url)
    monkeypatch.setattr(remote, "_create", remote.fs.pipe_file)
    with pytest.raises(RemoteError, match="conditional writes"):
        remote.prepare()


def test_an_object_store_that_answers_503_for_a_while_is_asked_again(bucket, monkeypatch):
    import errno

    _, url = bucket
    monkeypatch.setattr("flows.storage.objects.PAUSE_S", 0.01)
    remote = Remote(url)
    put, refusals = remote.fs.pipe_file, iter([503] * 5)

    def sometimes(*args, **options):
        if next(refusals, None):
            raise OSError(errno.EBUSY, "Please reduce your request rate.")
        return put(*args, **options)

    monkeypatch.setattr(remote.fs, "pipe_file", sometimes)
    remote.write("a", b"kept")
    assert remote.read("a") == b"kept"


def test_a_server_that_is_gone_for_a_while_costs_nothing(bucket, s3, monkeypatch, request):
    _, url = bucket
    with gate_to(s3.port) as gate:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{gate.port}")
        monkeypatch.setattr("flows.storage.objects.LONGEST_PAUSE_S", 0.5)
        s3fs.S3FileSystem.clear_instance_cache()
        request.addfinalizer(s3fs.S3FileSystem.clear_instance_cache)
        remote = Remote(url)
        remote.write("a", b"first")
        gate.shut()
        threading.Timer(2.0, gate.open).start()
        remote.write("a", b"kept")
        assert remote.read("a") == b"kept"


def test_a_missing_input_names_the_url(bucket, on_machine):
    _, url = bucket
    on_machine("a")
    config = PipelineConfig(store=url)
    with pytest.raises(MissingInputError, match=rf"{url}/.* is not complete"):
        Store.of(config).resolve(filter.STAGE, config)
