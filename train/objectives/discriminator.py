"""The discriminator of latent adversarial distillation: small heads on the features of a frozen network.

LADD, Sauer et al., arXiv 2403.12015; the heads are those of StyleGAN-T, arXiv 2301.09515, in the form that SANA-Sprint
uses (arXiv 2503.09641, section 3.3). A head reads one block's tokens (B, N, D) and gives a logit for each token:

    h = act(norm(conv1(x)));   h = (h + act(norm(conv9(h)))) / √2;   logit = conv1(h)

``conv`` are convolutions along the row of tokens, which is closed to a ring, their kernels divided by their largest
singular value; ``norm`` normalises over tokens and over virtual batches of a few samples; ``act`` is a leaky ReLU.

Parameters of all heads are stacked on a first axis. The singular vectors behind the division are state, not
parameters: ``power_iteration`` takes and returns them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.nn.initializers import torch_uniform
from train.sharding import kept_cut

NORM_EPSILON = 1e-5
VECTOR_EPSILON = 1e-12
LEAK = 0.2
RING_KERNEL = 9
# name of each convolution -> tokens under its kernel; the last one gives the logit
CONVOLUTIONS = {"input": 1, "ring": RING_KERNEL, "logit": 1}
# Singular vectors that start at random settle in a few dozen iterations of fresh kernels.
FIRST_ITERATIONS = 30


def init_heads(key: PRNGKeyArray, heads: int, features: int) -> PyTree:
    """Fresh parameters of ``heads`` heads on tokens of ``features`` channels, as PyTorch draws its convolutions."""
    params = {}
    for index, (name, taps) in enumerate(CONVOLUTIONS.items()):
        outputs = 1 if name == "logit" else features
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, index))
        uniform = torch_uniform(taps * features)
        params[name] = {
            "kernel": uniform(kernel_key, (heads, taps, features, outputs)),
            "bias": uniform(bias_key, (heads, outputs)),
        }
        if name != "logit":
            params[f"{name}_norm"] = {"scale": jnp.ones((heads, outputs)), "bias": jnp.zeros((heads, outputs))}
    return params


def init_vectors(key: PRNGKeyArray, heads: PyTree) -> PyTree:
    """Singular vectors of the kernels: random, then iterated until they are close."""
    vectors = {}
    for index, name in enumerate(CONVOLUTIONS):
        count, taps, features, outputs = heads[name]["kernel"].shape
        left, right = jax.random.split(jax.random.fold_in(key, index))
        vectors[name] = {
            "left": _normalized(jax.random.normal(left, (count, outputs))),
            "right": _normalized(jax.random.normal(right, (count, taps, features))),
        }
    return power_iteration(heads, vectors, FIRST_ITERATIONS)


def power_iteration(heads: PyTree, vectors: PyTree, iterations: int = 1) -> PyTree:
    """One or more steps of the vectors towards the largest singular value of each kernel; no gradient passes.

    A kernel counts as the matrix (taps·inputs, outputs): ``right`` (heads, taps, inputs) is set from ``left``
    (heads, outputs), then ``left`` from ``right``.
    """

    def one(_, vectors):
        new = {}
        for name in CONVOLUTIONS:
            kernel = jax.lax.stop_gradient(heads[name]["kernel"])
            right = _normalized(jnp.einsum("htio,ho->hti", kernel, vectors[name]["left"], precision="highest"))
            left = _normalized(jnp.einsum("htio,hti->ho", kernel, right, precision="highest"))
            new[name] = {"left": left, "right": right}
        return new

    return jax.lax.fori_loop(0, iterations, one, vectors) if iterations > 1 else one(0, vectors)


def head_logits(
    heads: PyTree, vectors: PyTree, features: Float[Array, "heads B N D"], virtual_batch: int
) -> Float[Array, "B heads_N"]:
    """The logits of all heads, side by side, in float32.

    Args:
        heads: parameters of ``init_heads``.
        vectors: singular vectors that the kernels are divided with; no gradient passes to them.
        features: what each head reads. Products are computed in their dtype, the rest in float32.
        virtual_batch: samples that are normalised together: the first so many, the next, ...

    Raises:
        UserError: the samples do not divide into equal virtual batches.
    """
    batch = features.shape[1]
    groups = math.ceil(batch / virtual_batch)
    if batch % groups:
        raise UserError(
            f"{batch} samples do not divide into {groups} equal virtual batches of at most {virtual_batch}; choose a "
            "batch that --sprint.virtual-batch divides"
        )

    def one_head(params, vectors, x):
        def convolve(name, x):
            kernel = params[name]["kernel"] / _largest_singular_value(params[name]["kernel"], vectors[name])
            return _ring_convolution(x, kernel.astype(x.dtype)) + params[name]["bias"].astype(x.dtype)

        def layer(name, x):
            norm = params[f"{name}_norm"]
            return jax.nn.leaky_relu(_virtual_batch_norm(convolve(name, x), norm["scale"], norm["bias"], groups), LEAK)

        hidden = layer("input", x)
        hidden = (hidden + layer("ring", hidden)) / math.sqrt(2)
        return convolve("logit", hidden)[..., 0].astype(jnp.float32)

    logits = jax.vmap(one_head)(heads, vectors, features)
    return jnp.moveaxis(logits, 0, 1).reshape(batch, -1)


def _largest_singular_value(kernel: Float[Array, "t i o"], vectors: dict[str, Array]) -> Float[Array, ""]:
    left, right = jax.lax.stop_gradient((vectors["left"], vectors["right"]))
    return jnp.einsum("tio,ti,o->", kernel, right, left, precision="highest")


def _ring_convolution(x: Float[Array, "B N C"], kernel: Float[Array, "t C D"]) -> Float[Array, "B N D"]:
    """A product for each tap: libraries have no fast convolution that is closed to a ring and batched over heads."""
    taps = kernel.shape[0]
    shifted = (kept_cut(x if taps == 1 else jnp.roll(x, taps // 2 - tap, axis=1)) for tap in range(taps))
    return sum(part @ kernel[tap] for tap, part in enumerate(shifted))


def _virtual_batch_norm(x: Float[Array, "B N C"], scale: Array, bias: Array, groups: int) -> Float[Array, "B N C"]:
    wide = x.astype(jnp.float32).reshape(groups, -1, *x.shape[1:])
    centred = wide - wide.mean((1, 2), keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean((1, 2), keepdims=True) + NORM_EPSILON)
    return (normed * scale + bias).reshape(x.shape).astype(x.dtype)


def _normalized(vectors: Float[Array, "heads *X"]) -> Float[Array, "heads *X"]:
    norm = jnp.sqrt(jnp.square(vectors).sum(tuple(range(1, vectors.ndim)), keepdims=True))
    return vectors / jnp.maximum(norm, VECTOR_EPSILON)
