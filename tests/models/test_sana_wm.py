"""SANA-WM's forms beside each other: all frames, causal blocks at once, scanned, and one at a time with a state."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import UserError
from sana_jax.lora import init_lora, merge_lora
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, init_params, init_state
from sana_jax.models.sana_wm_state import EMPTY, cache_frames, state_bytes
from sana_jax.models.sharding_rules import SANA_WM, lora_rules
from tests.kernels.shapes import QUICK_COMPILE, relative_error
from tests.parity.sana_wm_oracle import camera
from train.sharding import parameter_paths

CONFIG = SanaWMConfig(
    in_channels=4,
    num_layers=3,
    hidden_size=16,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=8,
    chunk_plucker_channels=6,
    chunk_plucker_post_attn_blocks=2,
    caption_channels=6,
    mlp_ratio=2.0,
)
BATCH, FRAMES, SIZE, CAPTION_TOKENS = 2, 8, (2, 3), 3
# first frames of the blocks, and the end: unequal ones, a block of one frame, equal ones
UNEQUAL, EQUAL = (0, 3, 4, 6, 8), (0, 2, 4, 6, 8)
VALUE, GRADIENT = 3e-6, 1e-5


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def network(**options) -> SanaWMTransformer:
    """Without the rounding of softmax layers: of a number between two of bfloat16, forms choose one or the other."""
    return SanaWMTransformer(CONFIG, softmax_dtype=None, **options)


@pytest.fixture(scope="module")
def params():
    """Random numbers everywhere, also where training starts with zeros."""
    shapes = abstract_params(CONFIG)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.2 * numbers)
        if name.endswith("kernel") and "conv_" not in name:
            return jnp.asarray(numbers / math.sqrt(leaf.shape[-2]))
        return jnp.asarray(0.5 * numbers)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def abstract_params(config: SanaWMConfig):
    return jax.eval_shape(lambda: init_params(SanaWMTransformer(config), jax.random.key(0)))


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "hidden_states": normal(BATCH, FRAMES, *SIZE, CONFIG.in_channels),
        "encoder_hidden_states": normal(BATCH, CAPTION_TOKENS, CONFIG.caption_channels),
        "timestep": rng.uniform(0, 1000, (BATCH, FRAMES)).astype(np.float32),
        "encoder_attention_mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
        "camera_conditions": camera(rng, BATCH, FRAMES, SIZE),
        "chunk_plucker": normal(BATCH, FRAMES, *SIZE, CONFIG.chunk_plucker_channels),
    }


def part(inputs: dict, start: int, end: int) -> dict:
    whole = ("encoder_hidden_states", "encoder_attention_mask")
    return {name: array if name in whole else array[:, start:end] for name, array in inputs.items()}


def empty_state(edges, window, sink=False):
    room = cache_frames(list(np.diff(edges)), window, sink)
    return init_state(CONFIG, BATCH, SIZE, room, window, sink, softmax_dtype=jnp.float32)


def all_at_once(model, params, inputs, edges, window, sink=False):
    if window is None:
        return model.apply({"params": params}, **inputs, block_starts=edges[:-1]), None
    state = empty_state(edges, window, sink)
    return model.apply({"params": params}, **inputs, block_starts=edges[:-1], state=state)


def in_turn(model, params, inputs, edges, window, sink=False):
    state, outputs = empty_state(edges, window, sink), []
    for start, end in itertools.pairwise(edges):
        given = part(inputs, start, end)
        velocity, state = model.apply({"params": params}, **given, state=state, first_frame=start)
        outputs.append(velocity)
    return jnp.concatenate(outputs, axis=1), state


def scanned(model, params, inputs, edges, window, sink=False):
    size, whole = edges[1], part(inputs, 0, 0)
    moving = {name for name, array in whole.items() if array.shape[1] == 0}

    def step(carry, block):
        state, first_frame = carry
        given = {**inputs, **block}
        velocity, state = model.apply({"params": params}, **given, state=state, first_frame=first_frame)
        return (state, first_frame + size), velocity

    def split(x):
        return jnp.moveaxis(x.reshape(BATCH, -1, size, *x.shape[2:]), 1, 0)

    before = (empty_state(edges, window, sink), jnp.int32(0))
    (state, _), outputs = jax.lax.scan(step, before, {name: split(inputs[name]) for name in moving})
    return jnp.moveaxis(outputs, 0, 1).reshape(inputs["hidden_states"].shape), state


@functools.cache
def compiled(use, edges, window=None, sink=False, **options):
    """``(params, inputs) -> output, state``"""
    model = network(**options)
    return jax.jit(
        lambda params, inputs: use(model, params, inputs, edges, window, sink), compiler_options=QUICK_COMPILE
    )


def what_counts(state):
    """A state without what is left in the room of frames that no block will see."""
    seen = state.frame_blocks != EMPTY
    softmax = state.softmax._replace(attention=jax.tree.map(lambda kept: kept[:, :, seen], state.softmax.attention))
    return dataclasses.replace(state, softmax=softmax)


@pytest.mark.parametrize(
    ("use", "edges", "window", "sink"),
    [
        pytest.param(scanned, EQUAL, None, False, id="scanned"),
        pytest.param(scanned, EQUAL, 2, True, id="scanned, 2 with the first"),
        pytest.param(in_turn, UNEQUAL, None, False, id="in turn", marks=pytest.mark.prove),
        pytest.param(in_turn, UNEQUAL, 1, False, id="in turn, 1", marks=pytest.mark.prove),
    ],
)
def test_three_uses_are_one_function(params, inputs, use, edges, window, sink):
    """Velocities and states of the recurrent uses are those of all blocks at once."""
    expected, last = compiled(all_at_once, edges, window, sink)(params, inputs)
    assert np.std(expected) > 0.3
    found, state = compiled(use, edges, window, sink)(params, inputs)
    assert relative_error(found, expected) <= VALUE
    if last is not None:  # all blocks at once begin without a state where there is no window, and give none
        np.testing.assert_array_equal(state.frame_blocks, last.frame_blocks)
        for leaf, wanted in zip(*(jax.tree.leaves(what_counts(which)) for which in (state, last)), strict=True):
            assert not np.any(wanted) or relative_error(leaf, wanted) <= VALUE


@functools.cache
def forward(block_starts=None, scan_blocks=True, remat="none"):
    model = network(scan_blocks=scan_blocks, remat=remat)

    def run(params, inputs, lora):
        variables = {"params": params} | ({} if lora is None else {"lora": lora})
        return model.apply(variables, **inputs, block_starts=block_starts)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def test_layers_scanned_and_unrolled(params, inputs):
    """With a LoRA of every dense layer beside the parameters, which, merged into them, is the same too."""
    rng = np.random.default_rng(4)
    lora = jax.eval_shape(lambda: init_lora(params, [".*"], 2, jax.random.key(0)))
    lora = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), lora)
    assert {"attn1/to_qkv", "plucker_proj"} <= {"/".join(p.split("/")[1:3]) for p in parameter_paths(lora)} | {
        p.split("/")[1] for p in parameter_paths(lora)
    }
    found = forward()(params, inputs, lora)
    assert relative_error(found, forward()(params, inputs, None)) > 0.01
    assert relative_error(forward(scan_blocks=False)(params, inputs, lora), found) <= VALUE
    assert relative_error(forward()(merge_lora(params, lora), inputs, None), found) <= 2e-5


def test_blocks_see_nothing_later(params, inputs):
    bidirectional = forward()(params, inputs, None)
    run, cut = forward(UNEQUAL[:-1]), UNEQUAL[2]
    before = run(params, inputs, None)
    assert relative_error(before, bidirectional) > 0.01
    at = (np.arange(FRAMES) >= cut)[:, None, None, None]
    after = run(params, {**inputs, "hidden_states": inputs["hidden_states"] + at}, None)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.abs(before - after)[:, cut:].max(axis=(0, 2, 3, 4)).min() > 0
    # and everything earlier
    at = (np.arange(FRAMES) == 0)[:, None, None, None]
    after = run(params, {**inputs, "hidden_states": inputs["hidden_states"] + at}, None)
    assert np.abs(before - after).max(axis=(0, 2, 3, 4)).min() > 0
    whole = jax.jit(network().apply, static_argnames="block_starts", compiler_options=QUICK_COMPILE)
    assert relative_error(whole({"params": params}, **inputs, block_starts=(0,)), bidirectional) <= VALUE


@pytest.mark.prove
@pytest.mark.parametrize(
    ("use", "options"),
    [(scanned, {}), (all_at_once, {"remat": "full"}), (all_at_once, {"scan_blocks": False})],
    ids=["scanned", "remat", "unrolled layers"],
)
def test_gradients_are_the_same(params, inputs, use, options):
    """In the recurrent use they go through the states."""
    weights = np.random.default_rng(2).standard_normal(inputs["hidden_states"].shape).astype(np.float32)

    def gradients(use, **options):
        model = network(**options)

        def loss(params, latents):
            return (use(model, params, {**inputs, "hidden_states": latents}, EQUAL, 2, True)[0] * weights).sum()

        return jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK_COMPILE)(params, inputs["hidden_states"])

    expected, found = gradients(all_at_once), gradients(use, **options)
    for (path, wanted), gradient in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found)):
        size = float(jnp.linalg.norm(wanted))
        assert float(jnp.linalg.norm(gradient - wanted)) <= GRADIENT * max(size, 1e-3), jax.tree_util.keystr(path)


def test_bfloat16(params, inputs):
    """The delta rule, rays and norms stay in float32, so that half precision costs what rounding costs."""
    exact = forward()(params, inputs, None)
    model = SanaWMTransformer(CONFIG, dtype=jnp.bfloat16)
    found = jax.jit(model.apply, compiler_options=QUICK_COMPILE)({"params": params}, **inputs)
    assert found.dtype == jnp.bfloat16
    assert 1e-3 < relative_error(found, exact) < 0.05


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "window", "sink", "room"),
    [
        ([4, 3, 3, 3], None, False, 10),
        ([4, 3, 3, 3], 2, True, 7),
        ([4, 3, 3, 3], 2, False, 7),
        ([4, 3, 3, 5], 1, False, 4),
        ([4, 3, 3, 3], 1, True, 4),
        ([4], None, False, 0),
    ],
)
def test_room_for_the_frames_that_a_block_sees(blocks, window, sink, room):
    assert cache_frames(blocks, window, sink) == room


@pytest.mark.parametrize("with_camera", [True, False])
def test_the_state_is_constant_in_size(with_camera):
    model = SanaWMTransformer(CONFIG, dtype=jnp.bfloat16)
    state = init_state(CONFIG, BATCH, SIZE, 7, 2, True, dtype=jnp.bfloat16, camera=with_camera)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    def step(params, state, frames):
        latents, caption = jnp.zeros((BATCH, frames, *SIZE, 4)), jnp.zeros((BATCH, 1, CONFIG.caption_channels))
        given = (latents, caption, jnp.zeros((BATCH, frames)), None)
        given += (jnp.ones((BATCH, frames, 20)),) if with_camera else ()
        return model.apply({"params": params}, *given, state=state)[1]

    for frames in (1, 4):
        after = jax.eval_shape(functools.partial(step, frames=frames), abstract_params(CONFIG), state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == shapes


def test_bytes_of_the_state_of_the_published_model():
    """704 x 1280 pixels in blocks of 4, 3, 3, ... latent frames, of which softmax layers see the first and the last."""
    config, grid = SanaWMConfig(), (22, 40)
    room = cache_frames([4, *[3] * 39], 2, True)
    assert room == 7
    state = jax.eval_shape(lambda: init_state(config, 1, grid, room, 2, True, dtype=jnp.bfloat16))
    size = state_bytes(state)
    frame = 22 * 40 * 2240 * 2
    # two memories, three frames of two convolutions' keys, one of the Mix-FFN
    assert size["delta"] == 15 * (4 * 20 * 112 * (2 * 112 + 1) + 2 * 3 * frame + frame)
    assert size["softmax"] == 5 * (4 * 7 + 1) * frame
    print(f"state of SANA-WM 2.6B at 704x1280: {size['total']:,} bytes")


def test_no_room_is_not_silent(params, inputs):
    """A block's frames that do not fit make the next block's velocities NaN."""
    run = jax.jit(network().apply, compiler_options=QUICK_COMPILE)
    state = init_state(CONFIG, BATCH, SIZE, 3, softmax_dtype=jnp.float32)
    for start, good in ((0, True), (2, True), (4, False)):
        given = part(inputs, start, start + 2)
        velocity, state = run({"params": params}, **given, state=state, first_frame=jnp.int32(start))
        assert np.isfinite(velocity).all() == good


# -- configurations ----------------------------------------------------------------------------------------------------


def test_every_parameter_has_one_sharding_rule():
    used = set()
    configs = (SanaWMConfig(), SanaWMConfig(ffn_type="mlp", k_conv_only=False))
    for params in map(abstract_params, configs):
        for path, leaf in parameter_paths(params).items():
            matches = [(pattern, axes) for pattern, axes in SANA_WM if re.fullmatch(pattern, path)]
            assert len(matches) == 1, path
            pattern, axes = matches[0]
            used.add(pattern)
            assert len(axes) == leaf.ndim, path
            cut = [axis for axis in axes if axis]
            assert len(cut) == len(set(cut)), path
            for length, axis in zip(leaf.shape, axes):
                assert axis is None or length % 8 == 0, path
            # whole on every device: vectors and tables
            assert cut or leaf.size <= 15 * 6 * 2240, path
        lora = {"lora": jax.eval_shape(lambda params=params: init_lora(params, [".*"], 4, jax.random.key(0)))}
        for path in parameter_paths(lora):
            assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in lora_rules(SANA_WM)) == 1, path
    assert used == {pattern for pattern, _ in SANA_WM}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"revision": "newest"}, "revision='newest'.*legacy, current"),
        ({"ffn_type": "glu"}, "ffn_type='glu'.*GLUMBConvTemp, mlp"),
        ({"t_kernel_size": 5}, "t_kernel_size=5.*three taps"),
        ({"cam_attn_compress": 2}, "cam_attn_compress=2"),
        ({"pred_sigma": True}, "pred_sigma=True"),
        ({"pos_embed_type": "sincos"}, "wan_rope"),
        ({"linear_head_dim": 20}, "linear_head_dim=20.*multiple of 8"),
        ({"linear_head_dim": 48}, "linear_head_dim=48 does not divide hidden_size=2240"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide"),
        ({"patch_size": [2, 1, 1]}, r"patch_size=\(2, 1, 1\)"),
        ({"patch_size": (1, 3, 3)}, "even number"),
        ({"patch_size": (1, 2, 1)}, "columns of an even number"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"softmax_every_n": -1}, "softmax_every_n=-1.*from 0 on"),
        ({"conv_kernel_size": 4.0}, "conv_kernel_size=4.0"),
        ({"mlp_acts": ["silu", "gelu", None]}, "mlp_acts"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"num_layers": "20"}, "num_layers='20'"),
    ],
)
def test_impossible_fields_are_named(changes, names):
    with pytest.raises(UserError, match=names):
        SanaWMConfig(**changes)


def test_configuration_files():
    with pytest.raises(UserError, match="colour"):
        SanaWMConfig.from_dict({"colour": 3})
    read = SanaWMConfig.from_dict({"_class_name": "x", "patch_size": [1, 2, 2], "mlp_ratio": 3})
    assert read.patch_size == (1, 2, 2)
    hash(read)
    for config in (SanaWMConfig(), SanaWMConfig(revision="current", chunk_plucker_post_attn_blocks=-1)):
        values = config.to_dict()
        assert SanaWMConfig.from_dict(values) == config
        assert ("revision" in values) == (config.revision == "current")
    assert SanaWMConfig().softmax_layers == (3, 7, 11, 15, 19)


# -- inputs that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": np.zeros(2, np.float32)}, r"timestep of shape \(2,\); allowed is \(2, 8\)"),
        ({"camera_conditions": np.zeros((2, 8, 16), np.float32)}, r"camera_conditions of shape.*\(2, 8, 20\)"),
        ({"chunk_plucker": np.zeros((2, 8, 2, 3, 48), np.float32)}, r"chunk_plucker of shape.*\(2, 8, 2, 3, 6\)"),
        ({"block_starts": (1, 4)}, r"block_starts=\(1, 4\)"),
        ({"convolution_starts": (0, 9)}, r"convolution_starts=\(0, 9\)"),
        ({"first_frame": 1020}, "1028 frames of tokens exceed the 1024"),
    ],
)
def test_inputs_that_do_not_fit(params, inputs, change, message):
    with pytest.raises(UserError, match=message):
        network().apply({"params": params}, **{**inputs, **change})


def test_states_that_do_not_fit(params, inputs):
    with pytest.raises(UserError, match="not one for 2 samples of 2x3 tokens"):
        network().apply({"params": params}, **inputs, state=init_state(CONFIG, BATCH, (2, 2), 4))
    with pytest.raises(UserError, match="num_cached_blocks=0"):
        init_state(CONFIG, BATCH, SIZE, 4, 0)
    state, without = (init_state(CONFIG, BATCH, SIZE, 4, camera=camera) for camera in (True, False))
    bare = {name: array for name, array in inputs.items() if name not in ("camera_conditions", "chunk_plucker")}
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.delta.attention.main)
    attention = state.delta.attention
    frames = attention._replace(tails=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), attention.tails))
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), state.softmax.attention)

    def with_delta(attention):
        return dataclasses.replace(state, delta=state.delta._replace(attention=attention))

    for given, changed, message in (
        (inputs, without, r"without a camera, and this one has camera_conditions;.*camera=True"),
        (bare, state, r"with a camera, and this one has no camera_conditions;.*camera=False"),
        (inputs, with_delta(attention._replace(main=narrow)), r"delta/attention/main/\w+ is bfloat16.* to be float32"),
        (inputs, with_delta(frames), "state's frames are bfloat16, float32; allowed is one"),
        (
            inputs,
            dataclasses.replace(state, softmax=state.softmax._replace(attention=whole)),
            "keys and values are int32; allowed is one floating-point dtype",
        ),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(functools.partial(network().apply, state=changed), {"params": params}, **given)
    with pytest.raises(UserError, match="sink=True without num_cached_blocks"):
        cache_frames([1, 2], None, True)
