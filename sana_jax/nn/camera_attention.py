"""The two self-attentions of SANA-WM: a gated delta rule over frames, and softmax over all tokens.

Both have two branches with projections of their own. The main branch turns queries and keys by rotary positions; the
camera branch sees queries, keys and values from the rays of a camera (``sana_jax.nn.ray_transform``). What they read is
added, gated by the layer's input and projected once. Both kinds of layer have the same parameters, but for the short
convolutions, which softmax layers have not: they keep the delta rule's gates without using them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.gated_delta_rule import DeltaState, gated_delta_rule
from kernels.linear_attention.rotation import rotate_pairs
from kernels.softmax_attention import softmax_attention
from kernels.split_frames import frames_of_all
from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray
from sana_jax.nn.activations import silu
from sana_jax.nn.initializers import xavier_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.norms import RMSNorm
from sana_jax.nn.ray_transform import RayTransforms, from_ray, key_to_ray, query_to_ray, shrink_to
from sana_jax.nn.rope import Rotation
from sana_jax.nn.short_convolution import short_convolution

QK_NORM_EPSILON = 1e-5
NORMALISER_EPSILON = 1e-8
_SHORTEST_KEY = 1e-6
# Head sizes that fused softmax attention takes as they are; the legacy camera branch fills others up to 128 or 256,
# and its scale is that of the size it fills up to.
_FUSED_HEAD_SIZES = (32, 64, 128, 256)

Frames = Float[Array, "B T S C"]


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What both kinds of layer are made of; the fields of ``SanaWMConfig`` that they need.

    Attributes:
        num_heads: heads.
        head_dim: size of each, a multiple of 8.
        qk_norm: whether queries and keys are normalised over all heads together.
        conv_taps: of the short convolution over frames; 0 for none.
        conv_keys_only: whether keys alone pass it, or queries and values too.
        legacy: whether the camera branch shrinks what it turned, and takes the scale of a filled-up head.
        dtype: compute dtype.
        softmax_dtype: to which queries, keys and values of softmax layers are rounded; None for the compute dtype.
    """

    num_heads: int
    head_dim: int
    qk_norm: bool
    conv_taps: int
    conv_keys_only: bool
    legacy: bool
    dtype: Any
    softmax_dtype: Any

    @property
    def convolved(self) -> tuple[str, ...]:
        """Which of queries, keys and values pass a short convolution."""
        if not self.conv_taps:
            return ()
        return ("k",) if self.conv_keys_only else ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class CausalLayout:
    """Where causal blocks begin, as frame numbers; known when the program is compiled.

    Attributes:
        grid: frames, rows and columns of tokens.
        block_starts: ascending from 0; one block is the bidirectional form.
        convolution_starts: the same for the later frames that the short convolution sees.
        frame_axis: inside ``jax.shard_map``, the mesh axis over which frames are split (``kernels.split_frames``):
            ``grid`` has one device's, starts are those of all frames, and there is no state. None: they are not split.
    """

    grid: tuple[int, int, int]
    block_starts: tuple[int, ...] = (0,)
    convolution_starts: tuple[int, ...] = (0,)
    frame_axis: str | None = None

    @property
    def token_starts(self) -> tuple[int, ...] | None:
        """Where causal blocks begin, as numbers of tokens; None for one block, or where frames are split."""
        rows, columns = self.grid[1:]
        one_part = len(self.block_starts) == 1 or self.frame_axis is not None
        return None if one_part else tuple(start * rows * columns for start in self.block_starts)


class VisibleFrames(NamedTuple):
    """Which frames' keys softmax layers see, and which of them the next causal block will see.

    Attributes:
        mask: of every frame's queries, for the F cached frames and then the T given ones; None for all.
        kept: which of the F + T frames make the next cache; None without a state.
        overflow: whether more of them should be kept than the cache has room for.
    """

    mask: Bool[Array, "#B T Q"] | None
    kept: Int[Array, " F"] | None = None
    overflow: Bool[Array, ""] | None = None


class AttentionInputs(NamedTuple):
    """What all layers share besides their input.

    Attributes:
        rotation: angles of the main branch; None for no positions.
        rays: of the camera branch; None for no camera branch.
        valid: whether a frame is one of the video, or padding; None for no padding.
        visible: of softmax layers.
    """

    rotation: Rotation | None
    rays: RayTransforms | None
    valid: Bool[Array, "B T"] | None
    visible: VisibleFrames


