"""Follows a teacher's sampling from noise to videos: ``python -m train.make_trajectories --model TEACHER --out DIR``.

ODE initialisation trains on what it keeps.

The teacher is any SANA-Video or SANA-WM model: published, converted or trained. A world's begin with the first frames
of clips and have their camera's paths, which are kept as well. Of each trajectory the states at the listed
timesteps are kept, and the end. Trajectory i is a function of the seed and i alone, and begins with the noise that the
pipeline gives its video i at this seed; prompt i is that of the list, which begins anew where it is used up. An
interrupted command goes on where it stopped, and leaves the same files. One device computes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # before the imports that take seconds, so that a signal finds someone listening
    from train.preemption import StopRequest

    STOP = StopRequest()

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import require
from configs.data import ImageDataConfig, MovingDigitsDataConfig
from kernels.selection import Preference
from kernels.typing import Array, Float, Int
from sana_jax.autoencoders.base import latent_frames, pixel_frames
from sana_jax.command_line import parse
from sana_jax.compilation import readable_bytes
from sana_jax.devices import computing
from sana_jax.diffusion.samplers.longsana import DENOISING_STEPS
from sana_jax.diffusion.samplers.world_model import chunk_starts
from sana_jax.errors import UserError, run_command_line
from sana_jax.pipelines.checks import check_multiple
from sana_jax.pipelines.model_directory import WORLD_PIPELINE, ModelDirectory, pipeline_of, read_model_directory
from sana_jax.pipelines.opening import find_model
from sana_jax.pipelines.sampling_function import Encoded, StepGuidance, VideoNetwork, guided_velocity, is_guided
from sana_jax.pipelines.text_to_video import SanaVideoPipeline
from sana_jax.pipelines.video_base import DEFAULT_FRAMES
from sana_jax.pipelines.world_model import SanaWMPipeline
from sana_jax.pipelines.world_network import WorldGiven, WorldNetwork
from train.data.cache import (
    FORMAT,
    IDENTITY_FILE,
    LATENTS,
    PROMPTS,
    CacheIdentity,
    CacheReader,
    CacheWriter,
    read_identity,
)
from train.data.cache_plan import NULL_PROMPT
from train.data.encoding import encode_prompts, latent_dtype, prompt_dtype
from train.data.numbered_shards import NumberedShards, Wanted
from train.data.progress import Meter, Moments
from train.data.prompt_lists import read_prompts
from train.data.prompt_records import (
    PromptRecords,
    free,
    negative_name,
    negative_record,
    null_record,
    text_record,
)
from train.data.prompts import texts_of
from train.data.trajectories import TIMESTEPS, encoders_identity
from train.data.video.moving_digits import MovingDigitsData
from train.objectives.longsana.ode import TRAJECTORY, teacher_levels, teacher_trajectory
from train.preemption import StopRequest, exit_status
from train.run_directory import CONFIG_NAME, read_config
from train.world_clips import WorldClips, camera_arrays, open_world_clips, refuse_zip_options, zip_data

PROG = "python -m train.make_trajectories"
VARIANT = "center"  # the only one that a trajectory has
# A shard is lost if the process is killed while it is made: at most so many batches, and, where more than one, bytes.
SHARD_BATCHES, SHARD_BYTES = 16, 64 << 20
PROMPTS_IN_SHARD = 1024
_OF_ZIP_FILES = ("axes", "field_of_view", "max_bad_share", "filters")

Say = Callable[[str], None]


@dataclass(frozen=True)
class MakeTrajectoriesConfig:
    """Follows a teacher's sampling from noise to videos and keeps the states that ODE initialisation trains on."""

    model: str
    """The teacher: a SANA-Video or SANA-WM model's directory or a training run, or its name on the Hub."""
    out: str
    """Directory of the trajectories; one that was interrupted is continued."""
    prompts: str | None = None
    """A text file with one prompt per line, or a manifest (jsonl, csv) with captions; None: the captions that the
    teacher was trained on, where these are moving digits'."""
    motion_score: int | None = None
    """Appended to the prompts as ' motion score: N.', as the teacher is told them and the student will be; 10 in
    LongSANA's published recipe. None: prompts stay as they are. Not for world models."""
    negative_prompt: str = ""
    """What the teacher's unconditional branch is told: what videos should not be. Empty: no text."""
    data: str | None = None
    """Of a world model: the cache of clips with the camera's path, or zip files of latents, of which first frames,
    paths and captions are taken; None: the clips that the teacher was trained on, where these are made in memory."""
    num_clips: int | None = None
    """Of a world model: how many of the clips, spread evenly over them; None: all."""
    axes: Literal["opencv", "opengl"] = "opencv"
    """Of zip files: which way their cameras look: along z with y down (opencv), or along -z with y up (opengl)."""
    field_of_view: float | None = None
    """Of zip files: degrees that their cameras span across, where they have no intrinsics."""
    max_bad_share: float = ImageDataConfig.max_bad_share
    """Of zip files: largest share of samples that may be unusable."""
    filters: tuple[str, ...] = ()
    """Of zip files: which samples take part by their scores, each name=low:high, as in dover=0.5: or unimatch=1:30."""
    per_caption: int = 1
    """Trajectories of each prompt, or of each clip."""
    block_frames: int | None = None
    """Of a world model: latent frames of the causal blocks that it is sampled in, of which the first has one more.
    None: as it was trained, which is bidirectional but for a run in causal blocks."""
    frames: int | None = None
    """Frames of each video; None: the teacher's own."""
    height: int | None = None
    """Height of a video in pixels; None: the teacher's own."""
    width: int | None = None
    """Width of a video in pixels; None: the teacher's own."""
    num_steps: int = 48
    """Euler steps from noise to the end; they must pass the timesteps."""
    flow_shift: float = 8.0
    """The teacher's flow shift in these steps."""
    guidance_scale: float | None = None
    """Guidance scale; None: the teacher's own."""
    timesteps: tuple[int, ...] = DENOISING_STEPS
    """Where states are kept, from noise on; the end is kept as well. The published list goes with 48 steps at flow
    shift 8."""
    snap: bool = False
    """Move the step nearest to each timestep onto it, by five at most. SANA-WM's list, 1000 967 908 764, goes with 60
    steps at flow shift 9.8, moved so."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 4
    """Trajectories at once."""
    latent_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What states are kept in; auto: bfloat16, or float32 where latents are the pixels themselves."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Averaged weights of a training run where there are any (auto), or one of the two."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What to run on."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""

    def __post_init__(self):
        for name in ("per_caption", "num_steps", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("num_clips", "block_frames", "frames", "height", "width"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "1 or more")
        require("flow-shift", self.flow_shift, 0 < self.flow_shift < math.inf, "above 0")
        scale = self.guidance_scale
        require("guidance-scale", scale, scale is None or 0 <= scale < math.inf, "0 or more")
        require("seed", self.seed, 0 <= self.seed < 2**32, "0 to 4294967295")
        score = self.motion_score
        require("motion-score", score, score is None or 0 <= score <= 1000, "a whole number from 0 to 1000, as 10")
        steps = self.timesteps
        falls = all(later < earlier for earlier, later in itertools.pairwise(steps))
        within = bool(steps) and steps[0] <= 1000 and steps[-1] > 0
        allowed = "timesteps that fall, at most 1000 and above 0"
        require("timesteps", steps, falls and within, allowed)
        teacher_levels(steps, self.num_steps, self.flow_shift, self.snap)
        zip_data(self.data, self.zip_options)

    @property
    def zip_options(self) -> dict[str, Any]:
        """What is said of zip files that is not the default."""
        standard = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in _OF_ZIP_FILES if getattr(self, name) != standard[name]}


class BatchInputs(NamedTuple):
    """What the trajectories of a batch begin with."""

    indices: Int[Array, " B"]
    positive: Encoded
    negative: Encoded | None
    given: WorldGiven | None = None


class Teacher(NamedTuple):
    """The teacher, and what of its videos the options left open; its weights are read when they are needed."""

    pipeline: SanaVideoPipeline | SanaWMPipeline
    model: ModelDirectory
    guidance_scale: float
    frames: int
    size: tuple[int, int]
    """Height and width in pixels."""
    dtype: str
    """What states are kept in."""
    clips: WorldClips | None = None
    """Of a world model."""
    block_starts: tuple[int, ...] | None = None
    """Of a world model that is sampled in causal blocks."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a video's latents, the order in which noise is drawn."""
        if self.clips is not None:
            return self.clips.latent_shape
        autoencoder, (height, width) = self.model.autoencoder, self.size
        frames = latent_frames(self.frames, autoencoder.temporal_factor)
        factor = autoencoder.spatial_factor
        return autoencoder.latent_channels, frames, height // factor, width // factor

    def identity(self, config: MakeTrajectoriesConfig) -> CacheIdentity:
        """Everything that the trajectories are a function of, beside the prompts."""
        pipeline, (height, width) = self.pipeline, self.size
        own = {} if self.clips is None else {**self.clips.identity, "teacher.block_starts": self._starts}
        own |= {"trajectories.snap": True} if config.snap else {}
        own |= {"trajectories.negative_prompt": config.negative_prompt} if config.negative_prompt.strip() else {}
        return CacheIdentity(
            {
                **own,
                "format": FORMAT,
                **encoders_identity(self.model),
                "teacher.weights": pipeline.checkpoint_id,
                "teacher.which": pipeline.weights,
                "teacher.dtype": jnp.dtype(pipeline.transformer.dtype).name,
                TIMESTEPS: list(config.timesteps),
                "trajectories.num_steps": config.num_steps,
                "trajectories.flow_shift": config.flow_shift,
                "trajectories.guidance_scale": self.guidance_scale,
                "trajectories.seed": config.seed,
                # in its last bit a result may depend on what else is computed with it, and shards end with batches
                "trajectories.batch_size": config.batch_size,
                "latents.dtype": self.dtype,
                "prompts.dtype": prompt_dtype(self.model.text_encoder),
                "clips.frames": self.frames,
                "clips.size": [height, width],
                "clips.fps": pipeline.fps,
            }
        )

    @property
    def _starts(self) -> list[int] | None:
        return None if self.block_starts is None else list(self.block_starts)

    def trajectories(
        self, config: MakeTrajectoriesConfig, example: BatchInputs
    ) -> Callable[..., Float[Array, "B S T h w C"]]:
        """``fn(inputs)`` -> trajectories of these indices, the end last; compiled for inputs of the example's shapes,
        which is said. Frames that are given are clean in all states."""
        pipeline, network = self.pipeline, VideoNetwork(self.pipeline.transformer)
        if self.clips is not None:
            network = WorldNetwork(self.pipeline.transformer, self.block_starts)
        shape = self.latent_shape

        def run(params, indices, positive, negative, given):
            noise = jnp.moveaxis(trajectory_noise(config.seed, indices, shape), 1, -1)
            noise = noise if given is None else noise[:, given.frames.shape[1] :]

            def velocity(latents, timestep):
                guidance = StepGuidance(positive, negative, self.guidance_scale, control=given)
                return guided_velocity(network, params, latents, timestep, guidance)

            steps = (config.timesteps, config.num_steps, config.flow_shift, config.snap)
            states = teacher_trajectory(velocity, noise, *steps)
            if given is None:
                return states
            first = jnp.broadcast_to(given.frames[:, None], (*states.shape[:2], *given.frames.shape[1:]))
            return jnp.concatenate([first, states], axis=2)

        name = f"{config.batch_size} trajectories of {config.num_steps} steps"
        compiled = pipeline.programs.get(name, "trajectories", run, pipeline.params, *example).run
        return lambda inputs: compiled(pipeline.params, *inputs)


