"""The Frechet distance against closed forms, PCA against its definition, nearest neighbours against a loop."""

from __future__ import annotations

import pytest
import torch

from ncsn_fast.data import load_digits
from ncsn_fast.evaluation.metrics import PCAFeatures, frechet_distance, nearest_distances


def gaussian(n, dims, seed=0):
    """A set of points with mean zero and covariance one, exactly."""
    x = torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


def test_frechet_distance_of_a_shift_and_of_a_scale():
    x = gaussian(200, 3)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(5.25)
    scales = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)  # sum of (s - 1)^2
    assert frechet_distance(x, gaussian(200, 3, seed=1) * scales) == pytest.approx(4.25)


def test_frechet_distance_of_covariances_that_do_not_commute():
    x, y = gaussian(100, 4), gaussian(90, 4, seed=1)
    a = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    b = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cov_a, cov_b = a.T @ a, b.T @ b
    # The textbook form: the eigenvalues of the product of the covariances itself, which is not symmetric.
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = float(cov_a.trace() + cov_b.trace() - 2 * root_trace)
    assert frechet_distance(x @ a, y @ b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y @ b, x @ a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_singular_covariances():
    flat = gaussian(50, 2) * torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert frechet_distance(flat, -flat) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(flat, torch.zeros(2, 2)) == pytest.approx(1)
    line = torch.arange(5.0).unsqueeze(1)
    assert frechet_distance(line, line + 2) == pytest.approx(4)  # one feature


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), r"got \(3, 2\) and \(3, 4\)"),
        (torch.zeros(1, 2), torch.zeros(3, 2), "N, M >= 2"),
        (torch.zeros(3), torch.zeros(3), r"\(N, D\)"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), "finite"),
    ],
)
def test_frechet_distance_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_pca_features_are_the_leading_components():
    images = load_digits()
    features = PCAFeatures(images, dims=10)
    values = features(images)
    assert values.shape == (1540, 10) and values.dtype == torch.float64
    covariance = torch.cov(values.T)
    off_diagonal = covariance - torch.diag(covariance.diag())
    assert off_diagonal.abs().max() < 1e-9
    assert (covariance.diag().diff() <= 0).all()
    flat = images.flatten(1).double()
    _, singular, _ = torch.linalg.svd(flat - flat.mean(0))
    variances = singular.square() / (len(flat) - 1)
    torch.testing.assert_close(covariance.diag(), variances[:10])
    assert features.explained == pytest.approx(float(variances[:10].sum() / variances.sum()))


def test_pca_features_refuse():
    with pytest.raises(ValueError, match=r"dims must be 1\.\.4"):
        PCAFeatures(torch.rand(10, 1, 2, 2), dims=5)
    with pytest.raises(ValueError, match="more than 4 images, got 4"):
        PCAFeatures(torch.rand(4, 1, 2, 2), dims=4)


def test_nearest_distances():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 1, 3, 3, generator=generator) for n in (4, 6))
    expected = [min(float((x - y).double().norm()) for y in b) for x in a]
    assert nearest_distances(a, b).tolist() == pytest.approx(expected)
    copies = nearest_distances(b[:3] + 1e-7, b)
    assert (copies < 1e-6).all()  # small distances keep their digits
    with pytest.raises(ValueError, match="one shape"):
        nearest_distances(a, b[..., :2])
    with pytest.raises(ValueError, match="one shape"):
        nearest_distances(a, b[:0])
