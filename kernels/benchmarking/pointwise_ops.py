"""What is timed of the operations on channels; every operation by name.

Parameters that all tokens share come whole, so that nothing is cut for the comparison with the reference. All of them
are bound by memory; a gradient reads inputs and the cotangent and writes the gradients.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels.adaln import api as adaln
from kernels.adaln import reference as adaln_reference
from kernels.benchmarking.ops import ATTENTION_OPS, Arrays, Counts, Op, Sizes, draw_normal, draw_rotation
from kernels.benchmarking.softmax_ops import SOFTMAX_OPS
from kernels.depthwise_conv import api as depthwise_conv
from kernels.depthwise_conv import reference as depthwise_conv_reference
from kernels.mix_ffn import api as mix_ffn
from kernels.mix_ffn import reference as mix_ffn_reference
from kernels.qk_norm import api as qk_norm
from kernels.qk_norm import reference as qk_norm_reference

_EPSILON = 1e-6

# -- convolution and what is around it ---------------------------------------------------------------------------------

_PICTURES = {
    "tiny": {"tiny": {"B": 1, "H": 6, "W": 5, "C": 12}},
    "reduced": {"SANA 1.6B 1024 px": {"B": 1, "H": 32, "W": 32, "C": 11200}},
    "full": {
        "SANA 1.6B 1024 px": {"B": 2, "H": 32, "W": 32, "C": 11200},
        "SANA-Video 480p, 21 latent frames": {"B": 21, "H": 30, "W": 52, "C": 13440},
    },
}


def _draw_picture(sizes: Sizes, dtype: Any) -> Arrays:
    x, kernel = draw_normal(dtype, (sizes["B"], sizes["H"], sizes["W"], sizes["C"]), (3, 3, sizes["C"]))
    return {"x": x, "kernel": kernel}


def _elements(sizes: Sizes) -> int:
    return sizes["B"] * sizes["H"] * sizes["W"] * sizes["C"]


def _depthwise_cost(sizes: Sizes, gradient: bool) -> Counts:
    """Nine multiplications and additions an element; twice that, without the forward pass, for both gradients."""
    count = _elements(sizes)
    return (36 * count, 3 * count, 0) if gradient else (18 * count, 2 * count, 0)


DEPTHWISE = Op(
    "depthwise_conv",
    _PICTURES,
    _draw_picture,
    lambda arrays, name: depthwise_conv.depthwise_conv2d(**arrays, implementation=name),
    lambda arrays: depthwise_conv_reference.depthwise_conv2d(**arrays),
    _depthwise_cost,
    ("x", "kernel"),
)


def _draw_mix(sizes: Sizes, dtype: Any) -> Arrays:
    bias, depth_bias = draw_normal(dtype, (sizes["C"],), (sizes["C"],))
    return {**_draw_picture(sizes, dtype), "bias": bias, "depth_bias": depth_bias}


def _mix_cost(sizes: Sizes, gradient: bool) -> Counts:
    """The convolution, five operations an element for each SiLU with its bias, and the gate; half of C comes out."""
    count = _elements(sizes)
    flops, elements = (18 + 6 + 4) * count, 1.5 * count
    return (3 * flops, 2.5 * count, 0) if gradient else (flops, elements, 0)


MIX_FFN = Op(
    "mix_ffn",
    _PICTURES,
    _draw_mix,
    lambda arrays, name: mix_ffn.mix_ffn(**arrays, implementation=name),
    lambda arrays: mix_ffn_reference.mix_ffn(**arrays),
    _mix_cost,
    ("x", "bias", "kernel", "depth_bias"),
)


# -- norms and modulation ----------------------------------------------------------------------------------------------

_TOKENS = {
    "tiny": {"tiny": {"B": 2, "N": 12, "D": 24}},
    "reduced": {"SANA 1.6B 1024 px": {"B": 1, "N": 1024, "D": 2240}},
    "full": {
        "SANA 1.6B 1024 px": {"B": 2, "N": 1024, "D": 2240},
        "SANA-Video 480p, 21 latent frames": {"B": 1, "N": 21 * 30 * 52, "D": 2240},
    },
}


def _draw_tokens(sizes: Sizes, dtype: Any) -> Any:
    (x,) = draw_normal(dtype, (sizes["B"], sizes["N"], sizes["D"]))
    return x


def _draw_norm(sizes: Sizes, dtype: Any) -> Arrays:
    shift, scale = draw_normal(jnp.float32, *[(sizes["B"], 1, sizes["D"])] * 2)
    return {"x": _draw_tokens(sizes, dtype), "shift": shift, "scale": scale}


def _draw_residual(sizes: Sizes, dtype: Any) -> Arrays:
    (gate,) = draw_normal(jnp.float32, (sizes["B"], 1, sizes["D"]))
    x = _draw_tokens(sizes, dtype)
    return {"x": x, "gate": gate, "update": x[..., ::-1]}


def _row_cost(flops: int, forward: int, backward: int) -> Any:
    """Operations an element, and arrays of all elements that are read or written in each direction."""

    def cost(sizes: Sizes, gradient: bool) -> Counts:
        count = sizes["B"] * sizes["N"] * sizes["D"]
        return (3 * flops * count, backward * count, 0) if gradient else (flops * count, forward * count, 0)

    return cost


NORM = Op(
    "modulated_norm",
    _TOKENS,
    _draw_norm,
    lambda arrays, name: adaln.modulated_norm(**arrays, epsilon=_EPSILON, implementation=name),
    lambda arrays: adaln_reference.modulated_norm(**arrays, epsilon=_EPSILON),
    _row_cost(8, 2, 3),
    ("x", "shift", "scale"),
)

RESIDUAL = Op(
    "gated_residual",
    _TOKENS,
    _draw_residual,
    lambda arrays, name: adaln.gated_residual(**arrays, implementation=name),
    lambda arrays: adaln_reference.gated_residual(**arrays),
    _row_cost(2, 3, 4),
    ("x", "gate", "update"),
)


def _draw_queries(sizes: Sizes, dtype: Any) -> Arrays:
    (scale,) = draw_normal(dtype, (sizes["D"],))
    cos, sin = draw_rotation(sizes["N"], min(sizes["D"], 8 if sizes["D"] < 112 else 112))
    return {"x": _draw_tokens(sizes, dtype), "scale": scale, "cos": cos, "sin": sin}


def _run_queries(arrays: Arrays, name: str | None) -> Any:
    x, scale, rotation = arrays["x"], arrays["scale"], (arrays["cos"], arrays["sin"])
    return qk_norm.qk_norm(x, scale, rotation, epsilon=_EPSILON, relu=True, implementation=name)


QK_NORM = Op(
    "qk_norm",
    _TOKENS,
    _draw_queries,
    _run_queries,
    lambda arrays: qk_norm_reference.qk_norm(
        arrays["x"], arrays["scale"], (arrays["cos"], arrays["sin"]), _EPSILON, True
    ),
    _row_cost(8, 2, 3),
    ("x", "scale"),
)

OPS = {**ATTENTION_OPS, **SOFTMAX_OPS, **{op.name: op for op in (DEPTHWISE, MIX_FFN, NORM, RESIDUAL, QK_NORM)}}
