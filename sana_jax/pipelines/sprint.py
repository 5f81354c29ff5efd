"""Text to image and image to image in one to four steps: ``SanaSprintPipeline`` (SANA-Sprint, arXiv 2503.09641)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.samplers import SCM, Schedule
from sana_jax.diffusion.trigflow import flow_input, sigma_from_angle, trigflow_velocity
from sana_jax.errors import UserError
from sana_jax.pipelines.base import (
    ImagePipeline,
    OutputType,
    SanaPipelineOutput,
    StepEndCallback,
    Stopwatch,
    first_step,
)
from sana_jax.pipelines.checks import check_common_options, check_text_options, finite_scale
from sana_jax.pipelines.denoising import Denoiser, Denoising
from sana_jax.pipelines.image_inputs import read_pictures
from sana_jax.pipelines.prompts import encode_positive
from sana_jax.pipelines.residency import TEXT, TRANSFORMER
from sana_jax.pipelines.resolution import Binning
from sana_jax.pipelines.sampling_function import Encoded, transformer_variables
from sana_jax.pipelines.text_to_image import DEFAULT_STRENGTH, instruction_lines

MAX_TIMESTEPS = 1.57080
INTERMEDIATE_TIMESTEPS = 1.3


class SanaSprintPipeline(ImagePipeline):
    """Draws pictures in a few steps of a consistency model; arguments as in ``ImagePipeline``.

    Guidance is an input of the network, so there is no negative prompt and no second pass. Any number of steps works
    with the defaults, and ``timesteps`` may be given; in the reference the default intermediate timestep is an error
    for any number of steps but 2, and ``timesteps`` always is.
    """

    class_name = "SanaSprintPipeline"

    def check_components(self) -> None:
        """Raises ``UserError`` for anything but a consistency model."""
        if not isinstance(self.sampler, SCM) or not self.transformer.config.guidance_embeds:
            raise UserError(
                f"{type(self.sampler).__name__} with guidance_embeds={self.transformer.config.guidance_embeds} is a "
                "flow model (SANA, SANA-1.5); SanaSprintPipeline allows SCM with guidance_embeds: use SanaPipeline"
            )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Float[Array, "B C H W"] | None = None,
        step_noise: Float[Array, "n B C H W"] | None = None,
        prompt_embeds: Float[Array, "B L C"] | None = None,
        prompt_attention_mask: Int[Array, "B L"] | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        timesteps: Sequence[float] | None = None,
        image: Any = None,
        strength: float | None = None,
        binning: Binning | None = None,
        max_sequence_length: int | None = None,
        complex_human_instruction: Sequence[str] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        progress_bar: bool = False,
    ) -> SanaPipelineOutput:
        """Draws ``num_images_per_prompt`` pictures of every prompt. What is None comes from ``self.defaults``.

        Args:
            prompt: one or several texts.
            num_inference_steps: 1 to 4 are usual, 2 is the default.
            guidance_scale: an input of the network; 4.5 is the published value.
            height: pixels of the result; of ``image`` if that is given.
            width: pixels, likewise.
            num_images_per_prompt: pictures of each prompt, side by side in the result.
            seed: the noise of a picture depends on (seed, its number) alone; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal, (B, C, h, w).
            step_noise: the noise added after each step instead, unit normal, (steps taken, B, C, h, w).
            prompt_embeds: encoded prompts (B, L, C) in place of ``prompt``, with ``prompt_attention_mask`` (B, L).
            prompt_attention_mask: 1 where a token counts.
            max_timesteps: first angle, 1.5708 (about π/2: pure noise).
            intermediate_timesteps: second angle of two steps; by default 1.3 there, and even spacing elsewhere.
            timesteps: all angles from noise to 0 instead, one more than steps.
            image: a picture to begin from: file, PIL image, or array (H, W, 3); one for all or a list of one each.
            strength: how much of ``image`` is drawn anew, in (0, 1]; 0.6 if not given. It picks the step to begin with.
            binning: as in ``SanaPipeline``.
            max_sequence_length: as in ``SanaPipeline``.
            complex_human_instruction: as in ``SanaPipeline``.
            output_type: ``"pil"``; ``"np"``, (B, H, W, 3) in [0, 1]; or ``"latent"``, (B, C, h, w).
            callback_on_step_end: as in ``SanaPipeline``; its latents are in units of 0.5.
            progress_bar: shows the steps.

        Raises:
            UserError: as in ``SanaPipeline``.
        """
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = finite_scale(self.defaults.guidance_scale if guidance_scale is None else guidance_scale)
        check_common_options(output_type, num_images_per_prompt, seed)
        if latents is not None and step_noise is not None and seed != 0:
            raise UserError(f"seed {seed} would not be used, since latents and step_noise are given; leave it out")
        sampler = self._sampler(steps, max_timesteps, intermediate_timesteps, timesteps)
        schedule = sampler.schedule(steps)
        if image is None and strength is not None:
            raise UserError("strength would not be used without image; give image or leave strength out")
        first = 0 if image is None else first_step(steps, DEFAULT_STRENGTH if strength is None else strength)
        pictures = read_pictures(image, "image")
        size = self._size(height, width, binning, latents, pictures)

        watch = Stopwatch()
        check_text_options(max_sequence_length, complex_human_instruction, prompt_embeds is None)
        options = {
            "max_length": max_sequence_length,
            "complex_human_instruction": instruction_lines(complex_human_instruction),
        }
        conditions = encode_positive(
            self._encode_texts(options),
            self.transformer.config.caption_channels,
            prompt,
            prompt_embeds,
            prompt_attention_mask,
            num_images_per_prompt,
        )
        self._leave(TEXT)
        watch.end("text")

        count = conditions.embeds.shape[0]
        start = self._noise(latents, count, size, seed) * sampler.sigma_data
        if pictures is not None:
            given = self._encode_pictures(pictures, count, size, "image")
            angle = schedule.timesteps[first]
            start = jnp.cos(angle) * given * sampler.sigma_data + jnp.sin(angle) * start
            watch.end("encode")
        noise = self._step_noise(step_noise, steps, first, start.shape, seed)
        denoiser = self._denoiser(watch, schedule, start, noise, conditions, scale)
        options = {"callback": callback_on_step_end, "progress_bar": progress_bar}
        state = self._run(denoiser, start, start_index=first, **options).state
        del denoiser  # it holds the weights, which would stay in memory with it
        self._leave(TRANSFORMER)
        watch.end("denoise")
        images = self._output(state.denoised / sampler.sigma_data, size, output_type)
        watch.end("decode")
        return watch.output(images, size)

    def _sampler(self, steps: int, largest: float | None, second: float | None, angles: Any) -> SCM:
        """The sampler of one call: even spacing unless two steps, or angles, are asked for."""
        if angles is not None:
            if largest is not None or second is not None:
                raise UserError("timesteps take the place of max_timesteps and intermediate_timesteps; leave those out")
            angles = tuple(float(angle) for angle in angles)
            return dataclasses.replace(self.sampler, max_timesteps=None, intermediate_timesteps=None, timesteps=angles)
        if second is None and steps == 2:
            second = INTERMEDIATE_TIMESTEPS
        largest = MAX_TIMESTEPS if largest is None else largest
        return dataclasses.replace(self.sampler, max_timesteps=largest, intermediate_timesteps=second, timesteps=None)

    def _step_noise(self, given: Any, steps: int, first: int, shape: tuple[int, ...], seed: int) -> Any:
        """Unit normal noise of every step of the schedule, channels-last; those before ``first`` are not read."""
        batch, height, width, channels = shape
        if given is None:
            key = jax.random.fold_in(jax.random.key(seed), 2**31)  # apart from the pictures' starting noise

            def draw(step, picture):
                picture_key = jax.random.fold_in(jax.random.fold_in(key, picture), step)
                return jax.random.normal(picture_key, shape[1:], jnp.float32)

            pictures = jax.vmap(draw, in_axes=(None, 0))
            return jax.vmap(pictures, in_axes=(0, None))(jnp.arange(steps), jnp.arange(batch))
        given = jnp.asarray(given, jnp.float32)
        expected = (steps - first, batch, channels, height, width)
        if given.shape != expected:
            raise UserError(f"step_noise of shape {given.shape}; {steps - first} steps here need {expected}: give that")
        given = jnp.transpose(given, (0, 1, 3, 4, 2))
        return jnp.concatenate([jnp.zeros((first, *given.shape[1:])), given])

    def _denoiser(
        self,
        watch: Stopwatch,
        schedule: Schedule,
        start: Float[Array, "B H W C"],
        noise: Float[Array, "n B H W C"],
        conditions: Encoded,
        scale: float,
    ) -> Denoiser:
        """The steps, compiled."""
        transformer, sigma_data = self.transformer, self.sampler.sigma_data

        def velocity(params, inputs, step, latents, memory):
            """The TrigFlow velocity."""
            (weights, lora), (conditions, guidance), angle = params, inputs, step.timestep
            batch = latents.shape[0]
            network_input = flow_input(latents, angle, sigma_data)
            # The network is told the noise level in [0, 1]; timestep_scale is not for this family.
            output = transformer.apply(
                transformer_variables(weights, lora),
                network_input,
                conditions.embeds,
                jnp.broadcast_to(sigma_from_angle(angle), (batch,)),
                jnp.broadcast_to(guidance * transformer.config.guidance_embeds_scale, (batch,)),
                encoder_attention_mask=conditions.mask,
            )
            return trigflow_velocity(network_input, output, angle, sigma_data), memory

        # The sampler's step reads nothing but sigma_data of its settings, so that all angles share a program.
        sampler = SCM(sigma_data=sigma_data)
        inputs = conditions, jnp.float32(scale)
        denoising = Denoising("sprint", sampler, schedule, velocity, inputs, noise=noise)
        name = f"the transformer for latents {'x'.join(map(str, start.shape))}"
        params = self.params, self._runtime_lora
        program, denoiser = denoising.compiled(self.programs, name, params, start, transformer)
        self._check_budget(program, start.shape[0])
        watch.compiled(program)
        return denoiser
