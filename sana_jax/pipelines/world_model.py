"""SANA-WM: a world that a camera moves through, from a picture, a text and a path of the camera."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.autoencoders.base import latent_frames, pixel_frames
from sana_jax.camera import ActionScheme
from sana_jax.diffusion.samplers import FlowEuler, Schedule
from sana_jax.diffusion.samplers.world_model import chunk_starts
from sana_jax.diffusion.samplers.world_refiner import SINK_FRAMES
from sana_jax.diffusion.step_caching import StepCacheReport
from sana_jax.errors import UserError
from sana_jax.models.sana_wm import SanaWMTransformer
from sana_jax.pipelines.base import OutputType, Size, StepEndCallback, Stopwatch
from sana_jax.pipelines.checks import check_finite, check_multiple
from sana_jax.pipelines.denoising import GuidanceBatching
from sana_jax.pipelines.image_inputs import SHORTEST_SIDE, read_picture
from sana_jax.pipelines.residency import AUTOENCODER, TEXT, TRANSFORMER, Residency, leave
from sana_jax.pipelines.resolution import check_whole_pixels
from sana_jax.pipelines.resumed_folder import digest
from sana_jax.pipelines.sampling_function import Encoded, is_guided
from sana_jax.pipelines.video_base import VideoPipeline, VideoRequest
from sana_jax.pipelines.weights_settings import weights_settings
from sana_jax.pipelines.world_inputs import WorldView, camera_path, instruction_lines, one_text, three_axes, view_at
from sana_jax.pipelines.world_network import WorldGiven, WorldNetwork, trained_blocks
from sana_jax.pipelines.world_refiner import SanaWMRefiner, SanaWMRefinerOutput
from sana_jax.pipelines.world_refiner_checkpoint import FirstStage
from sana_jax.videos import check_fps

# of the refiner's call, what is not its user's to say here
_NOT_OPTIONS = ("self", "latents", "fps", "output_type")
# and what does not say whether it can be made
_OF_ITS_RUN = ("checkpoint_dir", "callback_on_block_end", "say")


@dataclasses.dataclass(frozen=True)
class SanaWMPipelineOutput:
    """What a call has made.

    Attributes:
        frames: a list of one video, which is a list of PIL images; an array (1, F, H, W, 3) in [0, 1]; or latents
            (1, C, T, h, w), as asked for. Of a refined video without the frames that anchor it.
        c2w: the camera-to-world matrix of every frame of ``frames``; of all frames where these are latents.
        latents: the first stage's (1, C, T, h, w), normalised as the transformers see them.
        refined: what the refiner has returned, its ``frames`` being latents where ``frames`` are; None without it.
        fps: frames per second at which they are to be shown.
        compile_seconds: of the transformer's program; 0 where it was compiled before.
        sampling_seconds: of everything after the text.
        device_bytes: what the transformer's program holds on the device; None where that is not known.
        seconds: of each stage: text, encode, denoise (without compiling), decode or refine.
        sampled_size: height and width in pixels.
        step_cache: what step caching did; None where it was not asked for, or nothing was sampled.
    """

    frames: Any
    c2w: Float[np.ndarray, "F 4 4"]
    latents: Float[np.ndarray, "1 C T h w"]
    refined: SanaWMRefinerOutput | None = None
    fps: float = 16.0
    compile_seconds: float = 0.0
    sampling_seconds: float = 0.0
    device_bytes: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sampled_size: tuple[int, int] | None = None
    step_cache: StepCacheReport | None = None


class _Asked(NamedTuple):
    """A call, after a look at all of it.

    Attributes:
        request: what it shares with the calls of other pipelines.
        steps: of sampling.
        scale: of guidance.
        fps: frames per second.
        size: of the video.
        poses: of every frame.
        view: the image and the camera at that size.
        start: the noise, without the first frame.
        refiner: the second stage, if there is one.
        options: of its call.
    """

    request: VideoRequest
    steps: int
    scale: float
    fps: float
    size: Size
    poses: Float[np.ndarray, "F 4 4"]
    view: WorldView
    start: Float[Array, "1 N h w C"]
    refiner: SanaWMRefiner | None
    options: Mapping[str, Any]


class SanaWMPipeline(VideoPipeline):
    """Makes one video at a time; arguments as in ``SamplingPipeline``.

    The picture is the first latent frame: it is clean, its timestep is 0, and no step changes it.
    """

    class_name = "SanaWMPipeline"
    transformer: SanaWMTransformer
    sampler: FlowEuler
    causal_blocks: tuple[int, str] | None = None
    """Of a network that was trained in causal blocks: latent frames of a block, and how videos are cut, as
    ``chunk_starts`` takes them. It is sampled in these blocks. None: bidirectional."""

    @classmethod
    def _from_model(cls, model: Any, residency: Residency, **networks: Any) -> Any:
        pipeline = super()._from_model(model, residency, **networks)
        pipeline.causal_blocks = trained_blocks(model.trained_from)
        return pipeline

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """As in ``SamplingPipeline``; says what a model directory does not keep.

        Raises:
            UserError: as there.
        """
        super().save_pretrained(path)
        if self.causal_blocks is not None and self.class_name == SanaWMPipeline.class_name:  # streams keep their blocks
            print(
                f"{path} does not say that the model was trained in causal blocks: read from there, it is sampled "
                "bidirectionally; sample the training run's directory instead"
            )

    def check_components(self) -> None:
        """Raises ``UserError`` for another sampler than Euler's, or latents of another number of frames."""
        self._check_sampler()
        factor, config = self.autoencoder.temporal_factor, self.transformer.config
        if config.use_chunk_plucker_post_attn and config.chunk_plucker_channels != 6 * factor:
            raise UserError(
                f"chunk_plucker_channels {config.chunk_plucker_channels} with an autoencoder of {factor} frames per "
                f"latent; allowed is {6 * factor}, six for each of them: take both from one model"
            )

    def _check_sampler(self) -> None:
        if not isinstance(self.sampler, FlowEuler):
            raise UserError(
                f"{self.class_name} with the sampler {type(self.sampler).__name__}; allowed is FlowEuler, which leaves "
                "the first frame as it is: set it, or leave the sampler to the model"
            )

    def __call__(
        self,
        image: Any,
        prompt: str | None = None,
        negative_prompt: str = "",
        *,
        action: str | None = None,
        c2w: Float[np.ndarray, "F 4 4"] | None = None,
        intrinsics: Any = None,
        action_scheme: str | ActionScheme | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fps: float | None = None,
        seed: int = 0,
        latents: Float[Array, "1 C T H W"] | None = None,
        prompt_embeds: Float[Array, "1 L C"] | None = None,
        prompt_attention_mask: Int[Array, "1 L"] | None = None,
        negative_prompt_embeds: Float[Array, "1 L C"] | None = None,
        negative_prompt_attention_mask: Int[Array, "1 L"] | None = None,
        max_sequence_length: int | None = None,
        chi_prompt: Sequence[str] | None = None,
        refine: SanaWMRefiner | None = None,
        refiner_options: Mapping[str, Any] | None = None,
        guidance_batching: GuidanceBatching = "auto",
        step_cache: float | None = None,
        step_cache_error: bool = False,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        progress_bar: bool = False,
    ) -> SanaWMPipelineOutput:
        """Makes a video. What is None comes from ``self.defaults``.

        Without ``callback_on_step_end`` and ``progress_bar`` all steps are one program.

        Args:
            image: what the video begins with: file, PIL image, or array (H, W, 3). It is scaled to cover the video
                and cropped to its middle, which a line says.
            prompt: what the video shows.
            negative_prompt: what it should not be.
            action: keys and for how many frames they are held, such as ``"w-80,jw-40,w-40"``; see
                ``sana_jax.camera``. The video has one frame more, of these the first 1 + 8k.
            c2w: camera-to-world matrices in place of ``action``, with OpenCV's axes; the first may be any.
            intrinsics: fx, fy, cx, cy in pixels of the image as it is given: (4,), (3, 3), (F, 4) or (F, 3, 3). None
                takes a camera that spans 60 degrees across, or what the model's defaults say, and says so.
            action_scheme: what keys mean: ``"v1"`` (diffusers; None takes it, at the speeds of the model's defaults),
                ``"v2"``, or a scheme of your own.
            num_frames: frames of the video, 1 + 8k. An action must make as many; of ``c2w`` the first are taken. None:
                as many of all as the model makes.
            height: pixels of the video.
            width: the same.
            num_inference_steps: sampling steps.
            guidance_scale: classifier-free guidance; 1 or below runs without, at half the cost.
            fps: frames per second, for showing the video and for the refiner.
            seed: of the noise; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal, (1, C, T, h, w); that of frame 0 is not used.
            prompt_embeds: encoded prompt (1, L, C) in place of ``prompt``, with ``prompt_attention_mask`` (1, L).
            prompt_attention_mask: 1 where a token counts.
            negative_prompt_embeds: likewise in place of ``negative_prompt``.
            negative_prompt_attention_mask: likewise.
            max_sequence_length: prompt tokens that count, where the text encoder has that setting.
            chi_prompt: lines put before the prompt, where the text encoder has that setting; empty for none.
            refine: the second stage, which refines the latents and draws the frames. The first of them, which anchor
                it, are left out.
            refiner_options: further arguments of its call, such as ``seed``, ``checkpoint_dir`` or ``noise``.
            guidance_batching: as in ``SanaVideoPipeline``.
            step_cache: as in ``SanaVideoPipeline``.
            step_cache_error: as in ``SanaVideoPipeline``.
            output_type: ``"pil"``; ``"np"``, (1, F, H, W, 3) in [0, 1]; or ``"latent"``, (1, C, T, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": (1, C, T, h, w)}) after every step;
                if it returns False, sampling ends there.
            progress_bar: shows the steps.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, or values
                that stop being finite; the message names the stage.
        """
        self._check_sampler()
        request = VideoRequest(
            prompt=one_text("prompt", prompt, refine, refiner_options),
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            latents=latents,
            prompt_embeds=three_axes("prompt_embeds", prompt_embeds),
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=three_axes("negative_prompt_embeds", negative_prompt_embeds),
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=instruction_lines(chi_prompt, prompt_embeds),
            guidance_batching=guidance_batching,
            step_cache=step_cache,
            step_cache_error=step_cache_error,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            progress_bar=progress_bar,
        )
        steps, scale = self._steps_and_scale(request)
        fps = self.fps if fps is None else check_fps(fps)
        refiner, options = self._refiner(refine, refiner_options, request.prompt, fps)
        temporal, spatial = self.autoencoder.temporal_factor, self.autoencoder.spatial_factor
        poses = camera_path(action, c2w, num_frames, action_scheme, temporal, defaults=self.defaults)
        size = self._world_size(height, width)
        start = self._noise(latents, 1, latent_frames(len(poses), temporal), size, seed)[:, 1:]
        if refiner is not None:
            checked = {name: value for name, value in options.items() if name not in _OF_ITS_RUN}
            refiner.check((1, start.shape[1] + 1, *start.shape[2:]), output_type, **checked)
        picture = read_picture(image, shortest=min(SHORTEST_SIDE, *size.sampled))
        view = view_at(picture, poses, intrinsics, size.sampled, temporal, spatial, field=self.defaults.field_of_view)
        return self._make(_Asked(request, steps, scale, fps, size, poses, view, start, refiner, options))

    def _make(self, asked: _Asked) -> SanaWMPipelineOutput:
        """Runs the stages, one network after another."""
        watch, request = Stopwatch(), asked.request
        whole = self._first_stage_kept(watch, asked)
        refined, latents = None, np.asarray(jnp.moveaxis(whole, -1, 1))
        if asked.refiner is None:
            frames = self._videos(whole, asked.size, request.output_type)
        else:
            if asked.refiner.residency == "one_at_a_time":
                for name in self.networks:  # of the first stage too nothing stays beside the network that is at work
                    leave(name, asked.refiner.residency, self.networks)
            refined = asked.refiner(latents, output_type=request.output_type, **asked.options)
            frames = refined.frames
        watch.end("decode" if refined is None else "refine")
        factor = self.autoencoder.temporal_factor
        shown = _shown_poses(asked.poses, frames, request.output_type, refined, asked.options, factor)
        seconds = sum(seconds for stage, seconds in watch.seconds.items() if stage != "text")
        timing = (watch.compile_seconds, seconds, watch.device_bytes, dict(watch.seconds))
        size = asked.size.sampled
        return SanaWMPipelineOutput(frames, shown, latents, refined, asked.fps, *timing, size, watch.step_cache)

    def _first_stage_kept(self, watch: Stopwatch, asked: _Asked) -> Float[Array, "1 T H W C"]:
        """The first stage's latents: beside the refiner's blocks, where an earlier call has left them, or sampled.

        Sampled again they could differ in their last bits, and the refiner's blocks would be another run's.
        """
        folder = asked.options.get("checkpoint_dir")
        if folder is None:
            return self._first_stage(watch, asked)
        request, shape = asked.request, (1, asked.start.shape[1] + 1, *asked.start.shape[2:])
        settings = self._world_settings(request, asked.size, asked.poses, asked.view, request.latents)
        settings |= {
            "negative_prompt": request.negative_prompt,
            "negative_prompt_embeds": digest(request.negative_prompt_embeds, request.negative_prompt_attention_mask),
            "num_inference_steps": asked.steps,
            "guidance_scale": asked.scale,
        }
        if self.causal_blocks is not None:
            settings["causal_blocks"] = list(self.causal_blocks)
        if request.step_cache is not None:
            settings["step_cache"] = float(request.step_cache)
        kept = FirstStage(folder, settings, asked.options.get("say", print))
        latents = kept.load(shape)
        if latents is None:
            latents = self._first_stage(watch, asked)
            kept.save(latents)
        elif request.step_cache is not None:
            print("step cache: no step was taken now, so none was skipped and no error measured")
        return jnp.asarray(latents)

    def _first_stage(self, watch: Stopwatch, asked: _Asked) -> Float[Array, "1 T H W C"]:
        request = asked.request
        conditions = self._conditions(request, is_guided(asked.scale))
        self._leave(TEXT)
        watch.end("text")
        given = self._given(asked.view)
        self._leave(AUTOENCODER)
        watch.end("encode")
        schedule = self.sampler.schedule(asked.steps)
        sampled = self._sample(watch, schedule, asked.start, conditions, asked.scale, given, request)
        self._leave(TRANSFORMER)
        watch.end("denoise")
        return jnp.concatenate([given.frames, sampled], axis=1)

    # -- what a call asks for ------------------------------------------------------------------------------------

    def _world_settings(
        self, request: VideoRequest, size: Size, poses: Float[np.ndarray, "F 4 4"], view: WorldView, latents: Any
    ) -> dict[str, Any]:
        """What decides the first stage's latents, of all ways to sample, for telling runs apart."""
        instruction = request.complex_human_instruction
        networks = {TRANSFORMER: self.transformer, TEXT: self.text_encoder, AUTOENCODER: self.autoencoder}
        names = {TRANSFORMER: [self.checkpoint_id, self.weights, self.checkpoint_step]}
        return {
            "prompt": request.prompt,
            "prompt_embeds": digest(request.prompt_embeds, request.prompt_attention_mask),
            "max_sequence_length": request.max_sequence_length,
            "chi_prompt": None if instruction is None else list(instruction),
            "image": digest(view.pixels),
            "poses": [len(poses), digest(poses)],
            "intrinsics": digest(view.intrinsics),
            "height, width": list(size.sampled),
            "seed": request.seed,
            "latents": digest(latents),
            "sampler": str(self.sampler),
            "transformer": str(self.transformer.config),
            **weights_settings(networks, self.networks, names),
            **self.lora_settings(),
        }

    def _world_size(self, height: int | None, width: int | None) -> Size:
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        check_whole_pixels(height, width)
        _, rows, columns = self.transformer.config.patch_size
        check_multiple("height", height, self.autoencoder.spatial_factor * rows)
        check_multiple("width", width, self.autoencoder.spatial_factor * columns)
        return Size((height, width), (height, width))

    def _refiner(
        self,
        refine: Any,
        given: Mapping[str, Any] | None,
        prompt: str | None,
        fps: float,
        refused: Collection[str] = _NOT_OPTIONS,
    ) -> tuple[SanaWMRefiner | None, dict[str, Any]]:
        """The refiner, with this pipeline's autoencoder where it has none, and the arguments of its call."""
        if refine is None:
            if given:
                raise UserError("refiner_options would not be used without refine; give a SanaWMRefiner")
            return None, {}
        if not isinstance(refine, SanaWMRefiner):
            raise UserError(
                f"refine {type(refine).__name__} is not allowed; allowed is a SanaWMRefiner: "
                "SanaWMRefiner.from_pretrained(directory, autoencoder=pipeline.autoencoder)"
            )
        names = [name for name in inspect.signature(SanaWMRefiner.__call__).parameters if name not in refused]
        options = dict(given or {})
        if unknown := sorted(set(options) - set(names)):
            raise UserError(f"refiner_options has {', '.join(unknown)}; allowed are {', '.join(names)}")
        if options.get("prompt_embeds") is None:
            options.setdefault("prompt", prompt)
        if refine.autoencoder is None:
            refine = refine.with_autoencoder(self.autoencoder)
        channels = refine.transformer.config.in_channels
        if channels != self.autoencoder.latent_channels:
            raise UserError(
                f"a refiner of {channels} latent channels for a first stage of {self.autoencoder.latent_channels}; "
                "allowed are the same: take both from one model"
            )
        return refine, {**options, "fps": fps}

    # -- its stages ----------------------------------------------------------------------------------------------

    def _given(self, view: WorldView) -> WorldGiven:
        """The picture's latents and the camera, for one video."""
        first = self._first_frame(view)
        takes = self.transformer.config.use_chunk_plucker_post_attn
        plucker = jnp.asarray(view.camera.chunk_plucker[None]) if takes else None
        return WorldGiven(first, jnp.asarray(view.camera.conditions[None]), plucker)

    def _first_frame(self, view: WorldView) -> Float[Array, "1 1 H W C"]:
        """The picture's latents."""
        first = jnp.asarray(self.autoencoder.encode(jnp.asarray(view.pixels[None])), jnp.float32)
        check_finite("encoding of the image", first, self.made)
        return first

    def _sample(
        self,
        watch: Stopwatch,
        schedule: Schedule,
        start: Float[Array, "1 N H W C"],
        conditions: tuple[Encoded, Encoded | None],
        scale: float,
        given: WorldGiven,
        request: VideoRequest,
    ) -> Float[Array, "1 N H W C"]:
        """The latents behind the given frames, clean."""

        def whole(latents: Array) -> Array:
            return jnp.concatenate([given.frames, latents], axis=1)

        return self._denoise(watch, schedule, start, conditions, scale, request, given, whole)

    def _network(self, frames: int) -> WorldNetwork:
        starts = None if self.causal_blocks is None else chunk_starts(frames, *self.causal_blocks)
        return WorldNetwork(self.transformer, starts)


def _shown_poses(
    poses: Float[np.ndarray, "F 4 4"],
    frames: Any,
    output_type: OutputType,
    refined: SanaWMRefinerOutput | None,
    options: Mapping[str, Any],
    temporal_factor: int,
) -> Float[np.ndarray, "F 4 4"]:
    """The poses of the frames that are returned."""
    poses = np.asarray(poses, np.float32)
    if output_type == "latent":
        return poses[: pixel_frames(frames.shape[2], temporal_factor)]
    first = 0
    if refined is not None:
        first = options.get("sink_size", SINK_FRAMES)
    return poses[first : first + len(frames[0])]
