import runpy
from io import BytesIO

import numpy as np
import PIL
import pytest
import torchvision
from PIL import Image

from common.models import augment
from common.retrieval import distortions
from common.retrieval.distortions import distort


def test_distorting_is_deterministic_and_as_the_protocol_says():
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 200)  # red rises to the right
    image = Image.fromarray(ramp)
    first, again, other = (distort(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
    mirrored = []
    for seed in range(200):
        copy = Image.open(BytesIO(distort(image, np.random.default_rng(seed))))
        assert (copy.format, copy.size) == ("JPEG", (200, 100))
        red = np.asarray(copy, float)[50, :, 0]
        mirrored.append(red[5:20].mean() > red[-20:-5].mean())
    assert 0.4 < np.mean(mirrored) < 0.6
    tables = Image.open(BytesIO(first)).quantization
    reference = BytesIO()
    image.save(reference, "JPEG", quality=50)
    assert tables == Image.open(reference).quantization


def test_crops_are_35_to_80_percent_of_the_area(monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def record(self, size, resample=None, box=None):
        boxes.append(box)
        return resize(self, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", record)
    image = Image.new("RGB", (500, 250))
    for seed in range(300):
        distort(image, np.random.default_rng(seed))
    left, top, right, bottom = np.array(boxes).T
    areas = (right - left) * (bottom - top) / (500 * 250)
    assert 0.345 < areas.min() < 0.37
    assert 0.78 < areas.max() < 0.805
    assert left.min() >= 0
    assert right.max() <= 500
    assert bottom.max() <= 250
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.02)


def test_the_photo_itself_stays_as_it_is():
    image = Image.new("RGB", (40, 30), "red")
    distort(image, np.random.default_rng(0))
    assert image.size == (40, 30)
    assert image.getcolors() == [(1200, (255, 0, 0))]


def test_cache_keys_name_all_that_a_copy_depends_on():
    versions = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}"
    version = distortions.VERSION
    assert version == f"distortion 1, crop (0.35, 0.8), jitter 0.3 0.05, JPEG 50, {versions}"


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (augment, "JITTER", 0.4),
        (augment, "HUE", 0.1),
        (PIL, "__version__", "99.0"),
        (torchvision, "__version__", "99.0"),
    ],
)
def test_cache_keys_follow_what_other_modules_set(monkeypatch, owner, name, value):
    monkeypatch.setattr(owner, name, value)
    version = runpy.run_path(distortions.__file__)["VERSION"]
    assert version != distortions.VERSION
    assert str(value) in version
