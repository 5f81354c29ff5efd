"""Depthwise convolution: both forms beside the definition, and which of them a platform gets."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.published import PUBLISHED_TRANSFORMERS
from kernels.depthwise_conv import depthwise_conv2d, reference
from kernels.depthwise_conv.api import IMPLEMENTATIONS
from tests.kernels.shapes import QUICK_COMPILE, feed_forward_shapes, relative_error

# (batch, height, width, channels, kernel height, kernel width): odd sizes, pictures smaller than the kernel; the
# gradient of the kernel adds up to 8 rows at once, and more than 64 in a loop
SHAPES = [(2, 7, 5, 13, 3, 3), (1, 9, 6, 7, 5, 5), (3, 1, 2, 4, 5, 5), (2, 4, 9, 3, 1, 3)]
SHAPES += [(1, 19, 3, 5, 3, 3), (2, 66, 3, 2, 3, 3)]


def draw(shape, dtype=jnp.float32, seed=0):
    batch, height, width, channels, *kernel_size = shape
    rng = np.random.default_rng(seed)
    sizes = ((batch, height, width, channels), (*kernel_size, channels))
    return tuple(jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)


def with_gradients(function):
    def run(x, kernel, weights):
        def loss(x, kernel):
            out = function(x, kernel)
            return (out.astype(jnp.float32) * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
        return out, gradients

    return jax.jit(run, compiler_options=QUICK_COMPILE)


@functools.cache
def reference_with_gradients(shape):
    x, kernel = draw(shape)
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    return with_gradients(reference.depthwise_conv2d)(x, kernel, weights)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, implementation):
    x, kernel = draw(shape)
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    run = with_gradients(functools.partial(depthwise_conv2d, implementation=implementation))
    with jax.default_matmul_precision("highest"):
        out, gradients = run(x, kernel, weights)
    expected, expected_gradients = reference_with_gradients(shape)
    assert relative_error(out, expected) <= 1e-6
    for found, wanted in zip(gradients, expected_gradients):
        assert relative_error(found, wanted) <= 1e-6


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_forward_mode(implementation):
    inputs, tangents = draw(SHAPES[0]), draw(SHAPES[0], seed=5)
    function = functools.partial(depthwise_conv2d, implementation=implementation)
    run = jax.jit(lambda *arguments: jax.jvp(function, *arguments), compiler_options=QUICK_COMPILE)
    found = run(inputs, tangents)
    expected = jax.jvp(reference.depthwise_conv2d, inputs, tangents)
    assert relative_error(found[0], expected[0]) <= 1e-6
    assert relative_error(found[1], expected[1]) <= 1e-6


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_the_gradient_of_a_derivative(implementation):
    """As in Sprint's training, whose loss has a derivative of the network in it."""
    inputs, tangents = draw(SHAPES[0]), draw(SHAPES[0], seed=5)

    def gradients(function):
        def loss(inputs, tangents):
            out, derivative = jax.jvp(function, inputs, tangents)
            return (out**2 * derivative).sum()

        return jax.grad(loss, (0, 1))

    function = functools.partial(depthwise_conv2d, implementation=implementation)
    found = jax.jit(gradients(function), compiler_options=QUICK_COMPILE)(inputs, tangents)
    for mine, wanted in zip(
        jax.tree.leaves(found), jax.tree.leaves(gradients(reference.depthwise_conv2d)(inputs, tangents))
    ):
        assert relative_error(mine, wanted) <= 2e-6


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (2, 1)], ids=str)
def test_mapped_over(axes):
    """Value and gradient under ``vmap``."""
    x, kernel = draw(SHAPES[0])
    wide = [jnp.stack([array, 2 * array - 1, array**2], axis or 0) for array, axis in zip((x, kernel), axes)]
    operands = [many if axis is not None else one for one, many, axis in zip((x, kernel), wide, axes)]

    def run(function):
        single = jax.value_and_grad(lambda x, kernel: (function(x, kernel) ** 2).sum(), (0, 1))
        return jax.jit(jax.vmap(single, axes))(*operands)

    found = run(functools.partial(depthwise_conv2d, implementation="xla_shifted"))
    for mine, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(run(reference.depthwise_conv2d))):
        assert relative_error(mine, wanted) <= 2e-6


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs(implementation, dtype):
    x, kernel = draw(SHAPES[0], dtype)
    function = functools.partial(depthwise_conv2d, implementation=implementation)
    out = jax.jit(function, compiler_options=QUICK_COMPILE)(x, kernel)
    expected = reference.depthwise_conv2d(x, kernel)
    assert out.dtype == dtype
    # One rounding, of the sum.
    assert relative_error(out, expected) <= float(jnp.finfo(dtype).eps) / 2


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"implementation='cudnn': choose one of \['xla', 'xla_shifted'.*\], or None"):
        depthwise_conv2d(*draw(SHAPES[0]), implementation="cudnn")


@pytest.mark.parametrize("kernel", [(3, 3, 4), (3, 3, 1), (3, 3, 1, 2), (9, 2)])
def test_a_kernel_of_other_channels_is_refused(kernel):
    unchecked = getattr(depthwise_conv2d, "__wrapped__", depthwise_conv2d)
    with pytest.raises(ValueError, match=r"kernel \(.*\): they must be \(B, H, W, C\) and \(kh, kw, C\)"):
        unchecked(jnp.ones((1, 4, 4, 2)), jnp.ones(kernel))


@pytest.mark.parametrize("kernel_size", [(2, 3), (3, 4)])
def test_even_kernel_is_refused(kernel_size):
    with pytest.raises(ValueError, match=r"kernel size .* must be odd"):
        depthwise_conv2d(jnp.ones((1, 4, 4, 2)), jnp.ones((*kernel_size, 2)))


def test_cpu_gets_shifted_multiply_adds():
    """What is compiled for a CPU has no convolution in it, neither forward nor backward."""
    x, kernel = draw(SHAPES[0])
    compiled = {
        name: with_gradients(functools.partial(depthwise_conv2d, implementation=name)).lower(x, kernel, x).compile()
        for name in (None, "xla")
    }
    assert "convolution" not in compiled[None].as_text()
    assert "convolution" in compiled["xla"].as_text()


def test_cuda_gets_the_library_convolution():
    run = jax.jit(depthwise_conv2d).trace(*draw(SHAPES[0]))
    assert "stablehlo.convolution" in run.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" not in run.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("shape", feed_forward_shapes(PUBLISHED_TRANSFORMERS), ids=str)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_lowers_for_cuda(shape, implementation):
    """Value and gradient lower at every shape of the published models, in their compute dtype; nothing is computed."""
    dtype, *sizes = shape
    run = with_gradients(functools.partial(depthwise_conv2d, implementation=implementation))
    abstract = (jax.ShapeDtypeStruct(sizes, dtype), jax.ShapeDtypeStruct((3, 3, sizes[-1]), dtype))
    lowered = run.trace(*abstract, jax.ShapeDtypeStruct(sizes, jnp.float32)).lower(lowering_platforms=("cuda",))
    assert lowered.out_info[0].shape == tuple(sizes)
    wants_convolution = implementation in (None, "xla")
    assert ("stablehlo.convolution" in lowered.as_text()) == wants_convolution
