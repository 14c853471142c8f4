import pytest
import torch

from common import device
from common.config import UserError
from common.device import choose_device, choose_precision, choose_product_precision, one_thread_each

CPU = torch.device("cpu")


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="no device 'abacus'"):
        choose_device("abacus")
    assert choose_precision(CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "cpu", "convolutions", "products"),
    [
        (False, False, "AMD EPYC", torch.float32, torch.float32),
        (False, True, "AMD EPYC", torch.bfloat16, torch.bfloat16),
        (False, True, "Intel Xeon", torch.float32, torch.bfloat16),
        (True, True, "Intel Xeon", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_is_what_the_units_are_fast_in(monkeypatch, amx, avx512_bf16, cpu, convolutions, products):
    monkeypatch.setattr(device, "_bfloat16_units", lambda: (amx, avx512_bf16))
    monkeypatch.setattr(device, "cpu_name", lambda: cpu)
    assert choose_precision(CPU) == convolutions
    assert choose_product_precision() == products


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread_each() as threads:
        assert threads == before
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
