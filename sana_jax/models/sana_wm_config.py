"""The shape of SANA-WM's transformer, as the published ``config.json`` has it."""

from __future__ import annotations

import dataclasses
from typing import Any

from sana_jax.component_config import known_fields
from sana_jax.errors import UserError
from sana_jax.models.sana import check_field

REVISIONS = ("legacy", "current")
FEED_FORWARDS = ("GLUMBConvTemp", "mlp")
CLASS_NAME = "SanaWMTransformer3DModel"
_FIXED = {  # fields of the published class that have one value here, and why
    "t_kernel_size": (3, "the Mix-FFN's convolution over frames has three taps"),
    "pos_embed_type": ("wan_rope", "SANA-WM has rotary positions; use_pe=False leaves them out"),
    "cam_attn_compress": (1, "both branches of attention have one width"),
    "mlp_acts": (("silu", "silu", None), "the Mix-FFN has these activations"),
    "pred_sigma": (False, "the network predicts a velocity alone"),
}
# Fields that may be 0 or negative.
_ANY_INT = {"softmax_every_n": 0, "conv_kernel_size": 0, "chunk_plucker_post_attn_blocks": None, "image_size": 0}


@dataclasses.dataclass(frozen=True)
class SanaWMConfig:
    """Shape of one SANA-WM transformer; the defaults are the published ones.

    Attributes:
        in_channels: latent channels, in and out.
        num_layers: blocks.
        hidden_size: width D.
        num_attention_heads: heads of softmax attention to the caption.
        patch_size: latent frames, rows and columns per token; one frame, and one or an even number of the others.
        softmax_every_n: every n-th block has softmax self-attention, the others the gated delta rule; 0 for none.
        linear_head_dim: size of self-attention's heads, of both kinds, a multiple of 8.
        ffn_type: ``GLUMBConvTemp``, the Mix-FFN with a convolution over frames, or ``mlp``, two plain layers.
        t_kernel_size: 3.
        conv_kernel_size: taps of the short convolution over frames before the delta rule; 0 for none.
        k_conv_only: whether keys alone pass it.
        pos_embed_type: ``wan_rope``.
        qk_norm: whether self-attention's queries and keys are normalised.
        cross_norm: the same of attention to the caption.
        y_norm: whether the projected caption is normalised.
        cam_attn_compress: 1.
        init_cam_from_base: kept for the round trip; without an effect.
        use_chunk_plucker_post_attn: whether Plücker coordinates are added after self-attention. Without them the
            camera's map of directions is added to the tokens before the first block.
        chunk_plucker_channels: six coordinates for each pixel frame of a latent frame.
        chunk_plucker_post_attn_blocks: how many blocks, from the first on, take them; negative for all.
        fp32_attention: kept for the round trip; the delta rule always runs in float32.
        image_size: nominal height in pixels; kept for the round trip.
        caption_channels: width of the text encoder's output.
        mlp_ratio: hidden width of the feed-forward network over D.
        mlp_acts: silu, silu, None.
        use_pe: whether there are rotary positions.
        learn_sigma: kept for the round trip; without an effect.
        pred_sigma: False.
        mixed_precision: kept for the round trip; without an effect.
        revision: ``legacy`` computes as diffusers 0.42.1, whose camera branch shrinks what it turned and takes the
            softmax scale of a head filled up to 128; ``current`` as the original code does now, without either. It is
            not among the published fields: where it is missing it is ``legacy``.
    """

    in_channels: int = 128
    num_layers: int = 20
    hidden_size: int = 2240
    num_attention_heads: int = 20
    patch_size: tuple[int, int, int] = (1, 1, 1)
    softmax_every_n: int = 4
    linear_head_dim: int = 112
    ffn_type: str = "GLUMBConvTemp"
    t_kernel_size: int = 3
    conv_kernel_size: int = 4
    k_conv_only: bool = True
    pos_embed_type: str = "wan_rope"
    qk_norm: bool = True
    cross_norm: bool = True
    y_norm: bool = True
    cam_attn_compress: int = 1
    init_cam_from_base: bool = True
    use_chunk_plucker_post_attn: bool = True
    chunk_plucker_channels: int = 48
    chunk_plucker_post_attn_blocks: int = 20
    fp32_attention: bool = True
    image_size: int = 720
    caption_channels: int = 2304
    mlp_ratio: float = 3.0
    mlp_acts: tuple[str | None, ...] = ("silu", "silu", None)
    use_pe: bool = True
    learn_sigma: bool = False
    pred_sigma: bool = False
    mixed_precision: str = "bf16"
    revision: str = "legacy"

    def __post_init__(self):
        for name in ("patch_size", "mlp_acts"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _ANY_INT:
                lowest = _ANY_INT[field.name]
                if type(value) is not int or (lowest is not None and value < lowest):
                    least = "a whole number" if lowest is None else f"a whole number from {lowest} on"
                    raise UserError(f"transformer.{field.name}={value!r} is not allowed; allowed is {least}: change it")
            elif field.name not in ("patch_size", "mlp_acts"):
                check_field(f"transformer.{field.name}", field.type, value)
        object.__setattr__(self, "mlp_ratio", float(self.mlp_ratio))  # JSON writes 3.0 as 3
        for name, (allowed, reason) in _FIXED.items():
            if getattr(self, name) != allowed:
                raise UserError(f"transformer.{name}={getattr(self, name)!r}: {reason}; set it to {allowed!r}")
        for name, choices in (("ffn_type", FEED_FORWARDS), ("revision", REVISIONS)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"transformer.{name}={getattr(self, name)!r} is not known; allowed are {', '.join(choices)}: "
                    "choose one of them"
                )
        self._check_sizes()

    def _check_sizes(self) -> None:
        patch, width = self.patch_size, self.hidden_size
        whole = isinstance(patch, tuple) and len(patch) == 3 and all(type(p) is int and p >= 1 for p in patch)
        # an odd number of columns is padded by the reference, which then has a row too many
        if not whole or (patch != (1, 1, 1) and (patch[0] != 1 or patch[2] % 2 or (patch[1] > 1 and patch[1] % 2))):
            raise UserError(
                f"transformer.patch_size={patch!r} is not allowed; allowed are (1, 1, 1), or one latent frame, rows "
                "of 1 or an even number and columns of an even number, such as (1, 2, 2)"
            )
        if self.linear_head_dim % 8:
            raise UserError(
                f"transformer.linear_head_dim={self.linear_head_dim}: half a head is groups of four channels that the "
                "camera's rays move; choose a multiple of 8, 112 is the published one"
            )
        for name in ("linear_head_dim", "num_attention_heads"):
            if width % getattr(self, name):
                raise UserError(
                    f"transformer.{name}={getattr(self, name)} does not divide hidden_size={width}; change one of them"
                )
        if self.mlp_hidden < 1:
            raise UserError(f"transformer.mlp_ratio={self.mlp_ratio} leaves no hidden channel; 3 is the published one")

    @property
    def num_heads(self) -> int:
        """Heads of self-attention."""
        return self.hidden_size // self.linear_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the feed-forward network."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_plucker_layers(self) -> int:
        """How many blocks, from the first on, take Plücker coordinates."""
        if not self.use_chunk_plucker_post_attn:
            return 0
        blocks = self.chunk_plucker_post_attn_blocks
        return self.num_layers if blocks < 0 else min(blocks, self.num_layers)

    def is_softmax(self, layer: int) -> bool:
        """Whether a block, counted from 0, has softmax self-attention."""
        return self.softmax_every_n > 0 and (layer + 1) % self.softmax_every_n == 0

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """The numbers of the blocks with softmax self-attention."""
        return tuple(layer for layer in range(self.num_layers) if self.is_softmax(layer))

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """The numbers of the blocks with the gated delta rule."""
        return tuple(layer for layer in range(self.num_layers) if not self.is_softmax(layer))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SanaWMConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "transformer", "SANA-WM's"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them, and ``revision`` where it is not ``legacy``."""
        fields = dataclasses.asdict(self)
        fields |= {"patch_size": list(self.patch_size), "mlp_acts": list(self.mlp_acts)}
        if self.revision == "legacy":
            del fields["revision"]
        return {"_class_name": CLASS_NAME, **fields}
