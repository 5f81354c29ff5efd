"""Frames split over the devices of a mesh axis: which are a device's own, and what the others hold.

Inside ``jax.shard_map``, every device has equally many frames, in the order of the axis ``axis_name``; that is None
where frames are not split, and the device at hand has all of them. Arrays are (B, T, ...), T one device's frames.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Int, Shaped


def all_frames(frames: int, axis_name: str | None) -> int:
    """Frames of all devices together, of which each has ``frames``."""
    return frames if axis_name is None else frames * jax.lax.axis_size(axis_name)


def first_frame(frames: int, axis_name: str | None) -> int | Int[Array, ""]:
    """The number of this device's first frame among those of all devices."""
    return 0 if axis_name is None else frames * jax.lax.axis_index(axis_name)


def own_part(
    per_frame: Shaped[np.ndarray, " N"], frames: int, axis_name: str | None, beyond: int = 0
) -> Shaped[np.ndarray, " M"] | Shaped[Array, " M"]:
    """Of one number per frame of all devices those of this device's frames, and of the ``beyond`` frames after them.

    Args:
        per_frame: as many as frames of all devices, and ``beyond`` more.
        frames: T.
        axis_name: as everywhere here.
        beyond: how many more.
    """
    if axis_name is None:
        return per_frame
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(per_frame), first_frame(frames, axis_name), frames + beyond)


def earlier_frames(x: Shaped[Array, "B T *S"], count: int, axis_name: str | None) -> Shaped[Array, "B E *S"]:
    """The ``count`` frames before this device's first; zeros in place of those before the first of all."""
    return _others(x, count, axis_name, 1)


def later_frames(x: Shaped[Array, "B T *S"], count: int, axis_name: str | None) -> Shaped[Array, "B E *S"]:
    """The ``count`` frames after this device's last; zeros in place of those after the last of all."""
    return _others(x, count, axis_name, -1)


def frames_of_all(x: Shaped[Array, "B T *S"], axis_name: str | None) -> Shaped[Array, "B N *S"]:
    """The frames of all devices. The gradient's sum over the devices is float32, whatever ``x`` is rounded to."""
    if axis_name is None:
        return x
    rounded = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return _gathered_rounded(x, axis_name) if rounded else _gathered(x, axis_name)


def _gathered(x: Array, axis_name: str) -> Array:
    return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gathered_rounded(x, axis_name):
    return _gathered(x, axis_name)


@_gathered_rounded.defjvp
def _gathered_tangent(axis_name, primals, tangents):
    # Going back, this gather is a sum. In half precision that is less exact, and XLA's compiler for CPUs (jaxlib
    # 0.10.2) aborts over it.
    tangent = _gathered(tangents[0].astype(jnp.float32), axis_name).astype(tangents[0].dtype)
    return _gathered(primals[0], axis_name), tangent


def _others(x: Array, count: int, axis_name: str | None, step: int) -> Array:
    """Frames of the devices that ``x`` has to move ``step`` by ``step`` from, in the order of time."""
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    pieces, missing = [], count
    for distance in range(1, devices):
        frames = min(missing, x.shape[1])
        if not frames:
            break
        piece = x[:, x.shape[1] - frames :] if step > 0 else x[:, :frames]
        moves = [(d, d + step * distance) for d in range(devices) if 0 <= d + step * distance < devices]
        pieces.append(jax.lax.ppermute(piece, axis_name, moves))  # zeros where nothing arrives
        missing -= frames
    pieces.append(jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
    return jnp.concatenate(pieces[::-step], axis=1)
