"""The gallery that a checkpoint searches is the one that its run searched."""

import dataclasses
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import siamese
from common.config import UserError
from common.data.photos import load_photos
from common.data.split import load_split
from common.models.checkpoint import Checkpoint
from common.models.preprocessing import Preprocessing
from common.report.run import Run
from common.retrieval.loading import load_engine


def load(approach, results):
    return load_engine(approach, import_module, results, "", None, "cpu")


def test_a_gallery_with_a_relative_path_is_found_from_another_folder(trained, synthetic_photos, tmp_path, monkeypatch):
    stored = Checkpoint.load(trained / "siamese.pt")
    monkeypatch.chdir(synthetic_photos.parents[1])
    relative = f"{synthetic_photos.parent.name}/{synthetic_photos.name}"
    config = siamese.Config(data=relative, results=str(tmp_path), cache="none", device="cpu")
    run = Run.begin("siamese", config, {})
    preprocessing = Preprocessing.from_dict(stored.preprocessing)
    checkpoint = run.new_checkpoint(load_photos(run.folder), preprocessing, stored.model)
    checkpoint.config, checkpoint.network = stored.config, stored.network
    checkpoint.save(run.checkpoint_path)
    monkeypatch.chdir(tmp_path)
    engine = load("siamese", tmp_path)
    assert len(engine.gallery) == 108
    assert engine.search(engine.gallery.read(5), 3).exact_duplicates == [5]


def test_where_queries_had_a_folder_of_their_own_their_copies_leave_the_gallery(trained, synthetic_photos, tmp_path):
    stored = Checkpoint.load(trained / "siamese.pt")
    queries = tmp_path / "queries"
    dataclasses.replace(stored, queries=str(queries)).save(tmp_path / "siamese.pt")
    assert len(load("siamese", tmp_path).gallery) == 120  # the folder is gone
    (queries / "cat").mkdir(parents=True)
    assert len(load("siamese", tmp_path).gallery) == 120  # or empty
    for path in sorted((synthetic_photos / "cat").iterdir())[:10]:
        shutil.copy(path, queries / "cat")
    shutil.copy(next((synthetic_photos / "dog").iterdir()), queries / "stray.jpg")  # of no class: no query
    expected = load_split(synthetic_photos, str(queries), "test", 0, labelled=True).test.gallery
    gallery = load("siamese", tmp_path).gallery
    assert gallery.paths == expected.paths
    assert len(gallery) == 110


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_gallery_is_that_of_the_run(trained, synthetic_photos, tmp_path, split):
    """Also where photos of no class lie beside the others, and where the queries were cut from the gallery."""
    pets = Path(shutil.copytree(synthetic_photos, tmp_path / "pets"))
    Image.new("RGB", (64, 64), "red").save(pets / "stray.jpg")
    checkpoint = Checkpoint.load(trained / "siamese.pt")
    config = {**checkpoint.config, "split": split}
    dataclasses.replace(checkpoint, folder=str(pets), config=config).save(tmp_path / "siamese.pt")
    expected = load_split(pets, "", split, config["seed"]).test.gallery
    gallery = load("siamese", tmp_path).gallery
    assert gallery.paths == expected.paths
    assert "stray.jpg" not in gallery.paths
    assert gallery.classes == ["cat", "dog"]
    assert gallery.labels.tolist() == expected.labels.tolist()


def test_the_gallery_of_unseen_classes_and_of_no_classes(trained, synthetic_photos, tmp_path):
    pets = Path(shutil.copytree(synthetic_photos / "cat", tmp_path / "pets" / "cat")).parent
    for number, path in enumerate(sorted((pets / "cat").iterdir())):
        folder = pets / "abcde"[number % 5]
        folder.mkdir(exist_ok=True)
        path.rename(folder / f"{number}.jpg")
    (pets / "cat").rmdir()
    Image.new("RGB", (64, 64), "red").save(pets / "stray.jpg")
    checkpoint = Checkpoint.load(trained / "siamese.pt")
    for fields, size in (({"split": "unseen"}, 24), ({"labelled": False}, 55)):  # two of five classes; 90 % of 61
        config = {**checkpoint.config, **fields}
        dataclasses.replace(checkpoint, folder=str(pets), config=config).save(tmp_path / "siamese.pt")
        expected = load_split(pets, "", config["split"], config["seed"], labelled=config["labelled"]).test.gallery
        gallery = load("siamese", tmp_path).gallery
        assert gallery.paths == expected.paths
        assert gallery.classes == expected.classes
        assert len(gallery) == size


def test_a_gallery_that_is_gone(trained, tmp_path):
    stored = Checkpoint.load(trained / "siamese.pt")
    dataclasses.replace(stored, folder=str(tmp_path / "gone")).save(tmp_path / "siamese.pt")
    with pytest.raises(UserError, match=r"the gallery of siamese\.py, .*gone, is gone: name a folder .* --index"):
        load("siamese", tmp_path)


def test_a_gallery_that_has_shrunk_since_training_is_searched_whole(trained, synthetic_photos, tmp_path, capsys):
    pets, results = tmp_path / "pets", tmp_path / "results"
    shutil.copytree(synthetic_photos, pets)
    for path in [*sorted((pets / "cat").iterdir())[1:], *sorted((pets / "dog").iterdir())[1:]]:
        path.unlink()
    checkpoint = Checkpoint.load(trained / "siamese.pt")
    dataclasses.replace(checkpoint, folder=str(pets)).save(results / "siamese.pt")
    engine = load("siamese", results)
    assert len(engine.gallery) == 2
    assert "searching all photos, the queries of the run too: " in capsys.readouterr().out
