import sys
from importlib import import_module

import pytest

from common.config import EngineConfig, UserError
from common.retrieval.loading import load_engine


def test_a_graph_finds_the_same_and_is_kept_beside_the_embeddings(trained, synthetic_photos, tmp_path, capsys):
    photo = next(synthetic_photos.rglob("*.jpg")).read_bytes()
    expected = load_engine("siamese", import_module, trained, "", None, "cpu").search(photo, 5)
    for _ in range(2):
        config = EngineConfig("hnsw", "int8")
        found = load_engine("siamese", import_module, trained, "", tmp_path, "cpu", config=config).search(photo, 5)
        assert found.indices == expected.indices
        assert found.similarities == pytest.approx(expected.similarities, abs=1e-6)
    assert len(list(tmp_path.rglob("graph.faiss"))) == 1
    assert capsys.readouterr().out.count("graph of 108 photos: recall@10 1.000") == 1  # measured when it is built


@pytest.mark.parametrize("engine", ["exact", "hnsw", "milvus"])
def test_one_class_alone(trained, synthetic_photos, tmp_path, plain_faiss, engine):
    photo = next(synthetic_photos.rglob("*.jpg")).read_bytes()
    config = EngineConfig(engine, graph_depth=500, milvus=str(tmp_path / "milvus.db"))  # more than there are photos
    every = load_engine("siamese", import_module, trained, "", tmp_path, "cpu", config=config)
    dogs = load_engine("siamese", import_module, trained, "", tmp_path, "cpu", config=config, only="dog")
    assert {dogs.gallery.class_name(index) for index in range(len(dogs.gallery))} == {"dog"}
    found, expected = dogs.search(photo, 50), every.search(photo, 107)
    expected = [every.gallery.path(i) for i in expected.indices if every.gallery.class_name(i) == "dog"]
    assert [dogs.gallery.path(index) for index in found.indices] == expected[:50]
    with pytest.raises(UserError, match="has no photos of a class bird: name one of cat, dog"):
        load_engine("siamese", import_module, trained, "", tmp_path, "cpu", config=config, only="bird")


def test_without_faiss_it_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"faiss is missing: pip install -r requirements-extra\.txt"):
        load_engine("siamese", import_module, trained, "", None, "cpu", config=EngineConfig("hnsw"))
