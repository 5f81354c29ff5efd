"""Softmax attention in blocks: its formula, its gradients, and that no array holds all scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import UserError
from sana_jax.nn.blockwise_attention import blockwise_attention
from tests.kernels.shapes import QUICK_COMPILE, relative_error

BATCH, HEADS, SIZE, VALUE_SIZE, PER_FRAME = 2, 2, 8, 5, 3
SIZES = {"query_block": 8, "key_block": 7}


def formula(query, key, value, frame_mask=None, scale=SIZE**-0.5):
    """In float64, all scores at once."""
    scores = np.einsum("bmhd,bnhd->bhmn", query, key) * scale
    if frame_mask is not None:
        tokens = np.repeat(np.repeat(frame_mask, PER_FRAME, axis=1), PER_FRAME, axis=2)
        scores = np.where(tokens[:, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhmn,bnhe->bmhe", weights / np.where(total == 0, 1, total), value)


def draw(queries: int, keys: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (queries, HEADS, SIZE), (keys, HEADS, SIZE), (keys, HEADS, VALUE_SIZE)
    return tuple(rng.standard_normal((BATCH, *shape)) * (2 if i < 2 else 1) for i, shape in enumerate(shapes))


def causal_mask(frames: int, keys: int, seed: int = 1) -> np.ndarray:
    """Of every example another one; whole blocks are hidden, and the first frame's queries see nothing."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(keys) <= np.arange(frames)[:, None]) & (rng.random((BATCH, frames, keys)) < 0.7)
    mask[:, 0] = False
    return mask


@pytest.mark.parametrize(("frames", "keys"), [(7, 7), (2, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_formula_and_gradients(frames, keys, masked):
    arrays = draw(frames * PER_FRAME, keys * PER_FRAME)
    mask = causal_mask(frames, keys) if masked else None
    weights = np.random.default_rng(2).standard_normal((*arrays[0].shape[:3], VALUE_SIZE))

    def loss(function):
        def run(*arrays):
            out = function(*arrays)
            return (out * weights).sum(), out

        return run

    def ours(query, key, value):
        return blockwise_attention(query, key, value, mask, scale=0.4, **SIZES)

    def plain(query, key, value):
        scores = jnp.einsum("bmhd,bnhd->bhmn", query, key, precision="highest") * 0.4
        if mask is not None:
            tokens = np.repeat(np.repeat(mask, PER_FRAME, axis=1), PER_FRAME, axis=2)[:, None]
            scores = jnp.where(tokens, scores, -jnp.inf)
            seen = tokens.any(-1, keepdims=True)
            weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, 0)), 0)
        else:
            weights = jax.nn.softmax(scores)
        return jnp.einsum("bhmn,bnhe->bmhe", weights, value, precision="highest")

    given = [jnp.asarray(array, jnp.float32) for array in arrays]
    results = [
        jax.jit(jax.value_and_grad(loss(f), (0, 1, 2), has_aux=True), compiler_options=QUICK_COMPILE)(*given)
        for f in (ours, plain)
    ]
    ((_, found), gradients), (_, expected) = results
    assert relative_error(found, formula(*arrays, mask, scale=0.4)) <= 1e-6
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative_error(gradient, wanted) <= 2e-6


def test_bfloat16_rounds_weights_as_fused_attention_does():
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in draw(20, 30)]
    wide = [np.asarray(array.astype(jnp.float32), np.float64) for array in arrays]
    scores = np.einsum("bmhd,bnhd->bhmn", *wide[:2]) * SIZE**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    rounded = np.asarray(jnp.asarray(weights, jnp.bfloat16).astype(jnp.float32), np.float64)
    expected = np.einsum("bhmn,bnhe->bmhe", rounded, wide[2]) / weights.sum(-1).swapaxes(1, 2)[..., None]
    found = blockwise_attention(*arrays)
    assert found.dtype == jnp.bfloat16
    expected = jnp.asarray(expected, jnp.bfloat16)
    assert np.mean(np.asarray(found != expected)) < 0.01


def test_no_array_has_all_scores():
    """Of 8192 tokens one head's scores would take 268 MB; forward and backward passes stay far below."""
    tokens, block = 8192, 512
    shapes = [jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.bfloat16)] * 3

    def loss(*arrays):
        return blockwise_attention(*arrays, query_block=block, key_block=block).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile(QUICK_COMPILE)
    one_block = 4 * block**2
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 16 * one_block + 40 * 4 * tokens * 16, f"{used:,}"
    assert used < 4 * tokens**2 / 8


def test_lowers_for_a_gpu():
    """At the published size: 21 latent frames of 704 x 1280 pixels."""
    shape = jax.ShapeDtypeStruct((1, 21 * 880, 20, 112), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 21, 21), jnp.bool_)
    jax.jit(blockwise_attention).trace(shape, shape, shape, mask).lower(lowering_platforms=("cuda",))


def test_one_row_of_a_mask_is_for_all_queries():
    """A mask of keys, as padded captions and caches have it."""
    query, key, value = draw(11, 17)
    mask = np.random.default_rng(3).random((BATCH, 17)) < 0.5
    mask[0] = np.arange(17) >= 14  # whole blocks of keys are hidden
    given = [jnp.asarray(array, jnp.float32) for array in (query, key, value)]
    found = blockwise_attention(*given, jnp.asarray(mask[:, None]), **SIZES)
    for sample, seen in enumerate(mask):
        own = slice(sample, sample + 1)
        expected = formula(query[own], key[own][:, seen], value[own][:, seen])
        assert relative_error(found[own], expected) <= 1e-6


def test_a_mask_of_other_frames():
    query, key, value = (jnp.asarray(array, jnp.float32) for array in draw(6, 9))
    with pytest.raises(UserError, match="frame_mask of 4 x 3 frames for 6 queries and 9 keys"):
        blockwise_attention(query, key, value, jnp.ones((1, 4, 3), bool))
