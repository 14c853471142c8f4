"""Who can open a page that is served here."""

import os
import re

from common.config import UserError

PASSWORD = "PAGE_AUTH"  # the environment variable with the name and password that other machines must give


def required_password(host: str) -> tuple[str, str] | None:
    """The name and password in the environment, None if there are none; raises `UserError` if `host` needs them."""
    name, _, password = os.environ.get(PASSWORD, "").partition(":")
    if name and password:
        return name, password
    if host == "localhost" or re.fullmatch(r"127(\.\d+){3}|::1", host):
        return None
    raise UserError(
        f"--host {host} shows the photos to every machine that reaches this one: set {PASSWORD}=name:password in the "
        "environment first, which they must give"
    )


def bypass_proxy(host: str) -> None:
    """The page calls itself as it starts: not through a proxy, which would look for it on its own machine."""
    own = ("127.0.0.1", "localhost", "::1", host)
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *own)))
