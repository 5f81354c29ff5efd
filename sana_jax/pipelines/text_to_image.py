"""Text to image, image to image and inpainting with the flow models SANA and SANA-1.5: ``SanaPipeline``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.compilation import Program
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.diffusion.samplers import SCM, Schedule
from sana_jax.errors import UserError
from sana_jax.pipelines.base import (
    ImagePipeline,
    OutputType,
    SanaPipelineOutput,
    Size,
    StepEndCallback,
    Stopwatch,
    first_step,
)
from sana_jax.pipelines.checks import check_options, check_text_options, finite_scale
from sana_jax.pipelines.conditions import ConditionsPipeline
from sana_jax.pipelines.denoising import (
    Denoiser,
    Denoising,
    GuidanceBatching,
    Step,
    StepVelocity,
    check_guidance_batching,
    fitting_program,
)
from sana_jax.pipelines.image_inputs import mask_at, place, read_mask, read_pictures, to_network_range
from sana_jax.pipelines.opening import abstract_params
from sana_jax.pipelines.prompts import encode_negative, encode_positive
from sana_jax.pipelines.residency import CONTROLNET, TEXT, TRANSFORMER
from sana_jax.pipelines.resolution import Binning, kept_window
from sana_jax.pipelines.sampling_function import (
    Control,
    Encoded,
    Network,
    StepGuidance,
    guided_velocity,
    is_guided,
    scale_in_interval,
)
from sana_jax.pipelines.step_caching import StepCaching, cache_of, memory_after, memory_before

__all__ = ["SanaPipeline", "SanaPipelineOutput", "abstract_params"]

DEFAULT_STRENGTH = 0.6
# layers that the authors perturb, by the number of layers: SANA 1.6B and 0.6B
PAG_LAYERS = {20: (8,), 28: (14,)}


@dataclasses.dataclass(frozen=True)
class TextToImageRequest:
    """The arguments of one call, as ``SanaPipeline.__call__`` describes them."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    seed: int = 0
    latents: Any = None
    prompt_embeds: Any = None
    prompt_attention_mask: Any = None
    negative_prompt_embeds: Any = None
    negative_prompt_attention_mask: Any = None
    guidance_interval: tuple[float, float] | None = None
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    pag_applied_layers: Sequence[int | str] | int | str | None = None
    image: Any = None
    strength: float | None = None
    mask_image: Any = None
    binning: Binning | None = None
    max_sequence_length: int | None = None
    complex_human_instruction: Sequence[str] | None = None
    conditions: Mapping[str, Any] | None = None
    guidance_batching: GuidanceBatching = "auto"
    step_cache: float | None = None
    step_cache_error: bool = False
    output_type: OutputType = "pil"
    callback_on_step_end: StepEndCallback | None = None
    progress_bar: bool = False


