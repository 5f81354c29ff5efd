"""What SANA-WM keeps of a video's earlier causal blocks, and which of their frames softmax layers still see.

The delta rule's memories, the frames that convolutions still see and the keys and values of softmax layers all have
fixed shapes: a step compiles once, however long the video gets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.gated_delta_rule import init_state as init_delta_state
from kernels.split_frames import all_frames, own_part
from kernels.typing import Array, Int
from sana_jax.errors import UserError
from sana_jax.models.sana_wm_config import SanaWMConfig
from sana_jax.nn.camera_attention import CausalLayout, DeltaLayerState, SoftmaxLayerState, VisibleFrames

EMPTY = -1  # in place of the number of a causal block


class BlockState(NamedTuple):
    """One block's part, or those of all blocks of one kind, stacked in front.

    Attributes:
        attention: of self-attention.
        last_frame: the Mix-FFN's last frame before its convolution over frames, (B, h, w, D); None without one.
    """

    attention: DeltaLayerState | SoftmaxLayerState
    last_frame: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("delta", "softmax", "frame_blocks", "blocks_done"),
    meta_fields=("num_cached_blocks", "sink", "camera"),
)
@dataclasses.dataclass(frozen=True)
class SanaWMState:
    """What the causal blocks of a video leave for the next ones.

    Attributes:
        delta: of the layers with the delta rule, stacked; None where there is none.
        softmax: of the layers with softmax, stacked; None where there is none.
        frame_blocks: for each of the F frames that softmax layers have room for the number of its block; -1: empty.
        blocks_done: how many blocks there have been.
        num_cached_blocks: how many earlier blocks softmax layers see; None for all.
        sink: whether the first block is always one of them.
        camera: whether blocks come with a camera: all of them, or none.
    """

    delta: BlockState | None
    softmax: BlockState | None
    frame_blocks: Int[Array, " F"]
    blocks_done: Int[Array, ""]
    num_cached_blocks: int | None
    sink: bool
    camera: bool = True


def cache_frames(block_frames: Sequence[int], num_cached_blocks: int | None = None, sink: bool = False) -> int:
    """How many frames of room softmax layers need for a video: the most that any of its blocks sees of earlier ones.

    Args:
        block_frames: latent frames of every block of the video.
        num_cached_blocks: as in ``init_state``.
        sink: the same.
    """
    _check_window(num_cached_blocks, sink)
    most = 0
    for block in range(1, len(block_frames)):
        seen = [b for b in range(block) if _is_seen(block, b, num_cached_blocks, sink)]
        most = max(most, sum(block_frames[b] for b in seen))
    return int(most)


def init_state(
    config: SanaWMConfig,
    batch_size: int,
    grid: tuple[int, int],
    cache_frames: int,
    num_cached_blocks: int | None = None,
    sink: bool = False,
    *,
    dtype: Any = jnp.float32,
    softmax_dtype: Any = jnp.bfloat16,
    camera: bool = True,
) -> SanaWMState:
    """The state before the first block.

    Args:
        config: the network's shape.
        batch_size: samples.
        grid: height and width of a frame in tokens: latent size over patch size.
        cache_frames: latent frames that softmax layers have room for, see the function of this name. Where there are
            more to be seen than that, velocities are NaN from the next block on.
        num_cached_blocks: how many earlier blocks softmax layers see; None for all. The delta rule has no such window.
        sink: whether the first block is always one of them.
        dtype: of the frames that convolutions keep; the network's compute dtype holds them exactly.
        softmax_dtype: of the keys and values; the network's ``softmax_dtype`` holds them exactly.
        camera: whether the blocks will come with a camera.

    Raises:
        UserError: a window of no block, or a sink without a window.
    """
    _check_window(num_cached_blocks, sink)
    if type(cache_frames) is not int or cache_frames < 0:
        raise UserError(f"cache_frames={cache_frames!r} is not allowed; allowed is a whole number from 0 on")
    heads, size, width = config.num_heads, config.linear_head_dim, config.hidden_size
    tokens = grid[0] * grid[1]

    def stacked(layers: int, state: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), state)

    last_frame = jnp.zeros((batch_size, *grid, width), dtype) if config.ffn_type != "mlp" else None
    convolved = () if not config.conv_kernel_size else ("k",) if config.k_conv_only else ("q", "k", "v")
    tail = jnp.zeros((batch_size, max(config.conv_kernel_size - 1, 0), tokens, width), dtype)
    tails = {f"conv_{letter}{suffix}": tail for letter in convolved for suffix in ("", "_camera")}
    memories = (init_delta_state(batch_size, heads, size, normalised=normalised) for normalised in (True, False))
    frames = jnp.zeros((batch_size, cache_frames, tokens, heads, size), softmax_dtype)
    delta, softmax = len(config.delta_layers), len(config.softmax_layers)
    return SanaWMState(
        delta=stacked(delta, BlockState(DeltaLayerState(*memories, tails), last_frame)) if delta else None,
        softmax=stacked(softmax, BlockState(SoftmaxLayerState(*[frames] * 4), last_frame)) if softmax else None,
        frame_blocks=jnp.full(cache_frames, EMPTY, jnp.int32),
        blocks_done=jnp.zeros((), jnp.int32),
        num_cached_blocks=num_cached_blocks,
        sink=sink,
        camera=camera,
    )


def state_bytes(state: SanaWMState) -> dict[str, int]:
    """Bytes of a state, which may be one of shapes alone, by kind of layer; they do not grow with the video."""

    def count(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return {"delta": count(state.delta), "softmax": count(state.softmax), "total": count(state)}


def visible_frames(
    block_starts: tuple[int, ...], frames: int, state: SanaWMState | None, axis_name: str | None = None
) -> VisibleFrames:
    """What softmax layers see in the frames given and in those of the state.

    Args:
        block_starts: the first frame of every causal block among the frames given.
        frames: T.
        state: None for a video without earlier frames.
        axis_name: inside ``jax.shard_map``, the mesh axis over which frames are split (``kernels.split_frames``); T is
            then one device's, the blocks are those of all frames, and there is no state.
    """
    numbers = np.arange(all_frames(frames, axis_name))
    own = (np.searchsorted(np.asarray(block_starts), numbers, side="right") - 1).astype(np.int32)
    if state is None:
        if len(block_starts) == 1:
            return VisibleFrames(None)
        return VisibleFrames(jnp.asarray(own[None, :] <= own_part(own, frames, axis_name)[:, None])[None])
    own = own + state.blocks_done
    known = jnp.concatenate([state.frame_blocks, own])
    window, sink = state.num_cached_blocks, state.sink

    def seen_by(block: Array) -> Array:
        return (known != EMPTY) & _is_seen(block, known, window, sink)

    mask = seen_by(own[:, None]) & (known <= own[:, None])
    keep = seen_by(state.blocks_done + len(block_starts))
    room = len(state.frame_blocks)
    return VisibleFrames(mask[None], jnp.argsort(~keep, stable=True)[:room], keep.sum() > room)


def _is_seen(block: Any, earlier: Any, num_cached_blocks: int | None, sink: bool) -> Any:
    """Whether a block sees an earlier one, or itself."""
    if num_cached_blocks is None:
        return earlier <= block
    seen = block - earlier <= (num_cached_blocks - 1 if sink else num_cached_blocks)
    return seen | (earlier == 0) if sink else seen


def state_after(
    state: SanaWMState,
    layers: tuple[BlockState | None, BlockState | None],
    visible: VisibleFrames,
    layout: CausalLayout,
) -> SanaWMState:
    """The state with its layers' new parts, and with the frames that the next block will see."""
    frames, starts = layout.grid[0], jnp.asarray(layout.block_starts)
    own = jnp.searchsorted(starts, jnp.arange(frames), side="right").astype(jnp.int32) - 1 + state.blocks_done
    done = state.blocks_done + len(layout.block_starts)
    known = jnp.concatenate([state.frame_blocks, own])[visible.kept]
    still = (known != EMPTY) & _is_seen(done, known, state.num_cached_blocks, state.sink)
    return dataclasses.replace(
        state,
        delta=layers[0],
        softmax=layers[1],
        frame_blocks=jnp.where(still, known, EMPTY),
        blocks_done=done,
    )


