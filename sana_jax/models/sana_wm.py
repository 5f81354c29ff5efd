"""SANA-WM: the transformer of the camera-controlled world model, top to bottom.

Field names, parameter names and numbers of the configuration are those of the published diffusers checkpoint's
``config.json``. Most blocks remember earlier and later frames in a matrix of constant size (the gated delta rule),
every few see all tokens (softmax). The same weights run in three forms: bidirectional, in causal blocks all at once,
and one block at a time with a state.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels.split_frames import all_frames
from kernels.split_frames import first_frame as first_own_frame
from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.step_caching import Decision, StepCache
from sana_jax.errors import UserError
from sana_jax.models.sana import CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE
from sana_jax.models.sana_wm_config import SanaWMConfig
from sana_jax.models.sana_wm_state import (
    BlockState,
    SanaWMState,
    check_state,
    init_state,
    state_after,
    visible_frames,
)
from sana_jax.nn.activations import gelu_tanh
from sana_jax.nn.adaln import gated_residual, modulated_norm, modulation
from sana_jax.nn.camera_attention import (
    AttentionInputs,
    AttentionShape,
    CausalLayout,
    GatedDeltaAttention,
    RaySoftmaxAttention,
    masked,
)
from sana_jax.nn.caption_attention import CaptionAttention
from sana_jax.nn.embeddings import CaptionProjection, TimeEmbedding
from sana_jax.nn.initializers import scaled_normal, torch_uniform, xavier_uniform
from sana_jax.nn.layers import layers_of
from sana_jax.nn.linear import LORA, Linear
from sana_jax.nn.mix_ffn import TemporalGLUMBConv, check_block_starts
from sana_jax.nn.norms import RMSNorm
from sana_jax.nn.ray_transform import direction_map, ray_transforms
from sana_jax.nn.remat import BLOCK_INPUT, remat_block
from sana_jax.nn.rope import check_positions, rope_3d
from sana_jax.nn.step_cache import blocks_or_residual

__all__ = ["SanaWMConfig", "SanaWMState", "SanaWMTransformer", "init_params", "init_state"]

NORM_EPSILON = 1e-6
MAX_POSITIONS = 1024  # latent frames, rows and columns of the rotary table
DELTA_BLOCKS, SOFTMAX_BLOCKS = "delta_blocks", "softmax_blocks"


class BlockInputs(NamedTuple):
    """What all blocks share besides their input.

    Attributes:
        attention: positions, rays, padding and visibility of self-attention.
        caption: projected caption.
        caption_mask: which of its tokens are kept; None for all.
        time: the six modulation vectors of every frame.
        plucker: embedded Plücker coordinates; None for none.
    """

    attention: AttentionInputs
    caption: Float[Array, "B L D"]
    caption_mask: Bool[Array, "B L"] | None
    time: Float[Array, "B T 6 D"]
    plucker: Float[Array, "B T S D"] | None


class SanaWMBlock(nn.Module):
    """Self-attention, Plücker coordinates, cross-attention, feed-forward network.

    The first and the last are modulated and gated by each frame's time. Cross-attention reads the raw residual stream.
    """

    config: SanaWMConfig
    softmax: bool
    dtype: Any = jnp.float32
    softmax_dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T S D"],
        inputs: BlockInputs,
        layout: CausalLayout,
        state: BlockState | None = None,
    ) -> tuple[Float[Array, "B T S D"], BlockState | None]:
        """Runs the block.

        Args:
            x: frames of tokens.
            inputs: what all blocks share.
            layout: the grid and the causal blocks.
            state: this layer's part of the state.

        Returns:
            The tokens, and this layer's part of the state after the last frame.
        """
        cfg, valid = self.config, inputs.attention.valid
        batch, frames, tokens, width = x.shape
        x = masked(checkpoint_name(x, BLOCK_INPUT), valid)
        table = self.param("scale_shift_table", scaled_normal(width**-0.5), (6, width), jnp.float32)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation(table, inputs.time)

        h = masked(modulated_norm(x, shift_attn, scale_attn, NORM_EPSILON), valid)
        attention = RaySoftmaxAttention if self.softmax else GatedDeltaAttention
        attn1 = attention(attention_shape(cfg, self.dtype, self.softmax_dtype), name="attn1")
        h, attention_state = attn1(h, inputs.attention, layout, None if state is None else state.attention)
        x = masked(gated_residual(x, gate_attn, h), valid)

        if inputs.plucker is not None:
            x = x + Linear(width, dtype=self.dtype, kernel_init=xavier_uniform(), name="plucker_proj")(inputs.plucker)

        attn2 = CaptionAttention(cfg.num_attention_heads, cfg.cross_norm, dtype=self.dtype, name="attn2")
        flat = x.reshape(batch, frames * tokens, width)
        x = masked((flat + attn2(flat, inputs.caption, inputs.caption_mask)).reshape(x.shape), valid)

        h = masked(modulated_norm(x, shift_ffn, scale_ffn, NORM_EPSILON), valid)
        h, last_frame = self._feed_forward(h, layout, None if state is None else state.last_frame)
        x = masked(gated_residual(x, gate_ffn, h), valid)
        return x, None if state is None else BlockState(attention_state, last_frame)

    def _feed_forward(self, x: Array, layout: CausalLayout, previous: Array | None) -> tuple[Array, Array | None]:
        cfg, width = self.config, x.shape[-1]
        if cfg.ffn_type == "mlp":
            hidden = Linear(cfg.mlp_hidden, dtype=self.dtype, kernel_init=xavier_uniform(), name="ff_1")(x)
            out = Linear(width, dtype=self.dtype, kernel_init=xavier_uniform(), name="ff_2")(gelu_tanh(hidden))
            return out, previous
        ff = TemporalGLUMBConv(cfg.mlp_hidden, self.dtype, name="ff")
        out, last_frame = ff(x.reshape(len(x), *layout.grid, width), layout.block_starts, previous, layout.frame_axis)
        return out.reshape(x.shape), last_frame if previous is None else last_frame.astype(previous.dtype)


def attention_shape(config: SanaWMConfig, dtype: Any, softmax_dtype: Any) -> AttentionShape:
    """What self-attention's layers need of the configuration."""
    return AttentionShape(
        num_heads=config.num_heads,
        head_dim=config.linear_head_dim,
        qk_norm=config.qk_norm,
        conv_taps=config.conv_kernel_size,
        conv_keys_only=config.k_conv_only,
        legacy=config.revision == "legacy",
        dtype=dtype,
        softmax_dtype=softmax_dtype,
    )


