import os
from urllib.request import proxy_bypass

import pytest

from common.config import UserError
from common.serving import bypass_proxy, required_password


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_this_machine_alone_needs_no_password(monkeypatch, host):
    monkeypatch.delenv("PAGE_AUTH", raising=False)
    assert required_password(host) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "localhost.example.org", "127.0.0.1.nip.io"])
def test_other_machines_need_a_password(monkeypatch, host):
    for incomplete in ("", "anna", "anna:", ":secret"):
        monkeypatch.setenv("PAGE_AUTH", incomplete)
        with pytest.raises(UserError, match=rf"--host {host} shows the photos .* set PAGE_AUTH=name:password") as error:
            required_password(host)
        assert "secret" not in str(error.value)
    monkeypatch.setenv("PAGE_AUTH", "anna:se:cret")
    assert required_password(host) == ("anna", "se:cret")


def test_a_proxy_is_bypassed_for_this_machine_alone(monkeypatch):
    monkeypatch.setenv("no_proxy", "intranet.example")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    bypass_proxy("0.0.0.0")
    assert os.environ["no_proxy"].split(",") == ["intranet.example", "127.0.0.1", "localhost", "::1", "0.0.0.0"]
    assert proxy_bypass("127.0.0.1:7860")
    assert proxy_bypass("intranet.example")
    assert not proxy_bypass("download.pytorch.org")
