"""Sizes that clips are trained at: the video models' tables, scaled ones, or one exact size."""

from __future__ import annotations

from configs.data import ClipPicturesConfig, ImageDataConfig, VideoDataConfig
from sana_jax.errors import UserError
from sana_jax.pipelines.resolution import Bin, video_bins
from train.data.buckets import scaled_table


def clip_sizes(data: ImageDataConfig, sample_size: int, factor: int, patch: int = 1) -> tuple[Bin, ...]:
    """The sizes that clips, or pictures as clips of one frame, are brought to.

    ``clip_size`` where that is named; else the model's published table, or that table scaled so that its square has
    ``resolution``; a model without a table has one square size.

    Args:
        data: its ``clip_size``, ``resolution`` and ``aspect_buckets`` are used.
        sample_size: the transformer's.
        factor: pixels per latent.
        patch: latents along a token's side.

    Raises:
        UserError: a size that does not divide into tokens.
    """
    multiple = factor * patch
    exact = data.clip_size if isinstance(data, VideoDataConfig | ClipPicturesConfig) else None
    if exact is not None:
        _check("clip-size", exact, multiple)
        return (Bin(exact[0] / exact[1], *exact),)
    table = video_bins(sample_size, multiple) or ()
    square = next((each.height for each in table if each.height == each.width), sample_size * multiple)
    side = square if data.resolution is None else data.resolution
    if data.resolution is not None:
        _check("resolution", (side,), multiple)
    if not table or not data.aspect_buckets:
        return (Bin(1.0, side, side),)
    if side == square:
        return table
    return scaled_table(table, square, side, multiple)


def _check(option: str, sizes: tuple[int, ...], multiple: int) -> None:
    if any(size < multiple or size % multiple for size in sizes):
        near = " ".join(str(max(1, round(size / multiple)) * multiple) for size in sizes)
        raise UserError(
            f"--data.{option} {' '.join(map(str, sizes))} is not allowed; this model needs multiples of {multiple} px: "
            f"choose {near}"
        )
