"""Block linear attention: its three uses beside each other, beside the definition, and the state's size."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.block_linear_attention import BlockSums, block_linear_attention, init_block_sums, reference
from kernels.block_linear_attention.api import IMPLEMENTATIONS
from kernels.linear_attention import rope_linear_attention
from tests.kernels.rotation_cases import draw_rotary
from tests.kernels.shapes import QUICK_COMPILE, relative_error

BATCH, HEADS, SIZE, VALUE_SIZE = 2, 3, 8, 5
# the first token of every block, and the end
UNEQUAL = (0, 7, 10, 16, 18, 23)
EQUAL = (0, 6, 12, 18, 24)
WINDOWS = [None, 1, 2]
VALUE, GRADIENT = 2e-6, 1e-5

quickly = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def draw(tokens: int, dtype=jnp.float32):
    return draw_rotary(BATCH, tokens, HEADS, SIZE, VALUE_SIZE, dtype)


def empty(window: int | None) -> BlockSums:
    return init_block_sums(BATCH, HEADS, SIZE, VALUE_SIZE, num_cached_blocks=window)


def all_at_once(inputs, edges, window, implementation=None):
    starts = edges[:-1]
    return block_linear_attention(*inputs, block_starts=starts, state=empty(window), implementation=implementation)


def in_turn(inputs, edges, window, implementation=None):
    query, key, value, cos, sin = inputs
    state, outputs = empty(window), []
    for start, end in itertools.pairwise(edges):
        part = slice(start, end)
        block = (query[:, part], key[:, part], value[:, part], cos[part], sin[part])
        out, state = block_linear_attention(*block, state=state, implementation=implementation)
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1), state


def scanned(inputs, edges, window, implementation=None):
    blocks, size = len(edges) - 1, edges[1]

    def split(x, axis):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def step(state, block):
        out, state = block_linear_attention(*block, state=state, implementation=implementation)
        return state, out

    query, key, value, cos, sin = inputs
    blocked = (split(query, 1), split(key, 1), split(value, 1), split(cos, 0), split(sin, 0))
    state, outputs = jax.lax.scan(step, empty(window), blocked)
    return jnp.moveaxis(outputs, 0, 1).reshape(BATCH, blocks * size, HEADS, VALUE_SIZE), state


def with_gradients(function):
    """Compiled ``(inputs, output_weights) -> output, state, gradients of sum(output * output_weights)``."""

    def run(inputs, weights):
        def loss(tensors):
            out, state = function((*tensors, *inputs[3:]))
            return (out.astype(jnp.float32) * weights).sum(), (out, state)

        (_, (out, state)), gradients = jax.value_and_grad(loss, has_aux=True)(inputs[:3])
        return out, state, gradients

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def assert_equal(found, expected):
    (out, _, gradients), (wanted, _, wanted_gradients) = found, expected
    assert relative_error(out, wanted) <= VALUE
    for name, gradient, wanted_gradient in zip("qkv", gradients, wanted_gradients):
        assert relative_error(gradient, wanted_gradient) <= GRADIENT, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("edges", "window"), [(UNEQUAL, None), (UNEQUAL, 2), (EQUAL, None), (EQUAL, 1)], ids=str)
def test_three_uses_are_one_function(edges, window, implementation):
    """Values and gradients, of which those of the recurrent forms go through the states."""
    inputs = draw(edges[-1])
    weights = np.random.default_rng(1).standard_normal((BATCH, edges[-1], HEADS, VALUE_SIZE)).astype(np.float32)

    def define(inputs):
        return reference.block_linear_attention(*inputs, edges[:-1], window), None

    expected = with_gradients(define)(inputs, weights)
    uses = [all_at_once, in_turn, *([scanned] if edges == EQUAL else [])]
    states = []
    for use in uses:
        found = with_gradients(lambda x, use=use: use(x, edges, window, implementation))(inputs, weights)
        assert_equal(found, expected)
        states.append(found[1])
    for state in states[1:]:
        assert state.num_cached_blocks == window
        assert relative_error(state.key_value, states[0].key_value) <= VALUE
        assert relative_error(state.key, states[0].key) <= VALUE


def test_several_blocks_may_follow_a_state():
    window, cut = 2, UNEQUAL[2]
    starts = [start - cut for start in UNEQUAL[2:-1]]

    @quickly
    def run(query, key, value, cos, sin):
        whole = all_at_once((query, key, value, cos, sin), UNEQUAL, window)
        head, tail = ((query[:, p], key[:, p], value[:, p], cos[p], sin[p]) for p in (slice(cut), slice(cut, None)))
        first, state = block_linear_attention(*head, block_starts=UNEQUAL[:2], state=empty(window))
        return whole, first, block_linear_attention(*tail, block_starts=starts, state=state)

    (expected, last), first, (second, state) = run(*draw(UNEQUAL[-1]))
    assert relative_error(jnp.concatenate([first, second], axis=1), expected) <= VALUE
    assert relative_error(state.key_value, last.key_value) <= VALUE


def test_one_block_is_attention_over_all_tokens():
    inputs = draw(23)
    found, _ = quickly(functools.partial(block_linear_attention, state=empty(None)))(*inputs)
    assert relative_error(found, quickly(rope_linear_attention)(*inputs)) <= VALUE


def test_a_block_sees_nothing_later():
    query, key, value, cos, sin = draw(UNEQUAL[-1])
    run = quickly(functools.partial(block_linear_attention, block_starts=UNEQUAL[:-1], state=empty(None)))
    before, _ = run(query, key, value, cos, sin)
    cut = UNEQUAL[2]
    after, _ = run(query, key.at[:, cut:].add(1), value.at[:, cut:].add(1), cos, sin)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.abs(before[:, cut:] - after[:, cut:]).min(axis=(0, 2, 3)).max() > 0


@pytest.mark.parametrize("window", WINDOWS)
def test_the_state_does_not_grow(window):
    state = empty(window)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert state.key_value.shape == (window or 1, BATCH, HEADS, SIZE, VALUE_SIZE)
    run = quickly(lambda inputs, state: block_linear_attention(*inputs, state=state))
    for _ in range(5):
        _, state = run(draw(4, jnp.bfloat16), state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
        assert state.key.dtype == jnp.float32


def test_half_precision_inputs_are_summed_in_float32():
    half = draw(UNEQUAL[-1], jnp.bfloat16)
    run = quickly(lambda inputs: all_at_once(inputs, UNEQUAL, None))
    found, state = run(half)
    exact, expected = run([x.astype(jnp.float32) for x in half])
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert found.dtype == jnp.bfloat16
    assert np.all(np.abs(found.astype(jnp.float32) - exact) <= 1.02 * rounding * np.abs(exact) + 1e-6)
    assert relative_error(state.key_value, expected.key_value) <= VALUE


@pytest.mark.parametrize("starts", [(), (1, 3), (0, 3, 3), (0, 5, 2), (0, 23)])
def test_impossible_blocks(starts):
    with pytest.raises(ValueError, match=r"block_starts=.* ascend from 0 and stay below 23 tokens"):
        block_linear_attention(*draw(23), block_starts=starts, state=empty(None))


def test_impossible_options():
    with pytest.raises(ValueError, match=r"implementation='cudnn': choose one of \['xla'.*\], or None"):
        block_linear_attention(*draw(23), state=empty(None), implementation="cudnn")
    with pytest.raises(ValueError, match="num_cached_blocks=0: choose 1 or more"):
        empty(0)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_lowers_for_cuda(implementation):
    """Value and gradient of 21 latent frames of SANA-Video 2B at 480p, in blocks of 10; nothing is computed."""
    frame = 30 * 52
    sizes, starts = (1, 21 * frame, 20, 112), (0, 11 * frame)
    state = jax.eval_shape(lambda: init_block_sums(1, 20, 112))

    def run(query, key, value, cos, sin, state):
        def loss(query, key, value):
            arguments = (query, key, value, cos, sin)
            out, after = block_linear_attention(
                *arguments, block_starts=starts, state=state, implementation=implementation
            )
            return out.astype(jnp.float32).sum(), (out, after)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)

    abstract = [jax.ShapeDtypeStruct(sizes, jnp.bfloat16)] * 3 + [jax.ShapeDtypeStruct((sizes[1], 56), jnp.float32)] * 2
    lowered = jax.jit(run).trace(*abstract, state).lower(lowering_platforms=("cuda",))
    (_, (out, after)), _ = lowered.out_info
    assert out.shape == sizes
    assert after.key_value.shape == (1, 1, 20, 112, 112)