class SanaPipeline(ConditionsPipeline, ImagePipeline):
    """Draws pictures from texts, alone or beginning from a picture; arguments as in ``ImagePipeline``.

    Perturbed-attention guidance acts on exactly the layers named, and in models with q/k norms too; the reference's
    separate PAG pipeline matches layer names by prefix and leaves those norms out.
    """

    class_name = "SanaPipeline"

    def check_components(self) -> None:
        """Raises ``UserError`` for a consistency model (SANA-Sprint)."""
        if isinstance(self.sampler, SCM) or self.transformer.config.guidance_embeds:
            raise UserError(
                f"{type(self.sampler).__name__} with guidance_embeds={self.transformer.config.guidance_embeds} is a "
                "consistency model (SANA-Sprint); SanaPipeline allows flow models with FlowEuler or DPMSolver: use "
                "SanaSprintPipeline"
            )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Float[Array, "B C H W"] | None = None,
        prompt_embeds: Float[Array, "B L C"] | None = None,
        prompt_attention_mask: Int[Array, "B L"] | None = None,
        negative_prompt_embeds: Float[Array, "B L C"] | None = None,
        negative_prompt_attention_mask: Int[Array, "B L"] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        pag_scale: float = 0.0,
        pag_adaptive_scale: float = 0.0,
        pag_applied_layers: Sequence[int | str] | int | str | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        binning: Binning | None = None,
        max_sequence_length: int | None = None,
        complex_human_instruction: Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        guidance_batching: GuidanceBatching = "auto",
        step_cache: float | None = None,
        step_cache_error: bool = False,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        progress_bar: bool = False,
    ) -> SanaPipelineOutput:
        """Draws ``num_images_per_prompt`` pictures of every prompt. What is None comes from ``self.defaults``.

        Args:
            prompt: one or several texts.
            negative_prompt: what the pictures should not be, one text or one per prompt.
            num_inference_steps: sampling steps.
            guidance_scale: classifier-free guidance; 1 or below runs without, at half the cost.
            height: pixels of the result; of ``image`` if that is given.
            width: pixels, likewise.
            num_images_per_prompt: pictures of each prompt, side by side in the result.
            seed: picture i starts from noise that depends on (seed, i) alone; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal, (B, C, h, w).
            prompt_embeds: encoded prompts (B, L, C) in place of ``prompt``, with ``prompt_attention_mask`` (B, L).
            prompt_attention_mask: 1 where a token counts.
            negative_prompt_embeds: likewise in place of ``negative_prompt``, (B or 1, L, C).
            negative_prompt_attention_mask: likewise.
            guidance_interval: (lowest, highest) noise level in [0, 1] at which guidance acts.
            pag_scale: perturbed-attention guidance; 0 is off, 3 is usual.
            pag_adaptive_scale: takes this times (1000 - timestep) off ``pag_scale``, not below 0.
            pag_applied_layers: layers that are perturbed, as numbers or ``"transformer_blocks.8"``; None takes the
                authors' choice for SANA 1.6B (8) and 0.6B (14).
            image: a picture to begin from: file, PIL image, or array (H, W, 3); one for all or a list of one each.
            strength: how much of ``image`` is drawn anew, in (0, 1]; 0.6 if not given.
            mask_image: white where ``image`` is drawn anew; elsewhere the result is ``image`` itself. A file, PIL
                image or array (H, W), of the image's size.
            binning: ``"nearest"`` samples the trained size of the nearest shape and crops, ``"off"`` the size itself,
                ``"error"`` refuses other sizes than trained ones. None: nearest where the model has a table.
            max_sequence_length: prompt tokens that count, where the text encoder has that setting.
            complex_human_instruction: lines put before the prompt, where the text encoder has that setting; empty for
                none.
            conditions: by name, for a model with token encoders: a number, a vector (an array or a ``.npy`` file) or
                a picture, for all prompts or a list of one for each. One that is missing is left open.
            guidance_batching: ``"batched"`` or, one after another in less memory, ``"split"``; ``"auto"``: what fits.
            step_cache: threshold from 0 below which steps reuse what the network's blocks last added (see
                ``sana_jax.diffusion.step_caching``). None computes every step. No threshold is recommended: measure.
            step_cache_error: measures the error that this makes, by running every step as well.
            output_type: ``"pil"``; ``"np"``, (B, H, W, 1 or 3) in [0, 1]; or ``"latent"``, (B, C, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": (B, C, h, w)}) after every step; if
                it returns False, sampling ends there.
            progress_bar: shows the steps. Without it and a callback all steps are one call on the device.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, or values
                that stop being finite; the message names the stage.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return self._draw(TextToImageRequest(**arguments))

    def _draw(
        self, request: TextToImageRequest, control_image: Any = None, conditioning_scale: float = 1.0
    ) -> SanaPipelineOutput:
        steps, scale = self._steps_and_scale(request)
        schedule = self.sampler.schedule(steps)
        guidance = Guidance(
            scale,
            request.guidance_interval,
            self._perturbed_layers(request.pag_scale, request.pag_adaptive_scale, request.pag_applied_layers),
            request.pag_scale,
            request.pag_adaptive_scale,
        )
        first = self._first_step(steps, request)
        guided = is_guided(scale) or bool(guidance.perturbed_layers)
        check_guidance_batching(request.guidance_batching, guided)
        caching = self._step_caching(request, steps - first)
        pictures = read_pictures(request.image, "image", self._shortest_side)
        mask = None if request.mask_image is None else read_mask(request.mask_image, pictures[0])
        size = self._size(request.height, request.width, request.binning, request.latents, pictures)

        watch = Stopwatch()
        positive, negative = self._conditions(request, is_guided(scale))
        positive, negative = self._with_tokens(request, positive, negative)
        self._leave(TEXT)
        watch.end("text")

        count = positive.embeds.shape[0]
        start = noise = self._noise(request.latents, count, size, request.seed)
        known = finish = control = None
        if pictures is not None:
            given = self._encode_pictures(pictures, count, size, "image")
            sigma = schedule.sigmas[first]
            start = (1 - sigma) * given + sigma * noise
            if mask is not None:
                known, finish = _inpainting(mask, pictures[0], size, given, noise)
        if control_image is not None:
            control = Control(
                self._encode_pictures(control_image, count, size, "control_image"), jnp.float32(conditioning_scale)
            )
        if pictures is not None or control is not None:
            watch.end("encode")

        if known is None:
            # Without a mask nothing is kept. The program is that of inpainting, so that both are the same to the bit.
            known = Known(jnp.ones((1, *start.shape[1:3], 1), jnp.float32), start, start)
        inputs = Inputs(positive, negative, control, known)
        denoiser = self._denoiser(watch, schedule, start, inputs, guidance, first, request, caching)
        options = {"callback": request.callback_on_step_end, "progress_bar": request.progress_bar}
        progress = self._run(denoiser, start, start_index=first, **options)
        report = None
        if caching is not None:
            report = caching.report(denoiser, start, progress, progress.memory, first)
        del denoiser  # it holds the weights, which would stay in memory with it
        self._leave(TRANSFORMER)
        self._leave(CONTROLNET)
        watch.end("denoise")
        images = self._output(progress.state.latents, size, request.output_type, finish)
        watch.end("decode")
        return watch.output(images, size, report)

    # -- what a call asks for ------------------------------------------------------------------------------------

    def _steps_and_scale(self, request: TextToImageRequest) -> tuple[int, float]:
        defaults = self.defaults
        steps = defaults.num_inference_steps if request.num_inference_steps is None else request.num_inference_steps
        scale = finite_scale(defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale)
        check_options(
            request.output_type,
            request.num_images_per_prompt,
            request.seed,
            request.latents,
            scale,
            (request.negative_prompt, request.negative_prompt_embeds, request.negative_prompt_attention_mask),
            request.guidance_interval,
        )
        return steps, scale

    def _conditions(self, request: TextToImageRequest, guided: bool) -> tuple[Encoded, Encoded | None]:
        encode = self._encode_texts(
            {
                "max_length": request.max_sequence_length,
                "complex_human_instruction": instruction_lines(request.complex_human_instruction),
            }
        )
        encodes = request.prompt_embeds is None, guided and request.negative_prompt_embeds is None
        check_text_options(request.max_sequence_length, request.complex_human_instruction, *encodes)
        channels, repeats = self.transformer.config.caption_channels, request.num_images_per_prompt
        positive = encode_positive(
            encode, channels, request.prompt, request.prompt_embeds, request.prompt_attention_mask, repeats
        )
        if not guided:
            return positive, None
        negatives = (request.negative_prompt, request.negative_prompt_embeds, request.negative_prompt_attention_mask)
        return positive, encode_negative(encode, channels, *negatives, positive, repeats)

    def _with_tokens(
        self, request: TextToImageRequest, positive: Encoded, negative: Encoded | None
    ) -> tuple[Encoded, Encoded | None]:
        repeats, count = request.num_images_per_prompt, positive.embeds.shape[0]
        guided = negative is not None
        tokens, null = self._tokens_of_call(request.conditions, count // repeats, repeats, guided)
        if guided and null is not None:
            null = jax.tree.map(lambda array: jnp.repeat(array, negative.embeds.shape[0], axis=0), null)
            negative = negative._replace(tokens=null)
        return positive._replace(tokens=tokens), negative

    def _perturbed_layers(self, scale: float, adaptive: float, layers: Any) -> tuple[int, ...]:
        if not (scale >= 0 and np.isfinite(scale) and adaptive >= 0 and np.isfinite(adaptive)):
            raise UserError(f"pag_scale {scale} and pag_adaptive_scale {adaptive}; allowed is 0 (off) or more")
        if scale == 0:
            if layers is not None or adaptive:
                raise UserError(
                    "pag_applied_layers and pag_adaptive_scale would not be used with pag_scale 0; set pag_scale, 3 is "
                    "usual"
                )
            return ()
        count = self.transformer.config.num_layers
        if layers is None:
            if count not in PAG_LAYERS:
                raise UserError(
                    f"pag_scale {scale} without pag_applied_layers: for a model of {count} layers none is published; "
                    f"name one or several of 0 to {count - 1}"
                )
            return PAG_LAYERS[count]
        layers = [layers] if isinstance(layers, int | np.integer | str) else list(layers)
        numbers = [_layer_number(layer) for layer in layers]
        if not layers or any(number is None or not 0 <= number < count for number in numbers):
            raise UserError(
                f"pag_applied_layers {layers}; allowed are numbers 0 to {count - 1} or 'transformer_blocks.<number>': "
                "choose from those"
            )
        return tuple(sorted(set(numbers)))

    def _first_step(self, steps: int, request: TextToImageRequest) -> int:
        if request.image is None:
            unused = {"strength": request.strength, "mask_image": request.mask_image}
            if names := [name for name, value in unused.items() if value is not None]:
                raise UserError(f"{' and '.join(names)} would not be used without image; give image or leave it out")
            return 0
        several = isinstance(request.image, list | tuple) or getattr(request.image, "ndim", None) == 4
        if request.mask_image is not None and several:
            raise UserError("mask_image goes with one image, not with a list; call once for each")
        return first_step(steps, DEFAULT_STRENGTH if request.strength is None else request.strength)

    def _network(self) -> Network:
        return Network(self.transformer)

    def _network_params(self) -> Any:
        return self.params

    # -- the network's program -----------------------------------------------------------------------------------

    def _denoiser(
        self,
        watch: Stopwatch,
        schedule: Schedule,
        start: Float[Array, "B H W C"],
        inputs: Inputs,
        guidance: Guidance,
        first: int,
        request: TextToImageRequest,
        caching: StepCaching | None,
    ) -> Denoiser:
        """The steps, compiled once for all numbers of steps (up to the next power of two), scales and thresholds."""
        network, layers, caches = self._network(), guidance.perturbed_layers, caching is not None
        parts = 1 + (inputs.negative is not None) + bool(layers)
        tables: tuple = guidance.tables(schedule)
        memory: Any = ()
        if caching is not None:
            steps = schedule.num_inference_steps
            tables = (*tables, *caching.tables(first, steps))
            shape = network.token_shape((parts * start.shape[0], *start.shape[1:]))
            memory = memory_before(shape, self.transformer.dtype, steps)
        params = self._network_params(), self._runtime_lora
        name = f"the transformer for latents {'x'.join(map(str, start.shape))}"

        def compiled(split: bool) -> tuple[Program, Denoiser]:
            denoising = Denoising(
                ("image", layers, split, caches),
                self.sampler,
                schedule,
                _step_velocity(network, layers, split, caches),
                inputs,
                tables,
                memory,
                amend=_keep_known,
            )
            return denoising.compiled(self.programs, name, params, start, network)

        program, denoiser = fitting_program(
            request.guidance_batching,
            parts > 1,
            compiled,
            params,
            may_split=not caches,
            budget=self._sampling_budget,
        )
        self._check_budget(program, start.shape[0])
        watch.compiled(program)
        return denoiser

    def _step_caching(self, request: TextToImageRequest, steps_taken: int) -> StepCaching | None:
        asked = (request.step_cache, request.step_cache_error, steps_taken, request.guidance_batching)
        caching = StepCaching.asked_for(*asked)
        if caching is not None and self._network().controlnet is not None:
            raise UserError(
                "step_cache with a ControlNet is not allowed: what it adds changes at every step; leave step_cache out"
            )
        return caching


class Inputs(NamedTuple):
    """What the network reads at every step beside the latents, and what inpainting keeps."""

    positive: Encoded
    negative: Encoded | None
    control: Control | None
    known: Known


class Known(NamedTuple):
    """Of inpainting: where latents are drawn (1) and kept (0), those that are kept, clean, and the starting noise."""

    mask: Float[Array, "1 H W 1"]
    latents: Float[Array, "B H W C"]
    noise: Float[Array, "B H W C"]


def _keep_known(inputs: Inputs, step: Step, latents: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """The latents with the part that is kept at the noise level after the step."""
    mask, given, noise = inputs.known
    kept = (1 - step.next_sigma) * given + step.next_sigma * noise
    return jnp.where(mask == 1, latents, mask * latents + (1 - mask) * kept)


def _step_velocity(network: Network, layers: tuple[int, ...], split: bool, caches: bool) -> StepVelocity:
    """``guided_velocity`` as the compiled steps call it, with step caching or without."""

    def plain(params, inputs, step, latents, memory):
        weights, lora = params
        scale, pag_scale = step.numbers
        guidance = StepGuidance(inputs.positive, inputs.negative, scale, layers, pag_scale, inputs.control)
        return guided_velocity(network, weights, latents, step.timestep, guidance, lora, split), memory

    def cached(params, inputs, step, latents, memory):
        weights, lora = params
        scale, pag_scale, threshold, required = step.numbers
        guidance = StepGuidance(inputs.positive, inputs.negative, scale, layers, pag_scale)
        cache = cache_of(memory, threshold, required)
        velocity, cache, decision = guided_velocity(
            network, weights, latents, step.timestep, guidance, lora, step_cache=cache
        )
        return velocity, memory_after(memory, step, cache, decision)

    return cached if caches else plain


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What guides a call: the scales, and where they act."""

    scale: float
    interval: tuple[float, float] | None
    perturbed_layers: tuple[int, ...]
    pag_scale: float
    pag_adaptive_scale: float

    def tables(self, schedule: Schedule) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The scales of classifier-free and perturbed-attention guidance at every step."""
        scales = [self.scale] * schedule.num_inference_steps
        if self.interval is not None:
            scales = [scale_in_interval(self.scale, float(sigma), self.interval) for sigma in schedule.sigmas[:-1]]
        lowered = self.pag_adaptive_scale * (NUM_TRAIN_TIMESTEPS - schedule.timesteps.astype(np.float64))
        return np.asarray(scales, np.float32), np.maximum(0.0, self.pag_scale - lowered).astype(np.float32)


def _inpainting(
    mask: Any, picture: Any, size: Size, given: Float[Array, "B H W C"], noise: Float[Array, "B H W C"]
) -> tuple[Known, Any]:
    """What keeps the unmasked part: of the latents after every step, and of the decoded pictures."""
    sampled_mask = place(mask_at(mask, *kept_window(size.sampled, size.requested)), size.sampled)
    latent_mask = jnp.asarray(mask_at(sampled_mask, *given.shape[1:3]))[None, :, :, None]
    pixel_mask = mask_at(mask, *size.requested)[None, :, :, None]
    original = to_network_range(picture, *size.requested)

    def finish(decoded: np.ndarray) -> np.ndarray:
        return pixel_mask * decoded + (1 - pixel_mask) * original

    return Known(latent_mask, given, noise), finish


def _layer_number(layer: int | str) -> int | None:
    if not isinstance(layer, str):
        return int(layer) if isinstance(layer, int | np.integer) else None
    match = re.fullmatch(r"(?:transformer_blocks\.)?(\d+)(?:\.attn1)?", layer)
    return None if match is None else int(match[1])


def instruction_lines(instruction: Sequence[str] | None) -> tuple[str, ...] | None:
    """The instruction as the text encoder has it; raises ``UserError`` for one string in place of lines."""
    if isinstance(instruction, str):
        raise UserError("complex_human_instruction is a list of lines, not one string: put it in a list")
    return None if instruction is None else tuple(instruction)
