"""What a run meets when nobody looks: kills, full disks, lost files, dead ranks, bad numbers."""

import itertools
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data.shards.loader import CorruptShardsError, ShardLoader
from gigagan.models import snapshot
from gigagan.training import checkpoint
from tests.gigagan.forks import RAISED, Server

from . import tiny_run

pytestmark = pytest.mark.slow  # real processes: minutes in all

CONFIG = tiny_run.CONFIG
CLOCKS = {"images_per_second", "cpu_seconds", "time", "health/failed_checkpoints"}
END, KILLED, PREEMPTED = 56, -9, 75


@pytest.fixture(scope="module")
def server():
    made = Server(tiny_run.__name__)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_run.write_shards(tmp_path_factory.mktemp("data") / "008")


def arguments(run_dir, shards, config=CONFIG):
    path = run_dir.with_suffix(".json")
    path.write_text(config.model_dump_json())
    return ["--config", str(path), "--run-dir", str(run_dir), "--shards", str(shards)]


@pytest.fixture(scope="module")
def start(server, shards):
    """Starts a run in a folder, or goes on with it: its status and its output."""

    def start(run_dir, *faults, config=CONFIG, num_ranks=1, shards=shards, how="train"):
        argv = [how, *arguments(run_dir, shards, config)]
        env = {tiny_run.FAULTS: json.dumps(faults)}
        statuses, outputs = server.ranks(argv, run_dir, env=env, num_ranks=num_ranks)
        return (statuses[0], outputs[0]) if num_ranks == 1 else (statuses, outputs)

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert start(run_dir)[0] == 0
    return run_dir


