"""The approach without labels: what it learns from, what it reconstructs, and the script as a user runs it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import autoencoder
from autoencoder import Autoencoder, Config, Decoder
from common.models.backbones import load_backbone
from common.models.pca import principal_components
from common.report.run import Run

SMALL = (
    "--backbone",
    "squeezenet1_1",
    "--image-size",
    "64",
    "--view-size",
    "48",
    "--output-size",
    "32",
    "--epochs",
    "2",
)
DIMS = ("--appearance-dim", "20", "--semantic-dim", "30", "--decoder-width", "8")


@pytest.fixture
def network():
    """Of an untrained squeezenet1_1 at 64 pixels: codes of 12 + 8 dimensions, reconstructions of 32 x 32."""
    torch.manual_seed(0)
    config = Config(appearance_dim=12, semantic_dim=8, output_size=32, decoder_width=4, appearance_weight=0.5)
    return Autoencoder(load_backbone("squeezenet1_1", "none", 64), config).eval()


def test_the_decoder_sees_the_code_alone(network):
    photos = torch.rand(3, 3, 64, 64)
    reconstructions, semantics = network(photos, photos, None)
    codes = network.encoder(photos)
    assert codes.shape == (3, 20)
    assert torch.equal(semantics, codes[:, 12:])
    assert torch.equal(reconstructions, network.decoder(codes))
    assert reconstructions.shape == (3, 3, 32, 32)
    known = torch.rand(3, 8)  # in training the semantics to learn take the place of the encoder's
    reconstructions, semantics = network(photos[:, :, :48, :48], photos, known)
    assert torch.equal(reconstructions, network.decoder(torch.cat([codes[:, :12], known], 1)))
    assert torch.equal(semantics, network.encoder.semantics(photos[:, :, :48, :48]))


def test_without_details_a_reconstruction_is_that_of_the_principal_components(network):
    torch.manual_seed(1)
    photos = torch.rand(40, 3, 32, 32)
    network.init_appearance(photos)
    network.decoder.refine = torch.nn.Module()
    network.decoder.refine.forward = lambda maps: 0
    appearance = network.encoder.appearance(photos)
    assert appearance.square().sum(1).mean().sqrt() == pytest.approx(0.5, rel=1e-4)  # the weight of appearance
    flat = photos.flatten(1)
    mean, directions = principal_components(flat, 12, 0)
    unit = torch.nn.functional.normalize(directions)
    expected = mean + (flat - mean) @ unit.T @ unit
    codes = torch.cat([appearance, torch.zeros(40, 8)], 1)
    assert torch.allclose(network.decoder(codes).flatten(1), expected, atol=1e-4)


def test_appearance_is_not_trained():
    trained = {name for name, each in Decoder(12, 8, 32, 4).named_parameters() if each.requires_grad}
    assert trained
    assert not any(name.startswith("pixels") for name in trained)


def test_training_never_sees_the_labels(synthetic_photos, tmp_path, monkeypatch):
    """With the classes exchanged at random between gallery photos, the very same network comes out."""
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "frozen.pth")
    states = []
    load_photos, train = Run.load_photos, Run.train

    def relabelled(self, *consumers, **options):
        split = load_photos(self, *consumers, **options)
        labels = np.random.default_rng(len(states)).permutation(split.train.labels)
        return dataclasses.replace(split, train=dataclasses.replace(split.train, labels=labels))

    class TrainedError(Exception):
        pass

    def train_and_stop(self, network, *arguments):
        train(self, network, *arguments)
        states.append(network.state_dict())
        raise TrainedError

    monkeypatch.setattr(Run, "load_photos", relabelled)
    monkeypatch.setattr(Run, "train", train_and_stop)
    for turn in range(2):
        small = {"backbone": "squeezenet1_1", "image_size": 64, "view_size": 48, "output_size": 32, "epochs": 1}
        places = {
            "data": str(synthetic_photos),
            "weights": str(tmp_path / "frozen.pth"),
            "results": str(tmp_path / str(turn)),
        }
        config = Config(**small, **places, cache="none", device="cpu")
        with pytest.raises(TrainedError):
            autoencoder.main(config)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run(run_script, synthetic_photos, tmp_path):
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "frozen.pth")
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), "--weights", "frozen.pth", *SMALL, *DIMS)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "autoencoder.json").read_text())
    assert set(result["history"][0]) >= {"pixels", "structure", "features"}
    assert result["history"][1]["features"] < result["history"][0]["features"]
    reconstruction = result["reconstruction"]
    assert reconstruction["dimensions"] == 50
    for prefix in ("", "pca_"):
        assert 0 < reconstruction[f"{prefix}mse"] < 1
        assert 0 < reconstruction[f"{prefix}psnr"] < 60
    assert result["baselines"].keys() == {"pretrained", "raw_pixels", "chance"}
    assert result["baselines"]["pretrained"].keys() == result["metrics"].keys()
    assert result["model"]["embedding_dim"] == 50
    assert result["model"]["weights"].startswith("frozen.pth, sha256 ")
    with Image.open(tmp_path / "results" / "autoencoder.reconstructions.png") as picture:
        assert picture.width > 10 * 128
    found = run_script("search.py", str(next(synthetic_photos.rglob("*.jpg"))))
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("   5  ") == 1


def test_pixels_alone(run_script, synthetic_photos, tmp_path):
    """No weights are loaded, even if some are named; with classes or without them."""
    alone = ("--feature-weight", "0", "--weights", "nowhere.pth", "--no-labelled")
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), *SMALL, *DIMS, *alone)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "autoencoder.json").read_text())
    assert "features" not in result["history"][0]
    assert result["model"]["weights"] == "none (untrained)"
    assert all(name.startswith("instance_") for name in result["metrics"])


def test_a_size_that_the_decoder_cannot_make(run_script, synthetic_photos):
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), "--output-size", "100")
    assert ended.returncode == 2
    assert "output_size is 100: give a multiple of 8" in ended.stderr
