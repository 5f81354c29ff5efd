"""Run by ``test_linear_attention_triton`` in a process of its own: errors of values and gradients, printed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.linear_attention import reference, triton
from tests.kernels.rotation_cases import draw_rotary
from tests.kernels.shapes import relative_error
from tests.kernels.triton_interpreter import install

# (batch, tokens, heads, head size, value size), dtype: odd ones, several blocks, padded halves, half precision. The
# interpreter cuts bfloat16 off where a device rounds, so that half precision is float16 here.
CASES = [((2, 33, 3, 20, 5), "float32"), ((1, 70, 1, 32, 32), "float16"), ((1, 40, 1, 112, 112), "float32")]


def main() -> None:
    install()
    for shape, dtype in CASES:
        rotary = draw_rotary(*shape, dtype=jnp.dtype(dtype))
        for name, arguments in (("relu_linear_attention", rotary[:3]), ("rope_linear_attention", rotary)):
            out, pull = jax.vjp(getattr(triton, name), *arguments)
            exact = [x.astype(jnp.float32) for x in arguments]
            expected, expected_pull = jax.vjp(getattr(reference, name), *exact)
            assert out.dtype == arguments[2].dtype
            cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), jnp.float32)
            gradients = zip(pull(cotangent.astype(out.dtype)), expected_pull(cotangent))
            worst = max(relative_error(found, wanted) for found, wanted in gradients)
            print(name, dtype, relative_error(out, expected), worst, flush=True)
    several = [jnp.stack([x, 2 * x]) for x in rotary[:3]]
    mapped = jax.vmap(triton.relu_linear_attention)(*several)
    one_by_one = jnp.stack([triton.relu_linear_attention(*x) for x in zip(*several)])
    assert (mapped == one_by_one).all()


if __name__ == "__main__":
    main()
