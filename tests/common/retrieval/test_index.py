import sys

import pytest

from common.config import RunConfig, UserError
from common.report.run import Run


def test_a_missing_package_of_the_engine_is_noticed_before_training(synthetic_photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    places = {"data": str(synthetic_photos), "results": str(tmp_path / "results"), "cache": "none"}
    with pytest.raises(UserError, match=r"faiss is missing: pip install -r requirements-extra\.txt"):
        Run.begin("x", RunConfig(engine="hnsw", **places), {})
    Run.begin("x", RunConfig(**places), {})
