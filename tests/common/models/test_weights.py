import hashlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from torchvision import models

from common.config import UserError
from common.models.backbones import load_backbone, load_classifier
from common.models.embedder import network_digest
from common.models.weights import load_weights

PUBLISHED = models.SqueezeNet1_1_Weights.IMAGENET1K_V1


def load(name, weights, untrained_if_missing=False):
    return load_weights(name, weights, untrained_if_missing)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "mine.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def change(path, edit):
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def test_no_weights():
    network, weights = load("squeezenet1_1", "none")
    assert weights == "none (untrained)"
    assert network.classifier[1].out_channels == 1000


def test_weights_from_a_file(saved):
    network, weights = load("squeezenet1_1", str(saved))
    assert weights == f"mine.pth, sha256 {hashlib.sha256(saved.read_bytes()).hexdigest()[:12]}"
    state = torch.load(saved, weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_missing_unknown_and_misshapen_keys_are_named(saved):
    change(saved, lambda state: state.pop("features.0.bias"))
    with pytest.raises(UserError, match=r"mine.pth does not fit squeezenet1_1: it lacks features.0.bias. Name"):
        load("squeezenet1_1", str(saved))
    change(saved, lambda state: state.update({"features.0.bias": torch.zeros(3), "features.99.bias": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"has unknown features.99.bias; has another shape for features.0.bias"):
        load("squeezenet1_1", str(saved))
    with pytest.raises(UserError, match=r"does not fit resnet18: it lacks bn1.bias, .* more; has unknown .* more"):
        load("resnet18", str(saved))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model_state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {f"model.backbone.{key}": value for key, value in state.items()} | {"head.bias": torch.ones(2)},
        lambda state: {key: value for key, value in state.items() if not key.startswith("classifier")},
        lambda state: state | {"classifier.1.weight": torch.ones(37, 512, 1, 1), "classifier.1.bias": torch.ones(37)},
    ],
    ids=["state_dict", "model", "DataParallel", "compiled", "part of another", "without classifier", "37 classes"],
)
def test_networks_that_users_have_trained(saved, wrap):
    state = torch.load(saved, weights_only=True)
    torch.save(wrap(state), saved)
    network, _ = load("squeezenet1_1", str(saved))
    loaded = network.features.state_dict()
    assert all(torch.equal(tensor, state[f"features.{name}"]) for name, tensor in loaded.items())
    has_classifier = load_classifier("squeezenet1_1", str(saved)) is not None
    assert has_classifier == torch.equal(network.classifier[1].weight, state["classifier.1.weight"])


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "densenet121", "googlenet"])
def test_a_checkpoint_of_a_script(tmp_path, capsys, name):
    """Its backbone, whose children some networks number, below two further names."""
    backbone = load_backbone(name, "none").network
    with torch.no_grad():
        next(backbone.parameters()).fill_(0.25)
    state = {f"network.backbone.{key}": value for key, value in backbone.state_dict().items()}
    torch.save(
        {"approach": "siamese", "network": state | {"classifier.directions": torch.ones(2, 8)}}, tmp_path / "s.pt"
    )
    again = load_backbone(name, str(tmp_path / "s.pt")).network
    assert all(torch.equal(tensor, backbone.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert load_classifier(name, str(tmp_path / "s.pt")) is None
    assert "s.pt has no classifier of" in capsys.readouterr().out


def test_a_deeper_network_of_the_same_names_does_not_fit(tmp_path):
    torch.save(models.resnet34(weights=None).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(UserError, match=r"does not fit resnet18: it has unknown layer1\.2\.bn1\.bias, "):
        load("resnet18", str(tmp_path / "deep.pth"))


def test_older_files_without_counters_fit(tmp_path):
    state = models.resnet18(weights=None).state_dict()
    torch.save({key: state[key] for key in state if not key.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    network, weights = load("resnet18", str(tmp_path / "old.pth"))
    assert weights.startswith("old.pth")
    assert torch.equal(network.conv1.weight, state["conv1.weight"])


def test_densenet_as_torchvision_publishes_it(tmp_path):
    original = models.densenet121(weights=None).state_dict()
    state = dict(original)
    for number in "12":
        for kind in ("norm", "conv"):
            state = {
                key.replace(f".{kind}{number}.", f".{kind}.{number}.") if "denselayer" in key else key: value
                for key, value in state.items()
            }
    assert any(".norm.1." in key for key in state)
    torch.save(state, tmp_path / "densenet.pth")
    network, _ = load("densenet121", str(tmp_path / "densenet.pth"))
    assert all(torch.equal(tensor, original[name]) for name, tensor in network.state_dict().items())


def test_googlenet_with_weights_from_a_file_transforms_its_input(tmp_path):
    """As torchvision makes it do with its own weights; untrained it doesn't."""
    network, _ = load("googlenet", "none")
    assert not network.transform_input
    torch.save(network.state_dict(), tmp_path / "g.pth")
    assert load("googlenet", str(tmp_path / "g.pth"))[0].transform_input


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("content", [Harmful(), [1, 2], {"a": 1}], ids=["code", "list", "numbers"])
def test_what_is_no_state_dict_is_refused(tmp_path, content, capsys):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        load("squeezenet1_1", str(tmp_path / "x.pth"))
    assert capsys.readouterr().out == ""


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "x.pth").write_text("hello")
    with pytest.raises(UserError, match=r"x.pth is not a state dict"):
        load("squeezenet1_1", str(tmp_path / "x.pth"))


def test_names_that_do_not_exist():
    with pytest.raises(UserError, match=r"no classification network 'resnet19': choose one of alexnet, .* resnet18"):
        load("resnet19", "none")
    with pytest.raises(UserError, match=r"IMAGENET1K_V9 is neither a file nor weights of resnet18: .* IMAGENET1K_V1"):
        load("resnet18", "IMAGENET1K_V9")


# Weights by name: a server on loopback in place of torchvision's, and its cache folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder in which torchvision keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def published(tmp_path, hub, monkeypatch):
    """squeezenet1_1's weights at an address of a server that runs here; gives the file's name."""
    torch.manual_seed(2)
    folder = tmp_path / "server"
    folder.mkdir()
    torch.save(models.squeezenet1_1(weights=None).state_dict(), folder / "x")
    digest = hashlib.sha256((folder / "x").read_bytes()).hexdigest()
    name = f"squeezenet1_1-{digest[:8]}.pth"
    (folder / "x").rename(folder / name)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = PUBLISHED.url
        object.__setattr__(PUBLISHED.value, "url", f"http://127.0.0.1:{server.server_port}/{name}")
        yield name
        object.__setattr__(PUBLISHED.value, "url", url)
        server.shutdown()


def test_named_weights_are_downloaded_once(published, hub):
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        assert load("squeezenet1_1", name)[1] == "IMAGENET1K_V1"
    assert [path.name for path in hub.iterdir()] == [published]


def test_weights_put_into_the_cache_by_hand(hub, saved):
    (hub / PUBLISHED.url.rsplit("/", 1)[-1]).write_bytes(saved.read_bytes())
    network, weights = load("squeezenet1_1", "DEFAULT")
    assert weights == "IMAGENET1K_V1"
    assert network_digest(network) == network_digest(load("squeezenet1_1", str(saved))[0])


def test_a_damaged_file_in_the_cache_is_named(hub):
    name = PUBLISHED.url.rsplit("/", 1)[-1]
    (hub / name).write_bytes(b"half a download")
    with pytest.raises(UserError, match=rf"{name} is damaged .*: delete it"):
        load("squeezenet1_1", "DEFAULT")


@pytest.fixture
def unreachable(hub, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy")


def test_weights_that_are_not_available_are_named_with_file_and_folder(unreachable, hub):
    with pytest.raises(UserError) as error:
        load("resnet18", "DEFAULT")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(error.value)
    assert f"save it as resnet18-f37072fd.pth in {hub}" in str(error.value)


def test_going_on_untrained_is_said_loudly(unreachable, capsys):
    backbone = load_backbone("squeezenet1_1", "DEFAULT", untrained_if_missing=True)
    assert backbone.weights == "none (untrained)"
    assert "UNTRAINED WEIGHTS" in capsys.readouterr().out