class SanaWMTransformer(nn.Module):
    """Predicts the flow velocity ``noise - x0`` of a latent video from its noised form, times, a caption and a camera.

    Parameters of the blocks are stacked on a leading axis, in the order of the layers: under ``delta_blocks`` those
    with the gated delta rule, under ``softmax_blocks`` the others.

    Attributes:
        config: the shape.
        dtype: compute dtype; parameters are float32. Norms, modulation, the delta rule, rays, rotations and sums of
            softmax run in float32.
        remat: what the backward pass recomputes, by name: see ``sana_jax.nn.remat``.
        scan_blocks: True compiles one group of blocks, up to a softmax block, and scans it; False unrolls them, for
            debugging. Equal outputs.
        softmax_dtype: dtype to which softmax layers round queries, keys and values: bfloat16, as the published models
            do even in float32. None for no rounding.
        context_axis: inside ``jax.shard_map``, the mesh axis over whose devices frames are split in equal parts, as
            ``sana_jax.models.context_parallel`` does. Arrays then have one device's frames T, and ``block_starts``,
            ``convolution_starts`` and ``first_frame`` are those of the whole video. None: they are not split.
    """

    config: SanaWMConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_blocks: bool = True
    softmax_dtype: Any = jnp.bfloat16
    context_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B T H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, "B T"],
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        camera_conditions: Float[Array, "B T 20"] | None = None,
        chunk_plucker: Float[Array, "B T H W P"] | None = None,
        *,
        frame_valid_mask: Bool[Array, "B T"] | None = None,
        block_starts: tuple[int, ...] | None = None,
        convolution_starts: tuple[int, ...] | None = None,
        state: SanaWMState | None = None,
        first_frame: int | Int[Array, ""] = 0,
        step_cache: StepCache | None = None,
    ) -> (
        Float[Array, "B T H W C"]
        | tuple[Float[Array, "B T H W C"], SanaWMState]
        | tuple[Float[Array, "B T H W C"], StepCache, Decision]
    ):
        """Runs the network in one of its three forms.

        Without ``block_starts`` and ``state`` every frame sees every frame. With ``block_starts`` alone the video is
        cut into causal blocks: a frame sees its own block and those before it. With ``state`` what is given is the next
        block (or, with ``block_starts``, the next ones) of a longer video. The state is an argument: a caller that
        denoises a block in several passes keeps the state of the pass on the clean block (timestep 0), and drops those
        of the others.

        Args:
            hidden_states: noised latent, channels-last; height and width are multiples of the patch size.
            encoder_hidden_states: the text encoder's output.
            timestep: the time of every latent frame, 0..1000; what is behind the point is cut off, as in training. A
                given first frame has 0.
            encoder_attention_mask: 1 for caption tokens, 0 for padding; None keeps all.
            camera_conditions: of every latent frame, see ``sana_jax.camera.CameraInputs``; None for no camera branch.
                With a state they are given at every block, or at none.
            chunk_plucker: Plücker coordinates, the same; P is ``chunk_plucker_channels``.
            frame_valid_mask: False for frames that are padding: others do not depend on them, but for softmax's main
                branch, where they stay as keys of score 0, as published.
            block_starts: the first frame of every block among the T frames given, ascending from 0.
            convolution_starts: where the short convolution restarts looking ahead; None for ``block_starts``. The
                original code takes the multiples of its chunk size, where that divides the number of frames.
            state: what the blocks before have left, from ``init_state`` or an earlier call.
            first_frame: position of the first of the T frames in the whole video; it may be traced, see ``rope_3d``.
            step_cache: lets the blocks be skipped, see ``sana_jax.diffusion.step_caching``; None computes them. Not
                with a state, which is for few steps.

        Returns:
            The velocity, in the compute dtype; with ``state`` also the state after the last block; with ``step_cache``
            also that of the next step, and what was decided.

        Raises:
            UserError: sizes that do not fit the configuration, each other, the state or the table of positions.
        """
        cfg = self.config
        batch, frames, height, width, _ = hidden_states.shape
        if self.is_initializing():  # parameters of everything, whatever is given
            camera_conditions, chunk_plucker = jnp.ones((batch, frames, 20)), None
            if cfg.use_chunk_plucker_post_attn:
                chunk_plucker = jnp.zeros((*hidden_states.shape[:-1], cfg.chunk_plucker_channels))
        grid = self._check(hidden_states, timestep, camera_conditions, chunk_plucker, block_starts)
        starts = tuple(block_starts or (0,))
        restarts = starts if convolution_starts is None else tuple(convolution_starts)
        layout = CausalLayout(grid, starts, restarts, self.context_axis)
        check_block_starts(restarts, all_frames(frames, self.context_axis), "convolution_starts")
        if step_cache is not None and (state is not None or self.context_axis is not None):
            raise UserError(
                f"a step_cache with state={state is not None} and context_axis={self.context_axis!r}; allowed is "
                "neither: a block with a state takes few steps, and split frames would decide each for itself"
            )
        if state is not None:
            if self.context_axis is not None:
                raise UserError(
                    f"context_axis={self.context_axis!r} with a state: blocks with a state come one after another, and "
                    "have no frames to split; leave one of them out"
                )
            check_state(state, cfg, batch, grid[1:], camera_conditions is not None)
        camera_conditions, chunk_plucker = _without_padding(camera_conditions, chunk_plucker, frame_valid_mask)
        attention = self._attention_inputs(layout, camera_conditions, frame_valid_mask, state, first_frame)
        x = self._embed("patch_embedding", hidden_states, grid)
        plucker = None
        if chunk_plucker is not None:
            plucker = self._embed("plucker_embedding", chunk_plucker, grid, zeros=True)
        if self.is_initializing() or (camera_conditions is not None and not cfg.use_chunk_plucker_post_attn):
            # beside Plücker coordinates it is of no use, and part of every checkpoint
            x = x + self._embed("raymap_embedding", direction_map(camera_conditions, height, width), grid)

        embed_times = TimeEmbedding(cfg.hidden_size, dtype=self.dtype, name="time_embed")
        embedding, time = embed_times(jnp.trunc(timestep), None)
        caption = CaptionProjection(cfg.hidden_size, self.dtype, name="caption_projection")(encoder_hidden_states)
        if cfg.y_norm:
            caption = RMSNorm(CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE, name="caption_norm")(caption)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.astype(bool)
        inputs = BlockInputs(attention, caption, mask, time, plucker)
        skipping: list[Any] = []
        if step_cache is None:
            x, after = self._blocks(x, inputs, layout, state)
        else:
            x, *skipping = self._blocks_or_residual(x, step_cache, inputs, layout)
        velocity = self._output(x, embedding, grid)
        if step_cache is not None:
            return velocity, *skipping
        return velocity if state is None else (velocity, after)

    def _check(self, hidden_states, timestep, camera_conditions, chunk_plucker, block_starts) -> tuple[int, int, int]:
        """The grid of tokens, after a look at all shapes."""
        cfg = self.config
        batch, frames, height, width, _ = hidden_states.shape
        _, rows, columns = cfg.patch_size
        if height % rows or width % columns:
            raise UserError(
                f"latent of {height}x{width}: height and width must be multiples of the patch size {rows}x{columns}; "
                "crop or pad it"
            )
        if block_starts is not None:
            check_block_starts(tuple(block_starts), all_frames(frames, self.context_axis))
        wanted = {
            "timestep": (timestep, (batch, frames), "one for each latent frame"),
            "camera_conditions": (camera_conditions, (batch, frames, 20), "see sana_jax.camera.camera_inputs"),
            "chunk_plucker": (
                chunk_plucker,
                (batch, frames, height, width, cfg.chunk_plucker_channels),
                "see sana_jax.camera.camera_inputs",
            ),
        }
        for name, (array, shape, advice) in wanted.items():
            if array is not None and array.shape != shape:
                raise UserError(f"{name} of shape {array.shape}; allowed is {shape} here: {advice}")
        if chunk_plucker is not None and not cfg.use_chunk_plucker_post_attn:
            raise UserError(
                "chunk_plucker is given, and this network takes no Plücker coordinates "
                "(use_chunk_plucker_post_attn=False): leave it out"
            )
        return frames, height // rows, width // columns

    def _attention_inputs(self, layout, camera_conditions, frame_valid_mask, state, first_frame) -> AttentionInputs:
        """Positions, rays, padding and visibility, once for all layers."""
        cfg, grid, rotation, rays = self.config, layout.grid, None, None
        if cfg.use_pe:
            if layout.frame_axis is not None:
                known = first_frame if isinstance(first_frame, int) else 0
                check_positions(known, (all_frames(grid[0], layout.frame_axis), *grid[1:]), MAX_POSITIONS)
                first_frame = first_frame + first_own_frame(grid[0], layout.frame_axis)
            rotation = rope_3d(grid, cfg.linear_head_dim, first_frame=first_frame, max_positions=MAX_POSITIONS)
        if camera_conditions is not None:
            rays = ray_transforms(camera_conditions, grid[1:], cfg.patch_size[1:], rotation, cfg.linear_head_dim)
        valid = None if frame_valid_mask is None else frame_valid_mask.astype(bool)
        visible = visible_frames(layout.block_starts, grid[0], state, layout.frame_axis)
        return AttentionInputs(rotation, rays, valid, visible)

    def _embed(
        self, name: str, pixels: Float[Array, "B T H W C"], grid: tuple[int, int, int], zeros: bool = False
    ) -> Float[Array, "B T S D"]:
        """Each token's (row, column, channel) patch, projected."""
        batch, frames, _, _, channels = pixels.shape
        _, rows, columns = self.config.patch_size
        x = pixels.reshape(batch, frames, grid[1], rows, grid[2], columns, channels).swapaxes(3, 4)
        count = rows * columns * channels
        nothing = nn.initializers.zeros
        layer = Linear(
            self.config.hidden_size,
            dtype=self.dtype,
            kernel_init=nothing if zeros else xavier_uniform(),
            bias_init=nothing if zeros else torch_uniform(count),
            name=name,
        )
        return layer(x.reshape(batch, frames, grid[1] * grid[2], count))

    def _output(self, x: Array, embedding: Array, grid: tuple[int, int, int]) -> Float[Array, "B T H W C"]:
        """The velocity: modulated by the raw embedding of the times, projected, patches laid out."""
        cfg, batch = self.config, len(x)
        table = self.param("scale_shift_table", scaled_normal(cfg.hidden_size**-0.5), (2, cfg.hidden_size), jnp.float32)
        shift, scale = modulation(table, embedding[..., None, :])
        _, rows, columns = cfg.patch_size
        outputs = rows * columns * cfg.in_channels
        projection = Linear(outputs, dtype=self.dtype, kernel_init=xavier_uniform(), name="proj_out")
        x = projection(modulated_norm(x, shift, scale, NORM_EPSILON))
        x = x.reshape(batch, *grid, rows, columns, cfg.in_channels).swapaxes(3, 4)
        return x.reshape(batch, grid[0], grid[1] * rows, grid[2] * columns, cfg.in_channels)

    def _blocks_or_residual(
        self, x: Float[Array, "B T S D"], cache: StepCache, inputs: BlockInputs, layout: CausalLayout
    ) -> tuple[Float[Array, "B T S D"], StepCache, Decision]:
        """``_blocks``, or ``x`` and what the blocks last added; with the cache of the next step, and the decision."""
        first = SOFTMAX_BLOCKS if self.config.is_softmax(0) else DELTA_BLOCKS
        shift, scale, *_ = modulation(self.variables["params"][first]["scale_shift_table"][0], inputs.time)
        signal = modulated_norm(x, shift, scale, NORM_EPSILON)
        shape, flat = x.shape, (len(x), -1, x.shape[-1])

        def run(network, x):
            return network._blocks(x.reshape(shape), inputs, layout, None)[0].reshape(flat)

        x, *skipping = blocks_or_residual(self, x.reshape(flat), cache, signal.reshape(flat), run)
        return x.reshape(shape), *skipping

    def _blocks(
        self, x: Array, inputs: BlockInputs, layout: CausalLayout, state: SanaWMState | None
    ) -> tuple[Array, SanaWMState | None]:
        """Runs the blocks in their order."""
        if self.is_initializing():
            for name, softmax in ((DELTA_BLOCKS, False), (SOFTMAX_BLOCKS, True)):
                _make_blocks(self, name, softmax)
        stacks = tuple(_stacked_variables(self, name) for name in (DELTA_BLOCKS, SOFTMAX_BLOCKS))
        states = (None, None) if state is None else (state.delta, state.softmax)

        def run(softmax: bool, x: Array, layer: tuple[PyTree, BlockState | None]) -> tuple[Array, BlockState | None]:
            block_class = remat_block(SanaWMBlock, self.remat, static_arguments=(3,), scanned=self.scan_blocks)
            block = block_class(self.config, softmax, self.dtype, self.softmax_dtype, parent=None)
            variables, own_state = layer
            own_inputs = inputs if plucker_layers(self.config, softmax) else inputs._replace(plucker=None)
            return block.apply(variables, x, own_inputs, layout, own_state)

        order = _run_scanned if self.scan_blocks else _run_unrolled
        x, after = order(self.config, run, x, (stacks[0], states[0]), (stacks[1], states[1]))
        return x, None if state is None else state_after(state, after, inputs.attention.visible, layout)


