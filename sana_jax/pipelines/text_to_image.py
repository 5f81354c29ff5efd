"""Text to image: ``SanaPipeline``."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.autoencoders import Autoencoder
from sana_jax.diffusion.samplers import SCM, Sampler, Schedule
from sana_jax.diffusion.sampling import sample_loop, sample_scan
from sana_jax.errors import CheckpointError, UserError
from sana_jax.images import to_pil
from sana_jax.models.sana import SanaTransformer, init_params
from sana_jax.pipelines.checks import check_finite, check_multiple, check_options
from sana_jax.pipelines.model_directory import SamplingDefaults, read_model_directory, write_model_directory
from sana_jax.pipelines.sampling_function import guided_velocity, initial_latents, is_guided
from sana_jax.text_encoders import TextEncoder
from sana_jax.weights import load_checkpoint_params, load_params, save_params

OutputType = Literal["pil", "np", "latent"]
StepEndCallback = Callable[["SanaPipeline", int, float, dict[str, Any]], Any]
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

__all__ = ["SanaPipeline", "SanaPipelineOutput", "abstract_params"]


@dataclasses.dataclass(frozen=True)
class SanaPipelineOutput:
    """What a call has made.

    ``images`` is a list of PIL images, an array (B, H, W, 1 or 3) in [0, 1], or latents (B, C, H, W), as asked for;
    several pictures of one prompt stand side by side. ``compile_seconds`` is 0 where the program was compiled before;
    ``device_bytes`` is what the compiled program holds on the device, None where that is not known.
    """

    images: Any
    compile_seconds: float = 0.0
    sampling_seconds: float = 0.0
    device_bytes: int | None = None


class SanaPipeline:
    """A text encoder, a transformer, a sampler and an autoencoder, ready to draw.

    Compiled programs are kept on the pipeline, one for each combination of shapes and number of steps.

    Args:
        transformer: the network.
        params: its parameters.
        sampler: a sampler of the flow ODE.
        text_encoder: reads prompts.
        autoencoder: draws pictures from latents.
        defaults: what calls leave open.
        checkpoint_step: training step of the weights, for display.
        weights: ``"ema"`` or ``"params"``, for display.
    """

    def __init__(
        self,
        transformer: SanaTransformer,
        params: PyTree,
        sampler: Sampler,
        text_encoder: TextEncoder,
        autoencoder: Autoencoder,
        defaults: SamplingDefaults,
        *,
        checkpoint_step: int | None = None,
        weights: str | None = None,
    ) -> None:
        if isinstance(sampler, SCM) or transformer.config.guidance_embeds:
            raise UserError(
                f"{type(sampler).__name__} with guidance_embeds={transformer.config.guidance_embeds} is a consistency "
                "model (SANA-Sprint); SanaPipeline allows flow models with FlowEuler or DPMSolver: choose such a model"
            )
        self.transformer = transformer
        self.params = params
        self.sampler = sampler
        self.text_encoder = text_encoder
        self.autoencoder = autoencoder
        self.defaults = defaults
        self.checkpoint_step = checkpoint_step
        self.weights = weights
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        weights: Literal["auto", "ema", "params"] = "auto",
        checkpoint_step: int | None = None,
    ) -> SanaPipeline:
        """Reads a model directory: a training run, or what ``save_pretrained`` has written.

        Args:
            path: the directory.
            dtype: dtype of parameters and computation, ``"float32"`` (the default) or ``"bfloat16"``.
            weights: of a training run, the averaged (``"ema"``) or the raw (``"params"``) weights; ``"auto"`` takes the
                averaged ones where there are any.
            checkpoint_step: of a training run, which checkpoint; the newest by default.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            UserError: a file is damaged, a value is not allowed.
            CheckpointError: the weights are missing, damaged, or do not fit.
        """
        model = read_model_directory(path)
        compute_dtype = _parse_dtype(dtype)
        transformer = SanaTransformer(model.transformer_config, dtype=compute_dtype)
        abstract = abstract_params(transformer, compute_dtype)
        checkpoints, converted = model.path / "checkpoints", model.path / "transformer" / "params"
        if checkpoints.is_dir():
            params, step, which = load_checkpoint_params(checkpoints, abstract, which=weights, step=checkpoint_step)
        elif converted.is_dir():
            if weights == "ema" or checkpoint_step is not None:
                raise UserError(
                    f"{model.path} is not a training run and has one set of weights; weights={weights!r}, "
                    f"checkpoint_step={checkpoint_step} cannot be chosen: leave both out"
                )
            params, step, which = load_params(converted, abstract), None, None
        else:
            raise CheckpointError(
                f"{model.path} has no weights; allowed are {checkpoints.name}/<step> (a training run) or "
                f"transformer/{converted.name}: train until the first checkpoint, or copy the weights there"
            )
        return cls(
            transformer,
            params,
            model.sampler,
            model.text_encoder,
            model.autoencoder,
            model.defaults,
            checkpoint_step=step,
            weights=which,
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes a model directory with these weights and nothing of the training that made them.

        Raises:
            UserError: ``path`` has something in it already, or cannot be written.
        """
        path = pathlib.Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already; allowed is a new or empty directory: choose another name")
        save_params(path / "transformer" / "params", self.params)
        write_model_directory(
            path,
            transformer_config=self.transformer.config,
            sampler=self.sampler,
            text_encoder=self.text_encoder,
            autoencoder=self.autoencoder,
            defaults=self.defaults,
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
            height: pixels; a multiple of the autoencoder's factor times the transformer's patch size.
            width: pixels, likewise.
            num_images_per_prompt: pictures of each prompt, side by side in the result.
            seed: picture i starts from noise that depends on (seed, i) alone; 0 to 2³² - 1.
            latents: the noise to start from instead, unit normal, (B, C, h, w).
            prompt_embeds: encoded prompts (B, L, C) in place of ``prompt``, with ``prompt_attention_mask`` (B, L).
            prompt_attention_mask: 1 where a token counts.
            negative_prompt_embeds: likewise in place of ``negative_prompt``, (B or 1, L, C).
            negative_prompt_attention_mask: likewise.
            guidance_interval: (lowest, highest) noise level in [0, 1] at which guidance acts.
            output_type: ``"pil"``; ``"np"``, (B, H, W, 1 or 3) in [0, 1]; or ``"latent"``, (B, C, h, w).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": (B, C, h, w)}) after every step; if
                it returns False, sampling ends there.
            progress_bar: shows the steps. With it or with a callback the steps run one by one, else as one program.

        Raises:
            UserError: a value that is not allowed, arguments that exclude one another or would not be used, or values
                that stop being finite; the message names the stage.
        """
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = float(self.defaults.guidance_scale if guidance_scale is None else guidance_scale)
        negatives = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        check_options(output_type, num_images_per_prompt, seed, latents, scale, negatives, guidance_interval)
        positive = self._encode("prompt", prompt, prompt_embeds, prompt_attention_mask, num_images_per_prompt)
        count = positive[0].shape[0]
        negative = self._encode_negative(*negatives, positive, num_images_per_prompt) if is_guided(scale) else None
        start = self._starting_latents(latents, count, height, width, seed)
        schedule = self.sampler.schedule(steps)
        if callback_on_step_end is None and not progress_bar:
            arguments = (self.params, start, positive, negative, jnp.float32(scale))
            run, compile_seconds, device_bytes = self._compile_scan(schedule, guidance_interval, arguments)
            begin = time.perf_counter()
            final = jax.block_until_ready(run(*arguments))
        else:
            arguments = (self.params, start, jnp.float32(schedule.timesteps[0]), positive, negative, jnp.float32(scale))
            run, compile_seconds, device_bytes = self._compile_velocity(schedule, guidance_interval, arguments)
            begin = time.perf_counter()
            final = self._loop(run, schedule, arguments, callback_on_step_end, progress_bar)
        check_finite("sampling", final)
        images = self._output(final, output_type)
        return SanaPipelineOutput(images, compile_seconds, time.perf_counter() - begin, device_bytes)

    # -- conditions ----------------------------------------------------------------------------------------------

    def _encode(
        self, name: str, texts: Any, embeds: Any, mask: Any, repeats: int, *, negative: bool = False
    ) -> tuple[Array, Array]:
        """Embeddings (B·repeats, L, C) and mask, each text's pictures side by side."""
        if (texts is None) == (embeds is None):
            given = "neither" if texts is None else "both"
            raise UserError(f"{name} and {name}_embeds: {given} given; exactly one is allowed: give one of them")
        if (embeds is None) != (mask is None):
            raise UserError(f"{name}_embeds and {name}_attention_mask belong together; allowed is both or neither")
        if embeds is None:
            texts = [texts] if isinstance(texts, str) else list(texts)
            if not texts:
                raise UserError(f"{name} is an empty list; allowed is one text or more: give one")
            embeds, mask = self.text_encoder.encode(texts, negative=negative)
        embeds, mask = jnp.asarray(embeds), jnp.asarray(mask)
        channels = self.transformer.config.caption_channels
        if embeds.ndim != 3 or embeds.shape[-1] != channels or mask.shape != embeds.shape[:2]:
            raise UserError(
                f"{name}_embeds {embeds.shape} with mask {mask.shape}; allowed are (B, L, {channels}) and (B, L): "
                "encode the prompts with this model's text encoder"
            )
        check_finite("text encoding", embeds)
        return jnp.repeat(embeds, repeats, axis=0), jnp.repeat(mask, repeats, axis=0)

    def _encode_negative(
        self, text: Any, embeds: Any, mask: Any, positive: tuple[Array, Array], repeats: int
    ) -> tuple[Array, Array]:
        texts = None if embeds is not None else text
        encoded = self._encode("negative_prompt", texts, embeds, mask, 1, negative=True)
        prompts = positive[0].shape[0] // repeats
        if encoded[0].shape[0] not in (1, prompts):
            raise UserError(
                f"{encoded[0].shape[0]} negative prompts for {prompts} prompts; allowed is one for all or one each"
            )
        if encoded[0].shape[1] != positive[0].shape[1]:
            raise UserError(
                f"negative prompt of {encoded[0].shape[1]} tokens and prompt of {positive[0].shape[1]}; both must be "
                "padded to one length: give negative_prompt_embeds of the prompt's length"
            )
        batch_repeats = positive[0].shape[0] // encoded[0].shape[0]
        return jax.tree.map(lambda array: jnp.repeat(array, batch_repeats, axis=0), encoded)

    def _starting_latents(
        self, latents: Any, count: int, height: int | None, width: int | None, seed: int
    ) -> Float[Array, "B H W C"]:
        factor, channels = self.autoencoder.spatial_factor, self.autoencoder.latent_channels
        if latents is not None:
            latents = jnp.asarray(latents, jnp.float32)
            if latents.ndim != 4:
                raise UserError(f"latents of shape {latents.shape}; allowed is (B, C, h, w): bring them to 4 axes")
            height = latents.shape[2] * factor if height is None else height
            width = latents.shape[3] * factor if width is None else width
        height = self.defaults.height if height is None else height
        width = self.defaults.width if width is None else width
        multiple = factor * self.transformer.config.patch_size
        check_multiple("height", height, multiple)
        check_multiple("width", width, multiple)
        shape = (channels, height // factor, width // factor)
        if latents is None:
            latents = initial_latents(seed, count, shape)
        elif latents.shape != (count, *shape):
            raise UserError(
                f"latents of shape {latents.shape}; {count} pictures of {height}x{width} need {(count, *shape)}, in "
                "the order (B, C, h, w): give latents of that shape"
            )
        return jnp.transpose(latents, (0, 2, 3, 1))

    # -- programs ------------------------------------------------------------------------------------------------

    def _compile_scan(self, schedule: Schedule, interval: tuple[float, float] | None, arguments: tuple) -> tuple:
        def run(params, latents, positive, negative, scale):
            velocity = guided_velocity(self.transformer, params, schedule, positive, negative, scale, interval)
            return sample_scan(self.sampler, schedule, velocity, latents).latents

        return self._compile(("scan", schedule.num_inference_steps, interval), run, arguments)

    def _compile_velocity(self, schedule: Schedule, interval: tuple[float, float] | None, arguments: tuple) -> tuple:
        def run(params, latents, timestep, positive, negative, scale):
            velocity = guided_velocity(self.transformer, params, schedule, positive, negative, scale, interval)
            return velocity(latents, timestep)

        # without an interval one step's program does not depend on the schedule
        return self._compile(("step", schedule.num_inference_steps if interval else None, interval), run, arguments)

    def _compile(self, what: tuple, function: Callable, arguments: tuple) -> tuple[Any, float, int | None]:
        """The compiled function, the seconds that compiling took (0 if it was there), and the bytes it holds."""
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments[1:]))
        key = (*what, shapes, jax.tree.structure(arguments[1:]), self.sampler)
        seconds = 0.0
        if key not in self._compiled:
            begin = time.perf_counter()
            self._compiled[key] = jax.jit(function).lower(*arguments).compile()
            seconds = time.perf_counter() - begin
        memory = self._compiled[key].memory_analysis()
        device_bytes = None
        if memory is not None:
            parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
            device_bytes = sum(parts)
        return self._compiled[key], seconds, device_bytes

    def _loop(
        self,
        run: Callable,
        schedule: Schedule,
        arguments: tuple,
        callback: StepEndCallback | None,
        progress_bar: bool,
    ) -> Float[Array, "B H W C"]:
        params, start, _, positive, negative, scale = arguments
        bar = _progress_bar(schedule.num_inference_steps) if progress_bar else None

        def velocity(latents: Array, timestep: Array) -> Array:
            return run(params, latents, timestep, positive, negative, scale)

        def on_step(index: int, timestep: float, latents: Array) -> bool | None:
            if bar is not None:
                bar.update()
            return None if callback is None else _call_back(self, callback, index, timestep, latents)

        try:
            return sample_loop(self.sampler, schedule, velocity, start, on_step=on_step).latents
        finally:
            if bar is not None:
                bar.close()

    def _output(self, latents: Float[Array, "B H W C"], output_type: OutputType) -> Any:
        if output_type == "latent":
            return np.asarray(jnp.transpose(latents, (0, 3, 1, 2)))
        decoded = self.autoencoder.decode(latents)
        check_finite("decoding", decoded)
        pictures = np.clip(np.asarray(decoded, np.float32) / 2 + 0.5, 0.0, 1.0)
        return pictures if output_type == "np" else [to_pil(picture) for picture in pictures]


def abstract_params(transformer: SanaTransformer, dtype: Any = jnp.float32) -> PyTree:
    """Shapes of a transformer's parameters, as ``ShapeDtypeStruct``s of ``dtype``; nothing is computed."""
    shapes = jax.eval_shape(lambda: init_params(transformer, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def _parse_dtype(dtype: Any) -> Any:
    if dtype is None:
        return jnp.float32
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is not allowed; choose float32 or bfloat16")
    return _DTYPES[name]


def _call_back(
    pipeline: SanaPipeline, callback: StepEndCallback, index: int, timestep: float, latents: Array
) -> bool | None:
    public = {"latents": jnp.transpose(latents, (0, 3, 1, 2))}
    answer = callback(pipeline, index, timestep, dict(public))
    if answer is False:
        return False
    if isinstance(answer, Mapping) and any(answer[name] is not public.get(name) for name in answer):
        raise UserError(
            "callback_on_step_end returned changed values; they would not be used: allowed is None, what it was given, "
            "or False to stop"
        )
    return None


def _progress_bar(steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc="sampling", unit="step")
