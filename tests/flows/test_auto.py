"""The backend `auto`: what is chosen from a network's size, a machine and what is asked for."""

import math
import os
from types import SimpleNamespace

import psutil
import pytest

from flows.config import EvaluateConfig, Resources, TrainBaseConfig, TrainUpsamplerConfig
from flows.launch import auto, stage_process
from flows.launch.auto import Machine, choose, multiply_adds
from flows.launch.command import environment
from flows.stage import Context
from gigagan.config.presets import preset

SMALL = TrainBaseConfig(batch_size=16)
LARGE = preset("paper_64")


def chosen(machine, config=SMALL, **asked):
    """Backend, ranks, threads and cores."""
    got = choose(Resources(**asked), config, machine).resources
    return got.backend, got.processes, got.threads, got.env.get("GIGAGAN_CORES")


def test_small_networks_get_a_rank_of_one_thread_on_each_free_core():
    assert chosen(Machine(2, (0, 1))) == ("torchrun", 2, 1, "0,1")
    assert chosen(Machine(5, (1, 4))) == ("torchrun", 2, 1, "1,4")
    assert chosen(Machine(2, (1,))) == ("inline", 1, 1, None)


def test_ranks_share_a_batch_in_fours():
    machine = Machine(7, (0, 1, 2, 3, 4))
    for batch, ranks in {16: 4, 12: 3, 24: 3, 14: 1, 2: 1}.items():
        assert chosen(machine, TrainBaseConfig(batch_size=batch))[1] == ranks
    parts = SMALL.model_copy(update={"system": SMALL.system.model_copy(update={"accumulate": 2})})
    assert chosen(machine, parts)[1] == 2


def test_many_cores_are_not_filled_with_ranks_without_end():
    assert chosen(Machine(99, tuple(range(99))), TrainBaseConfig(batch_size=4 * 64))[1] == 16


def test_large_networks_get_one_process_with_a_thread_on_each_free_core():
    assert chosen(Machine(5, (0, 2, 3)), LARGE) == ("inline", 1, 3, None)


def test_the_networks_that_a_cpu_trains_are_small_and_the_papers_are_not():
    for name in ("small_32", "small_32_to_128", "ladder-scale-up", "stylegan_t_small_32"):
        assert multiply_adds(preset(name)) < auto.SMALL / 2
    for name in ("paper_64", "paper_64_to_512", "imagenet_256", "stylegan_t_full_64"):
        assert multiply_adds(preset(name)) > 10 * auto.SMALL


def test_multiply_adds_are_those_of_the_3x3_convolutions():
    config = preset("small_32_to_128").model_copy(
        update={
            "upsampler": SimpleNamespace(bottom=8, up_channels=(5, 3), blocks=(1, 2)),
        }
    )
    assert isinstance(config, TrainUpsamplerConfig)
    assert multiply_adds(config) == 2 * 9 * (5 * 5 * 8 * 8 + 2 * 3 * 3 * 16 * 16)


def test_with_gpus_there_is_a_rank_on_each_that_a_batch_can_feed():
    machine = Machine(7, (0, 1), gpus=3)
    assert chosen(machine, TrainBaseConfig(batch_size=6)) == ("torchrun", 3, None, None)
    assert chosen(machine, LARGE.model_copy(update={"batch_size": 8}))[:2] == ("torchrun", 2)
    assert chosen(Machine(7, (0, 1), gpus=1)) == ("inline", 1, None, None)


def test_numbers_that_are_given_win():
    machine = Machine(4, (0, 1, 2))
    assert chosen(machine, processes=4) == ("torchrun", 4, 1, None)  # of which two share a core
    assert chosen(machine, processes=2) == ("torchrun", 2, 1, "0,1")
    assert chosen(machine, threads=3) == ("inline", 1, 3, None)
    assert chosen(machine, processes=2, threads=2) == ("torchrun", 2, 2, None)
    assert chosen(Machine(4, (0, 1), gpus=2), processes=4)[1] == 4
    assert chosen(machine, LARGE, threads=1)[1:3] == (1, 1)


def test_whoever_switches_pinning_off_is_heard():
    assert chosen(Machine(2, (0, 1)), env={"GIGAGAN_CORES": "off"})[3] == "off"


def test_an_evaluation_is_one_process():
    assert chosen(Machine(4, (0, 3)), EvaluateConfig()) == ("inline", 1, 2, None)
    assert chosen(Machine(4, (0, 3), gpus=2), EvaluateConfig()) == ("inline", 1, None, None)


def test_the_reason_says_what_was_chosen_and_from_what():
    config = TrainBaseConfig(batch_size=12)
    plan = choose(Resources(), config, Machine(3, (0, 2)))
    assert (
        plan.reason
        == "1 process of 1 thread: 2 of 3 cores free, 45 M multiply-adds a picture, batches of 12"
    )
    plan = choose(Resources(), SMALL, Machine(3, (0, 2)))
    assert plan.reason.startswith("2 ranks of 1 thread on cores 0,2: 2 of 3 cores free, ")
    assert plan.figures == {"ranks": 2, "threads": 1}
    assert choose(Resources(), EvaluateConfig(), Machine(1, (0,))).figures == {}


