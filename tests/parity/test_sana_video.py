"""SANA-Video beside diffusers' implementation: outputs, gradients, half precision. Its forms: tests/models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax.models.sana_video import SanaVideoTransformer
from tests.compiling import AS_USERS_COMPILE
from tests.parity import sana_video_oracle as oracle
from tests.parity.sana_oracle import relative_error

OUTPUT_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
BF16_FACTOR = 1.5
# For programs of which only values are wanted, not speed: LLVM's optimiser is most of the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def apply(model: SanaVideoTransformer, params: dict, inputs: dict, mask) -> jax.Array:
    inputs, mask = jax.tree.map(jnp.asarray, (inputs, mask))
    return model.apply({"params": params}, **inputs, encoder_attention_mask=mask)


@functools.cache
def output_and_gradients_function(variant: str):
    """Compiled ``(params, inputs, mask, output_weights) -> output, gradients``."""
    model = SanaVideoTransformer(oracle.jax_config(variant))

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, inputs, mask, output_weights):
        wanted = {"params": params} | {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states")}

        def loss(wanted):
            out = apply(model, wanted["params"], {**inputs, **{k: wanted[k] for k in inputs if k in wanted}}, mask)
            return (out * output_weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(wanted)
        return out, gradients

    return run


@functools.cache
def output_function(variant: str, dtype: jnp.dtype = jnp.float32):
    """In float32 compiled as users compile it."""
    model = SanaVideoTransformer(oracle.jax_config(variant), dtype=dtype)
    options = QUICK_COMPILE if dtype == jnp.bfloat16 else AS_USERS_COMPILE
    return jax.jit(lambda params, inputs, mask: apply(model, params, inputs, mask), compiler_options=options)


def gradient_errors(found: dict, expected: dict, qk_norm: bool = True) -> dict[str, float]:
    """Relative error of every tensor, by its path."""
    named = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, expected))
    ]
    assert named[0].keys() == named[1].keys()
    errors = {name: relative_error(named[0][name], named[1][name]) for name in named[1]}
    if not qk_norm:
        # The softmax does not see the bias of the keys: the exact gradient is 0, and what rounding leaves of it is
        # compared with the gradient of the queries' bias.
        name = "params/transformer_blocks/attn2/to_k/bias"
        sizes = [np.linalg.norm(side[name]) for side in named]
        errors[name] = max(sizes) / np.linalg.norm(named[1][name.replace("to_k", "to_q")])
    return errors


@pytest.mark.parametrize(
    ("variant", "per_frame"), [("patch-2", False), ("patch-2", True), ("patch-1", True), ("plain", False)]
)
def test_output_and_gradients(variant, per_frame):
    config = oracle.jax_config(variant)
    inputs = oracle.draw_inputs(config, per_frame)
    run = output_and_gradients_function(variant)
    arguments = (oracle.params_for(variant), inputs.arrays(), oracle.MASK)
    out, gradients = run(*arguments, inputs.output_weights)
    expected_out, expected = oracle.torch_output_and_gradients(variant, inputs, oracle.MASK)
    assert np.std(expected_out) > 0.3
    assert relative_error(out, expected_out) <= OUTPUT_TOLERANCE
    errors = gradient_errors(gradients, expected, config.qk_norm is not None)
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


def test_without_mask():
    inputs = oracle.draw_inputs(oracle.jax_config("patch-2"), per_frame=True)
    found = output_function("patch-2")(oracle.params_for("patch-2"), inputs.arrays(), None)
    expected = oracle.torch_output("patch-2", inputs, None, torch.float32)
    assert relative_error(found, expected) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("variant", ["patch-2", "patch-1"])
def test_bfloat16(variant):
    """Our error against float32 is at most 1.5 times PyTorch's."""
    inputs, params = oracle.draw_inputs(oracle.jax_config(variant)), oracle.params_for(variant)
    exact = oracle.torch_output(variant, inputs, oracle.MASK, torch.float32)
    theirs = relative_error(oracle.torch_output(variant, inputs, oracle.MASK, torch.bfloat16), exact)
    found = output_function(variant, jnp.bfloat16)(params, inputs.arrays(), oracle.MASK)
    assert found.dtype == jnp.bfloat16
    assert 1e-3 < relative_error(found, exact) <= BF16_FACTOR * theirs
