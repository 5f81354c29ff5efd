"""SANA 1.6B on a CPU takes little more than its matrix products do, and no more than PyTorch takes."""

from __future__ import annotations

import pytest

from tests.benchmarks import sana_cpu

BESIDE_PRODUCTS = 1.25
BESIDE_TORCH = {512: 1.25, 1024: 1.0}

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


def report(part: dict) -> str:
    seconds = {name: [round(value, 3) for value in timing.seconds] for name, timing in part["timings"].items()}
    return f"ratios {part['ratios']}; seconds {seconds}; {sana_cpu.environment()}"


def test_block_beside_its_matrix_products():
    measured = sana_cpu.measure_block()
    print(report(measured))
    assert measured["ratios"]["block / products"] <= BESIDE_PRODUCTS, report(measured)


@pytest.fixture(scope="module")
def network():
    measured = sana_cpu.measure_network(repetitions=3)
    print(report(measured))
    return measured


def test_network_beside_its_matrix_products(network):
    assert network["ratios"]["network 1024 px / products"] <= BESIDE_PRODUCTS, report(network)


@pytest.mark.parametrize("pixels", BESIDE_TORCH)
def test_network_beside_torch(network, pixels):
    assert network["ratios"][f"network {pixels} px / torch"] <= BESIDE_TORCH[pixels], report(network)
