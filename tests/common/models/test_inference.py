"""Networks in OpenVINO against the same ones in torch."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common.config import UserError
from common.models import inference
from common.models.embedder import Embedder
from common.models.inference import calibration_images, compile_network
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(synthetic_photos, embedder):
    return calibration_images(synthetic_photos, embedder.preprocessing)


@pytest.fixture
def new_embedder(embedder, synthetic_photos):
    def new(kind, folder=synthetic_photos, cache=None):
        return Embedder(embedder.network, embedder.preprocessing, CPU, 8, cache, inference=kind, folder=folder)

    return new


def test_photos_to_calibrate_with_are_spread_over_the_folder(synthetic_photos, embedder, tmp_path):
    images = calibration_images(synthetic_photos, embedder.preprocessing)
    assert images.shape == (64, 64, 64, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(64, -1), axis=0)) == 64
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="has no photo to take the ranges of 8-bit numbers from"):
        calibration_images(tmp_path, embedder.preprocessing)


def test_embeddings_in_float32_are_those_of_torch(images, new_embedder):
    ours = new_embedder("openvino")
    assert ours.precision == torch.float32
    network, preprocessing = ours.network, ours.preprocessing
    with torch.inference_mode():
        expected = nn.functional.normalize(network(preprocessing.normalize(torch.from_numpy(images))))
    assert ours.embed_batch(images) == pytest.approx(expected.numpy(), abs=1e-5)


def test_embeddings_in_8_bits_are_near_those_of_torch(images, new_embedder):
    ours = new_embedder("int8")
    assert ours.precision == torch.int8
    expected, found = new_embedder("torch").embed_batch(images), ours.embed_batch(images)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(64), abs=1e-5)
    centered = [each - expected.mean(0) for each in (expected, found)]
    cosines = (
        (centered[0] * centered[1]).sum(1) / np.linalg.norm(centered[0], axis=1) / np.linalg.norm(centered[1], axis=1)
    )
    assert cosines.mean() > 0.9
    assert np.abs(found - expected).max() > 1e-5  # else nothing was quantized


@pytest.mark.parametrize("kind", ["openvino", "int8"])
def test_several_threads_use_a_network(images, new_embedder, kind):
    ours = new_embedder(kind)
    expected = ours.embed_batch(images)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            found = list(pool.map(ours.embed_batch, np.split(images, 16)))
            assert np.concatenate(found) == pytest.approx(expected, abs=1e-5)


def test_a_copy_that_computes_something_else_is_refused(new_embedder):
    compiled = new_embedder("openvino").compiled
    compiled.idle.clear()
    compiled.expected = compiled.expected * 1.01
    with pytest.raises(UserError, match="OpenVINO computes different embeddings of the same photo"):
        compiled(np.zeros((1, 64, 64, 3), np.uint8))


def test_a_quantized_network_is_kept_and_a_damaged_one_made_again(new_embedder, images, tmp_path, monkeypatch):
    expected = new_embedder("int8", cache=tmp_path / "cache").embed_batch(images)
    (file,) = (tmp_path / "cache").rglob(inference.FILE)
    assert (file.parent / "key.txt").read_text().startswith("network, ")
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_quantize", None)
        again = new_embedder("int8", folder=tmp_path / "gone", cache=tmp_path / "cache")
    assert np.array_equal(again.embed_batch(images), expected)
    file.write_text("<net")
    assert np.array_equal(new_embedder("int8", cache=tmp_path / "cache").embed_batch(images), expected)
    assert len(file.read_text()) > 1000


def test_each_kind_has_embeddings_and_a_digest_of_its_own(new_embedder, tmp_path):
    made = [new_embedder(kind, cache=tmp_path) for kind in ("torch", "openvino", "int8")]
    assert len({each.digest for each in made}) == 3
    assert len({each.rows.folder for each in made}) == 3


def test_pooling_and_heads_are_not_quantized(embedder):
    """What lies between the first and the last convolution is: here they themselves and the ReLU."""
    openvino = pytest.importorskip("openvino")
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = inference.FromPixels(nn.Sequential(*layers, nn.Linear(4, 4)), embedder.preprocessing).eval()
    model = inference._convert(openvino, network, 16)
    left = set(inference._outside_convolutions(model))
    kinds = [each.get_type_name() for each in model.get_ordered_ops() if each.get_friendly_name() not in left]
    between = [kind for kind in kinds if kind in ("Convolution", "Relu", "Add", "MatMul", "ReduceMean")]
    assert between == ["Convolution", "Add", "Relu", "Convolution"]
    with pytest.raises(UserError, match="no convolution to compute in 8 bits: give --inference openvino"):
        flat = inference.FromPixels(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)), embedder.preprocessing)
        inference._outside_convolutions(inference._convert(openvino, flat, 16))


def test_nothing_is_reported_to_anyone():
    code = (
        "import sys\n"
        "from common.models.inference import _require_silent\n"
        "_require_silent('openvino', 'nncf')\n"
        "print([name for name, module in sys.modules.items() if name.startswith('openvino_tel') and module])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_what_is_missing_is_said(embedder, synthetic_photos, monkeypatch):
    with pytest.raises(UserError, match="int8 needs photos to quantize the network for: name a folder with --index"):
        Embedder(embedder.network, embedder.preprocessing, CPU, inference="int8")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="openvino is missing: pip install -r requirements-extra.txt"):
        Embedder(embedder.network, embedder.preprocessing, CPU, inference="openvino")


def test_other_devices_are_refused(embedder):
    other = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(UserError, match="inference int8 is for CPUs, not mps: give --device cpu, or leave it out"):
        Embedder._compile(other, "int8", None, None, "")


def test_an_operation_that_openvino_does_not_know_is_one_sentence(embedder):
    class Strange(nn.Module):
        def forward(self, images):
            return torch.linalg.eigvals(images[:, 0]).real

    with pytest.raises(UserError, match=r"OpenVINO can't take this network \(.+\): leave --inference out"):
        compile_network(Strange(), embedder.preprocessing, None, None, "")
