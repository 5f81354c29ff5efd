"""Opening one model after another and drawing with it, so that nothing is compiled, read or encoded twice."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana_jax.errors import UserError
from sana_jax.generate import GenerateConfig, call_arguments, open_pipeline
from sana_jax.lora import find_lora_file, parse_lora_option
from sana_jax.pipelines.base import ImagePipeline
from sana_jax.pipelines.model_directory import VIDEO_PIPELINES, WORLD_PIPELINES, pipeline_of
from sana_jax.pipelines.sampling_function import is_guided
from sana_jax.weights import checkpoint_steps, choose_checkpoint
from sana_jax.weights.identity import weights_id
from train.run_directory import CONFIG_NAME, read_config

_TEXT = "text encoder"
NO_PICTURE = "picture.png"  # GenerateConfig asks for a name; nothing is written there


def is_training_run(directory: Path) -> bool:
    """Whether a model directory has checkpoints of a training run."""
    return (directory / "checkpoints").is_dir()


def chosen_steps(directory: Path, wanted: Sequence[int] | None) -> list[int | None]:
    """The checkpoints to draw with: those wanted, or all (None); ``[None]`` for a model that is no training run.

    Raises:
        CheckpointError: a run without checkpoints, or without one that is wanted.
    """
    if not is_training_run(directory):
        return [None]
    checkpoints = directory / "checkpoints"
    if wanted is None:
        choose_checkpoint(checkpoints, None)  # raises where there is none
        return list(checkpoint_steps(checkpoints))
    return [choose_checkpoint(checkpoints, step) for step in wanted]


def check_draws_from_text(directory: Path, videos: bool = True) -> None:
    """Raises ``UserError`` for a model that needs more than a text, ``FileNotFoundError`` for no model.

    ``videos``: whether it may make videos.
    """
    name = pipeline_of(directory)
    if not videos and name in VIDEO_PIPELINES:
        raise UserError(
            f"{directory} makes videos, and pictures are measured here; name a model for pictures (runs of "
            "moving_digits have python -m train.evaluate_moving_digits)"
        )
    if name in WORLD_PIPELINES:
        raise UserError(
            f"{directory} continues a picture along a camera's path and does not draw from texts alone; use python -m "
            "sana_jax.generate for it, or name a model for pictures or videos"
        )
    if name == "SanaControlNetPipeline":
        raise UserError(
            f"{directory} follows a control picture and does not draw from texts alone; use python -m "
            "sana_jax.generate --control-image for it, or name a text-to-image model"
        )


def model_identity(directory: Path, checkpoint_step: int | None) -> str:
    """A short name of everything in a model directory that decides what is drawn: configurations and weights.

    Of a run that was trained beside a base model, the base model's weights count by the name that the run has of them.
    """
    digest = hashlib.sha256()
    patterns = (
        "model_index.json",
        "base_model.json",
        "condition_tokens.*",
        "*/config.json",
        "*/tokenizer*",
        "scheduler/*.json",
    )
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(directory)} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    transformer = "transformer" if checkpoint_step is None else f"checkpoints/{checkpoint_step}"
    for folder in (transformer, "text_encoder", "vae"):
        digest.update(f"{weights_id(directory / folder)} ".encode())
    return digest.hexdigest()[:12]


def file_identity(path: Path) -> str:
    """A short name of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def as_trained(config: GenerateConfig) -> GenerateConfig:
    """The same request; of a run that was trained with attention clipped as float16 does it, drawn so as well."""
    directory = Path(config.model)
    is_run = is_training_run(directory) and (directory / CONFIG_NAME).is_file()
    if not is_run or not read_config(directory).compute.emulate_fp16_saturation:
        return config
    return dataclasses.replace(config, emulate_fp16_saturation=True)


