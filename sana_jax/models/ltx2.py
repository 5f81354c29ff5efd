"""The video half of LTX-2's transformer, which refines SANA-WM's videos, top to bottom.

Paper: LTX-2 (arXiv 2601.03233). Field names, parameter names and numbers of the configurations are those of the
published diffusers checkpoints. The same weights run in two forms: on a whole video, whose tokens all see each other,
and on one block of a longer one, whose tokens also see keys and values of earlier frames (``ltx2_prefix``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.ltx2_prefix import LTX2Prefix, prefix_mask
from sana_jax.nn.adaln import gated_residual, modulated_norm, modulation
from sana_jax.nn.embeddings import CaptionProjection, TimeEmbedding
from sana_jax.nn.initializers import scaled_normal, torch_uniform
from sana_jax.nn.layers import run_layers
from sana_jax.nn.linear import Linear
from sana_jax.nn.ltx2_layers import KeysValues, LTX2Attention, LTX2FeedForward, bare_rms_norm, modulated_rms_norm
from sana_jax.nn.ltx2_rope import GridRotation, HeadRotation, rotate_heads, spread
from sana_jax.nn.remat import BLOCK_INPUT, remat_block

OUTPUT_NORM_EPSILON = 1e-6  # of the last layer norm, whatever norm_eps is
# What a call returns of every layer's keys, with the values: as they are before the rotation, or after it.
UNROTATED, ROTATED = "unrotated", "rotated"
CAPTURES = (UNROTATED, ROTATED)


class Shared(NamedTuple):
    """What all blocks of a call are given; the last three are None where nothing asks for them."""

    prompt: Float[Array, "B L D"]
    prompt_mask: Bool[Array, "B L"] | None
    time: Float[Array, "B G 6 D"]
    rotation: HeadRotation
    sink_rotation: HeadRotation | None
    key_mask: Bool[Array, "B P"] | None


def init_params(transformer: LTX2VideoTransformer, key: PRNGKeyArray) -> PyTree:
    """Random parameters; under ``jax.eval_shape`` their shapes alone."""
    config = transformer.config
    latents, prompt = jnp.zeros((1, 1, 1, 1, config.in_channels)), jnp.zeros((1, 1, config.caption_channels))
    rotation = config.rotation((1, 1, 1), fps=16)
    return transformer.init(key, latents, prompt, jnp.zeros(1), rotation=rotation)["params"]


class LTX2Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; the first and the last are modulated and gated by time."""

    config: LTX2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        shared: Shared,
        prefix: tuple[KeysValues, KeysValues] | None = None,
        capture: str | None = None,
    ) -> tuple[Float[Array, "B N D"], KeysValues | None]:
        """Runs the block.

        Args:
            x: tokens.
            shared: what all blocks are given.
            prefix: this layer's part of the sink and of the history, without the layer axis.
            capture: see the transformer.

        Returns:
            The tokens, and the keys and values of this layer that ``capture`` asks for.
        """
        cfg = self.config
        batch, tokens, features = x.shape
        by_time = (batch, shared.time.shape[1], -1, features)
        x = checkpoint_name(x, BLOCK_INPUT)
        table = self.param("scale_shift_table", scaled_normal(features**-0.5), (6, features), jnp.float32)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation(table, shared.time)

        def attention(name: str) -> LTX2Attention:
            heads, biases = (
                (cfg.num_attention_heads, cfg.attention_head_dim),
                (cfg.attention_bias, cfg.attention_out_bias),
            )
            return LTX2Attention(*heads, cfg.rope_type, cfg.gated_attn, *biases, self.dtype, name=name)

        x = x.reshape(by_time)
        h = modulated_rms_norm(x, shift_attn, scale_attn, cfg.norm_eps).reshape(batch, tokens, features)
        h, unrotated, rotated = attention("attn1")(
            h,
            rotation=shared.rotation,
            key_mask=shared.key_mask,
            prefix=() if prefix is None else _rotated_prefix(*prefix, shared.sink_rotation, cfg.rope_type),
        )
        x = gated_residual(x, gate_attn, h.reshape(x.shape)).reshape(batch, tokens, features)

        h = bare_rms_norm(x, cfg.norm_eps).astype(x.dtype)
        x = x + attention("attn2")(h, shared.prompt, key_mask=shared.prompt_mask)[0]

        x = x.reshape(by_time)
        h = modulated_rms_norm(x, shift_ff, scale_ff, cfg.norm_eps)
        h = LTX2FeedForward(cfg.ff_bias, self.dtype, name="ff")(h.reshape(batch, tokens, features))
        x = gated_residual(x, gate_ff, h.reshape(x.shape)).reshape(batch, tokens, features)
        return x, {None: None, UNROTATED: unrotated, ROTATED: rotated}[capture]


