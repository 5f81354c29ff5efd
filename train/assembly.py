"""The parts of a run, put together from its configuration: base model, data, recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from configs.data import MovingDigitsDataConfig, VideoDataConfig
from configs.longsana_data import PromptsDataConfig, TrajectoriesDataConfig
from configs.moving_camera import MovingCameraDataConfig
from configs.schema import DigitsDataConfig, RunConfig
from configs.world import WorldChunksConfig
from configs.world_data import WorldDataConfig
from kernels.typing import Float, Int
from sana_jax.autoencoders import Autoencoder, VideoAutoencoder
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.errors import UserError, reason_of
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.model_directory import WORLD_PIPELINE, WORLD_STREAM
from sana_jax.text_encoders import TextEncoder
from train.base_model import BaseModel, absolute, open_base_model, open_encoders, refuse_distilled, settle
from train.batch import FRAME_VALID
from train.data import Dataset, DigitsData
from train.data.conditions import KINDS
from train.data.pinned import DATA
from train.data.video.moving_camera import MovingCameraData
from train.data.video.moving_digits import MovingDigitsData
from train.longsana_data import open_prompts_data, open_trajectories
from train.objectives.flow_matching import FlowMatching
from train.preemption import StopRequest
from train.prepared_data import open_prepared
from train.prior_data import open_with_prior
from train.recipes import DataShapes, Recipe, make_recipe
from train.video_data import open_video_data
from train.world_data import open_world_data

_DIGITS_FPS = 4.0  # slow enough to follow a digit of 8 pixels


class TrainingData(Dataset, Protocol):
    """What a whole run asks of data, beside the loader's batches."""

    @property
    def captions(self) -> list[str]:
        """Distinct captions, for previews."""
        ...

    @property
    def preview_shape(self) -> tuple[int, ...]:
        """([T,] H, W, C) of the latents that previews draw."""
        ...

    def caption_of(self, index: int) -> str:
        """A sample's first caption."""
        ...

    def encode(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of captions of the data, or of the run's preview prompts."""
        ...

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of no text, or of the negative prompt where the data has one."""
        ...

    def describe(self) -> str:
        """One line for the start of a run."""
        ...


class RunParts(NamedTuple):
    """What a run is made of."""

    config: RunConfig
    """Settled: with what it had left to the base model."""
    base: BaseModel | None
    dataset: TrainingData
    recipe: Recipe
    text_encoder: TextEncoder
    autoencoder: Autoencoder | VideoAutoencoder
    encoders: BaseModel | None = None
    """The model that these two are of; None where they are the data's."""

    @property
    def pipeline(self) -> str:
        """The pipeline that samples what the run trains."""
        if self.config.few_steps is not None:
            return WORLD_STREAM if self.config.few_steps.is_world else "LongSanaVideoPipeline"
        if self.config.trains_a_world:
            return WORLD_PIPELINE
        if self.recipe.kind in ("controlnet", "sprint"):
            return {"controlnet": "SanaControlNetPipeline", "sprint": "SanaSprintPipeline"}[self.recipe.kind]
        if self.base is not None:
            return self.base.pipeline
        return "SanaVideoPipeline" if self.config.trains_on_clips else "SanaPipeline"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of what previews draw."""
        factor = self.autoencoder.spatial_factor
        height, width = self.dataset.preview_shape[-3:-1]
        return height * factor, width * factor

    @property
    def frames(self) -> int | None:
        """Frames of the clips that previews draw; None for pictures."""
        if not self.config.trains_on_clips:
            return None
        return pixel_frames(self.dataset.preview_shape[0], self.autoencoder.temporal_factor)

    @property
    def fps(self) -> float | None:
        """Frames per second of clips; None for pictures."""
        if isinstance(self.config.data, VideoDataConfig | PromptsDataConfig):
            return self.config.data.clip_fps
        if self.base is not None and self.base.parts.defaults.fps is not None:
            return self.base.parts.defaults.fps
        return _DIGITS_FPS if self.config.trains_on_clips else None

    @property
    def trained_from(self) -> BaseModelFile | None:
        """What the run's directory says of its base model."""
        model = self.base or self.encoders
        if model is None:
            return None
        settings = self.recipe.settings()
        place = absolute(model.name)
        return BaseModelFile(self.recipe.kind, model.name, place, model.weights_id, settings, model.variant)


def open_base(config: RunConfig) -> tuple[RunConfig, BaseModel | None]:
    """The settled configuration, and the model that the run starts from. Weights are read later.

    Raises:
        UserError, FileNotFoundError, CheckpointError: one line about what does not fit.
    """
    learners = {
        "a LoRA beside": config.lora,
        "a ControlNet beside": config.controlnet,
        "a student beside": config.sprint,
        # a world model may learn them from nothing
        "causal blocks from": None if isinstance(config.chunk_causal, WorldChunksConfig) else config.chunk_causal,
        "a few-step generator from": config.few_steps,
    }
    wanted = [name for name, settings in learners.items() if settings is not None]
    if wanted and config.model is None:
        raise UserError(
            f"the preset {config.preset} trains {wanted[0]} a model; name one with --model DIRECTORY (a "
            "published or converted model, or a training run such as runs/digits)"
        )
    base = None if config.model is None else open_base_model(config.model, config.model_variant)
    if base is not None:
        refuse_distilled(config, base.pipeline)
    return settle(config, base), base


def open_start(config: RunConfig) -> BaseModel | None:
    """The model that the generator of self-forcing begins as; None where it begins as the base model.

    Raises:
        UserError, FileNotFoundError, CheckpointError: one line about what does not fit.
    """
    if config.self_forcing is None or config.self_forcing.generator is None:
        return None
    try:
        start = open_base_model(config.self_forcing.generator)
    except FileNotFoundError as error:
        raise UserError(
            f"--self-forcing.generator {config.self_forcing.generator} is no model ({reason_of(error, 1000)}): name "
            "the run that made a generator of a few steps, or leave the option out to begin as --model"
        ) from error
    if start.parts.transformer_config != config.transformer:
        raise UserError(
            f"--self-forcing.generator {start.name} has another network than --model {config.model}; both must be of "
            "one shape, as a generator made from that model is"
        )
    return start


def assemble(
    config: RunConfig, base: BaseModel | None, say: Callable[[str], None], stop: StopRequest
) -> RunParts | None:
    """Prepares the data, where that is not done yet, and chooses the recipe.

    Args:
        config: settled.
        base: its base model.
        say: prints a line.
        stop: a request to stop.

    Returns:
        The parts; None if a request to stop came while the data was prepared.

    Raises:
        UserError, FileNotFoundError, CheckpointError: one line about what does not fit.
    """
    if isinstance(config.data, DigitsDataConfig):
        dataset = DigitsData(config.data)
        return RunParts(config, base, dataset, make_recipe(config), dataset.text_encoder, dataset.autoencoder)
    if isinstance(config.data, MovingDigitsDataConfig | MovingCameraDataConfig):
        dataset = made_clips(config.data)
        recipe = make_recipe(config, _data_shapes(config, dataset, dataset.autoencoder))
        return RunParts(config, base, dataset, recipe, dataset.text_encoder, dataset.autoencoder)
    encoders = base or open_encoders(config)
    _check_settings(config)
    if config.trains_on_clips:
        return _on_videos(config, base, encoders, say, stop)
    recipe = make_recipe(config)
    declared = {condition.partition("=")[0] for condition in config.data.conditions}
    _check_conditions(recipe.conditions, declared)
    if config.prior is not None and config.prior.caption is None:
        say("prior preservation: none; --prior.caption 'a photo of a dog' would keep the subject's class as it is")
    dataset = open_prepared(config, encoders.parts, DATA, say, stop)
    if dataset is not None and config.prior is not None and config.prior.caption is not None:
        dataset = open_with_prior(config, base, dataset, say, stop)
    if dataset is None:
        return None
    return RunParts(config, base, dataset, recipe, encoders.parts.text_encoder, encoders.parts.autoencoder, encoders)


def made_clips(data: MovingDigitsDataConfig | MovingCameraDataConfig) -> MovingDigitsData | MovingCameraData:
    """Clips that are made in memory, with an autoencoder and a text encoder of their own."""
    return (MovingDigitsData if isinstance(data, MovingDigitsDataConfig) else MovingCameraData)(data)


def _on_videos(
    config: RunConfig, base: BaseModel | None, encoders: BaseModel, say: Callable[[str], None], stop: StopRequest
) -> RunParts | None:
    """The parts of a run on clips, on trajectories of a teacher, or on prompts without videos."""
    model = encoders.parts
    if isinstance(config.data, TrajectoriesDataConfig):
        dataset = open_trajectories(config, model, say)
    elif isinstance(config.data, PromptsDataConfig):
        dataset = open_prompts_data(config, model, say, stop)
    elif isinstance(config.data, WorldDataConfig):
        dataset = open_world_data(config, model, say, stop)
    else:
        dataset = open_video_data(config, model, say, stop)
    if dataset is None:
        return None
    recipe = make_recipe(config, _data_shapes(config, dataset, model.autoencoder))
    if isinstance(config.data, VideoDataConfig):
        _check_conditions(recipe.conditions, set(dataset.condition_shapes(dataset.preview_shape)) - {FRAME_VALID})
    return RunParts(config, base, dataset, recipe, model.text_encoder, model.autoencoder, encoders)


def _data_shapes(config: RunConfig, dataset: TrainingData, autoencoder: VideoAutoencoder) -> DataShapes | None:
    """A batch as shapes, and the autoencoder, for training on windows of growing videos; None for other runs.

    Raises:
        UserError: clips of several sizes where windows follow one another, or of another length than the windows.
    """
    stream = None if config.self_forcing is None else config.self_forcing.stream
    if stream is None:
        return None
    shapes = list(dataset.buckets)
    if len(shapes) > 1 or shapes[0][0] != stream.window_frames:
        found = ", ".join("x".join(map(str, shape[:-1])) for shape in shapes[:4])
        raise UserError(
            f"--self-forcing.stream has windows of {stream.window_frames} latent frames, all of one size, and the data "
            f"has latents of {found}; give one size and that many frames, or set --self-forcing.stream.window-frames"
        )
    indices = next(iter(dataset.buckets.values()))
    batch = dataset.batch(np.full(config.batch_size, indices[0]), np.zeros((config.batch_size, 2)))
    batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    return DataShapes(batch, autoencoder)


def _check_settings(config: RunConfig) -> None:
    """Raises ``UserError`` for what only training would find wrong, before the data is prepared, which takes long."""
    if config.sprint is None and config.few_steps is None:  # which have noise levels of their own
        _ = FlowMatching(None, config.flow, None, None).density
    if getattr(config.data, "validation_share", None) == 0:
        refuse_nothing_held_out(config)


def refuse_nothing_held_out(config: RunConfig) -> None:
    """Raises ``UserError`` where a run that keeps no samples from training is to measure their loss."""
    if config.validation.every:
        raise UserError(
            f"--validation.every {config.validation.every}: no samples are kept from training; hold some out with "
            "--data.validation-share 0.05, or leave --validation.every at 0"
        )


def _check_conditions(wanted: Sequence[str], there: set[str]) -> None:
    """Raises ``UserError`` unless the data has just the conditions that the recipe reads."""
    if missing := sorted(set(wanted) - there):
        raise UserError(
            f"the network reads the condition {missing[0]}, which the data does not have; declare it with "
            f"--data.conditions {missing[0]}=KIND, where KIND is one of {', '.join(KINDS)} (siglip:DIRECTORY)"
        )
    if unused := sorted(there - set(wanted)):
        raise UserError(
            f"--data.conditions declares {unused[0]}, which nothing in this run reads; leave it out, or choose a "
            "preset that does: controlnet, siglip_zoom_lora"
        )
