"""How fast are photos on disk embedded?  python -m benchmarks.embedding --data FOLDER

Ours, in the device's fast precision, against what a user would pick instead, on the same photos, interleaved in one
run, for each network:

- plain_loop: a PyTorch DataLoader with a worker per core, torchvision's own transforms, float32, batches of 64
- one_at_a_time: the same without a loader, photo by photo, as small "image to vector" packages do
- onnx_runtime: the same DataLoader, and the network in ONNX Runtime, float32
- limit: decoding alone and the network alone, each with all cores, one after the other; on a GPU the slower of the two

All contenders are warm: networks are loaded and workers have started. A ratio above 1 means that ours is faster.
"""

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


def compare(name: str, photos: Photos, config: Config) -> tuple[dict[str, list[float]], float]:
    """Seconds of each contender in each round, and the lowest cosine between our embeddings and the plain loop's."""
    device = choose_device(config.device)
    torch.manual_seed(0)
    network, preprocessing, *_ = load_backbone(name, "none")
    plain = load_backbone(name, "none").network.to(device)
    plain.load_state_dict(network.state_dict())
    embedder = Embedder(network, preprocessing, device)
    transform = models.get_model_weights(name).DEFAULT.transforms()
    dataset = PlainDataset([photos.path(index) for index in range(len(photos))], transform)
    loader = DataLoader(dataset, BATCH, num_workers=torch.get_num_threads(), persistent_workers=True)
    images = decode_alone(embedder, photos)
    with onnx_session(plain.cpu(), preprocessing.crop) as session:
        plain.to(device)
        contenders = {
            "ours": lambda: ours(embedder, photos),
            "plain_loop": lambda: embed_in_plain_loop(plain, loader, device),
            "one_at_a_time": lambda: embed_one_at_a_time(plain, dataset, device),
            "onnx_runtime": lambda: embed_with_onnx(session, loader),
            "decode_alone": lambda: decode_alone(embedder, photos),
            "network_alone": lambda: network_alone(embedder, images),
        }
        cosine = float((contenders["ours"]() * contenders["plain_loop"]()).sum(axis=1).min())
        print(f"ONNX Runtime runs {name} on {session.get_providers()[0]}")
        return measure.interleaved(contenders, config.repeats, name), cosine


def main(config: Config) -> None:
    """Measures all networks; writes `benchmark_embedding.json`."""
    device = choose_device(config.device)
    everything = load_photos(locate_photos(config.data))
    ratios, seconds, cosines, counts = {}, {}, {}, {}
    for name in config.networks.split():
        photos = measure.sample(everything, max(1, config.photos // SLOWER.get(name, 1)))
        counts[name] = len(photos)
        seconds[name], cosines[name] = compare(name, photos, config)
        alone = zip(seconds[name]["decode_alone"], seconds[name]["network_alone"], strict=True)
        limit = [decode + network if device.type == "cpu" else max(decode, network) for decode, network in alone]
        rivals = {rival: each for rival, each in seconds[name].items() if not rival.endswith("_alone")}
        ratios |= measure.ratios({**rivals, "limit": limit}, f"_{name}")
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
