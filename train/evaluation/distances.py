"""Distances between two sets of pictures by their features: Fréchet distance (FID) and kernel distance (KID).

Both say how alike two distributions are, and mean nothing without the features they were computed from: figures of
different feature functions, numbers of samples or picture sizes do not compare.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError


class Gaussian(NamedTuple):
    """Mean and covariance of features: all that the Fréchet distance sees of them."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]


class KernelDistance(NamedTuple):
    """Mean over subsets, and the standard deviation from subset to subset."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def fit_gaussian(features: Float[np.ndarray, "N D"]) -> Gaussian:
    """Mean and unbiased covariance in float64.

    Raises:
        UserError: fewer than 2 samples, or values that are not finite.
    """
    features = check_features(features)
    centred = features - (mean := features.mean(axis=0))
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) in float64 (Heusel et al., arXiv 1706.08500).

    With R = Σ^½, the square root's trace is the sum of the singular values of R₁R₂. That needs symmetric roots only,
    exists for singular covariances (fewer samples than features) too, and is never complex, as the root of the
    unsymmetric product may become by rounding.

    Raises:
        UserError: features of two sizes, or values that are not finite.
    """
    one, other = (Gaussian(*(np.asarray(part, np.float64) for part in gaussian)) for gaussian in (one, other))
    size = one.mean.shape[0]
    for gaussian in (one, other):
        if gaussian.mean.shape != (size,) or gaussian.covariance.shape != (size, size):
            raise UserError(
                f"features of sizes {one.mean.shape} and {other.mean.shape}, covariances {one.covariance.shape} and "
                f"{other.covariance.shape}; both sets need the features of one function: compute them alike"
            )
        if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
            raise UserError("features' statistics are not finite; look at the pictures or at the file they come from")
    product = _square_root(one.covariance) @ _square_root(other.covariance)
    root_trace = np.linalg.svd(product, compute_uv=False).sum()
    difference = one.mean - other.mean
    distance = difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * root_trace
    return float(max(distance, 0.0))  # rounding may end just below 0


def _square_root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """The symmetric root of a symmetric matrix.

    Eigenvalues that are nothing but rounding, by the rule for a matrix's rank, count as 0: their roots would be a
    hundred million times larger than they are.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    least = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > least, values, 0.0))) @ vectors.T


def kernel_distance(
    one: Float[np.ndarray, "N D"],
    other: Float[np.ndarray, "M D"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """The unbiased squared maximum mean discrepancy with the kernel (x·y/D + 1)³ (Bińkowski et al., arXiv 1801.01401).

    Mean over ``subsets`` random subsets of each set, drawn without replacement; where a set has fewer samples than
    ``subset_size``, all subsets have the smaller set's number of samples. It is 0 on average for equal distributions,
    whatever the number of samples, so single values may be negative.

    Args:
        one: features.
        other: features of the same function.
        subsets: how many; 1 or more.
        subset_size: samples of each subset; 2 or more.
        seed: of the subsets.

    Raises:
        UserError: features that do not fit one another or are not finite, or numbers that are not allowed.
    """
    one, other = check_features(one), check_features(other)
    if one.shape[1] != other.shape[1]:
        raise UserError(f"features of sizes {one.shape[1]} and {other.shape[1]}; both sets need the same function")
    if subsets < 1 or subset_size < 2:
        raise UserError(f"{subsets} subsets of {subset_size} samples; allowed are 1 or more subsets of 2 or more")
    size = min(subset_size, len(one), len(other))
    if size == len(one) == len(other):
        subsets = 1  # there is only one
    values = np.empty(subsets)
    for index in range(subsets):
        rng = np.random.default_rng([seed, index])
        first = one[rng.choice(len(one), size, replace=False)]
        second = other[rng.choice(len(other), size, replace=False)]
        values[index] = _unbiased_discrepancy(first, second)
    return KernelDistance(float(values.mean()), float(values.std()), subsets, size)


def _unbiased_discrepancy(one: Float[np.ndarray, "m D"], other: Float[np.ndarray, "m D"]) -> float:
    size = len(one)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        similarities = kernel(x, x)
        return (similarities.sum() - np.trace(similarities)) / (size * (size - 1))

    return mean_of_pairs(one) + mean_of_pairs(other) - 2 * kernel(one, other).mean()


def check_features(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Features in float64; raises ``UserError`` for another shape, fewer than 2 samples or values not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise UserError(f"features of shape {features.shape}; allowed is (N, D) with 2 samples or more: give more")
    if not np.isfinite(features).all():
        rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise UserError(
            f"features of {len(rows)} samples are not finite (the first is sample {rows[0]}); look at that picture"
        )
    return features
