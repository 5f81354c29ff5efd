"""SANA's ControlNet beside diffusers' implementation: what it adds, gradients, and the transformer that it adds to."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaControlNetModel
from jax.sharding import AbstractMesh, AxisType
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_jax.errors import UserError
from sana_jax.models.controlnet import SanaControlNet, SanaControlNetConfig, init_controlnet_params
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sharding_rules import CONTROLNET
from tests.compiling import AS_USERS_COMPILE
from tests.parity import sana_oracle as oracle
from tests.parity.test_sana import (
    GRADIENT_TOLERANCE,
    LEAST_DISTANCE_TO_A_CORNER,
    OUTPUT_TOLERANCE,
    QUICK_COMPILE,
    gradient_errors,
)
from train.sharding import AXES, parameter_paths, parameter_shardings

VARIANTS = {
    "plain": {"num_layers": 2},
    "positions": {"num_layers": 3, "sample_size": 64, "interpolation_scale": 2.0},
    "patch-2": {"num_layers": 2, "patch_size": 2},
    "biased": {"num_layers": 1, "attention_bias": True},
}
SCALE = 0.7
FULL_SIZE = {"controlnet_1600m": 631_576_960, "controlnet_600m": 168_765_696}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch: latents are channels-last; the loss is the sum of all residuals times ``weights``."""

    hidden_states: np.ndarray
    control: np.ndarray
    encoder_hidden_states: np.ndarray
    timestep: np.ndarray
    weights: np.ndarray


def config_of(variant: str) -> SanaControlNetConfig:
    return SanaControlNetConfig(**{**oracle.TINY, **VARIANTS[variant]})


@functools.cache
def torch_controlnet(variant: str) -> SanaControlNetModel:
    """Every parameter random, the zero layers too."""
    generator = torch.Generator().manual_seed(50 + list(VARIANTS).index(variant))
    model = SanaControlNetModel(**{**oracle.TINY, **VARIANTS[variant]}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * draw)
                parameter[0] += 1
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * draw)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.add_(1.5 / parameter.shape[1])  # why: see tests.parity.sana_oracle.torch_model
    return model


def our_params(tensors: dict[str, torch.Tensor], config: SanaControlNetConfig) -> dict:
    """Named tensors of diffusers' model (weights or gradients) as our tree; zero layers are stacked as the blocks."""
    zero_layers = {name: tensor for name, tensor in tensors.items() if name.startswith("controlnet_blocks.")}
    params = oracle.our_params({name: tensors[name] for name in tensors if name not in zero_layers}, config)
    weights, biases = (
        np.stack([oracle.to_numpy(zero_layers[f"controlnet_blocks.{i}.{leaf}"]) for i in range(config.num_layers)])
        for leaf in ("weight", "bias")
    )
    return {**params, "controlnet_blocks": {"kernel": weights.transpose(0, 2, 1), "bias": biases}}


def params_of(variant: str) -> dict:
    return our_params(torch_controlnet(variant).state_dict(), config_of(variant))


def draw_inputs(config: SanaControlNetConfig, size: tuple[int, int] = oracle.LATENT_SIZE, seed: int = 3) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    latent = (oracle.BATCH, *size, config.in_channels)
    tokens = math.prod(size) // config.patch_size**2
    return Inputs(
        hidden_states=normal(*latent),
        control=normal(*latent),
        encoder_hidden_states=normal(oracle.BATCH, oracle.CAPTION_TOKENS, config.caption_channels),
        timestep=np.array([999.0, 3.0, 412.5], np.float32),
        weights=normal(config.num_layers, oracle.BATCH, tokens, config.inner_dim),
    )


def run_theirs(variant: str, inputs: Inputs, mask: np.ndarray | None) -> tuple[np.ndarray, dict]:
    """Residuals (layers, B, N, D) and gradients of the loss."""
    model = torch_controlnet(variant)
    latent, control = (
        torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))).requires_grad_()
        for array in (inputs.hidden_states, inputs.control)
    )
    caption = torch.from_numpy(inputs.encoder_hidden_states).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused form's gradients are good to 5e-4 beside a mask of -10000
        (samples,) = model(
            latent,
            caption,
            torch.from_numpy(inputs.timestep),
            control,
            SCALE,
            encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
            return_dict=False,
        )
    residuals = torch.stack(tuple(samples))
    weights = dict(model.named_parameters())
    wanted = {"hidden_states": latent, "control": control, "encoder_hidden_states": caption, **weights}
    found = dict(
        zip(wanted, torch.autograd.grad((residuals * torch.from_numpy(inputs.weights)).sum(), wanted.values()))
    )
    gradients = {
        "params": our_params({name: found[name] for name in weights}, config_of(variant)),
        "hidden_states": oracle.channels_last(found["hidden_states"]),
        "control": oracle.channels_last(found["control"]),
        "encoder_hidden_states": oracle.to_numpy(found["encoder_hidden_states"]),
    }
    return oracle.to_numpy(residuals), gradients


