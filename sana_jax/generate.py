"""Draws pictures and makes videos from the command line; the model decides which.

``python -m sana_jax.generate --model runs/digits --prompt "a handwritten seven" --output seven.png``
``python -m sana_jax.generate --model SANA-Video_2B_480p_diffusers --prompt "a tram in the rain" --output tram.mp4``
``python -m sana_jax.generate --model SANA-WM --image a.png --prompt "a street" --action "w-80,jw-40" --output a.mp4``
``python -m sana_jax.generate --stream --model STUDENT --image a.png --prompt "a street" --action "w-960" --out a.mp4``
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax

from kernels.selection import Preference
from sana_jax.command_line import parse
from sana_jax.devices import choose_device, computing
from sana_jax.errors import UserError, run_command_line
from sana_jax.generate_checks import check_files, check_values
from sana_jax.generate_memory import memory_budget
from sana_jax.generate_parts import choose_sampler, load_tokens, steps_taken
from sana_jax.generate_video import (
    VIDEO_OPTIONS,
    check_output_name,
    check_video_output,
    long_video_arguments,
    next_step_when_interrupted,
    video_arguments,
    video_settings,
    write_videos,
)
from sana_jax.generate_world import check_world, world_arguments
from sana_jax.images import automatic_enlargement, check_png_path, enlarge_image, image_grid, save_png
from sana_jax.pipelines.prompt_schedule import note_untimed, refuse_schedule
from sana_jax.pipelines.sweep import Sweep, check_sweep, draw_sweep, parse_condition, save_sweep

if TYPE_CHECKING:
    from sana_jax.pipelines.base import SamplingPipeline, SanaPipelineOutput

_PROG = "python -m sana_jax.generate"
_ALIASES = {"out": "output", "num-inference-steps": "steps", "num-videos": "num-images"}
# options that go to a pipeline as they are, under these names, where they are given
_PASSED = {
    "negative_prompt": "negative_prompt",
    "guidance_scale": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "binning": "binning",
    "image": "image",
    "strength": "strength",
    "mask": "mask_image",
    "control_image": "control_image",
    "control_scale": "controlnet_conditioning_scale",
    "pag_scale": "pag_scale",
    "pag_layers": "pag_applied_layers",
    "max_sequence_length": "max_sequence_length",
    "timesteps": "timesteps",
    "frames": "frames",
    "motion_score": "motion_score",
    "resume": "resume",
    "num_cached_blocks": "num_cached_blocks",
    "block_frames": "block_frames",
    "action": "action",
    "action_scheme": "action_scheme",
    "c2w": "c2w",
    "intrinsics": "intrinsics",
    "refiner": "refine",
    "refiner_checkpoint": "refiner_options",
    "refiner_stream_blocks": "refine",
    "refiner_quantization": "refine",
    "guidance_batching": "guidance_batching",
    "step_cache": "step_cache",
    "step_cache_error": "step_cache_error",
}
# as in diffusers, world models have another name for it
_FRAMES = ("frames", "num_frames")
_OF_A_REFINER = ("refiner_checkpoint", "checkpoint_dir")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Draws pictures or makes videos from texts with a model on this machine: published, converted, or trained."""

    model: str
    """Model directory, for example runs/digits; or organisation/name, to be fetched from the Hub."""
    prompt: tuple[str, ...]
    """What to draw, in quotes; several texts draw several pictures or videos. LongSANA makes one video of
    them, each with the second from which it acts: "0s: a fox sleeps" "10s: it wakes up"."""
    output: str
    """The picture's name, ending in .png; several pictures become one sheet. A sweep may also end in .gif. A video's
    name ends in .mp4, .gif or .npz, or is a folder for its frames (out/); of LongSANA and of a streamed world, .mp4 or
    a folder. Several videos are numbered. --out is the same option."""
    negative_prompt: str = ""
    """What the pictures or videos should not be; needs guidance above 1."""
    num_images: int = 1
    """Pictures or videos per prompt. --num-videos is the same option."""
    seed: int = 0
    """Picture i starts from noise that depends on this number and i alone."""
    steps: int | None = None
    """Sampling steps; None: the model's own number. --num-inference-steps is the same option."""
    guidance_scale: float | None = None
    """How closely pictures follow the text; 1 is off and costs half; None: the model's own."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level, 0 to 1, at which guidance acts; None: everywhere."""
    height: int | None = None
    """Pixels; None: the model's own, or the image's."""
    width: int | None = None
    """Pixels; None: the model's own, or the image's."""
    binning: Literal["nearest", "off", "error"] | None = None
    """Sizes the model was not trained at: sample the nearest trained one and crop, sample them, or refuse them. None:
    nearest where the model has a table of sizes. Not for worlds."""
    image: str | None = None
    """A picture to begin from; of a video, its first frame. A world needs one."""
    frames: int | None = None
    """Frames of a video: 1 + 4k for SANA-Video of 480p and LongSANA, 1 + 8k for SANA-Video of 720p and SANA-WM. None:
    the model's own, 81 of SANA-Video; of a world, as its camera's path has."""
    seconds: float | None = None
    """Length of a video in place of frames, rounded to a number of frames that the model makes, which is printed."""
    fps: float | None = None
    """Frames per second at which a video is shown; None: the model's own, 16."""
    motion_score: int | None = None
    """How much a video should move, written behind the prompt as SANA-Video was trained; 30 is usual. None: nothing."""
    stream: bool = False
    """Makes a world chunk by chunk in constant memory, while the file grows; models that were distilled for it do so by
    themselves."""
    resume: bool = False
    """Goes on with a video of LongSANA or a streamed world that was interrupted, after its last whole block. All else
    as before, but for LongSANA's prompts of what is not made yet."""
    num_cached_blocks: int | None = None
    """How many blocks a block of LongSANA or of a streamed world sees, 0 for all; None: the model's own."""
    block_frames: int | None = None
    """Latent frames of such blocks; a model that was trained with another number is refused."""
    action: str | None = None
    """The camera's path of a world model: keys and for how many frames they are held, as in "w-80,jw-40,w-40"; see
    python -m sana_jax.camera --help. The video has one frame more, the image; with --refiner, which leaves that out, as
    many as the keys."""
    action_scheme: Literal["v1", "v2"] | None = None
    """What the keys mean: v1, diffusers', in which a and d go sideways; v2, the authors' current one. None: v1, at
    the speeds of a training run, where it has its own."""
    c2w: str | None = None
    """An .npy file of camera-to-world matrices (frames, 4, 4) in place of --action."""
    intrinsics: tuple[str, ...] = ()
    """The lens that took --image: fx fy cx cy in its pixels, or an .npy file. None: 60 degrees across, or a
    training run's own."""
    refiner: str | None = None
    """Directory of SANA-WM's refiner, or its name on the Hub; None: no refining."""
    refiner_checkpoint: str | None = None
    """A folder that keeps every block as it is refined; the same call goes on behind the last one."""
    refiner_stream_blocks: bool = False
    """Keeps the refiner's blocks in host memory and copies each to the device while the one before it computes: 1.4 GB
    of weights there in place of 26 GB; slower where copying is."""
    refiner_quantization: tuple[str, ...] = ()
    """The same as --quantization, for the refiner's networks: transformer, text_encoder, connectors."""
    sampler: Literal["dpm_solver", "flow_euler"] | None = None
    """How steps are taken; None: as the model says."""
    flow_shift: float | None = None
    """Shift of the noise levels; None: the model's own, whatever the sampler."""
    apg_eta: float | None = None
    """Adaptive projected guidance, for videos: how much of the guidance along the prediction is kept, 0 to 1. Any of
    the three options turns it on; the others are then 0."""
    apg_norm_threshold: float | None = None
    """The same: largest norm of the guidance; 0 is no bound."""
    apg_momentum: float | None = None
    """The same: weight of the earlier steps' guidance; -0.5 in the paper."""
    strength: float | None = None
    """How much of --image is drawn anew, above 0 to 1; None: 0.6."""
    mask: str | None = None
    """A picture of --image's size, white where it is drawn anew; the rest stays as it is."""
    controlnet: str | None = None
    """Directory of a ControlNet, where the model comes without one."""
    control_image: str | None = None
    """The picture that a ControlNet follows."""
    control_scale: float | None = None
    """Weight of the ControlNet; None: 1."""
    pag_scale: float | None = None
    """Perturbed-attention guidance; None is off, 3 is usual."""
    pag_layers: tuple[int, ...] | None = None
    """Layers that it perturbs; None: the authors' choice for the model."""
    timesteps: tuple[float, ...] | None = None
    """SANA-Sprint's angles from noise to 0, one more than steps; None: 1.5708, 1.3, 0 for two steps, else even. Of a
    streamed world, whole numbers from 1000 down; None: the model's own. Not for other models."""
    guidance_batching: Literal["auto", "batched", "split"] = "auto"
    """Prompt and negative prompt in one batch, or one after another in less memory; auto: as the device's memory
    allows."""
    step_cache: float | None = None
    """Skips steps at which the network's input changes little: a threshold from 0, which skips none, to be found with
    --step-cache-error; None: off."""
    step_cache_error: bool = False
    """Measures the error that this makes, by taking every step as well."""
    progress: bool = True
    """Shows the steps; --no-progress takes them all in one call on the device. LongSANA and streamed worlds always do,
    and do not take the option."""
    instruction: Literal["default", "none"] = "default"
    """Whether the instruction to enrich the prompt, with which SANA was trained, stands before it."""
    max_sequence_length: int | None = None
    """Prompt tokens that count; None: the model's own, 300."""
    lora: tuple[str, ...] = ()
    """LoRA files, each FILE or FILE:WEIGHT."""
    lora_merge: bool = False
    """Whether LoRA weights are added into the model's once, rather than applied at every step."""
    condition: tuple[str, ...] = ()
    """Conditions of a model with token encoders, each NAME=VALUE: a number, a .npy file of a vector, or a picture."""
    condition_tokens: str | None = None
    """Directory of trained token encoders; None: those beside the model or beside a LoRA, if there are any."""
    image_encoder: str | None = None
    """Directory of the SigLIP that makes vectors of pictures; None: the one that training used."""
    sweep: str | None = None
    """Draws every picture once for each of several values of a number: NAME=FIRST:LAST:COUNT, as in zoom=0:1:9. The
    output is a sheet (.png) or a film (.gif) of them."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Weights of a training run: averaged (ema), raw (params), or averaged where there are any (auto)."""
    checkpoint_step: int | None = None
    """Checkpoint of a training run by its step; None: the newest."""
    variant: str | None = None
    """Variant of a published model's files: bf16, fp16; of a run's base model, None: the one that it was given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the transformer; None: the one that the weights are published for, float32 for training runs."""
    emulate_fp16_saturation: bool = False
    """Clips linear attention as float16 does, for the original float16 weights."""
    low_memory: bool = False
    """Keeps one network in memory at a time."""
    quantization: tuple[str, ...] = ()
    """int8, fp8, int4 or nvfp4 for the transformer, or NETWORK=FORMAT for transformer, text_encoder, autoencoder, of
    the model itself; a refiner's networks have --refiner-quantization."""
    memory: str | None = None
    """Memory of the device, as 24g, 16g or 12g: chooses what is kept, quantised and tiled so that it is enough for
    what is asked for, and refuses what it is not enough for."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes a GPU if JAX sees one."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""
    enlarge: int = 0
    """Whole number by which every pixel is enlarged; 0: so much that the shorter side reaches 128 pixels, and not at
    all in an .npz."""

    def __post_init__(self) -> None:
        if self.sweep is None:
            check_output_name(self.output)
        else:
            check_sweep(self.sweep, self.output, self.condition)
        if not self.prompt:
            raise UserError('--prompt has no text; allowed is one or more: write --prompt "a handwritten seven"')
        if self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} is not allowed; choose 1 or more")
        if self.enlarge < 0:
            raise UserError(f"--enlarge {self.enlarge} is not allowed; choose 1 or more, or 0 for automatic")
        if self.lora_merge and not self.lora:
            raise UserError("--lora-merge would not be used without --lora; name a LoRA file or leave it out")
        if self.control_image is None and (self.controlnet is not None or self.control_scale is not None):
            raise UserError(
                "--controlnet and --control-scale would not be used without --control-image; name a picture"
            )
        check_values(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the program's own) and returns its exit status.

    Raises:
        UserError: a mistake in the options, the model or the values; ``run_command_line`` prints it as one line.
    """
    config = parse(
        GenerateConfig, sys.argv[1:] if argv is None else argv, prog=_PROG, aliases=_ALIASES, allow_empty=False
    )
    with computing(config.device, config.kernels) as device, jax.default_device(device):
        generate(config)
    return 0


