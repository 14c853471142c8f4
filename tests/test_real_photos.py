"""On real photos with real weights, where IMAGE_SEARCH_PHOTOS and IMAGE_SEARCH_WEIGHTS name them."""

import json
import os
from pathlib import Path

import pytest

PHOTOS, WEIGHTS = (os.environ.get(name, "") for name in ("IMAGE_SEARCH_PHOTOS", "IMAGE_SEARCH_WEIGHTS"))


@pytest.mark.skipif(
    not (PHOTOS and WEIGHTS),
    reason="IMAGE_SEARCH_PHOTOS (a folder with cats/ and dogs/) and IMAGE_SEARCH_WEIGHTS (squeezenet1_1) are not set",
)
def test_real_cats_find_cats(run_script, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for photo in sorted((Path(PHOTOS) / name).iterdir())[:200]:
            (tmp_path / "pets" / name / photo.name).write_bytes(photo.read_bytes())
    arguments = ("--data", "pets", "--backbone", "squeezenet1_1", "--weights", WEIGHTS, "--epochs", "0")
    ended = run_script("cnn_feature_extraction.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "cnn_feature_extraction.json").read_text())
    assert result["dataset"]["queries"] == 40
    assert result["metrics"]["precision@5"]["value"] > 0.85
    assert result["metrics"]["accuracy@5"]["value"] > 0.9
    assert result["metrics"]["instance_hit_rate@1_crop"]["value"] > 0.8  # among 400 photos, not 20,000
    assert result["baselines"]["raw_pixels"]["precision@5"]["value"] < 0.65
