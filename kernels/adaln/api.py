"""The functions networks call for adaptive layer norm: before a layer, and where its result joins the residual stream.

Source: DiT (arXiv 2212.09748) §3.2. There is one shift, scale and gate per sample or, in videos, one per frame.
"""

from __future__ import annotations

from kernels.adaln import xla
from kernels.over_mesh import Axes
from kernels.selection import choose, lazy
from kernels.typing import Array, Float

OPERATIONS = {
    "modulated_norm": {"xla": xla.modulated_norm, "pallas": lazy("kernels.adaln.pallas", "modulated_norm")},
    "gated_residual": {"xla": xla.gated_residual, "pallas": lazy("kernels.adaln.pallas", "gated_residual")},
}


def modulated_norm(
    x: Float[Array, "*B N D"],
    shift: Float[Array, "*#B 1 D"],
    scale: Float[Array, "*#B 1 D"],
    epsilon: float,
    *,
    implementation: str | None = None,
) -> Float[Array, "*B N D"]:
    """``LayerNorm(x) · (1 + scale) + shift``; the norm has no parameters of its own.

    Args:
        x: tokens.
        shift: one per sample (B, 1, D) or per frame (B, T, 1, D), float32.
        scale: the same.
        epsilon: added to the variance, which is the biased one.
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that. ``xla`` is
            differentiable in both modes, ``pallas`` in reverse mode alone.

    Returns:
        The tokens in ``x``'s dtype; float32 inside, rounded once.

    Raises:
        ValueError: for shapes that do not fit, or if ``implementation`` is not one of those of ``OPERATIONS``.
    """
    check_rows(x.shape, shift=shift.shape, scale=scale.shape)
    axes = _rows(x.ndim)
    run = choose("modulated_norm", OPERATIONS["modulated_norm"], implementation, Axes((axes, axes, axes, None), axes))
    return run(x, shift, scale, epsilon)


def gated_residual(
    x: Float[Array, "*B N D"],
    gate: Float[Array, "*#B 1 D"],
    update: Float[Array, "*B N D"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*B N D"]:
    """``x + gate · update``.

    Args:
        x: the residual stream.
        gate: one per sample (B, 1, D) or per frame (B, T, 1, D), float32.
        update: the layer's result.
        implementation: as in ``modulated_norm``.

    Returns:
        The stream in ``x``'s dtype; float32 inside, rounded once.

    Raises:
        ValueError: for shapes that do not fit, or if ``implementation`` is not one of those of ``OPERATIONS``.
    """
    check_rows(x.shape, gate=gate.shape)
    check_update(x.shape, update.shape)
    axes = _rows(x.ndim)
    run = choose("gated_residual", OPERATIONS["gated_residual"], implementation, Axes((axes, axes, axes), axes))
    return run(x, gate, update)


def _rows(rank: int) -> str:
    """The batch and then axes that are whole; the residual stream's channels are, however its layers' are cut."""
    return " ".join([*["B", "T", "N", "N"][: rank - 2], "N", "D"])


def check_rows(x: tuple[int, ...], **rows: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless each of ``rows`` is the shape of a vector per sample or frame of ``x``'s shape."""
    for name, row in rows.items():
        fits = len(row) == len(x) and row[-2:] == (1, x[-1])
        if not fits or any(size not in (1, of_x) for size, of_x in zip(row[:-2], x[:-2])):
            raise ValueError(f"{name} {row}: x {x} needs {(*x[:-2], 1, x[-1])}, or 1 in place of leading sizes")


def check_update(x: tuple[int, ...], update: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless a layer's result has the shape of the stream that it joins."""
    if update != x:
        raise ValueError(f"update {update}: it must have the shape {x} of x")
