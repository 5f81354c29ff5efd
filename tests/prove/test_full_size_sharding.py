"""Published recipes at their full size, compiled for eight and 64 devices: half a minute each and no weights."""

from __future__ import annotations

import pytest

from tests.train.compiled_presets import check_fetched_layer_by_layer, compiled_report
from tests.train.compiled_text import Exchange
from tests.train.test_full_size_lowering import FULL_SIZE

pytestmark = pytest.mark.prove


@pytest.mark.parametrize("preset", FULL_SIZE)
def test_a_full_size_step_fetches_weights_layer_by_layer(preset, tmp_path):
    several = preset == "sprint" or "self_forcing" in preset or "longsana" in preset
    check_fetched_layer_by_layer(
        compiled_report(tmp_path / "report.json", preset, "fsdp=8"), fetches=None if several else 3
    )


@pytest.mark.parametrize("preset", ["sana15_4800m_1024", "sana_video_2b_480p"])
def test_so_it_does_over_64_devices(preset, tmp_path):
    check_fetched_layer_by_layer(compiled_report(tmp_path / "report.json", preset, "data=8", "fsdp=8"))


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_so_it_does_with_other_policies(remat, tmp_path):
    words = ("sana_600m_512", "fsdp=8", f"remat={remat}", "width=6")
    check_fetched_layer_by_layer(compiled_report(tmp_path / "report.json", *words))


def test_sprints_heads_are_gathered_tap_by_tap(tmp_path):
    """Their kernels are cut; devices gather one tap of them at a time, and what the heads compute stays where it is."""
    report = compiled_report(tmp_path / "report.json", "sprint", "fsdp=8", "width=10")
    heads, taps, width, _ = report["trained"]["params/heads/ring/kernel"][0]
    for path in (path for path in report["trained"] if "heads/" in path and "kernel" in path):
        whole, part = report["trained"][path]
        assert part == [*whole[:2], whole[2] // 8, whole[3]], path
    exchanged = [Exchange(kind, tuple(shape), loops) for kind, shape, loops in report["exchanges"]]
    one_tap = heads * width**2
    assert max(exchange.size for exchange in exchanged if exchange.kind == "all-gather") == max(one_tap, 6 * width**2)
    assert sum(exchange.shape == (heads, width, width) for exchange in exchanged) > taps
    # not the gradient of what the heads read: that would be cut by its channels, as the kernels are
    moved = [exchange for exchange in exchanged if exchange.kind in ("all-to-all", "collective-permute")]
    assert all(len(exchange.shape) != 5 or exchange.shape[-1] != width // 8 for exchange in moved)
