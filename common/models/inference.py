"""Networks in OpenVINO, an extra: on a CPU faster than in torch, in float32 or with convolutions of 8-bit integers.

Quantization after training (Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference), by NNCF: the ranges of activations come from some photos. Only what lies between the
first and the last convolution is quantized: pooling and heads stay in float32, since in 8 bits different photos tie.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from common.cache import KEY
from common.config import UserError, first_line
from common.data.decode import UnreadablePhotoError
from common.data.folders import read_photo, walk
from common.extras import require
from common.models.preprocessing import Preprocessing
from common.storage import atomic_write

NUM_CALIBRATION = 64  # photos; 300 gave no better ones
FILE = "network.xml"  # and the weights beside it, .bin
# A copy of the network for each thread that calls it: with several streams of one, in version 2026.4, those in 8 bits
# computed something else at random. Pinned to cores, all copies would run on the first one.
OPTIONS = {
    "NUM_STREAMS": 1,
    "INFERENCE_NUM_THREADS": 1,
    "ENABLE_CPU_PINNING": False,
    "INFERENCE_PRECISION_HINT": "f32",
}
TOLERANCE = 1e-3  # between copies, of an embedding's entries relative to the largest


class FromPixels(nn.Module):
    """uint8 [B, S, S, 3] -> float32 [B, D]"""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, S, S, 3] -> float32 [B, D]"""
        return self.network(self.preprocessing.normalize(pixels.float()))


class CompiledNetwork:
    """uint8 [B, S, S, 3] -> float32 [B, D], on the calling thread and any number of them at a time."""

    def __init__(self, model: Any, size: int) -> None:
        self.model = model
        self.idle: list[Any] = []  # copies that no thread uses
        self.probe = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
        self.expected: np.ndarray | None = None  # of the probe
        self(self.probe)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Raises `UserError` where a copy of the network computes something else than the first one."""
        try:
            request = self.idle.pop()
        except IndexError:
            request = self._copy()
        features = request.infer({0: images})[0].copy()
        self.idle.append(request)
        return features

    def _copy(self) -> Any:
        request = _core().compile_model(self.model, "CPU", OPTIONS).create_infer_request()
        found = request.infer({0: self.probe})[0].copy()
        if self.expected is None:
            self.expected = found
        if np.abs(found - self.expected).max() > TOLERANCE * np.abs(self.expected).max():
            raise UserError("OpenVINO computes different embeddings of the same photo: leave --inference out")
        return request


def compile_network(
    network: nn.Module, preprocessing: Preprocessing, quantized_for: Path | None, cache: Path | None, key: str
) -> CompiledNetwork:
    """The network, in evaluation mode on the CPU, in OpenVINO.

    With 8-bit convolutions if there is a folder of photos that it is `quantized_for`, or else in float32. A quantized
    one is kept in `cache` under its `key`: each network is quantized once, whatever the folder is later.

    Raises `UserError` where a package is missing, OpenVINO doesn't know an operation, or the folder has no photo.
    """
    (openvino,) = _require_silent("openvino")
    kept = cache / hashlib.sha256(key.encode()).hexdigest()[:32] if cache and quantized_for else None
    if kept:
        with contextlib.suppress(RuntimeError, OSError):  # nothing there, or damaged
            os.utime(kept / KEY)  # its last use
            return CompiledNetwork(_core().read_model(kept / FILE), preprocessing.crop)
    model = _convert(openvino, FromPixels(network, preprocessing).eval(), preprocessing.crop)
    if quantized_for:
        model = _quantize(model, calibration_images(quantized_for, preprocessing))
    if kept:
        shutil.rmtree(kept, ignore_errors=True)
        with contextlib.suppress(OSError), atomic_write(kept) as temporary:
            temporary.mkdir()
            openvino.save_model(model, temporary / FILE, compress_to_fp16=False)
            (temporary / KEY).write_text(key, encoding="utf-8")
    return CompiledNetwork(model, preprocessing.crop)


def calibration_images(folder: Path, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [N, S, S, 3] of up to `NUM_CALIBRATION` photos in the folder, evenly spread; raises `UserError` if none."""
    paths = sorted(path for path, reason in walk(folder) if not reason)
    images = []
    for index in np.unique(np.linspace(0, max(0, len(paths) - 1), NUM_CALIBRATION).astype(int)) if paths else ():
        with contextlib.suppress(UnreadablePhotoError, OSError):
            images.append(preprocessing.resize_crop(preprocessing.decode(read_photo(folder / paths[index]))))
    if not images:
        raise UserError(f"{folder} has no photo to take the ranges of 8-bit numbers from: leave --inference int8 out")
    return np.stack(images)


def _convert(openvino: ModuleType, network: nn.Module, size: int) -> Any:
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    shape = openvino.PartialShape([-1, size, size, 3])
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's tracer, about the shapes that it takes as constant
            network(example)  # what is made at the first call is no part of the network
            return openvino.convert_model(network, example_input=example, input=[shape])
    except Exception as error:  # torch's tracer and OpenVINO fail in many ways
        raise UserError(f"OpenVINO can't take this network ({first_line(error)}): leave --inference out") from error


def _quantize(model: Any, images: np.ndarray) -> Any:
    """In 8 bits between the first and the last convolution.

    AVX2 adds pairs of products in 16 bits: weights use half of their range, so that no sum overflows.
    """
    nncf, advanced = _require_silent("nncf", "nncf.quantization.advanced_parameters")
    nncf.set_log_level(logging.ERROR)
    parameters = advanced.AdvancedQuantizationParameters(overflow_fix=advanced.OverflowFix.ENABLE)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in images]),
            subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED,  # activations after a ReLU have no sign
            ignored_scope=nncf.IgnoredScope(names=_outside_convolutions(model), validate=False),
            advanced_parameters=parameters,
        )


def _outside_convolutions(model: Any) -> list[str]:
    """Names of the operations that don't lie between two convolutions; raises `UserError` if there is none."""
    operations = model.get_ordered_ops()
    sources = {each.get_name(): [value.get_node().get_name() for value in each.input_values()] for each in operations}
    convolutions = {each.get_name() for each in operations if "Convolution" in each.get_type_name()}
    if not convolutions:
        raise UserError("this network has no convolution to compute in 8 bits: give --inference openvino")
    after, before = set(convolutions), set(convolutions)
    for name, names in sources.items():  # in the order of computation
        if not after.isdisjoint(names):
            after.add(name)
    for name in reversed(sources):
        if name in before:
            before.update(sources[name])
    return [each.get_friendly_name() for each in operations if each.get_name() not in after & before]


@functools.cache
def _core() -> Any:
    """One for the whole process: where two were freed, version 2026.4 crashed."""
    return _require_silent("openvino")[0].Core()


def _require_silent(*names: str) -> list[ModuleType]:
    """Packages of OpenVINO, which report their use to their makers where another one, that they can do without, exists:
    what is searched here stays on this machine.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # an import of it fails
    return require(*names)
