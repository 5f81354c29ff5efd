"""The one function networks call for ReLU linear attention, whichever implementation runs it.

Source: SANA (arXiv 2410.10629) §2.2, after EfficientViT; the small epsilon is that of the published diffusers weights'
runtime and only matters where a query sees no key at all, which then gives 0.
"""

from __future__ import annotations

from kernels.linear_attention import xla
from kernels.typing import Array, Float

IMPLEMENTATIONS = {"xla": xla.relu_linear_attention}


def relu_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B M h d"],
    value: Float[Array, "B M h e"],
    *,
    epsilon: float = 1e-15,
    implementation: str | None = None,
) -> Float[Array, "B N h e"]:
    """Attention with the kernel ``relu(q)·relu(k)``, without scale, softmax or mask.

    Args:
        query: queries before the ReLU, h heads of size d.
        key: keys before the ReLU.
        value: values, of head size e.
        epsilon: added to the normaliser.
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that.

    Returns:
        The attended values in ``value``'s dtype. Products, sums and the division are float32 whatever comes in.

    Raises:
        ValueError: if ``implementation`` is not one of ``IMPLEMENTATIONS``.
    """
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r}: choose one of {sorted(IMPLEMENTATIONS)}, or None to pick one")
    return IMPLEMENTATIONS[name](query, key, value, epsilon)
