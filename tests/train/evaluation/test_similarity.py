"""Cosines, nearest references, spread, copies; and the figures of the digits."""

from __future__ import annotations

import numpy as np
import pytest

from sana_jax.errors import UserError
from train.evaluation import similarity
from train.evaluation.digits import describe, measure


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_cosine():
    one, other = normal(5, 4), normal(5, 4, seed=1)
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(one, other)]
    np.testing.assert_allclose(similarity.cosine_similarity(one, other), expected)
    assert similarity.cosine_similarity(np.zeros((1, 3)), np.ones((1, 3)))[0] == 0


def test_nearest_in_parts(monkeypatch):
    monkeypatch.setattr(similarity, "_ROWS", 3)  # so that the last part is a smaller one
    one, other = normal(7, 4), normal(5, 4, seed=1)
    apart = np.linalg.norm(one[:, None] - other[None], axis=-1)
    found = similarity.nearest(one, other)
    np.testing.assert_allclose(found.value, apart.min(axis=1))
    np.testing.assert_array_equal(found.index, apart.argmin(axis=1))
    among = np.linalg.norm(one[:, None] - one[None], axis=-1) + np.diag(np.full(7, np.inf))
    np.testing.assert_allclose(similarity.nearest_other(one), among.min(axis=1))
    np.testing.assert_allclose(similarity.mean_distance(one), among[np.isfinite(among)].mean(), rtol=1e-6)
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in other] for a in one])
    found = similarity.most_similar(one, other)
    np.testing.assert_allclose(found.value, cosines.max(axis=1))
    np.testing.assert_array_equal(found.index, cosines.argmax(axis=1))


def test_copies():
    real = np.round(255 * np.random.default_rng(0).random((4, 6)))
    samples = np.concatenate([real[:2] + 0.3, 255 - real[2:]])
    assert similarity.count_copies(samples, real) == 2


def test_what_is_refused():
    with pytest.raises(UserError, match="2 or more"):
        similarity.mean_distance(normal(1, 3))
    with pytest.raises(UserError, match="of one function"):
        similarity.nearest(normal(2, 3), normal(2, 4))


def test_real_digits_are_recognised_and_copies_are_counted():
    from sklearn.datasets import load_digits

    real, labels = load_digits(return_X_y=True)
    chosen = labels < 3
    real, labels = real[chosen], labels[chosen]
    figures = measure(real[:60], labels[:60], real, labels)
    assert figures.recognised == 1
    assert figures.copies == 60
    assert figures.nearest == pytest.approx(0, abs=1e-6)
    assert 0.7 < figures.spread < 1.3
    assert set(figures.recognised_by_digit) == {0, 1, 2}
    wrong = measure(real[:60], (labels[:60] + 1) % 3, real, labels)
    assert wrong.recognised == 0
    collapsed = measure(np.repeat(real[:3], 5, axis=0), np.repeat(labels[:3], 5), real, labels)
    assert collapsed.spread < 1e-3
    assert describe(figures)[1].endswith("100.0%")
