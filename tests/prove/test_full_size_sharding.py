"""The smallest published model at its full size, compiled for eight devices: about a minute and no weights."""

from __future__ import annotations

import pytest

from tests.train.compiled_presets import check_fetched_layer_by_layer, compiled_report

pytestmark = pytest.mark.prove


@pytest.mark.parametrize("preset", ["sana_600m_512", "lora_24gb"])
def test_a_full_size_step_fetches_weights_layer_by_layer(preset, tmp_path):
    check_fetched_layer_by_layer(compiled_report(tmp_path / "report.json", preset, "fsdp=8"))


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_so_it_does_with_other_policies(remat, tmp_path):
    words = ("sana_600m_512", "fsdp=8", f"remat={remat}", "width=6")
    check_fetched_layer_by_layer(compiled_report(tmp_path / "report.json", *words))
