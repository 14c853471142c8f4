"""Packages that the scripts go without, and that what comes on top of them needs."""

import importlib
from types import ModuleType

from common.config import UserError


def require(*names: str, file: str = "requirements-extra.txt") -> list[ModuleType]:
    """The modules of those names; raises `UserError` that says how to install them."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(f"{error.name or names[0]} is missing: pip install -r {file}") from error


def figures() -> ModuleType:
    """matplotlib's pyplot, which draws into files alone; raises `UserError` if it is missing."""
    (matplotlib,) = require("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
