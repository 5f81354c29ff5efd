"""The gated delta rule as Triton programs, called through jax-triton; the gradient is that of XLA's form of each part.

The programs (``triton_kernels``) are the forward computations of ``pallas``, for comparison with it and with programs
of other libraries. jax-triton and triton are imported when the form is used: ``pip install sana-jax[gpu]``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_programs
from kernels.gated_delta_rule import gpu_form, tiles
from kernels.gated_delta_rule.pallas_update import Angles, Updates
from kernels.gated_delta_rule.tiles import Sizes
from kernels.gated_delta_rule.updates import FrameUpdate, frame_update
from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float, Int


def _launch(name: str, arrays: list[Array], outputs: list, grid: tuple, num_warps: int, **constants: Any) -> list:
    settings = {"grid": grid, "name": f"gated_delta_rule_{name}", "num_warps": num_warps, "num_stages": 1, **constants}
    return triton_programs.call(f"{__package__}.triton_kernels", name, tuple(arrays), outputs, **settings)


# -- updates -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def update(
    sizes: Sizes,
    normalised: bool,
    key_scale: float,
    key: Float[Array, "B T S h d"],
    value: Float[Array, "B T S h e"],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    angles: Angles | None,
) -> Updates:
    """As ``pallas_update.update``; the gradient is that of ``update_by_xla``."""
    transition = tiles.float32(*decay.shape, 2, sizes.pairs, 2, sizes.pairs)
    addition = tiles.float32(*decay.shape, 2, sizes.pairs, sizes.value)
    plain = [transition, tiles.float32(*decay.shape, 2, sizes.pairs, 1)] if normalised else [tiles.float32(1)] * 2
    cos, sin = angles or (decay, decay)
    found = _launch(
        "update",
        [key, value, beta, decay, cos, sin],
        [transition, addition, *plain],
        (sizes.batch * sizes.frames, sizes.heads, 2),
        8,
        **update_constants(sizes, normalised, key_scale),
    )
    return Updates(*found) if normalised else Updates(*found[:2])


def update_constants(sizes: Sizes, normalised: bool, key_scale: float) -> dict[str, Any]:
    """What ``triton_kernels.update`` has to know when it is compiled."""
    return {
        **_constants(sizes, tiles.SUMMED_TOKENS),
        "KEY_SCALE": key_scale,
        "NORMALISED": normalised,
    }


def _constants(sizes: Sizes, tokens: int) -> dict[str, Any]:
    return {
        "FRAMES": sizes.frames,
        "S": sizes.tokens,
        "HEADS": sizes.heads,
        "P": sizes.pairs,
        "E": sizes.value,
        "SIDE": sizes.key_side,
        "COLUMNS": sizes.half_value_side,
        "BLOCK": tiles.side(sizes.tokens, tokens),
        "ROTATED": sizes.rotated,
    }


def update_by_xla(
    sizes: Sizes,
    normalised: bool,
    key_scale: float,
    key: Float[Array, "B T S h d"],
    value: Float[Array, "B T S h e"],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    angles: Angles | None,
) -> Updates:
    """The same as ``update``, by XLA."""
    key, value, beta, decay = (x.astype(jnp.float32) for x in (key, value, beta, decay))
    turned = _rotated(sizes, key, angles)
    turned, key, value, beta = (jnp.swapaxes(x, 2, 3) for x in (turned, key, value, beta))

    def in_order(found: FrameUpdate) -> tuple[Array, Array]:
        halves = (sizes.pairs, 2) if sizes.rotated else (2, sizes.pairs)
        transition = found.transition.reshape(*decay.shape, *halves, *halves)
        transition = jnp.swapaxes(jnp.swapaxes(transition, -4, -3), -2, -1) if sizes.rotated else transition
        return transition, tiles.split_rows(found.addition, sizes)

    found = in_order(frame_update(turned, value, beta, decay, key_scale))
    return Updates(*found, *(in_order(frame_update(key, None, beta, decay, key_scale)) if normalised else ()))


def _rotated(sizes: Sizes, x: Float[Array, "B T S h d"], angles: Angles | None) -> Float[Array, "B T S h d"]:
    if angles is None:
        return x
    tokens = x.reshape(sizes.batch, sizes.frames * sizes.tokens, *x.shape[3:])
    return rotate_pairs(tokens, *(table.reshape(-1, sizes.pairs) for table in angles)).reshape(x.shape)


# -- scan --------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    sizes: Sizes,
    transition: Float[Array, "B T h 2 p 2 p"],
    addition: Float[Array, "B T h 2 p e"],
    starts_chunk: Int[Array, " T"],
    memory: Float[Array, "2 B h 2 p e"],
) -> tuple[Float[Array, "B T h 2 p e"], Float[Array, "2 B h 2 p e"]]:
    """As ``pallas_scan.scan``; the gradient is that of ``scan_by_xla``."""
    constants = scan_constants(sizes, addition.shape[-1])
    states, last = _launch(
        "scan",
        [transition, addition, starts_chunk, memory],
        [tiles.float32(2, *addition.shape), tiles.float32(*memory.shape)],
        (2, sizes.batch * sizes.heads, pl.cdiv(constants["WIDTH"], constants["COLUMNS"])),
        4,
        **constants,
    )
    return states.sum(0), last


def scan_constants(sizes: Sizes, width: int) -> dict[str, Any]:
    """What ``triton_kernels.scan`` has to know when it is compiled."""
    return {
        "B": sizes.batch,
        "FRAMES": sizes.frames,
        "HEADS": sizes.heads,
        "P": sizes.pairs,
        "WIDTH": width,
        "SIDE": sizes.key_side,
        "COLUMNS": tiles.side(width, tiles.MEMORY_COLUMNS),
    }


def scan_by_xla(
    sizes: Sizes,
    transition: Float[Array, "B T h 2 p 2 p"],
    addition: Float[Array, "B T h 2 p e"],
    starts_chunk: Int[Array, " T"],
    memory: Float[Array, "2 B h 2 p e"],
) -> tuple[Float[Array, "B T h 2 p e"], Float[Array, "2 B h 2 p e"]]:
    """The same as ``scan``, by XLA."""
    matrices = jnp.moveaxis(transition.reshape(*transition.shape[:3], sizes.key, sizes.key), 1, 0)
    additions = jnp.moveaxis(addition.reshape(*addition.shape[:3], sizes.key, -1), 1, 0)

    def absorb(memory, matrix, addition):
        return jnp.matmul(matrix, memory, precision="highest") + addition

    def forward(memory, frame):
        memory = absorb(memory, *frame)
        return memory, memory

    def backward(memory, frame):
        *update, starts = frame
        return jnp.where(starts > 0, 0, absorb(memory, *update)), memory

    flat = memory.reshape(*memory.shape[:3], sizes.key, -1)
    last, seen = jax.lax.scan(forward, flat[0], (matrices, additions))
    first, later = jax.lax.scan(backward, flat[1], (matrices, additions, starts_chunk), reverse=True)
    return jnp.moveaxis(seen + later, 0, 1).reshape(addition.shape), jnp.stack([last, first]).reshape(memory.shape)


# -- reading -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def read(
    sizes: Sizes,
    dtype: Any,
    epsilon: float,
    query: Float[Array, "B T S h d"],
    memory: Float[Array, "B T h 2 p e"],
    normaliser: Float[Array, "B T h 2 p 1"] | None,
    angles: Angles | None,
) -> Float[Array, "B T S h e"]:
    """As ``pallas_read.read``; the gradient is that of ``read_by_xla``."""
    constants = read_constants(sizes, normaliser is not None, epsilon)
    [out] = _launch(
        "read",
        [query, memory, memory if normaliser is None else normaliser, *(angles or (memory, memory))],
        [jax.ShapeDtypeStruct((*query.shape[:4], sizes.value), dtype)],
        (sizes.batch * sizes.frames, sizes.heads, pl.cdiv(sizes.tokens, constants["BLOCK"])),
        8,
        **constants,
    )
    return out


def read_constants(sizes: Sizes, normalised: bool, epsilon: float) -> dict[str, Any]:
    """What ``triton_kernels.read`` has to know when it is compiled."""
    return {**_constants(sizes, tiles.OWN_TOKENS), "EPSILON": epsilon, "NORMALISED": normalised}


def read_by_xla(
    sizes: Sizes,
    dtype: Any,
    epsilon: float,
    query: Float[Array, "B T S h d"],
    memory: Float[Array, "B T h 2 p e"],
    normaliser: Float[Array, "B T h 2 p 1"] | None,
    angles: Angles | None,
) -> Float[Array, "B T S h e"]:
    """The same as ``read``, by XLA."""
    query = query.astype(jnp.float32)
    turned, memory = _rotated(sizes, query, angles), tiles.join_rows(memory, sizes)
    out = jnp.einsum("btshd,bthde->btshe", turned, memory, precision="highest")
    if normaliser is not None:
        sums = tiles.join_rows(normaliser, sizes)
        out = out / (jnp.einsum("btshd,bthde->btshe", query, sums, precision="highest") + epsilon)
    return out.astype(dtype)


# -- gradients, and the form -------------------------------------------------------------------------------------------


def _take_gradient_from(function: Any, by_xla: Any, settings: int) -> None:
    """Gives ``function``, of so many arguments that are not arrays, the gradient of another."""

    def forward(*arguments):
        return function(*arguments), arguments[settings:]

    def backward(*arguments):
        *given, inputs, cotangents = arguments
        return jax.vjp(functools.partial(by_xla, *given), *inputs)[1](cotangents)

    function.defvjp(forward, backward)


_take_gradient_from(update, update_by_xla, 3)
_take_gradient_from(scan, scan_by_xla, 1)
_take_gradient_from(read, read_by_xla, 3)

gated_delta_rule = functools.partial(gpu_form.run, "triton", gpu_form.Parts(update, scan, read))
by_xla = gpu_form.Parts(update_by_xla, scan_by_xla, read_by_xla)
