"""A look at a cache of clips: frames of some of them, and below them what the autoencoder makes of their latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, save_png, to_pil
from train.data.buckets import Bucket
from train.data.cache import CHECK_FILE, LATENTS, CacheReader
from train.data.cache_plan import view_of
from train.data.check_picture import label_of, nearness, samples_of_one_size
from train.data.decoding import BadPicture
from train.data.encoding import ClipEncoder, to_network_range
from train.data.video.source import ClipSource

_CLIPS = 3
_FRAMES = 5


def draw_check_strip(
    directory: Path,
    source: ClipSource,
    encoder: ClipEncoder,
    say: Callable[[str], None],
    writing: AbstractContextManager,
) -> Path | None:
    """Draws frames of some clips of the commonest size, and prints how near the decoded ones are to them.

    Args:
        directory: of a finished cache; the picture goes there.
        source: where its clips are.
        encoder: with the autoencoder that made it.
        say: prints a line.
        writing: held while the file is written.

    Returns:
        Where it is; None if none of the clips could be read again.
    """
    reader = CacheReader(directory)
    samples, height, width = samples_of_one_size(reader, _CLIPS)
    records = {record.key: record for record in source.records}
    places = reader.places(LATENTS)
    shown = np.unique(np.linspace(0, encoder.frames - 1, min(_FRAMES, encoder.frames)).round().astype(int))
    factor = automatic_enlargement(height, width)
    pictures, labels, errors = [], [], []
    for sample in samples:
        key, variant = sample["key"], sample["variants"][0]
        view = view_of(key, variant, Bucket(height, width))
        try:
            read = source.read_clips([records[key]], [view], encoder.autoencoder.image_channels)
        except BadPicture:
            continue
        if not read.clips:
            continue
        original = to_network_range(next(iter(read.clips.values())))
        latents = reader.read(places[key, variant])["latents"].astype(np.float32)
        decoded = np.clip(np.asarray(encoder.autoencoder.decode(latents[None]))[0], -1, 1)
        errors.append(float(np.square(decoded - original).mean()))
        for clip, label in ((original, "original"), (decoded, label_of(sample))):
            pictures += [enlarge_image(to_pil(np.clip(clip[frame] / 2 + 0.5, 0, 1)), factor) for frame in shown]
            labels += [label, *(f"frame {frame}" for frame in shown[1:])]
    if not pictures:
        return None
    path = directory / CHECK_FILE
    with writing:
        save_png(path, image_grid(pictures, columns=len(shown), labels=labels))
    say(f"decoded again, clips have {nearness(float(np.mean(errors)))}; look at {path}")
    return path
