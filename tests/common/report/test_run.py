import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import RunConfig, UserError
from common.data.split import describe_test_set, fingerprint
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.report import run as module
from common.report.run import Run
from common.retrieval import protocol, timing
from common.retrieval.protocol import Evaluation

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
        split = run.load_photos()
        queries = split.test.queries
        neighbours = np.tile(np.arange(20), (len(queries), 1))
        similarities = np.tile(np.linspace(1, 0.05, 20, dtype=np.float32), (len(queries), 1))
        latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
        timing = {"embed_photos_per_second": 10.0, "search_queries_per_second": 20.0, "query_latency_ms": latency}
        halves = np.tile([0.25, 0.75], 6)
        run.baselines = {name: {"": {"precision@1": halves}} for name in ("chance", "raw_pixels")}
        values = {"": {"precision@1": halves, "map@r": halves}}
        evaluation = Evaluation(values, {"threshold": 0.5}, timing, similarities, neighbours, {"engine": "hnsw"}, 3)
        history = options.pop("history", [])
        return run.report(embedder, MODEL, split, evaluation, history, **options)

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


def test_results_that_cannot_be_written_are_noticed_before_training(begin, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UserError, match=r"the folder .*results can't be written to"):
        begin()


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
    split = run.load_photos(decoded)
    assert len(reads) == len(set(reads)) == 120  # each file once
    assert (len(split.train), len(split.validation), len(split.test.gallery), len(split.test.queries)) == (
        98,
        10,
        108,
        12,
    )
    for photos in split.parts:
        assert not decoded.lacks(photos.sha256).any()
        assert not run.raw_pixels.lacks(photos.sha256).any()


def test_the_split_is_that_of_the_configuration(begin):
    test, validation = begin().load_photos().test, begin(split="validation").load_photos().test
    assert (len(validation.gallery), len(validation.queries)) == (98, 10)
    assert set(validation.gallery.sha256) | set(validation.queries.sha256) == set(test.gallery.sha256)
    assert set(begin(seed=1).load_photos().test.queries.sha256) != set(test.queries.sha256)
    assert begin(labelled=False).load_photos().train.classes == [""]


def test_further_test_sets_are_named_by_their_folders(begin, synthetic_photos, tmp_path, monkeypatch):
    """Also the folder that the shell is in: "" is the name of the run's own test set."""
    run = begin(also=(str(synthetic_photos / "cat"),))
    run.load_photos()
    assert run.also.keys() == {"cat"}
    assert len(run.also["cat"].queries) == 60
    monkeypatch.chdir(synthetic_photos)
    here = begin(also=(".",))
    here.load_photos()
    assert here.also.keys() == {synthetic_photos.name}
    assert describe_test_set(here.also[synthetic_photos.name])["folder"] == "."  # as typed: files are shared
    with pytest.raises(UserError, match="two folders of --also are called cat: rename one, as results go by names"):
        begin(also=("cat", str(synthetic_photos / "cat"))).load_photos()


# Checkpoint


