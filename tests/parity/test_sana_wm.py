"""SANA-WM beside diffusers' implementation: outputs and gradients. Its forms: tests/models and tests/golden."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from tests.kernels.shapes import QUICK_COMPILE
from tests.parity import sana_wm_oracle as oracle
from tests.parity.sana_oracle import relative_error

OUTPUT_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 1e-5
# Queries, keys and values that lie between two numbers of bfloat16 are rounded to one here and to the other there:
# of the difference that all the rounding makes, this share.
ROUNDED_SHARE = 0.3
IN_ONE_SWEEP = ("published", "convolved patches", "bare")
OTHERWISE = ("one of each", "full width")
ONE_BY_ONE = [variant for variant in oracle.VARIANTS if variant not in (*IN_ONE_SWEEP, *OTHERWISE)]


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def output_function(variant: str, softmax_dtype=None):
    """Compiled ``(params, inputs, mask) -> output``."""
    model = SanaWMTransformer(oracle.jax_config(variant), softmax_dtype=softmax_dtype)

    def run(params, inputs, mask):
        return model.apply({"params": params}, **inputs, encoder_attention_mask=mask)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def our_output(variant: str, inputs: oracle.Inputs, softmax_dtype=None, **given) -> np.ndarray:
    run = output_function(variant, softmax_dtype)
    return np.asarray(run(oracle.params_for(variant), inputs.arrays() | given, oracle.MASK))


def check_output(variant: str) -> None:
    inputs = oracle.draw_inputs(oracle.jax_config(variant))
    with oracle.without_rounding():
        expected = oracle.torch_output(variant, inputs, oracle.MASK)
    assert np.std(expected) > 0.3
    assert relative_error(our_output(variant, inputs), expected) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("variant", IN_ONE_SWEEP)
def test_output(variant):
    check_output(variant)


@pytest.mark.prove
@pytest.mark.parametrize("variant", ONE_BY_ONE)
def test_output_of_each_variant(variant):
    check_output(variant)


def check_rounding(variant: str) -> None:
    inputs = oracle.draw_inputs(oracle.jax_config(variant))
    with oracle.without_rounding():
        unrounded = oracle.torch_output(variant, inputs, oracle.MASK)
    with oracle.exact_exponentials():
        expected = oracle.torch_output(variant, inputs, oracle.MASK)
    effect = relative_error(unrounded, expected)
    assert effect > 1e-4
    found = our_output(variant, inputs, jnp.bfloat16)
    assert relative_error(found, expected) <= ROUNDED_SHARE * effect
    fused = oracle.torch_output(variant, inputs, oracle.MASK)
    assert relative_error(found, fused) <= 2 * relative_error(expected, fused) + ROUNDED_SHARE * effect


def test_softmax_layers_round_to_bfloat16():
    """As PyTorch rounds, of which its fast exponential is set apart; see the oracle."""
    check_rounding("one of each")


@pytest.mark.prove
@pytest.mark.parametrize("variant", ["published", "bare", "softmax alone"])
def test_softmax_layers_round_to_bfloat16_in_variants(variant):
    check_rounding(variant)


def test_frames_of_padding():
    """The last frame of the first video and the last two of the second are padding, whatever is in them."""
    variant, frame_valid = "one of each", np.ones((oracle.BATCH, oracle.FRAMES), bool)
    frame_valid[0, -1] = frame_valid[1, -2:] = False
    inputs = oracle.draw_inputs(oracle.jax_config(variant))
    with oracle.without_rounding():
        mask = torch.from_numpy(frame_valid.astype(np.float32))
        expected = oracle.torch_output(variant, inputs, oracle.MASK, frame_valid_mask=mask)
    found = our_output(variant, inputs, frame_valid_mask=frame_valid)
    assert relative_error(found, expected) <= OUTPUT_TOLERANCE
    inputs.hidden_states[~frame_valid] += 1
    again = our_output(variant, inputs, frame_valid_mask=frame_valid)
    np.testing.assert_array_equal(again[frame_valid], found[frame_valid])
    for nothing in (0, np.nan):  # in place of a camera, whose rays would be NaN either way
        inputs.camera_conditions[~frame_valid] = inputs.chunk_plucker[~frame_valid] = nothing
        again = our_output(variant, inputs, frame_valid_mask=frame_valid)
        assert np.isfinite(again).all()
        np.testing.assert_array_equal(again[frame_valid], found[frame_valid])


def test_without_camera():
    variant = "one of each"
    inputs = oracle.draw_inputs(oracle.jax_config(variant))
    with oracle.without_rounding():
        expected = oracle.torch_output(variant, inputs, oracle.MASK, camera_conditions=None, chunk_plucker=None)
    inputs.camera_conditions = inputs.chunk_plucker = None
    assert relative_error(our_output(variant, inputs), expected) <= OUTPUT_TOLERANCE


def test_gradients():
    variant = "one of each"
    config, inputs = oracle.jax_config(variant), oracle.draw_inputs(oracle.jax_config(variant))
    model = SanaWMTransformer(config, softmax_dtype=None)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, inputs, mask, output_weights):
        wanted = {"params": params} | {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states")}

        def loss(wanted):
            given = {**inputs, **{name: wanted[name] for name in inputs if name in wanted}}
            out = model.apply({"params": wanted["params"]}, **given, encoder_attention_mask=mask)
            return (out * output_weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(wanted)
        return out, gradients

    out, gradients = run(oracle.params_for(variant), inputs.arrays(), oracle.MASK, inputs.output_weights)
    expected_out, expected = oracle.torch_output_and_gradients(variant, inputs, oracle.MASK)
    assert relative_error(out, expected_out) <= OUTPUT_TOLERANCE
    named = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (gradients, expected))
    ]
    assert named[0].keys() == named[1].keys()
    unused = {name for name, array in named[1].items() if not array.any()}
    gates = ("to_beta/kernel", "to_beta/bias", "to_decay/kernel", "to_decay/bias", "decay_rate_log", "decay_bias")
    assert unused == {f"params/softmax_blocks/attn1/{gate}" for gate in gates} | {
        f"params/raymap_embedding/{part}" for part in ("kernel", "bias")
    }
    assert not any(named[0][name].any() for name in unused)
    errors = {name: relative_error(named[0][name], named[1][name]) for name in named[1] if name not in unused}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


def test_the_published_network_has_every_parameter_of_diffusers():
    """Names and shapes at full size, on no memory at all."""
    from diffusers import SanaWMTransformer3DModel

    from sana_jax.weights.rules import places
    from sana_jax.weights.tables.sana_wm import transformer_rules

    config = SanaWMConfig()
    abstract = oracle.abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 2_661_800_448
    with torch.device("meta"):
        model = SanaWMTransformer3DModel()
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: place.shape for name, place in places(transformer_rules(config), abstract).items()} == theirs
    assert len(theirs) == 850


@pytest.mark.prove
def test_blocks_of_full_width():
    """One of each kind, 2240 wide, in 20 heads of 112."""
    inputs = oracle.draw_inputs(oracle.jax_config("full width"))
    with oracle.without_rounding():
        expected = oracle.torch_output("full width", inputs, oracle.MASK)
    oracle.torch_model.cache_clear()
    params = oracle.params_for("full width")
    oracle.torch_model.cache_clear()
    found = np.asarray(output_function("full width")(params, inputs.arrays(), oracle.MASK))
    assert relative_error(found, expected) <= OUTPUT_TOLERANCE