@pytest.mark.parametrize("backend", ["inline", "torchrun", "slurm"])
def test_a_backend_that_is_named_is_taken_without_looking(backend, monkeypatch):
    monkeypatch.setattr(auto, "look", lambda env: pytest.fail("looked"))
    asked = Resources(backend=backend)
    assert auto.plan(asked, SMALL) == auto.Plan(asked)


def test_the_choice_is_said_kept_in_the_log_and_among_the_figures(monkeypatch, tmp_path):
    started, said = [], []
    monkeypatch.setattr(auto, "look", lambda env: Machine(2, (0, 1)))
    monkeypatch.setattr("flows.launch.local.run", lambda job, output: started.append(job))
    from flows.stages.train_base import PROCESS

    context = Context(tmp_path, SMALL, log=said.append)
    stage_process(context, PROCESS)
    assert said[0].startswith("2 ranks of 1 thread on cores 0,1: ")
    assert (tmp_path / "output.log").read_text() == f"{said[0]}\n"
    assert context.metrics == {"ranks": 2, "threads": 1}
    variables = environment(started[0])
    assert (variables["OMP_NUM_THREADS"], variables["GIGAGAN_CORES"]) == ("1", "0,1")


# What is free.


@pytest.fixture
def load(monkeypatch):
    """Set how busy each core is in percent, and the seconds of that which are our own."""

    def set_to(percent, own=0.0):
        seconds = iter([3.0, 3.0 + own])
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: percent)
        monkeypatch.setattr(auto, "_seconds_of_ours", lambda: next(seconds))
        monkeypatch.setattr(auto, "quota", lambda: math.inf)

    return set_to


def test_free_are_as_many_of_the_least_busy_cores_as_others_leave(load):
    load([3.0, 99.0, 8.0, 60.0])
    assert auto.free_cores([0, 1, 2, 3]) == [0, 2]
    load([3.0, 99.0, 8.0, 60.0])
    assert auto.free_cores([1, 3]) == [3]  # one at least


def test_what_the_pipeline_does_itself_takes_no_core(load):
    load([80.0, 90.0], own=0.75 * 2 * auto.LOOK_S)
    assert auto.free_cores([0, 1]) == [0, 1]


def test_a_containers_quota_bounds_what_is_free(load, monkeypatch):
    load([0.0, 20.0, 0.0])
    monkeypatch.setattr(auto, "quota", lambda: 2.5)
    assert auto.free_cores([0, 1, 2]) == [0, 2]
    load([0.0, 0.0, 0.0])
    monkeypatch.setattr(auto, "quota", lambda: 0.3)
    assert len(auto.free_cores([0, 1, 2])) == 1


def test_cores_that_the_system_does_not_report_count_as_free(load):
    load([100.0])
    assert auto.free_cores([0, 7]) == [7]


def groups(tmp_path, line, **limits):
    """A control group of this process, and the files of some."""
    (tmp_path / "groups").write_text(f"3:memory:/elsewhere\n{line}\n")
    for name, value in limits.items():
        path = tmp_path / "fs" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return auto.quota(tmp_path / "groups", tmp_path / "fs")


def test_a_quota_of_version_2_is_the_smallest_up_to_the_root(tmp_path):
    limits = {"cpu_dot_max": "max 100000", "a__cpu_dot_max": "250000 100000"}
    assert groups(tmp_path, "0::/a/b", a__b__cpu_dot_max="70000 20000", **limits) == 2.5


def test_a_quota_of_version_1_is_read_where_the_container_sees_it(tmp_path):
    limits = {"cpu,acct__cpu.cfs_quota_us": 300000, "cpu,acct__cpu.cfs_period_us": 200000}
    assert groups(tmp_path, "5:cpu,acct:/not/seen/here", **limits) == 1.5


def test_without_a_quota_there_is_no_limit(tmp_path):
    assert groups(tmp_path, "5:cpu:/a", **{"cpu__a__cpu.cfs_quota_us": -1}) == math.inf
    assert auto.quota(tmp_path / "nothing", tmp_path) == math.inf


def test_this_machine_has_a_free_core_among_its_own():
    machine = auto.look({})
    assert machine.free
    assert {*machine.free} <= os.sched_getaffinity(0)
    assert machine.cores == len(os.sched_getaffinity(0))


def test_gpus_are_counted_as_the_training_would_see_them(monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "GPU_FILES", (str(tmp_path / "device"),))
    monkeypatch.setattr(auto, "COUNT_GPUS", "import os; print(os.environ['SEEN'])")
    assert auto._num_gpus({"SEEN": "3"}) == 0
    (tmp_path / "device").touch()
    assert auto._num_gpus({"SEEN": "3"}) == 3
    assert auto._num_gpus({"SEEN": "a driver that does not answer"}) == 0
