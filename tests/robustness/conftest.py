from pathlib import Path

import pytest

from common.data.synthetic import draw_dataset


@pytest.fixture(scope="session")
def few_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 synthetic images; not to be written to."""
    return draw_dataset(tmp_path_factory.mktemp("few") / "photos", count=32, seed=2)
