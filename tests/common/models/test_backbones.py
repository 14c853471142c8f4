import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from common.config import UserError
from common.models.backbones import (
    SHARPNESS,
    ClassProbabilities,
    load_backbone,
    load_classifier,
    load_preprocessing,
    output_dim,
    rebuild_backbone,
)
from common.models.weights import UNTRAINED

FAMILIES = {  # a small one of each, and the channels of its last feature maps
    "alexnet": 256,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "regnet_y_400mf": 440,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "vgg11": 512,
    "vit_b_32": 768,
}
LAST_MAPS = {"resnet18": "layer4", "mobilenet_v2": "features", "alexnet": "features", "shufflenet_v2_x0_5": "conv5"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_pooled_features(name):
    network, preprocessing, weights, feature_dim = load_backbone(name, "none")
    with torch.inference_mode():
        features = network(torch.rand(2, 3, preprocessing.crop, preprocessing.crop))
    assert features.shape == (2, FAMILIES[name])
    assert features.dtype == torch.float32
    assert weights == "none (untrained)"
    assert feature_dim == FAMILIES[name]
    assert not network.training


@pytest.mark.parametrize("name", LAST_MAPS)
def test_features_are_the_pooled_last_maps(name):
    whole = models.get_model(name, weights=None).eval()
    maps = {}
    whole.get_submodule(LAST_MAPS[name]).register_forward_hook(lambda *call: maps.update(last=call[2]))
    images = torch.rand(2, 3, 96, 96)
    for p in (1.0, 3.0):
        network = load_backbone(name, "none", pooling=p).network
        trained = dict(zip(network.state_dict(), whole.state_dict().values(), strict=False))  # the head comes last
        network.load_state_dict(trained)
        with torch.inference_mode():
            whole(images)
            expected = maps["last"].double().pow(p).mean((2, 3)).pow(1 / p).float()
            assert torch.allclose(network(images), expected, atol=1e-4)


def test_densenet_is_pooled_after_its_last_relu():
    whole = models.densenet121(weights=None).eval()
    network = load_backbone("densenet121", "none").network
    network.load_state_dict(dict(zip(network.state_dict(), whole.state_dict().values(), strict=False)))
    whole.classifier = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(network(images), whole(images), atol=1e-5)


@pytest.mark.parametrize("p", [0.5, float("nan"), 7])
def test_exponents_out_of_range_are_refused(p):
    with pytest.raises(UserError, match="from 1"):
        load_backbone("squeezenet1_1", "none", pooling=p)


def test_image_size_keeps_the_fraction_that_is_cropped():
    preprocessing = load_backbone("squeezenet1_1", "none", image_size=112).preprocessing
    assert (preprocessing.resize, preprocessing.crop) == (128, 112)


def test_the_whole_photo_is_seen_if_wanted():
    image = Image.new("RGB", (300, 300), "white")
    image.paste("black", (0, 0, 15, 300))  # an edge that the weights' own transforms cut off
    whole = load_backbone("squeezenet1_1", "none", whole_photo=True).preprocessing
    assert (whole.resize_crop(image)[:, 5] == 0).all()
    assert (load_backbone("squeezenet1_1", "none").preprocessing.resize_crop(image) == 255).all()
    assert load_preprocessing("squeezenet1_1", "none", 0, whole_photo=True) == whole


def test_photos_too_small_for_the_network():
    with pytest.raises(UserError, match="vgg11 can't take photos of 8 x 8 pixels .*: change image_size"):
        load_backbone("vgg11", "none", image_size=8)
    with pytest.raises(UserError, match="change image_size"):
        load_backbone("vit_b_32", "none", image_size=100)


def test_output_dim_names_what_to_change():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 7, 5), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert output_dim(network, 5, "the network can't take views", "view_size") == 7
    with pytest.raises(UserError, match=r"the network can't take views of 4 x 4 pixels \(.*\): change view_size"):
        output_dim(network, 4, "the network can't take views", "view_size")


def test_a_backbone_is_rebuilt_from_the_hyperparameters_of_its_run():
    config = {"backbone": "squeezenet1_1", "image_size": 64, "pooling": 3.0, "whole_photo": True}
    torch.manual_seed(0)
    backbone = load_backbone("squeezenet1_1", "none", 64, 3.0, whole_photo=True)
    rebuilt = rebuild_backbone(config, backbone.weights)
    rebuilt.network.load_state_dict(backbone.network.state_dict())
    assert rebuilt.preprocessing == backbone.preprocessing
    assert rebuilt.feature_dim == 512
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 64, 64), np.float32))
    with torch.inference_mode():
        assert torch.equal(rebuilt.network(images), backbone.network(images))


@pytest.mark.parametrize(("weights", "transforms"), [("IMAGENET1K_V1", True), (UNTRAINED, False)])
def test_a_rebuilt_googlenet_transforms_its_input_as_the_run_did(weights, transforms):
    config = {"backbone": "googlenet", "image_size": 64, "pooling": 1.0, "whole_photo": True}
    assert rebuild_backbone(config, weights).network.transform_input is transforms


def test_class_probabilities_by_hand():
    logits = torch.tensor([[1.0, 2, 3], [10, 30, 20]])
    roots = ClassProbabilities(torch.nn.Identity())(logits)
    powers = torch.tensor([[-1.0, 0, 1], [-1, 1, 0]]).mul(SHARPNESS).exp()  # standardized, whatever their range
    assert torch.allclose(roots.square(), powers / powers.sum(1, keepdim=True))
    assert torch.allclose(roots.norm(dim=1), torch.ones(2))


def test_the_classifier_is_the_whole_network(tmp_path):
    whole = models.squeezenet1_1(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "mine.pth")
    classifier = load_classifier("squeezenet1_1", str(tmp_path / "mine.pth")).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(classifier(images), ClassProbabilities(whole)(images))
    assert load_classifier("timm/resnet18", "none") is None
