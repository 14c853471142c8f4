import json
import runpy
from io import BytesIO

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import InterpolationMode

from common.data import decode
from common.models import preprocessing as module
from common.models.backbones import load_preprocessing
from common.models.preprocessing import Preprocessing

SMALL = Preprocessing(8, 6, InterpolationMode.BILINEAR, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


@pytest.mark.parametrize("size", [(200, 200), (333, 250), (375, 500), (64, 64)])
@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b0", "resnet50"])
def test_it_is_that_of_the_weights(name, size):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    preprocessing = load_preprocessing(name, "none", 0, whole_photo=False)
    ours = preprocessing.normalize(torch.from_numpy(preprocessing.resize_crop(image))[None])[0]
    theirs = models.get_model_weights(name).DEFAULT.transforms()(image)
    assert ours.shape == theirs.shape
    differs = (ours - theirs).abs() > 0.02  # more than one step of 1/255, which is 0.017
    assert differs.float().mean() < 1e-4  # the odd pixel, by rounding


def test_resize_crop_takes_the_centre():
    """Each pixel twice as wide and high, and 4 of 12 columns to be cut off: halved, the middle ones remain."""
    small = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    large = Image.fromarray(small.repeat(2, axis=0).repeat(2, axis=1))
    preprocessing = Preprocessing(4, 4, InterpolationMode.BOX, (0.0,) * 3, (1.0,) * 3)
    assert np.array_equal(preprocessing.resize_crop(large), small[:, 1:5])
    upright = Image.fromarray(np.asarray(large).swapaxes(0, 1).copy())
    assert np.array_equal(preprocessing.resize_crop(upright), small[:, 1:5].swapaxes(0, 1))


def test_the_whole_of_a_wide_or_tall_photo_is_seen():
    """Two photos with the same middle square alone get different pixels; a square one is as before."""
    rng = np.random.default_rng(0)
    first, second = (rng.integers(256, size=(40, 120, 3), dtype=np.uint8) for _ in range(2))
    second[:, 40:80] = first[:, 40:80]
    whole = load_preprocessing("resnet18", "none", 40, whole_photo=True)
    centre = Preprocessing(40, 40, whole.interpolation, whole.mean, whole.std)
    for turn in (lambda pixels: pixels, lambda pixels: pixels.swapaxes(0, 1).copy()):
        one, two = (Image.fromarray(turn(pixels)) for pixels in (first, second))
        assert np.array_equal(centre.resize_crop(one), centre.resize_crop(two))
        assert (whole.resize_crop(one) != whole.resize_crop(two)).mean() > 0.5
    assert np.array_equal(whole.resize_crop(one), np.asarray(one.resize((40, 40), Image.Resampling.BILINEAR)))
    square = Image.fromarray(first[:, :40])
    assert np.array_equal(whole.resize_crop(square), centre.resize_crop(square))


def test_normalize_by_hand():
    images = torch.tensor([255, 51, 102], dtype=torch.uint8).view(1, 1, 1, 3)
    normalized = SMALL.normalize(images)
    assert normalized.shape == (1, 3, 1, 1)
    assert normalized.dtype == torch.float32
    assert normalized.flatten().tolist() == pytest.approx([(1 - 0.5) / 0.5, (0.2 - 0.25) / 0.25, 0.4], abs=1e-6)
    assert torch.equal(SMALL.normalize(images.float()), normalized)


def test_a_camera_photo_is_decoded_at_a_fraction_of_its_size():
    """Twice what the network sees is kept, of a region of the photo too; what is cut from it hardly differs."""
    preprocessing = load_preprocessing("resnet18", "none", 64, whole_photo=True)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).resize((1600, 1200))
    file = BytesIO()
    photo.save(file, "JPEG", quality=95)
    decoded = preprocessing.decode(file.getvalue())
    assert decoded.size == (200, 150)
    assert preprocessing.decode(file.getvalue(), fraction=0.4).size == (800, 600)
    difference = preprocessing.resize_crop(decoded).astype(float) - preprocessing.resize_crop(photo)
    assert np.abs(difference).mean() < 2


def test_it_survives_a_file():
    preprocessing = load_preprocessing("efficientnet_b0", "none", 96, whole_photo=False)
    stored = json.loads(json.dumps(preprocessing.to_dict()))
    assert (stored["crop"], stored["interpolation"]) == (96, "BICUBIC")
    assert Preprocessing.from_dict(stored) == preprocessing


def test_cache_keys_name_the_size_the_interpolation_and_the_decoder():
    assert SMALL.pixels == f"8 6 BILINEAR, decoding 2, Pillow {PIL.__version__}"


def test_cache_keys_follow_the_version_of_pillow(monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "99.0")
    version = runpy.run_path(decode.__file__)["VERSION"]
    assert version == "decoding 2, Pillow 99.0"
    monkeypatch.setattr(module, "VERSION", version)
    assert SMALL.pixels == "8 6 BILINEAR, decoding 2, Pillow 99.0"
