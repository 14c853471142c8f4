"""What all approaches share, in rooms: data <- models <- retrieval <- report.

Imported before torch, it lets torch's threads wait for each other without keeping a core busy for long: where another
program takes one of the cores, each thread would keep one until the system takes it away, in every operation.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of GNU OpenMP; its own number is 30 times as large
