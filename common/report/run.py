"""A run of an approach, from its hyperparameters to its result file."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.config import RunConfig, UserError, apply_overrides, hyperparameters
from common.data.folders import Selection
from common.data.photos import FileConsumer, Photos, load_photos
from common.data.sources import locate_photos
from common.data.split import Group, Split, TestSet, describe, describe_test_set, fingerprint, leave_one_out, load_split
from common.data.synthetic import is_synthetic
from common.device import choose_device
from common.distributed import connect, disconnect, first_process_first, world
from common.models.backbones import load_classifier
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.models.heads import Task, load_appearances
from common.models.preprocessing import Preprocessing
from common.models.training import Sampler, TrainingStep, train
from common.models.weights import UNTRAINED
from common.report.environment import current_commit, describe_environment, peak_memory, source_of
from common.report.pictures import draw_evaluation, stamp
from common.report.result_file import SCHEMA, SUMMARY, neighbours_csv, per_query, summary, to_json, write_report
from common.retrieval.duplicates import group_copies
from common.retrieval.index import require_engine
from common.retrieval.protocol import (
    PROTOCOL,
    Evaluation,
    Values,
    embed_all,
    evaluate,
    raw_pixel_embedder,
    score_baseline,
    score_chance,
    with_intervals,
)
from common.storage import cache_folder, require_writable

ConfigT = TypeVar("ConfigT", bound=RunConfig)
SAMPLE = 512  # photos from whose features untrained heads start


@dataclass
class Run(Generic[ConfigT]):
    """What every approach does alike; `begin` starts one."""

    approach: str  # the name of the script without .py
    config: ConfigT
    folder: Path  # of the photos
    device: torch.device
    cache: Path | None
    raw_pixels: Embedder  # the baseline
    commit: str | None  # of the code as it started
    started: float  # time.perf_counter, less the seconds of epochs before a resume
    also: dict[str, TestSet] = field(default_factory=dict)  # further test sets, by the names of their folders
    baselines: dict[str, dict[str, Values]] = field(default_factory=dict)  # by name, then by test set
    groups: dict[bytes, bytes] = field(default_factory=dict)  # of near-copies, see `load_split`

    @classmethod
    def begin(cls, approach: str, config: ConfigT, synthetic_overrides: Mapping[str, tuple[Any, Any]]) -> "Run":
        """Finds the photos, seeds torch and chooses the device; makes sure that results can be written.

        On synthetic images {field: (default, override)} replaces defaults, so that a run ends in minutes. Raises
        `UserError`.
        """
        started, commit = time.perf_counter(), current_commit()
        device = choose_device(config.device)
        connect(device)
        require_writable(Path(config.results))  # better to fail now than after training
        require_engine(config)
        with first_process_first():
            folder = locate_photos(config.data)
        if is_synthetic(folder):
            config = apply_overrides(config, synthetic_overrides)
        torch.manual_seed(config.seed)  # for initial weights; all else that is random has a generator of its own
        cache = cache_folder(config.cache)
        return cls(approach, config, folder, device, cache, raw_pixel_embedder(cache), commit, started)

    @property
    def is_synthetic(self) -> bool:
        """Whether the photos are synthetic images, for which untrained weights will do."""
        return is_synthetic(self.folder)

    @property
    def checkpoint_path(self) -> Path:
        """Of this approach's checkpoint."""
        return Path(self.config.results) / f"{self.approach}.pt"

    def load_photos(self, *consumers: Embedder | DecodedPhotos, frozen: Embedder | None = None) -> Split:
        """What to train on and to test on. Each file is read once, and handed to the consumers and to the baseline.

        `frozen`: the network that finds near-copies where `config.group_duplicates` asks for it.
        """
        if world().size > 1:  # which embed a part each, later
            consumers = tuple(each for each in consumers if not isinstance(each, Embedder))
        group = None
        if frozen and self.config.group_duplicates:
            consumers = tuple(dict.fromkeys((*consumers, frozen)))
            group = partial(self._group_copies, frozen)
        with first_process_first():
            for consumer in consumers:
                consumer.rows.refresh()
            return self._load_photos((*consumers, self.raw_pixels), group)

    def _group_copies(self, frozen: Embedder, parts: Sequence[Photos]) -> dict[bytes, bytes]:
        self.groups = group_copies(parts, frozen, self.config.copy_threshold)
        print(f"{len(self.groups):,} photos have near-copies, which stay on one side of the split", flush=True)
        return self.groups

    def _load_photos(self, consumers: Sequence[FileConsumer], group: Group | None) -> Split:
        config = self.config
        chosen = Selection(config.exclude, config.allow_unreadable, Path(config.results))
        searched = self.folder, config.queries, config.split, config.seed
        split = load_split(*searched, consumers, config.labelled, chosen, group)
        for folder in map(Path, config.also):
            name = folder.absolute().name  # that of . would be empty
            if name in self.also:
                raise UserError(f"two folders of --also are called {name}: rename one, as results go by names")
            self.also[name] = leave_one_out(load_photos(folder, consumers, f"reading {name}", selection=chosen))
        return split

    def measure_baseline(self, name: str, embedder: Embedder, split: Split) -> None:
        """Scores a network to compare the run's own with, on the same photos; before training changes it."""
        if world().size > 1:
            embed_all(embedder, split, self.also, self.config.seed)
        if world().rank == 0:
            self.baselines[name] = score_baseline(embedder, split.test, self.also, self.config.seed)

    def prepare_training(
        self, frozen: Embedder, weights: str, split: Split, views_alone: bool, with_classifier: bool
    ) -> Task:
        """Scores the backbone as it is, before training changes it, and keeps what it makes of the training photos.

        Of an untrained backbone there is nothing to score, and the features of `SAMPLE` photos are enough. `weights`:
        those of the backbone. `views_alone`: whether the approach can train without classes. `with_classifier`:
        whether to keep its class probabilities too, if it has a classifier. Raises `UserError` if there is one class
        only and `views_alone` is false.
        """
        has_classes = len(split.train.classes) > 1
        if not (has_classes or views_alone):
            raise UserError(
                f"{self.folder} has one class only, and view_weight is 0: there is nothing to learn. Use photos of two "
                "classes or more, or pairs of views"
            )
        photos = split.train
        if weights == UNTRAINED:
            photos = photos.subset(np.unique(np.linspace(0, len(photos) - 1, SAMPLE).astype(int)))
        else:
            self.measure_baseline("pretrained", frozen, split)
        features = torch.from_numpy(frozen.embed_photos(photos, "features before training"))
        config: Any = self.config  # of an approach with a backbone
        small = load_appearances(frozen.decoded, split.train) if config.appearance_weight else None
        classifier = (
            load_classifier(config.backbone, config.weights) if with_classifier and weights != UNTRAINED else None
        )
        if classifier is None:
            return Task(has_classes, features, small)
        kinds = self.embedder(classifier, frozen.decoded).embed_photos(photos, "class probabilities before training")
        return Task(has_classes, features, small, torch.from_numpy(kinds))

    def train(
        self,
        network: nn.Module,
        step: TrainingStep,
        photos: Photos,
        decoded: DecodedPhotos,
        model: dict[str, str],
        sampler: Sampler | None = None,
    ) -> list[dict]:
        """Trains `network` in place on `photos`, with a checkpoint after every epoch; returns the history.

        `model` holds "backbone" and "weights"; for the others see `common.models.training.train`.
        """
        checkpoint = self.new_checkpoint(photos, decoded.preprocessing, model)
        config: Any = self.config  # of an approach that trains
        if config.resume and self.checkpoint_path.exists():
            self.started -= sum(epoch["seconds"] for epoch in Checkpoint.load(self.checkpoint_path).history)
        return train(network, step, photos, decoded, config, checkpoint, self.checkpoint_path, sampler)

    def new_checkpoint(self, photos: Photos, preprocessing: Preprocessing, model: dict[str, str]) -> Checkpoint:
        """Of this run, without state. `photos` are those to train on; `model` holds "backbone" and "weights"."""
        return Checkpoint(
            approach=self.approach,
            config=hyperparameters(self.config),
            model=model,
            preprocessing=preprocessing.to_dict(),
            photos=fingerprint(photos),
            folder=str(self.folder.resolve()),
            queries=str(Path(self.config.queries).resolve()) if self.config.queries else "",
            groups={sha256.decode(): group.decode() for sha256, group in self.groups.items()},
        )

    def embedder(self, network: torch.nn.Module, decoded: DecodedPhotos, inference: str = "torch") -> Embedder:
        """`network` on this run's device, with its cache; it takes pixels from `decoded`.

        `inference`: see `EngineConfig`; for a network that is not trained further.
        """
        options = self.device, self.config.embed_batch_size, self.cache, decoded, self.approach, self.config.precision
        return Embedder(network, decoded.preprocessing, *options, inference, self.folder)

    def evaluate(self, embedder: Embedder, split: Split) -> Evaluation:
        """By the protocol that all approaches share. Of several processes the first one scores; the others end here."""
        if world().size > 1:
            embed_all(embedder, split, self.also, self.config.seed)
            disconnect()
        if world().rank:
            sys.exit()
        seed, test_sets = self.config.seed, {"": split.test, **self.also}
        pixels = score_baseline(self.raw_pixels, split.test, self.also, seed, instances=False)
        chance = {name: score_chance(test, seed) for name, test in test_sets.items()}
        self.baselines |= {"raw_pixels": pixels, "chance": chance}
        return evaluate(embedder, split, self.also, seed, self.config)

    def report(
        self,
        embedder: Embedder,
        model: dict[str, str],
        split: Split,
        evaluation: Evaluation,
        history: list[dict],
        extra: dict[str, Any] | None = None,
        pictures: dict[str, Image.Image] | None = None,
    ) -> Path:
        """Writes `<approach>.json`, `.per_query.npz`, `.neighbours.csv` and `.png` into `config.results`, all or none.

        Prints a summary, adds the verification threshold to the checkpoint, returns the path of the result file.
        `model`: "backbone" and "weights"; `extra` goes into that file, `pictures` into `<approach>.<name>.png`.
        """
        result = self._result(embedder, model, split, evaluation, history) | (extra or {})
        path = self.checkpoint_path.with_suffix(".json")
        scores = result["metrics"]
        headline = next(f"{name} {scores[name]['value']:.3f}" for name in SUMMARY if name in scores)
        source = source_of(result["dataset"]["name"], model, self.commit)
        drawn = {".png": draw_evaluation(self.approach, headline, split.test, evaluation)}
        drawn |= {f".{name}.png": image for name, image in (pictures or {}).items()}
        texts = {".json": to_json(result), ".neighbours.csv": neighbours_csv(split.test, evaluation)}
        images = {name: stamp(image, source) for name, image in drawn.items()}
        self._add_verification(evaluation)
        arrays = per_query(evaluation, {"": split.test, **self.also})
        write_report(path, texts, arrays, images)
        print(summary(result))
        print(f"\nwritten: {path} and, beside it, .neighbours.csv, .per_query.npz and .png")
        return path

    def _add_verification(self, evaluation: Evaluation) -> None:
        if self.checkpoint_path.exists():
            checkpoint = Checkpoint.load(self.checkpoint_path)
            checkpoint.verification = evaluation.verification
            checkpoint.save(self.checkpoint_path)

    def _result(
        self, embedder: Embedder, model: dict[str, str], split: Split, evaluation: Evaluation, history: list[dict]
    ) -> dict[str, Any]:
        """What every result file holds."""
        scores = {name: with_intervals(values) for name, values in evaluation.values.items()}
        baselines = {
            name: {baseline: with_intervals(values[name]) for baseline, values in self.baselines.items()}
            for name in scores
        }
        return {
            "schema": SCHEMA,
            "protocol": PROTOCOL,
            "approach": self.approach,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "config": hyperparameters(self.config),
            "dataset": {**describe(split), "near_copies": evaluation.near_copies, "synthetic": self.is_synthetic},
            "model": {
                **model,
                "parameters": sum(parameter.numel() for parameter in embedder.network.parameters()),
                "embedding_dim": embedder.dim,
            },
            "metrics": scores[""],
            "baselines": baselines[""],
            "also": {
                name: {**describe_test_set(test), "metrics": scores[name], "baselines": baselines[name]}
                for name, test in self.also.items()
            },
            "verification": evaluation.verification,
            "search": evaluation.search,
            "timing": {
                "train_seconds": sum(epoch["seconds"] for epoch in history),
                **evaluation.timing,
                "total_seconds": time.perf_counter() - self.started,
                **peak_memory(embedder.device),
            },
            "history": history,
            "environment": describe_environment(embedder.device, embedder.precision, self.commit),
        }