def generate(config: GenerateConfig) -> pathlib.Path:
    """Draws what ``config`` asks for, says what it does, and returns where the picture is."""
    from sana_jax.pipelines.opening import find_model

    check_files(config)
    directory = find_model(config.model, config.variant)
    _check_output(config, directory)
    pipeline = open_pipeline(config, directory)
    is_video = _is_video(pipeline)
    arguments = call_arguments(config, pipeline)
    settings = picture_settings(config, pipeline)
    if is_video:
        settings |= video_settings(config, pipeline, arguments)
    if _is_world(pipeline):
        with _with_option_names():
            arguments, of_world = world_arguments(config, pipeline, arguments)
        settings |= of_world
    _announce(config, pipeline, settings)
    number = "num_videos_per_prompt" if is_video else "num_images_per_prompt"
    fixed = {number: config.num_images, "seed": config.seed, "progress_bar": config.progress}
    if _grows(pipeline):
        fixed = {"seed": config.seed, **long_video_arguments(config, settings, _metadata(config, settings))}
    elif _is_world(pipeline):
        del fixed[number]
    with _with_option_names(), next_step_when_interrupted(config, grows=_grows(pipeline)):
        if config.sweep is not None:
            sweep = Sweep.parse(config.sweep)
            results = draw_sweep(pipeline, sweep, list(config.prompt), {**fixed, **arguments})
        else:
            results = [pipeline(prompt=list(config.prompt), **fixed, **arguments)]
    result = results[0]
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items() if seconds >= 0.005)
    print(f"sampled in {sum(sum(one.seconds.values()) for one in results):.2f} s ({stages})")
    if pipeline.memory_plan is not None:
        print(pipeline.memory_plan.check(getattr(result, "device_bytes", None)))
    settings = {**settings, "sampled_size": f"{result.sampled_size[0]}x{result.sampled_size[1]}"}
    if config.sweep is not None:
        labels = [text for text in config.prompt for _ in range(config.num_images)]
        pictures = [one.images for one in results]
        metadata = _metadata(config, settings)
        return save_sweep(config.output, sweep, pictures, labels, enlarge=config.enlarge, metadata=metadata)
    if _grows(pipeline):
        print(f"video: {result.path}, {result.frame_count} frames, {result.frame_count / result.fps:.2f} seconds")
        return result.path
    if is_video:
        settings["frames"] = len(result.frames[0])  # a refiner leaves some out
        return write_videos(config, result, _metadata(config, settings))
    return _write(config, result, settings)


