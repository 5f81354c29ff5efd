"""The part of ``train.inspect_data`` that is about latents in zip files with the camera's path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from configs.world_data import WorldDataConfig
from sana_jax.autoencoders.base import latent_frames
from sana_jax.errors import UserError
from train.data.source import refuse_too_many_bad
from train.data.world.cameras import CameraShape
from train.data.world.zip_files import ZipFindings, find_zip_samples, what_of_no_caption
from train.inspect_data import check_options, say_scores, say_what_stops_training, short

_SHOWN = 3  # examples


@dataclass(frozen=True)
class InspectLatentsConfig(WorldDataConfig):
    """Reports what zip files of latents hold. The options are those of --data in training; the path may come first."""

    format: Literal["zip_latents"] = "zip_latents"
    """Latents in zip files."""
    batch_size: int = 8
    """Sizes with fewer samples than this are rare."""
    temporal_factor: int = 8
    """Frames per latent frame, by which poses of pixel frames are counted; the published autoencoder's is 8."""
    spatial_factor: int = 32
    """Pixels per side of a latent pixel; the published autoencoder's is 32."""
    contact_sheet: None = field(default=None, init=False)  # latents are no pictures
    cache: None = field(default=None, init=False)
    latent_dtype: Literal["auto"] = field(default="auto", init=False)

    def __post_init__(self):
        super().__post_init__()
        check_options(self)
        for name in ("temporal_factor", "spatial_factor"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is not allowed; choose 1 or more, as the "
                    "autoencoder of the latents has"
                )


def inspect_latents(config: InspectLatentsConfig, say: Callable[[str], None] = print) -> bool:
    """Reports line by line; returns whether nothing would stop training.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: no zip file, or nothing in it that can be used.
    """
    camera = CameraShape(config.temporal_factor, config.spatial_factor, plucker=True)
    frames = latent_frames(config.clip_frames, config.temporal_factor)
    found = find_zip_samples(config, None, None, camera)
    say(f"{config.path}: latents in {found.files} zip files")
    say(f"usable: {len(found.samples)} of {found.looked_at}")
    for problem in found.problems:
        say(f"unusable: {problem.name} {problem.reason}")
    if found.filtered:
        say(f"note: {found.filtered} samples do not pass --filters")
    if found.without_caption:
        say(f"note: {found.without_caption} samples {what_of_no_caption(config)}")
    if found.unusual:
        say(f"note: {len(found.unusual)} cameras are unusual, such as: {found.unusual[0]}")
    for line in _describe(found, config, frames):
        say(line)
    trains = not say_what_stops_training(
        say,
        lambda: refuse_too_many_bad(found.problems, found.looked_at, config.max_bad_share),
        lambda: _refuse_none(found, config, frames),
        lambda: say_scores((sample.captions for sample in found.samples), config, say),
    )
    return trains


def _describe(found: ZipFindings, config: InspectLatentsConfig, frames: int) -> list[str]:
    """Shapes, lengths and captions."""
    shapes = Counter(sample.shape for sample in found.samples)
    lines = []
    for (*sides, channels), count in shapes.most_common():
        rare = f"  rare: fewer than --batch-size {config.batch_size}" if count < config.batch_size else ""
        lines.append(f"latents {channels} x {'x'.join(map(str, sides))}: {count}{rare}")
    lengths = [sample.shape[0] for sample in found.samples]
    less, more = sum(length < frames for length in lengths), sum(length > frames for length in lengths)
    what = "left out" if config.short_clips == "skip" else "filled up"
    lines.append(
        f"clips of {config.clip_frames} frames ({frames} latent frames): {less} samples are shorter and {what}, {more} "
        "are longer and cut"
    )
    texts = [caption.text for sample in found.samples for caption in sample.captions]
    lines.append(f"captions: {len(texts)}, {len(set(texts))} different")
    return [*lines, *(f"  for example: {short(text)}" for text in list(dict.fromkeys(texts))[:_SHOWN])]


def _refuse_none(found: ZipFindings, config: InspectLatentsConfig, frames: int) -> None:
    long_enough = [sample for sample in found.samples if sample.shape[0] >= frames or config.short_clips == "pad"]
    if not long_enough:
        raise UserError(
            f"{config.path} has no samples that take part: {found.looked_at} were looked at; choose fewer "
            "--data.clip-frames, or --data.short-clips pad"
        )
