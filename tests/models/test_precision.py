"""Where SANA in bfloat16 computes in float32, read from the traced program of the published width."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from sana_jax.models.sana import SanaConfig, SanaTransformer, init_params
from tests.models.traced_operations import ISLANDS, PRODUCTS, Operation, operations, wide_products

BATCH, SIDE, CAPTION = 2, 32, 300


def traced(dtype: jnp.dtype) -> list[Operation]:
    transformer = SanaTransformer(SanaConfig.sana15_1600m(), dtype=dtype)
    params = jax.eval_shape(lambda: init_params(transformer, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    shapes = ((BATCH, SIDE, SIDE, 32), (BATCH, CAPTION, 2304), (BATCH,))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    mask = jax.ShapeDtypeStruct((BATCH, CAPTION), jnp.int32)

    def run(params, latents, caption, timestep, mask):
        return transformer.apply({"params": params}, latents, caption, timestep, encoder_attention_mask=mask)

    return operations(run, params, *inputs, mask)


@pytest.fixture(scope="module")
def half() -> list[Operation]:
    return traced(jnp.bfloat16)


def test_products_are_in_bfloat16_but_for_the_sums_of_linear_attention(half):
    wide = wide_products(half)
    assert {re.sub(r".*/transformer_blocks/", "", one.scope).split("/")[0] for one in wide} == {"attn1"}
    total, of_wide = sum(one.flops for one in half), sum(one.flops for one in wide)
    layers, tokens, width, head = 20, BATCH * SIDE * SIDE, 2240, 32
    # a state and its use for each head, and the normaliser
    assert of_wide == layers * 2 * tokens * width * (2 * head + 1)
    assert 0 < of_wide < 0.01 * total
    assert len([one for one in half if one.name in PRODUCTS]) > 15


def test_the_same_network_in_float32_is_found_out():
    """The search can fail: there every product is wide."""
    found = traced(jnp.float32)
    assert len(wide_products(found)) == len([one for one in found if one.name in PRODUCTS])


def test_statistics_and_softmax_are_in_float32(half):
    islands = [one for one in half if one.name in ISLANDS and one.output.ndim >= 2]
    assert {one.output.dtype for one in islands} == {jnp.dtype("float32")}
    kinds = {(one.name, re.sub(r".*/transformer_blocks/?", "", one.scope)) for one in islands}
    for norm in ("attn1/norm_q", "attn1/norm_k", "attn2/norm_q", "attn2/norm_k", "SanaTransformer/caption_norm"):
        assert ("rsqrt", norm) in kinds
    assert {name for name, scope in kinds if scope == "attn2"} == {
        "exp",
        "reduce_max",
        "reduce_sum",
        "div",
    }
    # the logits leave the product of bfloat16 queries and keys as float32
    logits = [one for one in half if one.name == "dot_general" and one.scope.endswith("attn2/bhmd,bhnd->bhmn")]
    assert [one.output.dtype for one in logits] == [jnp.dtype("float32")]


def test_modulation_is_in_float32(half):
    vectors = {(BATCH, 1, 2240), (BATCH, 6, 2240)}
    arithmetic = [one for one in half if one.name in ("add", "mul", "sub") and one.output.shape in vectors]
    assert arithmetic
    assert {one.output.dtype for one in arithmetic} == {jnp.dtype("float32")}


def test_no_weight_is_widened_and_nothing_is_float64(half):
    widened = [
        one
        for one in half
        if one.name == "convert_element_type"
        and one.inputs[0].dtype == jnp.bfloat16
        and one.output.dtype == jnp.float32
        and one.output.shape[-2:] in {(2240, 2240), (2240, 11200), (5600, 2240), (2304, 2240), (2240, 13440)}
    ]
    assert not widened
    assert not [one for one in half if one.output.dtype == jnp.float64]
