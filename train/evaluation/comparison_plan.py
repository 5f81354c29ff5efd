"""What a comparison is of: its options, the columns of its table, and every picture with the settings behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sana_jax
from kernels.selection import Preference
from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.lora import find_lora_file
from sana_jax.pipelines.opening import find_model
from train.evaluation.drawing import (
    check_draws_from_text,
    check_lora_files,
    check_once,
    chosen_steps,
    file_identity,
    is_training_run,
    model_identity,
)

PROG = "python -m train.compare"


@dataclass(frozen=True)
class CompareConfig:
    """Draws the same prompts with the same noise by several checkpoints, guidance scales and LoRA files, side by side.

    The models are the first words of the command: training runs, published or converted directories.
    """

    models: tuple[str, ...] = ()
    """Model directories: the words before the first option; --models is the same."""
    output: str = "comparison"
    """Directory of comparison.html, comparison.csv and pictures/."""
    prompts: tuple[str, ...] = ()
    """Texts to draw, each in quotes."""
    prompts_file: str | None = None
    """A text file with one prompt in each line, instead of --prompts."""
    negative_prompt: str = ""
    """What the pictures should not be; needs guidance above 1."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise; one row of pictures for each prompt and seed."""
    guidance_scales: tuple[float, ...] = ()
    """Guidance scales, a column each; none: the model's own."""
    checkpoint_steps: tuple[str, ...] = ("all",)
    """Checkpoints of training runs by their steps, a column each; all; or newest."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Weights of training runs: averaged (ema), raw (params), or averaged where there are any (auto)."""
    lora: tuple[str, ...] = ()
    """LoRA files, each drawn by itself, a column for each of its weights."""
    lora_scales: tuple[float, ...] = ()
    """Weights of the LoRA files; 0 is one column without any. None given: 1."""
    num_inference_steps: tuple[int, ...] = ()
    """Sampling steps, a column for each number; none: the model's own."""
    height: int | None = None
    """Pixels; None: the model's own."""
    width: int | None = None
    """Pixels; None: the model's own."""
    binning: Literal["nearest", "off", "error"] | None = None
    """Sizes that the model was not trained at: as in generate."""
    variant: str | None = None
    """Variant of a published model's files: bf16, fp16."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the transformer; None: the one that the weights are published for, float32 for training runs."""
    low_memory: bool = False
    """Keeps one network in memory at a time."""
    strip: bool = False
    """Also draw a strip over the checkpoints of each run for every prompt, seed and setting."""
    gif: bool = False
    """The same as a GIF."""
    milliseconds: int = 500
    """How long a GIF shows each checkpoint."""
    sheet: bool = False
    """Also draw the whole table as one picture, comparison.png."""
    previews: bool = False
    """Draw nothing: join the previews that a training run has made (its samples/step_*.png) into one strip, or GIF."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError(f"no model given; name one or more directories: {PROG} runs/digits --prompts ...")
        check_once("model", self.models)
        check_once("seed", self.seeds)
        check_once("guidance scale", self.guidance_scales)
        check_once("number of steps", self.num_inference_steps)
        check_once("LoRA weight", self.lora_scales)
        check_once("LoRA", self.lora)
        check_once("checkpoint step", self.checkpoint_steps)
        if not self.seeds:
            raise UserError("--seeds has no value; allowed are one or more: write --seeds 0")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"--seeds {seed} is not allowed; choose 0 to {2**32 - 1}")
        for steps in self.num_inference_steps:
            if steps < 1:
                raise UserError(f"--num-inference-steps {steps} is not allowed; choose 1 or more")
        if bad := [value for value in (*self.guidance_scales, *self.lora_scales) if not math.isfinite(value)]:
            raise UserError(f"scale {bad[0]} is not allowed; choose finite numbers")
        words = [word for word in self.checkpoint_steps if not word.isdecimal()]
        if not self.checkpoint_steps or (words and (words[0] not in ("all", "newest") or self.checkpoint_steps[1:])):
            raise UserError(
                f"--checkpoint-steps {' '.join(self.checkpoint_steps)} is not allowed; choose steps such as 100 200, "
                "or all, or newest"
            )
        if self.lora_scales and not self.lora:
            raise UserError("--lora-scales would not be used without --lora; name LoRA files or leave it out")
        if self.milliseconds != 500 and not self.gif:
            raise UserError("--milliseconds would not be used without --gif; add it or leave --milliseconds out")
        if self.milliseconds < 20 or self.milliseconds % 10:
            raise UserError(f"--milliseconds {self.milliseconds} is not allowed; choose a multiple of 10 from 20 on")
        if self.previews:
            self._check_previews()

    def _check_previews(self) -> None:
        used = {"models", "output", "strip", "gif", "milliseconds", "previews"}
        unused = [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if field.name not in used and getattr(self, field.name) != field.default
        ]
        if unused:
            raise UserError(f"{', '.join(unused)} would not be used with --previews, which draws nothing; leave it out")


@dataclass(frozen=True)
class Column:
    """One way to draw: a model's checkpoint, a LoRA and its weight (or none), guidance and steps (None: its own)."""

    model: str
    directory: Path
    checkpoint_step: int | None
    lora: str | None
    lora_scale: float
    guidance_scale: float | None
    num_inference_steps: int | None

    @property
    def checkpoint_text(self) -> str:
        """The model, with the checkpoint's step where it has one."""
        return self.model + ("" if self.checkpoint_step is None else f" step {self.checkpoint_step}")