class DeltaLayerState(NamedTuple):
    """What a delta-rule layer keeps of earlier frames: two memories, and frames that the convolutions still see."""

    main: DeltaState
    camera: DeltaState
    tails: dict[str, Float[Array, "B E S C"]]


class SoftmaxLayerState(NamedTuple):
    """Keys and values of F earlier frames, (B, F, S, h, d): after rotation, and as seen from their rays."""

    key: Array
    value: Array
    camera_key: Array
    camera_value: Array


def masked(x: Float[Array, "B T S *C"], valid: Bool[Array, "B T"] | None) -> Float[Array, "B T S *C"]:
    """``x`` with zeros in frames that are padding."""
    return x if valid is None else jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)


class GatedDeltaAttention(nn.Module):
    """Both branches as a gated delta rule with one update per frame; the camera branch has no normaliser."""

    shape: AttentionShape

    @nn.compact
    def __call__(
        self, x: Frames, inputs: AttentionInputs, layout: CausalLayout, state: DeltaLayerState | None = None
    ) -> tuple[Frames, DeltaLayerState | None]:
        """Attends.

        Args:
            x: the layer's input, zero in frames that are padding.
            inputs: positions, rays, padding.
            layout: the grid, and where causal blocks begin.
            state: of the frames before; None at the start of a video.

        Returns:
            The layer's output, and the state after the last frame, None where none was given.
        """
        shape, valid = self.shape, inputs.valid
        beta, decay = _gates(self, x)
        if valid is not None:
            beta, decay = masked(beta, valid), jnp.where(valid[..., None], decay, 1)
        tails = None if state is None else dict(state.tails)
        key_scale = (shape.head_dim * x.shape[2]) ** -0.5

        def features(projections: tuple[Frames, ...], suffix: str) -> tuple[Array, ...]:
            projections = _convolved(self, projections, suffix, layout, tails)
            query, key, value = _normalised(shape, projections, suffix)
            return nn.relu(query), nn.relu(key), value

        query, key, value = features(_main_projections(shape, x, valid), "")
        main, main_state = gated_delta_rule(
            masked(query, valid),
            masked(key, valid),
            masked(value, valid),
            beta,
            decay,
            inputs.rotation,
            key_scale=key_scale,
            chunk_starts=layout.block_starts,
            state=None if state is None else state.main,
            epsilon=NORMALISER_EPSILON,
            axis_name=layout.frame_axis,
        )
        camera, camera_state = None, None if state is None else state.camera
        if inputs.rays is not None:
            heads = features(_camera_projections(shape, x, valid), "_camera")
            camera, camera_state = _delta_from_rays(shape, heads, beta, decay, inputs, layout, key_scale, camera_state)
        if state is not None:
            state = DeltaLayerState(main_state, camera_state, tails)
        return _combined(self, x, main, camera), state


def _delta_from_rays(
    shape: AttentionShape,
    heads: tuple[Array, Array, Array],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    inputs: AttentionInputs,
    layout: CausalLayout,
    key_scale: float,
    state: DeltaState | None,
) -> tuple[Float[Array, "B T S h d"], DeltaState]:
    """The delta rule as seen from the rays, float32; updates are weaker where the rays made keys longer."""
    query, key, value = (x.astype(jnp.float32) for x in heads)
    key = key * key_scale
    length = _lengths(key)
    query, key, value = _seen_from_rays(shape, (query, key, value), inputs.rays)
    longer = jnp.square(_lengths(key) / length).mean(2, keepdims=True)
    found, state = gated_delta_rule(
        masked(query, inputs.valid),
        masked(key, inputs.valid),
        masked(value, inputs.valid),
        beta / jnp.maximum(longer, 1),
        decay,
        normalise=False,
        chunk_starts=layout.block_starts,
        state=state,
        axis_name=layout.frame_axis,
    )
    return masked(from_ray(masked(found, inputs.valid), inputs.rays), inputs.valid), state


def _lengths(x: Float[Array, "*N d"]) -> Float[Array, "*N"]:
    """Lengths, at least ``_SHORTEST_KEY``; keys of nothing but zeros have a gradient of 0, where a norm's is NaN."""
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), _SHORTEST_KEY**2))


