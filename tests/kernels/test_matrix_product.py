"""The product with a weight matrix: its values and derivatives, and which program each platform gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.matrix_product import matrix_product
from tests.kernels.cuda_lowering import lower_for_cuda

DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]


def operands(dtype, *lead):
    rng = np.random.default_rng(len(lead))
    x, of_x = (rng.standard_normal((*lead, 24)) for _ in range(2))
    kernel, of_kernel = (rng.standard_normal((24, 10)) for _ in range(2))
    return [jnp.asarray(array, dtype) for array in (x, kernel, of_x, of_kernel)]


def close_to(found, exact, dtype):
    assert found.dtype == dtype
    scale = np.abs(np.asarray(exact, np.float64)).max()
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=scale * 4 * float(jnp.finfo(dtype).eps), rtol=0)


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 3, 2, 5)], ids=str)
def test_values_and_both_derivatives(dtype, lead):
    x, kernel, of_x, of_kernel = operands(dtype, *lead)
    exact_x, exact_kernel, exact_of_x, exact_of_kernel = wide(x, kernel, of_x, of_kernel)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(matrix_product)(x, kernel)
        again, tangent = jax.jit(lambda *given: jax.jvp(matrix_product, given[:2], given[2:]))(
            x, kernel, of_x, of_kernel
        )
        to_x, to_kernel = jax.vjp(matrix_product, x, kernel)[1](out)
    close_to(out, exact_x @ exact_kernel, dtype)
    close_to(again, exact_x @ exact_kernel, dtype)
    close_to(tangent, exact_of_x @ exact_kernel + exact_x @ exact_of_kernel, dtype)
    (cotangent,) = wide(out)
    close_to(to_x, cotangent @ exact_kernel.T, dtype)
    close_to(to_kernel, exact_x.reshape(-1, 24).T @ cotangent.reshape(-1, 10), dtype)


def test_over_a_batch_of_kernels():
    x, kernel, *_ = operands(jnp.bfloat16, 3, 4)
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])
    found = jax.jit(jax.vmap(matrix_product))(x, kernels)
    close_to(found, np.einsum("rni,rio->rno", *wide(x, kernels)), jnp.bfloat16)


def test_a_gpu_gets_the_plain_product():
    x, kernel, *_ = operands(jnp.bfloat16, 5)
    on_gpu = lower_for_cuda(matrix_product, x, kernel)
    assert "dot_general" in on_gpu
    assert "f32" not in on_gpu
    assert "tensor<5x10xf32>" in jax.jit(matrix_product).lower(x, kernel).as_text()


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_what_does_not_change_has_no_term():
    x, kernel, of_x, of_kernel = operands(jnp.bfloat16, 5)
    assert products(lambda x, of_x: jax.jvp(lambda x: matrix_product(x, kernel), (x,), (of_x,)), x, of_x) == 2
    assert products(lambda k, of_k: jax.jvp(lambda k: matrix_product(x, k), (k,), (of_k,)), kernel, of_kernel) == 2
    assert products(jax.grad(lambda x: matrix_product(x, kernel).sum()), x) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_policies_of_rematerialisation_know_it(dtype):
    """Where they keep products: one forward, two for the gradients, and none computed again."""
    x, kernel, *_ = operands(dtype, 5)

    def loss(x, kernel, policy):
        block = jax.checkpoint(lambda x, kernel: jnp.sin(matrix_product(x, kernel)), policy=policy)
        return block(x, kernel).sum()

    def count(policy):
        return products(jax.grad(lambda x, kernel: loss(x, kernel, policy), argnums=(0, 1)), x, kernel)

    kept, computed_again = jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable
    assert (count(kept), count(computed_again)) == (3, 4)
