"""Tests side by side: each process of pytest-xdist computes with one thread.

More threads than cores make two processes of torch twenty times slower instead of two.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
