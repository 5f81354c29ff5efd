"""SANA-WM's refiner, quantised: its blocks streamed from host memory or not, and what a budget chooses."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import SanaWMRefiner
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.errors import UserError
from sana_jax.pipelines.memory_plan import refiner_choices, refiner_frame_bytes
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


def test_a_budget_counts_keys_and_values_and_what_others_hold():
    found = {
        "params": _network("transformer", 13 * GB),
        "connectors_params": _network("connectors", GB),
        "text_encoder": types.SimpleNamespace(weights=_network("text_encoder", GB)),
    }
    whole = {"stream_blocks": False, "quantization": {}}
    # three quarters for 26 GB of weights, and for 11 frames of keys and values and 3 of the block that joins them
    assert refiner_choices(found, "36g", {}) == whole
    assert refiner_choices(found, "53.3g", {}, frame_bytes=GB)["stream_blocks"]
    assert refiner_choices(found, "53.4g", {}, frame_bytes=GB - 10**8) == whole
    assert refiner_choices(found, "36g", {}, held_bytes=2 * GB)["stream_blocks"]
    # two of ten blocks, and 11 frames
    with pytest.raises(UserError, match=r"transformer with keys and values takes 16\.20 GB beside 1\.00 GB.*is 23g"):
        refiner_choices(found, "22g", {}, frame_bytes=GB, held_bytes=GB)
    # what is quantised by name is counted so
    assert refiner_choices(found, "20g", {"transformer": Quantization("int8")})["stream_blocks"] is False


def test_a_frame_s_keys_and_values():
    refiner = tiny_refiner()
    video = jnp.asarray(np.moveaxis(draw_latents(2), 1, -1))
    state = refiner.start(video[:, :1], jnp.asarray(draw_prompt()), RefinerSampler((0.9, 0.0), 2, 1, 5), 16.0)
    rows, columns = (32 * length for length in video.shape[2:4])
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((state.sink, state.history)))
    assert refiner_frame_bytes(refiner.transformer, (rows, columns)) * 5 == kept
