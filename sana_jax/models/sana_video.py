"""SANA-Video and LongSANA: the video transformer of SANA-Video 2B, top to bottom.

Paper: SANA-Video (arXiv 2509.24695). Field names, parameter names and numbers of the configurations are those of the
published diffusers checkpoints' ``config.json``. The same weights run in three forms: bidirectional (SANA-Video), in
causal blocks all at once (LongSANA's training), and one block at a time with a state of constant size (LongSANA).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.block_linear_attention import BlockSums, init_block_sums
from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.component_config import known_fields
from sana_jax.diffusion.step_caching import Decision, StepCache
from sana_jax.errors import UserError
from sana_jax.models.sana import CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE, QK_NORM, check_field
from sana_jax.nn.adaln import gated_residual, modulated_norm, modulation
from sana_jax.nn.attention import CrossAttention, RotaryLinearSelfAttention, mask_to_bias
from sana_jax.nn.embeddings import CaptionProjection, TimeEmbedding
from sana_jax.nn.initializers import scaled_normal, torch_uniform, xavier_uniform
from sana_jax.nn.layers import run_layers
from sana_jax.nn.linear import Linear
from sana_jax.nn.mix_ffn import TemporalGLUMBConv, check_block_starts
from sana_jax.nn.norms import RMSNorm
from sana_jax.nn.remat import BLOCK_INPUT, remat_block
from sana_jax.nn.rope import Rotation, rope_3d
from sana_jax.nn.step_cache import blocks_or_residual

OUTPUT_NORM_EPSILON = 1e-6  # of the last layer norm, whatever norm_eps is
_FIXED = {  # fields of the published class that have one value here, and why
    "dropout": (0.0, "SANA-Video has no dropout inside its blocks"),
    "norm_elementwise_affine": (False, "SANA-Video's layer norms have no parameters"),
    "interpolation_scale": (None, "SANA-Video has rotary positions and no position table"),
    "guidance_embeds": (False, "SANA-Video takes no guidance scale as an input"),
}


@dataclasses.dataclass(frozen=True)
class SanaVideoConfig:
    """Shape of one SANA-Video transformer; the defaults are those of the published class, not of a published model.

    Attributes:
        in_channels: latent channels in.
        out_channels: latent channels out; None for as many as come in.
        num_attention_heads: heads of linear self-attention.
        attention_head_dim: size of each, even; heads x size is the width D.
        num_layers: blocks.
        num_cross_attention_heads: heads of softmax attention to the caption.
        cross_attention_head_dim: size of each.
        cross_attention_dim: width of the projected caption: D.
        caption_channels: width of the text encoder's output.
        mlp_ratio: hidden width of the Mix-FFN over D; the published models have 3.
        dropout: 0; the published models have none.
        attention_bias: whether q, k and v of self-attention have biases.
        sample_size: latent side the model was trained for (480p: 30; 720p: 22); also picks the table of aspect ratios.
        patch_size: latent frames, rows and columns per token: (1, 2, 2), or (1, 1, 1) where latents are 32 times
            smaller than pictures.
        norm_elementwise_affine: False; the layer norms have no parameters.
        norm_eps: the epsilon of the blocks' layer norms.
        interpolation_scale: None; there is no position table.
        guidance_embeds: False; there is no guidance embedder.
        guidance_embeds_scale: without a meaning where ``guidance_embeds`` is False.
        qk_norm: None, or ``rms_norm_across_heads`` in both attentions.
        rope_max_seq_len: rotary positions per axis, in tokens; longer videos are refused.
    """

    in_channels: int = 16
    out_channels: int | None = 16
    num_attention_heads: int = 20
    attention_head_dim: int = 112
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 30
    patch_size: tuple[int, int, int] = (1, 2, 2)
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = QK_NORM
    rope_max_seq_len: int = 1024

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "patch_size":
                continue
            check_field(f"transformer.{field.name}", field.type, value)
            if field.type.startswith("float") and value is not None:
                object.__setattr__(self, field.name, float(value))  # JSON writes 1.0 as 1
        patch = self.patch_size
        if not isinstance(patch, (tuple, list)) or len(patch) != 3 or any(type(p) is not int or p < 1 for p in patch):
            raise UserError(
                f"transformer.patch_size={patch!r} is not allowed; allowed are three whole numbers for frames, rows "
                "and columns, such as (1, 2, 2)"
            )
        object.__setattr__(self, "patch_size", tuple(patch))
        if patch[0] != 1:
            raise UserError(f"transformer.patch_size={patch}: every latent frame has its own tokens; begin it with 1")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"transformer.norm_eps={self.norm_eps} is not allowed; 1e-6 is the published one")
        if self.mlp_hidden < 1:
            raise UserError(f"transformer.mlp_ratio={self.mlp_ratio} leaves no hidden channel; 3 is the published one")
        if self.qk_norm not in (None, QK_NORM):
            raise UserError(f"qk_norm={self.qk_norm!r} is not known; choose None or {QK_NORM!r}")
        for name, (allowed, reason) in _FIXED.items():
            if getattr(self, name) != allowed:
                raise UserError(f"{name}={getattr(self, name)}: {reason}; set it to {allowed}")
        if self.cross_attention_dim != self.inner_dim:
            raise UserError(
                f"cross_attention_dim={self.cross_attention_dim}: the caption is projected to the width "
                f"num_attention_heads x attention_head_dim = {self.inner_dim}; set it to that"
            )
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise UserError(
                f"attention_head_dim={self.attention_head_dim}: rotary positions of three axes need an even head size "
                "of at least 6; change it"
            )

    @property
    def inner_dim(self) -> int:
        """Width D of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the Mix-FFN."""
        return int(self.inner_dim * self.mlp_ratio)

    @property
    def velocity_channels(self) -> int:
        """Latent channels that come out."""
        return self.out_channels or self.in_channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SanaVideoConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "transformer", "SANA-Video's"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        fields = {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}
        return {"_class_name": "SanaVideoTransformer3DModel", **fields}

    @classmethod
    def sana_video_2b_480p(cls, **changes) -> SanaVideoConfig:
        """SANA-Video 2B and LongSANA at 480p, on latents of Wan 2.1."""
        return cls(**{"mlp_ratio": 3.0, **changes})

    @classmethod
    def sana_video_2b_720p(cls, **changes) -> SanaVideoConfig:
        """SANA-Video 2B at 720p, on latents of LTX-2; with DC-AE-V ``in_channels=32, out_channels=32``."""
        sizes = {"in_channels": 128, "out_channels": 128, "sample_size": 22, "patch_size": (1, 1, 1)}
        return cls(**{"mlp_ratio": 3.0, **sizes, **changes})


class SanaVideoState(NamedTuple):
    """What the blocks of a video leave for the next ones: of one size, however long the video is.

    Attributes:
        attention: the sums of linear attention, float32, with the layer on the first axis.
        last_frame: the Mix-FFN's last frame before its convolution over frames, (layers, B, h, w, D).
    """

    attention: BlockSums
    last_frame: Any


def init_state(
    config: SanaVideoConfig,
    batch_size: int,
    grid: tuple[int, int],
    num_cached_blocks: int | None = None,
    dtype: Any = jnp.float32,
) -> SanaVideoState:
    """The state before the first block: zeros.

    Args:
        config: the network's shape.
        batch_size: samples.
        grid: height and width of a frame in tokens: latent size over patch size.
        num_cached_blocks: how many earlier blocks a block sees; None for all of them. Either way the state is
            constant in size: one sum of all, or one sum for each of the last n.
        dtype: of the frame that the Mix-FFN keeps; the network's compute dtype holds it exactly.

    Raises:
        UserError: a window of no block.
    """
    if num_cached_blocks is not None and num_cached_blocks < 1:
        raise UserError(
            f"num_cached_blocks={num_cached_blocks} is not allowed; choose 1 or more, or None for all earlier blocks"
        )
    heads = (config.num_attention_heads, config.attention_head_dim)
    sums = init_block_sums(batch_size, *heads, num_cached_blocks=num_cached_blocks)
    layers = config.num_layers
    sums = jax.tree.map(lambda array: jnp.zeros((layers, *array.shape), array.dtype), sums)
    return SanaVideoState(sums, jnp.zeros((layers, batch_size, *grid, config.inner_dim), dtype))


class StateBytes(NamedTuple):
    """Bytes of a ``SanaVideoState`` for one layer, and for all."""

    sums: int
    last_frame: int
    per_layer: int
    total: int


def state_bytes(
    config: SanaVideoConfig,
    grid: tuple[int, int],
    batch_size: int = 1,
    num_cached_blocks: int | None = None,
    dtype: Any = jnp.float32,
) -> StateBytes:
    """How much memory the state takes; arguments as in ``init_state``. The length of the video is none of them.

    SANA-Video 2B at 480p (832 x 480 pixels: 30 x 52 tokens per latent frame): 1,012,480 bytes of sums and, in
    bfloat16, 6,988,800 bytes of frame, together 8.0 MB per layer and 160 MB for the network, for a second as for an
    hour. Keys and values of softmax attention (``kv_cache_bytes``) would take 13,977,600 bytes per layer and latent
    frame: more than this state after a single one, and 3.4 GB per layer after a minute (241 latent frames).
    """
    state = jax.eval_shape(lambda: init_state(config, batch_size, grid, num_cached_blocks, dtype))

    def count(tree: PyTree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    sums, frame = count(state.attention), count(state.last_frame)
    layers = config.num_layers
    return StateBytes(sums // layers, frame // layers, (sums + frame) // layers, sums + frame)


def kv_cache_bytes(
    config: SanaVideoConfig,
    grid: tuple[int, int],
    frames: int,
    batch_size: int = 1,
    dtype: Any = jnp.bfloat16,
) -> int:
    """Bytes per layer of the keys and values that softmax attention of this width would keep of ``frames`` frames."""
    return 2 * batch_size * frames * math.prod(grid) * config.inner_dim * jnp.dtype(dtype).itemsize


def init_params(transformer: SanaVideoTransformer, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch; under ``jax.eval_shape`` their shapes alone."""
    config = transformer.config
    latents = jnp.zeros((1, *config.patch_size, config.in_channels))
    caption = jnp.zeros((1, 1, config.caption_channels))
    return transformer.init(key, latents, caption, jnp.zeros(1))["params"]


