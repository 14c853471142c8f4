import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "distributed_worker.py"
APPROACHES = ("siamese", "triplet", "cnn_feature_extraction", "autoencoder")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def started(forks, folder, count, *arguments):
    """The processes of a run, which meet as those that torchrun starts."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    everywhere = {**os.environ, "PYTHONPATH": str(ROOT)}
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = []
    for rank in map(str, range(count)):
        log = folder / f"{rank}.log"
        own = everywhere | (place | {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {})
        processes.append(forks.start(arguments, folder, log, log, own))
    return processes


def ended(forks, folder, count, *arguments):
    """Lets a run end well."""
    processes = started(forks, folder, count, *arguments)
    assert [forks.wait(each) for each in processes] == [0] * count, (folder / "0.log").read_text()
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, forks):
    return ended(forks, tmp_path_factory.mktemp("one"), 1, str(WORKER), ".")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_several_processes_train_as_one_does(one_process, forks, tmp_path, count):
    ended(forks, tmp_path, count, str(WORKER), ".")
    for approach in APPROACHES:
        one, several = (torch.load(folder / f"{approach}.pt", weights_only=True) for folder in (one_process, tmp_path))
        assert one["network"].keys() == several["network"].keys()
        for name, tensor in one["network"].items():
            difference = (tensor.double() - several["network"][name].double()).abs().max()
            assert difference < 1e-6, (approach, name)
        for name in one["history"][0].keys() - {"seconds", "photos_per_second"}:
            assert several["history"][0][name] == pytest.approx(one["history"][0][name], abs=1e-6), (approach, name)


def test_a_script_started_by_torchrun(run_script, forks, few_photos, tmp_path):
    """Both processes end well, one of them writes, and the result is that of a single process."""
    options = ("--data", str(few_photos), "--backbone", "squeezenet1_1", "--weights", "none", "--epochs", "1")
    sizes = ("--image-size", "64", "--view-size", "48", "--batch-size", "16")
    alone = run_script("siamese.py", *options, *sizes, "--results", "alone", "--cache", "cache1")
    command = (*TORCHRUN, str(ROOT / "siamese.py"), *options, *sizes, "--results", "together", "--cache", "cache2")
    together = forks.run(command, tmp_path)
    losses = []
    for name, ended in (("alone", alone), ("together", together)):
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("written: ") == 1
        result = json.loads((tmp_path / name / "siamese.json").read_text())
        losses.append(result["history"][0]["loss"])
        assert result["timing"]["query_latency_ms"]["queries"] == (20 if name == "alone" else 200)  # see Forks
        assert result["metrics"]["precision@5"]["value"] > 0.3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_killed_process_ends_the_run(forks, synthetic_photos, tmp_path):
    options = ("--data", str(synthetic_photos), "--backbone", "squeezenet1_1", "--weights", "none", "--epochs", "500")
    sizes = ("--image-size", "64", "--view-size", "48", "--batch-size", "16", "--results", str(tmp_path))
    first, second = started(forks, tmp_path, 2, str(ROOT / "siamese.py"), *options, *sizes)
    checkpoint = tmp_path / "siamese.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(second, signal.SIGKILL)
    assert forks.wait(first) == 2
    errors = (tmp_path / "0.log").read_text()
    assert "another process of this run was lost" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "15"), "batch_size is 15: give a multiple of the number of processes, 2"),
        ((), "processes that train together need an address to meet at: start them with torchrun"),
    ],
)
def test_one_clear_sentence(run_script, offline, synthetic_photos, arguments, message):
    offline |= {"RANK": "0", "WORLD_SIZE": "2"}
    options = ("--data", str(synthetic_photos), "--weights", "none", "--image-size", "64", "--view-size", "48")
    ended = run_script("autoencoder.py", *options, "--feature-weight", "0", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