def run_ours(variant: str, inputs: Inputs, mask: np.ndarray | None) -> tuple[jax.Array, dict]:
    model = SanaControlNet(config_of(variant))

    # One of them is compiled as users compile it.
    @functools.partial(jax.jit, compiler_options=AS_USERS_COMPILE if mask is None else QUICK_COMPILE)
    def run(wanted):
        def loss(wanted):
            residuals = model.apply(
                {"params": wanted["params"]},
                wanted["hidden_states"],
                wanted["control"],
                wanted["encoder_hidden_states"],
                jnp.asarray(inputs.timestep),
                None if mask is None else jnp.asarray(mask),
                SCALE,
            )
            return (residuals * inputs.weights).sum(), residuals

        (_, residuals), gradients = jax.value_and_grad(loss, has_aux=True)(wanted)
        return residuals, gradients

    names = ("hidden_states", "control", "encoder_hidden_states")
    return run(jax.tree.map(jnp.asarray, {"params": params_of(variant), **{n: getattr(inputs, n) for n in names}}))


CASES = [(variant, "masked", oracle.LATENT_SIZE) for variant in VARIANTS]
CASES += [("plain", "without mask", (3, 7)), ("positions", "masked", (5, 3))]


@pytest.mark.parametrize(("variant", "captions", "size"), CASES)
def test_residuals_and_gradients(variant, captions, size):
    mask = oracle.MASK if captions == "masked" else None
    for seed in range(3, 20):
        inputs = draw_inputs(config_of(variant), size, seed)
        theirs = functools.partial(run_theirs, variant, inputs, mask)
        if oracle.nearest_corner(torch_controlnet(variant), theirs) > LEAST_DISTANCE_TO_A_CORNER:
            break
    else:
        raise AssertionError("no inputs whose gradients do not depend on how a processor rounds")
    (found, gradients), (expected, expected_gradients) = (run(variant, inputs, mask) for run in (run_ours, run_theirs))
    for layer, residual in enumerate(expected):
        assert np.std(residual) > 0.1
        assert oracle.relative_error(found[layer], residual) <= OUTPUT_TOLERANCE
    errors = gradient_errors(gradients, expected_gradients, qk_norm=False)
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


@functools.cache
def residuals_function(variant: str):
    model = SanaControlNet(config_of(variant))

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, inputs, mask, scale):
        return model.apply({"params": params}, *inputs, mask, scale)

    def residuals(inputs: Inputs, scale: float, mask: np.ndarray = oracle.MASK) -> jax.Array:
        values = (inputs.hidden_states, inputs.control, inputs.encoder_hidden_states, inputs.timestep)
        return run(params_of(variant), values, mask, jnp.float32(scale))

    return residuals


def test_the_scale_multiplies_and_masked_tokens_have_no_effect():
    inputs = draw_inputs(config_of("plain"))
    run = residuals_function("plain")
    full = run(inputs, 1.0)
    assert oracle.relative_error(run(inputs, SCALE), SCALE * np.asarray(full)) <= 1e-6
    assert not np.any(run(inputs, 0.0))
    inputs.encoder_hidden_states[0, 4:] += 3.0
    np.testing.assert_array_equal(full, run(inputs, 1.0))
    inputs.encoder_hidden_states[1] += 3.0
    assert oracle.relative_error(run(inputs, 1.0), full) > 1e-3


