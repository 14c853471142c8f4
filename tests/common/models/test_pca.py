import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from common.models.pca import principal_components


@pytest.mark.parametrize("whitening", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("size", [6, 80])  # fewer and more than there are vectors
def test_the_principal_components_are_those_of_scikit_learn(whitening, size):
    """But for the sign of each; with variances v^(1 - whitening) whose sum is 1."""
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(50, 6)) @ rng.normal(size=(6, size)) + 3).astype(np.float32)
    pca = PCA(4).fit(vectors)
    variances = pca.explained_variance_ ** (1 - whitening)
    expected = pca.transform(vectors) / pca.explained_variance_**0.5 * (variances / variances.sum()) ** 0.5
    expected *= (50 / 49) ** 0.5  # scikit-learn divides by N - 1
    mean, directions = principal_components(torch.from_numpy(vectors), 4, whitening)
    found = ((torch.from_numpy(vectors) - mean) @ directions.T).numpy()
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_whitening_by_nothing_keeps_the_angles_about_the_mean():
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    mean, directions = principal_components(vectors, 5, 0)
    centered = torch.nn.functional.normalize(vectors - mean)
    found = torch.nn.functional.normalize((vectors - mean) @ directions.T)
    assert torch.allclose(found @ found.T, centered @ centered.T, atol=1e-5)


def test_directions_without_variance_are_left_out():
    """Others than the vectors may vary along them: whitening would make that noise all there is."""
    generator = torch.Generator().manual_seed(0)
    vectors, others = (torch.randn(count, 50, generator=generator) for count in (20, 100))
    mean, directions = principal_components(vectors, 40, 0.5)
    assert (directions.norm(dim=1) > 0).tolist() == [True] * 19 + [False] * 21
    lengths = ((others - mean) @ directions.T).square().sum(1)
    assert lengths.mean() < 2
    assert principal_components(torch.ones(5, 3), 3, 0.5)[1].isfinite().all()  # nothing varies
