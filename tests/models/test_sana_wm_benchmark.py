"""``tests.benchmarks.sana_wm_cpu`` at a tiny size: it runs to its end, and its two blocks are of one kind."""

from __future__ import annotations

import pytest

from sana_jax.models.sana_wm import SanaWMConfig
from tests.benchmarks import sana_wm_cpu

TINY = SanaWMConfig(
    in_channels=4,
    num_layers=2,
    hidden_size=48,
    num_attention_heads=4,
    softmax_every_n=2,
    linear_head_dim=24,
    caption_channels=8,
    mlp_ratio=2.0,
)


@pytest.mark.parametrize("kind", ["delta rule", pytest.param("softmax", marks=pytest.mark.prove)])
def test_runs(monkeypatch, kind):
    monkeypatch.setattr(sana_wm_cpu, "GRID", (2, 2, 3))
    measured = sana_wm_cpu.measure_block(kind, repetitions=2, torch_threads=1, config=TINY)
    assert set(measured["ratios"]) == {"torch / products", "block / products", "block / torch"}
    assert all(ratio > 0 for ratio in measured["ratios"].values())
    assert set(measured["timings"]) == {"block", "products", "torch", "products beside torch"}
