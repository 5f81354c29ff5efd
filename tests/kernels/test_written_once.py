"""``written_once``: nothing but the place where an array is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.depthwise_conv import depthwise_conv2d
from kernels.written_once import written_once
from tests.kernels.shapes import relative_error

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 7, 8)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 8)), jnp.float32)


def gated(x, kernel, hold):
    value, gate = jnp.split(hold(depthwise_conv2d(x, kernel)), 2, axis=-1)
    return value * jax.nn.sigmoid(gate)


def total(x, kernel, hold):
    return (gated(x, kernel, hold) ** 2).sum()


def as_it_is(x):
    return x


def compiled(function, hold):
    return jax.jit(function, static_argnums=2).lower(X, KERNEL, hold).compile()


def multiplied_views(text):
    """Fused computations of an optimised program that add up at least nine products of slices."""
    bodies = text.split("\n}\n")
    return sum(body.count(" slice(") >= 9 and body.count(" multiply(") >= 9 for body in bodies)


def test_a_gradient_computes_the_convolution_once():
    def gradient(x, kernel, hold):
        return jax.value_and_grad(total, (0, 1))(x, kernel, hold)

    def parts(hold):
        return multiplied_views(compiled(gradient, hold).as_text())

    assert parts(written_once) < parts(as_it_is)


def test_without_a_gradient_nothing_is_done():
    assert "conditional" not in compiled(gated, written_once).as_text()
    found, expected = (compiled(gated, hold)(X, KERNEL) for hold in (written_once, as_it_is))
    np.testing.assert_array_equal(found, expected)


def test_all_derivatives():
    """In both modes, of a derivative as in Sprint's training, and mapped over."""

    def all_of(hold):
        def along(x, kernel):
            return jax.jvp(lambda *given: total(*given, hold), (x, kernel), (kernel_like(x), KERNEL))[1]

        def kernel_like(x):
            return jnp.cos(x)

        each = jax.jit(jax.value_and_grad(lambda *given: total(*given, hold), (0, 1)))
        second = jax.jit(jax.grad(along, (0, 1)))
        mapped = jax.jit(jax.vmap(jax.grad(lambda *given: total(*given, hold)), (0, None)))
        return each(X, KERNEL), second(X, KERNEL), mapped(jnp.stack([X, 2 * X]), KERNEL)

    for found, expected in zip(jax.tree.leaves(all_of(written_once)), jax.tree.leaves(all_of(as_it_is))):
        assert relative_error(found, expected) <= 2e-6