def _is_video(pipeline: SamplingPipeline) -> bool:
    return pipeline.made == "videos"


def _check_output(config: GenerateConfig, directory: pathlib.Path) -> None:
    """Raises ``UserError`` for an output that the model does not make, before its weights are looked at."""
    from sana_jax.pipelines.model_directory import GROWING_PIPELINES, VIDEO_PIPELINES, WORLD_PIPELINES

    if (name := _pipeline_name(config, directory)) in WORLD_PIPELINES:
        check_world(config, streams=name in GROWING_PIPELINES)
    if name == "LongSanaVideoPipeline":
        note_untimed(config.prompt)
    else:
        refuse_schedule(config.prompt, name)
    if name in VIDEO_PIPELINES:
        check_video_output(config, grows=name in GROWING_PIPELINES)
    elif config.sweep is None:
        check_png_path(config.output)


def _is_world(pipeline: SamplingPipeline) -> bool:
    from sana_jax.pipelines.model_directory import WORLD_PIPELINES

    return pipeline.class_name in WORLD_PIPELINES


def _grows(pipeline: SamplingPipeline) -> bool:
    """Whether it writes a video while it makes it."""
    from sana_jax.pipelines.model_directory import GROWING_PIPELINES

    return pipeline.class_name in GROWING_PIPELINES


