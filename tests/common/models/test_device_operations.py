"""What a GPU or Apple silicon would meet in a training step: the operations that torch is asked for, on the CPU."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import autoencoder
import cnn_feature_extraction
import siamese
import triplet
from common.config import UserError
from common.models import training
from common.models.backbones import load_backbone
from common.models.embedder import Embedder
from common.models.heads import MultiLevelNetwork, Task
from common.models.training import Batch, Trainer

SIDE, PHOTOS = 64, 6
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
WAITS = {"aten::nonzero", "aten::masked_select", "aten::lift_fresh", "aten::item"}  # of the host for the device
MISSING = {"aten::_cdist_forward", "aten::_cdist_backward", "aten::linalg_inv_ex"}  # on MPS, in some versions of torch


class Recorder(TorchDispatchMode):
    """Counts the operations of torch by name; those in float64, and samples with a border, are not there on MPS."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        self.counts[name] += 1
        assert not (name == "aten::grid_sampler_2d" and args[3] == 1), "padding_mode border"
        result = operation(*args, **(kwargs or {}))
        assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float64), f"{name} in float64"
        return result


def steps():
    """A training step of each approach, by name: (network's parameters, step)."""
    torch.manual_seed(0)
    small = {"image_size": SIDE, "view_size": SIDE - 16}
    images = torch.randint(256, (PHOTOS, SIDE, SIDE, 3), dtype=torch.uint8)
    batch = Batch(images, LABELS, torch.arange(PHOTOS))
    backbone = load_backbone("squeezenet1_1", "none", SIDE)
    features = torch.nn.functional.normalize(torch.rand(40, backbone.feature_dim))
    for script, options in (
        (siamese, {}),
        (triplet, {"mining": "semi_hard"}),
        (triplet, {"mining": "batch_hard"}),
        (triplet, {"mining": "batch_all"}),
        (cnn_feature_extraction, {}),
    ):
        config = script.Config(**small, **options)
        network = MultiLevelNetwork(backbone, config, 0)
        targets = network.init_heads(Task(True, features), config.whitening)
        if script is cnn_feature_extraction:
            network = script.FineTunedCNN(network, 3, config.scale)
            last = {"targets": targets}
        else:
            last = {"heads": network, "task": Task(True, features, targets=targets)}
        yield script.training_step, network, (batch, config), {"preprocessing": backbone.preprocessing, **last}
    config = autoencoder.Config(**small, appearance_dim=16, detail_dim=16, output_size=32)
    network = autoencoder.Autoencoder(backbone, config, 0)
    targets = network.init_heads(Task(False, features), config.whitening)
    yield (
        autoencoder.training_step,
        network,
        (batch, config),
        {"preprocessing": backbone.preprocessing, "targets": targets},
    )


@pytest.mark.parametrize(("training_step", "network", "arguments", "options"), steps())
def test_no_step_waits_for_the_device_or_asks_for_what_it_lacks(training_step, network, arguments, options):
    network.train()
    training_step(network, *arguments, **options)  # the first one makes constants
    with Recorder() as recorder:
        losses = training_step(network, *arguments, **options)
        sum(losses.values()).backward()
    views = recorder.counts["aten::grid_sampler_2d"]
    assert views >= 1
    assert recorder.counts.pop("aten::_local_scalar_dense", 0) <= views  # the resolution, a random number of the CPU
    assert {name for name in recorder.counts if name in WAITS | MISSING} == set()


class OnMPS:
    """A network of a single parameter there."""

    def parameters(self):
        return iter([SimpleNamespace(device=torch.device("mps"))])


def test_apple_silicon_trains_in_float32_by_plain_steps(monkeypatch):
    given = {}
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **options: given.update(options))
    trainer = Trainer(OnMPS(), siamese.Config(), 10)
    assert trainer.precision == torch.float32
    assert not trainer.scaler.is_enabled()
    assert given["fused"] is False


def test_a_checkpoint_of_another_precision_resumes(monkeypatch, tmp_path):
    """In float16 the loss is scaled, in bfloat16 it isn't: there is no state of a scaler."""

    def trainer(precision):
        monkeypatch.setattr(training, "choose_precision", lambda *_: precision)
        network = torch.nn.Linear(2, 2)
        trainer = Trainer(network, siamese.Config(), 10)
        trainer.optimizer_step(network(torch.ones(1, 2)).sum(), 0)
        return trainer

    for before, after in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        checkpoint = SimpleNamespace(save=lambda _: None)
        trainer(before).save(checkpoint, tmp_path / "small.pt", finished=False)
        resumed = trainer(after)
        resumed.load_state(checkpoint)
        assert torch.equal(resumed.network.weight, checkpoint.network["weight"])


class SmallMemory(torch.nn.Module):
    """Raises what torch raises for a batch of more photos than fit."""

    def __init__(self, network: torch.nn.Module, limit: int) -> None:
        super().__init__()
        self.network, self.limit = network, limit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.network(images)


def test_a_batch_that_does_not_fit_the_memory_is_halved(embedder, capsys):
    network = SmallMemory(embedder.network, 5)
    halved = Embedder(network, embedder.preprocessing, embedder.device, 16)
    images = np.random.default_rng(0).integers(256, size=(16, SIDE, SIDE, 3), dtype=np.uint8)
    expected = embedder.embed_batch(images)
    for _ in range(2):
        assert halved.embed_batch(images) == pytest.approx(expected, abs=2e-3)
    assert capsys.readouterr().out.splitlines() == [
        f"cpu is out of memory: {limit} photos at a time from now on" for limit in (8, 4)
    ]
    network.limit = 0
    with pytest.raises(UserError, match="cpu has no memory left: end what uses it, or give --device cpu"):
        halved.embed_batch(np.zeros((4, SIDE, SIDE, 3), np.uint8))


def test_other_errors_of_a_network_are_not_taken_for_a_lack_of_memory(embedder):
    with pytest.raises(RuntimeError, match="must match the size"):
        embedder.embed_batch(np.zeros((2, SIDE, SIDE, 5), np.uint8))


def test_one_photo_leaves_half_of_the_cores_to_others(embedder, monkeypatch):
    used = []
    monkeypatch.setattr(Embedder, "_compute", lambda _, images: used.append(torch.get_num_threads()) or np.ones((1, 3)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            embedder.embed_images([Image.new("RGB", (64, 64))])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert used == [1, 1, 2]
