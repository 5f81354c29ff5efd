"""A look at a cache: pictures above, what the autoencoder makes of their latents below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, save_png, to_pil
from train.data.buckets import Bucket
from train.data.cache import CHECK_FILE, LATENTS, CacheReader
from train.data.cache_plan import view_of
from train.data.decoding import BadPicture, decode_picture
from train.data.encoding import PictureEncoder, to_network_range
from train.data.source import ImageSource

_SHOWN = 6  # pictures
_LONGEST_LABEL = 40  # characters
_PEAK = 2.0  # pictures are in [-1, 1]


def draw_check_picture(
    directory: Path,
    source: ImageSource,
    encoder: PictureEncoder,
    say: Callable[[str], None],
    writing: AbstractContextManager,
) -> Path | None:
    """Draws some pictures of the commonest size with their captions, and prints how near the decoded ones are to them.

    Args:
        directory: of a finished cache; the picture goes there.
        source: where its pictures are.
        encoder: with the autoencoder that made it.
        say: prints a line.
        writing: held while the file is written.

    Returns:
        Where it is; None if none of the pictures could be read again.
    """
    reader = CacheReader(directory)
    samples, height, width = samples_of_one_size(reader, _SHOWN)
    records = {record.key: record for record in source.records}
    places = reader.places(LATENTS)
    originals, latents, captions = [], [], []
    for sample in samples:
        key, variant = sample["key"], sample["variants"][0]
        if records[key].size is None:
            continue
        view = view_of(key, variant, Bucket(height, width))
        channels = encoder.autoencoder.image_channels
        try:
            picture = decode_picture(source.read(records[key]), name=key, channels=channels)
        except BadPicture:
            continue
        originals.append(to_network_range(view.of(picture)))
        latents.append(reader.read(places[key, variant])["latents"].astype(np.float32))
        captions.append(label_of(sample))
    if not originals:
        return None
    # of a video model a picture is a clip of one frame
    decoded = [
        np.asarray(encoder.autoencoder.decode(each[None])).reshape(original.shape)
        for each, original in zip(latents, originals)
    ]
    error = float(np.mean([np.square(np.clip(b, -1, 1) - a).mean() for a, b in zip(originals, decoded)]))
    path = directory / CHECK_FILE
    factor = automatic_enlargement(height, width)
    pictures = [enlarge_image(to_pil(np.clip(each / 2 + 0.5, 0, 1)), factor) for each in [*originals, *decoded]]
    labels = ["original"] * len(originals) + captions
    with writing:
        save_png(path, image_grid(pictures, columns=len(originals), labels=labels))
    say(f"decoded again, pictures have {nearness(error)}; look at {path}")
    return path


def samples_of_one_size(reader: CacheReader, most: int) -> tuple[list[dict[str, Any]], int, int]:
    """Some samples of the commonest size, spread over the cache, and that size's height and width."""
    samples = list(reader.samples())
    height, width = Counter(tuple(sample["size"]) for sample in samples).most_common(1)[0][0]
    samples = [sample for sample in samples if sample["size"] == [height, width]]
    return samples[:: max(1, len(samples) // most)][:most], height, width


def nearness(error: float) -> str:
    """A mean squared error of numbers in [-1, 1], in words."""
    ratio = f"PSNR {10 * np.log10(_PEAK**2 / error):.1f} dB" if error > 0 else "without any error"
    return f"a mean squared error of {error:.2e} in [-1, 1], {ratio}"


def label_of(sample: dict[str, Any]) -> str:
    """A sample's first caption, short and printable."""
    text = sample["captions"][0][0] if sample["captions"] else ""
    text = text.encode("latin-1", "replace").decode("latin-1") or "(no caption)"
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."
