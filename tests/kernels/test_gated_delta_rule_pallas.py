"""The Pallas kernels of the gated delta rule: interpreted beside the definition, lowered for CUDA, run on a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_delta_rule import DeltaState, gated_delta_rule, init_state, pallas, xla
from tests.kernels.cuda_lowering import lower_for_cuda, triton_kernels
from tests.kernels.delta_cases import (
    CASES,
    Case,
    assert_close,
    defined_in_double,
    draw,
    preset_shapes,
    quickly,
    with_gradients,
)
from tests.kernels.shapes import relative_error

VALUE, GRADIENT = 2e-6, 1e-5
# update, scan and read; each one's gradient, reading's in two kernels; scans again for the normaliser
FORWARD_KERNELS, GRADIENT_KERNELS, OF_NORMALISER = 3, 4, 2


def interpreted(case: Case, axis_name: str | None = None):
    def run(inputs, rotation, state):
        options = case.starts, state, case.scale, 1e-8, axis_name
        return pallas.gated_delta_rule(*inputs, rotation, *options, interpret=True)

    return run


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_the_definition(name):
    """Values, states and gradients, of the given state too."""
    case = CASES[name]
    assert_close(with_gradients(interpreted(case))(*draw(case)), defined_in_double(case), VALUE, GRADIENT)


@pytest.mark.prove
def test_the_kernels_are_the_definition_at_published_sizes():
    """One head of 112 channels over frames of 880 tokens."""
    case = Case(1, 5, 880, 1, 112, 112, (0, 3))
    assert_close(with_gradients(interpreted(case))(*draw(case)), defined_in_double(case), VALUE, GRADIENT)


def test_frames_split_over_devices():
    """What a device does is mapped over a named axis; a chunk begins within one and goes on over its border."""
    case, parts = CASES["camera"], 2

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)

    def over_devices(inputs, rotation, state):
        run = functools.partial(interpreted(case, "devices"), rotation=rotation, state=state)
        out, after = jax.vmap(run, axis_name="devices")(tuple(map(split, inputs)))
        return jnp.moveaxis(out, 0, 1).reshape(inputs[2].shape), jax.tree.map(lambda x: x.mean(0), after)

    assert_close(with_gradients(over_devices)(*draw(case)), defined_in_double(case), VALUE, GRADIENT)


def test_half_precision_inputs():
    """Widened exactly: the result is that of their float32 values, rounded once."""
    case = CASES["unrotated"]
    inputs, rotation, state = draw(case)
    half = tuple(x.astype(jnp.bfloat16) for x in inputs)
    run = with_gradients(interpreted(case))
    found, expected = run(half, rotation, state), run(tuple(x.astype(jnp.float32) for x in half), rotation, state)
    out, after = found["values"]
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in found["gradients"][0]} == {jnp.dtype(jnp.bfloat16)}
    assert after.key_value.dtype == jnp.float32
    assert_close({"values": after, "gradients": ()}, {"values": expected["values"][1], "gradients": ()}, VALUE, 0)
    for mine, wanted in zip(
        jax.tree.leaves((out, found["gradients"])), jax.tree.leaves((expected["values"][0], expected["gradients"]))
    ):
        assert relative_error(mine, wanted) <= float(jnp.finfo(jnp.bfloat16).eps)


def test_what_is_refused():
    case = CASES["unrotated"]
    inputs, _, state = draw(case)
    query, beta, decay = jnp.zeros((1, 1, 2, 1, 130)), jnp.zeros((1, 1, 2, 1)), jnp.zeros((1, 1, 1))
    large = query, query, query[..., :8], beta, decay, None, (0,), init_state(1, 1, 130, 8)
    with pytest.raises(ValueError, match=r"'pallas': heads of 130 and 8 channels: .* up to 128; use 'xla'"):
        pallas.gated_delta_rule(*large)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"'pallas': float64 .* use 'xla'"):
        pallas.gated_delta_rule(*(x.astype(jnp.float64) for x in inputs), None, (0,), state)
    with pytest.raises(ValueError, match=r"implementation='pallas' runs on cuda alone, not on cpu; use 'xla'"):
        quickly(lambda state: gated_delta_rule(*inputs, state=state, implementation="pallas"))(state)


def test_no_silent_gradient_by_the_rotation():
    case = CASES["main"]
    inputs, rotation, state = draw(case)

    def loss(rotation):
        return interpreted(case)(inputs, rotation, state)[0].sum()

    with pytest.raises(ValueError, match="'pallas': it has no gradient by the rotation; use 'xla'"):
        jax.eval_shape(jax.grad(loss), rotation)


def shape_arguments(dtype, frames, tokens, heads, size, rotated) -> list:
    shape = 1, frames, tokens, heads
    given = [jax.ShapeDtypeStruct((*shape, size), dtype)] * 3
    given += [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1, frames, heads), jnp.float32)]
    return given + [jax.ShapeDtypeStruct((frames * tokens, size // 2), jnp.float32)] * (2 if rotated else 0)


def public(implementation, normalise, chunks, axis=None):
    def run(query, key, value, beta, decay, *rotation):
        options = {"normalise": normalise, "chunk_starts": chunks, "implementation": implementation}
        return gated_delta_rule(query, key, value, beta, decay, rotation or None, **options)

    return run


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shape", preset_shapes())
def test_lowers_for_cuda(shape, normalise):
    """Value and gradient at the presets' shapes: the main branch, and the camera's, which is float32."""
    dtype, *sizes = shape
    run = public("pallas", normalise, (0, 4) if sizes[0] > 4 else (0,))

    def both(*given):
        def loss(*inputs):
            out, after = run(*inputs, *given[5:])
            return out.astype(jnp.float32).sum() + after.key_value.sum(), out

        return jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)(*given[:5])

    program = lower_for_cuda(both, *shape_arguments(dtype if normalise else "float32", *sizes, normalise))
    wanted = FORWARD_KERNELS + GRADIENT_KERNELS + (OF_NORMALISER if normalise else 0)
    assert triton_kernels(program) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_on_a_gpu(dtype, normalise):
    """Compiled kernels at published head and frame sizes beside XLA in float64."""
    case = Case(1, 5, 880, 20, 112, 112, (0, 3), rotated=normalise, normalised=normalise)
    inputs, rotation, state = draw(case)
    inputs = tuple(x.astype(dtype) for x in inputs)

    def run(form, inputs, rotation, state):
        return form(*inputs, rotation, case.starts, state, case.scale)

    found = with_gradients(functools.partial(run, pallas.gated_delta_rule))(inputs, rotation, state)
    with jax.enable_x64(True):
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, rotation, state))
        expected = jax.tree.map(np.asarray, with_gradients(functools.partial(run, xla.scan))(*given))
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    limits = (VALUE, GRADIENT) if dtype == np.float32 else (5e-3, 8e-3)
    assert_close(found, expected, *limits)


@pytest.mark.gpu
def test_shapes_of_presets_on_a_gpu():
    """Every preset's shape compiles, runs, and agrees with XLA."""
    for dtype, frames, tokens, heads, size in preset_shapes():
        case = Case(1, frames, tokens, heads, size, size, (0, 1))
        inputs, rotation, state = draw(case)
        inputs = tuple(x.astype(dtype) for x in inputs)
        forms = (pallas.gated_delta_rule, xla.scan)
        found, wanted = (
            jax.jit(functools.partial(form, chunk_starts=(0, 1), key_scale=case.scale))(
                *inputs, rotation, state=DeltaState(state.key_value, state.key)
            )
            for form in forms
        )
        assert relative_error(found[0], wanted[0]) <= (5e-3 if dtype == "bfloat16" else 2 * VALUE)
        assert relative_error(found[1].key_value, wanted[1].key_value) <= 2 * VALUE
