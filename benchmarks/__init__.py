"""Benchmarks of speed against other libraries and against limits:  python -m benchmarks.NAME --data FOLDER"""

import common  # noqa: F401  # before torch
