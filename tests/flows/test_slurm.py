"""Jobs in Slurm: a cluster of this machine where Slurm is installed, and an imitation anywhere."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.config import Resources
from flows.launch import LaunchError, slurm
from flows.launch import cluster as remote
from flows.launch.command import Job, Output
from flows.serve import services
from tests.flows.conftest import wait_for
from tests.flows.jobs import ONE_RANK, TRAINING, in_background, run, state

FAKE = Path(__file__).with_name("fake_slurm.py")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class Fake:
    """The imitation's folder, and what can be done to its jobs."""

    def __init__(self, folder):
        self.folder = folder

    def jobs(self):
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        return [job for job in found if "state" in job]

    def strike(self, **fate):
        """End a running job as Slurm does, or let Slurm forget it."""
        path = sorted(self.folder.glob("*.json"))[-1]
        job = json.loads(path.read_text())
        aside = path.with_name(".struck")  # replaced at once: the imitation reads it all the time
        aside.write_text(json.dumps(job | fate))
        aside.replace(path)
        os.killpg(job["pid"], signal.SIGKILL)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Slurm's commands as an imitation."""
    tools, folder = tmp_path / "bin", tmp_path / "slurm"
    tools.mkdir()
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "srun", "scontrol"):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} {name} "$@"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    yield Fake(folder)
    for job in Fake(folder).jobs():
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.killpg(job["pid"], signal.SIGKILL)


