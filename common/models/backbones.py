"""Networks of torchvision as backbones: without their classifier, and with what they see of a photo."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from common.config import UserError, first_line
from common.models.layers import GeM
from common.models.preprocessing import Preprocessing
from common.models.timm_backbones import PREFIX, load_timm, load_timm_preprocessing
from common.models.weights import UNTRAINED, NoClassifierError, load_weights, weights_enum

SHARPNESS = 3.0  # of class probabilities: of standardized logits, an inverse temperature
# These pool inside forward(), not in a child module.
POOLING_IN_FORWARD = ("densenet", "mobilenet_v2", "mnasnet", "shufflenet")


class Backbone(NamedTuple):
    """What `load_backbone` returns."""

    network: nn.Module  # float [B, 3, S, S] -> float32 [B, C], in evaluation mode
    preprocessing: Preprocessing
    weights: str  # those actually loaded: "IMAGENET1K_V1", "squeezenet1_1.pth, sha256 0123...", "none (untrained)"
    feature_dim: int  # C


def load_backbone(
    name: str,
    weights: str,
    image_size: int = 0,
    pooling: float = 1.0,
    whole_photo: bool = False,
    untrained_if_missing: bool = False,
) -> Backbone:
    """A classification network of torchvision without its classifier: its last feature maps, pooled.

    Args:
        name: as torchvision calls it, such as "resnet18"; "timm/NAME" is one of timm's, which has its own pooling.
        weights: a name of torchvision ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none".
        image_size: pixels; 0 is what the weights were trained with.
        pooling: the exponent of `GeM` over the last feature maps, 1 to 6.
        whole_photo: see the whole photo, squeezed into a square; otherwise its centre square without the edges, as the
            transforms that come with the weights do.
        untrained_if_missing: where named weights are not available, use random ones instead of raising.

    Raises:
        UserError: no such network or weights, a file that doesn't fit, or photos too small for the network.
    """
    if name.startswith(PREFIX):
        network, preprocessing, loaded = load_timm(name, weights, image_size, whole_photo, untrained_if_missing)
        feature_dim = output_dim(network, preprocessing.crop, f"{name} can't take photos", "image_size")
        return Backbone(network, preprocessing, loaded, feature_dim)
    preprocessing = load_preprocessing(name, weights, image_size, whole_photo)
    if not 1 <= pooling <= 6:  # beyond, the powers exceed the range of float32
        raise UserError(f"pooling is {pooling}: give an exponent from 1 (the average) to 6")
    network, loaded = load_weights(name, weights, untrained_if_missing)
    network = _without_classifier(name, network, GeM(pooling)).eval()
    feature_dim = output_dim(network, preprocessing.crop, f"{name} can't take photos", "image_size")
    return Backbone(network, preprocessing, loaded, feature_dim)


class ClassProbabilities(nn.Module):
    """A classification network -> the square roots of its class probabilities, unit vectors Bx3xSxS -> float32 BxK.

    Networks differ in the range of their logits: they are standardized, then multiplied by `SHARPNESS`.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 BxK"""
        logits = self.classifier(images).float()
        logits = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=1e-6)
        return functional.softmax(SHARPNESS * logits, 1).sqrt()


def load_classifier(name: str, weights: str) -> nn.Module | None:
    """The whole pre-trained network, with its classifier, as `ClassProbabilities`.

    Arguments as for `load_backbone`, which has loaded the weights before. None for a file without such a classifier,
    and for a network of timm: many of those are trained without classes.
    """
    if name.startswith(PREFIX):
        return None
    try:
        return ClassProbabilities(load_weights(name, weights, untrained_if_missing=False, with_classifier=True)[0])
    except NoClassifierError as error:
        print(f"{error}: training goes on without the class probabilities that it would keep", flush=True)
        return None


def rebuild_backbone(config: dict, weights: str) -> Backbone:
    """The network that `load_backbone` returned to the run with these hyperparameters, with random weights.

    `weights`: what the run had loaded.
    """
    backbone = load_backbone(config["backbone"], "none", config["image_size"], config["pooling"], config["whole_photo"])
    if hasattr(backbone.network, "transform_input"):  # not in the state dict
        backbone.network.transform_input = weights != UNTRAINED  # type: ignore[assignment]
    return backbone


def load_preprocessing(name: str, weights: str, image_size: int, whole_photo: bool) -> Preprocessing:
    """What the network `name` sees of a photo; the arguments are those of `load_backbone`."""
    if name.startswith(PREFIX):
        return load_timm_preprocessing(name, image_size, whole_photo)
    choices = weights_enum(name)
    preset = (choices[weights] if weights in choices.__members__ else choices["DEFAULT"]).transforms()
    crop = image_size or preset.crop_size[0]
    resize = 0 if whole_photo else round(crop * preset.resize_size[0] / preset.crop_size[0])
    return Preprocessing(resize, crop, preset.interpolation, tuple(preset.mean), tuple(preset.std))


def output_dim(network: nn.Module, size: int, complaint: str, hyperparameter: str) -> int:
    """D of the output [B, D] for images of `size` x `size` pixels; raises `UserError` if `network`, in evaluation mode,
    can't take them.
    """
    try:
        with torch.inference_mode():
            device = next(network.parameters()).device
            return int(network(torch.zeros(1, 3, size, size, device=device)).shape[1])
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        message = f"{complaint} of {size} x {size} pixels ({first_line(error)}): change {hyperparameter}"
        raise UserError(message) from error


def require_view_size(backbone: Backbone, view_size: int) -> int:
    """The side in pixels of the views to train on: at most that of the photos, which 0 stands for.

    Raises `UserError` if the backbone can't take views of that size.
    """
    size = min(view_size or backbone.preprocessing.crop, backbone.preprocessing.crop)
    output_dim(backbone.network, size, "the network can't take views", "view_size")
    return size


def _without_classifier(name: str, network: nn.Module, pool: nn.Module) -> nn.Module:
    """The network with `pool` instead of its classifier, the last child of every network of torchvision, and of the
    pooling before it. A vision transformer, which has no maps, gives its class token.
    """
    *trunk, (classifier, _) = network.named_children()
    if name.startswith(POOLING_IN_FORWARD):
        return nn.Sequential(*(child for _, child in trunk), nn.ReLU(), pool)  # the ReLU is DenseNet's
    setattr(network, classifier, pool)
    if hasattr(network, "avgpool"):
        network.avgpool = pool
    if getattr(network, "aux_logits", False):  # auxiliary classifiers of GoogLeNet and Inception, for training only
        network.aux_logits = False  # type: ignore[assignment]
        for auxiliary in {"aux1", "aux2", "AuxLogits"} & dict(trunk).keys():
            setattr(network, auxiliary, None)
    return network
