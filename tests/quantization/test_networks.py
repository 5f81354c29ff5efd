"""Networks with quantised layers: every family through the one layer, errors, sharding, LoRA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sana_jax.errors import UserError
from sana_jax.lora import init_lora
from sana_jax.models import ltx2, ltx2_connectors, sana_video, sana_wm, sharding_rules
from sana_jax.models.gemma import Gemma, GemmaConfig
from sana_jax.models.gemma import init_params as init_gemma
from sana_jax.models.sana import SanaConfig, SanaTransformer, init_params
from sana_jax.nn.linear import LORA
from sana_jax.quantization import FORMATS, dequantize_kernel
from sana_jax.quantization.choice import Quantization, check_device, parse_quantization
from sana_jax.quantization.formats import LEAVES, OUTPUTS_FIRST
from sana_jax.quantization.tables import relative_error
from sana_jax.quantization.trees import (
    quantizable_layers,
    quantize_params,
    quantized_abstract,
    quantized_rules,
    stored_formats,
)
from sana_jax.quantization.weights import quantized_weights
from sana_jax.weights.components import Resident
from sana_jax.weights.rules import flatten, nested

CONFIG = SanaConfig(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, num_layers=3,
    num_cross_attention_heads=2, cross_attention_head_dim=24, cross_attention_dim=48, caption_channels=20,
    qk_norm="rms_norm_across_heads",
)  # fmt: skip
# Relative error of the network's output at random parameters, measured (see BUILD_NOTES) and rounded up.
MEASURED = {"int8": 0.03, "fp8": 0.08, "int4": 0.2, "nvfp4": 0.25}


def _random(abstract, seed=0, scale=1.0):
    """Kernels of 1/sqrt(inputs), so that every layer keeps the size of what goes through it."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        fan_in = leaf.shape[-2] if path[-1].key == "kernel" and len(leaf.shape) > 1 else 16
        return jnp.asarray(rng.standard_normal(leaf.shape) * scale / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract)


def _on_device(tree):
    return jax.tree.map(lambda lazy: jnp.asarray(lazy.read()), tree)


def _dequantized(params, abstract):
    """Parameters with plain kernels in float32: what the quantised ones stand for."""
    leaves, flat = flatten(params), {}
    for path, shape in flatten(abstract).items():
        if path in leaves:
            flat[path] = leaves[path]
            continue
        own = {name: leaves[(*path[:-1], name)] for name in LEAVES if (*path[:-1], name) in leaves}
        restore = functools.partial(dequantize_kernel, inputs=shape.shape[-2])
        flat[path] = (jax.vmap(restore) if len(shape.shape) == 3 else restore)(own).astype(jnp.float32)
    return nested(flat)


def _inputs(seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return draw(2, 5, 3, 4), draw(2, 7, 20), jnp.asarray([30.0, 700.0])


@pytest.fixture(scope="module")
def plain():
    network = SanaTransformer(CONFIG)
    params = _random(jax.eval_shape(lambda: init_params(network, jax.random.key(0))))
    run = jax.jit(lambda params, lora=None: network.apply({"params": params, **(lora or {})}, *_inputs()))
    return run, params, np.asarray(run(params))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_quantised_network_is_close_to_the_plain_one_and_to_its_own_dequantised_weights(plain, format_name):
    run, params, expected = plain
    layers = quantizable_layers(params)
    assert {path[-1] for path in layers} == {"to_q", "to_k", "to_v", "to_out", "conv_inverted", "conv_point"}
    quantized = _on_device(quantize_params(params, dict.fromkeys(layers, format_name)))
    assert set(stored_formats(quantized)) == set(layers)
    got = np.asarray(run(quantized))
    error = relative_error(got, expected)
    assert MEASURED[format_name] / 10 < error < MEASURED[format_name]
    if format_name in ("int4", "nvfp4"):
        meant = run(_dequantized(quantized, params))
        assert relative_error(got, meant) < 1e-5
    # Layers that are left out keep their bits.
    for path, leaf in flatten(params).items():
        if path[:-1] not in layers:
            np.testing.assert_array_equal(leaf, flatten(quantized)[path])


def test_unrolled_and_scanned_blocks_are_equal(plain):
    _, params, _ = plain
    quantized = _on_device(quantize_params(params, dict.fromkeys(quantizable_layers(params), "nvfp4")))
    networks = [SanaTransformer(CONFIG, scan_blocks=scan) for scan in (True, False)]
    outputs = [jax.jit(network.apply)({"params": quantized}, *_inputs()) for network in networks]
    np.testing.assert_allclose(*outputs, atol=2e-5)


def test_what_is_left_out_is_said_by_patterns(plain):
    _, params, _ = plain
    assert not any("ff" in path for path in quantizable_layers(params, exclude=("(^|/)ff/", "_embed", "proj")))
    with pytest.raises(UserError, match=r"\('\(',\) is no regular expression"):
        quantizable_layers(params, exclude=("(",))


def test_a_lora_acts_beside_quantised_weights_as_beside_plain_ones(plain):
    run, params, without = plain
    quantized = _on_device(quantize_params(params, dict.fromkeys(quantizable_layers(params), "int8")))
    lora = init_lora(params, ["attention"], 2, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), lora)
    expected = run(params, {LORA: lora})
    assert relative_error(without, expected) > 10 * MEASURED["int8"]
    assert relative_error(run(quantized, {LORA: lora}), expected) < MEASURED["int8"]
    gradient = jax.grad(lambda lora: (run(quantized, {LORA: lora}) ** 2).sum())(lora)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def _families():
    """Tiny networks of the other families: their parameters as shapes, and their sharding rules."""
    video = sana_video.SanaVideoConfig()
    world = sana_wm.SanaWMTransformer(sana_wm.SanaWMConfig())
    refiner = ltx2.LTX2VideoTransformer(ltx2.LTX2Config())
    connectors = ltx2_connectors.LTX2Connectors(ltx2_connectors.LTX2ConnectorsConfig())
    return {
        "sana": (init_params, SanaTransformer(SanaConfig()), sharding_rules.SANA),
        "sana_video": (sana_video.init_params, sana_video.SanaVideoTransformer(video), sharding_rules.SANA_VIDEO),
        "sana_wm": (sana_wm.init_params, world, sharding_rules.SANA_WM),
        "ltx2": (ltx2.init_params, refiner, sharding_rules.LTX2),
        "connectors": (ltx2_connectors.init_params, connectors, sharding_rules.LTX2_CONNECTORS),
    }


