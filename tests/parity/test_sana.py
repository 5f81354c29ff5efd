"""SANA beside diffusers' implementation: outputs, gradients, half precision, and our own forms beside each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from sana_jax.errors import UserError
from sana_jax.models.sana import SanaTransformer
from sana_jax.nn.embeddings import timestep_sinusoid
from sana_jax.nn.remat import REMAT_POLICIES
from tests.compiling import AS_USERS_COMPILE
from tests.parity import sana_oracle as oracle

OUTPUT_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
LEAST_DISTANCE_TO_A_CORNER = 3e-6  # of the ReLU, several float32 roundings
# Two compiled forms of one program differ by how their sums are fused.
SAME_PROGRAM_TOLERANCE = 2e-6
BF16_FACTOR = 1.5
# For programs of which only values are wanted, not speed: LLVM's optimiser is most of the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def apply(model: SanaTransformer, params: dict, inputs: dict, mask, controlnet_residuals=None) -> jax.Array:
    inputs, mask = jax.tree.map(jnp.asarray, (inputs, mask))
    return model.apply(
        {"params": params},
        inputs["hidden_states"],
        inputs["encoder_hidden_states"],
        inputs["timestep"],
        inputs["guidance"],
        encoder_attention_mask=mask,
        controlnet_residuals=controlnet_residuals,
    )


@functools.cache
def output_and_gradients_function(variant: str, remat: str = "none", scan_blocks: bool = True):
    """Compiled ``(params, inputs, mask, output_weights[, residuals]) -> output, gradients``."""
    model = SanaTransformer(oracle.jax_config(variant), remat=remat, scan_blocks=scan_blocks)

    # The form that users run is compiled as they compile it, for a model without and one with everything.
    as_users = (remat, scan_blocks) == ("none", True) and variant in ("sana-1.0", "sprint")
    options = AS_USERS_COMPILE if as_users else QUICK_COMPILE

    @functools.partial(jax.jit, compiler_options=options)
    def run(params, inputs, mask, output_weights, controlnet_residuals=None):
        wanted = {"params": params} | {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states")}
        if controlnet_residuals is not None:
            wanted["controlnet_residuals"] = controlnet_residuals

        def loss(wanted):
            residuals = wanted.get("controlnet_residuals")
            out = apply(model, wanted["params"], {**inputs, **wanted}, mask, residuals)
            return (out * output_weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(wanted)
        return out, gradients

    return run


@functools.cache
def output_function(variant: str, dtype: jnp.dtype):
    model = SanaTransformer(oracle.jax_config(variant), dtype=dtype)
    return jax.jit(lambda params, inputs, mask: apply(model, params, inputs, mask), compiler_options=QUICK_COMPILE)


def gradient_errors(found: dict, expected: dict, qk_norm: bool) -> dict[str, float]:
    """Relative error of every tensor, by its path."""
    named = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, expected))
    ]
    assert named[0].keys() == named[1].keys()
    errors = {name: oracle.relative_error(named[0][name], named[1][name]) for name in named[1]}
    if not qk_norm:
        # The bias of the cross-attention keys moves all logits of a query alike, which the softmax does not see: the
        # exact gradient is 0, and what rounding leaves of it is compared with the gradient of the queries' bias.
        name = "params/transformer_blocks/attn2/to_k/bias"
        sizes = [np.linalg.norm(side[name]) for side in named]
        errors[name] = max(sizes) / np.linalg.norm(named[1][name.replace("to_k", "to_q")])
    return errors


def assert_parity(found, expected, qk_norm: bool) -> None:
    (out, gradients), (expected_out, expected_gradients) = found, expected
    assert np.std(expected_out) > 0.3
    assert oracle.relative_error(out, expected_out) <= OUTPUT_TOLERANCE
    errors = gradient_errors(gradients, expected_gradients, qk_norm)
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


@pytest.mark.parametrize("last_caption", ["kept", "all padding"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_output_and_gradients(variant, last_caption):
    config, mask = oracle.jax_config(variant), oracle.MASK
    if last_caption == "all padding":
        mask = oracle.MASK_WITH_EMPTY_ROW
    for seed in range(40):
        inputs = oracle.draw_inputs(config, seed)
        if last_caption == "all padding":
            # Next to -10000, float32 keeps logits only to 1e-3, and which way one rounds is chance. Equal tokens have
            # equal logits whichever way that is; test_caption_of_padding_only has tokens that differ.
            inputs.encoder_hidden_states[-1] = inputs.encoder_hidden_states[-1, :1]
        rounding = oracle.rounding_of_gradients(variant, inputs, mask)
        distance = oracle.distance_to_a_corner(variant, inputs, mask)
        if distance > LEAST_DISTANCE_TO_A_CORNER and rounding <= GRADIENT_TOLERANCE / 2:
            break
    else:
        raise AssertionError("no inputs whose gradients do not depend on how a processor rounds")
    run = output_and_gradients_function(variant)
    found = run(oracle.params_for(variant), inputs.arrays(), mask, inputs.output_weights)
    expected = oracle.torch_output_and_gradients(variant, inputs, mask)
    assert_parity(found, expected, config.qk_norm is not None)


@pytest.mark.parametrize("variant", ["sana-1.0", "sana-1.5"])
def test_caption_of_padding_only(variant):
    inputs = oracle.draw_inputs(oracle.jax_config(variant))
    expected = oracle.torch_output(variant, inputs, oracle.MASK_WITH_EMPTY_ROW, torch.float32)
    run, params = output_function(variant, jnp.float32), oracle.params_for(variant)
    found = np.asarray(run(params, inputs.arrays(), oracle.MASK_WITH_EMPTY_ROW))
    assert oracle.relative_error(found[:-1], expected[:-1]) <= OUTPUT_TOLERANCE
    # Half the spacing of float32 at 10000, which is how far a logit moves at most.
    logit_rounding = np.spacing(np.float32(1e4)) / 2
    assert oracle.relative_error(found[-1], expected[-1]) <= logit_rounding
    kept = np.asarray(run(params, inputs.arrays(), oracle.MASK))
    assert oracle.relative_error(found[-1], kept[-1]) <= 4 * logit_rounding  # one rounding and three blocks


def test_without_mask():
    inputs = oracle.draw_inputs(oracle.jax_config("sana-1.0"))
    found = output_function("sana-1.0", jnp.float32)(oracle.params_for("sana-1.0"), inputs.arrays(), None)
    expected = oracle.torch_output("sana-1.0", inputs, None, torch.float32)
    assert oracle.relative_error(found, expected) <= OUTPUT_TOLERANCE


def test_masked_tokens_have_no_effect():
    inputs = oracle.draw_inputs(oracle.jax_config("sprint"))
    run, params = output_function("sprint", jnp.float32), oracle.params_for("sprint")
    before = run(params, inputs.arrays(), oracle.MASK)
    inputs.encoder_hidden_states[0, 4:] += 3.0
    np.testing.assert_array_equal(before, run(params, inputs.arrays(), oracle.MASK))


def test_controlnet_residuals():
    """Of four blocks the second and third get one; gradients reach the residuals too."""
    variant, count = "biased", 2
    config = oracle.jax_config(variant)
    inputs = oracle.draw_inputs(config)
    tokens = oracle.LATENT_SIZE[0] * oracle.LATENT_SIZE[1]
    shape = (count, oracle.BATCH, tokens, config.inner_dim)
    residuals = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    run, params = output_and_gradients_function(variant), oracle.params_for(variant)
    found = run(params, inputs.arrays(), oracle.MASK, inputs.output_weights, residuals)
    expected = oracle.torch_output_and_gradients(variant, inputs, oracle.MASK, residuals)
    assert_parity(found, expected, config.qk_norm is not None)
    without = run(params, inputs.arrays(), oracle.MASK, inputs.output_weights)[0]
    assert oracle.relative_error(found[0], without) > 0.01


@pytest.mark.parametrize(
    ("remat", "scan_blocks"),
    [(name, True) for name in REMAT_POLICIES if name != "none"] + [("none", False), ("full", False)],
)
def test_forms_are_equal(remat, scan_blocks):
    """Unrolled blocks and every rematerialisation policy give what the scan that keeps everything gives."""
    variant = "sprint"
    inputs = oracle.draw_inputs(oracle.jax_config(variant))
    arguments = (oracle.params_for(variant), inputs.arrays(), oracle.MASK, inputs.output_weights)
    expected_out, expected = output_and_gradients_function(variant)(*arguments)
    run = output_and_gradients_function(variant, remat, scan_blocks)
    out, gradients = run(*arguments)
    assert oracle.relative_error(out, expected_out) <= SAME_PROGRAM_TOLERANCE
    errors = gradient_errors(gradients, expected, qk_norm=True)
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}
    if remat == "full" and not scan_blocks:
        # Without its barrier the compiler would merge the recomputed values with those of the forward pass.
        plain = output_and_gradients_function(variant, "none", scan_blocks)
        barriers, others = (each.lower(*arguments).as_text().count("optimization_barrier") for each in (run, plain))
        assert barriers >= others + oracle.jax_config(variant).num_layers


def test_unknown_remat_policy_is_named():
    config = oracle.jax_config("sana-1.0")
    inputs = oracle.draw_inputs(config)
    with pytest.raises(UserError, match="remat='most': choose one of none, dots"):
        apply(SanaTransformer(config, remat="most"), oracle.params_for("sana-1.0"), inputs.arrays(), oracle.MASK)


def test_block_outputs_are_sown_in_both_forms():
    config = oracle.jax_config("sana-1.0")
    inputs, params = oracle.draw_inputs(config), oracle.params_for("sana-1.0")
    sown = []
    for scan_blocks in (True, False):
        model = SanaTransformer(config, scan_blocks=scan_blocks)

        @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
        def run(params, hidden_states, caption, timestep, model=model):
            arguments = ({"params": params}, hidden_states, caption, timestep)
            return model.apply(*arguments, mutable=["intermediates"])[1]["intermediates"]

        (outputs,) = run(params, inputs.hidden_states, inputs.encoder_hidden_states, inputs.timestep)["block_outputs"]
        tokens = oracle.LATENT_SIZE[0] * oracle.LATENT_SIZE[1]
        assert outputs.shape == (config.num_layers, oracle.BATCH, tokens, config.inner_dim)
        sown.append(outputs)
    assert oracle.relative_error(sown[1], sown[0]) <= SAME_PROGRAM_TOLERANCE


# What the others have, these have too: norms of q and k, guidance, positions, biases.
IN_BFLOAT16 = [
    pytest.param(variant, marks=[] if variant in ("sprint", "2k", "biased") else [pytest.mark.prove])
    for variant in oracle.VARIANTS
]


@pytest.mark.parametrize("variant", IN_BFLOAT16)
def test_bfloat16(variant):
    """Our error against float32 is at most 1.5 times PyTorch's, with float32 and with bfloat16 parameters."""
    inputs, params = oracle.draw_inputs(oracle.jax_config(variant)), oracle.params_for(variant)
    exact = oracle.torch_output(variant, inputs, oracle.MASK, torch.float32)
    theirs = oracle.relative_error(oracle.torch_output(variant, inputs, oracle.MASK, torch.bfloat16), exact)
    run = output_function(variant, jnp.bfloat16)
    for params_dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda leaf, dtype=params_dtype: leaf.astype(dtype), params)
        found = run(cast, inputs.arrays(), oracle.MASK)
        assert found.dtype == jnp.bfloat16
        assert 1e-3 < oracle.relative_error(found, exact) <= BF16_FACTOR * theirs