def _pipeline_name(config: GenerateConfig, directory: pathlib.Path) -> str:
    """The pipeline that the model is for, or the one that ``--stream`` asks for."""
    from sana_jax.pipelines.model_directory import WORLD_PIPELINES, WORLD_STREAM, pipeline_of

    name = pipeline_of(directory)
    if config.stream and name not in WORLD_PIPELINES:
        raise UserError(
            f"--stream would not be used by {name}, which is what {config.model} is for; worlds are streamed: leave it "
            "out, or choose another model"
        )
    return WORLD_STREAM if config.stream else name


@contextlib.contextmanager
def _with_option_names() -> Iterator[None]:
    """Messages of a pipeline come with the command line's names for its arguments."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        message = str(error)
        for option, argument in sorted([*_PASSED.items(), _FRAMES, _OF_A_REFINER], key=lambda pair: -len(pair[1])):
            if option != argument or "_" in argument:  # others are words of the language, too
                message = re.sub(rf"(?<![\w/.-]){argument}(?![\w/-]|\.\w)", f"--{option.replace('_', '-')}", message)
        raise type(error)(message) from error


def open_pipeline(config: GenerateConfig, directory: pathlib.Path | None = None) -> SamplingPipeline:
    """The pipeline that the model's ``model_index.json`` names, with its LoRAs; ``directory`` is where the model is.

    Of a video model, with an image it is the one that begins with it, and without the one of texts alone: they have the
    same weights.
    """
    from sana_jax.pipelines import (
        controlnet,
        image_to_video,
        long_video,
        sprint,
        text_to_image,
        text_to_video,
        world_model,
        world_stream,
    )
    from sana_jax.pipelines.model_directory import GROWING_PIPELINES, VIDEO_PIPELINES, WORLD_PIPELINES
    from sana_jax.pipelines.opening import find_model

    directory = find_model(config.model, config.variant) if directory is None else directory
    name = "SanaControlNetPipeline" if config.controlnet is not None else _pipeline_name(config, directory)
    if name in VIDEO_PIPELINES and name not in (*GROWING_PIPELINES, *WORLD_PIPELINES):
        wanted = "SanaVideoPipeline" if config.image is None else "SanaImageToVideoPipeline"
        if wanted != name and config.image is None:
            print("no --image is given, so the video is made from the text alone, with the same weights")
        name = wanted
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "variant": config.variant,
        "residency": "one_at_a_time" if config.low_memory else "text_encoder_freed",
        "emulate_fp16_saturation": config.emulate_fp16_saturation,
        "quantization": config.quantization or None,
        "memory": memory_budget(config, name),
    }
    training_run = {"weights": config.weights, "checkpoint_step": config.checkpoint_step}
    if name == "SanaControlNetPipeline":
        pipeline = controlnet.SanaControlNetPipeline.from_pretrained(
            directory, controlnet=config.controlnet, **options, **training_run
        )
    else:
        classes = {
            "SanaPipeline": text_to_image.SanaPipeline,
            "SanaSprintPipeline": sprint.SanaSprintPipeline,
            "SanaVideoPipeline": text_to_video.SanaVideoPipeline,
            "SanaImageToVideoPipeline": image_to_video.SanaImageToVideoPipeline,
            "LongSanaVideoPipeline": long_video.LongSanaVideoPipeline,
            "SanaWMPipeline": world_model.SanaWMPipeline,
            "SanaWMStreamingPipeline": world_stream.SanaWMStreamingPipeline,
        }
        pipeline = classes[name].from_pretrained(directory, **options, **training_run)
    choose_sampler(config, pipeline)
    if config.lora:
        from sana_jax.lora import parse_lora_option

        files, weights = zip(*(parse_lora_option(text) for text in config.lora))
        pipeline.load_lora_weights(list(files), weights=list(weights), merge=config.lora_merge)
    load_tokens(config, pipeline)
    return pipeline


def call_arguments(config: GenerateConfig, pipeline: SamplingPipeline) -> dict[str, Any]:
    """The call's arguments that were given; raises ``UserError`` for those that the pipeline does not have."""
    fields = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}
    given = {name: getattr(config, name) for name in _PASSED if getattr(config, name) != fields[name]}
    known = pipeline.argument_names()
    passed = _PASSED | {_FRAMES[0]: _FRAMES[1]} if _FRAMES[1] in known else _PASSED
    unused = [name for name in given if passed[name] not in known]
    if not _is_video(pipeline):
        unused += [name for name in VIDEO_OPTIONS if name not in given and getattr(config, name) is not None]
    if not config.progress and _grows(pipeline):
        unused.append("no_progress")
    if unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        them = "it" if len(unused) == 1 else "them"
        why, other = f"which is what {config.model} is for", "choose another model"
        if config.stream:
            why, other = "which --stream asks for", "leave --stream out"
        elif config.resume and _is_world(pipeline):  # resumed are streams alone
            other = "add --stream"
        raise UserError(
            f"{options} would not be used by {type(pipeline).__name__}, {why}; leave {them} out, or {other}"
        )
    arguments = {passed[name]: value for name, value in given.items()}
    if _is_video(pipeline):
        arguments |= video_arguments(config, pipeline)
    if (plan := pipeline.memory_plan) is not None and plan.guidance_batching != "auto" and "guidance_batching" in known:
        arguments.setdefault("guidance_batching", plan.guidance_batching)
    if config.instruction == "none":
        arguments["chi_prompt" if "chi_prompt" in known else "complex_human_instruction"] = ()
    if config.condition or config.sweep is not None:
        if "conditions" not in known:
            raise UserError(
                f"--condition and --sweep would not be used by {type(pipeline).__name__}, which is what {config.model} "
                "is for; leave them out, or choose another model"
            )
        arguments["conditions"] = dict(map(parse_condition, config.condition))
    return arguments


