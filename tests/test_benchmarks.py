"""Each benchmark as a user runs it, on few photos: what it writes, not how fast it is."""

import json
import os
import shutil
import socket
import subprocess

import numpy as np
import pytest
from PIL import Image

from benchmarks import duplicates, measure, training
from common.config import UserError
from common.data.decode import decode_photo
from common.data.photos import load_photos
from common.extras import require
from common.models.backbones import load_preprocessing
from tests.conftest import ROOT

CASES = {  # name: (arguments, ratios)
    "duplicates": (
        ("--weights", "none", "--photos", "40", "--copies", "5", "--files", "40"),
        {f"imagededup_{rival}_{part}" for rival in ("cnn", "phash") for part in ("files", "indexed")},
    ),
    "embedding": (
        ("--photos", "8", "--networks", "squeezenet1_1", "--camera-photos", "2"),
        {
            f"{side}_{name}{kind}"
            for name in ("squeezenet1_1", "camera")
            for side, kinds in {
                **dict.fromkeys(("plain_loop", "one_at_a_time", "onnx_runtime", "limit", "decode_alone"), ("",)),
                "fastest_rival": ("_ours", "_ours_float32", "_ours_openvino", "_ours_int8"),
            }.items()
            for kind in kinds
        },
    ),
    "engines": (
        ("--weights", "none", "--size", "200", "--depths", "16 256", "photos.db"),
        {
            f"{way}_{engine}_depth{depth}"
            for way in ("one", "batch")
            for engine in ("float32", "float16", "int8", "milvus_lite")
            for depth in (16, 256)
        },
    ),
    "exact_search": (
        ("--weights", "none", "--sizes", "200"),
        {
            f"{side}_200_{mode}"
            for side in ("faiss", "scikit_learn", "usearch", "limit")
            for mode in ("top5", "top100", "one")
        },
    ),
    "query_latency": (("--weights", "none", "--queries", "5", "--cache", "none"), {"limit", "busy"}),
    "scaling": (
        ("--weights", "none", "--sizes", "200 400"),
        {"linear_build_400", "linear_search_400", "linear_latency_400"},
    ),
    "training": (
        ("--photos", "8"),
        {f"{side}_{name}" for side in ("limit", "busy", "plain_loop") for name in ("siamese", "autoencoder")},
    ),
}
WITHOUT_PAUSES = """
import runpy, sys
from benchmarks import measure
measure.PAUSE = 0
sys.argv = ["", *{arguments!r}]
runpy.run_module("benchmarks.{name}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def run_benchmark(tmp_path, offline, synthetic_photos, forks):
    """Runs a benchmark as a user does, but in another folder than the repository's."""

    def run(name, *arguments):
        data = () if name == "page" else ("--data", str(synthetic_photos))
        code = WITHOUT_PAUSES.format(name=name, arguments=[*data, "--results", "results", *arguments])
        return forks.run(["-c", code], tmp_path, offline)

    offline["PYTHONPATH"] = os.pathsep.join((str(ROOT), offline.get("PYTHONPATH", "")))  # for programs that it starts
    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name == "embedding" else []) for name in CASES]
)
def test_a_benchmark(run_benchmark, tmp_path, name):
    arguments, ratios = CASES[name]
    ended = run_benchmark(name, "--repeats", "1", *arguments)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / f"benchmark_{name}.json").read_text())
    assert result["benchmark"] == name
    assert result["ratios"].keys() == ratios
    for ratio in result["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert (tmp_path / "results" / f"benchmark_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none").exists()
    assert result["environment"]["blas_kernels"].keys() > {"torch"}
    if name == "duplicates":
        assert {len(kinds) for kinds in result["quality"].values()} == {4}
        assert result["quality"]["ours"]["cropped_area"]["precision"] == 1
        assert result["quality"]["ours"]["cropped_area"]["recall"] >= 0.6  # of 5 copies
    if name == "engines":  # a depth above the size of the gallery misses nothing
        assert result["curves"]["float32_depth256"]["recall@10"] == 1
        assert all(0.9 < each["recall@10"] <= 1 for each in result["curves"].values())
    if name == "exact_search":
        assert result["environment"]["rivals"].keys() >= {"faiss", "sklearn", "usearch"}
        assert all(case["largest_difference_in_similarity"] < 2e-6 for case in result["agreement_with_faiss"].values())


def test_the_page_answers_all_searches_of_its_benchmark(run_benchmark, offline, trained, tmp_path):
    offline["no_proxy"] = offline["NO_PROXY"] = "127.0.0.1,localhost"
    (tmp_path / "results").mkdir()
    shutil.copy(trained / "siamese.pt", tmp_path / "results")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ended = run_benchmark("page", "--clients", "2", "--seconds", "2", "--port", port)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "benchmark_page.json").read_text())
    assert result["errors"] == []
    assert result["searches"] >= 2
    assert 0 < result["milliseconds"]["p50"] <= result["milliseconds"]["p99"]
    alone = result["milliseconds_directly_alone"]["p50"] / result["milliseconds_alone"]["p50"]
    together = result["searches_per_second"] / result["searches_per_second_directly"]
    assert {name: ratio["median"] for name, ratio in result["ratios"].items()} == pytest.approx(
        {"limit": together, "limit_alone": alone}
    )
    assert (tmp_path / "results" / "benchmark_page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("training", ("--photos", "0"), "photos is 0: give a value from 2 to"),
        ("exact_search", ("--weights", "none", "--sizes", "many"), "give whole numbers"),
        ("engines", ("--codes", "int4"), "codes is int4: give some of float32, float16, int8"),
        ("embedding", ("--turns", "1"), "--turns is called --repeats now"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(run_benchmark, name, arguments, message):
    ended = run_benchmark(name, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ratios_compare_the_same_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "plain": [3.0, 4.0, 4.0]}
    assert measure.ratios(seconds, "_here") == {"plain_here": {"median": 2.0, "low": 1.0, "high": 3.0}}


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({None: 0.3, "Haswell": 0.1}, "Haswell"),  # AVX-512, which is not there, fails
        ({None: 0.3, "Haswell": 0.2, "SkylakeX": 0.1}, "SkylakeX"),
        ({None: 0.1, "Haswell": 0.2}, None),
        ({}, None),  # without faiss, which is named later
    ],
)
def test_faiss_computes_with_the_fastest_kernels_that_run(monkeypatch, seconds, chosen):
    def run(command, env, **_):
        kernels = env.get("OPENBLAS_CORETYPE")
        return subprocess.CompletedProcess(command, 0 if kernels in seconds else -4, f"{seconds.get(kernels)}\n")

    monkeypatch.setenv("OPENBLAS_CORETYPE", "")  # so that it is as before after the test
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    monkeypatch.setattr(subprocess, "run", run)
    measure.choose_faiss_kernels()
    assert os.environ.get("OPENBLAS_CORETYPE") == chosen


