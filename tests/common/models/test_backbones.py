import hashlib
import json
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from common.config import UserError
from common.models.backbones import (
    GeneralisedMean,
    InFloat32,
    Preprocessing,
    load_backbone,
    network_digest,
    preprocessing_of,
)

FAMILIES = {  # a small one of each, and the channels of its last feature maps
    "alexnet": 256,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "regnet_y_400mf": 440,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "vgg11": 512,
    "vit_b_32": 768,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_pooled_features(name):
    network, preprocessing, used = load_backbone(name, "none")
    with torch.inference_mode():
        features = network(torch.rand(2, 3, preprocessing.crop, preprocessing.crop))
    assert features.shape == (2, FAMILIES[name])
    assert features.dtype == torch.float32
    assert used == "none (untrained)"
    assert not network.training


LAST_MAPS = {"resnet18": "layer4", "mobilenet_v2": "features", "alexnet": "features", "shufflenet_v2_x0_5": "conv5"}


@pytest.mark.parametrize("name", LAST_MAPS)
def test_features_are_the_pooled_last_maps(name):
    whole = models.get_model(name, weights=None).eval()
    maps = {}
    whole.get_submodule(LAST_MAPS[name]).register_forward_hook(lambda *call: maps.update(last=call[2]))
    photos = torch.rand(2, 3, 96, 96)
    for p in (1.0, 3.0):
        network, _, _ = load_backbone(name, "none", pooling=p)
        trained = dict(zip(network.state_dict(), whole.state_dict().values(), strict=False))  # the head comes last
        network.load_state_dict(trained)
        with torch.inference_mode():
            whole(photos)
            expected = maps["last"].double().pow(p).mean((2, 3)).pow(1 / p).float()
            assert torch.allclose(network(photos), expected, atol=1e-4)


def test_densenet_is_pooled_after_its_last_relu():
    whole = models.densenet121(weights=None).eval()
    network, _, _ = load_backbone("densenet121", "none")
    network.load_state_dict(dict(zip(network.state_dict(), whole.state_dict().values(), strict=False)))
    whole.classifier = torch.nn.Identity()
    photos = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(network(photos), whole(photos), atol=1e-5)


def test_generalised_mean_by_hand():
    maps = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]], [[-1.0, -1.0], [-1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert GeneralisedMean(1)(maps).tolist() == [[1.5, -1, 0]]
    assert GeneralisedMean(3)(maps)[0].tolist() == pytest.approx([(36 / 4) ** (1 / 3), -1, 0], abs=1e-3)
    assert GeneralisedMean(3)(torch.ones(2, 5)).tolist() == [[1] * 5] * 2


def test_generalised_mean_can_be_trained():
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    GeneralisedMean(3)(maps).sum().backward()
    assert torch.isfinite(maps.grad).all()
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    GeneralisedMean(3)(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_pooling_is_exact_in_bfloat16():
    maps = torch.rand(1, 2, 13, 13).bfloat16()
    assert torch.equal(GeneralisedMean(1)(maps), maps.float().mean((2, 3)))


@pytest.mark.parametrize("p", [0.5, float("nan"), 7])
def test_exponents_out_of_range_are_refused(p):
    with pytest.raises(UserError, match="from 1"):
        load_backbone("squeezenet1_1", "none", pooling=p)


# Preprocessing


@pytest.mark.parametrize("size", [(200, 200), (333, 250), (375, 500), (64, 64)])
@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b0", "resnet50"])
def test_preprocessing_is_that_of_the_weights(name, size):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    preprocessing = load_backbone(name, "none")[1]
    ours = preprocessing.normalise(torch.from_numpy(preprocessing.square(image))[None])[0]
    theirs = models.get_model_weights(name).DEFAULT.transforms()(image)
    assert ours.shape == theirs.shape
    differs = (ours - theirs).abs() > 0.02  # more than one step of 1/255, which is 0.017
    assert differs.float().mean() < 1e-4  # the odd pixel, by rounding


def test_image_size_keeps_the_share_of_the_crop():
    preprocessing = load_backbone("squeezenet1_1", "none", image_size=112)[1]
    assert (preprocessing.resize, preprocessing.crop) == (128, 112)


def test_a_camera_photo_is_decoded_at_a_fraction_of_its_size():
    """Twice what the network sees is kept, of a part of the photo too; what is cut from it hardly differs."""
    preprocessing = preprocessing_of("resnet18", "none", 64, whole_photo=True)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).resize((1600, 1200))
    file = BytesIO()
    photo.save(file, "JPEG", quality=95)
    decoded = preprocessing.decode(file.getvalue())
    assert decoded.size == (200, 150)
    assert preprocessing.decode(file.getvalue(), share=0.4).size == (800, 600)
    difference = preprocessing.square(decoded).astype(float) - preprocessing.square(photo)
    assert np.abs(difference).mean() < 2


def test_preprocessing_survives_a_file():
    preprocessing = preprocessing_of("efficientnet_b0", "none", 96, whole_photo=False)
    assert Preprocessing.from_plain(json.loads(json.dumps(preprocessing.plain()))) == preprocessing


def test_the_whole_photo_is_seen():
    preprocessing = load_backbone("squeezenet1_1", "none", whole_photo=True)[1]
    image = Image.new("RGB", (300, 300), "white")
    image.paste("black", (0, 0, 15, 300))  # an edge that the weights' own transforms cut off
    assert (preprocessing.square(image)[:, 5] == 0).all()
    assert (load_backbone("squeezenet1_1", "none")[1].square(image) == 255).all()


# Weights


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


def test_weights_from_a_file(saved):
    network, _, used = load_backbone("squeezenet1_1", str(saved))
    assert used == f"mine.pth, sha256 {hashlib.sha256(saved.read_bytes()).hexdigest()[:12]}"
    state = torch.load(saved, weights_only=True)
    assert torch.equal(network.state_dict()["features.0.weight"], state["features.0.weight"])


def test_missing_foreign_and_misshapen_keys_are_named(saved):
    change(saved, lambda state: state.pop("features.0.bias"))
    with pytest.raises(UserError, match=r"mine.pth does not fit squeezenet1_1: it lacks features.0.bias. Name"):
        load_backbone("squeezenet1_1", str(saved))
    change(saved, lambda state: state.update({"features.0.bias": torch.zeros(3), "head.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"has foreign head.weight; has another shape for features.0.bias"):
        load_backbone("squeezenet1_1", str(saved))
    with pytest.raises(UserError, match=r"does not fit resnet18: it lacks bn1.bias, .* more; has foreign .* more"):
        load_backbone("resnet18", str(saved))


def test_older_files_without_counters_fit(tmp_path):
    state = models.resnet18(weights=None).state_dict()
    torch.save({key: state[key] for key in state if not key.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    assert load_backbone("resnet18", str(tmp_path / "old.pth"))[2].startswith("old.pth")


def test_densenet_as_torchvision_publishes_it(tmp_path):
    state = models.densenet121(weights=None).state_dict()
    for number in "12":
        for kind in ("norm", "conv"):
            state = {
                key.replace(f".{kind}{number}.", f".{kind}.{number}.") if "denselayer" in key else key: value
                for key, value in state.items()
            }
    assert any(".norm.1." in key for key in state)
    torch.save(state, tmp_path / "densenet.pth")
    load_backbone("densenet121", str(tmp_path / "densenet.pth"))


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("content", [Harmful(), [1, 2], {"a": 1}], ids=["code", "list", "numbers"])
def test_what_is_no_state_dict_is_refused(tmp_path, content, capsys):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        load_backbone("squeezenet1_1", str(tmp_path / "x.pth"))
    assert capsys.readouterr().out == ""


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "x.pth").write_text("hello")
    with pytest.raises(UserError, match=r"x.pth is not a state dict"):
        load_backbone("squeezenet1_1", str(tmp_path / "x.pth"))


def test_names_that_do_not_exist():
    with pytest.raises(UserError, match=r"no classification network 'resnet19': choose one of alexnet, .* resnet18"):
        load_backbone("resnet19", "none")
    with pytest.raises(UserError, match=r"IMAGENET1K_V9 is neither a file nor weights of resnet18: .* IMAGENET1K_V1"):
        load_backbone("resnet18", "IMAGENET1K_V9")


def test_photos_too_small_for_the_network():
    with pytest.raises(UserError, match="vgg11 can't take photos of 8 x 8 pixels .*: change image_size"):
        load_backbone("vgg11", "none", image_size=8)
    with pytest.raises(UserError, match="change image_size"):
        load_backbone("vit_b_32", "none", image_size=100)


# Weights by name: a server on loopback in place of torchvision's, and its cache folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def published(tmp_path, cache, monkeypatch):
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
        weights = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.value
        address = f"http://127.0.0.1:{server.server_port}/{name}"
        url = weights.url
        object.__setattr__(weights, "url", address)
        yield name
        object.__setattr__(weights, "url", url)
        server.shutdown()


def test_named_weights_are_downloaded_once(published, cache):
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        assert load_backbone("squeezenet1_1", name)[2] == "IMAGENET1K_V1"
    assert [path.name for path in cache.iterdir()] == [published]


def test_weights_put_into_the_cache_by_hand(cache, saved):
    name = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    (cache / name).write_bytes(saved.read_bytes())
    network, _, used = load_backbone("squeezenet1_1", "DEFAULT")
    assert used == "IMAGENET1K_V1"
    assert network_digest(network) == network_digest(load_backbone("squeezenet1_1", str(saved))[0])


def test_a_damaged_file_in_the_cache_is_named(cache):
    name = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    (cache / name).write_bytes(b"half a download")
    with pytest.raises(UserError, match=rf"{name} is damaged .*: delete it"):
        load_backbone("squeezenet1_1", "DEFAULT")


@pytest.fixture
def unreachable(cache, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy")


def test_weights_that_cannot_be_had_are_named_with_file_and_folder(unreachable, cache):
    with pytest.raises(UserError) as error:
        load_backbone("resnet18", "DEFAULT")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(error.value)
    assert f"put it as resnet18-f37072fd.pth into {cache}" in str(error.value)


def test_going_on_untrained_is_said_loudly(unreachable, capsys):
    assert load_backbone("squeezenet1_1", "DEFAULT", untrained_if_missing=True)[2] == "none (untrained)"
    assert "UNTRAINED WEIGHTS" in capsys.readouterr().out


def test_digest_tells_networks_apart():
    torch.manual_seed(0)
    one, other = (load_backbone("squeezenet1_1", "none")[0] for _ in range(2))
    assert network_digest(one) == network_digest(one) != network_digest(other)
    pooled = load_backbone("squeezenet1_1", "none", pooling=3.0)[0]
    pooled.load_state_dict(one.state_dict())
    assert network_digest(pooled) != network_digest(one)


def test_a_layer_in_float32_among_layers_in_16_bits():
    torch.manual_seed(0)
    layer, vectors = torch.nn.Linear(64, 32), torch.randn(8, 64)
    with torch.inference_mode():
        exact = layer(vectors)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(vectors).dtype == torch.bfloat16
            assert torch.equal(InFloat32(layer)(vectors), exact)
            rounded = InFloat32(layer)(vectors.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, atol=0.05)
