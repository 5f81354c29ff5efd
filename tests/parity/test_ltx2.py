"""LTX-2's video half and its connectors beside diffusers' refiner: outputs, gradients, prefix, names at full size."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax.models.ltx2 import LTX2VideoTransformer
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.ltx2_connectors import LTX2Connectors, LTX2ConnectorsConfig, normalize_packed_states
from sana_jax.models.ltx2_prefix import append_history, init_prefix
from sana_jax.nn.ltx2_rope import spread
from sana_jax.weights.tables.ltx2 import AUDIO
from tests.compiling import AS_USERS_COMPILE
from tests.parity import ltx2_oracle as oracle
from tests.parity.ltx2_oracle import BATCH, FPS, GRID, MASK
from tests.parity.sana_oracle import relative_error, to_numpy

OUTPUT_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
BF16_FACTOR = 1.5


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def forward(variant: str, dtype=jnp.float32):
    """Compiled ``(params, inputs, rotation) -> velocity``; the published kind in float32 as users compile it."""
    model = LTX2VideoTransformer(oracle.jax_config(variant), dtype=dtype)
    return jax.jit(
        lambda params, inputs, rotation: model.apply(
            {"params": params}, **inputs, encoder_attention_mask=jnp.asarray(MASK), rotation=rotation
        ),
        compiler_options=AS_USERS_COMPILE if (variant, dtype) == ("split", jnp.float32) else {},
    )


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_output(variant):
    """At a place in the video where angles are in the ten thousands."""
    inputs = oracle.inputs(variant)
    rotation = oracle.jax_config(variant).rotation(GRID, fps=FPS, first_frame=71)
    found = forward(variant)(oracle.params_for(variant), inputs, rotation)
    with torch.no_grad():
        expected = to_numpy(oracle.torch_forward(variant, inputs, first_frame=71)[0])
    assert np.std(expected) > 0.3
    assert relative_error(found, expected) <= OUTPUT_TOLERANCE


def test_gradients():
    """What the blocks compute again in the backward pass changes nothing."""
    variant = "split, gates"
    inputs, weights = oracle.inputs(variant), oracle.draw(BATCH, *GRID, 6, seed=5)
    config = oracle.jax_config(variant)
    model, rotation = LTX2VideoTransformer(config, remat="full"), config.rotation(GRID, fps=FPS)

    @jax.jit
    def run(wanted):
        def loss(wanted):
            arguments = (wanted["hidden_states"], wanted["encoder_hidden_states"], inputs["timestep"])
            out = model.apply({"params": wanted["params"]}, *arguments, jnp.asarray(MASK), rotation=rotation)
            return (out * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(wanted)
        return out, gradients

    names = ("hidden_states", "encoder_hidden_states")
    out, found = run({"params": oracle.params_for(variant)} | {name: inputs[name] for name in names})
    expected_out, expected = oracle.torch_output_and_gradients(variant, inputs, weights)
    assert relative_error(out, expected_out) <= OUTPUT_TOLERANCE
    flat = [jax.tree_util.tree_leaves_with_path(side) for side in (found, expected)]
    errors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): relative_error(mine, theirs)
        for (path, mine), (_, theirs) in zip(*flat)
    }
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert len(errors) == 2 + len(jax.tree.leaves(oracle.params_for(variant)))
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


def test_bfloat16():
    """Our error against float32 is at most 1.5 times PyTorch's."""
    variant = "split, gates"
    inputs, rotation = oracle.inputs(variant), oracle.jax_config(variant).rotation(GRID, fps=FPS)
    with torch.no_grad():
        exact = to_numpy(oracle.torch_forward(variant, inputs)[0])
        theirs = to_numpy(oracle.torch_forward(variant, inputs, dtype=torch.bfloat16)[0].float())
    found = forward(variant, jnp.bfloat16)(oracle.params_for(variant), inputs, rotation)
    assert found.dtype == jnp.bfloat16
    assert 1e-3 < relative_error(found, exact) <= BF16_FACTOR * relative_error(theirs, exact)


