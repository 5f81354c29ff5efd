"""Every optimizer: it learns, resumes, spares the frozen, decays what it should, and takes the memory that it says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.optimizer import READS, OptimizerConfig
from sana_jax.models.sana import SanaConfig, SanaTransformer, init_params
from tests.train.digits_problem import compiled, initial_params, quickly, train, whole_loss
from train.optimizers import evaluation_params, make_optimizer, state_bytes, updates_taken
from train.optimizers.came import (
    Factored,
    Full,
    OutputBlocks,
    dequantize_outputs,
    quantize_outputs,
    scale_by_came,
)
from train.optimizers.contrib import scale_by_muon
from train.optimizers.paths import parameter_layout
from train.optimizers.quantization import (
    block_length,
    dequantize,
    quantize_positive,
    quantize_signed,
    random_fractions,
)

STEPS = 60
# Learning rates at which each is at home on the small problem, and small parameters in 8 bits too.
CONFIGS = {
    "adamw": OptimizerConfig(learning_rate=3e-3),
    "adamw_8bit": OptimizerConfig(name="adamw_8bit", learning_rate=3e-3, min_8bit_size=1),
    "came": OptimizerConfig(name="came", learning_rate=3e-3),
    "came_8bit": OptimizerConfig(name="came_8bit", learning_rate=3e-3, min_8bit_size=1),
    "lion": OptimizerConfig(name="lion", learning_rate=1e-3),
    "muon": OptimizerConfig(name="muon", learning_rate=2e-2),
    "prodigy": OptimizerConfig(name="prodigy", learning_rate=1.0),
    "schedule_free_adamw": OptimizerConfig(name="schedule_free_adamw", learning_rate=5e-3),
}


def test_every_optimizer_is_tested():
    assert set(CONFIGS) == set(READS)


@functools.cache
def trained(name: str):
    return train(CONFIGS[name], STEPS)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns(name):
    params, state = trained(name)
    before, after = whole_loss(initial_params()), whole_loss(evaluation_params(state, params))
    assert before > 2.0
    assert after < (1.0 if name == "prodigy" else 0.5)  # Prodigy is still looking for its rate
    assert int(updates_taken(state)) == STEPS


@pytest.mark.parametrize("name", CONFIGS)
def test_going_on_from_a_saved_state_is_the_same_run(name):
    half = jax.tree.map(np.asarray, train(CONFIGS[name], STEPS // 2))
    resumed = train(CONFIGS[name], STEPS, begin=STEPS // 2, carry=jax.tree.map(jnp.asarray, half))
    assert jax.tree.all(jax.tree.map(np.array_equal, resumed, trained(name)))


def test_8_bit_adam_ends_where_adam_does():
    losses = {name: whole_loss(trained(name)[0]) for name in ("adamw", "adamw_8bit")}
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.03)


def test_8_bit_came_stays_near_came():
    losses = {name: whole_loss(trained(name)[0]) for name in ("came", "came_8bit")}
    assert losses["came_8bit"] < 1.5 * losses["came"]


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_parameters_stay_and_have_no_state(name):
    config = CONFIGS[name]
    frozen = OptimizerConfig(
        **{field: getattr(config, field) for field in ("name", "learning_rate", "min_8bit_size")},
        frozen=("transformer_blocks/.*",),
    )
    params, state = train(frozen, 3)
    start = initial_params()
    assert jax.tree.all(jax.tree.map(np.array_equal, params["transformer_blocks"], start["transformer_blocks"]))
    assert not np.array_equal(params["proj_out"]["kernel"], start["proj_out"]["kernel"])
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert not any(shape[:1] == (2,) for shape in shapes), shapes
    averaged = evaluation_params(state, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, averaged["transformer_blocks"], start["transformer_blocks"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_decay_takes_its_share_of_what_decays(name):
    settings = {"name": name, "learning_rate": CONFIGS[name].learning_rate}
    params = initial_params()
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.01), params)
    updated = []
    for decay in (0.0, 0.1):
        optimizer = make_optimizer(OptimizerConfig(**settings, weight_decay=decay), 10, params)

        def one_step(optimizer=optimizer):
            updates, state = optimizer.update(grads, optimizer.init(params), params)
            return evaluation_params(state, optax.apply_updates(params, updates))

        updated.append(quickly(one_step))
    difference = jax.tree.map(lambda a, b: np.asarray(b - a), *updated)
    rate = settings["learning_rate"]
    if name == "prodigy":
        rate *= 1e-6 * (1 - 0.999) ** 0.5 / (1 - 0.9)
    for path in (("proj_out", "kernel"), ("transformer_blocks", "ff", "kernel")):
        value, change = params, difference
        for key in path:
            value, change = value[key], change[key]
        # what is left of a parameter's own digits when the difference of two steps is taken
        np.testing.assert_allclose(change, -rate * 0.1 * value, rtol=1e-4, atol=6e-7)
        assert np.abs(change).max() > 0 or name == "prodigy"
    assert not difference["proj_out"]["bias"].any()
    assert not difference["transformer_blocks"]["scale_shift_table"].any()


# prodigy, as optax has it, divides by the sum of all gradients that there ever were
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "prodigy"])
def test_state_and_updates_are_finite_without_gradients(name):
    params = initial_params()
    optimizer = make_optimizer(CONFIGS[name], 10, params)
    updates, state = quickly(lambda: optimizer.update(zeros(params), optimizer.init(params), params))
    # schedule-free takes the average out of the parameters and puts it back
    assert all(jnp.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(updates))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_the_evaluation_parameters_of_schedule_free_are_the_average_of_its_iterates():
    config = OptimizerConfig(name="schedule_free_adamw", learning_rate=5e-3)
    (carry, step), iterates = compiled(config), []
    for number in range(4):
        carry, _ = step(carry, jnp.int32(number))
        iterates.append(optax.tree_utils.tree_get(carry[1], "z"))
    average = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *iterates)
    found = evaluation_params(carry[1], carry[0])
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(average)):
        np.testing.assert_allclose(ours, expected, atol=2e-6)
    params, state = trained("adamw")
    assert evaluation_params(state, params) is params


# -- stacks of layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "layers", "is_matrix"),
    [
        ("transformer_blocks/attn1/to_q/kernel", (4, 8, 8), 1, True),
        ("lora/transformer_blocks/attn1/to_q/down", (4, 8, 2), 1, True),
        ("transformer_blocks/ff/conv_depth/kernel", (4, 3, 3, 8), 1, False),
        ("transformer_blocks/ff/conv_inverted/bias", (4, 8), 1, False),
        ("transformer_blocks/scale_shift_table", (4, 6, 8), 1, False),
        ("transformer_blocks/attn1/norm_q/scale", (4, 8), 1, False),
        ("controlnet_blocks/kernel", (4, 8, 8), 1, True),
        ("proj_out/kernel", (8, 4), 0, True),
        ("encoder/conv_in/kernel", (3, 3, 4, 8), 0, False),
        ("encoder/conv_shortcut/kernel", (1, 1, 4, 8), 0, True),
        ("scale_shift_table", (2, 8), 0, False),
        ("caption_norm/scale", (8,), 0, False),
        ("gate", (), 0, False),
    ],
)
def test_what_the_axes_of_a_parameter_are(path, shape, layers, is_matrix):
    assert parameter_layout(path, shape) == (layers, is_matrix)


STACKABLE = {
    "came": lambda: scale_by_came((0.9, 0.999, 0.9999), 1e-30, 1e-16, 1.0),
    "came_8bit": lambda: scale_by_came((0.9, 0.999, 0.9999), 1e-30, 1e-16, 1.0, block_size=8, min_8bit_size=20),
    "muon": lambda: scale_by_muon(0.95, 5, None, 0.9, 0.999, 1e-8),
}


@pytest.mark.parametrize("name", STACKABLE)
def test_layers_of_a_stack_are_updated_as_if_they_were_apart(name):
    random = np.random.default_rng(0)
    stack = {
        "kernel": random.standard_normal((3, 12, 20), np.float32),
        "bias": random.standard_normal((3, 20), np.float32),
        "depthwise": {"kernel": random.standard_normal((3, 3, 3, 20), np.float32)},
    }
    size = np.float32([1e-3, 1, 100])  # of each layer's gradients

    def grads(step):
        own = np.random.default_rng(100 + step)
        return jax.tree.map(
            lambda leaf: (own.standard_normal(leaf.shape) * size.reshape(-1, *(1,) * (leaf.ndim - 1))).astype("f4"),
            stack,
        )

    def updates_of(tree, select):
        optimizer = STACKABLE[name]()
        state = optimizer.init(tree)
        update = jax.jit(optimizer.update)
        for step in range(3):
            updates, state = update(select(grads(step)), state, tree)
        return updates

    together = updates_of({"transformer_blocks": stack}, lambda tree: {"transformer_blocks": tree})
    for layer in range(3):
        pick = functools.partial(jax.tree.map, lambda leaf, layer=layer: leaf[layer])
        alone = updates_of(pick(stack), pick)
        for ours, expected in zip(jax.tree.leaves(pick(together["transformer_blocks"])), jax.tree.leaves(alone)):
            np.testing.assert_allclose(ours, expected, rtol=3e-5, atol=3e-6)


def test_muon_orthogonalises_each_layer():
    grads = {"transformer_blocks": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 12, 20)))}}
    optimizer = STACKABLE["muon"]()
    updates, state = quickly(lambda: optimizer.update(grads, optimizer.init(grads), grads))
    values = np.linalg.svd(np.asarray(updates["transformer_blocks"]["kernel"]), compute_uv=False)
    assert values.shape == (3, 12)
    factor = (20 / 12) ** 0.5
    assert values.min() > 0.6 * factor
    assert values.max() < 1.3 * factor
    with_rms = scale_by_muon(0.95, 5, 0.2, 0.9, 0.999, 1e-8)
    updates, _ = quickly(lambda: with_rms.update(grads, with_rms.init(grads), grads))
    root_mean_square = np.sqrt((np.asarray(updates["transformer_blocks"]["kernel"]) ** 2).mean())
    assert root_mean_square == pytest.approx(0.2, rel=0.25)
    assert not any(leaf.ndim == 3 and "nu" in jax.tree_util.keystr(path) for path, leaf in leaves_with_path(state))


def leaves_with_path(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


# -- 8 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "most", "length"),
    # 64 parts of 35, 36, 175 and 90 values; then what has fewer twos, or nothing that divides
    [
        (2240, 256, 35),
        (2304, 256, 36),
        (11200, 256, 175),
        (5760, 256, 90),
        (32, 256, 32),
        (100, 256, 50),
        (257, 256, 257),
    ],
)
def test_block_lengths(axis, most, length):
    assert block_length(axis, most) == length


def test_signed_codes_are_within_half_a_code():
    values = np.random.default_rng(0).standard_normal((5, 64)).astype("f4") ** 3
    blocks = quantize_signed(jnp.asarray(values), 64)
    assert blocks.codes.shape == values.shape
    assert blocks.codes.dtype == jnp.int8
    scale = np.repeat(np.asarray(blocks.last_axis_scales), 64 // blocks.last_axis_scales.shape[-1], -1)
    wrong = np.abs(np.cbrt(np.asarray(dequantize(blocks)) / scale) - np.cbrt(values / scale))
    assert wrong.max() <= 0.5 / 127 + 1e-6
    assert not np.asarray(dequantize(quantize_signed(jnp.zeros((2, 64)), 64))).any()


def test_positive_codes_are_right_on_average_and_never_zero():
    values = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (4, 64)).astype("f4") ** 4).at[0, 0].set(0)
    many = jax.vmap(lambda seed: quantize_positive(values, 64, seed).codes)(jnp.arange(2000, dtype=jnp.uint32))
    assert many.min() >= 1
    blocks = np.asarray(values).reshape(4, -1, block_length(64, 64))
    exact = 255 * np.cbrt(blocks / blocks.max(-1, keepdims=True))
    mean = np.asarray(many, np.float32).mean(0)
    np.testing.assert_allclose(mean, np.maximum(exact.reshape(4, 64), 1), atol=0.06)


def test_random_fractions_are_uniform_and_differ_by_seed_and_place():
    first, second = (np.asarray(random_fractions((40, 50, 50), seed)) for seed in (0, 1))
    assert first.min() >= 0
    assert first.max() < 1
    counts, _ = np.histogram(first, 16, (0, 1))
    np.testing.assert_allclose(counts, first.size / 16, rtol=0.06)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    for axis in range(3):
        assert abs(np.corrcoef(first.ravel(), np.roll(first, 1, axis).ravel())[0, 1]) < 0.02


def test_blocks_of_outputs():
    matrix = np.random.default_rng(0).standard_normal((2, 6, 20)).astype("f4") * np.repeat([1, 10, 100], [8, 8, 4])
    blocks = quantize_outputs(jnp.asarray(matrix), 8)
    assert blocks.block_scales.shape == blocks.block_minimums.shape == (2, 3)  # the last has four outputs
    scales = np.repeat(np.asarray(blocks.block_scales), 8, -1)[..., None, :20]
    assert (np.abs(dequantize_outputs(blocks, 8) - matrix) <= 0.501 * scales).all()
    constant = jnp.full((6, 20), 0.25)
    np.testing.assert_array_equal(dequantize_outputs(quantize_outputs(constant, 8), 8), constant)


def test_small_tensors_stay_float32():
    params = {"a": {"kernel": jnp.zeros((64, 64))}, "b": {"kernel": jnp.zeros((64, 65))}, "transformer_blocks": {
        "kernel": jnp.zeros((9, 64, 64))}}  # fmt: skip
    state = make_optimizer(OptimizerConfig(name="adamw_8bit"), 1, params).init(params)
    kinds = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in leaves_with_path(state) if "mu" in str(path)}
    assert {key.split("mu")[1]: kind.name for key, kind in kinds.items()} == {
        "['a']['kernel']": "float32",
        "['b']['kernel'].codes": "int8",
        "['b']['kernel'].last_axis_scales": "float32",
        "['transformer_blocks']['kernel']": "float32",
    }


def test_which_parameters_came_factors():
    params = initial_params()
    (state,) = scale_by_came((0.9, 0.999, 0.9999), 1e-30, 1e-16, 1.0, 2048, 4095).init(params)
    blocks = state["transformer_blocks"]
    assert isinstance(blocks["ff"]["kernel"], Factored)
    assert isinstance(blocks["ff"]["kernel"].momentum, OutputBlocks)
    assert blocks["ff"]["kernel"].second_per_output.shape == blocks["ff"]["kernel"].second_per_input.shape == (2, 64)
    assert isinstance(blocks["ff"]["bias"], Full)
    assert isinstance(blocks["scale_shift_table"], Full)
    assert not isinstance(state["proj_out"]["kernel"].momentum, OutputBlocks)
    assert state["proj_out"]["kernel"].residual_per_output.shape == (10,)


# -- memory --------------------------------------------------------------------------------------------------------

BYTES_PER_PARAMETER = {  # of the 1.6B transformer
    "adamw": 8.000,
    "adamw_8bit": 2.168,
    "came": 4.013,
    "came_8bit": 1.019,
    "lion": 4.000,
    "muon": 4.007,
    "prodigy": 16.000,
    "schedule_free_adamw": 8.000,
}


@functools.cache
def abstract_1600m():
    transformer = SanaTransformer(SanaConfig.sana_1600m(), jnp.float32)
    return jax.eval_shape(lambda: init_params(transformer, jax.random.key(0)))


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_state_for_the_1600m(name):
    rate = CONFIGS[name].learning_rate
    found = state_bytes(OptimizerConfig(name=name, learning_rate=rate), abstract_1600m())
    assert found["parameters"] == 1_604_462_752
    assert found["bytes_per_parameter"] == pytest.approx(BYTES_PER_PARAMETER[name], abs=5e-4)


def test_bytes_of_state_count_what_is_trained():
    config = OptimizerConfig(trained=(r"transformer_blocks/attn1/.*",))
    found = state_bytes(config, abstract_1600m())
    assert found["parameters"] == 20 * (4 * 2240**2 + 2240)
    assert found["bytes_per_parameter"] == pytest.approx(8, abs=1e-6)
