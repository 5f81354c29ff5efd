"""The shape of a deep-compression autoencoder, with the fields of a published ``vae/config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sana_jax.component_config import known_fields
from sana_jax.errors import UserError

CLASS_NAME = "AutoencoderDC"
RES_BLOCK, VIT_BLOCK = "ResBlock", "EfficientViTBlock"
RMS_NORM, BATCH_NORM = "rms_norm", "batch_norm"

# What may stand in a field that names something. Upper and lower case are not told apart in activations, and a block
# that samples down or up has one special form and one that every other published spelling means.
BLOCK_TYPES = (RES_BLOCK, VIT_BLOCK)
NORM_TYPES = (RMS_NORM, BATCH_NORM)
ACTIVATIONS = ("relu", "silu")
DOWNSAMPLING = ("pixel_unshuffle", "Conv", "conv")
UPSAMPLING = ("pixel_shuffle", "interpolate")

_RES_THEN_VIT = (RES_BLOCK,) * 3 + (VIT_BLOCK,) * 3
_CHANNELS = (128, 256, 512, 512, 1024, 1024)
_MULTISCALES = ((), (), (), (5,), (5,), (5,))

_CHOICES = {
    "encoder_block_types": BLOCK_TYPES,
    "decoder_block_types": BLOCK_TYPES,
    "decoder_norm_types": NORM_TYPES,
    "decoder_act_fns": ACTIVATIONS,
    "decoder_conv_act_fn": ACTIVATIONS,
    "downsample_block_type": DOWNSAMPLING,
    "upsample_block_type": UPSAMPLING,
}
_ONE_FOR_ALL_OR_LIST = ("encoder_block_types", "decoder_block_types", "decoder_norm_types", "decoder_act_fns")


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """Shape of one autoencoder; missing fields of a ``config.json`` mean these defaults, which are diffusers' own.

    Stages are numbered from the highest resolution; each halves the picture's height and width once more. Fields in
    the plural hold a value for every stage; block types, norms and activations may be a single value for all.

    Attributes:
        in_channels: channels of the picture.
        latent_channels: channels of the latents.
        attention_head_dim: head size of the attention blocks.
        encoder_block_types: ``ResBlock`` or ``EfficientViTBlock``.
        decoder_block_types: the same for the decoder.
        encoder_block_out_channels: widths.
        decoder_block_out_channels: widths.
        encoder_layers_per_block: blocks; 0 is for the first stage alone, which then only changes resolution.
        decoder_layers_per_block: blocks.
        encoder_qkv_multiscales: sizes of the depthwise kernels that attention sees queries, keys and values through,
            beside the plain ones.
        decoder_qkv_multiscales: the same for the decoder.
        upsample_block_type: ``pixel_shuffle`` or ``interpolate``.
        downsample_block_type: ``pixel_unshuffle``, or ``Conv`` (also ``conv``) for a convolution of stride 2.
        decoder_norm_types: ``rms_norm`` or ``batch_norm``; the encoder's are RMS norms.
        decoder_act_fns: ``silu`` or ``relu`` in the decoder's ResBlocks; the encoder's have ``silu``.
        encoder_out_shortcut: whether averaged channels are added to the latents.
        decoder_in_shortcut: whether repeated latents are added to the decoder's first features.
        decoder_conv_act_fn: activation before the last convolution.
        scaling_factor: what brings latents to about unit variance.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = RES_BLOCK
    decoder_block_types: str | tuple[str, ...] = RES_BLOCK
    encoder_block_out_channels: tuple[int, ...] = _CHANNELS
    decoder_block_out_channels: tuple[int, ...] = _CHANNELS
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _MULTISCALES
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _MULTISCALES
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | tuple[str, ...] = RMS_NORM
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # JSON has lists where we have tuples.
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        for name in ("in_channels", "latent_channels", "attention_head_dim"):
            self._check(name, _is_size(getattr(self, name)), "a whole number of 1 or more")
        for name in ("encoder_out_shortcut", "decoder_in_shortcut"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        for name, choices in _CHOICES.items():
            self._check_choice(name, choices)
        scale = self.scaling_factor
        positive = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < math.inf
        self._check("scaling_factor", positive, "a positive number")
        for half in ("encoder", "decoder"):
            self._check_stages(half)
            self._check_widths(half)
        self._check(
            "decoder_block_out_channels",
            len(self.decoder_block_out_channels) == len(self.encoder_block_out_channels),
            "as many stages as the encoder has",
        )

    def stages(self, half: str) -> list[Stage]:
        """The stages of the ``encoder`` or the ``decoder``, highest resolution first."""
        count = len(getattr(self, f"{half}_block_out_channels"))
        # The encoder of every member has RMS norms and SiLU; the published configuration has no fields for them.
        norms = self.decoder_norm_types if half == "decoder" else RMS_NORM
        activations = self.decoder_act_fns if half == "decoder" else "silu"
        return [
            Stage(*values)
            for values in zip(
                getattr(self, f"{half}_block_out_channels"),
                getattr(self, f"{half}_layers_per_block"),
                _for_each(getattr(self, f"{half}_block_types"), count),
                getattr(self, f"{half}_qkv_multiscales"),
                _for_each(norms, count),
                (name.lower() for name in _for_each(activations, count)),
            )
        ]

    @property
    def spatial_factor(self) -> int:
        """Picture rows that one latent row stands for."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DCAEConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "autoencoder"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        return {"_class_name": CLASS_NAME, **dataclasses.asdict(self)}

    @classmethod
    def f32c32_sana(cls) -> DCAEConfig:
        """``dc-ae-f32c32-sana-1.0`` and ``-1.1``: the autoencoder of SANA, SANA-1.5 and SANA-Sprint."""
        return cls(
            encoder_block_types=_RES_THEN_VIT,
            decoder_block_types=_RES_THEN_VIT,
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )

    @classmethod
    def f32c32_in(cls) -> DCAEConfig:
        """``dc-ae-f32c32-in-1.0``, trained on ImageNet."""
        return cls._pixel_shuffled(6, latent_channels=32, scaling_factor=0.3189)

    @classmethod
    def f32c32_mix(cls) -> DCAEConfig:
        """``dc-ae-f32c32-mix-1.0``, trained on a mixture of data sets."""
        return cls._pixel_shuffled(6, latent_channels=32, scaling_factor=0.4552)

    @classmethod
    def f64c128_in(cls) -> DCAEConfig:
        """``dc-ae-f64c128-in-1.0``."""
        return cls._pixel_shuffled(7, latent_channels=128, scaling_factor=0.2889)

    @classmethod
    def f64c128_mix(cls) -> DCAEConfig:
        """``dc-ae-f64c128-mix-1.0``."""
        return cls._pixel_shuffled(7, latent_channels=128, scaling_factor=0.4538)

    @classmethod
    def f128c512_in(cls) -> DCAEConfig:
        """``dc-ae-f128c512-in-1.0``."""
        return cls._pixel_shuffled(8, latent_channels=512, scaling_factor=0.4883)

    @classmethod
    def f128c512_mix(cls) -> DCAEConfig:
        """``dc-ae-f128c512-mix-1.0``."""
        return cls._pixel_shuffled(8, latent_channels=512, scaling_factor=0.3620)

    @classmethod
    def _pixel_shuffled(cls, stages: int, **changes: Any) -> DCAEConfig:
        """The family without multi-scale attention, with pixel shuffling and batch norms."""
        types = (RES_BLOCK,) * 3 + (VIT_BLOCK,) * (stages - 3)
        channels = (*_CHANNELS, 2048, 2048)[:stages]
        return cls(
            encoder_block_types=types,
            decoder_block_types=types,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(0, 4, 8, 2, 2, 2, 2, 2)[:stages],
            decoder_layers_per_block=(0, 5, 10, 2, 2, 2, 2, 2)[:stages],
            encoder_qkv_multiscales=((),) * stages,
            decoder_qkv_multiscales=((),) * stages,
            decoder_norm_types=(BATCH_NORM,) * 3 + (RMS_NORM,) * (stages - 3),
            decoder_act_fns=("relu",) * 3 + ("silu",) * (stages - 3),
            **changes,
        )

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise UserError(f"autoencoder {name}={getattr(self, name)!r} is not allowed; allowed is {allowed}: mend it")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        many = isinstance(value, tuple)
        known = [
            isinstance(one, str) and (one.lower() if choices is ACTIVATIONS else one) in choices
            for one in (value if many else (value,))
        ]
        listable = name in _ONE_FOR_ALL_OR_LIST
        self._check(
            name,
            all(known) and (listable or not many),
            " or ".join(map(repr, choices)) + (", one for all stages or a list" if listable else ""),
        )

    def _check_stages(self, half: str) -> None:
        channels = f"{half}_block_out_channels"
        sizes = getattr(self, channels)
        good = isinstance(sizes, tuple) and len(sizes) >= 2 and all(map(_is_size, sizes))
        self._check(channels, good, "a list of two or more whole numbers of 1 or more")
        per_stage = [f"{half}_layers_per_block", f"{half}_qkv_multiscales"]
        per_stage += [name for name in _ONE_FOR_ALL_OR_LIST if name.startswith(half)]
        for name in per_stage:
            value = getattr(self, name)
            single = name in _ONE_FOR_ALL_OR_LIST and isinstance(value, str)
            good = single or (isinstance(value, tuple) and len(value) == len(sizes))
            self._check(name, good, f"one value for each of the {len(sizes)} stages")
        layers = f"{half}_layers_per_block"
        good = all(_is_size(count) or (i == 0 and _is_zero(count)) for i, count in enumerate(getattr(self, layers)))
        self._check(layers, good, "whole numbers of 1 or more, and 0 for the first stage")
        scales = f"{half}_qkv_multiscales"
        good = all(
            isinstance(kernels, tuple) and all(_is_size(size) and size % 2 for size in kernels)
            for kernels in getattr(self, scales)
        )
        self._check(scales, good, "a list of odd kernel sizes, which may be empty, for each stage")

    def _check_widths(self, half: str) -> None:
        name = f"{half}_block_out_channels"
        stages = self.stages(half)
        for stage in stages:
            attends = stage.block_type == VIT_BLOCK and stage.layers
            self._check(name, not attends or stage.channels >= self.attention_head_dim, "attention_head_dim or more")
        first = 0 if stages[0].layers else 1
        # Shortcuts average or repeat whole groups of channels.
        for high, low in zip(stages[first:], stages[first + 1 :]):
            good = 4 * high.channels % low.channels == 0
            self._check(name, good, "widths that divide four times the width of the stage before them")
        shortcut = self.encoder_out_shortcut if half == "encoder" else self.decoder_in_shortcut
        good = not shortcut or stages[-1].channels % self.latent_channels == 0
        self._check(name, good, f"a last width that is a multiple of latent_channels={self.latent_channels}")
        if half == "encoder" and self.downsample_block_type == "pixel_unshuffle":
            good = all(stage.channels % 4 == 0 for stage in stages[1:])
            self._check(name, good, "multiples of 4 from the second stage on, for pixel_unshuffle")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the blocks of one resolution are made of."""

    channels: int
    layers: int
    block_type: str
    multiscales: tuple[int, ...]
    norm: str
    activation: str


def _for_each(value: str | tuple[str, ...], count: int) -> tuple[str, ...]:
    return (value,) * count if isinstance(value, str) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_zero(value: Any) -> bool:
    return type(value) is int and value == 0