def trajectory_noise(seed: int, indices: Int[Array, " B"], shape: tuple[int, ...]) -> Float[Array, "B C T h w"]:
    """Where trajectories begin: what ``initial_latents`` gives the videos of these indices."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))(indices)


def open_teacher(config: MakeTrajectoriesConfig, directory: Path, say: Say = print) -> Teacher:
    """Opens the teacher, which is in a directory.

    Raises:
        FileNotFoundError: there is no model.
        UserError: it is no video model, or its videos can't have this size or number of frames.
        CheckpointError: its weights are missing or damaged.
    """
    is_world = pipeline_of(directory) == WORLD_PIPELINE
    teacher = _open_world(config, directory, say) if is_world else _open_video(config, directory)
    read = is_guided(teacher.guidance_scale) or not config.negative_prompt.strip()
    require("negative-prompt", repr(config.negative_prompt), read, "none without guidance, at a scale of 1 or below")
    return teacher


def _open_video(config: MakeTrajectoriesConfig, directory: Path) -> Teacher:
    """A SANA-Video model."""
    for name in ("data", "num_clips", "block_frames"):
        require(name, getattr(config, name), getattr(config, name) is None, "a value for a world model (SANA-WM) alone")
    refuse_zip_options(config.zip_options)
    model = read_model_directory(directory, "SanaVideoPipeline")
    pipeline = SanaVideoPipeline.from_pretrained(directory, weights=config.weights)
    if model.trained_from is not None and model.trained_from.kind == "lora":
        pipeline.fuse_lora()
    defaults, factor = model.defaults, model.autoencoder.spatial_factor
    height, width = config.height or defaults.height, config.width or defaults.width
    _, *patch = model.transformer_config.patch_size
    for name, value, side in zip(("--height", "--width"), (height, width), patch):
        check_multiple(name, value, factor * side)
    frames = config.frames or defaults.frames or DEFAULT_FRAMES
    latent_frames(frames, model.autoencoder.temporal_factor)  # says which numbers are allowed
    scale = defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale
    dtype = latent_dtype(ImageDataConfig(latent_dtype=config.latent_dtype), model.autoencoder)
    return Teacher(pipeline, model, float(scale), frames, (height, width), dtype)


def _open_world(config: MakeTrajectoriesConfig, directory: Path, say: Say) -> Teacher:
    """A world model and the clips of which its trajectories are made."""
    for name in ("prompts", "motion_score", "height", "width"):
        require(
            name, getattr(config, name), getattr(config, name) is None, "none for a world model, whose clips have it"
        )
    model = read_model_directory(directory, WORLD_PIPELINE)
    pipeline = SanaWMPipeline.from_pretrained(directory, weights=config.weights)
    trained = model.trained_from
    if trained is not None and trained.kind == "lora":
        pipeline.fuse_lora()
    clips = open_world_clips(config.data, config.frames, config.num_clips, directory, model, say, config.zip_options)
    _, frames, height, width = clips.latent_shape
    starts = None
    if config.block_frames is not None:
        starts = chunk_starts(frames, config.block_frames)
    elif trained is not None and "chunk_causal" in trained.settings:
        chunks = trained.settings["chunk_causal"]
        starts = chunk_starts(frames, chunks["block_frames"], chunks["blocks"])
    if starts is not None:
        say(f"teacher: sampled in causal blocks that begin at latent frames {', '.join(map(str, starts))}")
    scale = model.defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale
    dtype = latent_dtype(ImageDataConfig(latent_dtype=config.latent_dtype), model.autoencoder)
    factor, shown = model.autoencoder.spatial_factor, pixel_frames(frames, model.autoencoder.temporal_factor)
    return Teacher(pipeline, model, float(scale), shown, (height * factor, width * factor), dtype, clips, starts)


def captions_of(
    config: MakeTrajectoriesConfig, directory: Path, say: Say = print, clips: WorldClips | None = None
) -> list[str]:
    """The prompt of every trajectory; ``directory`` is the teacher's, ``clips`` are a world model's.

    Raises:
        FileNotFoundError, UserError: the prompts can't be read; or none are given, and the teacher has none.
    """
    if clips is not None:
        return clips.captions * config.per_caption
    if config.prompts is not None:
        return texts_of(read_prompts(config.prompts, "--prompts", say), config.motion_score) * config.per_caption
    data = read_config(directory).data if (directory / CONFIG_NAME).is_file() else None
    if not isinstance(data, MovingDigitsDataConfig):
        raise UserError(
            f"--prompts is missing: {config.model} is no run on moving digits, whose captions could be taken; name a "
            "text file with one prompt per line"
        )
    return texts_of(MovingDigitsData(data).captions, config.motion_score) * config.per_caption


def make_trajectories(
    config: MakeTrajectoriesConfig, *, say: Say = print, stop: StopRequest | None = None
) -> Path | None:
    """Makes what is missing of a directory of trajectories.

    Args:
        config: the options.
        say: prints a line.
        stop: a request to stop ends the shard under way and leaves.

    Returns:
        The directory; None if it was asked to stop before the end.

    Raises:
        FileNotFoundError, UserError, CheckpointError: one line about what does not fit.
    """
    out, directory = Path(config.out).expanduser(), find_model(config.model)
    teacher = open_teacher(config, directory, say)
    captions = captions_of(config, directory, say, teacher.clips)
    identity = teacher.identity(config)
    _check_out(out, identity)
    with CacheWriter(out, identity, say=say, option="--out") as cache:
        work = _Work(config, teacher, captions, cache, say, stop)
        work.plan()
        if not (work.make_prompts() and work.make_trajectories()):
            say(f"stopped by {stop.signal.name}; what was finished is kept in {out}, the same command continues")
            return None
        work.finish()
    return out


@dataclass
class _Work:
    """One pass; the methods in their order are what ``make_trajectories`` does."""

    config: MakeTrajectoriesConfig
    teacher: Teacher
    captions: list[str]
    cache: CacheWriter
    say: Say
    stop: StopRequest | None

    def __post_init__(self):
        size = self.config.batch_size
        width = jnp.dtype(self.teacher.dtype).itemsize
        self.num_bytes = math.prod(self.teacher.latent_shape) * (1 + len(self.config.timesteps)) * width
        if self.teacher.clips is not None:
            self.num_bytes += sum(
                array.nbytes for array in camera_arrays(self.teacher.clips.given(np.zeros(1, int))).values()
            )
        batches = max(1, min(SHARD_BATCHES, SHARD_BYTES // (size * self.num_bytes)))
        wanted = [Wanted((_key(index), VARIANT), _digest(text)) for index, text in enumerate(self.captions)]
        self.shards = NumberedShards(self.cache, LATENTS, wanted, size * batches)
        texts = sorted(dict.fromkeys(self.captions), key=lambda text: (len(text), text))
        self.negative = negative_name(self.config.negative_prompt)
        names = [*dict.fromkeys((NULL_PROMPT, self.negative)), *(("text", text) for text in texts)]
        self.prompts = NumberedShards(self.cache, PROMPTS, list(map(Wanted, names)), PROMPTS_IN_SHARD)

    def plan(self) -> None:
        """Says what is there and what is missing, and whether there is room for it."""
        missing = sum(len(self.shards.part(number)) for number in self.shards.missing())
        count, distinct = len(self.captions), len(set(self.captions))
        teacher, config = self.teacher, self.config
        self.say(
            f"trajectories: {self.cache.directory}: {count:,} of {distinct:,} prompts, {count - missing:,} of them "
            f"there; {teacher.frames} frames of {teacher.size[0]}x{teacher.size[1]} px, {config.num_steps} steps at "
            f"flow shift {config.flow_shift:g}, guidance {teacher.guidance_scale:g}, in {teacher.dtype}"
        )
        needed, free_bytes = missing * self.num_bytes, shutil.disk_usage(self.cache.directory).free
        if missing:
            self.say(f"trajectories: to be added: {readable_bytes(needed)}; free: {readable_bytes(free_bytes)}")
        if needed > free_bytes:
            raise UserError(
                f"--out {self.cache.directory} needs {readable_bytes(needed)} more, and {readable_bytes(free_bytes)} "
                "are free there: make room, or name a folder on another disk"
            )

    def make_prompts(self) -> bool:
        """Encodes the prompts, unless they are there, and lets go of the text encoder; False if asked to stop."""
        encoder, missing = self.teacher.model.text_encoder, self.prompts.missing()
        meter = Meter("prompts with the empty one", sum(len(self.prompts.part(number)) for number in missing), self.say)
        for number in missing:
            self.prompts.write(number, self._encoded(number, meter))
            if self._asked():
                return False
        meter.close()
        free(encoder)
        return True

    def _encoded(self, number: int, meter: Meter) -> Iterator[dict[str, np.ndarray]]:
        encoder = self.teacher.model.text_encoder
        names = [wanted.name for wanted in self.prompts.part(number)]
        for name in names:
            if name in (NULL_PROMPT, self.negative):
                yield null_record(encoder) if name == NULL_PROMPT else negative_record(encoder, name[1])
                meter.advance(1)
        done: dict[str, dict[str, np.ndarray]] = {}
        texts = [text for kind, text in names if kind == "text"]
        # short texts first, which is the order of the records
        for batch in encode_prompts(encoder, texts, self.say):
            done |= {prompt.text: text_record(encoder, prompt)[1] for prompt in batch}
            meter.advance(len(batch))
        yield from (done[text] for text in texts)

    def make_trajectories(self) -> bool:
        """Follows the teacher where trajectories are missing; False if asked to stop."""
        missing = self.shards.missing()
        if not missing:
            return True
        prompts = PromptRecords(CacheReader(self.cache.directory, unfinished=True))
        follow = self.teacher.trajectories(self.config, self._inputs(0, prompts))
        meter = Meter("trajectories", sum(len(self.shards.part(number)) for number in missing), self.say)
        moments = Moments()
        for number in missing:
            self.shards.write(number, self._followed(number, follow, prompts, moments, meter))
            if self._asked():
                return False
        meter.close()
        self.say(
            f"latents: mean {moments.mean:.3f}, standard deviation {moments.deviation:.3f} over {moments.count:,} "
            "values of the ends (about 0 and 1 are expected)"
        )
        return True

    def _followed(
        self, number: int, follow: Callable, prompts: PromptRecords, moments: Moments, meter: Meter
    ) -> Iterator[dict[str, np.ndarray]]:
        size, count = self.config.batch_size, len(self.shards.part(number))
        first = number * self.shards.size
        for start in range(first, first + count, size):
            inputs = self._inputs(start, prompts)
            states = np.asarray(follow(inputs))[: first + count - start]
            camera = {} if inputs.given is None else camera_arrays(inputs.given)
            for row, (index, own) in enumerate(enumerate(states, start)):
                if not np.isfinite(own).all():
                    raise UserError(
                        f"trajectory {index} ({self.captions[index][:60]!r}) is not finite; take another teacher, or a "
                        f"lower --guidance-scale than {self.teacher.guidance_scale:g}"
                    )
                moments.add(own[-1])
                kept = {"latents": own[-1], TRAJECTORY: own[:-1]}
                kept = {name: array.astype(self.teacher.dtype) for name, array in kept.items()}
                yield {**kept, **{name: array[row] for name, array in camera.items()}}
            if self.stop is not None:  # a shard that is not finished would be lost
                self.stop.nothing_to_lose = start + size >= first + count
            meter.advance(len(states))

    def _inputs(self, start: int, prompts: PromptRecords) -> BatchInputs:
        """Of a full batch: one that is not goes on with trajectories after the last, which are not kept."""
        indices = np.arange(start, start + self.config.batch_size)
        texts = [self.captions[index % len(self.captions)] for index in indices]
        guided = is_guided(self.teacher.guidance_scale)
        positive = prompts.encode(texts)
        negative = prompts.negative_encoding(self.config.negative_prompt) if guided else None
        as_arrays = [None if each is None else Encoded(*map(jnp.asarray, each)) for each in (positive, negative)]
        clips = self.teacher.clips
        given = None if clips is None else jax.tree.map(jnp.asarray, clips.given(indices))
        return BatchInputs(jnp.asarray(indices), *as_arrays, given)

    def _asked(self) -> bool:
        return self.stop is not None and self.stop.signal is not None

    def finish(self) -> None:
        """Writes the list of trajectories, which makes them readable."""
        size = list(self.teacher.size)
        lines = (
            {
                "key": _key(index),
                "size": size,
                "captions": [[text, "prompt", None]],
                "group": None,
                "variants": [VARIANT],
                "signatures": {VARIANT: _digest(text)},
            }
            for index, text in enumerate(self.captions)
        )
        with nullcontext() if self.stop is None else self.stop.writing:
            self.cache.write_samples(lines)
        kept = sum(shard.num_bytes for shard in self.cache.shards)
        self.say(
            f"trajectories: {len(self.captions):,}, {readable_bytes(kept)} in {len(self.cache.shards)} files; train on "
            f"them with --data.path {self.cache.directory}"
        )


def _check_out(out: Path, identity: CacheIdentity) -> None:
    """Raises ``UserError`` with what differs where the directory has trajectories that were made in another way."""
    if not (out / IDENTITY_FILE).is_file():
        return
    if differing := read_identity(out).differences(identity):
        shown = "; ".join(f"{name} is {have!r} there, {want!r} here" for name, (have, want) in differing.items())
        raise UserError(
            f"--out {out} holds trajectories that were made in another way: {shown[:600]}; make them with the options "
            "that it was begun with, or name another directory"
        )


def _key(index: int) -> str:
    return f"{index:07d}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Runs the command; returns its exit status."""
    config = parse(MakeTrajectoriesConfig, sys.argv[1:] if argv is None else argv, prog=PROG)
    with nullcontext(stop) if stop is not None else closing(StopRequest()) as stop:
        with computing(config.device, config.kernels):
            made = make_trajectories(config, say=_print_line, stop=stop)
        stop.nothing_to_lose = True
        return 0 if made is not None else exit_status(stop.signal)


def _print_line(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command_line(lambda: main(stop=STOP))
