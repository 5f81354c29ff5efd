"""Text to video with SANA-Video: ``SanaVideoPipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.guidance import ProjectedGuidance
from sana_jax.pipelines.base import OutputType, StepEndCallback, Stopwatch
from sana_jax.pipelines.denoising import GuidanceBatching
from sana_jax.pipelines.residency import TEXT, TRANSFORMER
from sana_jax.pipelines.resolution import Binning
from sana_jax.pipelines.sampling_function import is_guided
from sana_jax.pipelines.video_base import SanaVideoPipelineOutput, VideoPipeline, VideoRequest


class SanaVideoPipeline(VideoPipeline):
    """Makes videos from texts; arguments as in ``SamplingPipeline``."""

    class_name = "SanaVideoPipeline"

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        num_videos_per_prompt: int = 1,
        seed: int = 0,
        latents: Float[Array, "B C T H W"] | None = None,
        prompt_embeds: Float[Array, "B L C"] | None = None,
        prompt_attention_mask: Int[Array, "B L"] | None = None,
        negative_prompt_embeds: Float[Array, "B L C"] | None = None,
        negative_prompt_attention_mask: Int[Array, "B L"] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        projected_guidance: ProjectedGuidance | None = None,
        motion_score: int | None = None,
        binning: Binning | None = None,
        max_sequence_length: int | None = None,
        complex_human_instruction: Sequence[str] | None = None,
        guidance_batching: GuidanceBatching = "auto",
        step_cache: float | None = None,
        step_cache_error: bool = False,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        progress_bar: bool = False,
    ) -> SanaVideoPipelineOutput:
        """Makes ``num_videos_per_prompt`` videos of every prompt. What is None comes from ``self.defaults``.

        Args:
            prompt: one or several texts.
            negative_prompt: what the videos should not be, one text or one per prompt.
            num_inference_steps: sampling steps.
            guidance_scale: classifier-free guidance; 1 or below runs without, at half the cost.
            height: pixels of the result.
            width: pixels of the result.
            frames: frames of the result, 1 + k times the autoencoder's temporal factor: 81 = 1 + 20·4.
            num_videos_per_prompt: videos of each prompt, side by side in the result.
            seed: video i starts from noise that depends on (seed, i) alone; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal, (B, C, T, h, w).
            prompt_embeds: encoded prompts (B, L, C) in place of ``prompt``, with ``prompt_attention_mask`` (B, L).
            prompt_attention_mask: 1 where a token counts.
            negative_prompt_embeds: likewise in place of ``negative_prompt``, (B or 1, L, C).
            negative_prompt_attention_mask: likewise.
            guidance_interval: (lowest, highest) noise level in [0, 1] at which guidance acts.
            projected_guidance: adaptive projected guidance in place of the plain one.
            motion_score: writes `` motion score: N.`` behind every prompt, as SANA-Video's training did; 30 is usual,
                more asks for more motion.
            binning: ``"nearest"`` samples the trained size of the nearest shape and crops, ``"off"`` the size itself,
                ``"error"`` refuses other sizes than trained ones. None: nearest where the model has a table.
            max_sequence_length: prompt tokens that count, where the text encoder has that setting.
            complex_human_instruction: lines put before the prompt, where the text encoder has that setting; empty for
                none.
            guidance_batching: ``"batched"`` runs prompt and negative prompt as one batch, ``"split"`` one after another
                in less memory; ``"auto"`` splits where the one batch does not fit into the device's free memory.
            step_cache: skips steps at which the network's input changes little: a threshold from 0, which skips none;
                see ``sana_jax.diffusion.step_caching``. Tokens are kept from step to step, 6 bytes for each of their
                channels in bfloat16. None is off.
            step_cache_error: measures the error of that, by taking every step as well; it is printed, and in the
                result's ``step_cache``.
            output_type: ``"pil"``; ``"np"``, (B, F, H, W, 1 or 3) in [0, 1]; or ``"latent"``, (B, C, T, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": (B, C, T, h, w)}) after every step;
                if it returns False, sampling ends there.
            progress_bar: shows the steps. Without it and a callback all steps are one call on the device.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, or values
                that stop being finite; the message names the stage.
        """
        arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        return self._make(VideoRequest(**arguments))

    def _make(self, request: VideoRequest) -> SanaVideoPipelineOutput:
        steps, scale = self._steps_and_scale(request)
        schedule = self.sampler.schedule(steps)
        frames = self._frames(request)
        size = self._video_size(request.height, request.width, request.binning, request.latents)

        watch = Stopwatch()
        conditions = self._conditions(request, is_guided(scale))
        self._leave(TEXT)
        watch.end("text")

        start = self._noise(request.latents, conditions[0].embeds.shape[0], frames, size, request.seed)
        latents = self._denoise(watch, schedule, start, conditions, scale, request)
        self._leave(TRANSFORMER)
        watch.end("denoise")
        videos = self._videos(latents, size, request.output_type)
        watch.end("decode")
        return self._result(watch, videos, size)
