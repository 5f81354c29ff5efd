"""What the command line checks before a model is looked for, so that no download and no sampling is lost to it."""

from __future__ import annotations

import contextlib
import io
import math
import os
from typing import TYPE_CHECKING

from sana_jax.errors import UserError
from sana_jax.files import check_can_write

if TYPE_CHECKING:
    from sana_jax.generate import GenerateConfig

_LARGEST_SEED = 2**32 - 1


def check_values(config: GenerateConfig) -> None:
    """Raises ``UserError`` for a number that no model takes, and for options that need another one."""
    if not 0 <= config.seed <= _LARGEST_SEED:
        raise UserError(f"--seed {config.seed} is not allowed; choose a whole number from 0 to {_LARGEST_SEED}")
    if config.steps is not None and config.steps < 1:
        raise UserError(f"--steps {config.steps} is not allowed; choose 1 or more")
    if config.frames is not None and config.frames < 1:
        raise UserError(f"--frames {config.frames} is not allowed; choose 1 or more, as the model makes them")
    if config.step_cache is not None and not 0 <= config.step_cache < math.inf:
        raise UserError(
            f"--step-cache {config.step_cache:g} is not allowed; choose a threshold from 0 (every step is computed)"
        )
    if config.step_cache_error and config.step_cache is None:
        raise UserError("--step-cache-error would not be used without --step-cache; set a threshold or leave it out")
    for option, value in (("--strength", config.strength), ("--mask", config.mask)):
        if value is not None and config.image is None:
            raise UserError(f"{option} would not be used without --image; name a picture or leave it out")


def check_files(config: GenerateConfig) -> None:
    """Raises an error unless the output can be written and the files that are named can be read.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: an output that cannot be written, or a file that is not what its option takes.
    """
    check_can_write(config.output)
    for option, path in (
        ("--image", config.image),
        ("--mask", config.mask),
        ("--control-image", config.control_image),
    ):
        if path is not None:
            _check_picture(path, option)
    if config.refiner_checkpoint is not None and os.path.isfile(config.refiner_checkpoint):
        raise UserError(
            f"--refiner-checkpoint {config.refiner_checkpoint} is a file; allowed is a folder that is new, empty, or "
            "an earlier call's: name one"
        )
    if config.c2w is not None and config.action is None:
        from sana_jax.camera import read_array

        read_array(config.c2w, "--c2w", "poses (frames, 4, 4)")
    if config.lora:
        from sana_jax.lora.reading import find_lora_file, parse_lora_option

        for text in config.lora:
            find_lora_file(parse_lora_option(text)[0])


def _check_picture(path: str, option: str) -> None:
    """Raises an error unless the file is one picture; what is said of it is said when it is used."""
    from sana_jax.pipelines.image_inputs import open_picture

    with contextlib.redirect_stdout(io.StringIO()):
        open_picture(path, option)
