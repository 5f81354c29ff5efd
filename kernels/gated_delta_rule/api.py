"""The one function networks call for the gated delta rule over frames, whichever implementation runs it.

Source: the frame-wise gated delta network of SANA-WM, after Gated Delta Networks (arXiv 2412.06464). A memory that maps
keys to values decays from frame to frame; every frame then corrects it towards its own values, all tokens of the frame
at once, and its queries read it. ``kernels.gated_delta_rule.updates`` has the formula.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.gated_delta_rule import xla
from kernels.gated_delta_rule.state import DeltaState, init_state
from kernels.linear_attention.api import check_rotation
from kernels.over_mesh import Axes
from kernels.selection import choose, lazy
from kernels.split_frames import all_frames
from kernels.typing import Array, Float

IMPLEMENTATIONS = {
    "xla": xla.scan,
    "xla_associative": xla.associative_scan,
    "pallas": lazy("kernels.gated_delta_rule.pallas", "gated_delta_rule"),
    "triton": lazy("kernels.gated_delta_rule.triton", "gated_delta_rule"),
}


def gated_delta_rule(
    query: Float[Array, "B T S h d"],
    key: Float[Array, "B T S h d"],
    value: Float[Array, "B T S h e"],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    rotation: tuple[Float[Array, "N p"], Float[Array, "N p"]] | None = None,
    *,
    normalise: bool = True,
    key_scale: float = 1.0,
    chunk_starts: Sequence[int] = (0,),
    state: DeltaState | None = None,
    epsilon: float = 1e-8,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T S h e"], DeltaState]:
    """Every query reads the memory of all frames up to its own, plus that of the later frames of its own chunk.

    The memory of later frames is empty at the end of every chunk and runs backward through it. One chunk is the
    bidirectional form; several are the chunk-causal one; chunk after chunk, each with the state of the call before,
    gives the values of all of them at once; a chunk per frame is causal. A frame of β = 0 and decay 1 (padding) has no
    effect on others.

    Args:
        query: queries of h heads, S tokens in each of T frames; normalised, and after their ReLU.
        key: keys likewise.
        value: values, of head size e.
        beta: update strength of every token, 0..1.
        decay: how much of the memory each frame keeps, 0..1.
        rotation: cosine and sine of every token's angle for each of its p = d/2 channel pairs, N = T·S tokens in the
            order of frames, by which queries and keys of the numerator are turned; None for no rotation.
        normalise: whether to divide by what the un-rotated queries read from a second memory, with the same β and
            decay, the un-rotated keys, and values that are all 1. That is not clamped and can be small.
        key_scale: factor of the keys. It must keep the eigenvalues of a frame's ``Σ β k kᵀ`` below 2, or the memory
            grows without bound; SANA-WM uses 1/√(d·S) after RMS norm, which keeps them below 1.
        chunk_starts: the first frame of every chunk, ascending from 0.
        state: memory of earlier frames; None at the start of a clip.
        epsilon: added to the normaliser.
        axis_name: inside ``jax.shard_map``, the mesh axis over whose devices frames are split in equal parts, in its
            order; T counts one device's. ``chunk_starts`` and ``state`` are then those of all frames, the same on every
            device, and so is the state returned.
        implementation: None picks by measurement (so far ``xla`` everywhere); ``xla`` takes one frame after another,
            ``xla_associative`` all at once, absorbed in pairs of growing size; ``pallas`` and ``triton`` are kernels
            for CUDA, for heads of up to 128 channels, without float64, forward-mode derivatives and gradients by the
            rotation; a name runs just that.

    Returns:
        What the queries read, in ``value``'s dtype, and the state after the last frame. Rotation, products, sums, the
        division and the state are float32 (float64 if ``value`` is).

    Raises:
        ValueError: shapes that do not fit each other, chunk starts that do not ascend from 0, a state of other sizes,
            an unknown ``implementation``, or one that cannot run what is asked, or not on this device.
    """
    check_shapes(query.shape, key.shape, value.shape, beta.shape, decay.shape)
    batch, frames, tokens, heads, size = query.shape
    if rotation is not None:
        check_rotation((batch, frames * tokens, heads, size), *(x.shape for x in rotation))
    starts, end = tuple(chunk_starts), all_frames(frames, axis_name)
    if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, (*starts[1:], end))):
        raise ValueError(f"chunk_starts={starts}: they must ascend from 0 and stay below {end} frames")
    run = choose("gated_delta_rule", IMPLEMENTATIONS, implementation, _axes(rotation is not None, normalise))
    empty = init_state(batch, heads, size, value.shape[-1], normalised=normalise)
    state = empty if state is None else state
    _check_state(state, empty)
    return run(query, key, value, beta, decay, rotation, starts, state, key_scale, epsilon, axis_name)


def _axes(rotated: bool, normalised: bool) -> Axes:
    state = DeltaState("B h d e", "B h d" if normalised else None)
    rotation = ("N p", "N p") if rotated else None
    arrays = ("B T S h d", "B T S h d", "B T S h e", "B T S h", "B T h", rotation, None, state)
    return Axes((*arrays, None, None, None), ("B T S h e", state))


def check_shapes(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    beta: tuple[int, ...],
    decay: tuple[int, ...],
) -> None:
    """Raises ``ValueError`` unless the inputs' shapes fit each other."""
    if len(query) != 5 or min(query) < 1:
        raise ValueError(f"query {query}: (batch, frames, tokens of a frame, heads, head size), all of them 1 or more")
    wanted = {"key": (key, query), "beta": (beta, query[:4]), "decay": (decay, (*query[:2], query[3]))}
    wanted["value"] = value, (*query[:4], max(1, value[-1]) if value else "e")
    for name, (shape, needed) in wanted.items():
        if shape != needed:
            raise ValueError(f"{name} {shape}: with a query of {query} it must be {needed}")


def _check_state(state: DeltaState, wanted: DeltaState) -> None:
    """Raises ``ValueError`` unless the state has the shapes of the one wanted."""
    if (state.key is None) != (wanted.key is None):
        asked, held = ("False", "has a") if wanted.key is None else ("True", "has no")
        raise ValueError(f"normalise={asked}, but the state {held} normaliser: init_state's normalised must agree")
    found, needed = ([None if x is None else x.shape for x in (s.key_value, s.key)] for s in (state, wanted))
    if found != needed:
        raise ValueError(f"a state of shapes {found}: these queries and values need {needed}; see init_state")
