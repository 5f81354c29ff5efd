"""SANA-Video's forms beside each other: all frames, causal blocks at once, scanned, and one at a time with a state."""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import UserError
from sana_jax.lora import init_lora, match_targets, merge_lora
from sana_jax.models.sana_video import (
    SanaVideoConfig,
    SanaVideoTransformer,
    init_params,
    init_state,
    kv_cache_bytes,
    state_bytes,
)
from sana_jax.models.sharding_rules import SANA_VIDEO, lora_rules
from tests.kernels.shapes import QUICK_COMPILE, relative_error
from train.sharding import parameter_paths

CONFIG = SanaVideoConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=6,
    mlp_ratio=2.0,
)
BATCH, FRAMES, SIZE, CAPTION_TOKENS = 2, 6, (4, 6), 3
GRID = (2, 3)
# first frames of the blocks, and the end: unequal ones, a block of one frame, equal ones
UNEQUAL, EQUAL = (0, 3, 4, 6), (0, 2, 4, 6)
VALUE, GRADIENT = 2e-6, 1e-5


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    """Random numbers everywhere, also where training starts with zeros."""
    shapes = jax.eval_shape(lambda: init_params(SanaVideoTransformer(CONFIG), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.2 * numbers)
        # A query of which the ReLU leaves a single small channel has a gradient that is all rounding: a common offset
        # of queries and keys leaves every one several.
        if name.endswith("kernel"):
            offset = 1.5 / leaf.shape[-2] if name.endswith(("attn1/to_q/kernel", "attn1/to_k/kernel")) else 0
            return jnp.asarray(numbers / math.sqrt(leaf.shape[-2]) + offset)
        first_shift = np.zeros(leaf.shape, np.float32)
        if name == "transformer_blocks/scale_shift_table":
            first_shift[:, 0] = 1
        return jnp.asarray(0.5 * numbers + first_shift)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "latents": rng.standard_normal((BATCH, FRAMES, *SIZE, CONFIG.in_channels)).astype(np.float32),
        "caption": rng.standard_normal((BATCH, CAPTION_TOKENS, CONFIG.caption_channels)).astype(np.float32),
        "timestep": rng.uniform(0, 1000, (BATCH, FRAMES)).astype(np.float32),
        "mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    }


def ordered(inputs) -> tuple:
    """As the network takes them; a dict that went through ``jax.jit`` has its keys sorted."""
    return inputs["latents"], inputs["caption"], inputs["timestep"], inputs["mask"]


def all_at_once(model, params, inputs, edges, window):
    arguments = ({"params": params}, *ordered(inputs))
    if window is None:
        return model.apply(*arguments, block_starts=edges[:-1]), None
    return model.apply(*arguments, block_starts=edges[:-1], state=init_state(CONFIG, BATCH, GRID, window))


def in_turn(model, params, inputs, edges, window):
    state, outputs = init_state(CONFIG, BATCH, GRID, window), []
    for start, end in itertools.pairwise(edges):
        velocity, state = model.apply(
            {"params": params},
            inputs["latents"][:, start:end],
            inputs["caption"],
            inputs["timestep"][:, start:end],
            inputs["mask"],
            state=state,
            first_frame=start,
        )
        outputs.append(velocity)
    return jnp.concatenate(outputs, axis=1), state


def scanned(model, params, inputs, edges, window):
    size = edges[1]

    def split(x):
        return jnp.moveaxis(x.reshape(BATCH, -1, size, *x.shape[2:]), 1, 0)

    def step(carry, block):
        state, first_frame = carry
        latents, timestep = block
        arguments = ({"params": params}, latents, inputs["caption"], timestep, inputs["mask"])
        velocity, state = model.apply(*arguments, state=state, first_frame=first_frame)
        return (state, first_frame + size), velocity

    before = (init_state(CONFIG, BATCH, GRID, window), jnp.int32(0))
    (state, _), outputs = jax.lax.scan(step, before, (split(inputs["latents"]), split(inputs["timestep"])))
    return jnp.moveaxis(outputs, 0, 1).reshape(BATCH, FRAMES, *SIZE, -1), state


@functools.cache
def compiled(use, edges, window):
    """``(params, inputs) -> output, state``"""
    model = SanaVideoTransformer(CONFIG)
    return jax.jit(lambda params, inputs: use(model, params, inputs, edges, window), compiler_options=QUICK_COMPILE)


@functools.cache
def compiled_gradients(use, edges, window, remat="none", scan_blocks=True):
    """``(params, inputs, output_weights) -> gradients`` with respect to parameters and latents."""
    model = SanaVideoTransformer(CONFIG, remat=remat, scan_blocks=scan_blocks)

    def run(params, inputs, weights):
        def loss(params, latents):
            return (use(model, params, {**inputs, "latents": latents}, edges, window)[0] * weights).sum()

        return jax.grad(loss, (0, 1))(params, inputs["latents"])

    return jax.jit(run, compiler_options=QUICK_COMPILE)


@pytest.mark.parametrize(
    ("use", "edges", "window"),
    [(in_turn, UNEQUAL, None), (in_turn, UNEQUAL, 1), (scanned, EQUAL, None), (scanned, EQUAL, 2)],
    ids=["in turn", "in turn, 1", "scanned", "scanned, 2"],
)
def test_three_uses_are_one_function(params, inputs, use, edges, window):
    """Velocities and states of the recurrent uses are those of all blocks at once."""
    expected, last = compiled(all_at_once, edges, window)(params, inputs)
    assert np.std(expected) > 0.3
    found, state = compiled(use, edges, window)(params, inputs)
    assert relative_error(found, expected) <= VALUE
    if window is None:
        state, last = None, None  # all blocks at once begin without a state, and give none
    for leaf, wanted in zip(*map(jax.tree.leaves, (state, last))):
        assert relative_error(leaf, wanted) <= VALUE


@pytest.mark.parametrize(
    ("use", "remat", "scan_blocks"),
    [
        pytest.param(scanned, "none", True, id="scanned blocks"),
        pytest.param(all_at_once, "full", True, id="remat", marks=pytest.mark.prove),
        pytest.param(all_at_once, "none", False, id="unrolled layers", marks=pytest.mark.prove),
    ],
)
def test_gradients_are_the_same(params, inputs, use, remat, scan_blocks):
    """In the recurrent use they go through the states."""
    weights = np.random.default_rng(2).standard_normal(inputs["latents"].shape).astype(np.float32)
    expected = compiled_gradients(all_at_once, EQUAL, 2)(params, inputs, weights)
    found = compiled_gradients(use, EQUAL, 2, remat, scan_blocks)(params, inputs, weights)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    for path, gradient, wanted in zip(paths, *map(jax.tree.leaves, (found, expected))):
        assert relative_error(gradient, wanted) <= GRADIENT, path


@functools.cache
def forward(block_starts=None, scan_blocks=True, frames=FRAMES):
    model = SanaVideoTransformer(CONFIG, scan_blocks=scan_blocks)

    def run(params, latents, caption, timestep, mask):
        arguments = ({"params": params}, latents, caption, timestep, mask)
        out, sown = model.apply(*arguments, block_starts=block_starts, mutable=["intermediates"])
        return out, sown["intermediates"]["block_outputs"][0]

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def test_one_block_is_the_bidirectional_form(params, inputs):
    expected, _ = forward()(params, *ordered(inputs))
    found, _ = forward((0,))(params, *ordered(inputs))
    assert relative_error(found, expected) <= VALUE
    causal, _ = forward(UNEQUAL[:-1])(params, *ordered(inputs))
    assert relative_error(causal, expected) > 0.01


def test_a_block_sees_nothing_later(params, inputs):
    run, cut = forward(UNEQUAL[:-1]), UNEQUAL[2]
    before, _ = run(params, *ordered(inputs))
    changed = {**inputs, "latents": inputs["latents"] + (np.arange(FRAMES) >= cut)[:, None, None, None]}
    after, _ = run(params, *ordered(changed))
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.abs(before - after)[:, cut:].max(axis=(0, 2, 3, 4)).min() > 0
    # and everything earlier
    changed = {**inputs, "latents": inputs["latents"] + (np.arange(FRAMES) == 0)[:, None, None, None]}
    after, _ = run(params, *ordered(changed))
    assert np.abs(before - after).max(axis=(0, 2, 3, 4)).min() > 0


def test_block_outputs_are_sown_in_both_forms(params, inputs):
    _, outputs = forward()(params, *ordered(inputs))
    assert outputs.shape == (CONFIG.num_layers, BATCH, FRAMES * math.prod(GRID), CONFIG.inner_dim)
    assert relative_error(forward(scan_blocks=False)(params, *ordered(inputs))[1], outputs) <= VALUE


def test_frames_of_one_time_are_the_sample_s(params, inputs):
    """A time for each frame, all alike, is that time for the sample; another one for a frame is seen."""
    once = {**inputs, "timestep": inputs["timestep"][:, 0]}
    whole, _ = forward()(params, *ordered(once))
    times = np.repeat(once["timestep"][:, None], FRAMES, axis=1)
    assert relative_error(forward()(params, *ordered({**inputs, "timestep": times}))[0], whole) <= VALUE
    times[:, 0] = 0
    assert relative_error(forward()(params, *ordered({**inputs, "timestep": times}))[0], whole) > 0.01


def test_times_are_embedded_once_per_frame(params, inputs):
    """No product of the embedder has a row for every token."""
    program = forward().lower(params, *ordered(inputs)).as_text()
    rows = re.findall(r"dot_general.*\(tensor<(\d+)x256xf32>", program)
    assert rows == [str(BATCH * FRAMES)]
    once = {**inputs, "timestep": inputs["timestep"][:, 0]}
    assert re.findall(r"dot_general.*\(tensor<(\d+)x256xf32>", forward().lower(params, *ordered(once)).as_text()) == [
        "2"
    ]


def test_a_lora_beside_the_parameters(params, inputs):
    """Of every dense layer, the product over frames among them; the same scanned and unrolled, and merged."""
    rng = np.random.default_rng(4)
    lora = jax.eval_shape(lambda: init_lora(params, [".*"], 2, jax.random.key(0)))
    lora = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), lora)
    assert {"ff/conv_temp", "attn1/to_q"} <= {"/".join(p.split("/")[1:3]) for p in parameter_paths(lora)}

    def run(scan_blocks):
        model = SanaVideoTransformer(CONFIG, scan_blocks=scan_blocks)
        return jax.jit(model.apply, compiler_options=QUICK_COMPILE)({"params": params, "lora": lora}, *ordered(inputs))

    found = run(True)
    assert relative_error(found, forward()(params, *ordered(inputs))[0]) > 0.01
    assert relative_error(run(False), found) <= 1e-5
    assert relative_error(forward()(merge_lora(params, lora), *ordered(inputs))[0], found) <= 1e-5


