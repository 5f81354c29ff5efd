"""Prompts without videos as training data: for self-forcing, where the generator makes the videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from configs.longsana_data import PromptsDataConfig
from kernels.typing import Float, Int
from sana_jax.autoencoders.base import latent_frames
from sana_jax.errors import UserError
from sana_jax.pipelines.checks import check_multiple
from sana_jax.pipelines.model_directory import ModelDirectory
from train.batch import Batch
from train.data.cache import CacheReader
from train.data.prompt_records import PromptRecords
from train.objectives.longsana.self_forcing import REAL_EMBEDS, REAL_MASK

Say = Callable[[str], None]
Shape = tuple[int, int, int, int]


class PromptsData:
    """Prompts, encoded ahead of training. A batch's ``latents`` are zeros: only their shape, that of the videos which
    the generator makes, is read.

    With a motion score for the real score, ``conditions`` have the prompts as it is told them: ``real_prompt_embeds``
    (B, L, C) and ``real_prompt_attention_mask`` (B, L).

    Attributes:
        prompts: as they were written.

    Args:
        directory: the cache of the encoded prompts.
        prompts: see above.
        config: motion scores and the negative prompt are used.
        latent_shape: (T, H, W, C) of the videos' latents.

    Raises:
        FileNotFoundError, CheckpointError: there is no cache, or it is damaged.
        UserError: it lacks prompts.
    """

    validation: None = None
    """Nothing is held out."""

    def __init__(self, directory: Path, prompts: Sequence[str], config: PromptsDataConfig, latent_shape: Shape):
        self.directory, self.config, self._shape, self.prompts = directory, config, latent_shape, tuple(prompts)
        self._texts = texts_of(prompts, config.motion_score)
        self._real = None if config.real_motion_score is None else texts_of(prompts, config.real_motion_score)
        self._encoded = PromptRecords(CacheReader(directory))
        lost = self._encoded.missing([*self._texts, *(self._real or ())])
        lost += [] if self._encoded.has_negative(config.negative_prompt) else [config.negative_prompt]
        if lost:
            raise UserError(f"the cache {directory} lacks {len(lost)} prompts, such as {lost[0][:80]!r}; make it again")

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def buckets(self) -> dict[Shape, Int[np.ndarray, " n"]]:
        """All samples have one shape."""
        return {self._shape: np.arange(len(self))}

    @property
    def preview_shape(self) -> Shape:
        """(T, H, W, C) of the latents."""
        return self._shape

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return self.config.clip_fps

    def condition_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of further inputs, without the batch axis; ``shape`` is that of the latents."""
        del shape
        length, channels = self._encoded.shape
        return {} if self._real is None else {REAL_EMBEDS: (length, channels), REAL_MASK: (length,)}

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """The samples of these indices, as arrays on the host. There is nothing to choose.

        Raises:
            CheckpointError: the cache is damaged.
        """
        rows = np.asarray(indices).tolist()
        conditions = {}
        if self._real is not None:
            embeds, mask = self._encoded.encode([self._real[row] for row in rows])
            conditions = {REAL_EMBEDS: embeds, REAL_MASK: mask}
        latents = np.zeros((len(rows), *self._shape), np.float32)
        return Batch(latents, *self._encoded.encode([self._texts[row] for row in rows]), conditions)

    @property
    def captions(self) -> list[str]:
        """The distinct prompts, as the generator is told them."""
        return list(self._texts)

    def caption_of(self, index: int) -> str:
        """A sample's prompt, as the generator is told it."""
        return self._texts[index]

    def encode(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of ``captions``, or of the run's preview prompts.

        Raises:
            UserError: another text.
        """
        return self._encoded.encode(captions)

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of the negative prompt; of no text where there is none."""
        return self._encoded.negative_encoding(self.config.negative_prompt)

    def describe(self) -> str:
        """One line for the start of a run."""
        config, real = self.config, self.config.real_motion_score
        told = "" if real is None else f"; the real score is told motion score {real}"
        if config.negative_prompt.strip():
            told += f"; its unconditional branch is told {config.negative_prompt[:60]!r}"
        return (
            f"{len(self):,} prompts such as {self._texts[0][:60]!r} from {config.path}, encoded in {self.directory}; "
            f"videos of {config.clip_frames} frames of {config.clip_size[0]}x{config.clip_size[1]} px (latents "
            f"{'x'.join(map(str, self._shape))}){told}"
        )


def latent_shape(data: PromptsDataConfig, model: ModelDirectory) -> Shape:
    """(T, H, W, C) of the latents of the videos that a model makes.

    Raises:
        UserError: a size or a number of frames that the model does not make.
    """
    autoencoder, (_, *patch) = model.autoencoder, model.transformer_config.patch_size
    factor = autoencoder.spatial_factor
    for name, value, side in zip(("height", "width"), data.clip_size, patch):
        check_multiple(f"--data.clip-size: {name}", value, factor * side)
    frames = latent_frames(data.clip_frames, autoencoder.temporal_factor)
    height, width = (value // factor for value in data.clip_size)
    return frames, height, width, autoencoder.latent_channels


def texts_of(prompts: Sequence[str], motion_score: int | None) -> list[str]:
    """Prompts as a network is told them."""
    return list(prompts) if motion_score is None else [f"{text} motion score: {motion_score}." for text in prompts]