def _run_scanned(config: SanaWMConfig, run, x: Array, delta: PyTree, softmax: PyTree) -> tuple[Array, tuple]:
    """Groups that end in a softmax block, compiled once; then the delta blocks that are left over."""
    groups = len(config.softmax_layers)
    inner = config.softmax_every_n - 1 if groups else 0

    def part(tree: PyTree, first: int, last: int, *shape: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[first:last].reshape(*shape, *leaf.shape[1:]), tree)

    grouped, rest = groups * inner, len(config.delta_layers) - groups * inner
    found: list[PyTree] = []
    softmax_states = softmax[1]
    if groups:

        def group(x, layers):
            delta_layers, softmax_layer = layers
            x, states = jax.lax.scan(functools.partial(run, False), x, delta_layers) if inner else (x, None)
            x, softmax_state = run(True, x, softmax_layer)
            return x, (states, softmax_state)

        x, (states, softmax_states) = jax.lax.scan(group, x, (part(delta, 0, grouped, groups, inner), softmax))
        if inner:
            found.append(jax.tree.map(lambda leaf: leaf.reshape(grouped, *leaf.shape[2:]), states))
    if rest:
        x, states = jax.lax.scan(functools.partial(run, False), x, part(delta, grouped, grouped + rest, rest))
        found.append(states)
    states = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found) if found else delta[1]
    return x, (states, softmax_states)


