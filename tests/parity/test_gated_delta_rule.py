"""The gated delta rule beside diffusers' SANA-WM attention, main and camera branch: values and gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kernels.gated_delta_rule import gated_delta_rule
from sana_jax.nn.rope import rope_3d
from tests.kernels.shapes import QUICK_COMPILE, relative_error

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

GRID, BATCH, HEADS, SIZE = (5, 2, 3), 2, 3, 12
FRAMES, TOKENS = GRID[0], GRID[1] * GRID[2]
VALUE, GRADIENT = 2e-6, 1e-5


def draw():
    """``(query, key, value, beta, decay)`` as the kernel takes them, and the weights of a loss."""
    rng = np.random.default_rng(3)
    tokens = (BATCH, FRAMES, TOKENS, HEADS)
    query, key, value, weights = (rng.standard_normal((*tokens, SIZE), np.float32) for _ in range(4))
    beta = rng.uniform(0.1, 1, tokens).astype(np.float32)
    decay = rng.uniform(0.3, 1, (BATCH, FRAMES, HEADS)).astype(np.float32)
    return (np.abs(query), np.abs(key), value, beta, decay), weights


def main_branch(query, key, value, beta, decay):
    """Diffusers' module, which scales the keys and turns queries and keys itself."""
    from diffusers.models.transformers.transformer_sana_wm import (
        SanaWMBidirectionalGDNAttention,
        SanaWMRotaryPosEmbed,
    )

    rotation = SanaWMRotaryPosEmbed(SIZE, (1, 1, 1), 1024)(GRID)
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    gates = beta.permute(0, 3, 1, 2), decay.permute(0, 2, 1)
    module = SanaWMBidirectionalGDNAttention(eps=1e-8, chunk_size=2)
    return module(query, key, value, *gates, torch.zeros(1), FRAMES, rotation)


def camera_branch(query, key, value, beta, decay):
    """Diffusers' scan over what the camera branch has transformed, forward and backward."""
    from diffusers.models.transformers.transformer_sana_wm import (
        flip_and_shift,
        torch_chunk_cam_single_path_delta_rule,
    )

    key = key * (SIZE * TOKENS) ** -0.5
    query, key, value = (x.permute(0, 3, 4, 1, 2) for x in (query, key, value))  # (B, h, d, T, S)
    beta, decay = beta.permute(0, 3, 1, 2), decay.permute(0, 2, 1)

    def scan(query, key, value, *gates):
        query, key, value = (x.flatten(3) for x in (query, key, value))
        return torch_chunk_cam_single_path_delta_rule(query, key, value, *gates).unflatten(3, (FRAMES, TOKENS))

    later = (flip_and_shift(x, 3) for x in (key, value))
    gates = flip_and_shift(beta, 2), flip_and_shift(decay, 2, 1.0)
    out = scan(query, key, value, beta, decay) + scan(query.flip(3), *later, *gates).flip(3)
    return out.permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize(("branch", "implementation"), [(main_branch, "xla"), (camera_branch, "xla_associative")])
def test_value_and_gradients(branch, implementation):
    arrays, weights = draw()
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    expected = branch(*tensors).reshape(weights.shape)
    (expected * torch.from_numpy(weights)).sum().backward()
    is_main = branch is main_branch

    @jax.jit
    def run(arrays, rotation):
        def loss(arrays):
            options = {"normalise": is_main, "key_scale": (SIZE * TOKENS) ** -0.5, "implementation": implementation}
            out, _ = gated_delta_rule(*arrays, rotation, **options)
            return (out * weights).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    rotation = rope_3d(GRID, SIZE) if is_main else None
    compiled = run.lower(jax.tree.map(jax.numpy.asarray, arrays), rotation).compile(QUICK_COMPILE)
    (_, found), gradients = compiled(jax.tree.map(jax.numpy.asarray, arrays), rotation)
    assert relative_error(found, expected.detach().numpy()) <= VALUE
    for name, gradient, tensor in zip(("query", "key", "value", "beta", "decay"), gradients, tensors, strict=True):
        assert relative_error(gradient, tensor.grad.numpy()) <= GRADIENT, name