@pytest.mark.parametrize(("first_frame", "fps"), [(0, 16.0), (118, 24.0)])
@pytest.mark.parametrize("variant", ["split", "interleaved"])
def test_rotation(variant, first_frame, fps):
    """The tables themselves, at full width and beside diffusers' own spreading of them over tokens."""
    config = LTX2Config(rope_type=variant)
    with torch.device("meta"):
        model = oracle.SanaWMLTX2RefinerTransformer3DModel(rope_type=variant, num_layers=1)
    build = model.build_rotary_emb_for_absolute_positions
    theirs = build(1, list(range(first_frame, first_frame + 4)), 3, 2, torch.device("cpu"), fps)
    tables = config.rotation((4, 3, 2), fps=fps, first_frame=first_frame)
    for mine, table in zip(spread(tables, 32, 128), theirs):
        if variant == "split":
            expected = table[0].swapaxes(0, 1).numpy()
        else:
            expected = table[0, :, 0::2].unflatten(1, (32, 64)).numpy()
        # a float32 cosine of PyTorch's is not always the nearest number
        np.testing.assert_allclose(mine, expected, atol=1.5e-7, rtol=0)
    if first_frame:  # angles beyond 3·10^4, at which a rounding of the last place would show
        assert first_frame * 8 / fps / 20 * 2 - 1 > 2


def test_blocks_with_a_prefix():
    """SANA-WM's order of calls: a sink, blocks of three frames, a history of four, a short last block; one program."""
    variant, block, capacity, frames = "split, gates", 3, 4, 12
    config, model = oracle.jax_config(variant), LTX2VideoTransformer(oracle.jax_config(variant))
    params, size, mask = oracle.params_for(variant), GRID[1:], jnp.asarray(MASK)
    video = oracle.inputs(variant, frames, seed=3)
    prompt, latents = video["encoder_hidden_states"], video["hidden_states"]
    compiled = []

    @jax.jit
    def run_block(params, latents, times, valid, rotation, sink_rotation, prefix):
        compiled.append(latents.shape)
        positions = {"rotation": rotation, "sink_rotation": sink_rotation, "prefix": prefix}
        seen = jnp.broadcast_to(jnp.arange(block) < valid, (BATCH, block))
        arguments = ({"params": params}, latents, prompt, times, mask)
        velocity, rotated = model.apply(*arguments, **positions, frame_valid_mask=seen, capture="rotated")
        return velocity, rotated, append_history(prefix, rotated, valid)

    def theirs(first, count, time, cache, mode):
        arrays = {**video, "hidden_states": latents[:, first : first + count], "timestep": np.full(BATCH, time, "f")}
        with torch.no_grad():
            return to_numpy(oracle.torch_forward(variant, arrays, first, cache, mode)[0])

    def compare(found, captured):
        for mine, their in zip(found, zip(*captured), strict=True):
            for layer, expected in zip(mine, their, strict=True):
                expected = to_numpy(expected).reshape(BATCH, -1, *layer.shape[2:])
                assert relative_error(layer[:, : expected.shape[1]], expected) <= OUTPUT_TOLERANCE

    cache = oracle.SanaWMRefinerKVCache(config.num_layers)
    layers = [cache.get(i) for i in range(config.num_layers)]
    expected = theirs(0, 1, 0.0, cache, "capture_pre_rope")
    sink_rotation = config.rotation((1, *size), fps=FPS)
    first = jax.jit(functools.partial(model.apply, capture="unrotated"))
    velocity, sink = first({"params": params}, latents[:, :1], prompt, jnp.zeros(BATCH), mask, rotation=sink_rotation)
    assert relative_error(velocity, expected) <= OUTPUT_TOLERANCE
    captured = [layer.get_captured_pre_rope() for layer in layers]
    compare(sink, captured)
    for layer, (key, value) in zip(layers, captured):
        layer.store_sink(key, value)
    prefix = init_prefix(sink, 1, capacity)

    history = 0
    for start in range(1, frames, block):
        count, offset, time = min(block, frames - start), start - history - 1, 100.0 + start
        cache.sink_pe = oracle.rotary_embedding(variant, [offset], size)
        expected = theirs(start, count, time, cache, "inject_and_capture_post_rope")
        filled = np.zeros((BATCH, block, *size, config.in_channels), np.float32)
        filled[:, :count] = latents[:, start : start + count]
        filled[:, count:] = 1e3  # nothing of what fills a short block up may be seen
        rotations = (
            config.rotation((block, *size), fps=FPS, first_frame=start),
            config.rotation((1, *size), fps=FPS, first_frame=offset),
        )
        velocity, rotated, prefix = run_block(params, filled, np.full(BATCH, time, "f"), count, *rotations, prefix)
        assert relative_error(velocity[:, :count], expected) <= OUTPUT_TOLERANCE
        captured = [layer.get_captured_post_rope() for layer in layers]
        compare(rotated, captured)
        history = min(history + count, capacity)
        keep = history * math.prod(size)
        for layer, new in zip(layers, captured):
            old = layer.get_history()
            joined = new if old is None else [torch.cat(pair, dim=1) for pair in zip(old, new)]
            layer.store_history(*(tokens[:, -keep:] for tokens in joined))
        assert int(prefix.history_frames) == history
    assert len(compiled) == 1


