"""Where SANA-Video, SANA-WM and the text encoders in bfloat16 compute in float32, read from their traced programs.

Sizes are the published ones, but for the number of tokens. ``test_precision.py`` does the same for SANA.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from sana_jax.models import gemma, sana_video, sana_wm
from sana_jax.models.gemma import Gemma, GemmaConfig
from sana_jax.models.gemma3_config import Gemma3Config
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from tests.models.traced_operations import ISLANDS, PRODUCTS, Operation, operations, wide_products

BATCH, FRAMES, ROWS, COLUMNS, CAPTION = 2, 3, 8, 10, 300
TOKENS = BATCH * FRAMES * ROWS * COLUMNS
WIDTH, HEAD = 2240, 112  # of both video networks


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes_of_params(module: Any, network: Any, dtype: Any) -> Any:
    params = jax.eval_shape(lambda: module.init_params(network, jax.random.key(0)))
    return jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=dtype), params)


def video(dtype: Any, *, with_state: bool = False) -> list[Operation]:
    """A clip, each of whose frames has its own time; or a block of LongSANA, with a state."""
    config = SanaVideoConfig()
    network = SanaVideoTransformer(config, dtype=dtype)

    def run(params, latents, caption, times, mask, state):
        return network.apply({"params": params}, latents, caption, times, mask, state=state)

    _, *patch = config.patch_size
    latents = shape(BATCH, FRAMES, ROWS * patch[0], COLUMNS * patch[1], config.in_channels)
    state = None
    if with_state:
        state = jax.eval_shape(lambda: sana_video.init_state(config, BATCH, (ROWS, COLUMNS), dtype=dtype))
    return operations(
        run,
        shapes_of_params(sana_video, network, dtype),
        latents,
        shape(BATCH, CAPTION, config.caption_channels),
        shape(BATCH, FRAMES),
        shape(BATCH, CAPTION, dtype=jnp.int32),
        state,
    )


def world(dtype: Any, **changed: Any) -> list[Operation]:
    config = SanaWMConfig(**changed)
    network = SanaWMTransformer(config, dtype=dtype)

    def run(params, latents, caption, times, mask, camera, plucker):
        return network.apply({"params": params}, latents, caption, times, mask, camera, plucker)

    return operations(
        run,
        shapes_of_params(sana_wm, network, dtype),
        shape(BATCH, FRAMES, ROWS, COLUMNS, config.in_channels),
        shape(BATCH, CAPTION, config.caption_channels),
        shape(BATCH, FRAMES),
        shape(BATCH, CAPTION, dtype=jnp.int32),
        shape(BATCH, FRAMES, 20),
        shape(BATCH, FRAMES, ROWS, COLUMNS, config.chunk_plucker_channels),
    )


def gemma_2(dtype: Any) -> list[Operation]:
    network = Gemma(GemmaConfig(), dtype=dtype)
    ids = shape(BATCH, CAPTION, dtype=jnp.int32)
    return operations(
        lambda params, ids: network.apply({"params": params}, ids), shapes_of_params(gemma, network, dtype), ids
    )


def gemma_3(dtype: Any) -> list[Operation]:
    network = Gemma(Gemma3Config(), dtype=dtype)

    def run(params, ids, mask):
        return network.apply({"params": params}, ids, mask, packed_length=512)

    ids = shape(BATCH, CAPTION, dtype=jnp.int32)
    return operations(run, shapes_of_params(gemma, network, dtype), ids, ids)


class Expected(NamedTuple):
    """Of a network in bfloat16: it, where products are wide, their share of the FLOPs at most, and its norms."""

    network: Callable[[Any], list[Operation]]
    wide: frozenset[str]
    share: float
    norms: frozenset[str]


VIDEO_NORMS = frozenset({"caption_norm", "attn1/norm_q", "attn1/norm_k", "attn2/norm_q", "attn2/norm_k"})
GEMMA_NORMS = frozenset(
    f"{place}_layernorm" for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")
)
EXPECTED = {
    "video": Expected(video, frozenset({"attn1"}), 0.01, VIDEO_NORMS),
    "long video": Expected(lambda dtype: video(dtype, with_state=True), frozenset({"attn1"}), 0.01, VIDEO_NORMS),
    "world": Expected(world, frozenset({"attn1"}), 0.02, VIDEO_NORMS | {"attn1/norm_q_camera", "attn1/norm_k_camera"}),
    "world, softmax alone": Expected(lambda dtype: world(dtype, softmax_every_n=1), frozenset(), 0.0, VIDEO_NORMS),
    "gemma 2": Expected(gemma_2, frozenset(), 0.0, GEMMA_NORMS | {"Gemma/norm"}),
    "gemma 3": Expected(gemma_3, frozenset(), 0.0, GEMMA_NORMS | {"self_attn/q_norm", "self_attn/k_norm"}),
}


@pytest.fixture(scope="module", params=EXPECTED)
def half(request) -> tuple[Expected, list[Operation]]:
    expected = EXPECTED[request.param]
    return expected, expected.network(jnp.bfloat16)


def place(scope: str) -> str:
    """The part of a block, or of the network outside the blocks."""
    return re.sub(r".*(transformer_blocks|SanaWMBlock|/layers|SanaWMTransformer|SanaVideoTransformer)/", "", scope)


def test_products_are_in_bfloat16_but_for_named_ones(half):
    expected, found = half
    wide = wide_products(found)
    assert {place(one.scope).split("/")[0] for one in wide} == expected.wide
    assert sum(one.flops for one in wide) <= expected.share * sum(one.flops for one in found)
    assert len([one for one in found if one.name in PRODUCTS]) >= 9


def test_linear_attention_of_videos_is_a_state_its_use_and_the_normaliser():
    of_wide = sum(one.flops for one in wide_products(video(jnp.bfloat16)))
    assert of_wide == SanaVideoConfig().num_layers * 2 * TOKENS * WIDTH * (2 * HEAD + 1)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_same_networks_in_float32_are_found_out(name):
    """The search can fail: there products are wide, but for those of SANA-WM's softmax, which rounds its inputs."""
    found = EXPECTED[name].network(jnp.float32)
    products = [one for one in found if one.name in PRODUCTS]
    narrow = [one for one in products if one not in wide_products(found)]
    assert {place(one.scope).split("/")[0] for one in narrow} <= ({"attn1"} if name.startswith("world") else set())
    assert len(narrow) < 0.2 * len(products)


