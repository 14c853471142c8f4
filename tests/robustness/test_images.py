import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits of memory and time differ on Windows")


def decode_images(seed: int, count: int) -> tuple[int, list[str], str]:
    """The exit status of the program that decodes them, what goes wrong with them, and its last line."""
    command = [sys.executable, "-m", "tests.robustness.decode_images", str(seed), str(count)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    *problems, last = ended.stdout.splitlines() or [ended.stderr]
    return ended.returncode, problems, last


def test_odd_images_are_decoded_or_refused(full):
    returned, problems, last = decode_images(0 if full else 1, 0)
    assert (returned, problems) == (0, [])
    assert int(last.split(" images, peak ")[0]) > 300


def test_mutations_are_decoded_or_refused(full):
    for seed in range(1, 3 if full else 2):
        returned, problems, last = decode_images(seed, 10_000 if full else 1_000)
        assert (returned, problems) == (0, []), seed
        assert " images, peak " in last