def _run_unrolled(config: SanaWMConfig, run, x: Array, delta: PyTree, softmax: PyTree) -> tuple[Array, tuple]:
    """One block after another."""
    counts, found = (len(config.delta_layers), len(config.softmax_layers)), ([], [])
    layers = [iter(layers_of(stack, count) if count else ()) for stack, count in zip((delta, softmax), counts)]
    for layer in range(config.num_layers):
        kind = int(config.is_softmax(layer))
        x, state = run(bool(kind), x, next(layers[kind]))
        found[kind].append(state)
    joined = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if states else None for states in found)
    return x, tuple(joined)


def plucker_layers(config: SanaWMConfig, softmax: bool) -> int:
    """How many of the blocks of one kind take Plücker coordinates; they are the first ones."""
    layers = config.softmax_layers if softmax else config.delta_layers
    return sum(layer < config.num_plucker_layers for layer in layers)


def _make_blocks(module: SanaWMTransformer, name: str, softmax: bool) -> None:
    """Draws the parameters of all blocks of one kind, stacked."""
    cfg = module.config
    count = len(cfg.softmax_layers if softmax else cfg.delta_layers)
    if not count:
        return
    block = SanaWMBlock(cfg, softmax, module.dtype, module.softmax_dtype, parent=None)
    with_plucker = plucker_layers(cfg, softmax)

    def one(key: PRNGKeyArray) -> PyTree:
        grid, width = (1, 1, 1), cfg.hidden_size
        tokens = jnp.zeros((1, 1, 1, width), module.dtype)
        rotation = rope_3d(grid, cfg.linear_head_dim)
        rays = ray_transforms(jnp.ones((1, 1, 20)), (1, 1), (1, 1), rotation, cfg.linear_head_dim)
        attention = AttentionInputs(rotation, rays, None, visible_frames((0,), 1, None))
        plucker = tokens if with_plucker else None
        inputs = BlockInputs(attention, jnp.zeros((1, 1, width)), None, jnp.zeros((1, 1, 6, width)), plucker)
        return block.init(key, tokens, inputs, CausalLayout(grid))["params"]

    def draw(key: PRNGKeyArray) -> PyTree:
        drawn = jax.vmap(one)(jax.random.split(key, count))
        if with_plucker:
            drawn["plucker_proj"] = jax.tree.map(lambda leaf: leaf[:with_plucker], drawn["plucker_proj"])
        return drawn

    module.param(name, draw)


