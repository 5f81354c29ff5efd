"""Memory budgets: what is chosen from shapes alone, what is refused, and the check afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sana_jax.errors import UserError
from sana_jax.pipelines.memory_plan import USABLE, Work, choose_plan, parse_memory
from sana_jax.quantization.tables import block_errors, network_bytes
from sana_jax.weights.components import Resident
from sana_jax.weights.trees import tree_bytes

GB = 10**9
# bytes of a text encoder, a transformer and an autoencoder without dense layers
WORK = Work(text=GB, layer=0, sample=2 * GB, sums=GB, samples=2, decode=6 * GB, tile=GB)


def _network(parameters: float, key: str = "kernel") -> Resident:
    """Weights of one dense layer in bfloat16; nothing of that size is made."""
    abstract = {"layer": {key: jax.ShapeDtypeStruct((10000, int(parameters) // 10000), jnp.bfloat16)}}
    return Resident("network", tree_bytes(abstract), lambda: abstract, abstract)


def _networks(text: float, transformer: float) -> dict[str, Resident]:
    sizes = {"text_encoder": _network(text), "transformer": _network(transformer)}
    return {**sizes, "autoencoder": _network(0.5 * GB, "conv")}


def _plan(budget: str, text: float = 2.5 * GB, transformer: float = 1.5 * GB):
    return choose_plan(parse_memory(budget), _networks(text, transformer), "text_encoder_freed", WORK)


def test_plans_change_as_little_as_the_budget_allows():
    # The largest stage each: all weights and the decoding of a later call; what is at work and guidance in one batch.
    plan = _plan("24g")
    assert (plan.residency, plan.tiling, plan.guidance_batching) == ("text_encoder_freed", None, "auto")
    assert dict(plan.quantization) == {}
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["text"].weights == 9 * GB
    assert stages["decode"].total == (3 + 1 + 6) * GB
    assert stages["denoise"].total == (3 + 1 + 2 * 2) * GB
    alone = _plan("9g")
    assert alone.residency == "one_at_a_time"
    assert alone.tiling is None
    assert {stage.name: stage.total for stage in alone.stages} == {"text": 6 * GB, "denoise": 7 * GB, "decode": 7 * GB}
    assert _plan("7.6g", transformer=GB).tiling is True
    split = _plan("7g")
    assert split.guidance_batching == "split"
    assert not split.quantization
    # Only the network that does not fit is quantised, in the better format where that is enough.
    assert {name: one.format for name, one in _plan("6g").quantization.items()} == {"text_encoder": "int8"}
    assert {name: one.format for name, one in _plan("16g", transformer=10 * GB).quantization.items()} == {
        "transformer": "int8"
    }
    assert {name: one.format for name, one in _plan("12g", transformer=10 * GB).quantization.items()} == {
        "transformer": "nvfp4"
    }
    for plan in (_plan("24g"), alone, split):
        assert plan.fits
        assert plan.peak <= USABLE * plan.budget


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can():
    with pytest.raises(UserError, match=r"memory 3g is not enough.*the least that is enough is ([\d.]+)g") as caught:
        _plan("3g", transformer=10 * GB)
    least = float(str(caught.value).rsplit(" ", 1)[1].removesuffix("g"))
    assert _plan(f"{least:g}g", transformer=10 * GB).fits
    with pytest.raises(UserError, match="is not enough"):
        _plan(f"{least - 0.1:g}g", transformer=10 * GB)


@pytest.mark.parametrize("text", ["24", "lots", "-3g", "0g", "12m"])
def test_a_budget_in_another_form_is_refused(text):
    with pytest.raises(UserError, match="allowed are 24g, 16g, 12g"):
        parse_memory(text)
    assert parse_memory("12g") == parse_memory("12 GB") == 12 * GB


class _Device:
    def __init__(self, used):
        self.used = used

    def memory_stats(self):
        return None if self.used is None else {"peak_bytes_in_use": self.used}


def test_the_check_says_when_the_budget_was_exceeded():
    plan = _plan("24g")  # denoise 8 GB, the largest stage 10 GB
    assert plan.check(device=_Device(8 * GB)).startswith("memory check: kept: the device reports 8.00 GB")
    assert "more than planned, within the budget" in plan.check(device=_Device(20 * GB))
    assert "EXCEEDED the budget of 24.00 GB: the device reports 25.00 GB" in plan.check(device=_Device(25 * GB))
    assert "kept: the compiler reports for sampling 7.00 GB" in plan.check(7 * GB, _Device(None))
    assert "more than planned" in plan.check(9 * GB, _Device(None))
    assert "neither the device nor the compiler" in plan.check(None, _Device(None))


def test_tables():
    networks = {row.network: row for row in network_bytes()}
    assert networks["SANA 1.6B"].parameters == 1_604_462_752
    for row in networks.values():
        # bits per quantised value: 8 and a column's scale, 4 and a block's of 16 bits per 32 or 8 bits per 16
        rest = row.bytes["bfloat16"] * (1 - row.quantised_share)
        count = row.bytes["bfloat16"] * row.quantised_share / 2
        for format_name, bits in (("int8", 8), ("fp8", 8), ("int4", 4.5), ("nvfp4", 4.5)):
            assert row.bytes[format_name] == pytest.approx(rest + count * bits / 8, rel=0.005)
    errors = {row.format: row.relative_error for row in block_errors(full_width=False)}
    assert errors["int8"] < errors["fp8"] < errors["nvfp4"] < errors["int4"] < 0.2
