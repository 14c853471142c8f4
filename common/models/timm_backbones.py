"""Networks of timm as backbones: "timm/NAME", an extra beyond torchvision's."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.transforms import InterpolationMode

from common.config import UserError, first_line
from common.extras import require
from common.models.preprocessing import Preprocessing
from common.models.weights import UNTRAINED

PREFIX = "timm/"


def load_timm(
    name: str, weights: str, image_size: int, whole_photo: bool, untrained_if_missing: bool
) -> tuple[nn.Module, Preprocessing, str]:
    """A network of timm without its classifier, with timm's own pooling and data config; and the weights loaded.

    `name`: "timm/NAME", or "timm/local-dir:FOLDER" for a folder with config.json and weights, as timm saves them.
    `weights`: "DEFAULT" for those that timm names, fetched from the hub; the path of a state dict; or "none". Other
    arguments and errors are those of `load_backbone`.
    """
    if weights == "none":
        network, description = _create(name, image_size, pretrained=False), UNTRAINED
    elif weights == "DEFAULT":
        network, description = _default(name, image_size, untrained_if_missing)
    elif Path(weights).is_file():
        network, description = _from_file(name, Path(weights), image_size)
    else:
        raise UserError(f'{weights} is not a file: for {name} give the path of a state dict, "DEFAULT" or "none"')
    return network, _preprocessing(network, image_size, whole_photo), description


def load_timm_preprocessing(name: str, image_size: int, whole_photo: bool) -> Preprocessing:
    """What a network of timm sees of a photo; arguments as for `load_timm`."""
    return _preprocessing(_create(name, image_size, pretrained=False), image_size, whole_photo)


def _create(name: str, image_size: int, **options: Any) -> nn.Module:
    (timm,) = require("timm")
    model = name.removeprefix(PREFIX)
    if ":" not in model and not timm.is_model(model.split(".")[0]):
        near = ", ".join(timm.list_models(f"{model.split('_')[0]}*")[:5]) or "resnet18, convnext_tiny, vit_base_patch14"
        raise UserError(f"timm has no network {model!r}: choose one of timm.list_models(), such as {near}")
    sized = {"img_size": image_size} if image_size else {}
    try:
        try:
            network: nn.Module = timm.create_model(model, num_classes=0, **options, **sized)
        except TypeError:  # a network for images of any size has no such argument
            network = timm.create_model(model, num_classes=0, **options)
    except FileNotFoundError as error:
        if not model.startswith("local-dir:"):  # what the hub's client raises
            raise
        raise UserError(f"{model} can't be read ({first_line(error)}): name a folder with config.json") from error
    return network.eval()


def _default(name: str, image_size: int, untrained_if_missing: bool) -> tuple[nn.Module, str]:
    try:
        network = _create(name, image_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        if untrained_if_missing:
            print(f"UNTRAINED WEIGHTS: those of {name} can't be loaded ({first_line(error)}).\n", flush=True)
            return _create(name, image_size, pretrained=False), UNTRAINED
        raise UserError(
            f"the weights of {name} can't be loaded ({first_line(error)}): fetch them elsewhere and name the state "
            "dict with --weights, or the folder with --backbone timm/local-dir:FOLDER"
        ) from error
    config = network.pretrained_cfg
    tag = config.get("tag") or config.get("hf_hub_id") or Path(name).name  # type: ignore[union-attr, operator]
    return network, f"timm {tag}"


def _from_file(name: str, path: Path, image_size: int) -> tuple[nn.Module, str]:
    source = {"file": str(path), "custom_load": False}
    try:
        network = _create(name, image_size, pretrained=True, pretrained_cfg_overlay=source)
    except UserError:
        raise
    except Exception as error:  # each file format fails in its own way
        raise UserError(f"{path} does not fit {name} ({first_line(error)}): give a state dict with its keys") from error
    return network, f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _preprocessing(network: nn.Module, image_size: int, whole_photo: bool) -> Preprocessing:
    (data,) = require("timm.data")
    config = data.resolve_model_data_config(network)
    crop = image_size or config["input_size"][-1]
    resize = 0 if whole_photo else round(crop / config["crop_pct"])
    interpolation = InterpolationMode[config["interpolation"].upper()]
    return Preprocessing(resize, crop, interpolation, tuple(config["mean"]), tuple(config["std"]))