def test_lora_targets():
    layers = {layer.name for layer in match_targets(abstract_params(CONFIG), ["all_linear"])}
    assert "transformer_blocks/attn1/to_q" in layers
    assert not {"patch_embedding", "transformer_blocks/ff/conv_temp"} & layers
    assert len(layers) == 8 + 5 + 1  # two attentions, five embedders, the output


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_the_state_is_constant_in_size(window):
    state = init_state(CONFIG, BATCH, GRID, window, jnp.bfloat16)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert state.last_frame.shape == (CONFIG.num_layers, BATCH, *GRID, CONFIG.inner_dim)
    assert state.attention.key_value.shape == (CONFIG.num_layers, window or 1, BATCH, 2, 8, 8)
    model = SanaVideoTransformer(CONFIG, dtype=jnp.bfloat16)

    def step(state, frames):
        latents, caption = jnp.zeros((BATCH, frames, *SIZE, 4)), jnp.zeros((BATCH, 1, CONFIG.caption_channels))
        arguments = (latents, caption, jnp.zeros(BATCH))
        (_, state), _ = model.init_with_output(jax.random.key(0), *arguments, state=state)
        return state

    for frames in (1, 4):
        after = jax.eval_shape(functools.partial(step, frames=frames), state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == shapes


def test_bytes_of_the_state_of_the_published_model():
    config, grid = SanaVideoConfig.sana_video_2b_480p(), (30, 52)
    size = state_bytes(config, grid, dtype=jnp.bfloat16)
    assert size.sums == 4 * 20 * 112 * (112 + 1) == 1_012_480
    assert size.last_frame == 2 * 30 * 52 * 2240 == 6_988_800
    assert (size.per_layer, size.total) == (8_001_280, 160_025_600)
    frame = kv_cache_bytes(config, grid, 1)
    assert frame == 2 * 30 * 52 * 2240 * 2 == 13_977_600
    assert frame > size.per_layer
    assert kv_cache_bytes(config, grid, 241) == 241 * frame
    print(
        f"state of SANA-Video 2B at 480p: {size.per_layer:,} bytes per layer, {size.total:,} in all; keys and values "
        f"of softmax attention: {frame:,} bytes per layer and latent frame, {241 * frame:,} after 241"
    )
    windowed = state_bytes(config, grid, num_cached_blocks=3, dtype=jnp.bfloat16)
    assert windowed.sums == 3 * size.sums
    state = jax.eval_shape(lambda: init_state(config, 1, grid, None, jnp.bfloat16))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) == size.total


