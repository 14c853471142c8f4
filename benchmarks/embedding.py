"""How fast are photos on disk embedded?  python -m benchmarks.embedding --data FOLDER

Ours, in the device's fast precision ("ours"), in float32, and on a CPU in OpenVINO in float32 and in 8 bits, against
what a user would pick instead, on the same photos, interleaved in one run, for each network, and for the first one with
photos of 12 megapixels too ("camera"; made from the others, larger and with noise):

- plain_loop: a PyTorch DataLoader with a worker per core, torchvision's own transforms, float32, batches of 64
- one_at_a_time: the same without a loader, photo by photo, as small "image to vector" packages do
- onnx_runtime: the same DataLoader, and the network in ONNX Runtime, float32
- limit: decoding alone and the network alone, each with all cores, one after the other; on a GPU the slower of the two
- decode_alone: decoding alone, at the fraction of the size that the network needs

All contenders are warm: networks are loaded and workers have started. A ratio above 1 means that ours is faster.
"fastest_rival" is the rival whose median is the lowest.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models

from benchmarks import measure
from common.config import Range, run_script
from common.data.photos import Photos, load_photos
from common.data.sources import locate_photos
from common.device import choose_device, choose_precision, limit_torch_threads
from common.extras import require
from common.models.backbones import load_backbone
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.parallel import parallel_map

OURS = {  # precision and inference of an `Embedder`
    "ours": ("auto", "torch"),
    "ours_float32": ("float32", "torch"),
    "ours_openvino": ("auto", "openvino"),
    "ours_int8": ("auto", "int8"),
}
CAMERA = (4000, 3000)  # pixels
SLOWER = {"resnet18": 2, "resnet50": 4}  # the number of photos is divided by this for slower networks
BATCH = 64  # photos, of the plain loop


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --photos 500"""

    data: str = "auto"  # a folder of photos, "synthetic" (generated here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    photos: Annotated[int, Range(1, 1e6)] = 512  # embedded in a round by each contender with the fastest network
    repeats: Annotated[int, Range(1, 1000)] = 3  # of each contender, after one to warm up
    networks: str = "squeezenet1_1 resnet18 resnet50"  # any classification networks of torchvision
    camera_photos: Annotated[int, Range(0, 1e6)] = 96  # of 12 megapixels, embedded in a round with the first network


class PlainDataset(Dataset):
    """Photos by path, read as in a tutorial."""

    def __init__(self, paths: list[Path], transform: object):
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def unit(features: torch.Tensor) -> np.ndarray:
    """float32 [N, D], rows of length 1."""
    return torch.nn.functional.normalize(features).numpy()


def embed_in_plain_loop(network: torch.nn.Module, loader: DataLoader, device: torch.device) -> np.ndarray:
    """float32 [N, D]: the plain loop."""
    with torch.no_grad():
        return unit(torch.cat([network(batch.to(device)).cpu() for batch in loader]))


def embed_one_at_a_time(network: torch.nn.Module, dataset: PlainDataset, device: torch.device) -> np.ndarray:
    """float32 [N, D]: no batches, no workers."""
    with torch.no_grad():
        return unit(torch.cat([network(dataset[index][None].to(device)).cpu() for index in range(len(dataset))]))


@contextmanager
def onnx_session(network: torch.nn.Module, size: int) -> Iterator[object]:
    """`network`, for float32 [B, 3, size, size], in ONNX Runtime."""
    runtime, _, _ = require("onnxruntime", "onnx", "onnxscript", file="requirements-dev.txt")
    photo = torch.zeros(2, 3, size, size)
    with TemporaryDirectory() as folder:
        file = f"{folder}/network.onnx"
        batch = torch.export.Dim("batch", min=1, max=BATCH)
        torch.onnx.export(
            network, (photo,), file, input_names=["photos"], dynamic_shapes=({0: batch},), dynamo=True, verbose=False
        )
        providers = [name for name in runtime.get_available_providers() if name != "AzureExecutionProvider"]  # remote
        yield runtime.InferenceSession(file, providers=providers)


def embed_with_onnx(session: object, loader: DataLoader) -> np.ndarray:
    """float32 [N, D]: the plain loop with another engine."""
    return unit(torch.cat([torch.from_numpy(session.run(None, {"photos": batch.numpy()})[0]) for batch in loader]))


def decode_alone(embedder: Embedder, photos: Photos) -> list[np.ndarray]:
    """uint8 [S, S, 3] of each photo, on all cores."""
    load = DecodedPhotos(embedder.preprocessing, None).load
    return [image for (image,) in parallel_map(lambda index: load(photos, np.array([index])), range(len(photos)))]


def network_alone(embedder: Embedder, images: list[np.ndarray]) -> np.ndarray:
    """float32 [N, D] of decoded photos, on all cores."""
    starts = range(0, len(images), embedder.batch_size)
    batches = [np.stack(images[start : start + embedder.batch_size]) for start in starts]
    with limit_torch_threads() as threads:
        return np.concatenate(list(parallel_map(embedder.embed_batch, batches, prefetch=threads)))


