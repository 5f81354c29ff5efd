"""SANA: the image transformer of SANA 0.6B and 1.6B, SANA-1.5 and SANA-Sprint, top to bottom.

Papers: SANA (arXiv 2410.10629), SANA-1.5 (arXiv 2501.18427), SANA-Sprint (arXiv 2503.09641). Field names, parameter
names and numbers of the configurations are those of the published diffusers checkpoints' ``config.json``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.component_config import known_fields
from sana_jax.diffusion.step_caching import Decision, StepCache
from sana_jax.errors import UserError
from sana_jax.models.condition_tokens import ConditionTokens, append_tokens, bias_with_tokens
from sana_jax.nn.adaln import gated_residual, modulated_norm, modulation
from sana_jax.nn.attention import CrossAttention, LinearSelfAttention, mask_to_bias
from sana_jax.nn.embeddings import CaptionProjection, PatchEmbed, TimeEmbedding, sincos_position_table
from sana_jax.nn.initializers import scaled_normal, xavier_uniform
from sana_jax.nn.layers import run_layers
from sana_jax.nn.linear import Linear
from sana_jax.nn.mix_ffn import GLUMBConv
from sana_jax.nn.norms import RMSNorm
from sana_jax.nn.remat import BLOCK_INPUT, remat_block
from sana_jax.nn.step_cache import blocks_or_residual

QK_NORM = "rms_norm_across_heads"
CAPTION_NORM_EPSILON = 1e-5
OUTPUT_NORM_EPSILON = 1e-6  # of the last layer norm, whatever norm_eps is
_LARGEST_SIZE = 1_000_000  # of any field of a configuration; a file that asks for more is damaged
# The caption norm's scale starts small, so that text steers an untrained network gently.
CAPTION_NORM_INITIAL_SCALE = 0.01


def check_field(name: str, kind: str, value: Any) -> None:
    """Raises ``UserError`` unless a configuration's value is of its field's type, and a size in reach of a network."""
    if value is None and kind.endswith("| None"):
        return
    kind = kind.removesuffix(" | None")
    allowed, good = {
        "int": (f"a whole number from 1 to {_LARGEST_SIZE}", type(value) is int and 1 <= value <= _LARGEST_SIZE),
        "float": ("a finite number", type(value) in (int, float) and abs(value) <= _LARGEST_SIZE),
        "bool": ("true or false", type(value) is bool),
        "str": ("a text", type(value) is str),
    }[kind]
    if not good:
        raise UserError(f"{name}={value!r} is not allowed; allowed is {allowed}: change it")


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """Shape of one SANA transformer; the defaults are SANA 1.6B at 1024 px.

    Attributes:
        in_channels: latent channels in.
        out_channels: latent channels out; None for as many as come in.
        num_attention_heads: heads of linear self-attention.
        attention_head_dim: size of each; heads x size is the width D.
        num_layers: blocks.
        num_cross_attention_heads: heads of softmax attention to the caption.
        cross_attention_head_dim: size of each.
        cross_attention_dim: width of the projected caption: D.
        caption_channels: width of the text encoder's output.
        mlp_ratio: hidden width of the Mix-FFN over D.
        dropout: 0; the published models have none.
        attention_bias: whether q, k and v of self-attention have biases.
        sample_size: latent side the model was trained for; also picks the table of aspect ratios.
        patch_size: latent pixels per token side.
        norm_elementwise_affine: False; the layer norms have no parameters.
        norm_eps: their epsilon in the blocks; that of the last one is 1e-6.
        interpolation_scale: None for no position table; otherwise the divisor of its coordinates (2K: 1, 4K: 2).
        guidance_embeds: whether the guidance scale is an input (SANA-Sprint).
        guidance_embeds_scale: what the guidance scale is multiplied with before it is embedded.
        qk_norm: None, or ``rms_norm_across_heads`` in both attentions (SANA-1.5, SANA-Sprint).
        timestep_scale: what a pipeline multiplies the scheduler's timestep with.
    """

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_field(f"transformer.{field.name}", field.type, value)
            if field.type.startswith("float") and value is not None:
                object.__setattr__(self, field.name, float(value))  # JSON writes 1.0 as 1
        if not 0 < self.norm_eps < 1:
            raise UserError(f"transformer.norm_eps={self.norm_eps} is not allowed; 1e-6 is the published one")
        if self.interpolation_scale is not None and not self.interpolation_scale > 0:
            raise UserError(
                f"transformer.interpolation_scale={self.interpolation_scale} is not allowed; allowed is more than 0, "
                "or none for no position table"
            )
        if self.mlp_hidden < 1:
            raise UserError(
                f"transformer.mlp_ratio={self.mlp_ratio} leaves no hidden channel; 2.5 is the published one"
            )
        if self.qk_norm not in (None, QK_NORM):
            raise UserError(f"qk_norm={self.qk_norm!r} is not known; choose None or {QK_NORM!r}")
        if self.dropout != 0.0:
            raise UserError(f"dropout={self.dropout}: SANA has no dropout inside its blocks; set it to 0")
        if self.norm_elementwise_affine:
            raise UserError("norm_elementwise_affine=True: SANA's layer norms have no parameters; set it to False")
        if self.cross_attention_dim != self.inner_dim:
            raise UserError(
                f"cross_attention_dim={self.cross_attention_dim}: the caption is projected to the width "
                f"num_attention_heads x attention_head_dim = {self.inner_dim}; set it to that"
            )
        if self.interpolation_scale is not None and self.inner_dim % 4:
            raise UserError(
                f"width {self.inner_dim}: a position table needs a multiple of 4; change the heads, or leave "
                "interpolation_scale out"
            )

    @property
    def inner_dim(self) -> int:
        """Width D of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the Mix-FFN."""
        return int(self.inner_dim * self.mlp_ratio)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SanaConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "transformer", "SANA's"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        return {"_class_name": "SanaTransformer2DModel", **dataclasses.asdict(self)}

    @classmethod
    def sana_600m(cls, **changes) -> SanaConfig:
        """SANA 0.6B at 1024 px; ``sample_size=16`` is the 512 px model."""
        small = {"num_attention_heads": 36, "num_layers": 28, "num_cross_attention_heads": 16}
        return cls(**{**small, "cross_attention_head_dim": 72, "cross_attention_dim": 1152, **changes})

    @classmethod
    def sana_1600m(cls, **changes) -> SanaConfig:
        """SANA 1.6B at 1024 px; ``sample_size=16`` is the 512 px model."""
        return cls(**changes)

    @classmethod
    def sana_1600m_2k(cls) -> SanaConfig:
        """SANA 1.6B at 2048 px: with a position table."""
        return cls(sample_size=64, interpolation_scale=1.0)

    @classmethod
    def sana_1600m_4k(cls) -> SanaConfig:
        """SANA 1.6B at 4096 px: the 2K table, stretched."""
        return cls(sample_size=128, interpolation_scale=2.0)

    @classmethod
    def sana15_1600m(cls) -> SanaConfig:
        """SANA-1.5 1.6B: q and k are normalised."""
        return cls(qk_norm=QK_NORM)

    @classmethod
    def sana15_4800m(cls) -> SanaConfig:
        """SANA-1.5 4.8B: 60 blocks of the same width."""
        return cls(qk_norm=QK_NORM, num_layers=60)

    @classmethod
    def sprint_600m(cls) -> SanaConfig:
        """SANA-Sprint 0.6B: one to four steps, guidance scale as an input."""
        return cls.sana_600m(qk_norm=QK_NORM, guidance_embeds=True)

    @classmethod
    def sprint_1600m(cls) -> SanaConfig:
        """SANA-Sprint 1.6B."""
        return cls(qk_norm=QK_NORM, guidance_embeds=True)


def init_params(transformer: SanaTransformer, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch; under ``jax.eval_shape`` their shapes alone."""
    config = transformer.config
    latents = jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels))
    caption = jnp.zeros((1, 1, config.caption_channels))
    guidance = jnp.zeros(1) if config.guidance_embeds else None
    return transformer.init(key, latents, caption, jnp.zeros(1), guidance)["params"]