# -- configurations ----------------------------------------------------------------------------------------------------


PUBLISHED = {
    "480p": (SanaVideoConfig.sana_video_2b_480p(), 2_056_862_144),
    "720p": (SanaVideoConfig.sana_video_2b_720p(), 2_057_148_928),
    "720p, DC-AE-V": (SanaVideoConfig.sana_video_2b_720p(in_channels=32, out_channels=32), 2_056_718_752),
}


def abstract_params(config: SanaVideoConfig):
    return jax.eval_shape(lambda: init_params(SanaVideoTransformer(config), jax.random.key(0)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    config, count = PUBLISHED[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == count
    assert SanaVideoConfig.from_dict(config.to_dict()) == config


def test_every_parameter_has_one_sharding_rule():
    params = abstract_params(SanaVideoConfig.sana_video_2b_480p())
    used = set()
    for path, leaf in parameter_paths(params).items():
        matches = [(pattern, axes) for pattern, axes in SANA_VIDEO if re.fullmatch(pattern, path)]
        assert len(matches) == 1, path
        pattern, axes = matches[0]
        used.add(pattern)
        assert len(axes) == leaf.ndim, path
        cut = [axis for axis in axes if axis]
        assert len(cut) == len(set(cut)), path
        for length, axis in zip(leaf.shape, axes):
            assert axis is None or length % 8 == 0, path
        # whole on every device: vectors and tables
        assert cut or leaf.size <= 20 * 6 * 2240, path
    assert used == {pattern for pattern, _ in SANA_VIDEO}
    lora = {"lora": jax.eval_shape(lambda: init_lora(params, ["all_linear", ".*conv_temp"], 4, jax.random.key(0)))}
    for path in parameter_paths(lora):
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in lora_rules(SANA_VIDEO)) == 1, path


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"qk_norm": "layer_norm"}, "rms_norm_across_heads"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"guidance_embeds": True}, "guidance_embeds=True"),
        ({"interpolation_scale": 1.0}, "interpolation_scale=1.0"),
        ({"cross_attention_dim": 7}, "2240"),
        ({"patch_size": 2}, r"patch_size=2 is not allowed.*\(1, 2, 2\)"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": (2, 2, 2)}, r"patch_size=\(2, 2, 2\).*begin it with 1"),
        ({"attention_head_dim": 7, "cross_attention_dim": 140}, "attention_head_dim=7"),
        ({"num_layers": "20"}, "num_layers='20'"),
    ],
)
def test_impossible_fields_are_named(changes, names):
    with pytest.raises(UserError, match=names):
        SanaVideoConfig(**changes)


