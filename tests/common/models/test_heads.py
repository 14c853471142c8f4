from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch.nn import functional

from common.models.backbones import Backbone, load_backbone
from common.models.embedder import Embedder
from common.models.heads import (
    RIDGE,
    SMALL,
    AppearanceHead,
    FeatureHead,
    KindHead,
    MultiLevelNetwork,
    Task,
    ridge_regression,
)
from common.models.pca import principal_components


@pytest.fixture
def features():
    """Unit vectors with positive entries, as features are."""
    return functional.normalize(torch.rand(40, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def backbone(embedder):
    return Backbone(embedder.network, embedder.preprocessing, "none (untrained)", 512)


def test_a_head_starts_orthogonal_about_the_mean(features):
    head = FeatureHead(6, 6)
    head.init_orthogonal(features)
    with torch.no_grad():
        projected = head(3 * features)  # the length of features doesn't matter
    assert torch.allclose(projected.mean(0), torch.zeros(6), atol=1e-6)
    centered = features - features.mean(0)
    assert torch.allclose(projected @ projected.T, centered @ centered.T, atol=1e-5)


def test_a_head_starts_as_whitened_principal_components(features):
    head = FeatureHead(6, 4)
    found = head.init_principal(features, 0.5)
    mean, directions = principal_components(features, 4, 0.5)
    assert torch.allclose(found, (features - mean) @ directions.T, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(head(0.1 * features), found, atol=1e-5)
    assert FeatureHead(6, 100).linear.out_features == 6  # no more components than features


def network_of(backbone, num_kinds=9, **changed):
    config = {"class_dim": 5, "kind_dim": 4, "kind_weight": 0.5, "detail_dim": 7, "detail_weight": 2.0}
    config |= {"appearance_dim": 3, "appearance_weight": 0.0} | changed
    return MultiLevelNetwork(backbone, SimpleNamespace(**config), num_kinds).eval()


def test_the_embedding_is_all_heads_weighted(backbone):
    network = network_of(backbone)
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        embeddings = network(images)
        features = network.backbone(images)
        classes, details = (functional.normalize(head(features)) for head in (network.class_head, network.detail_head))
        kinds = network.kind_head(features)
        parts = network.split(embeddings)
    assert torch.allclose(embeddings, torch.cat([classes, 0.5 * kinds, 2 * details], 1), atol=1e-6)
    for part, expected in zip(parts, (classes, functional.normalize(kinds), details), strict=True):
        assert torch.allclose(part, expected, atol=1e-6)  # what is trained are the directions
    assert kinds.norm(dim=1).std() > 0  # a kind counts as much as its probabilities say


def test_the_appearance_is_the_principal_components_of_the_small_photo(backbone):
    torch.manual_seed(0)
    photos = torch.rand(30, 3, SMALL, SMALL)
    network = network_of(backbone, appearance_weight=0.5)
    task = Task(True, functional.normalize(torch.rand(20, 512)), photos)
    assert network.init_heads(task, 0.25).shape == (20, 7)  # the appearance is no target of training
    with torch.inference_mode():
        embeddings = network(photos)
        without = network_of(backbone).split(embeddings[:, :16])
    assert embeddings.shape == (30, 19)
    found = embeddings[:, 16:].numpy() / 0.5
    expected = PCA(3, svd_solver="full").fit_transform(photos.flatten(1).double().numpy())
    expected /= np.sqrt(np.square(expected).sum(1).mean())
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-4)
    assert all(torch.equal(*parts) for parts in zip(network.split(embeddings), without, strict=True))
    flat = torch.rand(2, 3, 1, 1)
    small, large = (network.appearance_head(flat.expand(-1, -1, size, size)) for size in (SMALL, 100))
    assert torch.allclose(small, large, atol=1e-5)  # the size of the photo doesn't matter
    assert not any(each.requires_grad for each in network.appearance_head.parameters())
    assert AppearanceHead(10**6).out_features == 3 * SMALL**2


@pytest.mark.parametrize("missing", [{"kind_weight": 0}, {"num_kinds": 0}])
def test_the_kind_head_may_be_missing(backbone, missing):
    network = network_of(backbone, **missing)
    with torch.inference_mode():
        embeddings = network(torch.rand(3, 3, 64, 64))
        _, kinds, details = network.split(embeddings)
    assert embeddings.shape == (3, 12)
    assert kinds.shape == (3, 0)
    assert torch.allclose(details.norm(dim=1), torch.ones(3))
    features = functional.normalize(torch.rand(20, 512))
    assert network.init_heads(Task(True, features), 0.25).shape == (20, 7)


def test_without_labels_there_is_no_class_head(backbone):
    config = {"kind_dim": 4, "kind_weight": 0.5, "detail_dim": 7, "detail_weight": 2.0}
    config |= {"appearance_dim": 3, "appearance_weight": 0.5}
    network = MultiLevelNetwork(backbone, SimpleNamespace(**config), 9).eval()
    features, kinds = (functional.normalize(torch.rand(20, dim)) for dim in (512, 9))
    kept = network.init_heads(Task(False, features, torch.rand(30, 3, SMALL, SMALL), kinds), 0.25)
    assert kept.shape == (20, 11)
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        embeddings = network(images)
        classes, kinds, details = network.split(embeddings)
        features = network.backbone(images)
        parts = 0.5 * network.kind_head(features), 2 * functional.normalize(network.detail_head(features))
        expected = torch.cat([*parts, 0.5 * network.appearance_head(images)], 1)
    assert torch.equal(embeddings, expected)
    assert classes.shape == (3, 0)
    assert kinds.shape == (3, 4)
    assert torch.allclose(details, parts[1] / 2, atol=1e-6)


def test_without_weights_the_class_head_is_all(backbone):
    network = network_of(backbone, kind_weight=0.0, detail_weight=0.0)
    with torch.inference_mode():
        embeddings = network(torch.rand(3, 3, 64, 64))
    assert embeddings.shape == (3, 5)
    classes, _, details = network.split(embeddings)
    assert torch.equal(classes, embeddings)
    assert torch.equal(details, embeddings)
    features = functional.normalize(torch.rand(20, 512))
    targets = network.init_heads(Task(True, features), 0.25)
    assert torch.allclose(targets, functional.normalize(network.class_head(features)), atol=1e-6)


def test_the_detail_head_starts_from_the_features(embedder):
    torch.manual_seed(0)
    network = network_of(load_backbone("squeezenet1_1", "none", 64), num_kinds=0)
    images = np.random.default_rng(0).integers(256, size=(12, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        batch = embedder.preprocessing.normalize(torch.from_numpy(images))
        features = functional.normalize(network.backbone(batch))
        targets = network.init_heads(Task(True, features), 0.25)
        details = network.split(network(batch))[2]
    assert torch.allclose(details, targets, atol=1e-4)


def test_the_kind_head_starts_from_a_classifier(features):
    """One whose logits are a linear map of the features, which a regression finds."""
    torch.manual_seed(0)
    logits = 20 * features @ torch.randn(6, 9)
    roots = functional.softmax(logits, 1).sqrt()
    head = KindHead(6, 9, 9)
    targets = head.init_from_classifier(features, roots, 0.0)
    mean, directions = principal_components(roots, 9, 0.0)
    assert torch.allclose(targets, (roots - mean) @ directions.T, atol=1e-5)
    with torch.no_grad():
        assert (head(3 * features) - targets).norm(dim=1).mean() < 0.1 * targets.norm(dim=1).mean()
    assert KindHead(6, 9, 256).components.out_features == 9  # no more components than classes
    assert not head.components.weight.requires_grad


def test_ridge_regression_is_that_of_scikit_learn(features):
    outputs = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    weight, bias = ridge_regression(features, outputs)
    penalty = RIDGE * features.double().var(0, correction=0).mean().item() * len(features)
    expected = Ridge(alpha=penalty).fit(features.double().numpy(), outputs.double().numpy())
    assert np.allclose(weight, expected.coef_, atol=1e-5)
    assert np.allclose(bias, expected.intercept_, atol=1e-5)


def test_a_head_computes_in_float32_among_layers_in_16_bits(features):
    torch.manual_seed(0)
    head = FeatureHead(6, 4)
    with torch.inference_mode():
        exact = head(features)
        with torch.autocast("cpu", torch.bfloat16):
            assert head.linear(features).dtype == torch.bfloat16
            assert torch.equal(head(features), exact)
            rounded = head(features.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, atol=0.05)


def test_embeddings_of_other_weights_are_not_taken_from_the_cache(backbone, tmp_path):
    """They are neither in the state dict nor far enough from each other for the probe."""
    network = network_of(backbone, class_dim=8, kind_weight=0.0, detail_dim=8)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for weight in (2.0, 1.999):
        network.detail_weight = weight
        embedder = Embedder(network, backbone.preprocessing, torch.device("cpu"), cache=tmp_path)
        embeddings = embedder.embed(np.array(["a" * 64, "b" * 64], "S64"), lambda places: images[places])
        lengths = np.linalg.norm(embeddings[:, 8:], axis=1) / np.linalg.norm(embeddings[:, :8], axis=1)
        assert lengths == pytest.approx([weight, weight], abs=1e-5)
