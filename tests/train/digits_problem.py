"""A real problem of a second: a residual network of two stacked layers tells the digits of scikit-learn apart."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from configs.optimizer import OptimizerConfig, check_optimizer
from tests.train.tiny_run import QUICKLY
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


@functools.cache
def compiled(config: OptimizerConfig):
    """The state of step 0 and the step, compiled."""
    check_optimizer(config)
    params = initial_params()
    optimizer = make_optimizer(config, 200, params)
    carry = (params, quickly(optimizer.init, params))
    return carry, jax.jit(make_step(config, optimizer)).lower(carry, jnp.int32(0)).compile(QUICKLY)


def train(config: OptimizerConfig, steps: int, begin: int = 0, carry=None):
    """Parameters and optimizer state after steps ``begin`` to ``steps`` of a run of 200."""
    initial, step = compiled(config)
    carry = initial if carry is None else carry
    for number in range(begin, steps):
        carry, _ = step(carry, jnp.int32(number))
    return carry


def quickly(function, *arguments):
    """A jitted function's result, with a compilation that takes half the time."""
    return jax.jit(function).lower(*arguments).compile(QUICKLY)(*arguments)


def whole_loss(params: dict) -> float:
    return float(_jitted_loss(params, *pictures()))


_jitted_loss = jax.jit(loss)
