"""What quantising costs in error and saves in memory: tables for ``python -m sana_jax.quantization``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, PyTree
from sana_jax.quantization.formats import FORMATS
from sana_jax.quantization.trees import quantizable_layers, quantize_params, quantized_abstract
from sana_jax.weights.trees import tree_bytes


class BlockError(NamedTuple):
    """A block of a network in one format: the relative error of its output, and the bytes of its dense layers."""

    block: str
    format: str
    relative_error: float


class NetworkBytes(NamedTuple):
    """A network's weights in bfloat16 and in every format, in bytes, default exclusions left in bfloat16."""

    network: str
    parameters: int
    quantised_share: float
    bytes: dict[str, int]


def relative_error(got: Any, expected: Any) -> float:
    """The root mean square of the difference over that of what is expected."""
    got, expected = (np.asarray(one, np.float64) for one in (got, expected))
    return float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))


def random_params(abstract: PyTree, seed: int = 0) -> PyTree:
    """Normal parameters; a kernel's have the variance 1 / inputs, so that layers keep the size of what they are given.

    The other parameters have the standard deviation 0.25.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    drawn = []
    for number, (path, leaf) in enumerate(leaves):
        spread = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.25
        rng = np.random.default_rng((seed, number))
        drawn.append(jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * spread))
    return jax.tree.unflatten(structure, drawn)


def block_errors(full_width: bool = True) -> Iterator[BlockError]:
    """Errors of one block's output at random parameters and inputs, computed in float32, format by format.

    The error is that of the whole output, the residual stream included; outliers of trained weights are not in it.
    """
    for name, network, abstract, inputs in _blocks(full_width):
        params = random_params(abstract)
        formats = quantizable_layers(params)

        def run(params, network=network, inputs=inputs) -> Array:
            _, kept = network.apply({"params": params}, *inputs, mutable=["intermediates"])
            return kept["intermediates"]["block_outputs"][0]

        compiled: Callable[[PyTree], Array] = jax.jit(run)
        expected = np.asarray(compiled(params))
        for format_name in FORMATS:
            quantized = quantize_params(params, dict.fromkeys(formats, format_name))
            got = compiled(jax.tree.map(lambda lazy: jnp.asarray(lazy.read()), quantized))
            yield BlockError(name, format_name, relative_error(got, expected))


def _blocks(full_width: bool) -> Iterator[tuple[str, Any, PyTree, tuple[Array, ...]]]:
    from sana_jax.models import sana, sana_video

    draw = np.random.default_rng(1).standard_normal
    tiny = {
        "num_attention_heads": 3, "attention_head_dim": 16, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": 20,
    }  # fmt: skip
    shapes = {"tiny": (tiny, 8), **({"full width": ({}, 16)} if full_width else {})}
    for width, (changes, side) in shapes.items():
        image = sana.SanaTransformer(sana.SanaConfig(num_layers=1, qk_norm=sana.QK_NORM, **changes))
        latents = jnp.asarray(draw((1, side, side, 32)), jnp.float32)
        caption = jnp.asarray(draw((1, 30, image.config.caption_channels)), jnp.float32)
        inputs = (latents, caption, jnp.asarray([500.0]))
        yield f"SANA, {width} {image.config.inner_dim}", image, _shapes(sana.init_params, image), inputs
    if full_width:
        video = sana_video.SanaVideoTransformer(sana_video.SanaVideoConfig.sana_video_2b_480p(num_layers=1))
        latents = jnp.asarray(draw((1, 3, 16, 16, video.config.in_channels)), jnp.float32)
        inputs = (latents, inputs[1], inputs[2])
        yield f"SANA-Video, full width {video.config.inner_dim}", video, _shapes(sana_video.init_params, video), inputs


def _shapes(make: Callable[[Any, Any], PyTree], network: Any) -> PyTree:
    return jax.eval_shape(functools.partial(make, network), jax.random.key(0))


def network_bytes() -> Iterator[NetworkBytes]:
    """Bytes of the published networks by their shapes; nothing is made."""
    from sana_jax.models import gemma, ltx2, ltx2_connectors, sana, sana_video, sana_wm
    from sana_jax.models.gemma3_config import Gemma3Config

    video = sana_video.SanaVideoTransformer(sana_video.SanaVideoConfig.sana_video_2b_480p())
    twelve = Gemma3Config(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8
    )
    networks = {
        "SANA 1.6B": (sana.init_params, sana.SanaTransformer(sana.SanaConfig.sana_1600m())),
        "SANA-1.5 4.8B": (sana.init_params, sana.SanaTransformer(sana.SanaConfig.sana15_4800m())),
        "Gemma-2 2B": (gemma.init_params, gemma.Gemma(gemma.GemmaConfig())),
        "SANA-Video 2B": (sana_video.init_params, video),
        "SANA-WM": (sana_wm.init_params, sana_wm.SanaWMTransformer(sana_wm.SanaWMConfig())),
        "LTX-2 refiner": (ltx2.init_params, ltx2.LTX2VideoTransformer(ltx2.LTX2Config())),
        "LTX-2 connectors": (
            ltx2_connectors.init_params,
            ltx2_connectors.LTX2Connectors(ltx2_connectors.LTX2ConnectorsConfig()),
        ),
        "Gemma-3 12B": (gemma.init_params, gemma.Gemma(twelve)),
    }
    for name, (make, network) in networks.items():
        shapes = _shapes(make, network)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
        layers = quantizable_layers(abstract)
        plain = tree_bytes(abstract)
        sizes = {"bfloat16": plain}
        for format_name in FORMATS:
            sizes[format_name] = tree_bytes(quantized_abstract(abstract, dict.fromkeys(layers, format_name)))
        share = 2 * sum(int(np.prod(shape)) for shape in layers.values()) / plain
        yield NetworkBytes(name, plain // 2, share, sizes)


def markdown(rows: list[list[str]]) -> str:
    """A table, its first row the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
