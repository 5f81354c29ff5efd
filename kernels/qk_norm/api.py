"""The one function networks call to normalise queries or keys, over all heads together.

Sources: RMS norm arXiv 1910.07467; of queries and keys, SANA-1.5 (arXiv 2501.18427) §2; rotary positions arXiv
2104.09864.
"""

from __future__ import annotations

from kernels.over_mesh import Axes
from kernels.qk_norm import xla
from kernels.selection import choose, lazy
from kernels.typing import Array, Float

IMPLEMENTATIONS = {"xla": xla.qk_norm, "pallas": lazy("kernels.qk_norm.pallas", "qk_norm")}


def qk_norm(
    x: Float[Array, "... C"],
    scale: Float[Array, " C"],
    rotation: tuple[Float[Array, "N p"], Float[Array, "N p"]] | None = None,
    *,
    epsilon: float,
    relu: bool = False,
    implementation: str | None = None,
) -> Float[Array, "... C"]:
    """``x / sqrt(mean(x²) + ε) · scale`` over the last axis, then ReLU and rotation of adjacent pairs where wanted.

    Args:
        x: queries or keys, the channels of all heads side by side; (B, N, C) with a rotation.
        scale: learned, one per channel.
        rotation: cosine and sine of every token's angles, one per channel pair of a head, the same for all heads;
            p is half a head's size. None for no rotation.
        epsilon: added to the mean of squares.
        relu: whether negative values become 0 between norm and rotation.
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that. ``xla`` is
            differentiable in both modes, ``pallas`` in reverse mode alone.

    Returns:
        The normalised ``x`` in its own dtype; float32 inside. ``pallas`` rounds once; ``xla`` after the norm and after
        the rotation.

    Raises:
        ValueError: for shapes that do not fit, or if ``implementation`` is not one of ``IMPLEMENTATIONS``.
    """
    check_shapes(x.shape, scale.shape, rotation if rotation is None else tuple(table.shape for table in rotation))
    rows = " ".join(["B", *["N"] * (x.ndim - 2), "C"][-x.ndim :])
    axes = Axes((rows, "C", rotation if rotation is None else ("N p", "N p"), None, None), rows)
    return choose("qk_norm", IMPLEMENTATIONS, implementation, axes)(x, scale, rotation, epsilon, relu)


def check_shapes(
    x: tuple[int, ...], scale: tuple[int, ...], rotation: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> None:
    """Raises ``ValueError`` unless the scale and the tables of angles fit ``x``; all are shapes."""
    channels = x[-1]
    if scale != (channels,):
        raise ValueError(f"scale {scale}: {channels} channels of x need ({channels},)")
    if rotation is None:
        return
    cos, sin = rotation
    if len(x) != 3 or cos != sin or cos[0] != x[1] or channels % (2 * cos[1]):
        raise ValueError(
            f"cos {cos} and sin {sin}: x {x} must be (B, N, C), and the tables (N, p), with whole heads of 2·p "
            "channels in C"
        )
