"""The approach without labels: what it learns from, what it reconstructs, and the script as a user runs it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchvision import models

import autoencoder
from autoencoder import Autoencoder, Config
from common.models.backbones import load_backbone
from common.models.heads import Task
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
DIMS = ("--kind-dim", "10", "--detail-dim", "30", "--appearance-dim", "20", "--decoder-width", "8")


def network_of(**changed):
    """Of an untrained squeezenet1_1 at 64 pixels: codes of 5 + 8 + 12 dimensions, reconstructions of 32 x 32."""
    torch.manual_seed(0)
    dims = {"kind_dim": 5, "detail_dim": 8, "appearance_dim": 12, "appearance_weight": 0.5}
    config = Config(**dims | {"output_size": 32, "decoder_width": 4} | changed)
    return Autoencoder(load_backbone("squeezenet1_1", "none", 64), config, 9).eval()


@pytest.mark.parametrize("options", [{}, {"view_weight": 0.0}, {"view_weight": 0.0, "feature_weight": 0.0}])
def test_the_decoder_sees_the_code_alone(options):
    network = network_of(**options)
    photos = torch.rand(2, 3, 64, 64)
    views = torch.cat([photos, torch.rand(2, 3, 64, 64)])
    reconstructions, kinds, details = network(views, photos)
    codes = network.encoder(photos)
    assert codes.shape == (2, 25)
    assert kinds.shape == (4, 5)
    assert details.shape == (4, 8)
    assert torch.allclose(details[:2], functional.normalize(codes[:, 5:13]), atol=1e-6)
    assert torch.allclose(reconstructions, network.decoder(codes), atol=1e-6)
    assert reconstructions.shape == (2, 3, 32, 32)
    other, _, _ = network(views.flip(0), photos)  # the appearance is that of the photos, the rest of the first views
    mixed = torch.cat([network.encoder(views.flip(0))[:2, :13], codes[:, 13:]], 1)
    assert torch.allclose(other, network.decoder(mixed), atol=1e-6)


@pytest.mark.parametrize(("view_weight", "feature_weight", "is_trained"), [(0, 1, False), (1, 0, False), (0, 0, True)])
def test_the_heads_learn_from_pixels_only_if_there_is_nothing_else(view_weight, feature_weight, is_trained):
    network = network_of(view_weight=view_weight, feature_weight=feature_weight)
    network.decoder.refine[-2].weight.data.normal_()  # at first nothing is refined
    photos = torch.rand(2, 3, 64, 64)
    network(photos, photos)[0].sum().backward()
    gradient = network.encoder.detail_head.linear.weight.grad
    assert (gradient is not None and bool(gradient.any())) == is_trained


def test_without_details_a_reconstruction_is_that_of_the_principal_components():
    network = network_of()
    torch.manual_seed(1)
    photos = torch.rand(40, 3, 32, 32)
    features, kinds = (functional.normalize(torch.rand(20, dim)) for dim in (512, 9))
    kept = network.init_heads(Task(False, features, photos, kinds), 0.5)
    assert kept.shape == (20, 13)
    network.decoder.refine = torch.nn.Module()
    network.decoder.refine.forward = lambda maps: 0
    appearance = 0.5 * network.encoder.appearance_head(photos)
    flat = photos.flatten(1)
    mean, directions = principal_components(flat, 12, 0)
    unit = functional.normalize(directions)
    expected = mean + (flat - mean) @ unit.T @ unit
    codes = torch.cat([torch.zeros(40, 13), appearance], 1)
    assert torch.allclose(network.decoder(codes).flatten(1), expected, atol=1e-4)


def test_appearance_is_not_trained():
    trained = {name for name, each in network_of().named_parameters() if each.requires_grad}
    assert {"decoder.context.0.weight", "encoder.detail_head.linear.weight"} < trained
    assert not any(name.startswith(("decoder.pixels", "encoder.appearance_head")) for name in trained)


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
    assert set(result["history"][0]) >= {"pixels", "structure", "features", "view_pairs"}
    assert result["history"][1]["loss"] < result["history"][0]["loss"]
    reconstruction = result["reconstruction"]
    assert reconstruction["dimensions"] == 60
    for prefix in ("", "pca_"):
        assert 0 < reconstruction[f"{prefix}mse"] < 1
        assert 0 < reconstruction[f"{prefix}psnr"] < 60
    assert result["baselines"].keys() == {"pretrained", "raw_pixels", "chance"}
    assert result["baselines"]["pretrained"].keys() == result["metrics"].keys()
    assert result["model"]["embedding_dim"] == 60
    assert result["model"]["weights"].startswith("frozen.pth, sha256 ")
    with Image.open(tmp_path / "results" / "autoencoder.reconstructions.png") as picture:
        assert picture.width > 10 * 128
    found = run_script("search.py", str(next(synthetic_photos.rglob("*.jpg"))))
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("   5  ") == 1


@pytest.mark.parametrize("alone", [("--feature-weight", "0", "--weights", "nowhere.pth"), ("--weights", "none")])
def test_pixels_alone(run_script, synthetic_photos, tmp_path, alone):
    """No weights are loaded, even if some are named; with classes or without them."""
    alone = ("--view-weight", "0", *alone, "--no-labelled")
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), *SMALL, *DIMS, *alone)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "autoencoder.json").read_text())
    assert not {"features", "view_pairs"} & result["history"][0].keys()
    assert result["model"]["weights"] == "none (untrained)"
    assert all(name.startswith("instance_") for name in result["metrics"])


def test_a_size_that_the_decoder_cannot_make(run_script, synthetic_photos):
    ended = run_script("autoencoder.py", "--data", str(synthetic_photos), "--output-size", "100")
    assert ended.returncode == 2
    assert "output_size is 100: give a multiple of 8" in ended.stderr