def test_a_checkpoint_holds_absolute_folders(begin, synthetic_photos, embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(synthetic_photos.parents[1])
    relative = f"{synthetic_photos.parent.name}/synthetic"
    run = begin(data=relative, queries=f"{relative}/cat")
    gallery = begin(data=relative).load_photos().train
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


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


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
    split = run.load_photos(embedder)
    evaluation = run.evaluate(embedder, split)
    expected = protocol.evaluate(embedder, split, {}, 4)
    assert_equal(evaluation.values[""], expected.values[""])
    assert np.array_equal(evaluation.neighbours, expected.neighbours)
    run.measure_baseline("pretrained", embedder, split)
    assert run.baselines.keys() == {"raw_pixels", "chance", "pretrained"}
    assert_equal(run.baselines["pretrained"][""], evaluation.values[""])
    assert_equal(run.baselines["chance"][""], protocol.score_chance(split.test, 4))
    assert_equal(run.baselines["raw_pixels"][""], protocol.score_photos(run.raw_pixels, split.test))


# Report


def test_four_files_and_a_summary(begin, report, capsys):
    run = begin()
    path = report(run, history=[{"epoch": 1, "seconds": 2.5}, {"epoch": 2, "seconds": 4.0}])
    assert path == run.checkpoint_path.with_suffix(".json")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "x.json",
        "x.neighbours.csv",
        "x.per_query.npz",
        "x.png",
    ]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result) == [
        *("schema", "protocol", "approach", "created", "config", "dataset", "model", "metrics", "baselines", "also"),
        *("verification", "search", "timing", "history", "environment"),
    ]
    assert (result["schema"], result["protocol"]) == (3, 2)
    assert (result["also"], result["verification"], result["search"]) == ({}, {"threshold": 0.5}, {"engine": "hnsw"})
    assert result["approach"] == "x"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["created"])
    assert result["config"]["data"] == str(run.folder)
    assert result["dataset"]["synthetic"] is True
    assert result["dataset"]["near_copies"] == 3
    assert result["dataset"]["name"] == "synthetic cats and dogs 1"
    assert result["model"] == {**MODEL, "parameters": 722_496, "embedding_dim": 512}
    assert result["metrics"]["precision@1"]["value"] == 0.5
    assert result["timing"]["train_seconds"] == 6.5
    assert 0 < result["timing"]["total_seconds"] < 600
    assert len(result["history"]) == 2
    assert len((path.parent / "x.neighbours.csv").read_text().splitlines()) == 1 + 12 * 10
    shown = capsys.readouterr().out
    assert "weights none (untrained)" in shown
    assert "synthetic cats and dogs 1: 108 photos in the gallery (54 cat, 54 dog), 12 queries, 0 skipped" in shown
    assert re.search(r"precision@1 +0.500 +0\.\d+ to 0\.\d+ +0.500 +0.500", shown)


def test_the_means_of_the_values_of_each_query_are_the_metrics(begin, embedder, synthetic_photos, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 4)
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 3)
    run = begin(also=(str(synthetic_photos),))
    split = run.load_photos(embedder)
    run.checkpoint_path.parent.mkdir(exist_ok=True)
    run.new_checkpoint(split.train, embedder.preprocessing, MODEL).save(run.checkpoint_path)
    path = run.report(embedder, MODEL, split, run.evaluate(embedder, split), [])
    result = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".per_query.npz")) as stored:
        also = f"{synthetic_photos.name}/"
        assert stored["sha256"].tolist() == split.test.queries.sha256.tolist()
        assert stored[f"{also}sha256"].shape == (120,)
        for prefix, part in (("", result), (also, result["also"][synthetic_photos.name])):
            assert len(part["metrics"]) >= 22
            for name, score in part["metrics"].items():
                assert stored[prefix + name].mean() == pytest.approx(score["value"], abs=1e-6)
                assert score["low"] <= score["value"] <= score["high"]
        assert len(stored.files) == 2 + len(result["metrics"]) + len(part["metrics"])
    assert part["baselines"].keys() == {"raw_pixels", "chance"}
    assert result["verification"] == Checkpoint.load(run.checkpoint_path).verification
    assert {"threshold", "same_precision"} <= result["verification"].keys()


def test_what_an_approach_adds(begin, report):
    picture = Image.new("RGB", (5, 4), "red")
    path = report(begin(), extra={"reconstruction": {"mse": 0.75}}, pictures={"reconstructions": picture})
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["reconstruction"] == {"mse": 0.75}
    with Image.open(path.parent / "x.reconstructions.png") as written:
        assert np.array_equal(np.asarray(written)[:4, :5], np.asarray(picture))
        assert written.height > 4  # below it stands of what it is


@pytest.mark.parametrize("broken", ["to_json", "neighbours_csv", "per_query", "draw_evaluation", "summary"])
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
