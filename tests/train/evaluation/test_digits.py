"""Drawn digits are read by someone who knows all ten, whichever the run was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.digits import load_images
from train.evaluation.digits import measure


def real(*digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in 0 to 16, and which digit each shows."""
    images, labels = load_images(digits)
    return (images.astype(np.float64).reshape(len(images), -1) + 1) * 8, labels


@pytest.mark.parametrize("digits", [(7,), (3, 7)])
def test_of_a_run_on_some_digits(digits):
    trained_on = real(*digits)
    own = measure(*trained_on, *trained_on)
    assert own.recognised > 0.99
    assert own.real_held_out == measure(*trained_on, *real(*range(10))).real_held_out
    # fours are neither threes nor sevens
    fours = real(4)[0][: 20 * len(digits)]
    others = measure(fours, np.repeat(digits, 20), *trained_on)
    assert others.recognised == 0
