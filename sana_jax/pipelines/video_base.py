"""What the video pipelines share: sizes, numbers of frames, noise, guidance, the network's program, frames out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.autoencoders.base import latent_frames, pixel_frames
from sana_jax.compilation import Program
from sana_jax.diffusion.guidance import ProjectedGuidance
from sana_jax.diffusion.samplers import SCM, LongSanaSampler, Schedule
from sana_jax.diffusion.step_caching import StepCacheReport
from sana_jax.errors import UserError
from sana_jax.models.sana_video import SanaVideoTransformer
from sana_jax.pipelines.base import OutputType, SamplingPipeline, Size, StepEndCallback, Stopwatch
from sana_jax.pipelines.checks import as_numbers, check_multiple, check_options, check_text_options, finite_scale
from sana_jax.pipelines.decoding import as_latents, decoded_videos
from sana_jax.pipelines.denoising import (
    Denoiser,
    Denoising,
    GuidanceBatching,
    StepVelocity,
    check_guidance_batching,
    fitting_program,
)
from sana_jax.pipelines.prompt_schedule import refuse_schedule
from sana_jax.pipelines.prompts import encode_negative, encode_positive
from sana_jax.pipelines.residency import AUTOENCODER
from sana_jax.pipelines.resolution import Binning, resize_and_crop, video_size_to_sample
from sana_jax.pipelines.sampling_function import (
    Encoded,
    StepGuidance,
    VideoNetwork,
    guided_velocity,
    initial_latents,
    is_guided,
    projected_velocity,
    scale_in_interval,
)
from sana_jax.pipelines.step_caching import StepCaching, cache_of, memory_after, memory_before
from sana_jax.videos import is_real

DEFAULT_FRAMES, DEFAULT_FPS = 81, 16.0


@dataclasses.dataclass(frozen=True)
class SanaVideoPipelineOutput:
    """What a call has made.

    Attributes:
        frames: a list of videos, each a list of PIL images; an array (B, F, H, W, 1 or 3) in [0, 1]; or latents
            (B, C, T, h, w), as asked for. Several videos of one prompt stand side by side.
        fps: frames per second at which they are to be shown.
        compile_seconds: of the transformer's program; 0 where it was compiled before.
        sampling_seconds: of everything after the text.
        device_bytes: what the transformer's program holds on the device; None where that is not known.
        seconds: of each stage: text, encode, denoise (without compiling), decode.
        sampled_size: height and width in pixels that were sampled, before cropping to what was asked for.
        step_cache: what step caching did; None where it was not asked for.
    """

    frames: Any
    fps: float = DEFAULT_FPS
    compile_seconds: float = 0.0
    sampling_seconds: float = 0.0
    device_bytes: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sampled_size: tuple[int, int] | None = None
    step_cache: StepCacheReport | None = None


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """The arguments of one call, as ``SanaVideoPipeline.__call__`` describes them."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    num_videos_per_prompt: int = 1
    seed: int = 0
    latents: Any = None
    prompt_embeds: Any = None
    prompt_attention_mask: Any = None
    negative_prompt_embeds: Any = None
    negative_prompt_attention_mask: Any = None
    guidance_interval: tuple[float, float] | None = None
    projected_guidance: ProjectedGuidance | None = None
    motion_score: int | None = None
    binning: Binning | None = None
    max_sequence_length: int | None = None
    complex_human_instruction: Sequence[str] | None = None
    guidance_batching: GuidanceBatching = "auto"
    step_cache: float | None = None
    step_cache_error: bool = False
    output_type: OutputType = "pil"
    callback_on_step_end: StepEndCallback | None = None
    progress_bar: bool = False


