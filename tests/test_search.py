"""The search as a user runs it, from the shell."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import search
from common.config import UserError
from common.device import choose_precision
from tests.conftest import ROOT


def test_a_search_loads_no_package_that_it_can_do_without():
    """Each takes half a second or more at every start."""
    code = "import search, sys; print(*{name.split('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "pandas", "matplotlib", "faiss", "gradio"} & set(ended.stdout.split())


def test_from_the_shell(run_script, trained, synthetic_photos, tmp_path):
    photo = sorted(synthetic_photos.rglob("*.jpg"))[0]
    (tmp_path / "some").mkdir()
    shutil.copy(photo, tmp_path / "some" / "a.jpg")
    (tmp_path / "some" / "b.jpg").write_text("no photo")
    results = shutil.copytree(trained, tmp_path / "results", ignore=shutil.ignore_patterns("*.json", "*.png"))
    index = ("--index", str(synthetic_photos), "-k", "4", "--approach", "autoencoder", "--engine", "hnsw")
    ended = run_script("search.py", str(photo), "some", *index)
    assert ended.returncode == 2
    assert "some/b.jpg: not a photo" in ended.stderr.replace("\\", "/")
    assert "1 of the query photos can't be used" in ended.stderr
    assert ended.stdout.count("   1  ") == ended.stdout.count("   4  ") == 2
    assert "   5  " not in ended.stdout
    assert ended.stdout.count(f"the same file, left out: {photo}") == 2
    with Image.open(results / "search.png") as picture:
        assert picture.width > 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a photo to search with: python search.py my_photo.jpg"),
        (("missing.jpg",), "there is no checkpoint in results: name a folder to search with --index, or train"),
        (("a.jpg", "--duplicates", "."), "--duplicates compares the photos of its folder alone: leave --index and"),
        (("a.jpg", "-k", "0"), "k is 0: give a value from 1 to"),
        (
            ("a.jpg", "--approach", "magic"),
            "there is no results/magic.pt: run python magic.py first",
        ),
    ],
)
def test_one_clear_sentence(run_script, tmp_path, arguments, message):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    ended = run_script("search.py", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr.replace("\\", "/")
    assert "Traceback" not in ended.stderr


def test_an_approach_that_was_not_trained(run_script, trained, tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copy(trained / "autoencoder.pt", tmp_path / "results")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    ended = run_script("search.py", "a.jpg", "--approach", "magic")
    assert ended.returncode == 2
    message = "there is no results/magic.pt: run python magic.py first, or choose --approach autoencoder"
    assert message in ended.stderr.replace("\\", "/")


def test_the_first_approach_that_was_trained_answers_unless_one_is_named(
    run_script, trained, synthetic_photos, tmp_path
):
    (tmp_path / "results").mkdir()
    for name in ("autoencoder", "cnn_feature_extraction"):
        shutil.copy(trained / f"{name}.pt", tmp_path / "results")
    photo = str(sorted(synthetic_photos.rglob("*.jpg"))[0])
    first, named, other = (
        run_script("search.py", photo, *options)
        for options in ((), ("--approach", "autoencoder"), ("--approach", "cnn_feature_extraction"))
    )
    assert first.returncode == named.returncode == other.returncode == 0, first.stderr
    found = [ended.stdout.splitlines()[2:] for ended in (first, named, other)]
    assert found[0] == found[1] != found[2]


def test_the_gallery_is_found_from_another_folder(run_script, forks, offline, synthetic_photos, tmp_path, monkeypatch):
    """Where the run was given a relative one; if it has gone, no other of that name is searched."""
    shutil.copytree(synthetic_photos, tmp_path / "pets")
    small = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "64", "--epochs", "0")
    ended = run_script("cnn_feature_extraction.py", "--data", "pets", *small)
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "elsewhere").mkdir()
    photo = sorted((tmp_path / "pets").rglob("*.jpg"))[0]
    arguments = [str(ROOT / "search.py"), str(photo), "--results", str(tmp_path / "results")]
    ended = forks.run(arguments, tmp_path / "elsewhere", offline)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(str(tmp_path.resolve() / "pets")) >= 5
    assert (tmp_path / "results" / "search.png").exists()
    gallery = tmp_path / "pets"
    moved = gallery.rename(tmp_path / "elsewhere" / "pets")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = search.Config(photos=(str(moved / "cat" / photo.name),), results=str(tmp_path / "results"), cache="none")
    with pytest.raises(UserError) as caught:
        search.main(config)
    assert str(caught.value) == (
        f"the gallery of cnn_feature_extraction.py, {gallery.resolve()}, is gone: name a folder to search with --index"
    )


def test_processes_that_know_nothing_of_each_other_embed_a_part_each(
    run_script, offline, trained, synthetic_photos, tmp_path
):
    shutil.copytree(trained, tmp_path / "results", ignore=shutil.ignore_patterns("*.json", "*.png"))
    index = ("--index", str(synthetic_photos), "--approach", "siamese")
    for rank in ("0", "1", "2"):
        offline |= {"RANK": rank, "WORLD_SIZE": "3"}
        ended = run_script("search.py", *index)
        assert ended.returncode == 0, ended.stderr
        assert f"part {int(rank) + 1} of 3: 40 photos are embedded, 0 skipped" in ended.stdout
    del offline["RANK"], offline["WORLD_SIZE"]
    ended = run_script("search.py", str(sorted(synthetic_photos.rglob("*.jpg"))[0]), *index)
    assert ended.returncode == 0, ended.stderr
    assert "embedding the gallery" not in ended.stderr  # nothing was left to embed
    offline |= {"RANK": "3", "WORLD_SIZE": "3"}
    ended = run_script("search.py", *index)
    assert ended.returncode == 2
    assert "RANK is 3 and WORLD_SIZE 3: give whole numbers, RANK from 0 to WORLD_SIZE - 1" in ended.stderr


def test_a_vector_database_searches_one_class(run_script, trained, synthetic_photos, tmp_path):
    shutil.copytree(trained, tmp_path / "results", ignore=shutil.ignore_patterns("*.json", "*.png"))
    photo = str(sorted(synthetic_photos.rglob("*.jpg"))[0])
    for engine in (("--engine", "milvus", "--milvus", "new/photos.db"), ()):
        ended = run_script("search.py", photo, "--approach", "siamese", "--only", "dog", *engine)
        assert ended.returncode == 0, ended.stderr
        found = [line.split(maxsplit=2) for line in ended.stdout.splitlines() if line[:4].strip().isdecimal()]
        assert all(name.startswith("dog ") for _, _, name in found)
        if engine:
            expected = found
            assert "photos at new/photos.db: recall@10 " in ended.stdout
    assert found == expected


@pytest.mark.parametrize("approach", ["siamese", "autoencoder"])
def test_in_openvino_the_same_photos_are_found(run_script, trained, synthetic_photos, tmp_path, approach):
    """In float32 with the same similarities as torch, which rounds to bfloat16 where that is fast; in 8 bits with
    similar ones, as the network has hardly been trained."""
    photo = sorted((synthetic_photos / "dog").iterdir())[7]
    found = {}
    for inference in ("torch", "openvino", "int8"):
        flags = "--approach", approach, "--results", str(trained), "--inference", inference
        ended = run_script("search.py", str(photo), *flags, "--index", str(synthetic_photos), "--k", "3")
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        rows = [line.split() for line in ended.stdout.splitlines() if line[:4].strip().isdecimal()]
        found[inference] = {row[-1]: float(row[1]) for row in rows}
        assert len(rows) == 3
    rounding = 2e-3 if choose_precision(torch.device("cpu")) == torch.float32 else 2e-2
    assert found["openvino"] == pytest.approx(found["torch"], abs=rounding)
    assert sorted(found["int8"].values()) == pytest.approx(sorted(found["torch"].values()), abs=0.15)


def test_queries_are_checked_before_the_index(run_script, trained, synthetic_photos, tmp_path):
    index = ("--results", str(trained), "--index", str(synthetic_photos), "--approach", "siamese")
    (tmp_path / "broken.jpg").write_text("no photo")
    ended = run_script("search.py", "missing.jpg", "broken.jpg", *index)
    assert ended.returncode == 2
    assert "error: missing.jpg: No such file or directory: name a photo" in ended.stderr
    assert "error: broken.jpg: not a photo" in ended.stderr
    assert "error: none of the query photos can be used: see above" in ended.stderr
    assert "embedding" not in ended.stderr


def test_an_index_that_holds_the_query_alone(run_script, trained, synthetic_photos, tmp_path):
    (tmp_path / "mine").mkdir()
    photo = shutil.copy(next(synthetic_photos.rglob("*.jpg")), tmp_path / "mine" / "a.jpg")
    results = ("--approach", "siamese")
    (tmp_path / "results" / "search.png" / "in").mkdir(parents=True)  # in the way of the picture
    shutil.copy(trained / "siamese.pt", tmp_path / "results")
    ended = run_script("search.py", str(photo), "--index", "mine", *results)
    assert ended.returncode == 0, ended.stderr
    assert "there is no other photo to search" in ended.stdout
    assert "search.png can't be written: " in ended.stdout
    shutil.copy(sorted(synthetic_photos.rglob("*.jpg"))[-1], tmp_path / "mine" / "b.jpg")
    ended = run_script("search.py", str(photo), "--index", "mine", *results)
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("   1  "))
    assert line.split(maxsplit=2)[2].replace("\\", "/") == "mine/b.jpg"  # a flat folder is no class


def test_copies_in_a_folder_are_listed_and_kept(run_script, trained, synthetic_photos, tmp_path):
    (tmp_path / "mine").mkdir()
    photos = [shutil.copy(photo, tmp_path / "mine") for photo in sorted(synthetic_photos.rglob("*.jpg"))[::24]]
    options = ("--duplicates", "mine", "--results", "results", "--approach", "siamese")
    (tmp_path / "results").mkdir()
    shutil.copy(trained / "siamese.pt", tmp_path / "results")
    ended = run_script("search.py", *options)
    assert ended.returncode == 0, ended.stderr
    assert f"no copies among {len(photos)} photos" in ended.stdout
    assert not (tmp_path / "results" / "duplicates.csv").exists()
    with Image.open(photos[0]) as image:
        image.resize((image.width // 2, image.height // 2)).save(tmp_path / "mine" / "small.jpg", quality=60)
    shutil.copy(photos[0], tmp_path / "mine" / "again.jpg")
    before = sorted(path.name for path in (tmp_path / "mine").iterdir())
    ended = run_script("search.py", *options)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == before
    with (tmp_path / "results" / "duplicates.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["group"] for row in rows} == {"1"}
    original = f"mine/{Path(photos[0]).name}"
    paths = [row["path"].replace("\\", "/") for row in rows]
    assert paths == [*sorted(("mine/again.jpg", original)), "mine/small.jpg"]  # the largest file first
    assert [int(row["bytes"]) for row in rows] == [(tmp_path / path).stat().st_size for path in paths]
    assert [float(row["correlation"]) for row in rows[:2]] == [1, 1]
    extra = sum(int(row["bytes"]) for row in rows[1:]) / 1e6
    said = f"1 group of copies among {len(photos) + 2} photos: 2 beside the largest of each, {extra:.1f} MB"
    assert said in ended.stdout
    with Image.open(tmp_path / "results" / "duplicates.png") as picture:
        assert picture.height > 200
    ended = run_script("search.py", "--duplicates", "nowhere")
    assert ended.returncode == 2
    assert "nowhere is not a folder" in ended.stderr