class SanaVideoBlock(nn.Module):
    """Linear self-attention, cross-attention, temporal Mix-FFN; the first and the last are modulated and gated by time.

    Cross-attention reads the raw residual stream: it has no norm, no modulation and no gate.
    """

    config: SanaVideoConfig
    dtype: jnp.dtype = jnp.float32
    attention_epsilon: float = 1e-15

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        caption: Float[Array, "B L D"],
        caption_bias: Float[Array, "B 1 1 L"] | None,
        time: Float[Array, "B T 6 D"] | Float[Array, "B 1 6 D"],
        rotation: Rotation,
        grid: tuple[int, int, int],
        block_starts: tuple[int, ...] = (0,),
        state: SanaVideoState | None = None,
    ) -> tuple[Float[Array, "B N D"], SanaVideoState | None]:
        """Runs the block on the ``grid`` (frames, height, width) of tokens.

        Args:
            x: tokens, row-major in the grid.
            caption: projected caption.
            caption_bias: see ``mask_to_bias``.
            time: the six modulation vectors, of the sample or of each of its frames.
            rotation: the tokens' angles.
            grid: frames, height, width.
            block_starts: first frame of every causal block; there is but one without a state.
            state: this layer's part of the state, without the layer axis.

        Returns:
            The tokens, and this layer's part of the state after the last causal block.
        """
        cfg = self.config
        (batch, tokens, features), (frames, height, width) = x.shape, grid
        by_frame, per_frame = (batch, frames, height * width, features), height * width
        qk_norm = cfg.qk_norm is not None
        x = checkpoint_name(x, BLOCK_INPUT)
        table = self.param("scale_shift_table", scaled_normal(features**-0.5), (6, features), jnp.float32)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation(table, time)

        x = x.reshape(by_frame)
        h = modulated_norm(x, shift_attn, scale_attn, cfg.norm_eps).reshape(batch, tokens, features)
        heads = (cfg.num_attention_heads, cfg.attention_head_dim)
        attn1 = RotaryLinearSelfAttention(
            *heads, qk_norm, cfg.attention_bias, self.dtype, self.attention_epsilon, name="attn1"
        )
        token_starts = tuple(start * per_frame for start in block_starts)
        h, sums = attn1(h, rotation, token_starts, None if state is None else state.attention)
        x = gated_residual(x, gate_attn, h.reshape(by_frame)).reshape(batch, tokens, features)

        attn2 = CrossAttention(
            cfg.num_cross_attention_heads, cfg.cross_attention_head_dim, qk_norm, self.dtype, name="attn2"
        )
        x = x + attn2(x, caption, caption_bias)

        x = x.reshape(by_frame)
        h = modulated_norm(x, shift_ffn, scale_ffn, cfg.norm_eps).reshape(batch, *grid, features)
        ff = TemporalGLUMBConv(cfg.mlp_hidden, self.dtype, name="ff")
        h, last_frame = ff(h, block_starts, None if state is None else state.last_frame)
        x = gated_residual(x, gate_ffn, h.reshape(by_frame)).reshape(batch, tokens, features)
        return x, None if state is None else SanaVideoState(sums, last_frame.astype(state.last_frame.dtype))


