"""The gated delta rule: both fast forms beside the definition, its uses beside each other, and how updates compose."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_delta_rule import (
    DeltaState,
    FrameUpdate,
    compose,
    frame_update,
    gated_delta_rule,
    identity_update,
    init_state,
    reference,
)
from kernels.gated_delta_rule.api import check_shapes
from tests.kernels.shapes import QUICK_COMPILE, relative_error

BATCH, FRAMES, TOKENS, HEADS, SIZE, VALUE_SIZE = 2, 4, 5, 3, 8, 7
SCALE = (SIZE * TOKENS) ** -0.5
# those that every device runs; the kernels for GPUs have tests of their own
IMPLEMENTATIONS = ("xla", "xla_associative")
# the first frame of every chunk
WHOLE, EQUAL, UNEQUAL = (0,), (0, 2), (0, 1, 3)
VALUE, GRADIENT, EXACT = 2e-6, 1e-5, 1e-12

quickly = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def draw(dtype=np.float32, seed=0):
    """``(query, key, value, beta, decay)`` and the rotation; queries and keys are positive, as after a ReLU."""
    rng = np.random.default_rng(seed)
    tokens = (BATCH, FRAMES, TOKENS, HEADS)
    query, key = (np.abs(rng.standard_normal((*tokens, SIZE))) for _ in range(2))
    value = rng.standard_normal((*tokens, VALUE_SIZE))
    beta, decay = rng.uniform(0.1, 1, tokens), rng.uniform(0.3, 1, (BATCH, FRAMES, HEADS))
    angles = rng.uniform(0, 2 * np.pi, (FRAMES * TOKENS, SIZE // 2))
    # numbers that float32 holds, so that both precisions work on the same ones
    inputs, rotation = (query, key, value, beta, decay), (np.cos(angles), np.sin(angles))
    return tuple(tuple(jnp.asarray(x.astype(np.float32), dtype) for x in group) for group in (inputs, rotation))


def draw_state(normalised: bool, dtype=np.float32) -> DeltaState:
    rng = np.random.default_rng(7)
    key_value, key = (
        jnp.asarray(rng.standard_normal(shape).astype(np.float32), dtype)
        for shape in ((BATCH, HEADS, SIZE, VALUE_SIZE), (BATCH, HEADS, SIZE))
    )
    return DeltaState(key_value, jnp.abs(key) if normalised else None)


def chunk(arrays, start: int, end: int):
    inputs, rotation = arrays
    tokens = slice(start * TOKENS, end * TOKENS)
    return tuple(x[:, start:end] for x in inputs), tuple(x[tokens] for x in rotation)


def all_at_once(inputs, rotation, starts, state, implementation=None):
    options = {"normalise": state.key is not None, "key_scale": SCALE, "implementation": implementation}
    return gated_delta_rule(*inputs, rotation, chunk_starts=starts, state=state, **options)


def in_turn(inputs, rotation, starts, state, implementation=None):
    outputs = []
    for start, end in itertools.pairwise((*starts, FRAMES)):
        out, state = all_at_once(*chunk((inputs, rotation), start, end), WHOLE, state, implementation)
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1), state


def scanned(inputs, rotation, starts, state, implementation=None):
    def split(x, axis):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], len(starts), -1, *x.shape[axis + 1 :]), axis, 0)

    def step(state, arrays):
        out, state = all_at_once(*arrays, WHOLE, state, implementation)
        return state, out

    chunks = tuple(split(x, 1) for x in inputs), tuple(split(x, 0) for x in rotation)
    state, outputs = jax.lax.scan(step, state, chunks)
    return jnp.moveaxis(outputs, 0, 1).reshape(inputs[2].shape), state


def split_over_devices(inputs, rotation, starts, state, implementation=None, parts=2):
    """Each part of the frames as a device would have it: what a device does is mapped over a named axis."""

    def run(inputs, rotation):
        options = {"normalise": state.key is not None, "key_scale": SCALE, "implementation": implementation}
        return gated_delta_rule(*inputs, rotation, chunk_starts=starts, state=state, axis_name="devices", **options)

    def split(x, axis):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 0)

    arrays = tuple(split(x, 1) for x in inputs), tuple(split(x, 0) for x in rotation)
    out, after = jax.vmap(run, axis_name="devices")(*arrays)
    for leaf in jax.tree.leaves(after):
        assert leaf.shape[0] == parts
    # the same state on every device
    return jnp.moveaxis(out, 0, 1).reshape(inputs[2].shape), jax.tree.map(lambda x: x.mean(0), after)


def define(inputs, rotation, starts, state, implementation=None):
    return reference.gated_delta_rule(*inputs, rotation, starts, state, SCALE)


def with_gradients(function, starts):
    """``(inputs, rotation, state)`` to the output, the state after it, and a loss's gradients by inputs and state."""

    def run(inputs, rotation, state):
        def loss(inputs, state):
            out, after = function(inputs, rotation, starts, state)
            weights = jnp.sin(jnp.arange(out.size)).reshape(out.shape)
            return sum((x**2).sum() for x in jax.tree.leaves(after)) + (out * weights).sum(), (out, after)

        (_, (out, after)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(inputs, state)
        return {"values": (out, after), "gradients": gradients}

    return quickly(run)


def assert_close(found, expected, values=VALUE, gradients=GRADIENT):
    for kind, tolerance in (("values", values), ("gradients", gradients)):
        paths = jax.tree_util.tree_leaves_with_path(expected[kind])
        for (path, wanted), mine in zip(paths, jax.tree.leaves(found[kind]), strict=True):
            mine, wanted = np.asarray(mine, np.float64), np.asarray(wanted, np.float64)
            assert mine.shape == wanted.shape
            error = np.linalg.norm(mine - wanted) / np.linalg.norm(wanted)
            assert error <= tolerance, f"{kind}{jax.tree_util.keystr(path)}: {error:.1e}"


@functools.cache
def defined_in_double():
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(define, EQUAL)(*draw(np.float64), draw_state(True, np.float64)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_form_is_the_definition(implementation, dtype):
    """Values, states and gradients, of the given state too; without rotation and normaliser, see the parity tests."""
    function = functools.partial(all_at_once, implementation=implementation)
    with jax.enable_x64(dtype is np.float64):
        found = with_gradients(function, EQUAL)(*draw(dtype), draw_state(True, dtype))
    assert found["values"][0].dtype == found["values"][1].key_value.dtype == dtype
    assert_close(found, defined_in_double(), *((EXACT, EXACT) if dtype is np.float64 else (VALUE, GRADIENT)))


@pytest.mark.parametrize("use", [in_turn, scanned])
def test_chunk_after_chunk_is_all_at_once(use):
    expected = defined_in_double()["values"]
    found = quickly(functools.partial(use, starts=EQUAL))(*draw(), state=draw_state(True))
    assert_close({"values": found, "gradients": ()}, {"values": expected, "gradients": ()})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_who_sees_whom(implementation):
    inputs, rotation = draw()
    fixed = {"rotation": rotation, "state": draw_state(True), "implementation": implementation}
    run = quickly(functools.partial(all_at_once, starts=UNEQUAL, **fixed))
    before, _ = run(inputs)
    for changed, unaffected in ((2, {0}), (3, {0, 1, 2}), (0, set())):
        after, _ = run((inputs[0], *(x.at[:, changed].multiply(0.9) for x in inputs[1:4]), inputs[4]))
        assert {t for t in range(FRAMES) if np.array_equal(before[:, t], after[:, t])} == unaffected


def test_a_frame_without_update_and_decay_is_padding():
    (query, key, value, beta, decay), rotation = draw()
    run = quickly(functools.partial(all_at_once, rotation=rotation, starts=WHOLE, state=draw_state(True)))
    gates = beta.at[:, 2].set(0), decay.at[:, 2].set(1)
    found, state = run((query, key, value, *gates))
    other, same = run((query, key.at[:, 2].multiply(3), value.at[:, 2].add(5), *gates))
    np.testing.assert_array_equal(found, other)
    np.testing.assert_array_equal(state.key_value, same.key_value)


def test_half_precision_inputs_and_a_state_that_stays():
    inputs, rotation = draw()
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs)
    state = init_state(BATCH, HEADS, SIZE, VALUE_SIZE)
    run = quickly(lambda inputs, state: all_at_once(inputs, rotation, UNEQUAL, state))
    found, after = run(half, state)
    exact, expected = run(tuple(x.astype(jnp.float32) for x in half), state)
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert found.dtype == jnp.bfloat16
    assert np.all(np.abs(found.astype(jnp.float32) - exact) <= 1.02 * rounding * np.abs(exact) + 1e-6)
    assert relative_error(after.key_value, expected.key_value) <= VALUE
    _, again = run(half, after)
    for one in (after, again):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@functools.cache
def at_once_in_double(starts):
    with jax.enable_x64(True):
        found = with_gradients(all_at_once, starts)(*draw(np.float64), draw_state(True, np.float64))
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
    ("implementation", "starts", "parts", "dtype"),
    [
        # chunks that begin within devices, and go on over their borders
        ("xla", UNEQUAL, 2, np.float64),
        # chunks of whole devices
        ("xla_associative", EQUAL, 4, np.float64),
        *(
            pytest.param(*case, marks=pytest.mark.prove)
            for case in [
                ("xla", WHOLE, 4, np.float64),
                ("xla", EQUAL, 4, np.float64),
                ("xla", UNEQUAL, 2, np.float32),
                ("xla_associative", WHOLE, 4, np.float64),
                ("xla_associative", UNEQUAL, 2, np.float64),
                ("xla_associative", EQUAL, 2, np.float32),
            ]
        ),
    ],
)
def test_frames_split_over_devices(implementation, starts, parts, dtype):
    """Values, states and gradients, of the given state too, where each device has some of the frames."""
    use = functools.partial(split_over_devices, implementation=implementation, parts=parts)
    expected = defined_in_double() if starts == EQUAL else at_once_in_double(starts)
    with jax.enable_x64(dtype is np.float64):
        found = with_gradients(use, starts)(*draw(dtype), draw_state(True, dtype))
    assert_close(found, expected, *((EXACT, EXACT) if dtype is np.float64 else (VALUE, GRADIENT)))


