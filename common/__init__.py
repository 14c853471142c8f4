"""What all approaches share, in rooms: data <- models <- retrieval <- report.

Imported before torch, it lets torch's threads wait for each other without keeping a core busy for long: where another
program takes one of the cores, each thread would keep one until the system takes it away, in every operation. And it
lets glibc keep the memory of large arrays for the next ones, where it would return it to the system and get it back,
page by page, in every step.
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of GNU OpenMP; its own number is 30 times as large

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, -1)  # nothing is returned, but
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 30)  # arrays of this many bytes or more
