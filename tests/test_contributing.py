"""The worked example of CONTRIBUTING.md: one new file is trained, searched, compared and shown in the page."""

import json
import os
import re

import pytest

from benchmarks.page import Client
from common.models.checkpoint import Checkpoint
from tests.conftest import ROOT, served_page

EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def environment(tmp_path, offline):
    """`toy.py` lies where a contributor would put it: on the path of the scripts, beside them."""
    (tmp_path / "toy.py").write_text(EXAMPLE)
    return {**offline, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}


def test_the_example_is_short():
    assert len(EXAMPLE.splitlines()) < 60


def test_one_file_is_a_new_approach(forks, tmp_path, environment, synthetic_photos):
    def run(script, *arguments):
        ended = forks.run([str(script), *arguments], tmp_path, environment)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    run(tmp_path / "toy.py", "--data", str(synthetic_photos), "--learning-rate", "0.01")
    result = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert result["history"][1]["loss"] < result["history"][0]["loss"]
    assert result["model"]["embedding_dim"] == 64
    assert result["config"]["learning_rate"] == 0.01

    photo = next(synthetic_photos.rglob("*.jpg"))
    found = run(ROOT / "search.py", str(photo), "--approach", "toy")
    assert len(re.findall(r"^ +\d  \d\.\d{3}  (?:cat|dog)  ", found, re.MULTILINE)) == 5
    assert "[toy](toy.py) (synthetic images)" in run(ROOT / "compare.py")

    direct = {**os.environ, "PYTHONPATH": environment["PYTHONPATH"]}  # Gradio calls itself, which no proxy may take
    with served_page(forks, tmp_path, environment=direct) as address:
        Client(address.rstrip("/")).search(photo.read_bytes(), "toy")  # raises if nothing is found


def test_a_checkpoint_without_its_script_is_named(run_script, tmp_path, trained, synthetic_photos):
    checkpoint = Checkpoint.load(trained / "siamese.pt")
    checkpoint.approach = "gone"
    checkpoint.save(tmp_path / "results" / "gone.pt")
    ended = run_script("search.py", str(next(synthetic_photos.rglob("*.jpg"))))
    assert ended.returncode == 2
    assert "was written by gone.py, which is missing" in ended.stderr
