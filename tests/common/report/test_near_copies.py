"""Near-copies of photos on both sides of a split."""

import shutil

import pytest
from PIL import Image

from common.config import RunConfig
from common.data.folders import ALL
from common.data.photos import load_library
from common.data.split import load_split
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.report.run import Run
from common.retrieval.duplicates import count_near_copies, group_copies
from common.retrieval.exact import CosineKNN
from common.retrieval.loading import _run_gallery
from common.retrieval.protocol import RAW_PIXEL_PREPROCESSING, raw_pixel_embedder


@pytest.fixture
def folder(synthetic_photos, tmp_path):
    """Forty photos, each beside itself at half the size and another quality."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file in sorted((synthetic_photos / name).iterdir())[:20]:
            shutil.copy(file, tmp_path / "photos" / name / f"{file.stem}.a.jpg")
            with Image.open(file) as image:
                small = image.convert("RGB").resize((100, 100))
            small.save(tmp_path / "photos" / name / f"{file.stem}.b.jpg", quality=40)
    return tmp_path / "photos"


def begin(folder, **fields):
    options = {"data": str(folder), "results": str(folder.parent / "results"), "cache": "none", "device": "cpu"}
    return Run.begin("x", RunConfig(**{**options, **fields}), {})


def originals(photos):
    return {path.rsplit(".", 2)[0] for path in photos.paths}


def count(test):
    embedder = raw_pixel_embedder(None)
    _, neighbours = CosineKNN(embedder.embed_photos(test.gallery)).search(embedder.embed_photos(test.queries), 5)
    return count_near_copies(DecodedPhotos(RAW_PIXEL_PREPROCESSING, None), test, neighbours, 0.95)


def test_near_copies_are_counted_and_kept_on_one_side_if_asked(folder, capsys):
    split = begin(folder).load_photos()
    apart = originals(split.test.queries) & originals(split.test.gallery)
    assert len(apart) >= 5  # of eight queries
    assert count(split.test) >= len(apart)

    run = begin(folder, group_duplicates=True)
    split = run.load_photos(frozen=raw_pixel_embedder(None))
    assert f"{len(run.groups)} photos have near-copies, which stay on one side" in capsys.readouterr().out
    assert len(run.groups) >= 80
    assert len(split.test.queries) == 8
    assert originals(split.test.queries) & originals(split.test.gallery) == set()
    assert originals(split.validation) & originals(split.train) == set()
    assert count(split.test) == 0


def test_copies_of_queries_from_another_folder_leave_the_gallery(folder):
    embedder = raw_pixel_embedder(None)
    mine = folder.parent / "mine" / "cat"
    mine.mkdir(parents=True)
    chosen = sorted((folder / "cat").glob("*.b.jpg"))[3]
    shutil.move(chosen, mine / "query.jpg")
    split = load_split(folder, str(mine.parent), "test", 0, group=lambda parts: group_copies(parts, embedder, 0.95))
    assert len(load_split(folder, str(mine.parent), "test", 0).test.gallery) == 79
    assert chosen.name.replace(".b.", ".a.") not in {path.split("/")[1] for path in split.test.gallery.paths}


def test_the_gallery_of_a_checkpoint_is_that_of_its_run(folder):
    run = begin(folder, group_duplicates=True)
    split = run.load_photos(frozen=raw_pixel_embedder(None))
    run.new_checkpoint(split.train, RAW_PIXEL_PREPROCESSING, {}).save(folder.parent / "x.pt")
    checkpoint = Checkpoint.load(folder.parent / "x.pt")
    assert _run_gallery(load_library(folder), checkpoint, None, ALL).paths == split.test.gallery.paths
    checkpoint.groups = {}
    assert _run_gallery(load_library(folder), checkpoint, None, ALL).paths != split.test.gallery.paths