@pytest.mark.parametrize("family", ["sana", "sana_video", "sana_wm", "ltx2", "connectors"])
def test_the_sharding_rules_cover_every_quantised_leaf_and_cut_it_as_its_kernel(family):
    from train.sharding import parameter_shardings

    make, network, rules = _families()[family]
    abstract = jax.eval_shape(lambda: make(network, jax.random.key(0)))
    layers = quantizable_layers(abstract)
    bytes_of_layers = sum(np.prod(shape) for shape in layers.values())
    assert bytes_of_layers > (0.3 if family == "connectors" else 0.9) * sum(
        leaf.size for leaf in jax.tree.leaves(abstract)
    )
    mesh = jax.make_mesh((1,) * 4, ("data", "fsdp", "tensor", "context"))
    plain_shardings, _ = parameter_shardings(abstract, rules, mesh)
    flat = flatten(plain_shardings)
    for format_name in FORMATS:
        quantized = quantized_abstract(abstract, dict.fromkeys(layers, format_name))
        shardings, _ = parameter_shardings(quantized, quantized_rules(rules), mesh)
        for path in layers:
            own = flatten(shardings)[(*path, f"kernel_{format_name}")]
            *stack, inputs, outputs = flat[(*path, "kernel")].spec
            turned = format_name in OUTPUTS_FIRST
            assert own.spec == PartitionSpec(*stack, *((outputs, inputs) if turned else (inputs, outputs)))
        # The same specs come of a tree that carries its shardings.
        carried = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            plain_shardings,
        )
        carried = quantized_abstract(carried, dict.fromkeys(layers, format_name))
        for path, sharding in flatten(shardings).items():
            assert tuple(flatten(carried)[path].sharding.spec) == tuple(sharding.spec), path


def test_gemma_goes_through_the_same_layer():
    config = GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
    )  # fmt: skip
    gemma = Gemma(config)
    params = _random(jax.eval_shape(lambda: init_gemma(gemma, jax.random.key(0))))
    layers = quantizable_layers(params)
    assert len(layers) == 7
    assert all(path[0] == "layers" for path in layers)
    ids = jnp.arange(12).reshape(2, 6)
    expected = gemma.apply({"params": params}, ids)
    quantized = _on_device(quantize_params(params, dict.fromkeys(layers, "int8")))
    assert 0.001 < relative_error(gemma.apply({"params": quantized}, ids), expected) < 0.1


def test_choices_are_read_and_what_is_not_allowed_is_named():
    assert parse_quantization(None) == {}
    assert parse_quantization("int8") == {"transformer": Quantization("int8")}
    texts = ("int8", "text_encoder=nvfp4")
    expected = {"transformer": Quantization("int8"), "text_encoder": Quantization("nvfp4")}
    assert parse_quantization(texts) == expected
    assert parse_quantization({"transformer": "int8", "text_encoder": Quantization("nvfp4")}) == expected
    for given, message in (
        ("int7", "transformer=int7.*int8, fp8, int4, nvfp4"),
        ({"decoder": "int8"}, "decoder=int8.*transformer, text_encoder"),
        (("int8", "transformer=fp8"), "names transformer twice, int8 and fp8"),
    ):
        with pytest.raises(UserError, match=message):
            parse_quantization(given)


class _Device:
    platform, device_kind = "gpu", "NVIDIA A100"

    def __init__(self, capability):
        self.compute_capability = capability


def test_fp8_is_refused_where_it_is_not_multiplied_and_said_to_be_emulated_on_a_cpu():
    assert check_device("fp8", _Device("8.9")) is None
    assert check_device("fp8", _Device("10.0")) is None
    assert check_device("int8", _Device("8.0")) is None
    with pytest.raises(UserError, match=r"A100 of compute capability 8.0 does not multiply.*choose int8"):
        check_device("fp8", _Device("8.0"))
    assert "emulated on a CPU" in check_device("fp8", jax.devices("cpu")[0])


def test_weights_without_dense_layers_or_in_another_format_are_refused(plain, capsys):
    _, params, _ = plain
    with pytest.raises(UserError, match="text_encoder=int8: the network has no dense layer"):
        quantized_weights(Resident.of("words", {"table": jnp.zeros((3, 4))}), Quantization("int8"), "text_encoder")
    quantized = quantized_weights(Resident.of("transformer", params), Quantization("int8"), "transformer")
    assert "become" in capsys.readouterr().out
    assert quantized_weights(quantized, Quantization("int8"), "transformer") is quantized
    with pytest.raises(UserError, match="transformer=fp8: its weights are stored in int8"):
        quantized_weights(quantized, Quantization("fp8"), "transformer")
