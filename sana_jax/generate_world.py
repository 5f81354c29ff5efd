"""What the command line does for world models only: the camera's path and lens, the refiner, what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_jax.errors import UserError, counted

if TYPE_CHECKING:
    from sana_jax.generate import GenerateConfig
    from sana_jax.pipelines.world_model import SanaWMPipeline

_PATH = '--action "w-80,jw-40,w-40", or --c2w poses.npy'


def check_world(config: GenerateConfig, *, streams: bool = False) -> None:
    """Raises ``UserError`` for options that a world model lacks or does not have, before its weights are looked at."""
    from sana_jax.pipelines.world_inputs import refuse_memory
    from sana_jax.quantization.choice import NETWORKS, parse_quantization

    if config.image is None:
        raise UserError(f"--image is missing; {config.model} makes videos that begin with a picture: name one")
    if (config.action is None) == (config.c2w is None):
        given = "neither is" if config.action is None else "both are"
        raise UserError(f"--action and --c2w: {given} given, and exactly one is allowed: give {_PATH}")
    count = len(config.prompt) * config.num_images
    if count != 1:
        raise UserError(
            f"{counted(len(config.prompt), 'prompt')} and --num-videos {config.num_images}: {config.model} makes one "
            "video at a time; allowed is 1: call once for each, with a --seed and an --output of its own"
        )
    if config.refiner_checkpoint is not None and config.refiner is None:
        raise UserError("--refiner-checkpoint would not be used without --refiner; name the refiner's directory")
    if config.refiner_checkpoint is not None and streams:
        raise UserError(
            "--refiner-checkpoint would not be used by a streamed world, which keeps its blocks beside the output "
            "until it is whole; leave it out, and go on with --resume"
        )
    if config.refiner_stream_blocks and config.refiner is None:
        raise UserError("--refiner-stream-blocks would not be used without --refiner; name the refiner's directory")
    if config.refiner_quantization and config.refiner is None:
        raise UserError("--refiner-quantization would not be used without --refiner; name the refiner's directory")
    networks = [name for name in NETWORKS if name != "autoencoder"]  # which is the model's
    parse_quantization(config.refiner_quantization, "--refiner-quantization", networks)
    if streams:
        refuse_memory(config.memory)


def world_arguments(
    config: GenerateConfig, pipeline: SanaWMPipeline, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the call, with files read and the camera's path made; and what the video's notes say of them.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: a file that is damaged, or a path that is not allowed.
    """
    from sana_jax.camera import read_array, summarize_trajectory
    from sana_jax.pipelines.world_inputs import camera_path, scheme_of

    made = dict(arguments)
    num_frames, scheme = made.pop("num_frames", None), made.pop("action_scheme", None)
    given = None if config.c2w is None else read_array(config.c2w, "--c2w", "poses (frames, 4, 4)")
    action = made.pop("action", None)
    factor, defaults = pipeline.autoencoder.temporal_factor, pipeline.defaults
    path = camera_path(action, given, num_frames, scheme, factor, defaults=defaults)
    named = None if action is None else scheme_of(scheme, defaults).name
    read_as = "" if named is None else f", keys as in scheme {named}"
    print(f"camera: {summarize_trajectory(path).describe()}{read_as}")
    made["c2w"] = path
    if config.intrinsics:
        made["intrinsics"] = read_intrinsics_option(config.intrinsics)
    if config.refiner is not None:
        size = (config.height or pipeline.defaults.height, config.width or pipeline.defaults.width)
        made["refine"] = _open_refiner(config, pipeline, size)
        made["refiner_options"] = {"seed": config.seed}
        if config.refiner_checkpoint is not None:
            made["refiner_options"]["checkpoint_dir"] = config.refiner_checkpoint
        print("the refiner leaves the first frame out, which anchors it")
    settings = {
        "frames": len(path),
        "height": config.height or pipeline.defaults.height,
        "width": config.width or pipeline.defaults.width,
        "action": action,
        "action_scheme": named,
        "c2w": config.c2w,
        "intrinsics": ", ".join(config.intrinsics) or None,
        "refiner": config.refiner,
        "refiner_quantization": ", ".join(config.refiner_quantization) or None,
    }
    return made, settings


def read_intrinsics_option(words: Sequence[str]) -> np.ndarray:
    """fx, fy, cx, cy of four words, or of one with commas; or what an .npy file holds.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: anything else.
    """
    if len(words) == 1 and words[0].endswith(".npy"):
        from sana_jax.camera import read_array

        return read_array(words[0], "--intrinsics", "fx, fy, cx, cy, or matrices (3, 3), for all frames or each")
    numbers = [number for word in words for number in word.replace(",", " ").split()]
    try:
        values = np.array([float(number) for number in numbers])
    except ValueError:
        values = np.zeros(0)
    if values.shape != (4,):
        raise UserError(
            f"--intrinsics {' '.join(words)} is not allowed; write four numbers, fx fy cx cy in pixels of the image, "
            "or name an .npy file"
        )
    return values


def _open_refiner(config: GenerateConfig, pipeline: SanaWMPipeline, size: tuple[int, int]) -> Any:
    from sana_jax.pipelines.residency import describe_plan
    from sana_jax.pipelines.world_refiner import SanaWMRefiner

    plan = {"residency": pipeline.residency}
    if config.memory is not None:
        # what is not read from a file stays where it is, as a training run's weights do
        held = sum(weights.num_bytes for weights in pipeline.networks.values() if weights is not None and weights.stays)
        plan = {"memory": config.memory, "frame_size": size, "held_bytes": held}
    refiner = SanaWMRefiner.from_pretrained(
        config.refiner,
        dtype=config.dtype,
        variant=config.variant,
        autoencoder=pipeline.autoencoder,
        stream_blocks=config.refiner_stream_blocks,
        quantization=config.refiner_quantization or None,
        **plan,
    )
    for line in describe_plan(refiner.residency, refiner.networks):
        print(f"in memory for the refiner: {line}")
    return refiner
