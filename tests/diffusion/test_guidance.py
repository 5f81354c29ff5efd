from __future__ import annotations

import jax
import numpy as np
import pytest

from sana_jax.diffusion.guidance import classifier_free_guidance, interval_guidance
from sana_jax.errors import UserError


@pytest.fixture
def predictions():
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 6))


def test_guidance_extrapolates_from_negative_to_positive(predictions):
    negative, positive = predictions
    np.testing.assert_allclose(classifier_free_guidance(negative, positive, 1.0), positive, atol=1e-6)
    np.testing.assert_array_equal(classifier_free_guidance(negative, positive, 0.0), negative)
    np.testing.assert_allclose(
        classifier_free_guidance(negative, positive, 4.5), 4.5 * positive - 3.5 * negative, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("sigma", "active"), [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.9, False)])
def test_interval_includes_its_ends(predictions, sigma, active):
    negative, positive = predictions
    guided = jax.jit(lambda s: interval_guidance(negative, positive, 4.5, s, (0.25, 0.75)))(sigma)
    expected = classifier_free_guidance(negative, positive, 4.5) if active else positive
    np.testing.assert_allclose(guided, expected, rtol=1e-6, atol=1e-6)
    if not active:
        np.testing.assert_array_equal(guided, positive)


def test_default_interval_is_always_active(predictions):
    negative, positive = predictions
    for sigma in (0.0, 1.0):
        np.testing.assert_array_equal(
            interval_guidance(negative, positive, 2.0, sigma), classifier_free_guidance(negative, positive, 2.0)
        )


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_bad_intervals_are_named(predictions, interval):
    with pytest.raises(UserError, match=r"guidance interval \("):
        interval_guidance(*predictions, 2.0, 0.5, interval)
