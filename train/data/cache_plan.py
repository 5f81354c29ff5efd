"""What belongs into a cache and where it is, as functions of the configuration: variants, identity, folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configs.data import ImageDataConfig, VideoDataConfig
from configs.schema import RunConfig
from sana_jax.errors import UserError
from sana_jax.pipelines.model_directory import ModelDirectory
from sana_jax.pipelines.resolution import Bin
from train.data.buckets import Bucket, size_table
from train.data.cache import FORMAT, CacheIdentity, Name
from train.data.conditions import Condition, View
from train.data.decoding import LANCZOS_BELOW
from train.data.encoding import autoencoder_identity, latent_dtype, prompt_dtype, text_encoder_identity
from train.data.source import Record
from train.data.video.sizes import clip_sizes
from train.data.video.windows import SAMPLING

RESIZE = "bicubic, lanczos from 1536"
NULL_PROMPT: Name = ("null", "")  # the record of the encoding of no text
NO_STAMPS: Mapping[str, str] = MappingProxyType({})


def cache_identity(data: ImageDataConfig, model: ModelDirectory, conditions: Sequence[Condition]) -> CacheIdentity:
    """Everything that the numbers of a cache are a function of, apart from pictures, videos and texts.

    Which crops there are of a picture, and whether it is mirrored as well, is not part of it: they are further records.
    """
    table = table_of(data, model)
    fields = {
        "format": FORMAT,
        **autoencoder_identity(model),
        **text_encoder_identity(model),
        "latents.dtype": latent_dtype(data, model.autoencoder),
        "prompts.dtype": prompt_dtype(model.text_encoder),
        "pictures.sizes": " ".join(f"{size.height}x{size.width}" for size in table),
        "pictures.channels": model.autoencoder.image_channels,
        "pictures.resize": _resize_of(table),
    }
    if is_for_videos(model):
        fields["clips.frames"] = 1
    if isinstance(data, VideoDataConfig):
        most = "all" if data.clips_per_video is None else f"at most {data.clips_per_video} of a video"
        fields |= {
            "clips.frames": data.clip_frames,
            "clips.fps": data.clip_fps,
            "clips.windows": f"every {data.clip_stride or data.clip_frames} frames, {most}",
            "clips.source_fps": data.source_fps,
            "clips.sampling": SAMPLING,
        }
    for condition in conditions:
        fields |= {f"conditions.{condition.name}.{name}": value for name, value in condition.identity.items()}
    return CacheIdentity(fields)


def _resize_of(table: Sequence[Bin]) -> str:
    """How pictures are scaled to sizes."""
    bicubic = any(size.height * size.width >= LANCZOS_BELOW**2 for size in table)
    return f"{RESIZE}, bicubic from {LANCZOS_BELOW}" if bicubic else RESIZE


def cache_directory(config: RunConfig, identity: CacheIdentity) -> Path:
    """Where the cache of a run is: ``--data.cache``, or one beside the run that runs on the same data share.

    Raises:
        UserError: neither a cache nor data is named, or the cache would lie in the data.
    """
    if config.data.cache is not None:
        directory, data = Path(config.data.cache).expanduser(), config.data.path
        if data is not None and Path(data).is_dir() and directory.resolve().is_relative_to(Path(data).resolve()):
            raise UserError(
                f"--data.cache {directory} lies in --data.path {data}, where its check picture would be taken for "
                "data; name a place outside of it"
            )
        return directory
    if config.data.path is None:
        raise UserError("--data.path is missing: name a folder of pictures, or a finished cache with --data.cache")
    path = Path(config.data.path).absolute()
    digest = hashlib.sha256(f"{path} {identity.id}".encode()).hexdigest()[:8]
    return Path(config.run_dir).parent / "cache" / f"{path.name or 'data'}-{digest}"


def variants(data: ImageDataConfig) -> tuple[str, ...]:
    """The names of the variants of each picture that a configuration trains on."""
    crops = ("center",) if data.crop == "center" else tuple(f"crop {number}" for number in range(data.crops))
    return crops + tuple(f"{crop} mirrored" for crop in crops) * data.flip


def view_of(key: str, variant: str, bucket: Bucket) -> View:
    """The part of a picture that a variant shows: a function of these alone."""
    if variant.startswith("crop"):
        crop = variant.removesuffix(" mirrored")
        digest = hashlib.blake2b(f"{key}/{crop}".encode(errors="surrogatepass"), digest_size=16).digest()
        place = tuple(int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
    else:
        place = "center"
    return View(bucket.height, bucket.width, place, variant.endswith(" mirrored"))


def table_of(data: ImageDataConfig, model: ModelDirectory) -> tuple[Bin, ...]:
    """The sizes that a model's pictures, or clips, may have."""
    if is_for_videos(model):
        network = model.transformer_config
        sample_size = getattr(network, "sample_size", 1)  # world models have none, and their clips one exact size
        return clip_sizes(data, sample_size, model.autoencoder.spatial_factor, _patch(network))
    return size_table(
        model.transformer_config.sample_size,
        model.autoencoder.spatial_factor,
        data.resolution,
        aspect_buckets=data.aspect_buckets,
    )


def is_for_videos(model: ModelDirectory) -> bool:
    """Whether a model's autoencoder takes videos."""
    return hasattr(model.autoencoder, "temporal_factor")


def _patch(network) -> int:
    """Latents along a token's side."""
    patch = network.patch_size
    return patch if isinstance(patch, int) else patch[-1]


def signature(
    record: Record, bucket: Bucket | None, conditions: Sequence[Condition], stamps: Mapping[str, str] = NO_STAMPS
) -> str:
    """What a picture's records depend on beside the identity; ``stamps`` are of the files that conditions read."""
    inputs: dict[str, Any] = {condition.name: record.columns.get(condition.name) for condition in conditions}
    inputs |= {name: [inputs[name], stamp] for name, stamp in stamps.items()}
    text = json.dumps([record.stamp, record.size, bucket, inputs], default=repr, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
