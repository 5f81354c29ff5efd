"""A teacher's sampling trajectories as training data: ``python -m train.make_trajectories`` writes the directory.

It is a cache (``train.data.cache``) whose records hold where a trajectory ends, ``latents``, and its states before,
``trajectory``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.data import ImageDataConfig
from kernels.typing import Float, Int
from sana_jax.compilation import readable_bytes
from sana_jax.errors import CheckpointError, UserError
from sana_jax.pipelines.model_directory import ModelDirectory
from sana_jax.text_encoders import TextEncoder
from train.data.cache import LATENTS, SAMPLES_FILE, CacheIdentity, read_identity
from train.data.cache_plan import variants
from train.data.cached import CachedData
from train.data.encoding import Say, autoencoder_identity, encode_prompts, prompt_dtype, text_encoder_identity
from train.data.pinned import holds, pinned_identities
from train.data.prompt_records import PromptRecords, padded

# Fields of the identity.
TIMESTEPS = "trajectories.timesteps"
# In which a converted copy of a model may differ from the model.
_OF_FILES = ("text_encoder.weights", "text_encoder.dtype")
_OF_ENCODERS = ("autoencoder.", "text_encoder.")
MAKING = "python -m train.make_trajectories"


class TrajectoriesData(CachedData):
    """The trajectories of a directory. A batch's ``latents`` (B, T, H, W, C) are where they end, and
    ``conditions["trajectory"]`` (B, S, T, H, W, C) their states at the listed timesteps, from noise on.

    Args:
        directory: what ``python -m train.make_trajectories`` has written.
        timesteps: of the states that training wants; None for those that there are.
        pins: the list of trajectories that a run began with (``train.data.pinned``), instead of all.

    Raises:
        FileNotFoundError: there are no trajectories.
        UserError: they are not finished, or have states at other timesteps.
        CheckpointError: they are damaged, or not those that a run began with.
    """

    pins_identity: ClassVar[bool] = True  # teacher, seed and steps are no settings of the run

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        timesteps: Sequence[int] | None = None,
        pins: Path | None = None,
    ):
        directory = Path(directory).expanduser()
        identity = _read_trajectories_identity(directory)
        there = tuple(identity.fields[TIMESTEPS])
        if timesteps is not None and tuple(timesteps) != there:
            raise UserError(
                f"the trajectories {directory} have states at the timesteps {_words(there)}, and --ode.timesteps are "
                f"{_words(timesteps)}; make them again with {MAKING} --timesteps {_words(timesteps)}, or train with "
                "theirs"
            )
        config = ImageDataConfig()  # a caption each, in one variant, and none held out
        if pins is not None:
            same = pinned_identities(pins) <= {identity.id}
            if not (same and holds(directory, identity, pins, (), variants(config))):
                raise CheckpointError(
                    f"the run began with other trajectories ({pins}) than {directory} has: of other prompts, or made "
                    "by another teacher, seed or steps; name the directory that it began with (--data.path), or start "
                    "a new run"
                )
        super().__init__(directory, config, pins=pins)
        self._further: dict[str, Float[np.ndarray, "n C"]] = {}

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Of the states, from noise on, without the 0 of the end."""
        return tuple(self.identity.fields[TIMESTEPS])

    @property
    def fps(self) -> float:
        """Frames per second of the teacher's videos."""
        return float(self.identity.fields["clips.fps"])

    def check_model(self, model: ModelDirectory, say: Say = print) -> None:
        """Makes sure that a model has the teacher's latents and prompts; says where it can't be told.

        Raises:
            CheckpointError: another autoencoder or text encoder, with what differs.
        """
        there = CacheIdentity(
            {name: value for name, value in self.identity.fields.items() if name.startswith(_OF_ENCODERS)}
        )
        differing = there.differences(CacheIdentity(encoders_identity(model)))
        shown = [f"{name} is {have!r} there, {want!r} here" for name, (have, want) in differing.items()]
        if set(differing) - set(_OF_FILES):
            raise CheckpointError(
                f"the trajectories {self.directory} are of another autoencoder or text encoder than those of "
                f"{model.path}: {'; '.join(shown)}; train a model that has the teacher's, or make them again with "
                f"{MAKING}"
            )
        if shown:
            say(
                f"data: the trajectories' prompts were encoded with other files than {model.path} has "
                f"({'; '.join(shown)}), which is well where the one is a converted copy of the other"
            )

    def add_prompts(self, texts: Sequence[str], encoder: TextEncoder, say: Say = print) -> None:
        """Encodes texts that are no captions of the trajectories, for this process alone; ``encode`` then has them."""
        records = PromptRecords(self._contents.reader)
        for batch in encode_prompts(encoder, records.missing(texts), say):
            self._further |= {prompt.text: prompt.tokens.astype(prompt_dtype(encoder)) for prompt in batch}

    def encode(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of the trajectories' captions, and of texts that ``add_prompts`` was given.

        Raises:
            UserError: another text.
        """
        further = {text: padded([tokens], self.prompt_shape[0]) for text, tokens in self._further.items()}
        rows = [further[text] if text in further else super(TrajectoriesData, self).encode([text]) for text in captions]
        embeds, masks = zip(*rows)
        return np.concatenate(embeds), np.concatenate(masks)

    def describe(self) -> str:
        """One line for the start of a run."""
        fields = self.identity.fields
        shapes = ", ".join(f"{'x'.join(map(str, shape))}: {len(own)}" for shape, own in self.buckets.items())
        size = sum(shard.num_bytes for shard in self._contents.reader.shards if shard.kind == LATENTS)
        return (
            f"{len(self):,} trajectories of the teacher {fields['teacher.weights']} from {self.directory} "
            f"({readable_bytes(size)}): {fields['trajectories.num_steps']} steps at flow shift "
            f"{fields['trajectories.flow_shift']:g}, guidance {fields['trajectories.guidance_scale']:g}, states at "
            f"{_words(self.timesteps)} and the end; latents {shapes}; {len(self.captions):,} captions"
        )


def encoders_identity(model: ModelDirectory) -> dict[str, Any]:
    """What latents mean, and what encoded prompts are a function of; of the autoencoder its configuration alone, since
    no picture goes through it."""
    configured = {f"autoencoder.{name}" for name in ("class", *model.autoencoder.to_config())}
    latents = {name: value for name, value in autoencoder_identity(model).items() if name in configured}
    return {**latents, **text_encoder_identity(model)}


def _read_trajectories_identity(directory: Path) -> CacheIdentity:
    if not directory.is_dir():
        raise FileNotFoundError(f"--data.path {directory} is not a directory; name one that {MAKING} has written")
    try:
        identity = read_identity(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--data.path {directory} holds no trajectories; name a directory that {MAKING} has written"
        ) from error
    if TIMESTEPS not in identity.fields:
        raise UserError(
            f"--data.path {directory} is a cache of pictures, clips or prompts, not of trajectories; name a directory "
            f"that {MAKING} has written"
        )
    if not (directory / SAMPLES_FILE).is_file():
        raise UserError(
            f"the trajectories {directory} are not finished; continue with {MAKING} and the options that it was "
            "started with"
        )
    return identity


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
