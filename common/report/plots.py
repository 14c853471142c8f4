"""Plots, which need matplotlib."""

import importlib
from types import ModuleType

from common.extras import require


def load_pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing to files only; raises `UserError` if it is missing."""
    (matplotlib,) = require("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
