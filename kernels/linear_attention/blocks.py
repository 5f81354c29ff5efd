"""How the fused forms divide their work between the programs of a GPU, and which inputs they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from kernels.refusal import Refusal
from kernels.typing import Array

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SIZE = 128  # of a head: the sums of a larger one do not fit into a program's registers
SMALLEST_PRODUCT = 16  # the least size that Triton's matrix products take
# Enough programs for four on each multiprocessor of the largest GPUs; more would only add partial sums.
WANTED_PROGRAMS = 512


@dataclass(frozen=True)
class Blocks:
    """One pass over the tokens of queries or of keys.

    A program takes ``run`` blocks of ``block`` tokens of one head of one example; ``programs`` of them cover all.

    Attributes:
        batch: examples.
        tokens: of an example.
        heads: of a token.
        parts: 2 where even and odd channels are read apart for a rotation, else 1.
        size: channels of a part.
        value_size: channels of a value.
        block: tokens that are worked on at once.
        run: blocks that a program works on, one after another.
    """

    batch: int
    tokens: int
    heads: int
    parts: int
    size: int
    value_size: int
    block: int
    run: int

    @classmethod
    def of(cls, x: Array, value: Array, parts: int) -> Blocks:
        """The blocks of queries or keys ``x`` (B, N, h, d) with values (B, M, h, e)."""
        batch, tokens, heads, size = x.shape
        channels = (parts, size // parts, value.shape[-1])
        block = 32 if _is_large(*channels) else 64
        wanted = max(1, WANTED_PROGRAMS // (batch * heads))
        run = max(1, math.ceil(tokens / block) // wanted)
        return cls(batch, tokens, heads, *channels, block, run)

    @property
    def programs(self) -> int:
        """Programs for the tokens of one head of one example."""
        return math.ceil(self.tokens / (self.block * self.run))

    @property
    def padded(self) -> int:
        """Channels of a part, padded."""
        return _padded(self.size)

    @property
    def padded_value(self) -> int:
        """Channels of a value, padded."""
        return _padded(self.value_size)

    @property
    def large(self) -> bool:
        """Whether a program has room for one matrix between keys and values, but not for two."""
        return _is_large(self.parts, self.size, self.value_size)

    @property
    def warps(self) -> int:
        """Groups of 32 threads that a program runs on."""
        return 8 if self.large else 4

    @property
    def stages(self) -> int:
        """Blocks that are read ahead, and one."""
        return 1 if self.large else 2


def check_inputs(implementation: str, query: Array, key: Array, value: Array) -> None:
    """Raises ``Refusal`` unless a fused form can take these inputs."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype.name not in DTYPES:
            raise Refusal(f"implementation={implementation!r}: {name} of {x.dtype.name}: it takes {DTYPES}; use 'xla'")
        if not 1 <= x.shape[-1] <= LARGEST_SIZE or 0 in x.shape:
            raise Refusal(
                f"implementation={implementation!r}: {name} {x.shape}: no size may be 0, the last one at most "
                f"{LARGEST_SIZE}; use 'xla'"
            )


def is_half(dtype: jnp.dtype) -> bool:
    """Whether products of two such numbers are exact in float32."""
    return jnp.dtype(dtype).name in ("bfloat16", "float16")


def _is_large(parts: int, size: int, value_size: int) -> bool:
    return parts * _padded(size) * _padded(value_size) > 64 * 64


def _padded(size: int) -> int:
    return max(SMALLEST_PRODUCT, 1 << (size - 1).bit_length())