def ours(embedder: Embedder, photos: Photos) -> np.ndarray:
    """float32 [N, D]: as every script of this repository embeds photos that are not in its cache."""
    load = partial(DecodedPhotos(embedder.preprocessing, None).load, photos)
    batches = embedder.stream(load, np.arange(len(photos)))
    return np.concatenate([embeddings for _, embeddings in batches])


def camera_photos(photos: Photos, folder: Path) -> Photos:
    """The photos as JPEGs of 12 megapixels in `folder`, enlarged, with the noise of a sensor."""

    def enlarge(index: int) -> None:
        with Image.open(photos.path(index)) as image:
            large = np.asarray(image.convert("RGB").resize(CAMERA, Image.Resampling.BICUBIC), np.int16)
        noise = np.random.default_rng(index).integers(-8, 9, large.shape, np.int16)
        Image.fromarray((large + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg", quality=90)

    for _ in parallel_map(enlarge, range(len(photos)), prefetch=2):
        pass
    return measure.sample(load_photos(folder, labelled=False), len(photos))


def compare(name: str, photos: Photos, config: Config, label: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of each contender in each round, and the lowest cosine between our embeddings and the plain loop's."""
    device = choose_device(config.device)
    torch.manual_seed(0)
    network, preprocessing, *_ = load_backbone(name, "none")
    plain = load_backbone(name, "none").network.to(device)
    plain.load_state_dict(network.state_dict())
    kinds = OURS if device.type == "cpu" else {"ours": OURS["ours"], "ours_float32": OURS["ours_float32"]}
    embedders = {
        kind: Embedder(network, preprocessing, device, precision=precision, inference=inference, folder=photos.folder)
        for kind, (precision, inference) in kinds.items()
    }
    embedder = embedders["ours"]
    transform = models.get_model_weights(name).DEFAULT.transforms()
    dataset = PlainDataset([photos.path(index) for index in range(len(photos))], transform)
    loader = DataLoader(dataset, BATCH, num_workers=torch.get_num_threads(), persistent_workers=True)
    images = decode_alone(embedder, photos)
    with onnx_session(plain.cpu(), preprocessing.crop) as session:
        plain.to(device)
        contenders = {
            **{kind: partial(ours, each, photos) for kind, each in embedders.items()},
            "plain_loop": lambda: embed_in_plain_loop(plain, loader, device),
            "one_at_a_time": lambda: embed_one_at_a_time(plain, dataset, device),
            "onnx_runtime": lambda: embed_with_onnx(session, loader),
            "decode_alone": lambda: decode_alone(embedder, photos),
            "network_alone": lambda: network_alone(embedder, images),
        }
        cosine = float((contenders["ours"]() * contenders["plain_loop"]()).sum(axis=1).min())
        print(f"ONNX Runtime runs {name} on {session.get_providers()[0]}")
        return measure.interleaved(contenders, config.repeats, label), cosine


def ratios_of(label: str, seconds: dict[str, list[float]], on_cpu: bool) -> dict[str, measure.Ratio]:
    """Ours against each rival and the limit, and the other kinds of ours against the fastest rival."""
    alone = zip(seconds["decode_alone"], seconds["network_alone"], strict=True)
    limit = [decode + network if on_cpu else max(decode, network) for decode, network in alone]
    rivals = {name: each for name, each in seconds.items() if not name.endswith("_alone") and name not in OURS}
    found = measure.ratios({"ours": seconds["ours"], **rivals, "limit": limit}, f"_{label}")
    fastest = min(rivals.values(), key=statistics.median)
    for kind in filter(seconds.__contains__, OURS):
        found |= measure.ratios({"ours": seconds[kind], "fastest_rival": fastest}, f"_{label}_{kind}")
    found |= measure.ratios({"ours": seconds["ours"], "decode_alone": seconds["decode_alone"]}, f"_{label}")
    return found


def main(config: Config) -> None:
    """Measures all networks; writes `benchmark_embedding.json`."""
    device = choose_device(config.device)
    everything = load_photos(locate_photos(config.data))
    ratios, seconds, cosines, counts = {}, {}, {}, {}
    for name in config.networks.split():
        photos = measure.sample(everything, max(1, config.photos // SLOWER.get(name, 1)))
        counts[name] = len(photos)
        seconds[name], cosines[name] = compare(name, photos, config, name)
        ratios |= ratios_of(name, seconds[name], device.type == "cpu")
    with TemporaryDirectory() as folder:
        if config.camera_photos:
            photos = camera_photos(measure.sample(everything, config.camera_photos), Path(folder))
            counts["camera"] = len(photos)
            seconds["camera"], cosines["camera"] = compare(config.networks.split()[0], photos, config, "camera")
            ratios |= ratios_of("camera", seconds["camera"], device.type == "cpu")
    measure.write(
        "embedding",
        config,
        {"name": everything.name, "photos": counts},
        ratios,
        {"seconds": seconds, "lowest_cosine_to_plain_loop": cosines},
        device,
        choose_precision(device),
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
