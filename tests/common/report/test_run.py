import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import RunConfig, UserError
from common.data.split import fingerprint
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.report import run as module
from common.report.run import Run
from common.retrieval import protocol, timing
from common.retrieval.protocol import Evaluation

ONE = {"value": 0.5, "low": 0.25, "high": 0.75}
MODEL = {"backbone": "squeezenet1_1", "weights": "none (untrained)"}


@pytest.fixture
def begin(synthetic_photos, tmp_path):
    """Begins a run on the synthetic photos, whose results go into an empty folder."""

    def begin(**fields):
        defaults = {"data": str(synthetic_photos), "results": str(tmp_path / "results"), "cache": "none"}
        return Run.begin("x", RunConfig(**{**defaults, "device": "cpu", **fields}), {})

    return begin


@pytest.fixture
def report(embedder):
    """Reports a made-up evaluation."""

    def report(run, **options):
        gallery, queries = run.load_photos()
        neighbours = np.tile(np.arange(20), (len(queries), 1))
        similarities = np.tile(np.linspace(1, 0.05, 20, dtype=np.float32), (len(queries), 1))
        latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
        timing = {"embed_photos_per_second": 10.0, "search_queries_per_second": 20.0, "query_latency_ms": latency}
        baselines = {"chance": {"precision@1": ONE}, "raw_pixels": {"precision@1": ONE}}
        evaluation = Evaluation({"precision@1": ONE, "map@r": ONE}, baselines, timing, similarities, neighbours)
        history = options.pop("history", [])
        return run.report(embedder, MODEL, gallery, queries, evaluation, history, **options)

    return report


# Begin


def test_quick_runs_on_synthetic_images_override_what_was_not_given(synthetic_photos, tmp_path, capsys):
    real = tmp_path / "real"
    real.mkdir()
    for folder, is_synthetic, seed in ((synthetic_photos, True, 3), (real, False, 0)):
        run = Run.begin("x", RunConfig(data=str(folder), cache="none"), {"seed": (0, 3), "split": ("validation", "?")})
        assert run.is_synthetic is is_synthetic
        assert run.config.seed == seed
        assert run.config.split == "test"
        assert ("Quick run on synthetic images: seed 3" in capsys.readouterr().out) is is_synthetic


def test_the_seed_decides_about_initial_weights(begin):
    draws = []
    for seed in (5, 5, 6):
        begin(seed=seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(5)
    assert torch.rand(3).tolist() == draws[0]


def test_a_cache_of_none_is_no_folder(begin, tmp_path):
    assert begin().cache is None
    assert begin(cache=str(tmp_path / "cache")).cache == tmp_path / "cache"


def test_a_folder_that_does_not_exist(begin):
    with pytest.raises(UserError, match="missing is not a folder"):
        begin(data="missing")


def test_photos_are_handed_to_the_consumers_and_to_the_baseline(begin, embedder, tmp_path, monkeypatch):
    run = begin(cache=str(tmp_path / "cache"))
    decoded = DecodedPhotos(embedder.preprocessing, run.cache)
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read_bytes(self))
    gallery, queries = run.load_photos(decoded)
    assert len(reads) == len(set(reads)) == 120  # each file once
    assert (len(gallery), len(queries)) == (108, 12)
    for photos in (gallery, queries):
        assert not decoded.lacks(photos.sha256).any()
        assert not run.raw_pixels.lacks(photos.sha256).any()
    assert (tmp_path / "results").is_dir()  # fails now if it can't be made


def test_the_split_is_that_of_the_configuration(begin):
    gallery, queries = begin().load_photos()
    smaller, validation = begin(split="validation").load_photos()
    assert (len(smaller), len(validation)) == (98, 10)
    assert set(smaller.sha256) | set(validation.sha256) == set(gallery.sha256)
    assert set(begin(seed=1).load_photos()[1].sha256) != set(queries.sha256)


# Checkpoint