class VideoPipeline(SamplingPipeline):
    """A pipeline that makes videos; arguments as in ``SamplingPipeline``."""

    made: ClassVar[str] = "videos"
    transformer: SanaVideoTransformer

    def check_components(self) -> None:
        """Raises ``UserError`` for a sampler of distilled models, which these are not."""
        if isinstance(self.sampler, SCM | LongSanaSampler):
            raise UserError(
                f"{self.class_name} with the sampler {type(self.sampler).__name__}; allowed are DPMSolver and "
                "FlowEuler, for video models are flow models: set one of them"
            )

    @property
    def fps(self) -> float:
        """Frames per second of the model's videos."""
        return DEFAULT_FPS if self.defaults.fps is None else float(self.defaults.fps)

    @property
    def token_side(self) -> int:
        """Pixels per side of one token."""
        return self.transformer.config.patch_size[1] * self.autoencoder.spatial_factor

    # -- what a call asks for ------------------------------------------------------------------------------------

    def _steps_and_scale(self, request: VideoRequest) -> tuple[int, float]:
        refuse_schedule(request.prompt, self.class_name)
        defaults = self.defaults
        steps = defaults.num_inference_steps if request.num_inference_steps is None else request.num_inference_steps
        scale = finite_scale(defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale)
        check_options(
            request.output_type,
            request.num_videos_per_prompt,
            request.seed,
            request.latents,
            scale,
            (request.negative_prompt, request.negative_prompt_embeds, request.negative_prompt_attention_mask),
            request.guidance_interval,
            {"projected_guidance": request.projected_guidance is not None},
            "num_videos_per_prompt",
        )
        projected = request.projected_guidance
        if projected is not None and not isinstance(projected, ProjectedGuidance):
            raise UserError(
                f"projected_guidance {projected!r} is not allowed; allowed is a "
                "sana_jax.diffusion.guidance.ProjectedGuidance: give one, or leave it out"
            )
        if request.guidance_interval is not None:
            scale_in_interval(scale, 0.0, request.guidance_interval)  # refuses a bad one before any work
        check_guidance_batching(request.guidance_batching, is_guided(scale))
        self._step_caching(request, steps)
        return steps, scale

    def _step_caching(self, request: VideoRequest, steps: int) -> StepCaching | None:
        return StepCaching.asked_for(request.step_cache, request.step_cache_error, steps, request.guidance_batching)

    def _prompts(self, request: VideoRequest) -> str | Sequence[str] | None:
        """The prompts with the motion score that SANA-Video's training wrote behind them."""
        score = request.motion_score
        if score is None:
            return request.prompt
        if not isinstance(score, int | np.integer) or isinstance(score, bool) or not 0 <= score <= 1000:
            raise UserError(f"motion_score {score!r} is not allowed; choose a whole number from 0 to 1000: 30 is usual")
        if request.prompt is None:
            raise UserError("motion_score would not be used, since embeddings are given; leave it out")
        texts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
        return [f"{text} motion score: {score}." if isinstance(text, str) else text for text in texts]

    def _conditions(self, request: VideoRequest, guided: bool) -> tuple[Encoded, Encoded | None]:
        instruction = request.complex_human_instruction
        if isinstance(instruction, str):
            raise UserError("complex_human_instruction is a list of lines, not one string: put it in a list")
        encode = self._encode_texts(
            {
                "max_length": request.max_sequence_length,
                "complex_human_instruction": None if instruction is None else tuple(instruction),
            }
        )
        encodes = request.prompt_embeds is None, guided and request.negative_prompt_embeds is None
        check_text_options(request.max_sequence_length, instruction, *encodes)
        channels, repeats = self.transformer.config.caption_channels, request.num_videos_per_prompt
        prompts = self._prompts(request)
        positive = encode_positive(
            encode, channels, prompts, request.prompt_embeds, request.prompt_attention_mask, repeats
        )
        if not guided:
            return positive, None
        negatives = (request.negative_prompt, request.negative_prompt_embeds, request.negative_prompt_attention_mask)
        return positive, encode_negative(encode, channels, *negatives, positive, repeats)

    # -- sizes, frames, noise ------------------------------------------------------------------------------------

    def _frames(self, request: VideoRequest) -> int:
        """Latent frames of the video that is asked for, or of the latents that are given."""
        factor = self.autoencoder.temporal_factor
        frames = request.frames
        if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int | np.integer)):
            raise UserError(f"frames {frames!r} is not allowed; choose a whole number, 1 + {factor}·k")
        if request.latents is not None:
            if np.ndim(request.latents) != 5:
                raise UserError(
                    f"latents of shape {np.shape(request.latents)}; allowed is (B, C, T, h, w): bring them to 5 axes"
                )
            given = np.shape(request.latents)[2]
            if frames is not None and latent_frames(int(frames), factor) != given:
                raise UserError(
                    f"frames {frames} for latents of {given} latent frames, which are {pixel_frames(given, factor)} "
                    "frames; leave one of them out"
                )
            return given
        if frames is None:
            frames = DEFAULT_FRAMES if self.defaults.frames is None else self.defaults.frames
        return latent_frames(int(frames), factor)

    def _video_size(
        self,
        height: int | None,
        width: int | None,
        binning: Binning | None,
        latents: Any = None,
        say: Callable[[str], None] = print,
    ) -> Size:
        """The size asked for (by the arguments, the latents or the defaults), and the one sampled."""
        config, factor = self.transformer.config, self.autoencoder.spatial_factor
        if latents is not None:
            height = np.shape(latents)[3] * factor if height is None else height
            width = np.shape(latents)[4] * factor if width is None else width
            binning = "off" if binning is None else binning  # latents have the size that is sampled
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        sampled = video_size_to_sample(height, width, binning, config.sample_size, self.token_side)
        check_multiple("height", sampled[0], factor * config.patch_size[1])
        check_multiple("width", sampled[1], factor * config.patch_size[2])
        if sampled != (height, width):
            say(
                f"sampling {sampled[0]}x{sampled[1]} pixels, the trained size nearest in shape to {height}x{width}, to "
                "which the frames are scaled and cropped (binning off samples the size itself)"
            )
        return Size((height, width), sampled)

    def _check_latents(self, latents: Any, count: int, frames: int, size: Size) -> tuple[int, int, int, int]:
        """The shape (C, T, h, w) of one video's latents; raises ``UserError`` for latents of another."""
        factor = self.autoencoder.spatial_factor
        height, width = size.sampled
        shape = (self.autoencoder.latent_channels, frames, height // factor, width // factor)
        if latents is not None and np.shape(latents) != (count, *shape):
            raise UserError(
                f"latents of shape {np.shape(latents)}; {count} videos of {height}x{width} need {(count, *shape)}, in "
                "the order (B, C, T, h, w): give latents of that shape"
            )
        return shape

    def _noise(self, latents: Any, count: int, frames: int, size: Size, seed: int) -> Float[Array, "B T H W C"]:
        """Unit normal starting noise: the given latents, or drawn from the seed."""
        shape = self._check_latents(latents, count, frames, size)
        if latents is None:
            latents = initial_latents(seed, count, shape)
        return jnp.moveaxis(as_numbers("latents", latents).astype(jnp.float32), 1, -1)

    # -- the network's program -----------------------------------------------------------------------------------

    def _denoise(
        self,
        watch: Stopwatch,
        schedule: Schedule,
        start: Float[Array, "B T H W C"],
        conditions: tuple[Encoded, Encoded | None],
        scale: float,
        request: VideoRequest,
        given: Any = None,
        whole: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "B T H W C"]:
        """The latents after the last step; ``given`` is the network's, and ``whole`` as in ``_run``."""
        denoiser = self._denoiser(watch, schedule, start, conditions, scale, request, given)
        options = {"callback": request.callback_on_step_end, "progress_bar": request.progress_bar, "whole": whole}
        progress = self._run(denoiser, start, **options)
        caching = self._step_caching(request, schedule.num_inference_steps)
        if caching is not None:
            watch.step_cache = caching.report(denoiser, start, progress, progress.memory[1], 0)
        return progress.state.latents

    def _denoiser(
        self,
        watch: Stopwatch,
        schedule: Schedule,
        start: Float[Array, "B T H W C"],
        conditions: tuple[Encoded, Encoded | None],
        scale: float,
        request: VideoRequest,
        given: Float[Array, "B G H W C"] | None = None,
    ) -> Denoiser:
        """The steps, compiled once for all numbers of steps (up to the next power of two) and scales."""
        settings, interval = request.projected_guidance, request.guidance_interval
        scales = [scale] * schedule.num_inference_steps
        if interval is not None:
            scales = [scale_in_interval(scale, float(sigma), interval) for sigma in schedule.sigmas[:-1]]
        guided, steps = conditions[1] is not None, schedule.num_inference_steps
        caching, params = self._step_caching(request, steps), (self.params, self._runtime_lora)
        shape = list(start.shape)
        shape[1] += start_frames(given)
        network = self._network(shape[1])
        name = f"the transformer for latents {'x'.join(map(str, shape))}"
        tables: Any = np.asarray(scales, np.float32)
        memory: Any = () if settings is None else jnp.zeros_like(start)
        if caching is not None:
            tokens = network.token_shape(((1 + guided) * shape[0], *shape[1:]))
            tables = (tables, *caching.tables(0, steps))
            memory = (memory, memory_before(tokens, self.transformer.dtype, steps))

        def compiled(split: bool) -> tuple[Program, Denoiser]:
            denoising = Denoising(
                ("video", settings, split, caching is not None),
                self.sampler,
                schedule,
                _step_velocity(network, settings, split, caching is not None),
                (*conditions, given),
                tables,
                memory,
            )
            return denoising.compiled(self.programs, name, params, start, network)

        program, denoiser = fitting_program(
            request.guidance_batching,
            guided,
            compiled,
            params,
            may_split=caching is None,
            budget=self._sampling_budget,
        )
        self._check_budget(program, start.shape[0])
        watch.compiled(program)
        return denoiser

    def _network(self, frames: int) -> VideoNetwork:
        """The network for videos of so many latent frames."""
        return VideoNetwork(self.transformer)

    # -- frames out ----------------------------------------------------------------------------------------------

    def _videos(self, latents: Float[Array, "B T H W C"], size: Size, output_type: OutputType) -> Any:
        """Latents as asked for; videos are decoded one after another."""
        if output_type == "latent":
            return as_latents(latents)

        def finish(frames: Float[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W 3"]:
            return resize_and_crop(frames, *size.requested)

        videos = decoded_videos(self.autoencoder, latents, output_type, self.made, finish)
        self._leave(AUTOENCODER)
        return videos

    def _result(self, watch: Stopwatch, frames: Any, size: Size) -> SanaVideoPipelineOutput:
        return SanaVideoPipelineOutput(
            frames,
            self.fps,
            watch.compile_seconds,
            sum(seconds for stage, seconds in watch.seconds.items() if stage != "text"),
            watch.device_bytes,
            dict(watch.seconds),
            size.sampled,
            watch.step_cache,
        )


def start_frames(given: Any) -> int:
    """Latent frames that stand before those that are sampled."""
    return 0 if given is None else jax.tree.leaves(given)[0].shape[1]


def _step_velocity(network: Any, settings: ProjectedGuidance | None, split: bool, caches: bool) -> StepVelocity:
    """The guided velocity as the compiled steps call it; projected guidance remembers a sum from step to step."""

    def guided(params, inputs, step, latents, scale, running, step_cache):
        """The velocity, the sum, and what step caching adds."""
        (weights, lora), (positive, negative, given) = params, inputs
        own = (network, weights, latents, step.timestep)
        options = {"lora": lora, "split": split, "step_cache": step_cache}
        guidance = StepGuidance(positive, negative, scale, control=given)
        if settings is None:
            result = guided_velocity(*own, guidance, **options)
            velocity, *rest = result if step_cache is not None else (result,)
            return velocity, running, *rest
        return projected_velocity(*own, step.sigma, guidance, settings, running, **options)

    def plain(params, inputs, step, latents, memory):
        return guided(params, inputs, step, latents, step.numbers, memory, None)

    def cached(params, inputs, step, latents, memory):
        (scale, threshold, required), (running, kept) = step.numbers, memory
        cache = cache_of(kept, threshold, required)
        velocity, running, *decided = guided(params, inputs, step, latents, scale, running, cache)
        return velocity, (running, memory_after(kept, step, *decided))

    return cached if caches else plain


def frames_of_seconds(seconds: float, fps: float, temporal_factor: int, say: Callable[[str], None] = print) -> int:
    """The number of frames that a model makes, 1 + temporal_factor·k, nearest to so many seconds; prints it.

    SANA-Video's 81 frames are 5 seconds at 16 frames per second: the first frame stands at 0.

    Raises:
        UserError: a time that is not above 0.
    """
    if not (is_real(seconds) and math.isfinite(seconds) and seconds > 0):
        raise UserError(f"seconds {seconds!r} is not allowed; choose more than 0")
    seconds = float(seconds)
    blocks = max(0, round(seconds * fps / temporal_factor))
    frames = 1 + temporal_factor * blocks
    say(f"{seconds:g} seconds at {fps:g} frames per second: {frames} frames (1 + {temporal_factor} x {blocks})")
    return frames
