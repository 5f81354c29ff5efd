"""The shape of an LTX-2 transformer: the fields of the published ``config.json``, those of the audio half included.

The video half alone is built; the fields of the other are kept, so that a configuration comes back as it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sana_jax.component_config import known_fields
from sana_jax.errors import UserError
from sana_jax.models.sana import QK_NORM, check_field
from sana_jax.nn.ltx2_rope import INTERLEAVED, ROPE_TYPES, SPLIT, GridRotation, video_rotation

# The transformer of SANA-WM's refiner, and LTX-2's own: one network, one set of names, for us and for PyTorch.
REFINER_CLASS, LTX2_CLASS = "SanaWMLTX2RefinerTransformer3DModel", "LTX2VideoTransformer3DModel"

_LTX_2_3 = "that is LTX-2.3, whose prompt is modulated by time; SANA-WM's refiner is LTX-2.0"
_FIXED = {  # fields of the published class that have one value here, and why
    "patch_size": (1, "every latent is a token"),
    "patch_size_t": (1, "every latent is a token"),
    "qk_norm": (QK_NORM, "q and k are normalised over all heads together"),
    "activation_fn": ("gelu-approximate", "the feed-forward network has a GELU in its tanh form"),
    "norm_elementwise_affine": (False, "the blocks' norms have no parameters"),
    "rope_double_precision": (True, "frequencies are powers in float64; in float32 cosines would be off by 1e-2"),
    "cross_attn_mod": (False, _LTX_2_3),
    "audio_cross_attn_mod": (False, _LTX_2_3),
    "use_prompt_embeddings": (True, "LTX-2.3 has no projection of the prompt; SANA-WM's refiner is LTX-2.0"),
    "perturbed_attn": (False, "it serves spatio-temporal guidance, which the refiner does not use"),
    "use_keyframes_abs_pos_embedding": (False, "the refiner marks no keyframes"),
}


@dataclasses.dataclass(frozen=True)
class LTX2Config:
    """Shape of one LTX-2 transformer; the defaults are those of the published class. ``LTX2Config.ltx2()``: LTX-2.0.

    Attributes:
        in_channels: latent channels in.
        out_channels: latent channels out; None for as many as come in.
        patch_size: 1; every latent is a token.
        patch_size_t: 1.
        num_attention_heads: heads of all attentions.
        attention_head_dim: size of each, even; heads x size is the width D.
        cross_attention_dim: width of the projected prompt: D.
        vae_scale_factors: frames, rows and columns of pixels per latent.
        pos_embed_max_pos: seconds at which a position is 1, from -1 at none.
        base_height: the same in pixels.
        base_width: the same in pixels.
        gated_attn: whether attention has a gate per head.
        cross_attn_mod: False.
        num_layers: blocks.
        activation_fn: ``gelu-approximate``.
        qk_norm: ``rms_norm_across_heads``.
        norm_elementwise_affine: False; the blocks' norms have no parameters.
        norm_eps: their epsilon.
        caption_channels: width of the connectors' output.
        attention_bias: whether q, k and v have biases.
        attention_out_bias: whether attention's last layer has one.
        rope_theta: highest frequency of the rotary positions over the lowest.
        rope_double_precision: True.
        causal_offset: 1 where the first latent frame stands for one frame of pixels, 0 where for as many as others.
        timestep_scale_multiplier: what a pipeline multiplies sigma with.
        rope_type: which channels of a head are a pair, ``split`` or ``interleaved``; published models have ``split``.
        use_prompt_embeddings: True; the prompt is projected to D.
        perturbed_attn: False.
        ff_bias: whether the feed-forward networks have biases.
        use_prompt_adaln_single: without effect where ``cross_attn_mod`` is False.
        use_keyframes_abs_pos_embedding: False.
        cross_attn_timestep_scale_multiplier: of the attention between video and audio; not used by the video half.

    All fields with ``audio`` in their names are the audio half's.
    """

    in_channels: int = 128
    out_channels: int | None = 128
    patch_size: int = 1
    patch_size_t: int = 1
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    cross_attention_dim: int = 4096
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)
    pos_embed_max_pos: int = 20
    base_height: int = 2048
    base_width: int = 2048
    gated_attn: bool = False
    cross_attn_mod: bool = False
    audio_in_channels: int = 128
    audio_out_channels: int | None = 128
    audio_patch_size: int = 1
    audio_patch_size_t: int = 1
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_cross_attention_dim: int = 2048
    audio_scale_factor: int = 4
    audio_pos_embed_max_pos: int = 20
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    audio_gated_attn: bool = False
    audio_cross_attn_mod: bool = False
    num_layers: int = 48
    activation_fn: str = "gelu-approximate"
    qk_norm: str = QK_NORM
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int = 3840
    attention_bias: bool = True
    attention_out_bias: bool = True
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_offset: int = 1
    timestep_scale_multiplier: int = 1000
    cross_attn_timestep_scale_multiplier: int = 1000
    rope_type: str = INTERLEAVED
    use_prompt_embeddings: bool = True
    perturbed_attn: bool = False
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_prompt_adaln_single: bool = True
    use_keyframes_abs_pos_embedding: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("vae_scale_factors", "causal_offset"):
                check_field(f"transformer.{field.name}", field.type, value)
            if field.type == "float":
                object.__setattr__(self, field.name, float(value))  # JSON writes 1.0 as 1
        for name, (allowed, reason) in _FIXED.items():
            if getattr(self, name) != allowed:
                raise UserError(f"transformer.{name}={getattr(self, name)!r}: {reason}; choose a model with {allowed}")
        self._check_positions()
        if not 0 < self.norm_eps < 1:
            raise UserError(f"transformer.norm_eps={self.norm_eps} is not allowed; 1e-6 is the published one")
        if self.cross_attention_dim != self.inner_dim:
            raise UserError(
                f"transformer.cross_attention_dim={self.cross_attention_dim}: the prompt is projected to the width "
                f"num_attention_heads x attention_head_dim = {self.inner_dim}; set it to that"
            )

    def _check_positions(self) -> None:
        factors = self.vae_scale_factors
        good = isinstance(factors, (tuple, list)) and len(factors) == 3
        if not good or any(type(factor) is not int or factor < 1 for factor in factors):
            raise UserError(
                f"transformer.vae_scale_factors={factors!r} is not allowed; allowed are three whole numbers for "
                "frames, rows and columns, such as (8, 32, 32)"
            )
        object.__setattr__(self, "vae_scale_factors", tuple(factors))
        if type(self.causal_offset) is not int or self.causal_offset not in (0, 1):
            raise UserError(f"transformer.causal_offset={self.causal_offset!r} is not allowed; allowed are 0 and 1")
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"transformer.rope_type={self.rope_type!r} is not known; choose {' or '.join(ROPE_TYPES)}")
        if self.rope_theta <= 1:
            raise UserError(f"transformer.rope_theta={self.rope_theta} is not allowed; allowed is a number above 1")
        if self.attention_head_dim % 2 or self.inner_dim < 6:
            raise UserError(
                f"transformer.attention_head_dim={self.attention_head_dim}: rotary positions of three axes need an "
                "even head size and a width of at least 6; change it"
            )

    @property
    def inner_dim(self) -> int:
        """Width D of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def velocity_channels(self) -> int:
        """Latent channels that come out."""
        return self.out_channels or self.in_channels

    def rotation(self, grid: tuple[int, int, int], *, fps: float, first_frame: int = 0) -> GridRotation:
        """The rotary positions of a grid of latents, as NumPy arrays: an argument of the transformer.

        They are made on the host, whose float64 powers the weights were trained with, and are arguments so that
        another place in the video is another array and not another program.

        Args:
            grid: latent (frames, rows, columns).
            fps: frames of pixels per second of the video.
            first_frame: index of the first latent frame in the whole video.

        Raises:
            UserError: see ``video_rotation``.
        """
        return video_rotation(
            grid,
            self.inner_dim,
            fps=fps,
            first_frame=first_frame,
            theta=self.rope_theta,
            base=(self.pos_embed_max_pos, self.base_height, self.base_width),
            scale_factors=self.vae_scale_factors,
            causal_offset=self.causal_offset,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LTX2Config:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "transformer", "LTX-2's"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        fields = {**dataclasses.asdict(self), "vae_scale_factors": list(self.vae_scale_factors)}
        return {"_class_name": REFINER_CLASS, **fields}

    @classmethod
    def ltx2(cls, **changes) -> LTX2Config:
        """LTX-2.0 19B, and SANA-WM's refiner: 13.0 billion parameters of its video half."""
        return cls(**{"rope_type": SPLIT, **changes})