@pytest.fixture(scope="session")
def own_cluster(tmp_path_factory):
    """The configuration of a Slurm cluster of this machine alone, running."""
    path = f"{os.environ['PATH']}:{SBIN}"
    daemons = [shutil.which(name, path=path) for name in ("slurmctld", "slurmd")]
    if None in daemons or not shutil.which("sbatch"):
        pytest.skip("Slurm is not installed (Debian: apt-get install slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    host, user = os.uname().nodename.partition(".")[0], getpass.getuser()
    configuration = folder / "slurm.conf"
    configuration.write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={services.free_port()}
SlurmdPort={services.free_port()}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    running = []
    try:
        for daemon in daemons:
            with (folder / f"{Path(daemon).name}.log").open("w") as log:
                command = [daemon, "-D", "-f", str(configuration)]
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                running.append(process)

        def is_up():
            command = ["sinfo", "--noheader", "--format=%T"]
            asked = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            return "idle" in asked.stdout

        wait_for(is_up, 60)
        yield configuration
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


@pytest.fixture(params=["fake", "real"])
def cluster(request, monkeypatch):
    """Each of the two."""
    if request.param == "fake":
        request.getfixturevalue("fake")
    else:
        configuration = request.getfixturevalue("own_cluster")
        monkeypatch.setenv("SLURM_CONF", str(configuration))


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """No waiting between questions."""
    monkeypatch.setattr(remote, "POLL_S", 0.2)
    monkeypatch.setattr(remote, "OUTAGE_S", 60.0)


@pytest.fixture
def stage(tmp_path):
    """An output's folder, and a training that can be run there."""
    folder = tmp_path / "store/train-base/0123456789abcdef"
    folder.mkdir(parents=True)
    module = tmp_path / "modules"
    module.mkdir()
    (module / "tiny.py").write_text(TRAINING)
    (module / "one-rank").write_text(ONE_RANK.format(python=sys.executable))
    (module / "one-rank").chmod(0o755)
    return folder


def training(stage, steps=3, **resources):
    """A job of `tiny`; `PYTHONPATH` leads to it."""
    env = {"PYTHONPATH": str(stage.parents[2] / "modules")}
    return Job(["tiny", str(stage), str(steps)], two_ranks(**resources), stage / "log", env)


def one_rank(stage, steps=3, **resources):
    """The same without torchrun, for what is not about ranks."""
    python = {"python": str(stage.parents[2] / "modules/one-rank")}
    return training(stage, steps, slurm=python, **resources)


def two_ranks(**more):
    return Resources(backend="slurm", processes=2, **more)


def numbers(lines):
    """Ids of the Slurm jobs that were submitted."""
    return [line.rpartition(" ")[2] for line in lines if "submitted as" in line]


@pytest.mark.slow
def test_a_job_runs_on_every_rank_with_what_was_asked_for_and_its_output_arrives_line_by_line(
    cluster, stage
):
    lines = []
    tiny = stage.parents[2] / "modules/tiny.py"
    asked = "os.write(1, f\"{os.environ['OMP_NUM_THREADS']} {os.environ['A']}\\n\".encode())\n"
    tiny.write_text(f"import os\n{asked}{TRAINING}")
    run(training(stage, slurm={"cpus_per_task": 2}, env={"A": "b"}), lines.append)
    assert {"rank 0 of 2 from 0", "rank 1 of 2 from 0"} <= set(lines)
    assert lines.count("1 b") == 2
    assert "rank 0 of 2 from 0" in (stage / "log").read_text()
    assert len(numbers(lines)) == 1


@pytest.mark.slow
def test_a_failure_brings_the_last_lines_and_the_log_file(cluster, stage):
    (stage.parents[2] / "modules/tiny.py").write_text("raise SystemExit('no such shards')")
    with pytest.raises(LaunchError, match=r"(?s)FAILED in Slurm.*log.*no such shards"):
        run(one_rank(stage, max_restarts=0))


@pytest.mark.slow
def test_an_exception_here_lets_the_job_save_and_leaves_none_behind(cluster, stage):
    def interrupt(line):
        if line.startswith("rank 0"):
            raise KeyboardInterrupt

    job = training(stage, steps=10_000)
    with pytest.raises(KeyboardInterrupt):
        run(job, interrupt)
    assert '"stopped"' in (stage / "log").read_text()
    assert slurm._slurm("squeue", "--me", "--noheader", f"--name={job.name}", "--format=%i") == ""
    assert state(stage) < 10_000


@pytest.mark.slow
def test_a_running_job_is_adopted_and_no_second_one_starts(cluster, stage):
    job = one_rank(stage, steps=30)
    orphan = slurm.SlurmJob(job, Output(str))
    orphan.start()
    wait_for(lambda: state(stage) > 0, 60)
    lines = []
    run(job, lines.append)
    assert numbers(lines) == []
    assert any(f"Slurm job {orphan.id} is there already" in line for line in lines)
    assert state(stage) == 30
    assert (stage / "log").read_text().count("rank 0 of 1") == 1


@pytest.mark.slow
def test_a_job_of_that_name_with_another_command_is_not_touched(cluster, stage):
    job = one_rank(stage, steps=10_000)
    other = slurm.SlurmJob(job, Output(str))
    other.start()
    try:
        with pytest.raises(LaunchError, match=f"another command.*scancel {other.id}"):
            run(one_rank(stage, steps=5))
        assert other.poll() is None
    finally:
        other.kill()
        wait_for(lambda: other.poll(), 60)


def test_a_job_called_off_in_the_queue_never_starts(fake, stage):
    (fake.folder / "queue").touch()

    def interrupt(line):
        if "PENDING" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(one_rank(stage), interrupt)
    assert [job["state"] for job in fake.jobs()] == ["CANCELLED"]
    assert state(stage) == 0


@pytest.mark.parametrize(
    ("fate", "why"),
    [
        ({"fate": "NODE_FAIL"}, "lost a node"),
        ({"fate": "PREEMPTED"}, "make room"),
        ({"fate": "TIMEOUT"}, "time limit"),
        ({"forgotten": True}, "lost a node"),
    ],
)
def test_a_lost_job_goes_on_in_another_one(fake, stage, fate, why):
    lines = []
    thread, errors = in_background(one_rank(stage, steps=25), lines)
    reached = wait_for(lambda: state(stage), 60)
    fake.strike(**fate)
    thread.join()
    assert errors == []
    assert any(why in line for line in lines)
    assert len(numbers(lines)) == 2
    begun = [int(line.split()[-1]) for line in lines if line.startswith("rank 0")]
    assert begun[0] == 0
    assert begun[1] >= reached
    assert state(stage) == 25


def test_a_job_that_the_cluster_asked_to_stop_goes_on_in_another_one(fake, stage):
    lines = []
    thread, errors = in_background(one_rank(stage, steps=25), lines)
    wait_for(lambda: state(stage), 60)
    slurm._slurm("scancel", "--signal=TERM", numbers(lines)[0])
    thread.join()
    assert (errors, state(stage), len(numbers(lines))) == ([], 25, 2)


def test_restarts_are_bounded(fake, stage):
    lines = []
    thread, errors = in_background(one_rank(stage, steps=10_000, max_restarts=1), lines)
    for attempt in (1, 2):
        wait_for(lambda n=attempt: len(fake.jobs()) == n and "pid" in fake.jobs()[-1], 60)
        fake.strike(fate="NODE_FAIL")
    thread.join()
    assert "lost 2 times" in str(errors[0])


def test_a_job_cancelled_by_somebody_is_not_started_again(fake, stage):
    lines = []
    thread, errors = in_background(one_rank(stage, steps=10_000), lines)
    wait_for(lambda: state(stage), 60)
    slurm._slurm("scancel", numbers(lines)[0])
    thread.join()
    assert "was cancelled in Slurm" in str(errors[0])
    assert len(fake.jobs()) == 1


def test_a_deadline_calls_the_job_off_after_it_saved(fake, stage):
    job = one_rank(stage, steps=10_000, deadline_hours=4 / 3600)
    with pytest.raises(LaunchError, match="deadline_hours"):
        run(job)
    assert [job["state"] for job in fake.jobs()] == ["FAILED"]
    assert '"stopped"' in (stage / "log").read_text()


def test_a_controller_that_is_away_for_a_while_is_asked_again(fake, stage):
    lines = []
    (fake.folder / "silent").touch()
    thread, errors = in_background(one_rank(stage), lines)
    wait_for(lambda: any("Unable to contact" in line for line in lines), 60)
    (fake.folder / "silent").unlink()
    thread.join()
    assert (errors, state(stage)) == ([], 3)


def test_a_controller_that_stays_away_is_an_error(fake, stage, monkeypatch):
    monkeypatch.setattr(remote, "OUTAGE_S", 0.5)
    (fake.folder / "silent").touch()
    with pytest.raises(LaunchError, match=r"Unable to contact slurm controller.*given up"):
        run(one_rank(stage))


def test_without_slurm_the_error_says_where_to_run(stage, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"squeue is not on the PATH.*login node"):
        run(one_rank(stage))


def test_no_secret_gets_into_the_script_or_the_commands(fake, stage, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plainly-seen")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "never-sent")
    run(one_rank(stage))
    (job,) = fake.jobs()
    environment = job.pop("environment")
    assert environment["AWS_SECRET_ACCESS_KEY"] == "plainly-seen"
    assert "never-sent" not in json.dumps(environment)
    assert "plainly-seen" not in json.dumps(job)
    for path in stage.rglob("*"):
        assert "plainly-seen" not in path.read_text()


SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=train-base-01234567
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --partition=gpu
#SBATCH --gpus-per-node=8
#SBATCH --mem=500G
#SBATCH --time=1440
#SBATCH --signal=TERM@120
#SBATCH --export=ALL
#SBATCH --output=/store/train-base/0123456789abcdef/output.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --exclusive

set -euo pipefail
STATUS=/store/train-base/0123456789abcdef/.slurm-$SLURM_JOB_ID.status
trap 'echo $? > "$STATUS"' EXIT
module load cuda
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun --kill-on-bad-exit=1 \\
    /opt/python -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d \
"--rdzv-endpoint=$HEAD:PORT" --rdzv-id=train-base-01234567 --max-restarts=3 \
--shutdown-timeout=120 -m gigagan.training --config 'a b'
"""


def test_the_script_holds_what_was_asked_for():
    resources = Resources(
        backend="slurm",
        nodes=4,
        processes=8,
        slurm={
            "partition": "gpu",
            "gpus_per_node": 8,
            "mem_gb": 500,
            "time_hours": 24,
            "python": "/opt/python",
            "setup": ["module load cuda"],
            "parameters": {"exclusive": ""},
        },
    )
    log = Path("/store/train-base/0123456789abcdef/output.log")
    job = Job(["gigagan.training", "--config", "a b"], resources, log)
    expected = SCRIPT.replace("PORT", str(job.port))
    assert slurm.render(job) == slurm.script(job) == expected


def test_what_a_job_inherits_is_shown_and_not_in_its_script():
    resources = two_ranks(env={"NCCL_DEBUG": "a b"})
    job = Job(["m"], resources, Path("/store/train-base/01/output.log"), {"MLFLOW_RUN_ID": "7"})
    added = "# inherits MLFLOW_RUN_ID=7\n# inherits NCCL_DEBUG='a b'\n"
    assert slurm.render(job) == slurm.script(job) + added


def test_an_image_brings_its_own_python_and_sees_the_store():
    resources = two_ranks(slurm={"container_image": "registry/train:1"})
    script = slurm.render(Job(["m"], resources, Path("/store/train-base/01/output.log")))
    assert "--container-image=registry/train:1 --container-mounts=/store:/store \\\n" in script
    assert "    python -m torch.distributed.run" in script


def test_the_end_of_a_file_comes_in_whole_lines(tmp_path):
    path, lines = tmp_path / "log", []
    path.write_text("old\n")
    tail = slurm.Tail(path)
    tail.skip()
    for text in ("on", "e\ntwo\nth", "ree"):
        with path.open("a") as file:
            file.write(text)
        tail.pass_on(lines.append)
    assert lines == ["one", "two"]
    tail.pass_on(lines.append, is_last=True)
    assert lines == ["one", "two", "three"]
