"""Files that carry code, in every place where a script looks for one of its own."""

import io
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.robustness.runs import HOSTILE_NAMES, SMALL, command, slowly


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def saved_by_torch(payload):
    buffer = io.BytesIO()
    torch.save({"network": payload, "schema": 5}, buffer)
    return buffer.getvalue()


def saved_by_torch_before_1_6(payload):
    buffer = io.BytesIO()
    torch.save({"network": payload}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def array_of_objects(payload):
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], object), allow_pickle=True)
    return buffer.getvalue()


def archive_of_objects(payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("sha256.npy", "precision@5.npy", "archive/data.pkl", "data.pkl"):
            archive.writestr(name, array_of_objects(payload) if name.endswith(".npy") else pickle.dumps(payload))
    return buffer.getvalue()


KINDS = (pickle.dumps, saved_by_torch, saved_by_torch_before_1_6, array_of_objects, archive_of_objects)


@pytest.mark.parametrize("make", KINDS)
def test_the_payload_works(make, tmp_path):
    """Where code is run, its file appears: otherwise the tests below would see nothing."""
    data = make(Payload(tmp_path / "executed"))
    if make is archive_of_objects:
        data = zipfile.ZipFile(io.BytesIO(data)).read("sha256.npy")
    if make in (saved_by_torch, saved_by_torch_before_1_6):
        torch.load(io.BytesIO(data), weights_only=False)
    elif data.startswith(b"\x93NUMPY"):
        np.load(io.BytesIO(data), allow_pickle=True)
    else:
        pickle.loads(data)
    assert (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def whole(forks, few_photos, tmp_path_factory):
    """A folder with everything that scripts leave: results, caches, a graph, an 8-bit network."""
    folder = tmp_path_factory.mktemp("whole")
    for arguments in (command("siamese", few_photos), search(few_photos), quantized(few_photos)):
        ended = forks.run(arguments, folder)
        assert ended.returncode == 0, ended.stderr
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds >= {".pt", ".json", ".npz", ".npy", ".csv", ".png", ".faiss", ".xml", ".bin", ".txt"}
    return folder


def search(photos):
    query = str(next(photos.rglob("*.jpg")))
    return (str(ROOT / "search.py"), query, "--index", str(photos), "--engine", "hnsw", "--approach", "siamese")


def quantized(photos):
    query = str(next(photos.rglob("*.jpg")))
    return (str(ROOT / "search.py"), query, "--index", str(photos), "--inference", "int8", "--approach", "siamese")


@pytest.mark.parametrize("make", [saved_by_torch, *slowly(*(kind for kind in KINDS if kind is not saved_by_torch))])
def test_no_file_that_carries_code_is_executed(make, whole, forks, few_photos, tmp_path):
    folder, executed = tmp_path / "run", tmp_path / "executed"
    payload = make(Payload(executed))
    shutil.copytree(whole, folder)
    (folder / "weights.pth").write_bytes(payload)
    for path in (folder / "data").rglob("*"):  # first with a network that fits: the caches are opened
        if path.is_file() and path.name != "key.txt":
            path.write_bytes(payload)
    for arguments in (search(few_photos), quantized(few_photos), command("siamese", few_photos)):
        ended = forks.run(arguments, folder)
        assert ended.returncode in (0, 2), ended.stderr
        assert "Traceback" not in ended.stderr
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(payload)
    weights = ("--weights", "weights.pth", *SMALL[2:], "--data", str(few_photos), "--results", "other")
    for arguments in (
        search(few_photos),
        command("siamese", few_photos),
        (str(ROOT / "compare.py"),),
        (str(ROOT / "cnn_feature_extraction.py"), *weights),
        (str(ROOT / "search.py"), "results/search.png", "--index", "results", "--approach", "siamese"),
    ):
        ended = forks.run(arguments, folder)
        assert ended.returncode == 2, ended.stdout
        assert ended.stderr.count("error: ") >= 1
        assert "Traceback" not in ended.stderr
    assert not executed.exists()


@pytest.mark.skipif(os.name == "nt", reason="such names can't be made there")
def test_names_are_never_more_than_names(forks, few_photos, tmp_path):
    photos = [path.read_bytes() for path in sorted(few_photos.rglob("*.jpg"))]
    for number, name in enumerate(HOSTILE_NAMES):
        place = tmp_path / "photos" / ("<b>cat" if number % 2 else "dog\n| x")
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(photos[number])
    (tmp_path / "photos" / "x.jpg").mkdir()
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    ended = forks.run((str(ROOT / "cnn_feature_extraction.py"), "--data", "photos", *SMALL), tmp_path)
    assert ended.returncode == 0, ended.stderr
    search_all = (str(ROOT / "search.py"), "photos", "--index", "photos", "--k", "20")
    found = forks.run((*search_all, "--approach", "cnn_feature_extraction"), tmp_path)
    assert found.returncode == 0, found.stderr
    compared = forks.run((str(ROOT / "compare.py"),), tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "Traceback" not in ended.stderr + found.stderr + compared.stderr
    printed = ended.stdout + found.stdout + compared.stdout
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    lines = "".join(path.read_text() for path in (tmp_path / "results").glob("left_out*.csv"))
    assert "pipe.jpg" in lines