def check_state(state: SanaWMState, config: SanaWMConfig, batch_size: int, grid: tuple[int, int], camera: bool) -> None:
    """Raises ``UserError`` unless the state is one of this network for this size, with a camera or without one."""
    room, window = len(state.frame_blocks), (state.num_cached_blocks, state.sink)
    wanted = jax.eval_shape(lambda: init_state(config, batch_size, grid, room, *window, camera=state.camera))
    found, needed = ([leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, wanted))
    if found != needed or jax.tree.structure(state) != jax.tree.structure(wanted):
        raise UserError(
            f"the state is not one for {batch_size} samples of {grid[0]}x{grid[1]} tokens per frame in this network; "
            "start with init_state for this size"
        )
    if state.camera != camera:
        has, given = ("with", "no camera_conditions") if state.camera else ("without", "camera_conditions")
        raise UserError(
            f"the state is of blocks {has} a camera, and this one has {given}; all blocks of a video have a camera or "
            f"none has: start with init_state(..., camera={camera})"
        )
    _check_dtypes(state, wanted)


def _check_dtypes(state: SanaWMState, wanted: SanaWMState) -> None:
    """Memories and numbers have one dtype; those of frames and of keys and values are whatever ``init_state`` made."""

    def named(tree: SanaWMState) -> dict[str, Any]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.dtype(leaf.dtype) for path, leaf in leaves}

    kinds: dict[str, set[Any]] = {"frames": set(), "keys and values": set()}
    for (name, found), needed in zip(named(state).items(), named(wanted).values(), strict=True):
        kind = None
        if "tails" in name or "last_frame" in name:
            kind = "frames"
        elif name.startswith("softmax/attention"):
            kind = "keys and values"
        if kind is None and found != needed:
            raise UserError(f"the state's {name} is {found}, and is to be {needed}; start with init_state")
        if kind is not None:
            kinds[kind].add(found)
    for kind, dtypes in kinds.items():
        if len(dtypes) > 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            told = ", ".join(sorted(map(str, dtypes)))
            raise UserError(
                f"the state's {kind} are {told}; allowed is one floating-point dtype for all: start with init_state, "
                "whose dtype and softmax_dtype say which"
            )


def _check_window(num_cached_blocks: int | None, sink: bool) -> None:
    if num_cached_blocks is not None and num_cached_blocks < 1:
        raise UserError(
            f"num_cached_blocks={num_cached_blocks} is not allowed; choose 1 or more, or None for all earlier blocks"
        )
    if sink and num_cached_blocks is None:
        raise UserError("sink=True without num_cached_blocks: all earlier blocks are seen anyway; leave it out")