class RaySoftmaxAttention(nn.Module):
    """Both branches as softmax attention over all tokens, or over those of the blocks that a causal block sees."""

    shape: AttentionShape

    @nn.compact
    def __call__(
        self, x: Frames, inputs: AttentionInputs, layout: CausalLayout, state: SoftmaxLayerState | None = None
    ) -> tuple[Frames, SoftmaxLayerState | None]:
        """Attends; arguments and results as those of ``GatedDeltaAttention``."""
        shape, valid, visible = self.shape, inputs.valid, inputs.visible
        _gates(self, x)
        blocks = None if state is not None else layout.token_starts
        work = shape.softmax_dtype or shape.dtype

        def attend(query, key, value, cached, mask, scale, block_starts):
            query, key, value = (array.astype(work) for array in (query, key, value))
            key, value = (frames_of_all(array, layout.frame_axis) for array in (key, value))
            if cached is not None:
                key, value = (
                    jnp.concatenate([old.astype(work), new], axis=1) for old, new in zip(cached, (key, value))
                )
            tokens = [array.reshape(len(array), -1, *array.shape[3:]) for array in (query, key, value)]
            found = softmax_attention(*tokens, mask=mask, block_starts=block_starts, scale=scale, bounded_memory=True)
            return found.reshape(query.shape).astype(shape.dtype), (key, value)

        def cached(first: int) -> tuple[Array, Array] | None:
            return None if state is None else (state[first], state[first + 1])

        query, key, value = _normalised(shape, _main_projections(shape, x, valid), "")
        query, key = (_rotated(array, inputs.rotation) for array in (query, key))
        query, key, value = (masked(array, valid) for array in (query, key, value))
        mask = visible.mask if blocks is None else None
        main, seen = attend(query, key, value, cached(0), mask, shape.head_dim**-0.5, blocks)
        camera, seen_by_camera = None, seen
        if inputs.rays is not None:
            heads = _normalised(shape, _camera_projections(shape, x, valid), "_camera")
            query, key, value = _seen_from_rays(shape, heads, inputs.rays)
            query, value = masked(query, valid), masked(value, valid)
            blocks = blocks if valid is None else None
            if blocks is None:
                mask = _without_padding(visible.mask, valid, layout, 0 if state is None else state.key.shape[1])
            found, seen_by_camera = attend(query, key, value, cached(2), mask, _camera_scale(shape), blocks)
            camera = masked(from_ray(masked(found, valid), inputs.rays), valid)
        if state is not None:
            state = SoftmaxLayerState(
                *(_kept(array, old, visible) for array, old in zip((*seen, *seen_by_camera), state))
            )
        return _combined(self, x, main, camera), state


def _gates(module: nn.Module, x: Frames) -> tuple[Float[Array, "B T S h"], Float[Array, "B T h"]]:
    """Update strength of every token, and how much of the memory every frame keeps; float32."""
    heads, dtype = module.shape.num_heads, module.shape.dtype
    beta = Linear(heads, dtype=dtype, kernel_init=xavier_uniform(), name="to_beta")(x)
    gate = Linear(heads, dtype=dtype, kernel_init=xavier_uniform(), name="to_decay")(x.mean(2))
    rate = jnp.exp(module.param("decay_rate_log", _draw_rate, (heads,), jnp.float32))
    bias = module.param("decay_bias", _draw_decay_bias, (heads,), jnp.float32)
    decay = jnp.exp(-rate * jax.nn.softplus(gate.astype(jnp.float32) + bias))
    return jax.nn.sigmoid(beta.astype(jnp.float32)), decay