def test_a_checkpoint_holds_absolute_folders(begin, synthetic_photos, embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(synthetic_photos.parents[1])
    relative = f"{synthetic_photos.parent.name}/synthetic"
    run = begin(data=relative, queries=f"{relative}/cat")
    gallery, _ = begin(data=relative).load_photos()
    checkpoint = run.new_checkpoint(gallery, embedder.preprocessing, MODEL)
    assert checkpoint.folder == str(synthetic_photos.resolve())
    assert checkpoint.queries == str(synthetic_photos.resolve() / "cat")
    assert begin(data=relative).new_checkpoint(gallery, embedder.preprocessing, MODEL).queries == ""
    assert checkpoint.approach == "x"
    assert checkpoint.config["data"] == relative
    assert checkpoint.model == MODEL
    assert checkpoint.photos == fingerprint(gallery)
    assert checkpoint.preprocessing["crop"] == 64
    assert (checkpoint.network, checkpoint.history, checkpoint.optimizer) == ({}, [], None)
    checkpoint.save(run.checkpoint_path)
    assert Checkpoint.load(tmp_path / "results" / "x.pt").folder == str(synthetic_photos.resolve())


# Evaluate


def test_the_embedder_of_a_run_has_its_cache_and_its_pixels(begin, embedder, tmp_path):
    run = begin(cache=str(tmp_path / "cache"), embed_batch_size=5)
    decoded = DecodedPhotos(embedder.preprocessing, run.cache)
    own = run.embedder(embedder.network, decoded)
    assert own.batch_size == 5
    assert own.decoded is decoded
    assert own.preprocessing is decoded.preprocessing
    assert own.rows.folder.parent == tmp_path / "cache"


def test_an_evaluation_is_that_of_the_protocol(begin, embedder, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 5)
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 3)
    run = begin(seed=4)
    gallery, queries = run.load_photos(embedder)
    evaluation = run.evaluate(embedder, gallery, queries)
    expected = protocol.evaluate(embedder, run.raw_pixels, gallery, queries, 4)
    assert evaluation.metrics == expected.metrics
    assert evaluation.baselines == expected.baselines
    assert np.array_equal(evaluation.neighbours, expected.neighbours)


# Report


def test_three_files_and_a_summary(begin, report, capsys):
    run = begin()
    path = report(run, history=[{"epoch": 1, "seconds": 2.5}, {"epoch": 2, "seconds": 4.0}])
    assert path == run.checkpoint_path.with_suffix(".json")
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.json", "x.neighbours.csv", "x.png"]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result) == [
        *("schema", "approach", "created", "config", "dataset", "model", "metrics", "baselines", "timing", "history"),
        "environment",
    ]
    assert result["schema"] == 2
    assert result["approach"] == "x"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["created"])
    assert result["config"]["data"] == str(run.folder)
    assert result["dataset"]["synthetic"] is True
    assert result["dataset"]["name"] == "synthetic cats and dogs 1"
    assert result["model"] == {**MODEL, "parameters": 722_496, "embedding_dim": 512}
    assert result["metrics"]["precision@1"] == ONE
    assert result["timing"]["train_seconds"] == 6.5
    assert 0 < result["timing"]["total_seconds"] < 600
    assert len(result["history"]) == 2
    assert len((path.parent / "x.neighbours.csv").read_text().splitlines()) == 1 + 12 * 10
    shown = capsys.readouterr().out
    assert "weights none (untrained)" in shown
    assert "synthetic cats and dogs 1: 108 photos in the gallery (54 cat, 54 dog), 12 queries, 0 skipped" in shown
    assert re.search(r"precision@1 +0.500 +0.250 to 0.750 +0.500 +0.500", shown)


def test_what_an_approach_adds(begin, report):
    picture = Image.new("RGB", (5, 4), "red")
    path = report(begin(), extra={"verification": {"roc_auc": 0.75}}, pictures={"reconstructions": picture})
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["verification"] == {"roc_auc": 0.75}
    with Image.open(path.parent / "x.reconstructions.png") as written:
        assert (written.size, written.getpixel((0, 0))) == ((5, 4), (255, 0, 0))


@pytest.mark.parametrize("broken", ["to_json", "neighbours_csv", "draw_evaluation", "summary"])
def test_all_files_or_none(begin, report, monkeypatch, broken):
    """A summary that fails is too late to undo anything."""
    path = report(begin())
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        report(begin(seed=1))
    after = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert after.keys() == before.keys()
    assert (after == before) is (broken != "summary")


def test_an_interrupt_while_writing_leaves_the_last_report(begin, report, monkeypatch):
    path = report(begin())
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report(begin(seed=1))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_the_commit_is_that_of_the_start(begin, report, monkeypatch):
    """Whatever is committed while a run trains, its numbers are those of the code that it began with."""
    commits = iter(("a" * 40, "b" * 40))
    monkeypatch.setattr(module, "current_commit", lambda: next(commits))
    result = json.loads(report(begin()).read_text(encoding="utf-8"))
    assert result["environment"]["commit"] == "a" * 40
