"""Trains each approach for five steps, as one of the processes that torchrun starts, and saves what came out.

torchrun --nproc-per-node=2 distributed_worker.py FOLDER
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import autoencoder
import cnn_feature_extraction
import siamese
import triplet
from common.distributed import connect, disconnect
from common.models.backbones import load_backbone
from common.models.checkpoint import Checkpoint
from common.models.heads import SMALL, MultiLevelNetwork, Task
from common.models.training import train

PHOTOS, CLASSES, KINDS = 40, 3, 10  # five steps of 8


class FakePhotos:
    """Labels; the pixels come from `FakeDecoded`."""

    labels = np.arange(PHOTOS) % CLASSES

    def __len__(self):
        return PHOTOS


class FakeDecoded:
    """Noise with a color of its own for each photo."""

    images = np.random.default_rng(0).integers(0, 256, (PHOTOS, 48, 48, 3), np.uint8) // 4

    def load(self, _, indices):
        return self.images[indices] + (indices % 16 * 12).astype(np.uint8)[:, None, None, None]


def network_and_step(module, backbone, config):
    """What the approach's `main` builds."""
    random = torch.Generator().manual_seed(1)
    features, kinds = (functional.normalize(torch.rand(PHOTOS, dim, generator=random)) for dim in (512, KINDS))
    preprocessing = backbone.preprocessing
    small = torch.rand(PHOTOS, 3, SMALL, SMALL, generator=random)
    task = Task(True, features, small, kinds.sqrt())
    if module is autoencoder:
        network = autoencoder.Autoencoder(backbone, config, KINDS)
        targets = network.init_heads(task, config.whitening)
        return network, partial(module.training_step, config=config, preprocessing=preprocessing, targets=targets)
    network = MultiLevelNetwork(backbone, config, KINDS)
    targets = network.init_heads(task, config.whitening)
    if module is cnn_feature_extraction:
        whole = cnn_feature_extraction.FineTunedCNN(network, CLASSES, config.scale)
        return whole, partial(module.training_step, config=config, preprocessing=preprocessing, targets=targets)
    task = task._replace(targets=targets)
    return network, partial(module.training_step, config=config, heads=network, preprocessing=preprocessing, task=task)


def main(folder):
    """Writes `<approach>.pt`: the checkpoint after one epoch.

    In float64: in float32 a few steps make of a rounding error a large one, with one process on two threads too.
    """
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    connect(torch.device("cpu"))
    for module in (siamese, triplet, cnn_feature_extraction, autoencoder):
        torch.manual_seed(0)
        sizes = {"appearance_dim": 64, "output_size": 32} if module is autoencoder else {}
        backbone = "resnet18" if module is siamese else "squeezenet1_1"  # batch norm once: its many weights take time
        config = module.Config(
            backbone=backbone, weights="none", image_size=48, view_size=32, epochs=1, batch_size=8, **sizes
        )
        backbone = load_backbone(config.backbone, config.weights, config.image_size, config.pooling, True)
        network, step = network_and_step(module, backbone, config)
        checkpoint = Checkpoint(module.__name__, {}, {}, {}, "", "")
        path = Path(folder) / f"{module.__name__}.pt"
        train(network, step, FakePhotos(), FakeDecoded(), config, checkpoint, path)
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
