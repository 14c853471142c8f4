"""Disks that are full at every kind of write."""

import contextlib
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.robustness.runs import command, half_written, neighbours, outcome, slowly

CODE = """
import runpy
import sys
from common import row_cache
row_cache.MIN_FREE_BYTES = 0  # caches are written until nothing is left
sys.argv = {arguments!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A disk of that size at `folder`; yields what changes its size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")

    def resize(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)

    resize(kilobytes)
    try:
        yield resize
    finally:
        subprocess.run(["umount", folder], check=True)


def run_until_it_fits(forks, folder, kilobytes, arguments):
    """Runs a script on a disk of that size, which may end with a sentence, then on a large one; what that prints."""
    with small_disk(folder, kilobytes) as resize:
        ended = forks.run(["-c", CODE.format(arguments=arguments)], folder)
        assert ended.returncode in (0, 2), ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (ended.returncode == 2)
        if errors:
            assert any(each in errors[0] for each in ("No space left on device", "can't be written")), errors
        assert half_written(folder) == []
        resize(1_000_000)
        again = forks.run(["-c", CODE.format(arguments=arguments)], folder)
        assert again.returncode == 0, again.stderr
        yield ended.returncode, again.stdout


@pytest.mark.parametrize("approach", ["cnn_feature_extraction", *slowly("siamese", "triplet", "autoencoder")])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(approach, forks, few_photos, tmp_path, full):
    (tmp_path / "whole").mkdir()
    arguments = list(command(approach, few_photos))
    assert forks.run(arguments, tmp_path / "whole").returncode == 0
    expected = outcome(tmp_path / "whole", approach)
    used = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()) // 1000
    parts = [0.001, *(number / 20 for number in range(1, 21))] if full else [0.001, 0.7]
    statuses = []
    for number, part in enumerate(parts):
        folder = tmp_path / str(number)
        for status, _ in run_until_it_fits(forks, folder, max(8, int(part * used)), arguments):
            assert outcome(folder, approach) == expected
            statuses.append(status)
    assert statuses[0] == 2


def test_a_search_on_a_full_disk(forks, trained, few_photos, tmp_path, full):
    shutil.copy(trained / "siamese.pt", tmp_path)
    query = str(next(few_photos.rglob("*.jpg")))
    index = ("--index", str(few_photos), "--engine", "hnsw", "--approach", "siamese", "--results", str(tmp_path))
    found = set()
    for number, kilobytes in enumerate(range(8, 600, 20 if full else 150)):
        arguments = [str(ROOT / "search.py"), query, *index]
        for ended, printed in run_until_it_fits(forks, tmp_path / str(number), kilobytes, arguments):
            assert ended == 0  # a cache is not needed
            found.add(tuple(neighbours(printed)))
    assert len(found) == 1