class Opener:
    """Opens pipelines one after another; those of one model share what does not depend on the transformer's weights.

    The caller lets go of a pipeline before it opens the next, so that one transformer is in memory at a time.
    """

    def __init__(self) -> None:
        self._shared: dict[str, Any] = {}
        self._encoded: dict[tuple[str, bool], tuple[Any, Any]] = {}

    def open(self, config: GenerateConfig) -> ImagePipeline:
        """The pipeline of ``config.model``, with its LoRAs; a further checkpoint of the same model compiles nothing."""
        pipeline = open_pipeline(config)
        shared = self._shared
        key = (config.model, type(pipeline), pipeline.transformer)
        if shared.get("key") == key:
            pipeline.text_encoder, pipeline.autoencoder = shared["text_encoder"], shared["autoencoder"]
            pipeline.programs = shared["programs"]
        else:
            self._encoded = {}
        self._shared = {
            "key": key,
            "text_encoder": pipeline.text_encoder,
            "autoencoder": pipeline.autoencoder,
            "programs": pipeline.programs,
        }
        return pipeline

    def encode(self, pipeline: ImagePipeline, prompts: Sequence[str], negative_prompt: str) -> None:
        """Encodes what was not encoded before with this model, then lets go of the text encoder."""
        wanted = [(prompt, False) for prompt in prompts]
        if "negative_prompt" in pipeline.argument_names():
            wanted.append((negative_prompt, True))
        new = [key for key in dict.fromkeys(wanted) if key not in self._encoded]
        for text, negative in new:  # one at a time, as a pipeline that is given one prompt does
            self._encoded[text, negative] = pipeline.text_encoder.encode([text], negative=negative)
        weights = pipeline.networks[_TEXT]
        if new and weights is not None:
            weights.free()

    def forget_texts(self) -> None:
        """Drops the encoded prompts: 2.8 MB each at 300 tokens of 2304."""
        self._encoded = {}

    def text_arguments(
        self, pipeline: ImagePipeline, prompts: Sequence[str], negative_prompt: str, guidance_scale: float
    ) -> dict[str, Any]:
        """Encoded prompts as a pipeline's call takes them."""
        found = [self._encoded[prompt, False] for prompt in prompts]
        embeds, mask = (np.concatenate([np.asarray(pair[part]) for pair in found]) for part in (0, 1))
        arguments = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if "negative_prompt" in pipeline.argument_names() and is_guided(guidance_scale):
            embeds, mask = self._encoded[negative_prompt, True]
            arguments |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
        return arguments

    def draw(
        self,
        pipeline: ImagePipeline,
        config: GenerateConfig,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        output_type: str = "pil",
    ) -> Any:
        """One picture of every prompt with the settings of ``config``: what the pipeline returns.

        Raises:
            UserError: settings that the model would not use.
        """
        if negative_prompt and "negative_prompt" not in pipeline.argument_names():
            raise UserError(
                f"--negative-prompt would not be used by {type(pipeline).__name__}, which is what {config.model} is "
                "for; leave it out, or choose another model"
            )
        self.encode(pipeline, prompts, negative_prompt)
        scale = pipeline.defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale
        if negative_prompt and not is_guided(scale):
            raise UserError(f"--negative-prompt would not be used at guidance {scale:g}; guidance acts above 1")
        arguments = call_arguments(config, pipeline) | self.text_arguments(pipeline, prompts, negative_prompt, scale)
        return pipeline(seed=config.seed, output_type=output_type, **arguments)


def check_lora_files(files: Sequence[str]) -> None:
    """Raises ``FileNotFoundError`` or ``UserError`` for LoRA files that are not there, or named with a weight."""
    for text in files:
        path, weight = parse_lora_option(text)
        if weight != 1:
            raise UserError(f"--lora {text}: name the file alone; its weights are --lora-scales")
        find_lora_file(path)


def read_prompts(given: Sequence[str], file: str | None) -> tuple[str, ...]:
    """Texts from the command line or from a file with one in each line; none where neither is given.

    Raises:
        FileNotFoundError, UserError: both, no such file, one without texts or not in UTF-8, or a text given twice.
    """
    if file is not None:
        if given:
            raise UserError("--prompts and --prompts-file; only one of them is allowed: leave one out")
        if not Path(file).is_file():
            raise FileNotFoundError(f"--prompts-file {file} is not a file; name a text file with one prompt per line")
        try:
            lines = Path(file).read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts-file {file} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        given = [line.strip() for line in lines if line.strip()]
        if not given:
            raise UserError(f"--prompts-file {file} has no prompts; allowed is one per line: write one or more")
    if empty := [text for text in given if not text.strip()]:
        raise UserError(f"prompt {empty[0]!r} is empty; allowed is a text: write what to draw")
    check_once("prompt", given)
    return tuple(given)


def check_once(what: str, values: Sequence[Any]) -> None:
    """Raises ``UserError`` for a value that comes twice."""
    if twice := [value for value in values if list(values).count(value) > 1]:
        raise UserError(f"{what} {twice[0]!r} is given twice; each is allowed once: leave one of them out")


def remove_temporaries(folder: Path) -> int:
    """Deletes what ``atomic_file`` was writing in processes that are no more; returns how many files that were."""
    removed = 0
    for path in folder.glob(".*.tmp"):
        process = path.name.rpartition(".tmp")[0].rpartition(".")[2]
        if process.isdecimal() and not _runs(int(process)):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # someone else's
    return True
