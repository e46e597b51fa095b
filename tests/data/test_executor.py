from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data.executor import TaskError, each

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE))  # workers import by name, and other packages are called `tests`
from executor_tasks import (  # noqa: E402
    a_function_is_no_result,
    bad_setup,
    fails_at_three,
    logged,
    numbered,
    omp,
    shard_of_work,
    squared,
    with_state,
)

PYTHONPATH = os.pathsep.join([str(ROOT), str(HERE)])


@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_is_yielded_once_with_its_result(workers):
    found = list(each(squared, range(7), workers=workers))
    assert sorted(found) == [(n, n * n) for n in range(7)]
    assert list(each(squared, [], workers=workers)) == []


def test_state_is_made_once_in_each_worker():
    found = [state for _, (_, *state) in each(with_state, range(9), workers=2, setup=numbered)]
    assert {number for number, _ in found} <= {0, 1}
    assert len({tuple(state) for state in found}) == len({number for number, _ in found})
    assert os.getpid() not in {pid for _, pid in found}


def test_one_worker_is_this_process():
    assert list(each(with_state, [5], setup=numbered)) == [(5, (5, 0, os.getpid()))]


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    running = each(squared, items(), workers=2)
    for _ in range(5):
        next(running)
    assert len(taken) < 15
    running.close()


def test_a_killed_worker_costs_nothing(tmp_path):
    for number in (2, 5):
        (tmp_path / f"{number}.kill").write_text("1")
    items = [(tmp_path, number) for number in range(11)]
    found = dict(each(logged, items, workers=3))
    assert sorted(found) == items
    runs = {number: found[tmp_path, number] for number in range(11)}
    assert runs == {number: 2 if number in (2, 5) else 1 for number in range(11)}


def test_an_item_that_kills_every_worker_is_given_up_by_name(tmp_path):
    (tmp_path / "4.kill").write_text("99")
    items = [(tmp_path, number) for number in range(7)]
    with pytest.raises(TaskError, match=r", 4\): ended its worker 2 times \(last: exit code -9\)"):
        list(each(logged, items, workers=2, attempts=2))
    assert len((tmp_path / "4.log").read_text().splitlines()) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_ends_it_and_names_the_item(workers):
    with pytest.raises(TaskError, match="3: TwoWordsError: three sheep") as caught:
        list(each(fails_at_three, range(9), workers=workers))
    assert "\n" not in str(caught.value)
    if workers > 1:  # what happened there is still to be had
        assert "in fails_at_three" in caught.value.__notes__[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_setup_that_raises_is_reported_as_such(workers):
    with pytest.raises(TaskError, match=r"setting up.*ValueError: no weights here"):
        list(each(with_state, range(3), workers=workers, setup=bad_setup))


def test_a_result_that_cannot_be_sent_is_an_error_not_a_death():
    with pytest.raises(TaskError, match=r"(?i)0: .*pickle"):
        list(each(a_function_is_no_result, [0], workers=2))


def test_workers_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert dict(each(omp, [0], workers=2)) == {0: str(share)}
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert dict(each(omp, [0], workers=2)) == {0: "7"}


def test_senseless_settings_are_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        list(each(squared, [1], workers=0))
    with pytest.raises(ValueError, match="'threads'"):
        list(each(squared, [1], backend="threads"))


@pytest.mark.parametrize("deed", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_run_however_it_ends(tmp_path, deed):
    script = (
        # Shells start what runs in the background with interrupts ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from data.executor import each; "
        "from executor_tasks import slow_and_marked\n"
        f"list(each(slow_and_marked, [Path(r'{tmp_path}') / n for n in 'ab'], workers=2))"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=-3)
    pids = [int(text) for text in _contents(tmp_path, ["a.pid", "b.pid"])]
    run.send_signal(deed)
    assert run.wait(20) != 0
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "a").exists()


def _contents(folder: Path, names: list[str]) -> list[str]:
    """Of files that another process is about to write."""
    deadline = time.monotonic() + 30
    while True:
        texts = [path.read_text() if (path := folder / name).exists() else "" for name in names]
        if all(texts):
            return texts
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ---- Ray


@pytest.fixture(scope="module")
def ray_cluster():
    """Ray's cluster of two nodes of a processor each, which this process has joined."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install .[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", PYTHONPATH)
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.slow
def test_ray_reports_errors_and_dead_workers_as_processes_do(ray_cluster, tmp_path):
    (tmp_path / "2.kill").write_text("1")
    items = [(tmp_path, number) for number in range(5)]
    found = dict(each(logged, items, workers=2, backend="ray"))
    assert [found[item] for item in items] == [1, 1, 2, 1, 1]
    with pytest.raises(TaskError, match="3: TwoWordsError: three sheep"):
        list(each(fails_at_three, range(9), workers=2, backend="ray"))
    with pytest.raises(TaskError, match=r"setting up.*no weights here"):
        list(each(with_state, [1], workers=2, backend="ray", setup=bad_setup))
    states = dict(each(with_state, range(6), workers=2, backend="ray", setup=numbered))
    assert {number for _, number, _ in states.values()} <= {0, 1}


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_loses_nothing_and_doubles_nothing(ray_cluster, tmp_path):
    (second,) = ray_cluster.worker_nodes
    given: list[tuple[Path, int]] = []
    found = Counter()
    nodes = Counter()

    def items():
        """Until both nodes have worked, and some more."""
        more = 6
        while more and len(given) < 200:
            more -= len(nodes) == 2
            given.append((tmp_path, len(given)))
            yield given[-1]

    for item, node in each(shard_of_work, items(), workers=2, backend="ray"):
        found[item] += 1
        nodes[node] += 1
        if len(nodes) == 2 and second is not None:
            ray_cluster.remove_node(second, allow_graceful=False)
            second = None
    assert second is None  # both nodes had worked when one was killed
    assert found == Counter(given)
    for number in range(len(given)):
        assert (tmp_path / f"{number:02d}.txt").read_text() == str(number) * 1000
        assert (tmp_path / f"{number:02d}.done").exists()
    runs = [len(path.read_text()) for path in tmp_path.glob("*.runs")]
    assert sum(runs) - len(given) in (0, 1)  # what the dead node had in hand was run again


def test_a_missing_ray_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install \.\[ray\]"):
        list(each(squared, [1], backend="ray"))