def test_the_kernels_that_the_user_chose_stay(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    monkeypatch.setattr(subprocess, "run", None)
    measure.choose_faiss_kernels()
    assert os.environ["OPENBLAS_CORETYPE"] == "Zen"


def test_rounds_leave_out_the_warm_up():
    calls = []
    contenders = {"ours": lambda: calls.append("ours"), "timed": lambda: 7.0}
    seconds = measure.interleaved(contenders, 2, "test")
    assert len(calls) == 3
    assert len(seconds["ours"]) == 2
    assert seconds["timed"] == [7.0, 7.0]


def test_precision_and_recall_of_pairs():
    planted = duplicates.Planted(None, np.array([-1, -1, -1, 0, 0, 1]), np.array([0, 1, 2, 0, 1, 2]))
    pairs = np.array([[0, 3], [1, 4], [2, 5], [0, 1], [0, 4], [0, 5]])
    scored = duplicates.Scored(pairs, np.array([0.9, 0.5, 0.4, 0.6, 0.5, 0.95], np.float32))
    scores, of_copies, copies = duplicates.select(scored, planted, (0,))  # without photo 5
    assert scores.tolist() == pytest.approx([0.5, 0.5, 0.6, 0.9])
    assert of_copies.tolist() == pytest.approx([0.5, 0.9])
    assert copies == 2
    # F1 at 0.9: 2 * 1 / (1 + 2) = 0.67; at 0.5: 2 * 2 / (4 + 2) = 0.67, too: the lower
    assert duplicates.best_threshold(scores, of_copies, copies) == 0.5
    expected = {"precision_at_recall_0.95": 2 / 4, "precision": 1, "recall": 1 / 2}
    assert duplicates.measure_pairs(scores, of_copies, copies, 0.7) == expected
    assert duplicates.measure_pairs(scores, of_copies[1:], copies, 0.7)["precision_at_recall_0.95"] is None
    assert duplicates.measure_pairs(scores, of_copies, copies, 0.99)["precision"] == 0


def test_distances_of_hashes():
    assert duplicates.compare_hashes(["00000000000000ff", "000000000000000f"]).tolist() == [[0, -4], [-4, 0]]


@pytest.mark.parametrize(
    ("kind", "size"), [("cropped_area", (179, 89)), ("cropped_sides", (160, 80)), ("toned", (200, 100))]
)
def test_what_is_left_of_a_photo(kind, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    copy, quality = duplicates.make_copy(image, kind, np.random.default_rng(1))
    assert (copy.size, quality) == (size, 90)
    assert copy.tobytes() != image.tobytes()


def test_planted_copies_know_their_photos(synthetic_photos, tmp_path):
    planted = duplicates.plant(load_photos(synthetic_photos), 3, tmp_path, 0)
    assert len(planted.photos) == 120 + 4 * 3
    assert np.bincount(planted.kinds + 1).tolist() == [120, 3, 3, 3, 3]
    assert np.bincount(planted.origins).max() == 2
    copies = np.flatnonzero(planted.kinds == 3)
    for copy in copies:
        (original,) = np.flatnonzero((planted.origins == planted.origins[copy]) & (planted.kinds == -1))
        pixels = [decode_photo(planted.photos.read(index)) for index in (copy, original)]
        assert pixels[0].size == pixels[1].size
        assert np.corrcoef(*(np.asarray(image).mean(2).ravel() for image in pixels))[0, 1] > 0.9


def test_a_gallery_larger_than_the_photos():
    real = np.eye(4, dtype=np.float32)
    assert (measure.gallery_of(2, real) == real[:2]).all()
    filled = measure.gallery_of(50, real)
    assert (filled[:4] == real).all()
    assert np.linalg.norm(filled, axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert len(np.unique(filled, axis=0)) == 50


def test_a_sample_is_evenly_spread_and_leaves_out_damaged_photos(synthetic_photos, tmp_path):
    folder = shutil.copytree(synthetic_photos, tmp_path / "photos")
    (folder / "cat" / "cat.0000.jpg").write_bytes(b"no photo")
    photos = load_photos(folder)
    chosen = measure.sample(photos, 4)  # of 120: 0, 39, 79, 119
    assert chosen.paths == ["cat/cat.0039.jpg", "dog/dog.0019.jpg", "dog/dog.0059.jpg"]
    assert len(measure.sample(photos, 1000)) == 119
    (folder / "dog" / "dog.0059.jpg").write_bytes(b"changed")
    with pytest.raises(UserError, match="changed while it was in use"):  # so it is read from disk
        chosen.read(2)
    with pytest.raises(UserError, match="none of the photos chosen from .* can be decoded"):
        measure.sample(photos, 1)


def test_photos_are_decoded_once_for_all_runs(synthetic_photos, tmp_path):
    photos = measure.sample(load_photos(synthetic_photos), 40)
    preprocessing = load_preprocessing("squeezenet1_1", "none", 32, whole_photo=True)
    for _ in range(2):
        decoded = training.decode_all(photos, preprocessing, tmp_path)
        assert decoded.rows.contains(photos.sha256).all()
    image = preprocessing.resize_crop(preprocessing.decode(photos.read(7)))
    assert (decoded.load(photos, np.array([7]))[0] == image).all()


def test_the_limit_of_training_neither_reads_nor_copies_pixels(synthetic_photos):
    photos = load_photos(synthetic_photos)
    preprocessing = load_preprocessing("squeezenet1_1", "none", 32, whole_photo=True)
    random = training.RandomPixels(preprocessing, batch_size=16)
    first, second = (random.load(photos, np.arange(start, start + 8)) for start in (0, 50))
    assert first.shape == (8, 32, 32, 3)
    assert np.shares_memory(first, second)
    assert first.std() == pytest.approx(73.9, abs=1)  # of uniform integers below 256


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"nowhere_to_be_found is missing: pip install -r requirements-extra\.txt"):
        require("nowhere_to_be_found")
