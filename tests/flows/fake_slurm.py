"""Slurm's commands without Slurm: a job is a real process, its state a file.

Called as `fake_slurm.py COMMAND WORDS`. The folder FAKE_SLURM holds `ID.json` of each job; a file
`silent` in it makes every command fail as without a controller, `queue` keeps new jobs pending.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])


def main(command: str, *words: str) -> int:
    """One of Slurm's commands."""
    if command == "supervise":
        return supervise(words[0])
    if (FOLDER / "silent").exists() and command != "srun":
        return fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    options = dict(re.fullmatch(r"--([\w-]+)=?(.*)", w).groups() for w in words if w[:2] == "--")
    plain = [word for word in words if word[:1] != "-"]
    return globals()[command](options, plain, words)


def sbatch(options, plain, words):
    script = Path(plain[0]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE)) | options
    number = str(len(list(FOLDER.glob("*.json"))) + 41)
    state = "PENDING" if (FOLDER / "queue").exists() else "RUNNING"
    write(number, options | {"state": state, "script": plain[0], "environment": dict(os.environ)})
    supervisor = [sys.executable, __file__, "supervise", number]
    with Path(options["output"]).open("a") as log:
        subprocess.Popen(supervisor, stdout=log, stderr=log, start_new_session=True)
    print(number)
    return 0


def supervise(number):
    """Slurm's part of a job: start it, note its end."""
    while (FOLDER / "queue").exists() and read(number)["state"] == "PENDING":
        time.sleep(0.05)
    job = read(number)
    if job["state"] == "CANCELLED":
        return 0
    environment = job["environment"] | {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost"}
    child = subprocess.Popen(["bash", job["script"]], env=environment, start_new_session=True)
    write(number, job | {"state": "RUNNING", "pid": child.pid})
    status = child.wait()
    job = read(number)
    ended = "COMPLETED" if status == 0 else "FAILED"
    write(number, job | {"state": job.get("fate") or ended})
    return 0


def srun(options, plain, words):
    command = words[next(i for i, word in enumerate(words) if word[:1] != "-") :]
    os.execvp(command[0], command)


def scontrol(options, plain, words):
    print("localhost\nlocalhost2")
    return 0


def squeue(options, plain, words):
    for path in sorted(FOLDER.glob("*.json")):
        job = read(path.stem)
        live = job["state"] in ("PENDING", "RUNNING")
        if options.get("jobs", path.stem) != path.stem or job.get("forgotten"):
            continue
        if options.get("name", job["job-name"]) != job["job-name"]:
            continue
        if live or options.get("states") == "all":
            row = {"i": path.stem, "k": job["comment"], "T": job["state"], "r": "None"}
            print(re.sub("%(.)", lambda m, row=row: row[m[1]], options["format"]))
            return 0
    return fail("slurm_load_jobs error: Invalid job id specified") if "jobs" in options else 0


def sacct(options, plain, words):
    return fail("Slurm accounting storage is disabled")


def scancel(options, plain, words):
    job = read(plain[0])
    if job["state"] == "PENDING":
        write(plain[0], job | {"state": "CANCELLED"})
    elif job["state"] != "RUNNING":
        return fail(
            f"scancel: error: Kill job error on job id {plain[0]}: Invalid job id specified"
        )
    elif "signal" in options:  # to the tasks, not the script
        strike(job["pid"], getattr(signal, f"SIG{options['signal']}"), spare=job["pid"])
    else:
        write(plain[0], job | {"fate": "CANCELLED"})
        strike(job["pid"], signal.SIGKILL)
    return 0


def strike(session, number, spare=0):
    """Signal all processes of a session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        if int(fields[3]) == session and pid != spare:
            os.kill(pid, number)


def read(number):
    return json.loads((FOLDER / f"{number}.json").read_text())


def write(number, job):
    aside = FOLDER / f".{number}.{os.getpid()}"
    aside.write_text(json.dumps(job))
    aside.replace(FOLDER / f"{number}.json")


def fail(text):
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
