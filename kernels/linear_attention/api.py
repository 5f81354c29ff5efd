"""The functions networks call for ReLU linear attention, whichever implementation runs it.

Source: SANA (arXiv 2410.10629) §2.2, after EfficientViT; with rotary positions SANA-Video (arXiv 2509.24695) §3. The
small epsilon is that of the published diffusers weights' runtime and only matters where a query sees next to no key.
"""

from __future__ import annotations

from kernels.linear_attention import xla
from kernels.over_mesh import Axes
from kernels.selection import choose, lazy
from kernels.typing import Array, Float

# The fused forms bring libraries of their own, which are imported where they run.
_FUSED = {name: f"kernels.linear_attention.{name}" for name in ("pallas", "triton")}
IMPLEMENTATIONS = {
    "xla": xla.relu_linear_attention,
    **{name: lazy(module, "relu_linear_attention") for name, module in _FUSED.items()},
}
ROPE_IMPLEMENTATIONS = {
    "xla": xla.rope_linear_attention,
    **{name: lazy(module, "rope_linear_attention") for name, module in _FUSED.items()},
}
_AXES = Axes(("B N h d", "B M h d", "B M h e", None), "B N h e")
_ROPE_AXES = Axes(("B N h d", "B N h d", "B N h e", "N p", "N p", None), "B N h e")
OPERATIONS = {"relu_linear_attention": IMPLEMENTATIONS, "rope_linear_attention": ROPE_IMPLEMENTATIONS}


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
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that. ``pallas`` and
            ``triton`` are fused forms for NVIDIA GPUs without forward-mode derivative.

    Returns:
        The attended values in ``value``'s dtype. Products, sums and the division are float32 whatever comes in.

    Raises:
        ValueError: for shapes that do not fit, if ``implementation`` is not one of ``IMPLEMENTATIONS``, or cannot run
            what it is asked to.
    """
    check_shapes(query.shape, key.shape, value.shape)
    return choose("relu_linear_attention", IMPLEMENTATIONS, implementation, _AXES)(query, key, value, epsilon)


def rope_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    *,
    epsilon: float = 1e-15,
    implementation: str | None = None,
) -> Float[Array, "B N h e"]:
    """Attention with the kernel ``R_n relu(q_n) · R_m relu(k_m)`` over the un-rotated kernel's sum.

    The ReLU comes first, then the rotation R of adjacent channel pairs. The normaliser ``Σ_m relu(q_n)·relu(k_m)`` is
    not rotated, so it stays positive; weights may be negative and need not add up to 1.

    Args:
        query: queries before ReLU and rotation, h heads of size d.
        key: keys before ReLU and rotation.
        value: values, of head size e.
        cos: cosine of every token's angle for each of its p = d/2 channel pairs, float32.
        sin: the sines.
        epsilon: added to the normaliser.
        implementation: None picks by measurement (so far ``xla`` everywhere); a name runs just that. ``pallas`` and
            ``triton`` are fused forms for NVIDIA GPUs without forward-mode derivative.

    Returns:
        The attended values in ``value``'s dtype. Rotation, products, sums and the division are float32 whatever comes
        in.

    Raises:
        ValueError: if ``implementation`` is not one of ``ROPE_IMPLEMENTATIONS``, or cannot run what it is asked to, or
            shapes or tables that do not fit.
    """
    check_shapes(query.shape, key.shape, value.shape, one_length=True)
    check_rotation(query.shape, cos.shape, sin.shape)
    run = choose("rope_linear_attention", ROPE_IMPLEMENTATIONS, implementation, _ROPE_AXES)
    return run(query, key, value, cos, sin, epsilon)


def check_shapes(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], one_length: bool = False
) -> None:
    """Raises ``ValueError`` unless keys fit queries and values fit keys; XLA's form would repeat an axis of size 1.

    ``one_length``: there are as many keys as queries.
    """
    fits = len(query) == len(key) == len(value) == 4 and key[:3] == value[:3]
    if not fits or (query[0], *query[2:]) != (key[0], *key[2:]) or (one_length and query[1] != key[1]):
        keys = "N" if one_length else "M"
        raise ValueError(
            f"query {query}, key {key} and value {value}: they must be (B, N, h, d), (B, {keys}, h, d) and "
            f"(B, {keys}, h, e)"
        )


def check_rotation(query: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless the tables have a row per token and a column per channel pair."""
    wanted = (query[1], query[3] // 2)
    if query[3] % 2 or cos != wanted or sin != wanted:
        raise ValueError(
            f"cos {cos} and sin {sin}: queries of {query[1]} tokens and an even head size {query[3]} need {wanted}"
        )
