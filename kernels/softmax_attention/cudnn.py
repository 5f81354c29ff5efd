"""cuDNN's fused attention, through ``jax.nn.dot_product_attention``: NVIDIA GPUs, bfloat16 and float16.

What it takes (jax 0.10 to 0.12): heads whose size is a multiple of 8, up to 128 channels, and 256 from compute
capability 9.0 on (H100); keys and values of one size; queries of several heads may share keys. A mask or bias is
written out for every pair of query and key in the inputs' dtype; causal attention and key lengths are not.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kernels.refusal import Refusal
from kernels.softmax_attention import reference
from kernels.softmax_attention.visibility import keys_by_length, seen_pairs, zero_where_nothing_is_seen
from kernels.typing import Array, Bool, Float, Int

DTYPES = ("bfloat16", "float16")
# Far below any score, and far enough from the ends of the dtype that two of them may be subtracted.
_LARGEST_BIAS = {"bfloat16": 2.0**40, "float16": 2.0**14}
SIZE_STEP, LARGEST_SIZE, LARGEST_SIZE_OF_HOPPER = 8, 128, 256
# Bytes that a mask or bias may take, all heads sharing it, where memory is to be bounded: a world of 21 latent frames
# in causal blocks needs 683 MB, where softmax in blocks would move some hundred times as much.
LARGEST_MASK = 1 << 30
# Of a trial, as a share of the largest value: some roundings to bfloat16.
LARGEST_ERROR = 0.05
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
    block_starts: tuple[int, ...] | None = None,
) -> Float[Array, "B M h e"]:
    """Same value as the reference; differentiable in reverse mode alone; weights are rounded to the inputs' dtype.

    Args:
        bounded_memory: whether a mask or bias must not take more than ``LARGEST_MASK`` when it is written out.
        block_starts: first tokens of causal blocks, if ``mask`` says just these: cuDNN then runs once for each block,
            on the keys up to its end, and needs no mask.

    Raises:
        Refusal: for what cuDNN does not take, or where it is not.
    """
    if block_starts is not None and bias is None and len(block_starts) > 1:
        ends = (*block_starts[1:], query.shape[1])
        run = functools.partial(attend, scale=scale, soft_cap=soft_cap)
        spans = zip(block_starts, ends, strict=True)
        found = [run(query[:, start:end], key[:, :end], value[:, :end]) for start, end in spans]
        return jnp.concatenate(found, axis=1)
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
    if _capability.get() is None and (fault := fault_here()) is not None:
        return f"a trial on this machine went wrong: {fault}"
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


@functools.cache
def fault_here() -> str | None:
    """What is wrong with cuDNN on this machine's first CUDA device, found by a trial; None if nothing is."""
    return trial(jax.local_devices(backend="cuda")[0], "cudnn")


def trial(device: jax.Device, implementation: str) -> str | None:
    """Runs a little attention with its gradients on a device, beside the definition; says what went wrong, or None.

    Args:
        device: where it runs.
        implementation: as ``jax.nn.dot_product_attention`` calls it.
    """
    # a thread of its own knows nothing of the program that is being traced around it, nor of its mesh
    with concurrent.futures.ThreadPoolExecutor(1, "trial") as thread:
        return thread.submit(_trial, device, implementation).result()


def _trial(device: jax.Device, implementation: str) -> str | None:
    examples, tokens, heads, size = 2, 64, 2, 64
    rng = np.random.default_rng(0)
    shape = examples, tokens, heads, size
    arrays = [jax.device_put(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), device) for _ in range(4)]
    seen = jax.device_put(jnp.arange(tokens) < jnp.asarray([[tokens // 3], [tokens]]), device)[:, None]

    def results(attention: Callable[..., Array]) -> list[np.ndarray]:
        def weighted_sum(query: Array, key: Array, value: Array, weights: Array, seen: Array | None) -> Array:
            return (attention(query, key, value, seen) * weights).astype(jnp.float32).sum()

        run = jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1, 2)))
        return [np.asarray(x, np.float32) for mask in (None, seen) for x in jax.tree.leaves(run(*arrays, mask))]

    def tried(query: Array, key: Array, value: Array, seen: Array | None) -> Array:
        pairs = None if seen is None else jnp.broadcast_to(seen[:, None], (examples, 1, tokens, tokens))
        return jax.nn.dot_product_attention(query, key, value, mask=pairs, implementation=implementation)

    try:
        found = results(tried)
    except Exception as error:  # whatever it is, another form will run
        return " ".join(str(error).split())[:200] or type(error).__name__
    worst = max(
        float(np.abs(one - two).max() / np.abs(two).max()) for one, two in zip(found, results(reference.attend))
    )
    return None if worst < LARGEST_ERROR else f"values or gradients are off by {worst:.2g} of the largest"


@contextlib.contextmanager
def on_capability(capability: tuple[int, int]) -> Iterator[None]:
    """What is traced inside is for devices of this compute capability, whatever this machine has."""
    token = _capability.set(capability)
    try:
        yield
    finally:
        _capability.reset(token)
