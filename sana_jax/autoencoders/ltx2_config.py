"""The shape of an LTX-2 video autoencoder, with the fields of a published ``vae/config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sana_jax.component_config import known_fields
from sana_jax.errors import UserError

CLASS_NAME = "AutoencoderKLLTX2Video"

# how a stage halves or doubles: (frames, rows, columns)
STRIDES = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}
PADDINGS = ("zeros", "reflect")
_DOWN_BLOCK = "LTX2VideoDownBlock3D"
# Fields of the published class whose other values no published LTX-2 autoencoder has: what they must be here, and why.
_FIXED = {
    "patch_size_t": (1, "frames are never folded into channels"),
    "timestep_conditioning": (False, "no published LTX-2 autoencoder decodes at a noise level"),
    "decoder_inject_noise": (False, "no published LTX-2 autoencoder draws noise in its decoder"),
    "spatio_temporal_scaling": (True, "every stage of a published encoder halves something"),
    "decoder_spatio_temporal_scaling": (True, "every stage of a published decoder doubles something"),
    "down_block_types": (_DOWN_BLOCK, "it is the only kind of stage"),
}


@dataclasses.dataclass(frozen=True)
class LTX2AutoencoderConfig:
    """Shape of one autoencoder; missing fields of a ``config.json`` mean the published class's own defaults.

    They are the published autoencoder's but for ``decoder_causal``: see ``published``. The lists of both halves count
    from the highest resolution, ``upsample_type`` alone from the lowest, as in the published class.

    Attributes:
        in_channels: channels of the video.
        out_channels: the same number.
        latent_channels: channels of the latents, and of the encoder's first features.
        block_out_channels: width that each of the encoder's stages hands on.
        down_block_types: must all be the one kind.
        decoder_block_out_channels: width that each of the decoder's stages begins with.
        layers_per_block: residual blocks of the encoder's stages, and of its middle.
        decoder_layers_per_block: residual blocks of the decoder's stages, and of its middle.
        spatio_temporal_scaling: must be true.
        decoder_spatio_temporal_scaling: must be true.
        decoder_inject_noise: must be false.
        downsample_type: what each of the encoder's stages halves: ``spatial``, ``temporal`` or ``spatiotemporal``.
        upsample_type: what each of the decoder's stages doubles, the lowest resolution first.
        upsample_residual: whether a stage's unfolded input is added to what it doubles.
        upsample_factor: what a stage of the decoder divides its width by.
        timestep_conditioning: must be false.
        patch_size: rows and columns of pixels that become channels of one.
        patch_size_t: must be 1.
        resnet_norm_eps: of norms that no published autoencoder has; not used.
        scaling_factor: latents are multiplied by it when their mean and deviation are taken out.
        encoder_causal: whether an encoded frame sees only itself and those before it.
        decoder_causal: whether a decoded frame sees only latents up to its own.
        encoder_spatial_padding_mode: what stands around a picture: ``zeros``, or ``reflect`` for its own mirror image.
        decoder_spatial_padding_mode: likewise.
        spatial_compression_ratio: rows that one latent row stands for, as the encoder's stages say; None leaves it out.
        temporal_compression_ratio: likewise of frames.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    down_block_types: tuple[str, ...] = (_DOWN_BLOCK,) * 4
    decoder_block_out_channels: tuple[int, ...] = (256, 512, 1024)
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    spatio_temporal_scaling: bool | tuple[bool, ...] = (True,) * 4
    decoder_spatio_temporal_scaling: bool | tuple[bool, ...] = (True,) * 3
    decoder_inject_noise: bool | tuple[bool, ...] = (False,) * 4
    downsample_type: tuple[str, ...] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    upsample_type: tuple[str, ...] = ("spatiotemporal",) * 3
    upsample_residual: bool | tuple[bool, ...] = (True,) * 3
    upsample_factor: tuple[int, ...] = (2, 2, 2)
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = True
    encoder_spatial_padding_mode: str = "zeros"
    decoder_spatial_padding_mode: str = "reflect"
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # JSON has lists where we have tuples.
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)
        for name, (wanted, reason) in _FIXED.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            good = all(type(each) is type(wanted) and each == wanted for each in values)
            self._check(name, good, f"{wanted!r} ({reason})")
        for name in ("in_channels", "latent_channels", "patch_size"):
            self._check(name, _is_size(getattr(self, name)), "a whole number of 1 or more")
        self._check("out_channels", self.out_channels == self.in_channels, f"in_channels={self.in_channels}")
        scale = self.scaling_factor
        good = type(scale) in (int, float) and math.isfinite(scale) and scale > 0
        self._check("scaling_factor", good, "a number above 0")
        for half in ("encoder", "decoder"):
            name = f"{half}_causal"
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
            name = f"{half}_spatial_padding_mode"
            self._check(name, getattr(self, name) in PADDINGS, f"one of {', '.join(PADDINGS)}")
        self._check_encoder()
        self._check_decoder()
        for name in ("spatial", "temporal"):
            stated, factor = getattr(self, f"{name}_compression_ratio"), getattr(self, f"{name}_factor")
            good = stated is None or stated == factor
            self._check(f"{name}_compression_ratio", good, f"{factor}, as the encoder's stages say")

    @classmethod
    def published(cls) -> LTX2AutoencoderConfig:
        """The autoencoder of LTX-2, SANA-Video 720p and SANA-WM, whose decoder is not causal."""
        return cls(decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8)

    @property
    def spatial_factor(self) -> int:
        """Rows of a frame that one latent row stands for when it is encoded."""
        return self.patch_size * math.prod(stride[1] for stride in self.downsample_strides)

    @property
    def temporal_factor(self) -> int:
        """Frames that one latent frame, but the first, stands for when it is encoded."""
        return math.prod(stride[0] for stride in self.downsample_strides)

    @property
    def decoder_factors(self) -> tuple[int, int]:
        """(frames, rows) that one latent becomes when it is decoded; of a whole autoencoder the same numbers."""
        strides = self.upsample_strides
        return math.prod(stride[0] for stride in strides), self.patch_size * math.prod(stride[1] for stride in strides)

    @property
    def downsample_strides(self) -> tuple[tuple[int, int, int], ...]:
        """What each of the encoder's stages divides (frames, rows, columns) by, in the order in which they run."""
        return tuple(STRIDES[kind] for kind in self.downsample_type)

    @property
    def upsample_strides(self) -> tuple[tuple[int, int, int], ...]:
        """What each of the decoder's stages multiplies by, in the order in which they run."""
        return tuple(STRIDES[kind] for kind in self.upsample_type)

    @property
    def upsample_factors(self) -> tuple[int, ...]:
        """``upsample_factor`` in the order in which the stages run."""
        return tuple(reversed(self.upsample_factor))

    @property
    def upsample_residuals(self) -> tuple[bool, ...]:
        """``upsample_residual`` of every stage, in the order in which they run."""
        value = self.upsample_residual
        return tuple(reversed(value)) if isinstance(value, tuple) else (value,) * len(self.upsample_factor)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LTX2AutoencoderConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "autoencoder"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        return {"_class_name": CLASS_NAME, **dataclasses.asdict(self)}

    def _check_encoder(self) -> None:
        widths = self.block_out_channels
        self._check_sizes("block_out_channels", None)
        stages = len(widths)
        self._check_sizes("layers_per_block", stages + 1)
        self._check_kinds("downsample_type", stages)
        before = self.latent_channels
        for width, stride in zip(widths, self.downsample_strides):
            pixels = math.prod(stride)
            good = width % pixels == 0 and before * pixels % width == 0
            allowed = (
                f"a stage's width a multiple of the {pixels} pixels that it joins, and a divisor of what they hold"
            )
            self._check("block_out_channels", good, allowed)
            before = width

    def _check_decoder(self) -> None:
        widths = self.decoder_block_out_channels
        self._check_sizes("decoder_block_out_channels", None)
        stages = len(widths)
        self._check_sizes("decoder_layers_per_block", stages + 1)
        self._check_sizes("upsample_factor", stages)
        self._check_kinds("upsample_type", stages)
        residual = self.upsample_residual
        good = isinstance(residual, bool) or (
            isinstance(residual, tuple) and len(residual) == stages and all(isinstance(each, bool) for each in residual)
        )
        self._check("upsample_residual", good, f"true or false, or a list of them for each of {stages} stages")
        running = tuple(reversed(widths))
        for stage, (width, factor, stride) in enumerate(zip(running, self.upsample_factors, self.upsample_strides)):
            pixels = math.prod(stride)
            good = width % factor == 0 and width % pixels == 0 and pixels % factor == 0
            allowed = f"a width that a stage can divide by {factor} and unfold into {pixels} pixels"
            self._check("decoder_block_out_channels", good, allowed)
            good = stage + 1 == stages or running[stage + 1] == width // factor
            self._check("decoder_block_out_channels", good, "the width that the stage below hands on for every stage")

    def _check_sizes(self, name: str, count: int | None) -> None:
        value = getattr(self, name)
        good = isinstance(value, tuple) and len(value) == (count or max(len(value), 1)) and all(map(_is_size, value))
        self._check(name, good, f"a list of {count or 'one or more'} whole numbers of 1 or more")

    def _check_kinds(self, name: str, count: int) -> None:
        value = getattr(self, name)
        good = isinstance(value, tuple) and len(value) == count and all(kind in STRIDES for kind in value)
        self._check(name, good, f"a list of {count}, each of them {', '.join(STRIDES)}")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise UserError(f"autoencoder {name}={getattr(self, name)!r} is not allowed; allowed is {allowed}: mend it")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1
