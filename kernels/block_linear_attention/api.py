"""The one function networks call for block-causal linear attention, whichever implementation runs it.

Source: LongSANA's block linear attention (SANA-Video, arXiv 2509.24695, §4). Every token attends to all tokens of its
own block and of the blocks before it. Because the kernel is linear, the blocks before are known by two sums, whose size
does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.block_linear_attention import xla
from kernels.block_linear_attention.state import BlockSums
from kernels.linear_attention.api import check_rotation, check_shapes
from kernels.selection import choose
from kernels.typing import Array, Float

IMPLEMENTATIONS = {"xla": xla.block_linear_attention}


def block_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    *,
    block_starts: Sequence[int] = (0,),
    state: BlockSums,
    epsilon: float = 1e-15,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N h e"], BlockSums]:
    """``rope_linear_attention`` in which a block sees itself and the blocks before it, some of them in ``state``.

    One function, three uses: all blocks at once (``block_starts`` and a state of zeros: training), one block after
    another (``block_starts=(0,)`` and the state of the call before: streaming), or that in ``jax.lax.scan``.

    Args:
        query: queries before ReLU and rotation, h heads of size d.
        key: keys before ReLU and rotation.
        value: values, of head size e.
        cos: cosine of every token's angle for each of its p = d/2 channel pairs, float32.
        sin: the sines.
        block_starts: the first token of every block, ascending from 0.
        state: sums of earlier blocks; it also says how many of them a block sees (``num_cached_blocks``).
        epsilon: added to the normaliser.
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that.

    Returns:
        The attended values in ``value``'s dtype, and the state after the last block. Everything inside is float32.

    Raises:
        ValueError: an unknown ``implementation``, shapes or tables that do not fit, or block starts that do not ascend
            from 0.
    """
    check_shapes(query.shape, key.shape, value.shape, one_length=True)
    check_rotation(query.shape, cos.shape, sin.shape)
    starts = tuple(block_starts)
    if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, (*starts[1:], query.shape[1]))):
        raise ValueError(f"block_starts={starts}: they must ascend from 0 and stay below {query.shape[1]} tokens")
    run = choose("block_linear_attention", IMPLEMENTATIONS, implementation)
    return run(query, key, value, cos, sin, starts, state, epsilon)
