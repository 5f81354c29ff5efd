"""A block of SANA-Video 2B on a CPU takes little more than its matrix products do, and no more than PyTorch takes."""

from __future__ import annotations

import pytest

from tests.benchmarks import sana_video_cpu
from tests.benchmarks.sana_cpu import environment

BESIDE_PRODUCTS, BESIDE_TORCH = 1.3, 1.0

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def measured():
    part = sana_video_cpu.measure_block()
    seconds = {name: [round(value, 3) for value in timing.seconds] for name, timing in part["timings"].items()}
    print(f"ratios {part['ratios']}; seconds {seconds}; {environment()}")
    return part["ratios"]


@pytest.mark.parametrize("form", ["block", "streaming block"])
def test_block_beside_its_matrix_products_and_torch(measured, form):
    assert measured[f"{form} / products"] <= BESIDE_PRODUCTS, measured
    assert measured[f"{form} / torch"] <= BESIDE_TORCH, measured