def draw_updates(frames: int, dtype=np.float64) -> FrameUpdate:
    """Updates of ``frames`` frames, one after another on the first axis."""
    (_, key, value, beta, decay), _ = draw(dtype)
    key, value, beta = (jnp.moveaxis(x, (1, 3), (0, 2))[:frames] for x in (key, value, beta))
    return frame_update(key, value, beta, jnp.moveaxis(decay, 1, 0)[:frames], SCALE)


def test_updates_compose():
    """Associative, with a neutral element, not commutative; a run of frames acts as its frames one after another."""
    with jax.enable_x64(True):
        updates = draw_updates(4)
        first, second, third, fourth = (jax.tree.map(lambda x, t=t: x[t], updates) for t in range(4))
        memory = jnp.asarray(draw_state(False, np.float64).key_value)
        grouped = compose(compose(first, second), compose(third, fourth))
        others = [compose(first, compose(second, compose(third, fourth))), compose(identity_update(first), grouped)]
        for other in (*others, compose(grouped, identity_update(first))):
            for found, expected in zip(jax.tree.leaves(other), jax.tree.leaves(grouped)):
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
        np.testing.assert_allclose(grouped(memory), fourth(third(second(first(memory)))), rtol=0, atol=1e-13)
        np.testing.assert_array_equal(identity_update(first)(memory), memory)
        assert np.abs(compose(first, second).transition - compose(second, first).transition).max() > 1e-3


