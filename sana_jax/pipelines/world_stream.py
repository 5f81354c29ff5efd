"""SANA-WM's streaming form: a world that appears chunk by chunk while it is made, in constant memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.autoencoders.base import latent_frames
from sana_jax.camera import ActionScheme
from sana_jax.compilation import Program, readable_bytes
from sana_jax.diffusion.samplers import WorldStreamSampler
from sana_jax.diffusion.samplers.world_model import STREAMING_STEPS, generate_block, listed_schedule, read_block
from sana_jax.errors import UserError
from sana_jax.models.sana_wm import init_state
from sana_jax.models.sana_wm_state import SanaWMState, cache_frames, state_bytes
from sana_jax.pipelines.base import OutputType, Size
from sana_jax.pipelines.checks import finite_scale
from sana_jax.pipelines.decoding import check_decodes_blocks, stream_blocks
from sana_jax.pipelines.growing_output import check_frames_in_memory, check_output_arguments
from sana_jax.pipelines.image_inputs import SHORTEST_SIDE, read_picture
from sana_jax.pipelines.residency import Residency
from sana_jax.pipelines.video_base import VideoRequest
from sana_jax.pipelines.world_inputs import (
    camera_path,
    instruction_lines,
    one_text,
    refuse_memory,
    three_axes,
    view_at,
)
from sana_jax.pipelines.world_model import SanaWMPipeline
from sana_jax.pipelines.world_network import block_velocity, trained_blocks
from sana_jax.pipelines.world_refiner import DEFAULT_SEED, SanaWMRefiner
from sana_jax.pipelines.world_stream_folder import StreamFolder
from sana_jax.pipelines.world_stream_run import (
    BlockEndCallback,
    RefinerPart,
    SanaWMStreamingPipelineOutput,
    StreamPlan,
    WorldStreamRun,
)
from sana_jax.videos import check_fps, check_video_path

# of the refiner's call, what is not its user's to say here
_NOT_OPTIONS = ("self", "latents", "fps", "output_type", "checkpoint_dir", "callback_on_block_end", "say")


class SanaWMStreamingPipeline(SanaWMPipeline):
    """Makes one video at a time, chunk after chunk; arguments as in ``SamplingPipeline``.

    A chunk is a causal block of a few latent frames. It is sampled in a few steps and read once more at timestep 0 for
    the state that the next one sees; a refiner goes on as soon as it has a whole block of its own; the autoencoder
    decodes what is ready; frames are written and forgotten. Each stage has a state of fixed size, so that neither
    memory nor the time of a chunk depends on the video's length. Two programs serve the first chunk and two all others;
    a last chunk of another length, which it has where the frames do not divide evenly, takes one more.
    """

    class_name = "SanaWMStreamingPipeline"
    sampler: WorldStreamSampler

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, memory: str | None = None, **options: Any) -> Any:
        """Reads a model directory; arguments and errors as in ``SamplingPipeline.from_pretrained``.

        Raises:
            UserError: also where ``memory`` is given: plans are of stages that follow one another.
        """
        refuse_memory(memory)
        return super().from_pretrained(path, **options)

    @classmethod
    def _from_model(cls, model: Any, residency: Residency, **networks: Any) -> Any:
        if not isinstance(model.sampler, WorldStreamSampler):
            trained = trained_blocks(model.trained_from)
            blocks = {} if trained is None else dict(zip(("block_frames", "blocks"), trained))
            sampler = WorldStreamSampler(timesteps=STREAMING_STEPS, **blocks)
            print(
                f"{model.path} does not say how it is streamed; the published student's settings are taken, {sampler}. "
                "A network that was not distilled for them makes poor videos"
            )
            steps = {"guidance_scale": 1.0, "num_inference_steps": sampler.num_inference_steps}
            model = dataclasses.replace(model, sampler=sampler, defaults=dataclasses.replace(model.defaults, **steps))
        stream_blocks(model.autoencoder, model.path)
        return super()._from_model(model, residency, **networks)

    def check_components(self) -> None:
        """Raises ``UserError`` for another sampler, a decoder that needs the whole video, or networks one at a time."""
        super().check_components()
        check_decodes_blocks(self.autoencoder, self.class_name)
        _check_residency(self.residency, "the transformer")

    def _check_sampler(self) -> None:
        if not isinstance(self.sampler, WorldStreamSampler):
            raise UserError(
                f"{self.class_name} with the sampler {type(self.sampler).__name__}; allowed is WorldStreamSampler, "
                "which says in which blocks and steps the model was distilled: set it, or leave it to the model"
            )

    def __call__(
        self,
        image: Any,
        prompt: str | None = None,
        *,
        action: str | None = None,
        c2w: Float[np.ndarray, "F 4 4"] | None = None,
        intrinsics: Any = None,
        action_scheme: str | ActionScheme | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        block_frames: int | None = None,
        num_cached_blocks: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        latents: Float[Array, "1 C T H W"] | None = None,
        prompt_embeds: Float[Array, "1 L C"] | None = None,
        prompt_attention_mask: Int[Array, "1 L"] | None = None,
        max_sequence_length: int | None = None,
        chi_prompt: Sequence[str] | None = None,
        refine: SanaWMRefiner | None = None,
        refiner_options: Mapping[str, Any] | None = None,
        output_path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        output_type: OutputType | None = None,
        enlarge: int = 1,
        metadata: Mapping[str, Any] | None = None,
        callback_on_block_end: BlockEndCallback | None = None,
        say: Callable[[str], None] = print,
    ) -> SanaWMStreamingPipelineOutput:
        """Makes a video. What is None comes from the model; what is not described here is as in ``SanaWMPipeline``.

        Chunk b is a function of (seed, b), its camera and the chunks before it: videos whose lengths differ by whole
        chunks begin alike. A rest that is shorter than a chunk joins the last one.

        Args:
            image: what the video begins with.
            prompt: what the video shows.
            action: the camera's path, or
            c2w: its poses.
            intrinsics: the camera's lens.
            action_scheme: what keys mean.
            num_frames: frames of the video.
            height: pixels of the video.
            width: the same.
            timesteps: the steps of a chunk, whole numbers from noise to data, in place of the model's.
            guidance_scale: 1 is allowed: the model was distilled with guidance.
            block_frames: refuses a model that was trained with chunks of another number of latent frames.
            num_cached_blocks: how many earlier chunks softmax layers see, the first one counted where the model always
                sees it; 0 for all.
            fps: frames per second of the file, and for the refiner.
            seed: of the noise, with the chunk; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal; that of frame 0 is not used.
            prompt_embeds: an encoded prompt in place of ``prompt``, with ``prompt_attention_mask``.
            prompt_attention_mask: 1 where a token counts.
            max_sequence_length: prompt tokens that count, where the text encoder has that setting.
            chi_prompt: lines put before the prompt.
            refine: the second stage. The frames that anchor it are left out of the video.
            refiner_options: further arguments of its call, such as ``seed`` or ``noise``.
            output_path: an mp4, or a folder for pictures, that grows with every chunk; no frames are kept in memory.
                Until the video is whole, ``<output_path>.resume`` beside it has what it takes to go on.
            resume: goes on with the video at ``output_path``; the frames are those that it would have had. All else
                that decides what they are must be given as before.
            output_type: ``"pil"`` (default), ``"np"`` or ``"latent"``, without ``output_path``: for short videos.
            enlarge: every pixel of the file this many times.
            metadata: what is noted in the file.
            callback_on_block_end: called as (pipeline, chunk, {"latents": (1, C, T, h, w), "refined": the same or
                None}) after every chunk that is made now, which is written then; if it returns False, the video ends
                there, and can be resumed.
            say: prints a line.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, values
                that stop being finite, or a file that cannot be written.
            FileNotFoundError: there is nothing to resume.
        """
        self._check_sampler()
        check_output_arguments(output_path, output_type, resume, enlarge, seed)
        self._check_distilled(guidance_scale, block_frames)
        request = VideoRequest(
            prompt=one_text("prompt", prompt, refine, refiner_options),
            seed=seed,
            prompt_embeds=three_axes("prompt_embeds", prompt_embeds),
            prompt_attention_mask=prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=instruction_lines(chi_prompt, prompt_embeds),
        )
        fps = self.fps if fps is None else check_fps(fps)
        refiner, options = self._refiner(refine, refiner_options, request.prompt, fps, _NOT_OPTIONS)
        schedule = self._schedule(timesteps)
        temporal, spatial = self.autoencoder.temporal_factor, self.autoencoder.spatial_factor
        poses = camera_path(action, c2w, num_frames, action_scheme, temporal, say, self.defaults)
        size = self._world_size(height, width)
        starts = self._starts(latent_frames(len(poses), temporal))
        given = None
        if latents is not None:
            if seed:
                raise UserError(f"seed {seed} would not be used, since latents are given; leave one of them out")
            given = np.asarray(self._noise(latents, 1, starts[-1], size, seed))
        refining = self._refining(refiner, options, starts[-1], size, say)
        picture = read_picture(image, shortest=min(SHORTEST_SIDE, *size.sampled))
        field = self.defaults.field_of_view
        view = view_at(picture, poses, intrinsics, size.sampled, temporal, spatial, say, field)
        state = self._first_state(starts, num_cached_blocks, size)
        plan = StreamPlan(request, starts, size, poses, view, fps, schedule, given, state, refining, temporal)
        if output_path is None and output_type != "latent":
            check_frames_in_memory(plan.frames, size.requested, self.autoencoder.image_channels)
        self._say_plan(plan, say)
        folder = None
        if output_path is not None:
            check_video_path(output_path, progressive=True, goes_on=resume)
            folder = StreamFolder(output_path, self._stream_settings(plan, options, latents, enlarge), say)
            folder.go_on() if resume else folder.begin()
        run = WorldStreamRun(self, plan, folder, callback_on_block_end, say)
        return run.make(output_path, output_type or "pil", resume, enlarge, metadata)

    # -- what a call asks for ------------------------------------------------------------------------------------

    def _check_distilled(self, scale: float | None, block_frames: int | None) -> None:
        if scale is not None and (given := finite_scale(scale)) != 1:
            raise UserError(
                f"guidance_scale {given:g}: this model was distilled with guidance and runs without; allowed is 1: "
                "leave it out"
            )
        if block_frames is not None and block_frames != self.sampler.block_frames:
            raise UserError(
                f"block_frames {block_frames} does not fit this model, which was trained with chunks of "
                f"{self.sampler.block_frames} latent frames; leave it out, or choose a model that was trained so"
            )

    def _schedule(self, timesteps: Sequence[int] | None) -> Any:
        if timesteps is None:
            return self.sampler.schedule()
        return listed_schedule(timesteps, self.sampler.num_train_timesteps)

    def _starts(self, frames: int) -> tuple[int, ...]:
        return (*self.sampler.block_starts(frames), frames)

    def _refining(
        self,
        refiner: SanaWMRefiner | None,
        options: Mapping[str, Any],
        frames: int,
        size: Size,
        say: Callable[[str], None],
    ) -> RefinerPart | None:
        """The second stage, once its arguments were looked at."""
        if refiner is None:
            return None
        _check_residency(refiner.residency, "the refiner")
        sampler, noise = refiner.check((1, frames, *self.latent_shape(size)), "latent", **options)
        refiner.say_untrained(sampler, options["fps"], frames, say)
        return RefinerPart(refiner, sampler, noise, options.get("prompt"), options.get("prompt_embeds"))

    def _first_state(self, starts: tuple[int, ...], cached: int | None, size: Size) -> Callable[[], SanaWMState]:
        """Makes the state before the first chunk. With a window it is the same whatever the video's length."""
        if cached is None:
            cached, sink = self.sampler.num_cached_blocks, self.sampler.sink
        elif isinstance(cached, bool) or not isinstance(cached, int | np.integer) or cached < 0:
            raise UserError(f"num_cached_blocks {cached!r} is not allowed; choose 1 or more blocks, or 0 for all")
        else:
            cached, sink = int(cached) or None, bool(cached) and self.sampler.sink
        lengths = np.diff(starts).tolist()
        if cached is not None:
            many = self._starts(self.sampler.block_frames * (cached + 3))
            lengths = np.diff(many).tolist()
        transformer = self.transformer
        grid = tuple(
            length // patch for length, patch in zip(self.latent_shape(size), transformer.config.patch_size[1:])
        )
        room, wide = cache_frames(lengths, cached, sink), transformer.softmax_dtype or transformer.dtype
        options = {"dtype": transformer.dtype, "softmax_dtype": wide}
        return lambda: init_state(transformer.config, 1, grid, room, cached, sink, **options)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Rows, columns and channels of a latent frame."""
        rows, columns = (length // self.autoencoder.spatial_factor for length in size.sampled)
        return rows, columns, self.autoencoder.latent_channels

    def _say_plan(self, plan: StreamPlan, say: Callable[[str], None]) -> None:
        lengths = np.diff(plan.starts).tolist()
        later = "" if plan.chunks == 1 else f", then {lengths[1]}"
        if plan.chunks > 2 and lengths[-1] != lengths[1]:
            later += f", the last of {lengths[-1]}"
        say(
            f"{plan.frames} frames, {plan.frames / plan.fps:g} seconds at {plan.fps:g} per second: {plan.starts[-1]} "
            f"latent frames in {plan.chunks} chunks, the first of {lengths[0]}{later}"
        )
        state = jax.eval_shape(plan.state)
        own = state_bytes(state)
        all_seen = state.num_cached_blocks is None
        seen = "all earlier chunks" if all_seen else f"{state.num_cached_blocks} earlier chunks"
        grows = "room for all of this video, a longer one takes more" if all_seen else "it does not grow"
        sink = ", the first always one of them" if state.sink else ""
        say(
            f"state of the first stage: {readable_bytes(own['total'])}, of which {readable_bytes(own['softmax'])} are "
            f"keys and values with {seen} in sight{sink}; {grows}"
        )

    def _stream_settings(
        self, plan: StreamPlan, options: Mapping[str, Any], latents: Any, enlarge: int
    ) -> dict[str, Any]:
        """All that decides what the frames are, for comparing with those of an earlier call."""
        state, part = jax.eval_shape(plan.state), plan.refining
        settings = {
            **self._world_settings(plan.request, plan.size, plan.poses, plan.view, latents),
            "timesteps": np.asarray(plan.schedule.timesteps).tolist(),
            "num_cached_blocks": state.num_cached_blocks,
            "fps": plan.fps,
            "enlarge": enlarge,
            "refiner": False,
        }
        if part is not None:
            seed, noise = options.get("seed", DEFAULT_SEED), options.get("noise")
            given = (part.prompt, part.prompt_embeds, noise)
            own = part.refiner.settings(part.sampler, plan.fps, seed, *given)
            settings |= {"refiner": True, **{f"refiner {name}": value for name, value in own.items()}}
        return settings

    # -- programs ------------------------------------------------------------------------------------------------

    def generate_program(self, arguments: tuple) -> Program:
        """(params, lora, state, noise, given, schedule, conditions, camera, plucker, first frame) -> clean latents."""
        transformer = self.transformer

        def run(params, lora, state, noise, given, schedule, *inputs):
            velocity = block_velocity(transformer, params, lora, *inputs)
            return generate_block(velocity, state, noise, schedule, given)

        name = f"{len(arguments[5].timesteps)} steps of the transformer for {_chunk_name(arguments[3], arguments[4])}"
        return self.programs.get(name, "streamed chunk", run, *arguments, identity=transformer)

    def read_program(self, arguments: tuple) -> Program:
        """(params, lora, state, latents, conditions, camera, plucker, first frame) -> the state after the chunk.

        The state's memory goes to the one that comes back.
        """
        transformer = self.transformer

        def run(params, lora, state, latents, *inputs):
            return read_block(block_velocity(transformer, params, lora, *inputs), state, latents)

        name = f"the transformer's reading of {_chunk_name(arguments[3], None)}"
        return self.programs.get(name, "streamed reading", run, *arguments, donate=(2,), identity=transformer)


def _chunk_name(latents: Array, given: Array | None) -> str:
    first = "" if given is None else ", beginning with the picture"
    return f"chunks of latents {'x'.join(map(str, latents.shape))}{first}"


def _check_residency(residency: Residency, what: str) -> None:
    if residency == "one_at_a_time":
        raise UserError(
            "residency 'one_at_a_time' (--low-memory; a refiner's memory chooses it too) would read the weights of "
            f"{what} anew in every chunk, since all stages work on each before the next; allowed are "
            "text_encoder_freed and all: leave it out"
        )