class SanaVideoTransformer(nn.Module):
    """Predicts the flow velocity ``noise - x0`` of a latent video from its noised form, the time and a caption.

    Parameters of the blocks are stacked on a leading layer axis under ``transformer_blocks``, in both forms below.

    Attributes:
        config: the shape.
        dtype: compute dtype; parameters are float32, norms, modulation, softmax, rotations and attention sums run in
            float32.
        remat: what the backward pass recomputes, by name: see ``sana_jax.nn.remat``.
        scan_blocks: True compiles one block and scans it; False unrolls the blocks, for debugging. Equal outputs. Both
            sow ``block_outputs`` (layers, B, N, D) among the ``intermediates``.
        attention_epsilon: what linear attention adds to its normaliser. The published runtime has 1e-15, the training
            code 1e-8; the difference is seen only where a query meets next to no key.
    """

    config: SanaVideoConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_blocks: bool = True
    attention_epsilon: float = 1e-15

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B T H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        *,
        block_starts: tuple[int, ...] | None = None,
        state: SanaVideoState | None = None,
        first_frame: int | Int[Array, ""] = 0,
        step_cache: StepCache | None = None,
    ) -> (
        Float[Array, "B T H W Cout"]
        | tuple[Float[Array, "B T H W Cout"], SanaVideoState]
        | tuple[Float[Array, "B T H W Cout"], StepCache, Decision]
    ):
        """Runs the network in one of its three forms.

        Without ``block_starts`` and ``state`` every frame sees every frame. With ``block_starts`` alone the video is
        cut into causal blocks: linear attention sees a frame's own block and those before it, and the convolution over
        frames its own block and one frame before it. With ``state`` what is given is the next block (or, with
        ``block_starts``, the next ones) of a longer video. The state is an argument: a caller that denoises a block in
        several passes keeps the state of the pass on the clean block (timestep 0), and drops those of the others.

        Args:
            hidden_states: noised latent, channels-last; height and width are multiples of the patch size.
            encoder_hidden_states: the text encoder's output.
            timestep: the time, 0..1000, of each sample or of each of its latent frames. It is taken as it is; the
                original training code and samplers cut it to a whole number beforehand.
            encoder_attention_mask: 1 for caption tokens, 0 for padding; None keeps all.
            block_starts: the first frame of every block among the T frames given, ascending from 0.
            state: what the blocks before have left, from ``init_state`` or an earlier call.
            first_frame: position of the first of the T frames in the whole video; it may be traced, see ``rope_3d``.
            step_cache: lets the blocks be skipped, see ``sana_jax.diffusion.step_caching``; None computes them. Not
                with a state, which is for few steps.

        Returns:
            The velocity, in the compute dtype; with ``state`` also the state after the last block; with ``step_cache``
            also that of the next step, and what was decided.

        Raises:
            UserError: sizes that do not fit the patch size, the state or the table of rotary positions.
        """
        cfg = self.config
        batch, frames = hidden_states.shape[:2]
        grid = self._check(hidden_states, timestep)
        if block_starts is not None:
            check_block_starts(tuple(block_starts), frames)
        rotation = rope_3d(grid, cfg.attention_head_dim, first_frame=first_frame, max_positions=cfg.rope_max_seq_len)
        wants_state = state is not None
        if wants_state and step_cache is not None:
            raise UserError("a state and a step_cache; allowed is one of them: a block with a state takes few steps")
        if wants_state:
            _check_state(state, cfg, batch, grid[1:])
        elif block_starts is not None:
            state = init_state(cfg, batch, grid[1:], dtype=self.dtype)

        x = self._embed(hidden_states, grid)
        # One embedding for every time that was given, and none for every token.
        embed_times = TimeEmbedding(cfg.inner_dim, dtype=self.dtype, name="time_embed")
        embedding, time = embed_times(timestep.reshape(batch, -1), None)
        caption = CaptionProjection(cfg.inner_dim, self.dtype, name="caption_projection")(encoder_hidden_states)
        caption = RMSNorm(CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE, name="caption_norm")(caption)
        bias = None if encoder_attention_mask is None else mask_to_bias(encoder_attention_mask)

        context, skipping = (caption, bias, time, rotation, grid, tuple(block_starts or (0,))), ()
        if step_cache is None:
            x, state = self._blocks(x, context, state)
        else:
            x, *skipping = self._blocks_or_residual(x, step_cache, context, state)

        velocity = self._output(x, embedding, grid)
        if step_cache is not None:
            return velocity, *skipping
        return (velocity, state) if wants_state else velocity

    def _check(self, hidden_states: Array, timestep: Array) -> tuple[int, int, int]:
        """The grid of tokens, after a look at the shapes."""
        batch, frames, height, width, _ = hidden_states.shape
        _, rows, columns = self.config.patch_size
        if height % rows or width % columns:
            raise UserError(
                f"latent of {height}x{width}: height and width must be multiples of the patch size {rows}x{columns}; "
                "crop or pad it"
            )
        if timestep.shape not in ((batch,), (batch, frames)):
            raise UserError(
                f"timestep of shape {timestep.shape}: allowed are one per sample ({batch},) or one per latent frame "
                f"({batch}, {frames})"
            )
        return frames, height // rows, width // columns

    def _embed(self, latents: Float[Array, "B T H W C"], grid: tuple[int, int, int]) -> Float[Array, "B N D"]:
        """Each token's (row, column, channel) patch, projected."""
        batch, frames, _, _, channels = latents.shape
        _, rows, columns = self.config.patch_size
        x = latents.reshape(batch, frames, grid[1], rows, grid[2], columns, channels).swapaxes(3, 4)
        count = rows * columns * channels
        layer = Linear(
            self.config.inner_dim,
            dtype=self.dtype,
            kernel_init=xavier_uniform(),
            bias_init=torch_uniform(count),
            name="patch_embedding",
        )
        return layer(x.reshape(batch, math.prod(grid), count))

    def _output(
        self, x: Float[Array, "B N D"], embedding: Float[Array, "B G D"], grid: tuple[int, int, int]
    ) -> Float[Array, "B T H W Cout"]:
        """The velocity: modulated by the raw embedding of the times, projected, patches laid out."""
        cfg, batch = self.config, len(x)
        table = self.param("scale_shift_table", scaled_normal(cfg.inner_dim**-0.5), (2, cfg.inner_dim), jnp.float32)
        shift, scale = modulation(table, embedding[..., None, :])
        _, rows, columns = cfg.patch_size
        outputs = rows * columns * cfg.velocity_channels
        projection = Linear(outputs, dtype=self.dtype, kernel_init=xavier_uniform(), name="proj_out")
        x = x.reshape(batch, grid[0], -1, cfg.inner_dim)
        x = projection(modulated_norm(x, shift, scale, OUTPUT_NORM_EPSILON))
        x = x.reshape(batch, *grid, rows, columns, cfg.velocity_channels).swapaxes(3, 4)
        return x.reshape(batch, grid[0], grid[1] * rows, grid[2] * columns, cfg.velocity_channels)

    def _blocks_or_residual(
        self, x: Float[Array, "B N D"], cache: StepCache, context: tuple, state: SanaVideoState | None
    ) -> tuple[Float[Array, "B N D"], StepCache, Decision]:
        """``_blocks``, or ``x`` and what the blocks last added; with the cache of the next step, and the decision."""
        time, grid = context[2], context[4]
        table = self.variables["params"]["transformer_blocks"]["scale_shift_table"][0]
        shift, scale, *_ = modulation(table, time)
        by_frame = x.reshape(len(x), grid[0], -1, x.shape[-1])
        signal = modulated_norm(by_frame, shift, scale, self.config.norm_eps).reshape(x.shape)
        return blocks_or_residual(self, x, cache, signal, lambda network, x: network._blocks(x, context, state)[0])

    def _blocks(
        self, x: Float[Array, "B N D"], context: tuple, state: SanaVideoState | None
    ) -> tuple[Float[Array, "B N D"], SanaVideoState | None]:
        """Runs the blocks over ``x``; sows all blocks' outputs, stacked."""
        scanned = self.scan_blocks or self.is_initializing()
        keep_outputs = self.is_mutable_collection("intermediates")
        block_class = remat_block(SanaVideoBlock, self.remat, static_arguments=(6, 7), scanned=scanned)
        block = block_class(self.config, self.dtype, self.attention_epsilon, name="transformer_blocks")

        def step(block, x, own_state):
            return block(x, *context, own_state)

        layers = self.config.num_layers
        x, state, outputs = run_layers(block, step, x, state, layers, scanned=scanned, keep_outputs=keep_outputs)
        if keep_outputs:
            self.sow("intermediates", "block_outputs", outputs)
        return x, state


def _check_state(state: SanaVideoState, config: SanaVideoConfig, batch: int, grid: tuple[int, int]) -> None:
    wanted = (config.num_layers, batch, *grid, config.inner_dim)
    if state.last_frame.shape != wanted:
        names = "layers, batch, token rows, token columns, width"
        raise UserError(
            f"the state is for {state.last_frame.shape} ({names}) and this block has {wanted}; start with init_state "
            "for this size"
        )
