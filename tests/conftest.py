"""Tests side by side: a folder for what they share, and one thread for each process.

More threads than cores make two processes of torch twenty times slower instead of two.
"""

import os
import signal

from tests import once

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset's import asks the web otherwise
once.open_run()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure():
    """The process that began the run ends it."""
    if not IS_WORKER:
        once.close_run()
