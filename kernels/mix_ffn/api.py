"""The one function networks call between the two pointwise products of a Mix-FFN.

Source: SANA (arXiv 2410.10629) §2.2.
"""

from __future__ import annotations

from kernels.mix_ffn import xla
from kernels.over_mesh import Axes
from kernels.selection import choose, lazy
from kernels.typing import Array, Float

IMPLEMENTATIONS = {"xla": xla.mix_ffn, "pallas": lazy("kernels.mix_ffn.pallas", "mix_ffn")}
_AXES = Axes(("B H W C", "C", "3 3 C", "C"), "B H W F")


def mix_ffn(
    x: Float[Array, "B H W E"],
    bias: Float[Array, " E"],
    kernel: Float[Array, "3 3 E"],
    depth_bias: Float[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B H W F"]:
    """``value · SiLU(gate)`` of ``(value, gate) = depthwise3x3(SiLU(x + bias)) + depth_bias``.

    Args:
        x: the first pointwise product, without its bias; E = 2·F channels, the values' before the gates'.
        bias: of that product.
        kernel: of the depthwise convolution, which sees zeros outside the picture.
        depth_bias: of the convolution.
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that. ``xla`` is
            differentiable in both modes; ``pallas``, which reads ``x`` once, in reverse mode alone.

    Returns:
        The gated channels in ``x``'s dtype. ``pallas`` rounds once; ``xla`` after each SiLU, the convolution, its bias
        and the gate.

    Raises:
        ValueError: for shapes that do not fit, or if ``implementation`` is not one of ``IMPLEMENTATIONS``.
    """
    check_parameters(x.shape[-1], bias.shape, kernel.shape, depth_bias.shape)
    return choose("mix_ffn", IMPLEMENTATIONS, implementation, _AXES)(x, bias, kernel, depth_bias)


def check_parameters(
    channels: int, bias: tuple[int, ...], kernel: tuple[int, ...], depth_bias: tuple[int, ...]
) -> None:
    """Raises ``ValueError`` unless the parameters' shapes are those of an even number of ``channels``."""
    if channels % 2 or kernel != (3, 3, channels) or {bias, depth_bias} != {(channels,)}:
        raise ValueError(
            f"bias {bias}, kernel {kernel} and depth_bias {depth_bias}: x has {channels} channels, which must be an "
            f"even number, and needs ({channels},), (3, 3, {channels}) and ({channels},)"
        )
