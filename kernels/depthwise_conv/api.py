"""The one function networks call for a depthwise convolution of odd size, stride 1, zero padding."""

from __future__ import annotations

from kernels.depthwise_conv import xla
from kernels.selection import choose
from kernels.typing import Array, Float

IMPLEMENTATIONS = {"xla": xla.grouped_convolution, "xla_shifted": xla.shifted_multiply_add}


def depthwise_conv2d(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B H W C"]:
    """Convolves every channel with its own kernel; the output has the input's size and dtype.

    Args:
        x: channels-last picture.
        kernel: odd kh and kw.
        implementation: None picks by measurement for the platform the program is lowered for; a name runs just
            that.

    Raises:
        ValueError: for shapes that do not fit, an even kernel size, or if ``implementation`` is not one of
            ``IMPLEMENTATIONS``.
    """
    check_shapes(x.shape, kernel.shape)
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel size {kernel.shape[:2]}: both must be odd")
    return choose("depthwise_conv", IMPLEMENTATIONS, implementation)(x, kernel.astype(x.dtype))


def check_shapes(x: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless the kernel has x's channels; of more, some would be read as taps."""
    if len(x) != 4 or len(kernel) != 3 or kernel[2] != x[3]:
        raise ValueError(f"x {x} and kernel {kernel}: they must be (B, H, W, C) and (kh, kw, C)")
