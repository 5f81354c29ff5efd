"""A real problem of a second: a residual network of two stacked layers tells the digits of scikit-learn apart."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from configs.optimizer import OptimizerConfig, check_optimizer
from train.optimizers import make_optimizer, stop_frozen

WIDTH, LAYERS, CLASSES, BATCH = 64, 2, 10, 256


@functools.cache
def pictures():
    digits = load_digits()
    return jnp.asarray(digits.data / 8 - 1, jnp.float32), jnp.asarray(digits.target)


def initial_params() -> dict:
    random = np.random.default_rng(0)

    def normal(*shape, scale):
        return jnp.asarray(scale * random.standard_normal(shape), jnp.float32)

    return {
        "transformer_blocks": {
            "ff": {"kernel": normal(LAYERS, WIDTH, WIDTH, scale=WIDTH**-0.5), "bias": jnp.zeros((LAYERS, WIDTH))},
            "scale_shift_table": normal(LAYERS, 2, WIDTH, scale=0.1),
        },
        "proj_out": {"kernel": normal(WIDTH, CLASSES, scale=0.02), "bias": jnp.zeros(CLASSES)},
    }


def loss(params: dict, x, y):
    def block(x, layer):
        scale, shift = layer["scale_shift_table"]
        return x + jax.nn.gelu(((1 + scale) * x + shift) @ layer["ff"]["kernel"] + layer["ff"]["bias"]), None

    x, _ = jax.lax.scan(block, x, params["transformer_blocks"])
    logits = x @ params["proj_out"]["kernel"] + params["proj_out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_step(config: OptimizerConfig, optimizer):
    """``(params, state), number -> (params, state), loss`` on the batch of that number."""
    x, y = pictures()

    def step(carry, number):
        params, state = carry
        rows = jax.random.choice(jax.random.key(number), len(y), (BATCH,), replace=False)
        value, grads = jax.value_and_grad(
            lambda params: loss(stop_frozen(params, config.frozen, config.trained), x[rows], y[rows])
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return step


def train(config: OptimizerConfig, steps: int, begin: int = 0, carry=None):
    """Parameters and optimizer state after steps ``begin`` to ``steps``, of a run of ``steps``."""
    check_optimizer(config)
    params = initial_params()
    optimizer = make_optimizer(config, 200, params)
    carry = (params, optimizer.init(params)) if carry is None else carry
    step = make_step(config, optimizer)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(begin, steps))[0])(carry)


def whole_loss(params: dict) -> float:
    return float(loss(params, *pictures()))