def picture_settings(config: GenerateConfig, pipeline: SamplingPipeline) -> dict[str, Any]:
    """What the picture's text chunks say, and the line about sampling with them."""
    defaults, contract = pipeline.defaults, pipeline.contract
    reads_a_picture = config.image is not None
    return {
        **steps_taken(config, pipeline),
        "guidance_scale": defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "timesteps": config.timesteps,
        "seed": config.seed,
        "model": config.model,
        "checkpoint": None if contract is None else contract.source,
        "checkpoint_id": pipeline.checkpoint_id,
        "weights": pipeline.weights,
        "checkpoint_step": pipeline.checkpoint_step,
        "height": config.height or (None if reads_a_picture else defaults.height),
        "width": config.width or (None if reads_a_picture else defaults.width),
        "binning": config.binning,
        "instruction": None if config.instruction == "default" else config.instruction,
        "max_sequence_length": config.max_sequence_length,
        "image": config.image,
        "strength": config.strength,
        "mask": config.mask,
        "controlnet": config.controlnet,
        "control_image": config.control_image,
        "control_scale": config.control_scale,
        "pag_scale": config.pag_scale,
        "pag_layers": config.pag_layers,
        "step_cache": config.step_cache,
        "lora": ", ".join(config.lora) or None,
        "condition": ", ".join(config.condition) or None,
        "sweep": config.sweep,
        "lora_merge": config.lora_merge or None,
        "quantization": ", ".join(config.quantization) or None,
        "memory": config.memory,
        "num_images": config.num_images if config.num_images > 1 else None,
        "variant": config.variant,
        "dtype": str(jax.numpy.dtype(pipeline.transformer.dtype)),
        "emulate_fp16_saturation": config.emulate_fp16_saturation or None,
        "license": defaults.license,
    }


