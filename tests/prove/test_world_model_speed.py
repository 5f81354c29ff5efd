"""A full-size block of SANA-WM on a CPU takes little more than its own matrix products; beside torch it is recorded."""

from __future__ import annotations

import pytest

from tests.benchmarks import sana_wm_cpu
from tests.benchmarks.sana_cpu import environment

BESIDE_PRODUCTS = 1.3

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("kind", sana_wm_cpu.KINDS)
def test_block_beside_its_matrix_products(kind, record_property):
    measured = sana_wm_cpu.measure_block(kind, repetitions=7)
    seconds = {name: [round(value, 3) for value in timing.seconds] for name, timing in measured["timings"].items()}
    told = f"{kind}: ratios {measured['ratios']}; seconds {seconds}; {environment()}"
    print(told)
    record_property("ratios", measured["ratios"])
    assert measured["ratios"]["block / products"] <= BESIDE_PRODUCTS, told