class SanaBlock(nn.Module):
    """Linear self-attention, cross-attention, Mix-FFN; the first and the last are modulated and gated by time.

    Cross-attention reads the raw residual stream: it has no norm, no modulation and no gate.
    """

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32
    fp16_saturation: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        caption: Float[Array, "B L D"],
        caption_bias: Float[Array, "B 1 1 L"] | None,
        time: Float[Array, "B 6 D"],
        grid: tuple[int, int],
        identity: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Runs the block on the ``grid`` (height, width) of tokens; all blocks are given the same ``time``."""
        cfg, batch, features = self.config, x.shape[0], x.shape[-1]
        qk_norm = cfg.qk_norm is not None
        x = checkpoint_name(x, BLOCK_INPUT)
        table = self.param("scale_shift_table", scaled_normal(features**-0.5), (6, features), jnp.float32)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation(table, time)

        h = modulated_norm(x, shift_attn, scale_attn, cfg.norm_eps)
        heads = (cfg.num_attention_heads, cfg.attention_head_dim)
        attn1 = LinearSelfAttention(*heads, qk_norm, cfg.attention_bias, self.dtype, self.fp16_saturation, name="attn1")
        x = gated_residual(x, gate_attn, attn1(h, identity))

        attn2 = CrossAttention(
            cfg.num_cross_attention_heads, cfg.cross_attention_head_dim, qk_norm, self.dtype, name="attn2"
        )
        x = x + attn2(x, caption, caption_bias)

        h = modulated_norm(x, shift_ffn, scale_ffn, cfg.norm_eps).reshape(batch, *grid, features)
        ff = GLUMBConv(cfg.mlp_hidden, self.dtype, name="ff")
        return gated_residual(x, gate_ffn, ff(h).reshape(batch, -1, features))


class SanaTransformer(nn.Module):
    """Predicts the flow velocity ``noise - x0`` of a latent picture from its noised form, the time and a caption.

    Parameters of the blocks are stacked on a leading layer axis under ``transformer_blocks``, in both forms below.

    Attributes:
        config: the shape.
        dtype: compute dtype; parameters are float32, norms, modulation, softmax and attention sums run in float32.
        remat: what the backward pass recomputes, by name: see ``sana_jax.nn.remat``.
        scan_blocks: True compiles one block and scans it; False unrolls the blocks, for debugging: it compiles for
            longer, and XLA then keeps a copy of every block's weights beside the stacked ones. Equal outputs. Both sow
            ``block_outputs`` (layers, B, N, D) among the ``intermediates``.
        fp16_saturation: clips what linear attention gives to float16's range, for weights that were trained in it.
    """

    config: SanaConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scan_blocks: bool = True
    fp16_saturation: bool = False

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        controlnet_residuals: Float[Array, "R B N D"] | None = None,
        identity_attention: Bool[Array, "layers B"] | None = None,
        condition_tokens: ConditionTokens | None = None,
        step_cache: StepCache | None = None,
    ) -> Float[Array, "B H W Cout"] | tuple[Float[Array, "B H W Cout"], StepCache, Decision]:
        """Runs the network.

        Args:
            hidden_states: noised latent, channels-last; height and width are multiples of the patch size.
            encoder_hidden_states: the text encoder's output.
            timestep: the time the model was trained on: 0..1000 for SANA and SANA-1.5, 0..1 for Sprint.
            guidance: guidance scale x ``guidance_embeds_scale``; needed by Sprint, refused by the others.
            encoder_attention_mask: 1 for caption tokens, 0 for padding; None keeps all.
            controlnet_residuals: R arrays, the i-th added after block i + 1.
            identity_attention: where set, a sample's self-attention in that layer passes every token's value on
                unmixed (perturbed-attention guidance, arXiv 2403.17377).
            condition_tokens: further tokens behind the caption, padding included; they do not count in
                ``encoder_attention_mask``.
            step_cache: lets the blocks be skipped, see ``sana_jax.diffusion.step_caching``; None computes them.

        Returns:
            The velocity, in the compute dtype; with ``step_cache`` also that of the next step, and what was decided.
        """
        cfg = self.config
        if (guidance is not None) != cfg.guidance_embeds:
            needed = "needs" if cfg.guidance_embeds else "takes no"
            raise UserError(
                f"guidance={guidance}: a model with guidance_embeds={cfg.guidance_embeds} {needed} guidance"
            )
        batch, height, width, _ = hidden_states.shape
        p = cfg.patch_size
        if height % p or width % p:
            raise UserError(
                f"latent of {height}x{width}: height and width must be multiples of the patch size {p}; crop or pad it"
            )
        grid = (height // p, width // p)

        x = PatchEmbed(cfg.inner_dim, p, self.dtype, name="patch_embed")(hidden_states)
        if cfg.interpolation_scale is not None:
            table = sincos_position_table(
                *grid, cfg.inner_dim, base_size=cfg.sample_size // p, interpolation_scale=cfg.interpolation_scale
            )
            x = (x.astype(jnp.float32) + table).astype(self.dtype)

        embedding, time = TimeEmbedding(cfg.inner_dim, cfg.guidance_embeds, self.dtype, name="time_embed")(
            timestep, guidance
        )
        tokens, caption_length = condition_tokens, encoder_hidden_states.shape[1]
        if tokens is not None:
            encoder_hidden_states = append_tokens(encoder_hidden_states, tokens.before)
        caption = CaptionProjection(cfg.inner_dim, self.dtype, name="caption_projection")(encoder_hidden_states)
        if tokens is not None:
            caption = append_tokens(caption, tokens.after)
        caption = RMSNorm(CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE, name="caption_norm")(caption)
        bias = None if encoder_attention_mask is None else mask_to_bias(encoder_attention_mask)
        if tokens is not None:
            bias = bias_with_tokens(encoder_attention_mask, tokens, caption_length)

        block_inputs = (caption, bias, time, grid, controlnet_residuals, identity_attention)
        if step_cache is None:
            x, skipping = self._blocks(x, *block_inputs), ()
        else:
            x, *skipping = self._blocks_or_residual(x, step_cache, *block_inputs)

        table = self.param("scale_shift_table", scaled_normal(cfg.inner_dim**-0.5), (2, cfg.inner_dim), jnp.float32)
        shift, scale = modulation(table, embedding[:, None, :])
        out_channels = cfg.out_channels or cfg.in_channels
        projection = Linear(p * p * out_channels, dtype=self.dtype, kernel_init=xavier_uniform(), name="proj_out")
        x = projection(modulated_norm(x, shift, scale, OUTPUT_NORM_EPSILON))
        # Each token holds a (row, column, channel) patch, channels fastest.
        x = x.reshape(batch, *grid, p, p, out_channels).swapaxes(2, 3)
        x = x.reshape(batch, height, width, out_channels)
        return (x, *skipping) if skipping else x

    def _blocks_or_residual(self, x, cache, caption, bias, time, grid, controlnet_residuals, identity):
        """``_blocks``, or ``x`` and what the blocks last added; with the cache of the next step, and the decision."""
        table = self.variables["params"]["transformer_blocks"]["scale_shift_table"][0]
        shift, scale, *_ = modulation(table, time)
        signal = modulated_norm(x, shift, scale, self.config.norm_eps)

        def run(network, x):
            return network._blocks(x, caption, bias, time, grid, controlnet_residuals, identity)

        return blocks_or_residual(self, x, cache, signal, run)

    def _blocks(self, x, caption, bias, time, grid, controlnet_residuals, identity):
        """Runs the blocks over ``x``, adding residual i after block i + 1; sows all blocks' outputs, stacked."""

        def step(block, x, layer_and_identity):
            layer, own_identity = layer_and_identity
            x = block(x, caption, bias, time, grid, own_identity)
            if controlnet_residuals is not None:
                count = controlnet_residuals.shape[0]
                residual = controlnet_residuals[jnp.clip(layer - 1, 0, count - 1)]
                x = x + jnp.where((layer >= 1) & (layer <= count), residual, 0).astype(x.dtype)
            return x, None

        scanned = self.scan_blocks or self.is_initializing()
        keep_outputs = self.is_mutable_collection("intermediates")
        block_class = remat_block(SanaBlock, self.remat, static_arguments=(5,), scanned=scanned)
        block = block_class(self.config, self.dtype, self.fp16_saturation, name="transformer_blocks")
        layers = self.config.num_layers
        by_layer = (jnp.arange(layers), identity)
        x, _, outputs = run_layers(block, step, x, by_layer, layers, scanned=scanned, keep_outputs=keep_outputs)
        if keep_outputs:
            self.sow("intermediates", "block_outputs", outputs)
        return x
