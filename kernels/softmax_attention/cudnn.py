"""cuDNN's fused attention, through ``jax.nn.dot_product_attention``: NVIDIA GPUs, bfloat16 and float16.

What it takes (jax 0.10 to 0.12): heads whose size is a multiple of 8, up to 128 channels, and 256 from compute
capability 9.0 on (H100); keys and values of one size; queries of several heads may share keys. A mask or bias is
written out for every pair of query and key in the inputs' dtype; causal attention and key lengths are not.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels.refusal import Refusal
from kernels.softmax_attention.visibility import keys_by_length, seen_pairs, zero_where_nothing_is_seen
from kernels.typing import Array, Bool, Float, Int

DTYPES = ("bfloat16", "float16")
# Far below any score, and far enough from the ends of the dtype that two of them may be subtracted.
_LARGEST_BIAS = {"bfloat16": 2.0**40, "float16": 2.0**14}
SIZE_STEP, LARGEST_SIZE, LARGEST_SIZE_OF_HOPPER = 8, 128, 256
# Bytes that a mask or bias may take, all heads sharing it, where memory is to be bounded: a world of 21 latent frames
# in causal blocks needs 683 MB, where softmax in blocks would move some hundred times as much.
LARGEST_MASK = 1 << 30
_capability: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("capability", default=None)


def attend(
    query: Float[Array, "B M h d"],
    key: Float[Array, "B N k d"],
    value: Float[Array, "B N k e"],
    mask: Bool[Array, "#B P Q"] | None = None,
    bias: Float[Array, "#B #h #M #N"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    *,
    bounded_memory: bool = False,
) -> Float[Array, "B M h e"]:
    """Same value as the reference; differentiable in reverse mode alone; weights are rounded to the inputs' dtype.

    Args:
        bounded_memory: whether a mask or bias must not take more than ``LARGEST_MASK`` when it is written out.

    Raises:
        Refusal: for what cuDNN does not take, or where it is not.
    """
    written_out = [x.shape[0] for x in (mask, bias) if x is not None]
    reason = _reason_against(query, key, value, bool(written_out), soft_cap)
    mask_bytes = max(written_out, default=0) * key.shape[1] * query.shape[1] * query.dtype.itemsize
    if reason is None and bounded_memory and mask_bytes > LARGEST_MASK:
        pairs = f"{query.shape[1]} x {key.shape[1]}"
        reason = (
            f"a mask written out for {pairs} pairs takes over {LARGEST_MASK >> 30} GiB, which bounded_memory forbids"
        )
    if reason is not None:
        raise Refusal(f"implementation='cudnn': {reason}; use 'blockwise' or 'xla'")
    queries, keys = query.shape[1], key.shape[1]
    if bias is not None:
        # what stands for minus infinity in float32 is beyond the range of a half
        largest = _LARGEST_BIAS[query.dtype.name]
        bias = jnp.clip(bias.astype(jnp.float32), -largest, largest).astype(query.dtype)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], queries, keys))
    seen = seen_pairs(mask, queries, keys, causal=False)
    seen = seen if seen is None else jnp.broadcast_to(seen, (seen.shape[0], 1, queries, keys))
    # no key at all is 0 over 0 inside: one is taken, and what comes of it left out
    lengths = None if key_lengths is None else jnp.maximum(key_lengths, 1).astype(jnp.int32)
    try:
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            seen,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as error:  # what an installed version of either still refuses
        reason = str(error).splitlines()[0].rstrip(".")
        raise Refusal(f"implementation='cudnn': {reason}; use 'blockwise' or 'xla'") from error
    mask = keys_by_length(key_lengths, keys) if mask is None else mask
    return zero_where_nothing_is_seen(out, mask, causal, keys)


def _reason_against(query: Array, key: Array, value: Array, written_out: bool, soft_cap: float | None) -> str | None:
    """Why cuDNN does not take these inputs; None if it does."""
    size, dtypes = query.shape[-1], {x.dtype.name for x in (query, key, value)}
    if soft_cap is not None:
        return "it has no soft_cap"
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"inputs of {' and '.join(sorted(dtypes))}: all of them must be {' or '.join(DTYPES)}"
    if value.shape[-1] != size:
        return f"values of {value.shape[-1]} channels for keys of {size}: both must be the same"
    largest = largest_size()
    if largest is None:
        return "no CUDA device is here, and with it no cuDNN"
    if size % SIZE_STEP or size > largest:
        return f"heads of {size} channels: it takes multiples of {SIZE_STEP} up to {largest} on this device"
    if written_out and (query.shape[1] % 2 or key.shape[1] % 2):
        return (
            f"a mask or bias for {query.shape[1]} queries and {key.shape[1]} keys: both must be even for its gradient"
        )
    return None


def largest_size() -> int | None:
    """The largest head that cuDNN takes on this machine's devices; None where there is no CUDA device."""
    capabilities = [] if _capability.get() is None else [_capability.get()]
    if not capabilities:
        try:
            devices = jax.local_devices(backend="cuda")
        except RuntimeError:
            return None
        capabilities = [tuple(int(part) for part in device.compute_capability.split(".")) for device in devices]
    return LARGEST_SIZE_OF_HOPPER if min(capabilities) >= (9, 0) else LARGEST_SIZE


@contextlib.contextmanager
def on_capability(capability: tuple[int, int]) -> Iterator[None]:
    """What is traced inside is for devices of this compute capability, whatever this machine has."""
    token = _capability.set(capability)
    try:
        yield
    finally:
        _capability.reset(token)