@pytest.mark.parametrize("weights", ["fresh", "zero"])
def test_gradients_are_finite(weights):
    """Also where every key, query and variance is exactly 0."""
    variant = "sprint"
    config = oracle.jax_config(variant)
    inputs = oracle.draw_inputs(config)
    params = oracle.params_for(variant)
    if weights == "zero":
        params = jax.tree.map(jnp.zeros_like, params)
    else:
        shapes = {name: jnp.zeros_like(value) for name, value in inputs.arrays().items()}
        drawn = jax.jit(lambda: SanaTransformer(config).init(jax.random.key(0), **shapes))()["params"]
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
        params = drawn
    out, gradients = output_and_gradients_function(variant)(params, inputs.arrays(), oracle.MASK, inputs.output_weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))


@pytest.mark.parametrize(("variant", "message"), [("sprint", "needs guidance"), ("sana-1.5", "takes no guidance")])
def test_guidance_must_match_the_model(variant, message):
    config = oracle.jax_config(variant)
    inputs = oracle.draw_inputs(config).arrays()
    inputs["guidance"] = None if config.guidance_embeds else np.full(oracle.BATCH, 0.45, np.float32)
    with pytest.raises(UserError, match=message):
        apply(SanaTransformer(config), oracle.params_for(variant), inputs, oracle.MASK)


@pytest.mark.parametrize(("height", "width"), [(5, 10), (6, 9)])
def test_latent_must_divide_into_patches(height, width):
    config = oracle.jax_config("patch-2")
    inputs = oracle.draw_inputs(config).arrays()
    inputs["hidden_states"] = inputs["hidden_states"][:, :height, :width]
    with pytest.raises(UserError, match=rf"latent of {height}x{width}.*multiples of the patch size 2"):
        apply(SanaTransformer(config), oracle.params_for("patch-2"), inputs, oracle.MASK)


@pytest.mark.parametrize("timesteps", [[0.0, 0.5, 1.0], [1.0, 412.5, 999.0, 1000.0]])
def test_timestep_sinusoid(timesteps):
    expected = get_timestep_embedding(torch.tensor(timesteps), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    found = jax.jit(timestep_sinusoid)(jnp.asarray(timesteps))
    # PyTorch's float32 exponential is off by one unit in two of the 128 frequencies.
    assert oracle.relative_error(found, expected) <= 5e-6
    assert np.mean(np.abs(found - expected.numpy()) > 1e-6) < 0.02