def _draw_rate(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """log U(0, 16), as published."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-4, 16))


def _draw_decay_bias(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """What softplus turns into a step between 0.001 and 0.1, its logarithm uniform, as published."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


def _main_projections(shape: AttentionShape, x: Frames, valid: Array | None) -> tuple[Frames, Frames, Frames]:
    """Queries, keys and values, (B, T, S, h·d) each, made in the module that calls this."""
    width = shape.num_heads * shape.head_dim
    fused = Linear(3 * width, use_bias=False, dtype=shape.dtype, kernel_init=xavier_uniform(), name="to_qkv")
    return tuple(jnp.split(masked(fused(x), valid), 3, axis=-1))


def _camera_projections(shape: AttentionShape, x: Frames, valid: Array | None) -> tuple[Frames, Frames, Frames]:
    """The same of the camera branch."""
    width = shape.num_heads * shape.head_dim

    def project(letter: str) -> Frames:
        layer = Linear(width, dtype=shape.dtype, kernel_init=xavier_uniform(), name=f"to_{letter}_camera")
        return masked(layer(x), valid)

    return tuple(project(letter) for letter in "qkv")


def _convolved(
    module: nn.Module,
    projections: tuple[Frames, Frames, Frames],
    suffix: str,
    layout: CausalLayout,
    tails: dict[str, Array] | None,
) -> tuple[Frames, Frames, Frames]:
    """Those that pass a short convolution have passed it; ``tails`` is brought up to date, where there is a state."""
    shape, found = module.shape, list(projections)
    for letter in shape.convolved:
        name, index = f"conv_{letter}{suffix}", "qkv".index(letter)
        size = (shape.conv_taps, found[index].shape[-1])
        kernel = module.param(f"{name}_kernel", _draw_identity, size, jnp.float32)
        previous = None if tails is None else tails[name]
        found[index], tail = short_convolution(
            found[index], kernel, layout.convolution_starts, previous, layout.frame_axis
        )
        if tails is not None:
            tails[name] = tail.astype(previous.dtype)
    return tuple(found)


def _draw_identity(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """A frame's own tap 1, the others 0.

    The published class starts with zeros, for weights to be loaded into it: trained from there, keys would stay 0.
    """
    return jnp.zeros(shape, dtype).at[-1].set(1)


def _normalised(shape: AttentionShape, projections: tuple[Frames, Frames, Frames], suffix: str) -> tuple[Array, ...]:
    """Normalised queries and keys, and values, in heads: (B, T, S, h, d)."""
    query, key, value = projections
    if shape.qk_norm:
        query = RMSNorm(QK_NORM_EPSILON, name=f"norm_q{suffix}")(query)
        key = RMSNorm(QK_NORM_EPSILON, name=f"norm_k{suffix}")(key)
    heads = (*query.shape[:3], shape.num_heads, shape.head_dim)
    return tuple(array.reshape(heads) for array in (query, key, value))


def _rotated(x: Float[Array, "B T S h d"], rotation: Rotation | None) -> Float[Array, "B T S h d"]:
    if rotation is None:
        return x
    tokens = (len(x), -1, *x.shape[3:])
    return rotate_pairs(x.astype(jnp.float32).reshape(tokens), *rotation).reshape(x.shape).astype(x.dtype)


def _seen_from_rays(shape: AttentionShape, heads: tuple[Array, ...], rays: RayTransforms) -> tuple[Array, ...]:
    """Queries, keys and values in the frames of their rays, float32."""
    heads = tuple(x.astype(jnp.float32) for x in heads)
    turned = query_to_ray(heads[0], rays), key_to_ray(heads[1], rays), key_to_ray(heads[2], rays)
    return tuple(shrink_to(x, y) for x, y in zip(heads, turned)) if shape.legacy else turned


def _camera_scale(shape: AttentionShape) -> float:
    """Factor of the camera branch's scores."""
    size = shape.head_dim
    if shape.legacy and size not in _FUSED_HEAD_SIZES and size < max(_FUSED_HEAD_SIZES):
        size = 128 if size <= 128 else 256
    return size**-0.5


def _without_padding(mask: Array | None, valid: Array | None, layout: CausalLayout, cached: int) -> Array | None:
    """``mask`` (·, T, F + N), of F cached frames and N given ones, without the given frames that are padding."""
    if valid is None:
        return mask
    batch, frames = valid.shape
    seen = jnp.pad(frames_of_all(valid, layout.frame_axis), [(0, 0), (cached, 0)], constant_values=True)[:, None]
    return jnp.broadcast_to(seen, (batch, frames, seen.shape[2])) if mask is None else mask & seen


def _kept(array: Float[Array, "B Q S h d"], old: Float[Array, "B F S h d"], visible: VisibleFrames) -> Array:
    """The frames of the next cache; all NaN where it has no room for them."""
    kept = jnp.take(array, visible.kept, axis=1).astype(old.dtype)
    return jnp.where(visible.overflow, jnp.nan, kept)


def _combined(module: nn.Module, x: Frames, main: Array, camera: Array | None) -> Frames:
    """Both branches' results added, gated by the input and projected; sows what each of them has found."""
    dtype, width = module.shape.dtype, x.shape[-1]
    module.sow("intermediates", "main", main)
    module.sow("intermediates", "camera", camera)
    found = main.reshape(x.shape).astype(dtype)
    if camera is not None:
        # zeros at first, as in the original training (diffusers' class does not): it begins without this branch's noise
        out = Linear(width, dtype=dtype, kernel_init=nn.initializers.zeros, name="to_out_camera")
        found = found + out(camera.reshape(x.shape).astype(dtype))
    # starts as a constant
    gate = Linear(width, dtype=dtype, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.ones, name="to_gate")
    found = (found.astype(jnp.float32) * silu(gate(x).astype(jnp.float32))).astype(dtype)
    return Linear(width, dtype=dtype, kernel_init=xavier_uniform(), name="to_out")(found)