@pytest.fixture
def ended(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def fault(name, **settings):
    return {"fault": name, **settings}


def names(run_dir, suffix="pt"):
    """Positions of the checkpoints."""
    return sorted(int(p.stem[-10:]) for p in (run_dir / "checkpoints").glob(f"images-*.{suffix}"))


def path_of(run_dir, position):
    return run_dir / "checkpoints" / f"images-{position:010d}.pt"


def state(run_dir, position=END):
    return torch.load(path_of(run_dir, position), weights_only=True)


def same(ours, theirs, where="state"):
    """Nested mappings equal to the bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            same(*pair, f"{where}.{i}")
    else:
        assert ours == theirs, where


def lines(run_dir):
    """Of the log, without clocks and counts of attempts; each once.

    A run that goes on after its last step looks at its pictures again, and finds the same.
    """
    found = []
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = {name: value for name, value in json.loads(text).items() if name not in CLOCKS}
        found += [line] if len(line) > 1 and line not in found else []
    return found


def equals_the_whole(run_dir, whole):
    snapshots = [(d / "snapshot.safetensors").read_bytes() for d in (run_dir, whole)]
    assert snapshots[0] == snapshots[1]
    same(state(run_dir), state(whole))
    assert lines(run_dir) == lines(whole)


# The run that the others are compared with


def test_the_run_moves_all_that_a_checkpoint_holds(whole):
    final = state(whole)
    assert final["ada"]["probability"] > 0
    assert final["guard"]["counts"]["d"]["steps_of_line"] == 0
    assert names(whole) == names(whole, "json") == [24, 40, 48, 56]  # 24, 48: milestones
    assert not list(whole.rglob("*.partial"))


# 1. Kills

KILLS = [
    fault("kill_in_step", at=4),
    fault("kill_in_save", at=8),
    fault("kill_at_rename", to="images-0000000008.json"),
    fault("kill_in_step", at=20),
    fault("kill_at_rename", to="images-0000000024.pt"),
    fault("kill_in_save", at=24),
    fault("kill_at_rename", to="images-0000000032.pt", is_done=True),
    fault("kill_in_line", at=40),
    fault("kill_in_step", at=52),
    fault("kill_at_rename", to="images-0000000056.json", is_done=True),
    fault("kill_at_rename", to="snapshot.safetensors"),
    fault("kill_at_rename", to="result.json"),
]


def test_a_run_killed_again_and_again_ends_to_the_bit_like_one_that_was_not(start, whole, tmp_path):
    run_dir = tmp_path / "run"
    resumed = []
    for kill in [*KILLS, None]:
        status, output = start(run_dir, *([kill] if kill else []))
        assert status == (KILLED if kill else 0), (kill, output)
        assert "warning" not in output
        resumed += [int(x.split()[2]) for x in output.splitlines() if x.startswith("resumed at")]
    assert resumed == [16, 16, 16, 32, 32, 48, 48, 56, 56]
    equals_the_whole(run_dir, whole)
    assert names(run_dir) == names(whole)
    assert not list((run_dir / "checkpoints").glob("*.partial"))


# 2. Being asked to stop


def test_a_run_that_is_asked_to_stop_saves_says_where_and_goes_on_equal(start, whole, tmp_path):
    status, output = start(tmp_path / "run", fault("terminate_in_step", at=16))
    assert status == PREEMPTED, output
    assert "asked to stop: wrote a checkpoint at 20 images; the same command goes on" in output
    assert names(tmp_path / "run") == [16, 20]
    assert checkpoint.restore(path_of(tmp_path / "run", 20), {})["images_seen"] == 20
    status, output = start(tmp_path / "run")
    assert (status, "resumed at 20 images" in output) == (0, True), output
    same(state(tmp_path / "run"), state(whole))
    # The line in whose middle it stopped averages what came after.
    ours, theirs = ([x for x in lines(d) if x["images"] != 24] for d in (tmp_path / "run", whole))
    assert ours == theirs


# 3 and 4. Ranks


@pytest.mark.parametrize(("images", "num_parts"), [("half", 1), ("both", 2), ("half", 2)])
def test_gradients_and_losses_of_two_ranks_and_parts_are_those_of_one_process(
    server, images, num_parts, tmp_path
):
    statuses, outputs = server.ranks(["equal", images, str(num_parts)], tmp_path, num_ranks=2)
    assert statuses == [0, 0], outputs


def test_two_ranks_log_what_one_does(start, whole, tmp_path):
    config = CONFIG.model_copy(update={"total_images": 16, "sample_images": 28})
    statuses, outputs = start(tmp_path / "run", config=config, num_ranks=2)
    assert statuses == [0, 0], outputs
    ours = [x for x in lines(tmp_path / "run") if "probe/z_sensitivity" not in x]
    theirs = [x for x in lines(whole) if x["images"] <= 16]
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def conditioned(kind):
    """A short run of networks that are told a class, or nothing."""
    tree = CONFIG.model_dump() | {"total_images": 16, "sample_images": 28, "checkpoint_images": 8}
    told = {"text": None, "classes": {"number": 2, "width": 8} if kind == "class" else None}
    for network in ("generator", "discriminator"):
        tree[network] |= told
    if kind == "nothing":
        tree["loss"]["matching"] = 0
    return type(CONFIG).model_validate(tree)


@pytest.mark.parametrize("kind", ["class", "nothing"])
def test_networks_without_captions_resume_and_share_ranks_as_those_with_captions(
    kind, start, tmp_path
):
    config, one, killed, two = conditioned(kind), *(tmp_path / name for name in ("1", "k", "2"))
    assert start(one, config=config)[0] == 0
    assert start(killed, fault("kill_in_step", at=12), config=config)[0] == KILLED
    assert start(killed, config=config)[0] == 0
    same(state(killed, 16), state(one, 16))
    statuses, outputs = start(two, config=config, num_ranks=2)
    assert statuses == [0, 0], outputs
    ours, theirs = ([x for x in lines(run) if "probe/z_sensitivity" not in x] for run in (two, one))
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_prompt_of_no_class_is_refused_before_the_first_step(start, tmp_path):
    config = conditioned("class").model_copy(update={"prompts": ("large", "lage")})
    status, output = start(tmp_path / "run", config=config)
    assert status == 1
    assert "no class 'lage', did you mean 'large'?" in output
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_number_of_classes_that_is_not_the_shards_is_refused_with_both(start, tmp_path):
    tree = conditioned("class").model_dump()
    for network in ("generator", "discriminator"):
        tree[network]["classes"]["number"] = 5
    status, output = start(tmp_path / "run", config=type(CONFIG).model_validate(tree))
    assert status == 1
    assert "generator.classes.number = 5, but the shards hold 2 classes: set it to 2" in output


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_of_every_number_share_an_epoch_between_them_from_any_position(shards, world_size):
    n, epochs = tiny_run.NUM_SAMPLES, 6
    order = []
    # Another number of ranks after each part, the position in mid-epoch.
    for position, size in ((0, world_size), (18, world_size % 3 + 1), (42, 1)):
        stop = {0: 18, 18: 42, 42: epochs * n}[position]
        loaders = [
            ShardLoader(shards, batch_size=6, seed=1, rank=rank, world_size=size)
            for rank in range(size)
        ]
        streams = [loader.batches(position) for loader in loaders]
        for _ in range((stop - position) // 6):
            order += [key for stream in streams for key in next(stream).keys]
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == [f"{i:08d}" for i in range(n)]
    one = ShardLoader(shards, batch_size=6, seed=1).batches(0)
    expected = [key for batch in itertools.islice(one, n) for key in batch.keys]
    assert order == expected


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_killed_run_goes_on_with_another_number_of_ranks(start, whole, first, then, tmp_path):
    run_dir = tmp_path / "run"
    status, output = start(run_dir, fault("kill_in_step", at=28, rank=0), num_ranks=first)
    assert (status if first == 1 else status[0]) == KILLED, output
    if first == 2:
        assert status[1] == 1, output
    config = CONFIG.model_copy(update={"total_images": 40})
    status, output = start(run_dir, num_ranks=then, config=config)
    assert status == (0 if then == 1 else [0, 0]), output
    assert "resumed at 24 images" in (output if then == 1 else output[0])
    ours, theirs = (
        [x for x in lines(d) if x["images"] <= 40 and "d/real" in x] for d in (run_dir, whole)
    )
    assert [x["images"] for x in ours] == [x["images"] for x in theirs] == [8, 16, 24, 32, 40]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


def test_a_stop_asked_of_one_rank_stops_all_at_the_same_position(start, tmp_path):
    statuses, outputs = start(
        tmp_path / "run", fault("terminate_in_step", at=8, rank=1), num_ranks=2
    )
    assert statuses == [PREEMPTED, PREEMPTED], outputs
    assert all("wrote a checkpoint at 36 images" in output for output in outputs)
    assert names(tmp_path / "run")[-1] == 36


# 5. Damaged checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def orphan(path):
    path.with_suffix(".json").unlink()


@pytest.mark.parametrize("damage", [cut, flip, orphan])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(start, whole, ended, damage):
    damage(path_of(ended, 56))
    status, output = start(ended)
    assert status == 0, output
    (warning,) = [x for x in output.splitlines() if x.startswith("warning")]
    assert "images-0000000056." in warning
    assert "trying the checkpoint before it" in warning
    assert "resumed at 48 images" in output
    equals_the_whole(ended, whole)
    assert names(ended) == [24, 40, 48, 56]


def test_a_run_all_of_whose_checkpoints_are_damaged_ends_with_an_error(start, ended):
    for position, damage in zip(names(ended), (cut, flip, orphan, cut), strict=True):
        damage(path_of(ended, position))
    status, output = start(ended)
    assert status == 1
    assert output.count("trying the checkpoint before it") == 4
    assert f"error: none of the 4 checkpoints in {ended / 'checkpoints'} can be used" in output
    assert names(ended) == [24, 40, 48, 56]


# 6. Full disks


def test_a_full_disk_costs_a_checkpoint_and_no_run(start, whole, tmp_path):
    """Whether files may not grow or the disk takes no more, in mid-run and at the end."""
    run_dir = tmp_path / "run"
    faults = fault("small_files", at=[16]), fault("full_disk", at=[32])
    status, output = start(run_dir, *faults, fault("kill_in_step", at=36))
    assert status == KILLED
    assert output.count("training goes on, and tries again later") == 2
    assert "warning: " in output
    assert "images-0000000016.pt could not be written" in output
    assert "images-0000000032.pt could not be written" in output
    assert names(run_dir) == [8, 24]
    assert not list(run_dir.rglob("*.partial"))
    for position in (8, 24):
        assert checkpoint.restore(path_of(run_dir, position), {})["images_seen"] == position

    for kind, position in (("small_files", 24), ("full_disk", 48)):
        status, output = start(run_dir, fault(kind, at=[56]))
        assert status == 1
        assert f"resumed at {position} images" in output
        assert "error: " in output
        assert "images-0000000056.pt could not be written" in output
        assert names(run_dir) == [24, 32, 40, 48]
        assert not list(run_dir.rglob("*.partial"))
        assert not (run_dir / "snapshot.safetensors").exists()

    assert start(run_dir)[0] == 0
    equals_the_whole(run_dir, whole)


def test_a_disk_that_fills_at_the_description_leaves_nothing_half_done(tmp_path, monkeypatch):
    network = torch.nn.Linear(2, 3)
    checkpoint.save(tmp_path, 8, {"n": network}, {}, keep=2)
    replace = Path.replace

    def refused(self, target):
        if self.name.endswith(".json.partial"):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(checkpoint.WriteError, match="No space left"):
        checkpoint.save(tmp_path, 16, {"n": network}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "images-0000000008.json",
        "images-0000000008.pt",
    ]


def test_a_checkpoint_that_holds_more_than_tensors_runs_nothing(tmp_path):
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return Path.touch, (ran,)

        def state_dict(self):
            return self

    harmful = Harmful()
    path = checkpoint.save(tmp_path, 8, {"generator": harmful}, {}, keep=1)
    with pytest.raises(checkpoint.UnreadableError, match=r"weights_only|Weights only"):
        checkpoint.restore(path, {"generator": harmful})
    assert not ran.exists()


# 7 and 8. Other settings, other versions


def test_a_checkpoint_of_other_settings_is_refused_with_every_difference(start, ended):
    config = CONFIG.model_copy(
        update={
            "seed": 5,
            "total_images": 64,
            "log_images": 4,
            "loss": CONFIG.loss.model_copy(update={"matching": 0.5}),
            "optimizer": CONFIG.optimizer.model_copy(update={"lr": 0.001}),
            "health": CONFIG.health.model_copy(update={"max_rollbacks": 7}),
            "system": CONFIG.system.model_copy(update={"accumulate": 2}),
        }
    )
    before = {p.name: p.read_bytes() for p in (ended / "checkpoints").iterdir()}
    status, output = start(ended, config=config)
    assert status == 1
    assert [x.strip() for x in output.splitlines() if "→" in x] == [
        "loss.matching: 1.0 → 0.5",
        "optimizer.lr: 0.0025 → 0.001",
        "seed: 0 → 5",
    ]
    assert "put them back, or train into another folder" in output
    assert {p.name: p.read_bytes() for p in (ended / "checkpoints").iterdir()} == before


def rewritten(path, to, change):
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()[snapshot.ENTRY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(described)
    save_file(tensors, to, metadata={snapshot.ENTRY: json.dumps(described)})
    return to


def test_a_snapshot_of_a_newer_version_says_so(whole, tmp_path):
    path = whole / "snapshot.safetensors"
    assert snapshot.load(path)[1]["images_seen"] == END

    newer = rewritten(path, tmp_path / "newer", lambda d: d.update(format="gigagan-snapshot-2"))
    with pytest.raises(snapshot.SnapshotError, match="written by a newer version: upgrade gigagan"):
        snapshot.load(newer)
    unknown = rewritten(path, tmp_path / "unknown", lambda d: d["config"].update(mixture=3))
    with pytest.raises(snapshot.SnapshotError, match="newer version, upgrade gigagan") as error:
        snapshot.load(unknown)
    assert "mixture" in str(error.value)
    foreign = rewritten(path, tmp_path / "foreign", lambda d: d.update(format="else"))
    with pytest.raises(snapshot.SnapshotError) as error:
        snapshot.load(foreign)
    assert "upgrade" not in str(error.value)


# 9. Shards that go


@pytest.mark.parametrize("keep_bytes", [None, 1024])
def test_a_tar_that_is_lost_within_the_allowed_share_is_replaced_with_one_warning(
    start, keep_bytes, tmp_path
):
    shards = tiny_run.write_shards(tmp_path / "008")
    tar = shards / "train-00001.tar"
    lost = fault("lose_tar", at=0, path=str(tar), share=0.5, keep_bytes=keep_bytes)
    status, output = start(tmp_path / "run", lost, shards=shards)
    assert status == 0, output
    assert output.count(f"{tar}: ") == 1
    assert "others take its pictures' place" in output


def test_a_tar_that_is_lost_beyond_it_ends_the_run_with_an_error(start, tmp_path):
    shards = tiny_run.write_shards(tmp_path / "008")
    tar = shards / "train-00000.tar"
    status, output = start(tmp_path / "run", fault("lose_tar", at=0, path=str(tar)), shards=shards)
    assert status == 1
    (error,) = [x for x in output.splitlines() if x.startswith("error: ")]
    assert "2 of 13 pictures are unreadable (last: 0000000" in error
    assert str(tar) in error
    assert "run the filter stage again" in error


def test_pictures_of_a_lost_tar_are_counted_and_come_from_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardLoader, "CORRUPT_SHARE", 0.5)
    folder = tiny_run.write_shards(tmp_path / "008")
    loader = ShardLoader(folder, batch_size=1, seed=0)
    (folder / "train-00002.tar").unlink()
    with pytest.warns(UserWarning, match="train-00002.tar: can no longer be read") as warned:
        seen = [batch.keys[0] for batch in itertools.islice(loader.batches(0), 2 * 13)]
    assert len(warned) == 1
    assert loader.corrupt == {f"{i:08d}" for i in range(10, 13)}
    assert set(seen) == {f"{i:08d}" for i in range(10)}


def test_a_set_without_a_usable_picture_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardLoader, "CORRUPT_SHARE", 1)
    folder = tiny_run.write_shards(tmp_path / "008")
    loader = ShardLoader(folder, batch_size=1, seed=0)
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with (
        pytest.warns(UserWarning, match="can no longer be read"),
        pytest.raises(CorruptShardsError, match=r"nor in any other.*run the filter stage again"),
    ):
        next(loader.batches(0))
    empty = tiny_run.write_shards(tmp_path / "empty", num_samples=0)
    with pytest.raises(ValueError, match="holds no sample: run the filter stage again"):
        ShardLoader(empty, batch_size=1, seed=0)


# 10. Ranks that die


def test_the_other_rank_ends_with_an_error_when_one_dies(start, tmp_path):
    begin = time.monotonic()
    statuses, outputs = start(tmp_path / "run", fault("leave_in_step", at=20, rank=1), num_ranks=2)
    assert statuses == [1, 3], outputs
    assert "error: rank 0: " in outputs[0]
    assert time.monotonic() - begin < 30
    assert names(tmp_path / "run") == [8, 16]


def test_torchrun_ends_when_a_rank_dies_and_the_same_command_goes_on(start, tmp_path):
    run_dir = tmp_path / "run"
    status, output = start(run_dir, fault("leave_in_step", at=20, rank=1), how="torchrun")
    assert status == RAISED
    assert "ChildFailedError" in output
    assert names(run_dir) == [8, 16]
    config = CONFIG.model_copy(update={"total_images": 24})
    status, output = start(run_dir, config=config, how="torchrun")
    assert status == 0, output
    assert "resumed at 16 images" in output


# 11. Numbers that are not


def test_one_bad_batch_is_skipped_and_counted(start, tmp_path):
    run_dir = tmp_path / "run"
    status, output = start(run_dir, fault("not_a_number", start=16, stop=20))
    assert status == 0, output
    last = [x for x in lines(run_dir) if "health/skipped_d" in x]
    assert [x["health/skipped_d"] for x in last] == [0, 0, 1, 1, 1, 1, 1]
    assert [x["health/skipped_g"] for x in last] == [0, 0, 1, 1, 1, 1, 1]
    assert last[-1]["health/rollbacks"] == 0
    for name, weights in snapshot.load(run_dir / "snapshot.safetensors")[0].state_dict().items():
        assert weights.isfinite().all(), name


def test_bad_numbers_that_stay_lead_back_to_a_checkpoint_and_then_to_a_report(
    start, whole, tmp_path
):
    run_dir = tmp_path / "run"
    bad = fault("not_a_number", start=24, stop=1000)
    status, output = start(run_dir, bad)
    assert status == 1
    found = [x for x in output.splitlines() if "rolled back" in x]
    assert found == [
        f"health: rolled back from 32 to 24 images, learning rate × {rate}" for rate in (0.5, 0.25)
    ]
    assert "health: gave up at 32 images" in output
    assert "error: health/skipped_share_d" in output
    assert "learning rate × 0.25" in (run_dir / "divergence" / "report.md").read_text()
    assert names(run_dir)[-1] == 24

    # What it went back to is what an undisturbed run had there.
    ours, theirs = state(run_dir, 24), state(whole, 24)
    assert ours.pop("guard")["num_rollbacks"] == 2
    assert theirs.pop("guard")["num_rollbacks"] == 0
    same(ours, theirs)

    # Attempts that are used up stay so.
    status, output = start(run_dir, bad)
    assert (status, "rolled back" in output) == (1, False), output


def test_a_rollback_outlives_the_process(start, whole, tmp_path):
    run_dir = tmp_path / "run"
    kill = fault("kill_in_step", at=28, count=2)
    status, output = start(run_dir, fault("not_a_number", start=24, stop=1000), kill)
    assert (status, output.count("rolled back")) == (KILLED, 1), output
    assert start(run_dir)[0] == 0
    assert state(run_dir)["guard"]["num_rollbacks"] == 1
    ours, theirs = ([x for x in lines(d) if "learning_rate" in x][-1] for d in (run_dir, whole))
    assert ours["learning_rate"] == theirs["learning_rate"] / 2
    assert (ours["health/rollbacks"], theirs["health/rollbacks"]) == (1, 0)
    for value in state(run_dir)["ema"].values():
        assert value.isfinite().all()
