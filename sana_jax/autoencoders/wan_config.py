"""The shape of a Wan 2.1 video autoencoder, with the fields of a published ``vae/config.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sana_jax.component_config import known_fields
from sana_jax.errors import UserError

CLASS_NAME = "AutoencoderKLWan"

_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# Fields of the published class that other members of its family set: what they must be here, and who sets them.
_FIXED = {
    "is_residual": (False, "Wan 2.2's autoencoder has residual blocks of another form"),
    "patch_size": (None, "Wan 2.2's autoencoder works on patches of the video"),
    "attn_scales": ((), "no published Wan 2.1 autoencoder has attention outside its middle"),
    "dropout": (0.0, "no published Wan 2.1 autoencoder has dropout"),
}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Shape of one autoencoder; missing fields of a ``config.json`` mean these defaults, which are Wan 2.1's.

    Levels are numbered from the highest resolution; each but the last halves height and width.

    Attributes:
        base_dim: width of the encoder's first features.
        decoder_base_dim: what the decoder's widths are multiples of; None for ``base_dim``.
        z_dim: channels of the latents.
        dim_mult: width of each level, in multiples of the base.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        attn_scales: must be empty.
        temperal_downsample: for each level but the last, whether it also halves the number of frames. (The published
            spelling.)
        dropout: must be 0.
        latents_mean: of each channel of the encoder's output.
        latents_std: of each channel of the encoder's output.
        is_residual: must be false.
        in_channels: channels of the video.
        out_channels: the same number.
        patch_size: must be None.
        scale_factor_temporal: frames that one latent frame stands for; what ``temperal_downsample`` says.
        scale_factor_spatial: rows that one latent row stands for; what the number of levels says.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _MEAN
    latents_std: tuple[float, ...] = _STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # JSON has lists where we have tuples.
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)
        for name, (value, reason) in _FIXED.items():
            self._check(name, getattr(self, name) == value, f"{value!r} ({reason})")
        for name in ("base_dim", "z_dim", "num_res_blocks", "in_channels"):
            self._check(name, _is_size(getattr(self, name)), "a whole number of 1 or more")
        self._check(
            "decoder_base_dim", self.decoder_base_dim is None or _is_size(self.decoder_base_dim), "a whole number"
        )
        self._check("out_channels", self.out_channels == self.in_channels, f"in_channels={self.in_channels}")
        multiples = self.dim_mult
        good = isinstance(multiples, tuple) and len(multiples) >= 2 and all(map(_is_size, multiples))
        self._check("dim_mult", good, "a list of two or more whole numbers of 1 or more")
        # going up, a level hands half its channels to the next one
        good = all(width % 2 == 0 for width in self.decoder_widths[1:])
        self._check("dim_mult", good, "multiples that give the decoder's levels, but the first, an even width")
        halves = self.temperal_downsample
        good = isinstance(halves, tuple) and all(isinstance(half, bool) for half in halves)
        good = good and len(halves) == len(multiples) - 1
        self._check("temperal_downsample", good, f"a list of true or false for each of {len(multiples) - 1} levels")
        self._check_statistics()
        for name in ("spatial", "temporal"):
            factor = getattr(self, f"{name}_factor")
            stated = getattr(self, f"scale_factor_{name}")
            self._check(f"scale_factor_{name}", stated == factor, f"{factor}, as the levels say")

    @property
    def spatial_factor(self) -> int:
        """Rows of a frame that one latent row stands for."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames that one latent frame, but the first, stands for."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.z_dim

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of the encoder's levels, the highest resolution first."""
        return tuple(self.base_dim * multiple for multiple in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, the highest resolution first."""
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        return tuple(base * multiple for multiple in self.dim_mult)

    @property
    def decoder_history(self) -> int:
        """Latent frames before a latent frame that its decoded frames depend on, besides itself.

        Whoever goes on with a video at some latent frame, and has no state of it, decodes that many before it again.
        """
        reach, rate = 0, 1
        convolutions = 1 + 2 * 2  # the first one, and two blocks of two in the middle
        for level in reversed(range(len(self.dim_mult))):
            convolutions += 2 * (self.num_res_blocks + 1) + (level == 0)
            if level > 0 and self.temperal_downsample[level - 1]:
                reach += -(-2 * (convolutions + 1) // rate)
                convolutions, rate = 0, 2 * rate
        return reach + -(-2 * convolutions // rate)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "autoencoder"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        return {"_class_name": CLASS_NAME, **dataclasses.asdict(self)}

    def _check_statistics(self) -> None:
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            good = isinstance(value, tuple) and len(value) == self.z_dim and all(map(_is_number, value))
            positive = name == "latents_std"
            good = good and (not positive or all(number > 0 for number in value))
            kind = "positive number" if positive else "number"
            self._check(name, good, f"a {kind} for each of z_dim={self.z_dim} channels")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise UserError(f"autoencoder {name}={getattr(self, name)!r} is not allowed; allowed is {allowed}: mend it")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