def test_configuration_files():
    with pytest.raises(UserError, match="colour"):
        SanaVideoConfig.from_dict({"colour": 3})
    read = SanaVideoConfig.from_dict({"_class_name": "x", "patch_size": [1, 1, 1], "out_channels": None})
    assert read.patch_size == (1, 1, 1)
    assert read.velocity_channels == 16
    hash(read)


# -- inputs that do not fit --------------------------------------------------------------------------------------------


def refuse(message, params, inputs, **options):
    latents, caption, timestep, mask = ordered(inputs)
    with pytest.raises(UserError, match=message):
        SanaVideoTransformer(CONFIG).apply({"params": params}, latents, caption, timestep, mask, **options)


def test_inputs_that_do_not_fit(params, inputs):
    refuse("latent of 3x6.*multiples of the patch size 2x2", params, {**inputs, "latents": inputs["latents"][:, :, :3]})
    refuse(
        r"timestep of shape \(2, 5\).*\(2,\).*\(2, 6\)", params, {**inputs, "timestep": np.zeros((2, 5), np.float32)}
    )
    refuse("1025 frames of tokens exceed the 1024", params, inputs, first_frame=1019)
    for starts in ((), (1, 2), (0, 4, 4), (0, 6)):
        refuse("block_starts=.* ascend from 0 and stay below the video's 6", params, inputs, block_starts=starts)
    other = init_state(CONFIG, BATCH, (3, 3))
    refuse(r"the state is for \(2, 2, 3, 3, 16\).*has \(2, 2, 2, 3, 16\)", params, inputs, state=other)
    with pytest.raises(UserError, match="num_cached_blocks=0 is not allowed"):
        init_state(CONFIG, BATCH, GRID, 0)