def test_statistics_and_softmax_are_in_float32(half):
    expected, found = half
    islands = [one for one in found if one.name in ISLANDS and one.output.ndim >= 2]
    assert {one.output.dtype for one in islands} == {jnp.dtype("float32")}
    normed = {one.scope for one in islands if one.name == "rsqrt"}
    for norm in expected.norms:
        assert any(scope.endswith(norm) for scope in normed), norm
    assert {"exp", "reduce_max", "reduce_sum", "div"} <= {one.name for one in islands if "attn" in one.scope}


def test_modulation_is_in_float32(half):
    expected, found = half
    if expected.norms >= VIDEO_NORMS:
        vectors = {(BATCH, FRAMES, count, WIDTH) for count in (1, 2, 6)}
        names = ("add", "mul", "sub")
        arithmetic = [one for one in found if one.name in names and one.output.shape in vectors]
        assert arithmetic
        assert {one.output.dtype for one in arithmetic} == {jnp.dtype("float32")}


def test_no_weight_is_widened_and_nothing_is_float64(half):
    _, found = half
    matrices = {one.inputs[1].shape[-2:] for one in found if one.name == "dot_general" and one.inputs[1].ndim == 2}
    widened = [
        one
        for one in found
        if one.name == "convert_element_type"
        and one.inputs[0].dtype == jnp.bfloat16
        and one.output.dtype == jnp.float32
        and one.output.ndim == 2
        and one.output.shape in matrices
    ]
    assert matrices
    assert not widened
    assert not [one for one in found if one.output.dtype == jnp.float64]