def _announce(config: GenerateConfig, pipeline: SamplingPipeline, settings: dict[str, Any]) -> None:
    from sana_jax.pipelines.text_to_image import DEFAULT_STRENGTH

    is_video = _is_video(pipeline)

    origin = "" if pipeline.weights is None else f", {pipeline.weights} weights of step {pipeline.checkpoint_step}"
    license_note = "" if settings["license"] is None else f", licence {settings['license']}"
    family = "" if pipeline.contract is None else f" ({pipeline.contract.family})"
    print(f"model: {config.model}{family}, {pipeline.num_parameters:,} parameters{origin}{license_note}")
    interval = config.guidance_interval
    acts = "" if interval is None else f" at noise levels {interval[0]:g} to {interval[1]:g}"
    device = choose_device(config.device)
    place = device.platform if device.device_kind == device.platform else f"{device.platform} ({device.device_kind})"
    negative = f", but not {config.negative_prompt!r}" if config.negative_prompt else ""
    print(f"prompt: {', '.join(map(repr, config.prompt))}{negative}")
    if len(config.prompt) > 1 and not any(" " in text.strip() for text in config.prompt):
        print(f'{len(config.prompt)} prompts of one word each; put a text of several words in quotes: --prompt "..."')
    height, width = settings["height"], settings["width"]
    size = f"{height}x{width} pixels" if height and width else f"the size of {config.image}"
    if is_video:
        size = f"{settings['frames']} frames of " + (size if height and width else "a size that suits the image")
        size += "" if config.image is None else f" that begin with {config.image}"
        size += f", {settings['fps']:g} per second"
    elif config.image is not None:
        size += f" from {config.image}" if height and width else ""
        size += f", strength {DEFAULT_STRENGTH if config.strength is None else config.strength:g}"
        size += f" where {config.mask} is white" if config.mask is not None else ""
    count = 1 if _grows(pipeline) else len(config.prompt) * config.num_images
    print(
        f"sampling: {count} x {size}, {settings['steps']} steps of "
        f"{settings['sampler']}, guidance {settings['guidance_scale']:g}{acts}, seed {config.seed}, "
        f"{settings['dtype']} on {place}",
        flush=True,
    )
    for line in pipeline.describe_plan(encodes_a_picture=bool(config.image or config.control_image)):
        print(f"in memory: {line}")


