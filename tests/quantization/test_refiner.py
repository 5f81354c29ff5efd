"""SANA-WM's refiner, quantised: its blocks streamed from host memory or not, and what a budget chooses."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import SanaWMRefiner
from sana_jax.errors import UserError
from sana_jax.pipelines.memory_plan import refiner_choices
from sana_jax.pipelines.world_refiner_streamed import BLOCKS
from sana_jax.quantization.choice import Quantization
from sana_jax.quantization.tables import relative_error
from sana_jax.quantization.weights import quantized_weights
from sana_jax.weights.components import Resident
from sana_jax.weights.streamed import StreamedResident
from sana_jax.weights.trees import tree_bytes
from tests.pipelines.tiny_refiner import draw_latents, draw_prompt, tiny_refiner

OPTIONS = {"block_size": 2, "kv_max_frames": 3, "sigmas": (0.9, 0.0), "say": lambda line: None}
GB = 10**9


def test_quantised_blocks_that_are_streamed_give_the_numbers_of_those_on_the_device():
    plain = tiny_refiner()
    params = plain.transformer_weights.params
    choice = Quantization("nvfp4")
    residents = [Resident.of("transformer", params), StreamedResident.from_params("transformer", params, BLOCKS)]
    found = []
    for weights in (residents[0], *(quantized_weights(one, choice, "transformer") for one in residents)):
        refiner = SanaWMRefiner(plain.transformer, weights, plain.connectors, plain.connectors_weights)
        found.append(refiner(draw_latents(3), prompt_embeds=draw_prompt(), **OPTIONS).frames)
    np.testing.assert_array_equal(found[2], found[1])
    assert 0.001 < relative_error(found[1], found[0]) < 0.5


def _network(name: str, count: float) -> Resident:
    abstract = {BLOCKS: {"kernel": jax.ShapeDtypeStruct((10, 10000, int(count) // 100000), jnp.bfloat16)}}
    return Resident(name, tree_bytes(abstract), lambda: abstract, abstract)


def test_a_budget_streams_the_blocks_and_quantises_the_text_encoder():
    found = {
        "params": _network("transformer", 13 * GB),
        "connectors_params": _network("connectors", GB),
        "text_encoder": types.SimpleNamespace(weights=_network("text_encoder", 12 * GB)),
    }
    assert refiner_choices(found, "80g", {}) == {"stream_blocks": False, "quantization": {}}
    expected = {"24g": "int8", "16g": "nvfp4", "12g": "nvfp4"}
    for memory, format_name in expected.items():
        got = refiner_choices(found, memory, {})
        assert got == {"stream_blocks": True, "quantization": {"text_encoder": Quantization(format_name)}}
    with pytest.raises(UserError, match=r"memory 6g is not enough.*text_encoder.*least that is enough is 9\.1g"):
        refiner_choices(found, "6g", {})
