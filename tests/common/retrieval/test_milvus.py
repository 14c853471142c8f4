"""On Milvus Lite, and the same tests once more on a server: that at MILVUS_ADDRESS, or one that is started here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.config import EngineConfig, UserError
from common.data.file_hashes import hash_content
from common.data.photos import Photos
from common.retrieval import milvus as module
from common.retrieval.exact import CosineKNN, normalize
from common.retrieval.index import build_index, describe_quality, require_engine
from common.retrieval.milvus import connect

DIM = 16


ADDRESS = os.environ.get("MILVUS_ADDRESS")


@pytest.fixture
def config(tmp_path, plain_faiss):
    """Of a collection of its own."""
    name = "test_" + hash_content(str(tmp_path).encode()).decode()[:16]
    config = EngineConfig("milvus", graph_depth=200, milvus=ADDRESS or str(tmp_path / "photos.db"), collection=name)
    yield config
    connect(config).drop_collection(name)


@pytest.mark.skipif(bool(ADDRESS), reason="this is the run on a server")
@pytest.mark.skipif(not importlib.util.find_spec("milvus"), reason="the package milvus is for Linux on x86-64")
@pytest.mark.full
def test_the_same_on_a_server(tmp_path):
    from milvus import MilvusServer

    server = MilvusServer()  # one for all tests, as two don't run on one machine
    server.config.set("authorization_enabled", True)
    server.set_base_dir(str(tmp_path / "server"))
    server.start()
    try:
        address = f"http://127.0.0.1:{server.listen_port}"
        with pytest.raises(UserError, match=f"^Milvus at {address}: .* is MILVUS_TOKEN its token"):
            connect(EngineConfig("milvus", milvus=address))
        environment = {**os.environ, "MILVUS_ADDRESS": address, "MILVUS_TOKEN": "root:Milvus"}
        command = [sys.executable, "-m", "pytest", "-n0", "-rs", __file__]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        server.stop()
    assert ended.returncode == 0, ended.stdout
    assert "[1] " in ended.stdout  # skipped: this test alone


class StoredEmbedder:
    """Embeddings that are there already."""

    approach, digest, dim = "siamese", "weights 1", DIM

    def __init__(self, sha256: np.ndarray, embeddings: np.ndarray) -> None:
        self.embeddings = dict(zip(sha256.tolist(), embeddings, strict=True))

    def open_photos(self, photos: Photos) -> np.ndarray:
        return np.stack([self.embeddings[key] for key in photos.sha256.tolist()])


@pytest.fixture(scope="module")
def vectors():
    """660 photos in 40 groups."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, DIM))
    return normalize(centers[rng.integers(40, size=660)] + 0.5 * rng.normal(size=(660, DIM)))


@pytest.fixture(scope="module")
def photos():
    """600 photos of two classes."""
    sha256 = np.array([hash_content(b"%d" % number) for number in range(600)], "S64")
    paths = [f"{number}.jpg" for number in range(600)]
    return Photos(Path("pets"), "pets", paths, np.arange(600) % 2, ['a "cat" \\', "Hündchen"], sha256)


@pytest.fixture
def embedder(photos, vectors):
    return StoredEmbedder(photos.sha256, vectors[:600])


def ids_in(config: EngineConfig) -> set[str]:
    found = connect(config).query(config.collection, "id != ''", output_fields=["id"], consistency_level="Strong")
    return {entry["id"] for entry in found}


def test_neighbours_are_those_of_the_exact_search_with_its_similarities(config, photos, embedder, vectors, capsys):
    index = build_index(photos, embedder, config)
    assert index.is_new
    exact, queries = CosineKNN(vectors[:600]), vectors[600:]
    similarities, indices = index.search(queries, 10)
    expected, expected_indices = exact.search(queries, 10)
    assert (indices == expected_indices).mean() > 0.99
    assert similarities == pytest.approx((vectors[indices] * queries[:, None]).sum(axis=2), abs=1e-6)
    for arguments in ((vectors[:3], 5, np.arange(3)), (queries[:2], 600)):
        assert index.search(*arguments)[0] == pytest.approx(exact.search(*arguments)[0], abs=1e-6)
    described = describe_quality(index, queries, None, config)
    assert described["engine"] == "milvus"
    assert described["recall@10"] == pytest.approx((similarities >= expected[:, -1:] - 1e-6).mean())
    assert f"collection {config.collection} of 600 photos at {config.milvus}: recall@10 " in capsys.readouterr().out