def _write(config: GenerateConfig, result: SanaPipelineOutput, settings: dict[str, Any]) -> pathlib.Path:
    images = result.images
    width, height = images[0].size
    factor = config.enlarge or automatic_enlargement(height, width)
    picture, sheet = enlarge_image(images[0], factor), ""
    if len(images) > 1:
        labels = [text for text in config.prompt for _ in range(config.num_images)] if len(config.prompt) > 1 else None
        columns = config.num_images if len(config.prompt) > 1 and config.num_images > 1 else None
        picture = image_grid([enlarge_image(image, factor) for image in images], columns, labels)
        sheet = f", a sheet of {len(images)}"
    path = save_png(config.output, picture, metadata=_metadata(config, settings))
    shown = ""
    if factor > 1:
        shown = f", each picture enlarged {factor} times from {height}x{width} to {factor * height}x{factor * width}"
        shown += "" if config.enlarge else " (--enlarge 1 keeps the pixels)"
    print(f"picture: {path}{sheet}{shown}")
    return path


def _metadata(config: GenerateConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """The picture's text chunks."""
    prompts = config.prompt[0] if len(config.prompt) == 1 else list(config.prompt)
    return {
        "prompt": prompts,
        "negative_prompt": config.negative_prompt or None,
        **settings,
        "software": "sana_jax",
    }


if __name__ == "__main__":
    run_command_line(main)