@pytest.mark.parametrize("variant", oracle.CONNECTOR_VARIANTS)
def test_connectors(variant):
    """Padding on the left, as Gemma-3 has it, and a text that fills all places."""
    config, length = oracle.connectors_config(variant), 12
    states = 3 * oracle.draw(3, length, config.caption_channels, config.text_proj_in_factor) + 1
    states *= np.array([1, 30, 0.1, 5], np.float32)  # layers of different sizes
    mask = (np.arange(length) >= np.array([[7], [0], [2]])).astype(np.int32)
    model = LTX2Connectors(config)
    found, seen = jax.jit(model.apply)({"params": oracle.connectors_params(variant)}, states, mask)
    with torch.no_grad():
        expected, _, their_mask = oracle.torch_connectors(variant)(torch.tensor(states), torch.tensor(mask))
    assert relative_error(found, to_numpy(expected)) <= OUTPUT_TOLERANCE
    np.testing.assert_array_equal(seen, their_mask.numpy())
    again, _ = jax.jit(model.apply)(
        {"params": oracle.connectors_params(variant)}, normalize_packed_states(jnp.asarray(states), mask), mask
    )
    assert relative_error(again, found) <= 2e-6


def test_packing():
    from diffusers.pipelines.sana_wm.refiner import _pack_text_embeds

    states = 3 * oracle.draw(2, 7, 5, 3) - 2
    mask = (np.arange(7) >= np.array([[4], [0]])).astype(np.int32)
    expected = _pack_text_embeds(torch.tensor(states), torch.tensor(mask.sum(-1)), "cpu")
    found = normalize_packed_states(jnp.asarray(states), jnp.asarray(mask))
    assert relative_error(found.reshape(2, 7, 15), expected.numpy()) <= 1e-6
    np.testing.assert_array_equal(found[0, :4], 0)


@pytest.mark.parametrize(
    ("config", "used", "whole"),
    [
        (LTX2Config.ltx2(), 13_041_520_768, 18_876_174_592),
        (LTX2ConnectorsConfig.ltx2(), 1_077_004_800, 1_431_475_200),
    ],
    ids=["transformer", "connectors"],
)
def test_full_size(config, used, whole):
    model, wanted = oracle.full_size(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(math.prod(shape) for shape in theirs.values()) == whole
    audio = {name for name in theirs if any(re.fullmatch(pattern, name) for pattern in AUDIO)}
    assert wanted == {name: shape for name, shape in theirs.items() if name not in audio}
    assert sum(math.prod(shape) for shape in wanted.values()) == used
    if isinstance(config, LTX2Config):
        assert (len(theirs), len(wanted)) == (3510, 1215)
