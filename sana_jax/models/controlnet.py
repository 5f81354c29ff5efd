"""ControlNet for SANA: a copy of the transformer's first blocks that reads a second picture and adds to the stream.

ControlNet (arXiv 2302.05543) as NVlabs and diffusers publish it for SANA 0.6B and 1.6B: seven blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.models.sana import CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE, SanaBlock, SanaConfig
from sana_jax.nn.attention import mask_to_bias
from sana_jax.nn.embeddings import CaptionProjection, PatchEmbed, TimeEmbedding, sincos_position_table
from sana_jax.nn.linear import LORA, Linear
from sana_jax.nn.norms import RMSNorm
from sana_jax.nn.remat import remat_block

# A ControlNet's config.json has none of these.
_TRANSFORMER_ONLY = ("guidance_embeds", "guidance_embeds_scale", "timestep_scale")


@dataclasses.dataclass(frozen=True)
class SanaControlNetConfig(SanaConfig):
    """Shape of one ControlNet; fields as in ``SanaConfig``, of which it has no guidance and no output layer.

    The published ones have no q/k norms either, and diffusers has no place for them; one that is trained beside a model
    with such norms (SANA-1.5) has them too, since its blocks are copies of that model's.
    """

    num_layers: int = 7

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.name in _TRANSFORMER_ONLY and getattr(self, field.name) != field.default:
                raise UserError(
                    f"controlnet.{field.name}={getattr(self, field.name)!r}: published ControlNets have none; leave it "
                    f"at {field.default!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        left_out = (*_TRANSFORMER_ONLY, *(("qk_norm",) if self.qk_norm is None else ()))
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        return {"_class_name": "SanaControlNetModel", **fields}

    @classmethod
    def beside(cls, transformer: SanaConfig, num_layers: int) -> SanaControlNetConfig:
        """The shape of a copy of a transformer's first blocks; it is given the timestep as the transformer is."""
        fields = {field.name: getattr(transformer, field.name) for field in dataclasses.fields(transformer)}
        kept = {name: value for name, value in fields.items() if name not in _TRANSFORMER_ONLY}
        return cls(**kept | {"num_layers": num_layers})

    @classmethod
    def controlnet_600m(cls) -> SanaControlNetConfig:
        """The ControlNet of SANA 0.6B."""
        return cls.sana_600m(num_layers=7)

    @classmethod
    def controlnet_1600m(cls) -> SanaControlNetConfig:
        """The ControlNet of SANA 1.6B."""
        return cls()


def init_controlnet_params(controlnet: SanaControlNet, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch; under ``jax.eval_shape`` their shapes alone."""
    config = controlnet.config
    latents = jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels))
    caption = jnp.zeros((1, 1, config.caption_channels))
    return controlnet.init(key, latents, latents, caption, jnp.zeros(1))["params"]


class SanaControlNet(nn.Module):
    """Reads the noised latent and a control picture's latent; gives what is added to the transformer's stream.

    Parameters of the blocks are stacked on a leading layer axis under ``transformer_blocks``, and those of the zero
    layers behind them under ``controlnet_blocks``.

    Attributes:
        config: the shape.
        dtype: compute dtype, as in ``SanaTransformer``.
        remat: what the backward pass recomputes, by name: see ``sana_jax.nn.remat``.
        fp16_saturation: as in ``SanaTransformer``.
    """

    config: SanaControlNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    fp16_saturation: bool = False

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "B H W C"],
        controlnet_cond: Float[Array, "B H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, " B"],
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        conditioning_scale: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "layers B N D"]:
        """Runs the ControlNet.

        Args:
            hidden_states: noised latent, channels-last.
            controlnet_cond: the control picture's latent, of the same shape.
            encoder_hidden_states: the text encoder's output.
            timestep: as the transformer takes it.
            encoder_attention_mask: 1 for caption tokens, 0 for padding; None keeps all.
            conditioning_scale: multiplies the result.

        Returns:
            ``controlnet_residuals`` for ``SanaTransformer``, in the compute dtype.

        Raises:
            UserError: latents of different shapes, or not a multiple of the patch size.
        """
        cfg, p = self.config, self.config.patch_size
        _, height, width, _ = hidden_states.shape
        if hidden_states.shape != controlnet_cond.shape or height % p or width % p:
            raise UserError(
                f"latent {hidden_states.shape} and control latent {controlnet_cond.shape}: both must be alike, with "
                f"height and width a multiple of the patch size {p}; resize the control picture"
            )
        grid = (height // p, width // p)

        patch_embed = PatchEmbed(cfg.inner_dim, p, self.dtype, name="patch_embed")
        x, control = patch_embed(hidden_states), patch_embed(controlnet_cond)
        if cfg.interpolation_scale is not None:
            table = sincos_position_table(
                *grid, cfg.inner_dim, base_size=cfg.sample_size // p, interpolation_scale=cfg.interpolation_scale
            )
            x, control = ((tokens.astype(jnp.float32) + table).astype(self.dtype) for tokens in (x, control))
        x = x + _zero_dense(cfg.inner_dim, self.dtype, "input_block")(control)

        _, time = TimeEmbedding(cfg.inner_dim, False, self.dtype, name="time_embed")(timestep, None)
        caption = CaptionProjection(cfg.inner_dim, self.dtype, name="caption_projection")(encoder_hidden_states)
        caption = RMSNorm(CAPTION_NORM_EPSILON, CAPTION_NORM_INITIAL_SCALE, name="caption_norm")(caption)
        bias = None if encoder_attention_mask is None else mask_to_bias(encoder_attention_mask)

        def body(block, x, _):
            x = block(x, caption, bias, time, grid)
            return x, x

        scan = nn.scan(
            body,
            variable_axes={"params": 0, LORA: 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        block_class = remat_block(SanaBlock, self.remat, static_arguments=(5,))
        block = block_class(cfg, self.dtype, self.fp16_saturation, name="transformer_blocks")
        _, outputs = scan(block, x, None)
        # One after another, so that over many devices no more than one layer's kernel is fetched at a time.
        zero_layers = nn.scan(
            lambda layer, _, x: (None, layer(x)),
            variable_axes={"params": 0, LORA: 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        zero_layer = _zero_dense(cfg.inner_dim, self.dtype, "controlnet_blocks")
        _, residuals = zero_layers(zero_layer, None, outputs)
        # The scale itself is not rounded: 0.7 in bfloat16 is 0.699.
        return (residuals.astype(jnp.float32) * conditioning_scale).astype(residuals.dtype)


def _zero_dense(features: int, dtype: jnp.dtype, name: str) -> Linear:
    # Zero at first, so that an untrained ControlNet leaves the transformer as it is.
    return Linear(features, dtype=dtype, kernel_init=nn.initializers.zeros, name=name)
