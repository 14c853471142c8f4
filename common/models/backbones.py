"""Pre-trained networks of torchvision, cut down to what an embedding needs."""

import dataclasses
import hashlib
import pickle
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms import InterpolationMode

from common.config import UserError
from common.data.photos import decode_photo

TIMEOUT = 15.0  # seconds without an answer from the server of the weights


AVERAGE_INSIDE = ("densenet", "mobilenet_v2", "mnasnet", "shufflenet")  # they pool within forward(), not in a child


@dataclass(frozen=True)
class Preprocessing:
    """What the network is to see. Sizes in pixels; `mean` and `std` of RGB values in [0, 1]."""

    resize: int  # of the shorter side
    crop: int  # side of the square cut from the middle
    interpolation: InterpolationMode
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def decode(self, data: bytes, share: float = 1.0) -> Image.Image:
        """The RGB image in a photo's file, a JPEG at no more than about twice the size that `square` cuts from it:
        several times faster for a camera's photos. Of its sides, a `share` is to be used. Raises
        `UnreadablePhotoError`."""
        return decode_photo(data, at_least=round(2 * self.resize / share))

    def square(self, image: Image.Image) -> np.ndarray:
        """uint8 [crop, crop, 3] from an RGB image: torchvision's Resize and CenterCrop in one step, without computing
        what the crop throws away."""
        width, height, shorter = image.width, image.height, min(image.size)
        wide, high = int(self.resize * width / shorter), int(self.resize * height / shorter)
        left, top = round((wide - self.crop) / 2), round((high - self.crop) / 2)
        across, down = width / wide, height / high
        box = (left * across, top * down, (left + self.crop) * across, (top + self.crop) * down)
        return np.array(image.resize((self.crop, self.crop), Image.Resampling[self.interpolation.name], box))

    def plain(self) -> dict:
        """Its fields as plain values, for a file; `Preprocessing.from_plain` reads them back."""
        return {**dataclasses.asdict(self), "interpolation": self.interpolation.name}

    @classmethod
    def from_plain(cls, fields: dict) -> "Preprocessing":
        """What `plain` was made of."""
        tuples = {name: tuple(fields[name]) for name in ("mean", "std")}
        return cls(**{**fields, **tuples, "interpolation": InterpolationMode[fields["interpolation"]]})

    def normalise(self, squares: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, crop, crop] from RGB values in [0, 255], [B, crop, crop, 3]; laid out as it comes."""
        mean, std = (torch.tensor(each, device=squares.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return torch.addcmul(-mean / std, squares.permute(0, 3, 1, 2), 1 / (255 * std))


class GeneralisedMean(nn.Module):
    """[B, C, H, W] -> float32 [B, C], (mean of x^p)^(1/p); what is pooled already stays (Radenovic et al. 2018,
    Fine-tuning CNN Image Retrieval with No Human Annotation). p = 1 is the average; a larger p gives more weight to
    where a feature is strongest. Negative values keep their sign. Computed in float32 also where the network computes
    in bfloat16, whose 8 bits would make different photos tie."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        """`p`, which no parameter tells."""
        return f"p={self.p}"

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # noqa: D102
        features = features.float()
        if features.ndim != 4:
            return features
        if self.p == 1:
            return features.mean((2, 3))
        moment = (features.sign() * features.abs().pow(self.p)).mean((2, 3))
        return moment.sign() * moment.abs().clamp(min=1e-12).pow(1 / self.p)  # the root's slope at 0 is infinite


class InFloat32(nn.Sequential):
    """Layers for [B, C], computed in float32 also where those before are computed in 16 bits, whose few digits would
    make different photos tie."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # noqa: D102
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def load_backbone(
    name: str,
    weights: str,
    image_size: int = 0,
    pooling: float = 1.0,
    whole_photo: bool = False,
    untrained_if_missing: bool = False,
) -> tuple[nn.Module, Preprocessing, str]:
    """A classification network of torchvision without its head: it gives pooled last features, float32 [B, C].

    Args:
        name: as torchvision calls it, such as "resnet18".
        weights: a name of torchvision ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none".
        image_size: pixels; 0 is what the weights were trained with.
        pooling: the exponent of `GeneralisedMean` over the last feature maps, 1 to 6.
        whole_photo: resize the photo to what the network takes; else to a little more, and cut the edges off, as the
            transforms that come with the weights do. Either way the middle square of a photo that isn't square.
        untrained_if_missing: where named weights can't be had, go on with random ones instead of raising.

    Returns:
        The network in evaluation mode, its preprocessing, and what the weights are in truth: "IMAGENET1K_V1",
        "squeezenet1_1.pth, sha256 0123456789ab", "none (untrained)".

    Raises:
        UserError: no such network or weights, a file that doesn't fit, or photos too small for the network.
    """
    choices = _choices(name)
    if not 1 <= pooling <= 6:  # beyond, the powers leave the range of float32
        raise UserError(f"pooling is {pooling}: the exponent of the mean is from 1 (the average) to 6")
    if weights == "none":
        network, used = _untrained(name), "none (untrained)"
    elif weights in choices.__members__:
        network, used = _named(name, choices[weights], untrained_if_missing)
    elif Path(weights).is_file():
        network, used = _from_file(name, Path(weights))
    else:
        raise UserError(
            f'{weights} is neither a file nor weights of {name}: give the path of a state dict, "none", or one of '
            f"{', '.join(choices.__members__)}"
        )
    preprocessing = preprocessing_of(name, weights, image_size, whole_photo)
    network = _without_head(name, network, GeneralisedMean(pooling)).eval()
    require_size(network, preprocessing.crop, f"{name} can't take photos", "image_size")
    return network, preprocessing, used