@pytest.mark.parametrize("variant", ["plain", "patch-2"])
def test_the_transformer_with_its_controlnet(variant):
    """Two blocks of residuals for three of the transformer; the third gets none."""
    base = "patch-2" if variant == "patch-2" else "sana-1.0"
    inputs, mask = oracle.draw_inputs(oracle.jax_config(base)), oracle.MASK
    control = np.random.default_rng(11).standard_normal(inputs.hidden_states.shape).astype(np.float32)
    theirs = oracle.torch_inputs(inputs, mask)
    with torch.no_grad():
        (samples,) = torch_controlnet(variant)(
            theirs["hidden_states"],
            theirs["encoder_hidden_states"],
            theirs["timestep"],
            torch.from_numpy(np.ascontiguousarray(control.transpose(0, 3, 1, 2))),
            SCALE,
            encoder_attention_mask=theirs["encoder_attention_mask"],
            return_dict=False,
        )
        (out,) = oracle.torch_model(base)(**theirs, controlnet_block_samples=tuple(samples), return_dict=False)
    expected = oracle.channels_last(out)

    transformer, controlnet = SanaTransformer(oracle.jax_config(base)), SanaControlNet(config_of(variant))

    @jax.jit
    def run(params, controlnet_params, latents, caption, timestep, scale):
        residuals = controlnet.apply(
            {"params": controlnet_params}, latents, control, caption, timestep, jnp.asarray(mask), scale
        )
        return transformer.apply(
            {"params": params},
            latents,
            caption,
            timestep,
            encoder_attention_mask=jnp.asarray(mask),
            controlnet_residuals=residuals,
        )

    values = (inputs.hidden_states, inputs.encoder_hidden_states, inputs.timestep)
    arguments = (oracle.params_for(base), params_of(variant), *map(jnp.asarray, values))
    found = run(*arguments, jnp.float32(SCALE))
    assert oracle.relative_error(found, expected) <= OUTPUT_TOLERANCE
    without = run(*arguments, jnp.float32(0.0))
    assert oracle.relative_error(without, expected) > 0.01
    assert oracle.relative_error(without, oracle.torch_output(base, inputs, mask, torch.float32)) <= OUTPUT_TOLERANCE


def test_an_untrained_controlnet_adds_nothing_and_is_scanned():
    """Zero layers at first; and the program has one block in it, however many are stacked."""
    sizes = []
    for layers in (2, 5):
        config = SanaControlNetConfig(**{**oracle.TINY, "num_layers": layers})
        model, inputs = SanaControlNet(config), draw_inputs(config, (2, 3))
        quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
        params = quick(functools.partial(init_controlnet_params, model))(jax.random.key(0))
        values = (inputs.hidden_states, inputs.control, inputs.encoder_hidden_states, inputs.timestep)
        traced, residuals = jax.make_jaxpr(model.apply, return_shape=True)({"params": params}, *values)
        assert residuals.shape == inputs.weights.shape
        text = str(traced)
        assert re.findall(r"length=(\d+)", text) == [str(layers)] * 2  # the blocks, and the zero layers behind them
        sizes.append(len(text.splitlines()))
        if layers == 2:
            assert not np.any(quick(model.apply)({"params": params}, *values))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_sizes(name):
    """The exact numbers of parameters of the published ControlNets, and that every one of them has one sharding."""
    model = SanaControlNet(getattr(SanaControlNetConfig, name)())
    shapes = jax.eval_shape(lambda: init_controlnet_params(model, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == FULL_SIZE[name]
    mesh = AbstractMesh((1, 2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    parameter_shardings(shapes, CONTROLNET, mesh)  # raises where not exactly one rule matches
    normed = SanaControlNet(dataclasses.replace(model.config, qk_norm="rms_norm_across_heads"))
    with_norms = jax.eval_shape(lambda: init_controlnet_params(normed, jax.random.key(0)))
    parameter_shardings(with_norms, CONTROLNET, mesh)
    paths = {*parameter_paths(shapes), *parameter_paths(with_norms)}
    assert [pattern for pattern, _ in CONTROLNET if not any(re.fullmatch(pattern, path) for path in paths)] == []


def test_configurations():
    config = SanaControlNetConfig.controlnet_600m()
    assert SanaControlNetConfig.from_dict(config.to_dict()) == config
    theirs = {name for name in torch_controlnet("plain").config if not name.startswith("_")}
    assert set(config.to_dict()) - {"_class_name"} == theirs
    with pytest.raises(UserError, match=r"controlnet\.guidance_embeds=True.*leave it at False"):
        SanaControlNetConfig(guidance_embeds=True)
    normed = SanaControlNetConfig(qk_norm="rms_norm_across_heads")  # beside a SANA-1.5
    assert SanaControlNetConfig.from_dict(normed.to_dict()) == normed
    inputs = draw_inputs(config_of("plain"))
    small = dataclasses.replace(inputs, control=inputs.control[:, :4])
    with pytest.raises(UserError, match=r"\(3, 6, 10, 8\) and control latent \(3, 4, 10, 8\).*resize"):
        residuals_function("plain")(small, 1.0)
