"""Processes that tests kill, forked from one that has imported what they need."""

import contextlib
import multiprocessing

import psutil

context = multiprocessing.get_context("forkserver")
# All of them here: a process has one such server, and the last list that it is given.
context.set_forkserver_preload(
    [
        *("data.lists.metadata", "data.score.run", "data.shards.write"),
        *("flows.storage.lease", "flows.storage.objects", "s3fs"),
    ]
)


HEADLESS = """
import ctypes, platform, threading

threading.Thread(target=input).start()
print("up", flush=True)
number = 60 if platform.machine() == "x86_64" else 93
ctypes.CDLL(None).syscall(number, 0)  # exit: of this thread alone
"""
"""A Linux process whose first thread has ended and another waits for input, as while it is killed:
a zombie that lives."""


def kill(process) -> None:
    """End a process and all its descendants by SIGKILL."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        for one in [*found.children(recursive=True), found]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.join()