def test_each_start_inserts_and_deletes_what_has_changed_alone(config, photos, embedder, vectors, monkeypatch):
    monkeypatch.setattr(module, "SENT_BYTES", 150 * 4 * DIM)
    monkeypatch.setattr(module, "IDS_AT_A_TIME", 50)
    sent = []
    client = type(connect(config))
    upsert = client.upsert

    def upsert_three_times(self, name, rows, **options):
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(len(rows))
        return upsert(self, name, rows, **options)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(client, "upsert", upsert_three_times)
        with pytest.raises(KeyboardInterrupt):
            build_index(photos, embedder, config)
    assert sent == [150] * 3
    monkeypatch.setattr(client, "upsert", lambda *given: sent.append(len(given[2])) or upsert(*given))
    build_index(photos, embedder, config)
    assert sent == [150] * 4  # it went on where it was interrupted
    assert not build_index(photos, embedder, config).is_new
    assert sent == [150] * 4

    order = np.random.default_rng(1).permutation(np.arange(200, 600))
    fewer = photos.subset(order)
    index = build_index(fewer, embedder, config)
    assert sent == [150] * 4
    assert ids_in(config) == {key.decode() for key in fewer.sha256}
    found, expected = (each.search(vectors[600:], 5)[1] for each in (index, CosineKNN(vectors[order])))
    assert (found == expected).mean() > 0.99

    fewer.labels[:7] = 1 - fewer.labels[:7]  # moved to the other folder
    build_index(fewer, embedder, config)
    assert sent == [*[150] * 4, 7]


def test_a_class_alone(config, photos, embedder, vectors):
    for number, name in enumerate(photos.classes):
        index = build_index(photos, embedder, config, name)
        assert index.is_new == (number == 0)
        found, expected = (
            each.search(vectors[600:], 8) for each in (index, CosineKNN(vectors[:600][photos.labels == number]))
        )
        assert (found[1] == expected[1]).mean() > 0.99
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert len(ids_in(config)) == 600
    with pytest.raises(UserError, match="pets has no photos of a class bird: name one of"):
        build_index(photos, embedder, config, "bird")


def test_byte_identical_photos_are_all_found(config, photos, embedder, vectors):
    twins = photos.subset(np.r_[np.arange(100), 3, 3])
    index = build_index(twins, embedder, config)
    assert index.search(vectors[3:4], 3)[1].tolist() == [[3, 100, 101]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"approach": "triplet", "digest": "weights 2"},
            "holds other embeddings than these (another approach, network)",
        ),
        ({"dim": 8}, "holds other embeddings than these (another dimension)"),
    ],
)
def test_a_collection_of_other_embeddings_is_refused(config, photos, embedder, change, message):
    build_index(photos, embedder, config)
    other = StoredEmbedder(photos.sha256, np.stack(list(embedder.embeddings.values()))[:, : change.get("dim", DIM)])
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(UserError, match="name another one with --collection") as raised:
        build_index(photos, other, config)
    assert message in str(raised.value)
    assert len(ids_in(config)) == 600


def test_a_collection_that_something_else_made_is_refused(config, photos, embedder):
    client = connect(config)
    client.create_collection(config.collection, dimension=DIM)
    with pytest.raises(UserError, match="not made by this program"):
        build_index(photos, embedder, config)


def test_collections_are_named_after_network_and_folder(photos, embedder, tmp_path, plain_faiss):
    names = set()
    config = EngineConfig("milvus", milvus=str(tmp_path / "new" / "photos.db"))
    names.add(build_index(photos, embedder, config).collection)
    embedder.digest = "weights 2"
    names.add(build_index(photos, embedder, config).collection)
    elsewhere = Photos(tmp_path, "pets", photos.paths, photos.labels, photos.classes, photos.sha256)
    names.add(build_index(elsewhere, embedder, config).collection)
    assert len(names) == 3
    assert all(name.startswith("siamese_") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"milvus": "photos.sqlite"},
            "milvus is photos.sqlite: give the address of a server, http://host:19530, or",
        ),
        ({"milvus": "http://root:secret@host:19530"}, "leave that out, and put user:password into MILVUS_TOKEN"),
        ({"milvus": "http://127.0.0.1:9"}, "Milvus at http://127.0.0.1:9: Fail connecting to server"),
        ({"collection": "my photos"}, "collection is my photos: give letters, digits and _, a letter first"),
    ],
)
def test_one_clear_sentence_before_training(monkeypatch, options, message):
    monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
    with pytest.raises(UserError) as raised:
        require_engine(EngineConfig("milvus", **options))
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_token_goes_to_the_server_and_nowhere_else(monkeypatch):
    import pymilvus

    def refuse(self, address, token):
        raise pymilvus.MilvusException(1100, f"{address} refuses {token}, as {token.split(':')[1]} is wrong")

    monkeypatch.setenv("MILVUS_TOKEN", "root:hunter2")
    monkeypatch.setattr(pymilvus.MilvusClient, "__init__", refuse)
    with pytest.raises(UserError) as raised:
        connect(EngineConfig("milvus", milvus="http://127.0.0.1:19530"))
    assert "http://127.0.0.1:19530 refuses ***, as *** is wrong" in str(raised.value)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UserError, match=r"pymilvus is missing: pip install -r requirements-extra.txt"):
        require_engine(EngineConfig("milvus"))
