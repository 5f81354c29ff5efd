"""Fréchet and kernel distance against closed forms, SciPy, and sums over pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg

from sana_jax.errors import UserError
from train.evaluation.distances import Gaussian, fit_gaussian, frechet_distance, kernel_distance


def covariance(size: int, seed: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# -- Fréchet -----------------------------------------------------------------------------------------------------------


def test_gaussians_of_equal_covariance_differ_by_their_means():
    sigma = covariance(7, 0)
    one, other = normal(7, seed=1), normal(7, seed=2)
    found = frechet_distance(Gaussian(one, sigma), Gaussian(other, sigma))
    assert found == pytest.approx(((one - other) ** 2).sum(), rel=1e-10)
    assert frechet_distance(Gaussian(one, sigma), Gaussian(one, sigma)) == pytest.approx(0, abs=1e-12)


def test_gaussians_whose_covariances_share_axes():
    """Σ(√a − √b)², in any rotation."""
    a, b = np.abs(normal(6, seed=3)), np.abs(normal(6, seed=4))
    rotation = np.linalg.qr(normal(6, 6, seed=5))[0]
    mean = np.zeros(6)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    for turn in (np.eye(6), rotation):
        gaussians = [Gaussian(mean, (turn * values) @ turn.T) for values in (a, b)]
        assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_general_covariances_against_scipy(size):
    one, other = (Gaussian(normal(size, seed=seed), covariance(size, seed)) for seed in (1, 2))
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance)
    assert np.abs(np.imag(root)).max() < 1e-8
    expected = ((one.mean - other.mean) ** 2).sum()
    expected += np.trace(one.covariance + other.covariance) - 2 * np.trace(np.real(root))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Fewer samples than features: the product's root by SciPy is complex or fails; here the distance is exact."""
    a, b = np.array([4.0, 9.0, 0, 0, 0]), np.array([1.0, 0, 16.0, 0, 0])
    rotation = np.linalg.qr(normal(5, 5, seed=6))[0]
    gaussians = [Gaussian(np.zeros(5), (rotation * values) @ rotation.T) for values in (a, b)]
    assert frechet_distance(*gaussians) == pytest.approx((2 - 1) ** 2 + 9 + 16, rel=1e-10)
    few, many = fit_gaussian(normal(10, 64, seed=7)), fit_gaussian(normal(500, 64, seed=8))
    # regularised ever less, SciPy's root approaches the same number
    tiny = 1e-9 * np.eye(64)
    root = np.real(scipy.linalg.sqrtm((few.covariance + tiny) @ (many.covariance + tiny)))
    expected = ((few.mean - many.mean) ** 2).sum() + np.trace(few.covariance + many.covariance) - 2 * np.trace(root)
    assert frechet_distance(few, many) == pytest.approx(expected, rel=1e-3)


def test_float32_features_are_measured_in_float64():
    """Features far from 0 lose their covariance in float32."""
    features = (normal(2000, 3) + 4096).astype(np.float32)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(fit_gaussian(features).covariance, expected, rtol=1e-10)


def test_samples_of_known_gaussians():
    one, other = normal(20000, 4, seed=1), 2 * normal(20000, 4, seed=2) + 3
    assert frechet_distance(fit_gaussian(one), fit_gaussian(other)) == pytest.approx(4 * 9 + 4 * 1, rel=0.02)


# -- kernel ------------------------------------------------------------------------------------------------------------


def unbiased(one: np.ndarray, other: np.ndarray) -> float:
    """The definition, pair by pair."""

    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    same = [np.mean([kernel(*pair) for pair in itertools.permutations(rows, 2)]) for rows in (one, other)]
    return sum(same) - 2 * np.mean([kernel(x, y) for x in one for y in other])


def test_pair_by_pair():
    one, other = normal(6, 3, seed=1), normal(6, 3, seed=2) + 0.5
    found = kernel_distance(one, other, subsets=9, subset_size=50)
    assert found.mean == pytest.approx(unbiased(one, other), rel=1e-10)
    assert (found.deviation, found.subsets, found.subset_size) == (0, 1, 6)  # there is one subset of all


def test_subsets_are_drawn_without_replacement_and_from_the_seed():
    one, other = normal(30, 3, seed=1), normal(20, 3, seed=2)
    found = kernel_distance(one, other, subsets=7, subset_size=10, seed=3)
    assert found.subset_size == 10
    assert found == kernel_distance(one, other, subsets=7, subset_size=10, seed=3)
    assert found.mean != kernel_distance(one, other, subsets=7, subset_size=10, seed=4).mean
    values = []
    for index in range(7):
        rng = np.random.default_rng([3, index])
        first = one[rng.choice(30, 10, replace=False)]
        values.append(unbiased(first, other[rng.choice(20, 10, replace=False)]))
    assert found.mean == pytest.approx(np.mean(values), rel=1e-10)
    assert found.deviation == pytest.approx(np.std(values), rel=1e-10)
    assert kernel_distance(one, other, subset_size=1000).subset_size == 20


def test_unbiased_for_few_samples():
    """Equal distributions: 0 on average, within what chance allows, though each subset has 5 samples."""
    values = [kernel_distance(normal(5, 2, seed=s), normal(5, 2, seed=s + 10_000)).mean for s in range(3000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(3000)


def test_closed_form_in_one_dimension():
    """(xy + 1)³ compares the first three moments: 3(Δm₁)² + 3(Δm₂)² + (Δm₃)²."""
    mean, spread = 0.5, 1.5
    values = [
        kernel_distance(normal(40, 1, seed=s), mean + spread * normal(40, 1, seed=s + 10_000)).mean for s in range(3000)
    ]
    second, third = mean**2 + spread**2, mean**3 + 3 * mean * spread**2
    expected = 3 * mean**2 + 3 * (second - 1) ** 2 + third**2
    assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / np.sqrt(3000))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    with pytest.raises(UserError, match="2 samples or more"):
        fit_gaussian(normal(1, 3))
    with pytest.raises(UserError, match="2 samples or more"):
        fit_gaussian(normal(3))
    bad = normal(4, 3)
    bad[2, 1] = np.nan
    with pytest.raises(UserError, match="sample 2"):
        fit_gaussian(bad)
    with pytest.raises(UserError, match="features of one function"):
        frechet_distance(fit_gaussian(normal(5, 3)), fit_gaussian(normal(5, 4)))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(Gaussian(np.zeros(2), np.full((2, 2), np.nan)), Gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(UserError, match="sizes 3 and 4"):
        kernel_distance(normal(5, 3), normal(5, 4))
    for wrong in ({"subsets": 0}, {"subset_size": 1}):
        with pytest.raises(UserError, match="subsets of"):
            kernel_distance(normal(5, 3), normal(5, 3), **wrong)