@dataclass(frozen=True)
class Picture:
    """One picture: its place in the table, its name without a suffix, and the settings that decide how it looks."""

    column: Column
    prompt: str
    seed: int
    name: str
    settings: dict[str, Any]


def plan_columns(config: CompareConfig) -> list[Column]:
    """All ways to draw, in the order of the table.

    Raises:
        UserError, FileNotFoundError, CheckpointError: a model, checkpoint or LoRA file that is not there.
    """
    check_lora_files(config.lora)
    loras: list[tuple[str | None, float]] = [(None, 0.0)] if not config.lora or 0 in config.lora_scales else []
    scales = [scale for scale in config.lora_scales or (1.0,) if scale != 0]
    loras += [(file, scale) for file in config.lora for scale in scales]
    columns, runs = [], 0
    for model in config.models:
        directory = find_model(model, config.variant)
        check_draws_from_text(directory)
        runs += is_training_run(directory)
        for step in chosen_steps(directory, _wanted_steps(config, directory)):
            columns += [
                Column(model, directory, step, lora, scale, guidance, steps)
                for lora, scale in loras
                for guidance in config.guidance_scales or (None,)
                for steps in config.num_inference_steps or (None,)
            ]
    if config.checkpoint_steps != ("all",) and not runs:
        raise UserError(
            f"--checkpoint-steps {' '.join(config.checkpoint_steps)} would not be used: none of the models is a "
            "training run; leave it out"
        )
    if config.weights != "auto" and not runs:
        raise UserError("--weights would not be used: none of the models is a training run; leave it out")
    if (config.strip or config.gif) and not checkpoint_families(columns):
        raise UserError("--strip and --gif go over the checkpoints of a run, and only one is drawn; leave them out")
    return columns


def _wanted_steps(config: CompareConfig, directory: Path) -> list[int | None] | None:
    if config.checkpoint_steps == ("all",) or not is_training_run(directory):
        return None
    if config.checkpoint_steps == ("newest",):
        return [None]
    return [int(step) for step in config.checkpoint_steps]


def plan_pictures(config: CompareConfig, columns: Sequence[Column], prompts: Sequence[str]) -> list[Picture]:
    """Every picture of the table, column by column."""
    pictures = []
    loras = {file: file_identity(find_lora_file(file)) for file in config.lora}
    identities: dict[tuple[Path, int | None], str] = {}
    for column in columns:
        where = column.directory, column.checkpoint_step
        identities[where] = identities.get(where) or model_identity(*where)
        fixed = {
            "model": identities[where],
            "weights": config.weights,
            "lora": loras.get(column.lora),
            "lora_scale": column.lora_scale,
            "guidance_scale": column.guidance_scale,
            "negative_prompt": config.negative_prompt,
            "num_inference_steps": column.num_inference_steps,
            **{name: getattr(config, name) for name in ("height", "width", "binning", "variant", "dtype")},
            "version": sana_jax.__version__,
        }
        for prompt in prompts:
            for seed in config.seeds:
                settings = {**fixed, "prompt": prompt, "seed": seed}
                pictures.append(Picture(column, prompt, seed, _name(column, prompt, seed, settings), settings))
    return pictures


def _name(column: Column, prompt: str, seed: int, settings: dict[str, Any]) -> str:
    """A name that a reader understands, and that no other settings have."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    step = [] if column.checkpoint_step is None else [f"step{column.checkpoint_step}"]
    return "-".join([*step, slug(prompt)[:40].strip("-") or "prompt", f"seed{seed}", key])


def slug(text: str) -> str:
    """A text as a part of a file's name: small letters and digits, with ``-`` for anything else."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def checkpoint_families(columns: Sequence[Column]) -> dict[Column, list[Column]]:
    """Columns that differ in nothing but the checkpoint, two or more, by the first of them without its step."""
    families: dict[Column, list[Column]] = {}
    for column in columns:
        families.setdefault(dataclasses.replace(column, checkpoint_step=None), []).append(column)
    return {one: members for one, members in families.items() if len(members) > 1}


def read_record(output: Path, picture: Picture) -> dict[str, Any] | None:
    """What is known of a picture that was drawn before with the same settings; None where it must be drawn."""
    folder = output / "pictures"
    with contextlib.suppress(FileNotFoundError, UserError):
        record = read_json(folder / f"{picture.name}.json")
        same = record.get("settings") == picture.settings and {"drawn", "seconds"} <= record.keys()
        if same and (folder / f"{picture.name}.png").is_file():
            return record
    return None
