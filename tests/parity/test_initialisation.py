"""Training from scratch starts from upstream's distributions (NVlabs/Sana: Xavier on fused matrices, PyTorch's own
convolutions, N(0, 0.02) on the embedders)."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from sana_jax.models.sana import QK_NORM, SanaConfig, SanaTransformer, init_params
from train.sharding import parameter_paths

D, HIDDEN, TEXT, OUT = 64, 160, 48, 32


def xavier(fan_in: int, fan_out: int) -> tuple[str, float]:
    return ("uniform", math.sqrt(6 / (fan_in + fan_out)))


def torch_default(fan_in: int) -> tuple[str, float]:
    return ("uniform", 1 / math.sqrt(fan_in))


ZERO, ONE, EMBEDDER, TABLE = ("constant", 0.0), ("constant", 1.0), ("normal", 0.02), ("normal", 1 / math.sqrt(D))
EXPECTED = {
    "transformer_blocks/attn1/to_q/kernel": xavier(D, 3 * D),
    "transformer_blocks/attn1/to_k/kernel": xavier(D, 3 * D),
    "transformer_blocks/attn1/to_v/kernel": xavier(D, 3 * D),
    "transformer_blocks/attn1/to_out/kernel": xavier(D, D),
    "transformer_blocks/attn1/to_out/bias": ZERO,
    "transformer_blocks/attn1/norm_q/scale": ONE,
    "transformer_blocks/attn2/to_q/kernel": xavier(D, D),
    "transformer_blocks/attn2/to_q/bias": ZERO,
    "transformer_blocks/attn2/to_k/kernel": xavier(D, 2 * D),
    "transformer_blocks/attn2/to_v/kernel": xavier(D, 2 * D),
    "transformer_blocks/attn2/to_out/kernel": xavier(D, D),
    "transformer_blocks/attn2/norm_k/scale": ONE,
    "transformer_blocks/ff/conv_inverted/kernel": torch_default(D),
    "transformer_blocks/ff/conv_inverted/bias": torch_default(D),
    "transformer_blocks/ff/conv_depth/kernel": torch_default(9),
    "transformer_blocks/ff/conv_depth/bias": torch_default(9),
    "transformer_blocks/ff/conv_point/kernel": torch_default(HIDDEN),
    "transformer_blocks/scale_shift_table": TABLE,
    "patch_embed/proj/kernel": xavier(4 * OUT, D),
    "patch_embed/proj/bias": torch_default(4 * OUT),
    "time_embed/timestep_embedder/linear_1/kernel": EMBEDDER,
    "time_embed/timestep_embedder/linear_2/kernel": EMBEDDER,
    "time_embed/guidance_embedder/linear_1/kernel": EMBEDDER,
    "time_embed/guidance_embedder/linear_2/kernel": ZERO,
    "time_embed/linear/kernel": EMBEDDER,
    "caption_projection/linear_1/kernel": EMBEDDER,
    "caption_projection/linear_2/kernel": EMBEDDER,
    "caption_norm/scale": ("constant", 0.01),
    "scale_shift_table": TABLE,
    "proj_out/kernel": xavier(D, 4 * OUT),
    "proj_out/bias": ZERO,
}


@pytest.fixture(scope="module")
def params():
    config = SanaConfig(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=6,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=D,
        caption_channels=TEXT,
        in_channels=OUT,
        out_channels=OUT,
        patch_size=2,
        qk_norm=QK_NORM,
        guidance_embeds=True,
    )
    return parameter_paths(jax.jit(lambda: init_params(SanaTransformer(config), jax.random.key(3)))())


@pytest.mark.parametrize("path", EXPECTED)
def test_distribution(params, path):
    kind, size = EXPECTED[path]
    values = np.asarray(params[path])
    if kind == "constant":
        np.testing.assert_array_equal(values, np.full_like(values, size))
        return
    standard_deviation = size / math.sqrt(3) if kind == "uniform" else size
    few = 4 / math.sqrt(2 * values.size)  # four standard errors of a standard deviation
    assert values.std() == pytest.approx(standard_deviation, rel=max(few, 0.01))
    if kind == "uniform":
        assert 0.9 * size < np.abs(values).max() <= size
    else:
        assert np.abs(values).max() > 2 * size


def test_layers_differ(params):
    kernels = np.asarray(params["transformer_blocks/attn1/to_q/kernel"])
    assert len({layer.tobytes() for layer in kernels}) == len(kernels)


def test_everything_else_is_zero_or_one(params):
    for path in set(params) - set(EXPECTED):
        assert set(np.unique(params[path])) <= {np.float32(0), np.float32(1)}, path
