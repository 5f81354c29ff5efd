"""The network with a LoRA beside its parameters against PEFT's: outputs and gradients, for every kind of layer."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_jax.lora import init_lora, lora_tree, merge_lora, read_lora, scaled_lora, with_dropout
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.opening import abstract_params
from sana_jax.weights.rules import flatten
from sana_jax.weights.tables.sana import transformer_rules
from tests.lora.lora_oracle import ALL_LINEAR, CONV
from tests.parity.sana_oracle import (
    MASK,
    channels_last,
    draw_inputs,
    jax_config,
    params_for,
    relative_error,
    torch_inputs,
    torch_model,
)

FORWARD, GRADIENT = 1e-5, 1e-4
# Compiling takes most of the time, and speed does not matter here.
QUICKLY = {"xla_backend_optimization_level": 0}
TARGETS = [*ALL_LINEAR, *CONV]
RANK, ALPHA = 3, 5


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=["patch-2", "sprint"])
def case(request, tmp_path_factory):
    """(variant, our model, base parameters, LoRA as it is trained, inputs, output and gradients that are expected)."""
    variant = request.param
    config = jax_config(variant)
    model = copy.deepcopy(torch_model(variant))
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(5)
    adapter = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in adapter.items():
            # less for queries and keys, which would lose the offset that keeps their gradients from being all rounding:
            # see torch_model
            strength = 0.2 if "attn1.to_q" in name or "attn1.to_k" in name else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength / parameter[0].numel() ** 0.5)
    inputs = draw_inputs(config)
    with sdpa_kernel(SDPBackend.MATH):
        out = model(**torch_inputs(inputs, MASK), return_dict=False)[0]
    weights = torch.from_numpy(np.ascontiguousarray(inputs.output_weights.transpose(0, 3, 1, 2)))
    found = torch.autograd.grad((out * weights).sum(), list(adapter.values()))
    directory = tmp_path_factory.mktemp(variant)
    values = get_peft_model_state_dict(model)
    gradients = {name.replace(".default", ""): gradient for name, gradient in zip(adapter, found)}
    assert set(values) == set(gradients)
    transformer = SanaTransformer(config)
    trees = []
    for name, tensors in (("values", values), ("gradients", gradients)):
        path = directory / f"{name}.safetensors"
        save_file({f"transformer.{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)
        abstract = abstract_params(transformer)
        trees.append(lora_tree([(read_lora(path, transformer_rules(config), abstract), 1.0)], abstract))
    return variant, transformer, params_for(variant), trees[0], inputs, channels_last(out), trees[1]


def jit(function):
    return jax.jit(function, compiler_options=QUICKLY)


def unflatten(leaves: dict) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def apply(transformer, variables, inputs):
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in inputs.arrays().items()}
    return transformer.apply(variables, **arrays, encoder_attention_mask=jnp.asarray(MASK))


def test_output(case):
    variant, transformer, params, lora, inputs, expected, _ = case
    lora = scaled_lora(lora, ALPHA / RANK)
    run = jit(lambda variables: apply(transformer, variables, inputs))
    beside = run({"params": params, "lora": lora})
    merged = run({"params": merge_lora(params, lora)})
    unrolled = SanaTransformer(jax_config(variant), scan_blocks=False)
    in_turn = jit(lambda variables: apply(unrolled, variables, inputs))({"params": params, "lora": lora})
    print(f"{relative_error(beside, expected):.2e} {relative_error(merged, expected):.2e}")
    assert relative_error(run({"params": params}), expected) > 0.01
    for found in (beside, merged, in_turn):
        assert relative_error(found, expected) <= FORWARD


def test_gradients(case):
    variant, _, params, lora, inputs, _, expected = case
    transformer = SanaTransformer(jax_config(variant), remat={"patch-2": "none", "sprint": "full"}[variant])

    def loss(lora):
        lora = scaled_lora(lora, ALPHA / RANK)
        return (apply(transformer, {"params": params, "lora": lora}, inputs) * inputs.output_weights).sum()

    found, wanted = flatten(jit(jax.grad(loss))(lora)), flatten(expected)
    assert set(found) == set(wanted)
    errors = {"/".join(path): relative_error(found[path], wanted[path]) for path in wanted}
    worst = max(errors, key=errors.get)
    print(f"worst {worst} {errors[worst]:.2e}")
    assert errors[worst] <= GRADIENT


@pytest.mark.parametrize("case", ["sprint"], indirect=True)
def test_dropout(case):
    """Every form of the network drops the same; layers and samples draw their own, and the base layers drop nothing."""
    variant, _, params, lora, inputs, _, _ = case
    keys = jax.random.split(jax.random.key(3), MASK.shape[0])
    some = ("transformer_blocks/attn1/to_q", "transformer_blocks/ff/conv_point", "time_embed/linear", "proj_out")
    lora = unflatten({path: leaf for path, leaf in flatten(lora).items() if "/".join(path[:-1]) in some})

    def dropped(transformer, lora, keys):
        return apply(transformer, {"params": params, "lora": with_dropout(lora, 0.3, keys)}, inputs)

    def output_and_gradient(transformer):
        @jit
        def run(lora, keys):
            def loss(lora):
                output = dropped(transformer, lora, keys)
                return (output * inputs.output_weights).sum(), output

            gradient, output = jax.grad(loss, has_aux=True)(lora)
            return output, gradient

        return run

    scanned = SanaTransformer(jax_config(variant))
    run = output_and_gradient(scanned)
    output, gradient = run(lora, keys)
    found, found_gradient = output_and_gradient(SanaTransformer(jax_config(variant), remat="full"))(lora, keys)
    assert relative_error(found, output) <= FORWARD
    for path, leaf in flatten(gradient).items():
        assert relative_error(flatten(found_gradient)[path], leaf) <= GRADIENT, path
    unrolled = SanaTransformer(jax_config(variant), scan_blocks=False)
    assert relative_error(jit(lambda lora: dropped(unrolled, lora, keys))(lora), output) <= FORWARD
    again, _ = run(lora, keys)
    np.testing.assert_array_equal(again, output)
    # one sample's other key changes that sample alone
    other, _ = run(lora, keys.at[1].set(jax.random.key(9)))
    changed = [relative_error(other[row], output[row]) for row in range(len(output))]
    assert changed[1] > 0.01
    assert max(changed[0], changed[2]) <= 2e-6
    whole = jit(lambda lora: apply(scanned, {"params": params, "lora": lora}, inputs))(lora)
    assert relative_error(output, whole) > 0.01
    # without a LoRA's change there is nothing to drop
    silent = scaled_lora(lora, 0.0)
    base = jit(lambda params: apply(scanned, {"params": params}, inputs))(params)
    assert relative_error(run(silent, keys)[0], base) <= 2e-6


@pytest.mark.parametrize("case", ["patch-2"], indirect=True)
def test_a_fresh_lora_changes_nothing_and_learns(case):
    _, transformer, params, _, inputs, _, _ = case
    lora = init_lora(abstract_params(transformer), ("qkv",), 2, jax.random.key(0))

    @jit
    def output_loss_and_gradient(lora):
        def loss(lora):
            output = apply(transformer, {"params": params, "lora": lora}, inputs)
            return jnp.square(output).mean(), output

        (value, output), gradient = jax.value_and_grad(loss, has_aux=True)(lora)
        return output, value, gradient

    output, first, gradient = output_loss_and_gradient(lora)
    base = jit(lambda params: apply(transformer, {"params": params}, inputs))(params)
    assert relative_error(output, base) <= 2e-6  # two programs, of which the sums are fused differently
    for _ in range(5):
        lora = jax.tree.map(lambda p, g: p - 0.3 * g, lora, gradient)
        _, last, gradient = output_loss_and_gradient(lora)
    assert last < 0.95 * first