def _rotated_prefix(
    sink: KeysValues, history: KeysValues, rotation: HeadRotation, rope_type: str
) -> tuple[KeysValues, KeysValues]:
    """The sink, turned to its place before this block, and the history's tokens in a row."""
    batch, _, _, *heads = history.key.shape
    turned = KeysValues(rotate_heads(sink.key, rotation, rope_type), sink.value)
    return turned, KeysValues(*(ring.reshape(batch, -1, *heads) for ring in history))


class LTX2VideoTransformer(nn.Module):
    """Predicts the flow velocity ``noise - x0`` of a latent video from its noised form, the time and a prompt.

    Parameters of the blocks are stacked on a leading layer axis under ``transformer_blocks``, in both forms below.

    Attributes:
        config: the shape.
        dtype: compute dtype; parameters are float32, norms, modulation, softmax, rotations and gates run in float32.
        remat: what the backward pass recomputes, by name: see ``sana_jax.nn.remat``.
        scan_blocks: True compiles one block and scans it; False unrolls the blocks, for debugging. Equal outputs. Both
            sow ``block_outputs`` (layers, B, N, D) among the ``intermediates``.
    """

    config: LTX2Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_blocks: bool = True

    def setup(self) -> None:
        """Makes the layers; those of the blocks are one module that stands for all of them."""
        cfg = self.config
        self.proj_in = Linear(cfg.inner_dim, dtype=self.dtype, kernel_init=torch_uniform(cfg.in_channels))
        self.time_embed = TimeEmbedding(cfg.inner_dim, dtype=self.dtype)
        self.caption_projection = CaptionProjection(cfg.inner_dim, self.dtype)
        self.transformer_blocks = self._block_class()(cfg, self.dtype)
        init = scaled_normal(cfg.inner_dim**-0.5)
        self.scale_shift_table = self.param("scale_shift_table", init, (2, cfg.inner_dim), jnp.float32)
        init = torch_uniform(cfg.inner_dim)
        self.proj_out = Linear(cfg.velocity_channels, dtype=self.dtype, kernel_init=init)

    def __call__(
        self,
        hidden_states: Float[Array, "B T H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, " B"] | Float[Array, "B T"] | Float[Array, "B N"],
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        *,
        rotation: GridRotation,
        frame_valid_mask: Bool[Array, "B T"] | None = None,
        prefix: LTX2Prefix | None = None,
        sink_rotation: GridRotation | None = None,
        capture: str | None = None,
    ) -> Float[Array, "B T H W Cout"] | tuple[Float[Array, "B T H W Cout"], KeysValues]:
        """Runs the network on a whole video, or, with a ``prefix``, on one block of a longer one.

        Args:
            hidden_states: noised latent, channels-last.
            encoder_hidden_states: the text connectors' output.
            timestep: the time, 0..1000, of each sample, of each of its latent frames, or of each of its tokens. It is
                taken as it is, fractions included.
            encoder_attention_mask: 1 for prompt tokens, 0 for padding; None keeps all. A prompt that is all padding
                attends as if it were unmasked.
            rotation: the tokens' positions, from ``LTX2Config.rotation``.
            frame_valid_mask: True for frames; False for those that only fill a last block up: no token sees these, and
                what comes out of them is to be dropped.
            prefix: keys and values of earlier frames.
            sink_rotation: the positions of the prefix's sink, from ``LTX2Config.rotation``.
            capture: also return the keys and values of the given tokens from every layer: ``unrotated`` to make a sink
                of them, ``rotated`` for the history.

        Returns:
            The velocity, in the compute dtype; with ``capture`` also the keys and values, (layers, B, N, h, d).

        Raises:
            UserError: sizes that do not fit each other, or a ``capture`` that is not known.
        """
        check_capture(capture)
        x, shared, embedding = self.enter(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask,
            rotation=rotation,
            frame_valid_mask=frame_valid_mask,
            prefix=prefix,
            sink_rotation=sink_rotation,
        )
        x, captured = self._blocks(x, shared, prefix, capture)
        velocity = self.finish(x, embedding, hidden_states.shape[1:4])
        return velocity if capture is None else (velocity, captured)

    # The two ends of a call, as methods of their own for those who run the blocks one by one.

    def enter(
        self,
        hidden_states: Float[Array, "B T H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, " B"] | Float[Array, "B T"] | Float[Array, "B N"],
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        *,
        rotation: GridRotation,
        frame_valid_mask: Bool[Array, "B T"] | None = None,
        prefix: LTX2Prefix | None = None,
        sink_rotation: GridRotation | None = None,
    ) -> tuple[Float[Array, "B N D"], Shared, Float[Array, "B G D"]]:
        """What comes before the blocks; arguments and errors as in ``__call__``.

        Returns:
            The tokens, what all blocks are given, and the embedded times, which ``finish`` takes.
        """
        cfg = self.config
        batch, *grid, _ = hidden_states.shape
        _check_call(cfg, hidden_states.shape, timestep.shape, rotation, frame_valid_mask)
        sink_rotation = _check_prefix(cfg, prefix, sink_rotation, batch, grid)
        x = self.proj_in(hidden_states).reshape(batch, math.prod(grid), cfg.inner_dim)

        # One embedding for every time that was given, and none for every token.
        embedding, time = self.time_embed(timestep.reshape(batch, -1), None)
        shared = Shared(
            self.caption_projection(encoder_hidden_states),
            _prompt_mask(encoder_attention_mask),
            time,
            spread(rotation, cfg.num_attention_heads, cfg.attention_head_dim),
            sink_rotation,
            _key_mask(prefix, frame_valid_mask, batch, grid),
        )
        return x, shared, embedding

    def finish(
        self, x: Float[Array, "B N D"], embedding: Float[Array, "B G D"], grid: tuple[int, int, int]
    ) -> Float[Array, "B T H W Cout"]:
        """What comes behind the blocks: the velocity of their tokens, which are those of ``grid``."""
        batch, width = x.shape[0], self.config.inner_dim
        shift, scale = modulation(self.scale_shift_table, embedding[..., None, :])
        x = x.reshape(batch, embedding.shape[1], -1, width)
        return self.proj_out(modulated_norm(x, shift, scale, OUTPUT_NORM_EPSILON).reshape(batch, *grid, width))

    def _scanned(self) -> bool:
        return self.scan_blocks or self.is_initializing()

    def _block_class(self) -> type[nn.Module]:
        return remat_block(LTX2Block, self.remat, static_arguments=(4,), scanned=self._scanned())

    def _blocks(
        self, x: Float[Array, "B N D"], shared: Shared, prefix: LTX2Prefix | None, capture: str | None
    ) -> tuple[Float[Array, "B N D"], KeysValues | None]:
        """Runs the blocks over ``x``; sows all blocks' outputs, stacked."""
        keep_outputs = self.is_mutable_collection("intermediates")
        by_layer = None if prefix is None else (prefix.sink, prefix.history)

        def step(block, x, own_prefix):
            return block(x, shared, own_prefix, capture)

        layers, options = self.config.num_layers, {"scanned": self._scanned(), "keep_outputs": keep_outputs}
        x, captured, outputs = run_layers(self.transformer_blocks, step, x, by_layer, layers, **options)
        if keep_outputs:
            self.sow("intermediates", "block_outputs", outputs)
        return x, captured


def _prompt_mask(mask: Int[Array, "B L"] | None) -> Bool[Array, "B L"] | None:
    """Which tokens of the prompt are seen: all, where there is nothing but padding."""
    if mask is None:
        return None
    seen = mask != 0
    return seen | ~seen.any(-1, keepdims=True)


def _key_mask(
    prefix: LTX2Prefix | None, frame_valid_mask: Bool[Array, "B T"] | None, batch: int, grid: list[int]
) -> Bool[Array, "B P"] | None:
    """Which keys of self-attention are seen, the prefix's first; None for all."""
    if prefix is None and frame_valid_mask is None:
        return None
    per_frame = grid[1] * grid[2]
    if frame_valid_mask is None:
        own = jnp.ones((batch, grid[0] * per_frame), bool)
    else:
        own = jnp.repeat(frame_valid_mask.astype(bool), per_frame, axis=1)
    if prefix is None:
        return own
    earlier = prefix_mask(prefix)
    return jnp.concatenate([jnp.broadcast_to(earlier, (batch, earlier.size)), own], axis=1)


def check_capture(capture: str | None) -> None:
    """Raises ``UserError`` for a ``capture`` that is not known."""
    if capture not in (None, *CAPTURES):
        raise UserError(f"capture={capture!r} is not known; choose None or one of {', '.join(CAPTURES)}")


def _check_call(
    config: LTX2Config,
    latents: tuple[int, ...],
    times: tuple[int, ...],
    rotation: GridRotation,
    frame_valid_mask: Bool[Array, "B T"] | None,
) -> None:
    batch, *grid, channels = latents
    if channels != config.in_channels:
        raise UserError(f"latents have {channels} channels and this network takes {config.in_channels}; give it those")
    if rotation.grid != tuple(grid):
        raise UserError(f"the rotation is for a grid of {rotation.grid} and the latents have {tuple(grid)}; make it so")
    allowed = ((batch,), (batch, grid[0]), (batch, math.prod(grid)))
    if times not in allowed:
        raise UserError(
            f"timestep of shape {times}: allowed are one per sample {allowed[0]}, one per latent frame {allowed[1]} or "
            f"one per token {allowed[2]}"
        )
    if frame_valid_mask is not None and frame_valid_mask.shape != (batch, grid[0]):
        raise UserError(f"frame_valid_mask of shape {frame_valid_mask.shape}: allowed is {(batch, grid[0])}")


def _check_prefix(
    config: LTX2Config,
    prefix: LTX2Prefix | None,
    sink_rotation: GridRotation | None,
    batch: int,
    grid: list[int],
) -> HeadRotation | None:
    """The sink's rotation by head, where there is a prefix and it fits."""
    if (prefix is None) != (sink_rotation is None):
        raise UserError("a prefix and the sink_rotation of its first frames belong together; give both or neither")
    if prefix is None:
        return None
    heads = (config.num_attention_heads, config.attention_head_dim)
    per_frame = grid[1] * grid[2]
    layers = config.num_layers
    sink = (layers, batch, math.prod(sink_rotation.grid), *heads)
    history = (layers, batch, prefix.capacity, per_frame, *heads)
    found = (prefix.sink.key.shape, prefix.history.key.shape)
    if found != (sink, history) or sink_rotation.grid[1:] != tuple(grid[1:]):
        raise UserError(
            f"the prefix has a sink of {found[0]} and a history of {found[1]}, and this block has {sink} and {history} "
            "(layers, batch, tokens or frames and tokens, heads, head size); start with init_prefix for this size"
        )
    return spread(sink_rotation, *heads)