def rebuild_backbone(stored: dict) -> nn.Module:
    """The network that `load_backbone` gave to the run that left the checkpoint `stored`, with random weights."""
    config = stored["config"]
    wanted = (config["backbone"], "none", config["image_size"], config["pooling"], config["whole_photo"])
    network, _, _ = load_backbone(*wanted)
    if hasattr(network, "transform_input"):  # no state dict tells
        network.transform_input = stored["model"]["weights"] != "none (untrained)"
    return network


def preprocessing_of(name: str, weights: str, image_size: int, whole_photo: bool) -> Preprocessing:
    """What the network `name` is to see; the arguments are those of `load_backbone`."""
    choices = _choices(name)
    preset = (choices[weights] if weights in choices.__members__ else choices.DEFAULT).transforms()
    crop = image_size or preset.crop_size[0]
    resize = crop if whole_photo else round(crop * preset.resize_size[0] / preset.crop_size[0])
    return Preprocessing(resize, crop, preset.interpolation, tuple(preset.mean), tuple(preset.std))


def _choices(name: str) -> type[models.WeightsEnum]:
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification network {name!r}: choose one of {', '.join(known)}")
    return models.get_model_weights(name)


def require_size(network: nn.Module, size: int, complaint: str, hyperparameter: str) -> None:
    """Raises `UserError` if `network`, in evaluation mode, can't take images of `size` x `size` pixels."""
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        told = f"{complaint} of {size} x {size} pixels ({_brief(error)}): change {hyperparameter}"
        raise UserError(told) from error


def network_digest(network: nn.Module) -> str:
    """SHA-256 of a network's layers, parameters and buffers: networks with the same digest embed alike."""
    digest = hashlib.sha256(repr(network).encode())
    if any(getattr(module, "transform_input", False) for module in network.modules()):  # repr doesn't tell
        digest.update(b"transform_input")
    for key, tensor in network.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_head(name: str, network: nn.Module, pool: nn.Module) -> nn.Module:
    """The network with `pool` in place of its classifier, the last child of every network of torchvision, and of the
    pooling before it. A vision transformer, which has no maps, gives its class token."""
    *trunk, (head, _) = network.named_children()
    if name.startswith(AVERAGE_INSIDE):
        return nn.Sequential(*(child for _, child in trunk), nn.ReLU(), pool)  # the ReLU is DenseNet's
    setattr(network, head, pool)
    if hasattr(network, "avgpool"):
        network.avgpool = pool
    if getattr(network, "aux_logits", False):  # the side classifiers of GoogLeNet and Inception, for training only
        network.aux_logits = False
        for side in {"aux1", "aux2", "AuxLogits"} & dict(trunk).keys():
            setattr(network, side, None)
    return network


def _untrained(name: str) -> nn.Module:
    slow_init = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **slow_init)


def _named(name: str, choice: models.WeightsEnum, untrained_if_missing: bool) -> tuple[nn.Module, str]:
    file = choice.url.rsplit("/", 1)[-1]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        with _timeout(TIMEOUT):
            return models.get_model(name, weights=choice), choice.name
    except (OSError, HTTPException, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        if (folder / file).exists() and not isinstance(error, OSError):
            raise UserError(
                f"{folder / file} is damaged ({_brief(error)}): delete it, and it is downloaded anew"
            ) from error
        reason = getattr(error, "reason", error)  # a download that breaks off has the wrong hash: RuntimeError
        if untrained_if_missing:
            print(
                f"UNTRAINED WEIGHTS: {choice.url} can't be reached ({reason}). {name} starts from random weights.\n",
                flush=True,
            )
            return _untrained(name), "none (untrained)"
        raise UserError(
            f"the weights {choice.name} of {name} can't be downloaded ({reason}): fetch {choice.url} elsewhere and put "
            f"it as {file} into {folder}, or name a state dict with --weights"
        ) from error


def _from_file(name: str, path: Path) -> tuple[nn.Module, str]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file fails in as many ways as there are formats
        raise UserError(f"{path} is not a state dict that torch can load safely ({_brief(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (names and tensors): save model.state_dict()")
    if name.startswith("densenet"):  # torchvision's published files have the names of an older version
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    network = _untrained(name)
    if hasattr(network, "transform_input"):  # as torchvision does for these when it loads pre-trained weights
        network.transform_input = True
    expected = network.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}  # older files have none
    problems = {
        "lacks": sorted(expected.keys() - state.keys() - counters),
        "has foreign": sorted(state.keys() - expected.keys()),
        "has another shape for": sorted(
            key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{what} {_some(keys)}" for what, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit {name}: it {told}. Name the network that it was saved from")
    network.load_state_dict(state, strict=False)
    return network, f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Gives up on a silent server: torchvision's download sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
