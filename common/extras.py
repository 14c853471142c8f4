"""Optional packages: the scripts run without them, extras need them."""

import importlib
from types import ModuleType

from common.config import UserError


def require(*names: str, file: str = "requirements-extra.txt") -> list[ModuleType]:
    """The modules of those names; raises `UserError` that says how to install a missing one."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(f"{error.name or names[0]} is missing: pip install -r {file}") from error