def test_frames_split_over_machines():
    """Halves absorbed apart from each other: the second's memory is its own update of the first's."""
    state = draw_state(False)

    @quickly
    def run(updates, memory):
        halves = [compose(*(jax.tree.map(lambda x, t=t: x[t], updates) for t in pair)) for pair in ((0, 1), (2, 3))]
        return halves[1](halves[0](memory)), all_at_once(draw()[0], None, WHOLE, state)[1]

    found, expected = run(draw_updates(4, np.float32), state.key_value)
    assert relative_error(found, expected.key_value) <= VALUE


@pytest.mark.parametrize("starts", [(), (1, 3), (0, 3, 3), (0, 5, 2), (0, FRAMES)])
def test_impossible_chunks(starts):
    with pytest.raises(ValueError, match=rf"chunk_starts=.* ascend from 0 and stay below {FRAMES} frames"):
        all_at_once(*draw(), starts, draw_state(True))


def test_shapes_that_do_not_fit():
    inputs, rotation = draw()
    shapes = [x.shape for x in inputs]
    for place, name in enumerate(("query", "key", "value", "beta", "decay")):
        shorter = (BATCH, FRAMES - 1, *shapes[place][2:])
        # a test's annotations are checked before the call
        with pytest.raises(ValueError, match=f"^{'key' if name == 'query' else name} "):
            check_shapes(*shapes[:place], shorter, *shapes[place + 1 :])
        with pytest.raises(ValueError, match=f"^{name} "):
            check_shapes(*shapes[:place], shapes[place][1:], *shapes[place + 1 :])
    with pytest.raises(ValueError, match=r"query .* all of them 1 or more"):
        gated_delta_rule(*(x[:, :0] for x in inputs))
    with pytest.raises(ValueError, match=rf"cos .*queries of {FRAMES * TOKENS} tokens"):
        gated_delta_rule(*inputs, tuple(x[1:] for x in rotation))


