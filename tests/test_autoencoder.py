"""The approach without labels: what it learns from, what it rebuilds, and the script as a user runs it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torchvision import models

import autoencoder
from autoencoder import NO_TEACHER, Autoencoder, Config, load_teacher, reconstruct, whiten
from common.data.photos import load_photos
from common.models.backbones import load_backbone
from common.models.decoded import DecodedPhotos
from common.report.run import Run

SMALL = ("--backbone", "squeezenet1_1", "--image-size", "32", "--view-size", "32", "--width", "8", "--epochs", "2")


def test_shapes():
    network = Autoencoder(image_size=64, width=4, embedding_dim=10)
    rebuilt, bottleneck = network(torch.zeros(3, 3, 48, 48))  # a view may be smaller than the photo
    assert rebuilt.shape == (3, 3, 64, 64)
    assert torch.equal(bottleneck, network.encoder(torch.zeros(3, 3, 48, 48)))
    assert bottleneck.shape == (3, 10)
    assert network.encoder(torch.zeros(3, 3, 112, 112)).shape == (3, 10)  # which can't be halved five times


def test_pixels_alone_need_no_weights(synthetic_photos, tmp_path):
    config = Config(data=str(synthetic_photos), feature_weight=0.0, weights=str(tmp_path / "nowhere.pth"), cache="none")
    assert load_teacher(Run.begin("autoencoder", config, {})) == (None, NO_TEACHER)


def test_whitened_features_are_the_principal_components():
    """As scikit-learn finds them, but for the sign of each, with variances v^(1 - power) that have the mean 1."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    for power in (0.0, 0.25, 1.0):
        pca = PCA(4).fit(features)
        variances = pca.explained_variance_ ** (1 - power)
        expected = pca.transform(features) / pca.explained_variance_**0.5 * (variances / variances.mean()) ** 0.5
        expected *= (50 / 49) ** 0.5  # scikit-learn divides by N - 1
        whitened = whiten(torch.from_numpy(features), 4, power).numpy()
        assert np.allclose(np.abs(whitened), np.abs(expected), atol=1e-4)
        assert np.square(whitened).mean() == pytest.approx(1, rel=1e-5)
    assert whiten(torch.from_numpy(features), 512, 0.25).shape == (50, 6)


def test_whitening_by_nothing_keeps_the_angles_about_the_mean():
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    centred = torch.nn.functional.normalize(features - features.mean(0))
    whitened = torch.nn.functional.normalize(whiten(features, 5, 0.0))
    assert torch.allclose(whitened @ whitened.T, centred @ centred.T, atol=1e-5)


def test_an_all_grey_reconstruction_by_hand(synthetic_photos):
    """Of values in [0, 1], each c: the squared error of a photo is the mean of (c - grey)^2."""
    photos = load_photos(synthetic_photos).subset(np.arange(3))
    preprocessing = load_backbone("squeezenet1_1", "none", 32, whole_photo=True).preprocessing

    class Grey(torch.nn.Module):
        def forward(self, images):
            return torch.zeros_like(images), None  # the mean colour that the input is normalised by

    scores, picture = reconstruct(Grey(), DecodedPhotos(preprocessing, None), photos, torch.device("cpu"))
    images = [preprocessing.decode(photos.read(index)) for index in range(3)]
    pixels = [preprocessing.resize_crop(image) / 255 for image in images]
    errors = [np.square(each - preprocessing.mean).mean() for each in pixels]
    assert scores["mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert scores["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-5)
    assert picture.size == (3 * 32, 2 * 32)


def test_training_never_sees_the_labels(synthetic_photos, tmp_path, monkeypatch):
    """With the classes exchanged at random between gallery photos, the very same network comes out."""
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "frozen.pth")
    states = []
    load_photos, train = Run.load_photos, autoencoder.train

    def relabelled(self, *consumers):
        split = load_photos(self, *consumers)
        labels = np.random.default_rng(len(states)).permutation(split.train.labels)
        return dataclasses.replace(split, train=dataclasses.replace(split.train, labels=labels))

    class TrainedError(Exception):
        pass

    def train_and_stop(network, *arguments):
        train(network, *arguments)
        states.append(network.state_dict())
        raise TrainedError

    monkeypatch.setattr(Run, "load_photos", relabelled)
    monkeypatch.setattr(autoencoder, "train", train_and_stop)
    for turn in range(2):
        small = {"backbone": "squeezenet1_1", "image_size": 32, "view_size": 32, "width": 8, "epochs": 1}
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
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "frozen.pth")
    ended = run_script(
        "autoencoder.py", "--data", str(synthetic_photos), "--weights", "frozen.pth", *SMALL, "--batch-size", "9"
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "autoencoder.json").read_text())
    assert set(result["history"][0]) >= {"pixels", "features"}
    for part in ("pixels", "features"):
        assert result["history"][1][part] < result["history"][0][part]
    assert 0 < result["reconstruction"]["mse"] < 1
    assert result["baselines"].keys() == {"pretrained", "raw_pixels", "chance"}
    assert result["baselines"]["pretrained"].keys() == result["metrics"].keys()
    assert result["model"]["embedding_dim"] == 512
    assert result["model"]["weights"].startswith("frozen.pth, sha256 ")
    assert Image.open(tmp_path / "results" / "autoencoder.reconstructions.png").size == (12 * 32, 2 * 32)


def test_without_weights_the_pixels_alone_teach(run_script, synthetic_photos, tmp_path):
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), *SMALL)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "autoencoder.json").read_text())
    assert "features" not in result["history"][0]
    assert result["model"]["weights"] == "none (pixels alone)"
    assert "UNTRAINED WEIGHTS" in ended.stdout


def test_a_size_that_cannot_be_halved(run_script, synthetic_photos):
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), "--image-size", "100")
    assert ended.returncode == 2
    assert "image_size is 100: give a multiple of 16" in ended.stderr
