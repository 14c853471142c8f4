import ast
import os
import subprocess
import sys

import pytest
import torch

from common import device
from common.config import UserError
from common.device import (
    FreeCores,
    autocast,
    choose_device,
    choose_precision,
    choose_product_precision,
    constant,
    limit_torch_threads,
)
from tests.conftest import ROOT

CPU = torch.device("cpu")


def test_a_device_is_chosen_by_name():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "hpu", "privateuseone", "xla"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(UserError, match=rf"no device '{name}' here \(.+\): try --device auto") as caught:
        choose_device(name)
    assert len(str(caught.value)) < 250


def test_auto_takes_the_fastest_device(monkeypatch):
    monkeypatch.setattr(device, "_working_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


def test_auto_passes_over_a_card_that_cannot_compute(monkeypatch, capsys):
    def ones(*shape, device):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel ...")
        return torch.full(shape, 1.0)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert capsys.readouterr().out == (
        "there is no device 'cuda' here (CUDA error: no kernel image is available for execution on the device): "
        "computing on the CPU instead\n"
    )


def test_constants_are_made_once_and_let_gradients_pass():
    with torch.inference_mode():
        made = constant(((1.0, 2.0), (3.0, 4.0)), CPU)
    assert made.tolist() == [[1, 2], [3, 4]]
    assert constant(((1.0, 2.0), (3.0, 4.0)), CPU) is made
    weight = torch.ones(2, 2, requires_grad=True)
    (weight * made).sum().backward()
    assert weight.grad.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "cpu", "convolutions", "products"),
    [
        (False, False, "AMD EPYC", torch.float32, torch.float32),
        (False, True, "AMD EPYC", torch.bfloat16, torch.bfloat16),
        (False, True, "Intel Xeon", torch.float32, torch.bfloat16),
        (True, True, "Intel Xeon", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_is_what_the_matrix_units_of_a_cpu_are_fast_in(
    monkeypatch, amx, avx512_bf16, cpu, convolutions, products
):
    monkeypatch.setattr(device, "_bfloat16_units", lambda: (amx, avx512_bf16))
    monkeypatch.setattr(device, "cpu_name", lambda: cpu)
    assert choose_precision(CPU) == convolutions
    assert choose_product_precision() == products


def test_precision_of_this_cpu():
    assert choose_precision(CPU) in (torch.float32, torch.bfloat16)
    assert choose_product_precision() in (torch.float32, torch.bfloat16)


def test_autocast_is_on_for_16_bits_only():
    matrix = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with autocast(CPU, precision):
            assert (matrix @ matrix).dtype == precision


def test_threads_wait_without_keeping_a_core_busy():
    """Unless the user says otherwise."""

    def wait(**environment):
        code = (
            "import os, common; print({name: os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')})"
        )
        clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True)
        return ast.literal_eval(ended.stdout)

    assert wait() == {"GOMP_SPINCOUNT": "10000", "OMP_WAIT_POLICY": None}
    assert wait(GOMP_SPINCOUNT="7") == {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": None}
    assert wait(OMP_WAIT_POLICY="active") == {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "active"}


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), limit_torch_threads() as threads:
        assert threads == before
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Of four cores, 100 ticks a second: a function that says what was taken until then, and by this program."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "CPU_TIMES", tmp_path / "stat")
    monkeypatch.setattr(device, "num_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(device.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def taken(clock, user=0, nice=0, system=0, interrupts=0, own=0):
        monkeypatch.setattr(device.time, "perf_counter", lambda: 1000.0 + clock)
        monkeypatch.setattr(device.time, "process_time", lambda: 20.0 + own)
        text = f"cpu  {5000 + user} {nice} {system} 99999 50 {interrupts} 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
        (tmp_path / "stat").write_text(text)

    taken(0)
    return taken


def test_threads_leave_cores_to_other_programs(machine):
    cores = FreeCores()
    machine(0.5, user=100, own=0.5)
    assert cores.choose() == 3
    machine(1, user=100)
    assert cores.choose() == 4  # as torch has now: it looks every two seconds
    machine(10.5, user=3100, own=20.5)  # 30 s of cores in 10 s, 20 of them its own
    assert cores.choose() == 3
    machine(20.5, user=5100, nice=200, system=500, interrupts=300, own=25.5)  # 30 more, 5 of them its own
    assert cores.choose() == 2  # 2.5 are taken by others
    machine(30.5, user=9000, nice=200, system=500, interrupts=300, own=25.5)
    assert cores.choose() == 1
    machine(40.5, user=9000, nice=200, system=500, interrupts=300, own=25.5)
    assert cores.choose() == 4


@pytest.mark.parametrize("reason", ["set", "container", "not Linux", "one"])
def test_the_number_of_threads_stays(machine, monkeypatch, tmp_path, reason):
    if reason == "set":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    elif reason == "container":
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
    elif reason == "one":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads = torch.get_num_threads()
    if reason == "not Linux":
        monkeypatch.setattr(device, "CPU_TIMES", tmp_path / "nowhere")
    cores = FreeCores()
    machine(10, user=4000)
    assert cores.choose() == threads