def test_states_and_options_that_do_not_fit():
    inputs, _ = draw()
    with pytest.raises(ValueError, match="normalise=True, but the state has no normaliser"):
        gated_delta_rule(*inputs, state=draw_state(False))
    with pytest.raises(ValueError, match="normalise=False, but the state has a normaliser"):
        gated_delta_rule(*inputs, state=draw_state(True), normalise=False)
    with pytest.raises(ValueError, match=r"a state of shapes .* need .*see init_state"):
        gated_delta_rule(*inputs, state=init_state(BATCH, HEADS, SIZE))
    with pytest.raises(ValueError, match=r"implementation='cuda': choose one of .*'pallas', 'triton', 'xla', "):
        gated_delta_rule(*inputs, implementation="cuda")
    with pytest.raises(ValueError, match="all of them must be 1 or more"):
        init_state(1, 0, 8)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_lowers_for_cuda(implementation):
    """Value and gradient of 21 latent frames of SANA-WM at 720p in chunks; nothing is computed."""
    frames, tokens, heads, size = 21, 22 * 40, 20, 112

    def run(query, key, value, beta, decay, cos, sin):
        def loss(query, key, value, beta, decay):
            options = {"chunk_starts": (0, 4, 7, 10, 13, 16), "implementation": implementation}
            out, after = gated_delta_rule(query, key, value, beta, decay, (cos, sin), **options)
            return out.astype(jnp.float32).sum(), (out, after)

        return jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)(query, key, value, beta, decay)

    abstract = [jax.ShapeDtypeStruct((1, frames, tokens, heads, size), jnp.bfloat16)] * 3
    abstract += [jax.ShapeDtypeStruct((1, frames, tokens, heads), jnp.bfloat16)]
    abstract += [jax.ShapeDtypeStruct((1, frames, heads), jnp.float32)]
    abstract += [jax.ShapeDtypeStruct((frames * tokens, size // 2), jnp.float32)] * 2
    (_, (out, after)), _ = jax.jit(run).trace(*abstract).lower(lowering_platforms=("cuda",)).out_info
    assert out.shape == abstract[0].shape
    assert out.dtype == jnp.bfloat16
    assert after.key_value.shape == (1, heads, size, size)
    assert after.key_value.dtype == jnp.float32
