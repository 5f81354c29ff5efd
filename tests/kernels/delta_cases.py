"""Inputs of the gated delta rule that its kernels for GPUs are compared on, and the shapes that presets give it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import configs.presets
from configs.published import PUBLISHED_WORLD_TRANSFORMERS
from configs.world_data import WorldDataConfig
from kernels.gated_delta_rule import DeltaState, reference
from sana_jax.models.sana_wm import SanaWMConfig
from tests.kernels.shapes import QUICK_COMPILE

quickly = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and the first frame of every chunk; ``padding`` is a frame of β = 0 and decay 1."""

    batch: int
    frames: int
    tokens: int
    heads: int
    key: int
    value: int
    starts: tuple[int, ...]
    rotated: bool = True
    normalised: bool = True
    padding: int | None = None

    @property
    def scale(self) -> float:
        return (self.key * self.tokens) ** -0.5


CASES = {
    # more tokens than a program has, channels that fill no tile, more columns than one program of the scan carries
    "main": Case(1, 3, 67, 2, 40, 36, (0, 1), padding=1),
    # an odd head size, examples, chunks of unequal length
    "camera": Case(2, 4, 5, 2, 7, 9, (0, 1, 3), rotated=False, normalised=False),
    "unrotated": Case(1, 2, 3, 1, 8, 8, (0,), rotated=False),
}


def draw(case: Case, dtype: Any = np.float32, seed: int = 0) -> tuple:
    """``(query, key, value, beta, decay)``, the rotation or None, and the state; numbers that float32 holds."""
    rng = np.random.default_rng(seed)
    tokens = (case.batch, case.frames, case.tokens, case.heads)
    query, key = (np.abs(rng.standard_normal((*tokens, case.key))) for _ in range(2))
    value = rng.standard_normal((*tokens, case.value))
    beta, decay = rng.uniform(0.1, 1, tokens), rng.uniform(0.3, 1, (case.batch, case.frames, case.heads))
    if case.padding is not None:
        beta[:, case.padding], decay[:, case.padding] = 0, 1
    angles = rng.uniform(0, 2 * np.pi, (case.frames * case.tokens, case.key // 2))
    memory = rng.standard_normal((case.batch, case.heads, case.key, case.value))
    normaliser = np.abs(rng.standard_normal((case.batch, case.heads, case.key))) if case.normalised else None

    def cast(x: np.ndarray | None) -> jax.Array | None:
        return None if x is None else jnp.asarray(x.astype(np.float32), dtype)

    rotation = (cast(np.cos(angles)), cast(np.sin(angles))) if case.rotated else None
    return tuple(map(cast, (query, key, value, beta, decay))), rotation, DeltaState(cast(memory), cast(normaliser))


def with_gradients(function):
    """Arguments of ``draw`` to the output, the state after it, and a loss's gradients by inputs and state."""

    def run(inputs, rotation, state):
        def loss(inputs, state):
            out, after = function(inputs, rotation, state)
            weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return sum((x**2).sum() for x in jax.tree.leaves(after)) + (out * weights).sum(), (out, after)

        (_, values), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(inputs, state)
        return {"values": values, "gradients": gradients}

    return quickly(run)


@functools.cache
def defined_in_double(case: Case) -> dict:
    """The definition's values and gradients in float64."""

    def define(inputs, rotation, state):
        return reference.gated_delta_rule(*inputs, rotation, case.starts, state, case.scale)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, with_gradients(define)(*draw(case, np.float64)))


def assert_close(found: dict, expected: dict, values: float, gradients: float) -> None:
    for kind, tolerance in (("values", values), ("gradients", gradients)):
        paths = jax.tree_util.tree_leaves_with_path(expected[kind])
        for (path, wanted), mine in zip(paths, jax.tree.leaves(found[kind]), strict=True):
            mine, wanted = np.asarray(mine, np.float64), np.asarray(wanted, np.float64)
            assert mine.shape == wanted.shape
            error = np.linalg.norm(mine - wanted) / np.linalg.norm(wanted)
            assert error <= tolerance, f"{kind}{jax.tree_util.keystr(path)}: {error:.1e}"


def preset_shapes() -> list[tuple[Any, int, int, int, int]]:
    """``(dtype, latent frames, tokens of a frame, heads, head size)`` of every preset of a world model."""
    published = PUBLISHED_WORLD_TRANSFORMERS["SANA-WM_bidirectional"]
    shapes = set()
    for module in pkgutil.iter_modules(configs.presets.__path__):
        config = importlib.import_module(f"configs.presets.{module.name}").CONFIG
        if isinstance(config.data, WorldDataConfig):
            transformer = config.transformer or published.config
            # the published autoencoder: a latent pixel is 8 frames by 32 by 32 pixels, and the first frame has its own
            rows, columns = (
                size // 32 // patch for size, patch in zip(config.data.clip_size, transformer.patch_size[1:])
            )
            shapes.add(
                _shape(transformer, config.compute.dtype, (config.data.clip_frames - 1) // 8 + 1, rows * columns)
            )
        elif isinstance(config.transformer, SanaWMConfig):
            side = config.data.canvas // config.transformer.patch_size[1]
            shapes.add(_shape(config.transformer, config.compute.dtype, config.data.frames, side**2))
    return sorted(shapes)


def _shape(transformer: SanaWMConfig, dtype: str, frames: int, tokens: int) -> tuple:
    heads = transformer.hidden_size // transformer.linear_head_dim
    return dtype, frames, tokens, heads, transformer.linear_head_dim
