"""What the tests of the pointwise kernels share: shapes of the shipped networks, and values with all gradients."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import configs.presets
from configs.published import PUBLISHED_TRANSFORMERS, PUBLISHED_VIDEO_TRANSFORMERS, PUBLISHED_WORLD_TRANSFORMERS
from sana_jax.models.sana_wm import SanaWMConfig
from tests.kernels.shapes import QUICK_COMPILE, relative_error


class NetworkShape(NamedTuple):
    """A network's dtype, rows and columns of tokens, width, hidden channels of its Mix-FFN, and head size."""

    dtype: str
    rows: int
    columns: int
    width: int
    hidden: int
    head_dim: int


@functools.cache
def network_shapes() -> list[NetworkShape]:
    """Of every published transformer and of every preset that has its own, at the size that it is trained for."""
    published = (PUBLISHED_TRANSFORMERS, PUBLISHED_VIDEO_TRANSFORMERS, PUBLISHED_WORLD_TRANSFORMERS)
    found = {_shape(entry.config, entry.dtype, (720, 1280)) for table in published for entry in table.values()}
    for module in pkgutil.iter_modules(configs.presets.__path__):
        config = importlib.import_module(f"configs.presets.{module.name}").CONFIG
        if config.transformer is not None:
            found.add(_shape(config.transformer, config.compute.dtype, getattr(config.data, "clip_size", (256, 256))))
    return sorted(found)


def _shape(transformer, dtype: str, clip_size: tuple[int, int]) -> NetworkShape:
    if isinstance(transformer, SanaWMConfig):
        # the published autoencoder has 32 x 32 pixels in a latent one
        rows, columns = (side // 32 // patch for side, patch in zip(clip_size, transformer.patch_size[1:]))
        width, head_dim = transformer.hidden_size, transformer.linear_head_dim
    else:
        rows = columns = transformer.sample_size // np.ravel(transformer.patch_size)[-1]
        head_dim = transformer.attention_head_dim
        width = transformer.num_attention_heads * head_dim
    return NetworkShape(dtype, int(rows), int(columns), width, transformer.mlp_hidden, head_dim)


def with_gradients(function: Callable) -> Callable:
    """A compiled function of a cotangent and inputs: the value, and the gradients of all inputs."""

    def run(cotangent, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(cotangent.astype(out.dtype))

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def assert_matches(function: Callable, reference: Callable, inputs: tuple, *, tolerances: tuple[float, float]) -> None:
    """Compares value and gradients with the reference's from the same inputs in float32; each has its tolerance."""
    cotangent = jnp.asarray(np.random.default_rng(7).standard_normal(jax.eval_shape(function, *inputs).shape))
    cotangent = cotangent.astype(inputs[0].dtype)
    found = with_gradients(function)(cotangent, *inputs)
    wide = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        expected = with_gradients(reference)(cotangent.astype(jnp.float32), *wide)
    assert found[0].dtype == inputs[0].dtype
    for number, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
        assert number == 0 or mine.dtype == inputs[number - 1].dtype
        error = relative_error(mine, wanted)
        assert error <= tolerances[number > 0], f"result {number}: {error:.1e}"


def draw(*shapes: tuple[int, ...], dtype=jnp.float32, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