def _stacked_variables(module: SanaWMTransformer, name: str) -> PyTree:
    """Parameters and LoRA of the blocks of one kind; those without Plücker coordinates add zeros of them."""
    stacks = {
        collection: module.variables[collection][name]
        for collection in ("params", LORA)
        if name in module.variables.get(collection, {})
    }
    softmax = name == SOFTMAX_BLOCKS
    cfg = module.config
    count = len(cfg.softmax_layers if softmax else cfg.delta_layers)
    missing = count - plucker_layers(cfg, softmax)
    if missing in (0, count):
        return stacks

    def fill(leaf: Array) -> Array:
        return jnp.concatenate([leaf, jnp.zeros((missing, *leaf.shape[1:]), leaf.dtype)])

    return {
        collection: {**stack, "plucker_proj": jax.tree.map(fill, stack["plucker_proj"])}
        if "plucker_proj" in stack
        else stack
        for collection, stack in stacks.items()
    }


def init_params(transformer: SanaWMTransformer, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch; under ``jax.eval_shape`` their shapes alone."""
    config = transformer.config
    latents = jnp.zeros((1, *config.patch_size, config.in_channels))
    caption = jnp.zeros((1, 1, config.caption_channels))
    return transformer.init(key, latents, caption, jnp.zeros((1, 1)))["params"]


def _without_padding(
    camera_conditions: Float[Array, "B T 20"] | None,
    chunk_plucker: Float[Array, "B T H W P"] | None,
    frame_valid_mask: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T 20"] | None, Float[Array, "B T H W P"] | None]:
    """The camera with something harmless in frames that are padding, whose numbers may be of no camera at all."""
    if frame_valid_mask is None:
        return camera_conditions, chunk_plucker
    valid = frame_valid_mask.astype(bool)
    if camera_conditions is not None:
        harmless = np.concatenate([np.eye(4).reshape(-1), np.ones(4)]).astype(np.float32)
        camera_conditions = jnp.where(valid[..., None], camera_conditions, harmless)
    return camera_conditions, None if chunk_plucker is None else masked(chunk_plucker, valid)
