"""What the tests of reading photos share."""

from pathlib import Path

import pytest


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that are read, as they are read."""
    names = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read_bytes(path))
    return names


@pytest.fixture
def denied(monkeypatch) -> set[str]:
    """The names of files that must not be read."""
    names = set()
    read_bytes = Path.read_bytes

    def read(path):
        if path.name in names:
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    return names
