"""What pipelines share: components and when they are in memory, prompts, the loop; for pictures, sizes and output."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PyTree
from sana_jax.autoencoders import Autoencoder
from sana_jax.compilation import Program, Programs
from sana_jax.condition_tokens_files import save_condition_tokens
from sana_jax.contract import Contract
from sana_jax.diffusion.samplers import Sampler
from sana_jax.diffusion.sampling import Progress, plain_truth
from sana_jax.diffusion.step_caching import StepCacheReport
from sana_jax.errors import UserError
from sana_jax.files import atomic_directory
from sana_jax.images import to_pil
from sana_jax.pipelines.checks import as_numbers, check_finite, check_multiple, not_finite
from sana_jax.pipelines.denoising import Denoiser
from sana_jax.pipelines.families import Transformer, abstract_params
from sana_jax.pipelines.image_inputs import LUMA, SHORTEST_SIDE, place, to_network_range
from sana_jax.pipelines.lora import LoraPipeline
from sana_jax.pipelines.memory_plan import MemoryBudget, MemoryPlan, fit_memory
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.pipelines.opening import open_model, save_model
from sana_jax.pipelines.residency import (
    AUTOENCODER,
    TEXT,
    TRANSFORMER,
    Residency,
    check_residency,
    describe_plan,
    leave,
)
from sana_jax.pipelines.resolution import Binning, kept_window, resize_and_crop, size_to_sample
from sana_jax.pipelines.sampling_function import initial_latents
from sana_jax.quantization.choice import QuantizationChoice
from sana_jax.text_encoders import TextEncoder
from sana_jax.weights.components import Resident

OutputType = Literal["pil", "np", "latent"]
StepEndCallback = Callable[["SamplingPipeline", int, float, dict[str, Any]], Any]
_KEPT_ENCODINGS = 64  # prompts; 2.8 MB each at 300 tokens of 2304


@dataclasses.dataclass(frozen=True)
class SanaPipelineOutput:
    """What a call has made.

    Attributes:
        images: a list of PIL images, an array (B, H, W, 1 or 3) in [0, 1], or latents (B, C, H, W), as asked for;
            several pictures of one prompt stand side by side.
        compile_seconds: of the transformer's program; 0 where it was compiled before.
        sampling_seconds: of everything after the text.
        device_bytes: what the transformer's program holds on the device; None where that is not known.
        seconds: of each stage: text, encode, denoise (without compiling), decode.
        sampled_size: height and width in pixels that were sampled, before cropping to what was asked for.
        step_cache: what step caching did; None where it was not asked for.
    """

    images: Any
    compile_seconds: float = 0.0
    sampling_seconds: float = 0.0
    device_bytes: int | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sampled_size: tuple[int, int] | None = None
    step_cache: StepCacheReport | None = None


class Size(NamedTuple):
    """Pixels that were asked for and pixels that are sampled."""

    requested: tuple[int, int]
    sampled: tuple[int, int]


class SamplingPipeline(LoraPipeline):
    """A text encoder, a transformer, a sampler and an autoencoder. Subclasses say how they sample.

    Compiled programs are kept on the pipeline, one for each combination of shapes.

    Args:
        transformer: the network.
        params: its parameters: a tree, or a ``Resident`` that reads them when they are needed.
        sampler: a sampler that this pipeline allows.
        text_encoder: reads prompts.
        autoencoder: draws pictures or videos from latents.
        defaults: what calls leave open.
        checkpoint_step: training step of the weights, for display.
        weights: ``"ema"`` or ``"params"``, for display.
        contract: what the weights need of the computation; None for training runs.
        checkpoint_id: a short name for the weights' bytes, for display.
        residency: which networks stay in memory: see ``sana_jax.pipelines.residency``.
    """

    class_name: ClassVar[str]
    made: ClassVar[str] = "pictures"  # what it makes, for messages
    memory_plan: MemoryPlan | None = None  # where ``from_pretrained`` was given ``memory``

    def __init__(
        self,
        transformer: Transformer,
        params: PyTree | Resident,
        sampler: Sampler,
        text_encoder: TextEncoder,
        autoencoder: Autoencoder,
        defaults: SamplingDefaults,
        *,
        checkpoint_step: int | None = None,
        weights: str | None = None,
        contract: Contract | None = None,
        checkpoint_id: str | None = None,
        residency: Residency = "text_encoder_freed",
    ) -> None:
        check_residency(residency)
        self.transformer = transformer
        self.transformer_weights = params if isinstance(params, Resident) else Resident.of(TRANSFORMER, params)
        self.sampler = sampler
        self.text_encoder = text_encoder
        self.autoencoder = autoencoder
        self.defaults = defaults
        self.checkpoint_step = checkpoint_step
        self.weights = weights
        self.contract = contract
        self.checkpoint_id = checkpoint_id
        self.residency = residency
        self.programs = Programs()
        self._encodings: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._encoded_by: Any = None
        self.check_components()

    # -- making and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        variant: str | None = None,
        weights: Literal["auto", "ema", "params"] = "auto",
        checkpoint_step: int | None = None,
        residency: Residency = "text_encoder_freed",
        emulate_fp16_saturation: bool = False,
        quantization: QuantizationChoice = None,
        memory: str | MemoryBudget | None = None,
    ) -> Any:
        """Reads a model directory: a published one (diffusers' layout), a converted one, or a training run.

        Args:
            path: the directory, or ``organisation/name`` on the Hub if there is no such directory.
            dtype: dtype of the transformer's parameters and computation, ``"float32"`` or ``"bfloat16"``; None takes
                the one that the weights are published for, and float32 for training runs. The text encoder and the
                autoencoder have the dtypes of the model's contract.
            variant: of the published weight files: ``"bf16"``, ``"fp16"``; of a training run, of the files of the model
                that it began with, None for the variant that it was given.
            weights: of a training run, the averaged (``"ema"``) or the raw (``"params"``) weights; ``"auto"`` takes the
                averaged ones where there are any.
            checkpoint_step: of a training run, which checkpoint; the newest by default.
            residency: which networks stay in memory: see ``sana_jax.pipelines.residency``.
            emulate_fp16_saturation: clips linear attention as float16 does, for weights that need it.
            quantization: ``"int8"``, ``"fp8"``, ``"int4"`` or ``"nvfp4"`` for the transformer, or a mapping of networks
                (``transformer``, ``text_encoder``, ``autoencoder``) to formats: see ``sana_jax.quantization.choice``.
            memory: of the device, ``"24g"``, ``"16g"``, ``"12g"`` or another number of GB: chooses ``residency``, the
                decoder's tiling and, unless it is given, ``quantization`` so that it is enough for one of the model's
                own size, or for what a ``MemoryBudget`` says, and prints the plan: see
                ``sana_jax.pipelines.memory_plan``. A call that takes more is refused before it samples.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            UserError: a file is damaged, a value is not allowed, or the weights must not be used in this dtype.
            CheckpointError: the weights are missing, damaged, or do not fit.
        """
        model = open_model(
            path,
            cls.class_name,
            dtype=dtype,
            variant=variant,
            weights=weights,
            checkpoint_step=checkpoint_step,
            emulate_fp16_saturation=emulate_fp16_saturation,
            quantization=quantization,
        )
        return cls._from_model(model, residency, memory=memory)

    @classmethod
    def _from_model(
        cls, model: Any, residency: Residency, memory: str | MemoryBudget | None = None, **networks: Any
    ) -> Any:
        """The pipeline of an opened model; ``networks`` are those that a subclass has beside the transformer."""
        plan = None
        if memory is not None:
            model, plan = fit_memory(model, memory, residency)
            residency = plan.residency
        pipeline = cls(
            model.transformer,
            model.transformer_weights,
            model.sampler,
            model.text_encoder,
            model.autoencoder,
            model.defaults,
            checkpoint_step=model.checkpoint_step,
            weights=model.weights,
            contract=model.contract,
            checkpoint_id=model.checkpoint_id,
            residency=residency,
            **networks,
        )
        pipeline.memory_plan = plan
        if model.trained_from is not None and model.trained_from.kind == "lora":
            pipeline.add_trained_lora(model)
        return pipeline

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes a model directory with these weights and nothing of the training that made them.

        Raises:
            UserError: ``path`` has something in it already, or cannot be written; or a LoRA acts that is not merged.
        """
        self.check_no_unmerged_lora()
        path = pathlib.Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already; allowed is a new or empty directory: choose another name")
        try:
            with atomic_directory(path) as temporary:
                save_model(self, temporary)
                if (tokens := getattr(self, "condition_tokens", None)) is not None:
                    save_condition_tokens(temporary, tokens)
        except OSError as error:
            raise UserError(
                f"writing {path} failed ({error.strerror or error}); nothing was left there: name another directory"
            ) from error

    def check_components(self) -> None:
        """Raises ``UserError`` for components that this pipeline cannot use."""
        raise NotImplementedError

    @classmethod
    def argument_names(cls) -> frozenset[str]:
        """What a call of this pipeline can be given."""
        return frozenset(inspect.signature(cls.__call__).parameters) - {"self"}

    @property
    def num_parameters(self) -> int:
        """Parameters of the transformer; its weights are not read for this."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(self.transformer)))

    # -- memory --------------------------------------------------------------------------------------------------

    @property
    def params(self) -> PyTree:
        """The transformer's parameters; read from disk if they are not in memory."""
        return self.transformer_weights.params

    @property
    def networks(self) -> dict[str, Resident | None]:
        """Every network's weights; None where it has none."""
        return {
            TEXT: getattr(self.text_encoder, "weights", None),
            TRANSFORMER: self.transformer_weights,
            AUTOENCODER: getattr(self.autoencoder, "weights", None),
        }

    def describe_plan(self, *, encodes_a_picture: bool = False) -> list[str]:
        """Which weights the next call has in memory at each stage, with sizes; one line each."""
        return describe_plan(self.residency, self.networks, encodes_a_picture=encodes_a_picture)

    @property
    def _sampling_budget(self) -> int | None:
        """Bytes that the sampling program is to keep within; None where no ``memory`` was given."""
        return None if self.memory_plan is None else self.memory_plan.for_sampling

    def _check_budget(self, program: Program, samples: int) -> None:
        """Raises ``UserError`` for a compiled program that ``memory`` is not enough for."""
        if self.memory_plan is not None:
            self.memory_plan.check_program(program.device_bytes, program.working_bytes, samples)

    def _leave(self, name: str) -> None:
        leave(name, self.residency, self.networks)

    # -- prompts -------------------------------------------------------------------------------------------------

    def _encode_texts(self, options: Mapping[str, Any]) -> Callable[[Sequence[str], bool], tuple[Array, Array]]:
        """A function (texts, negative) -> (embeds, mask) that keeps what it has encoded before.

        ``options`` are the text encoder's; those that are None are left to it.
        """
        given = {
            name: int(value) if isinstance(value, np.integer) else value
            for name, value in options.items()
            if value is not None
        }
        encoder = self.text_encoder
        if given:
            fields = {field.name for field in dataclasses.fields(encoder)} if dataclasses.is_dataclass(encoder) else ()
            if unknown := sorted(set(given) - set(fields)):
                unknown = ["max_sequence_length" if name == "max_length" else name for name in unknown]
                raise UserError(
                    f"{', '.join(unknown)} would not be used: the text encoder {type(encoder).__name__} has no such "
                    "setting; leave it out"
                )
            encoder = dataclasses.replace(encoder, **given)

        def encode(texts: Sequence[str], negative: bool) -> tuple[np.ndarray, np.ndarray]:
            if self._encoded_by is not self.text_encoder:
                self._encodings.clear()
                self._encoded_by = self.text_encoder
            own = (negative, tuple(sorted(given.items())))
            keys = [(text, *own) for text in texts]
            new = {key: key[0] for key in keys if key not in self._encodings}
            if new:
                embeds, mask = encoder.encode(list(new.values()), negative=negative)
                embeds, mask = np.asarray(embeds), np.asarray(mask)
                self._encodings.update({key: (embeds[row].copy(), mask[row].copy()) for row, key in enumerate(new)})
            found = [self._encodings[key] for key in keys]
            for key in list(self._encodings)[:-_KEPT_ENCODINGS]:
                del self._encodings[key]
            return np.stack([embeds for embeds, _ in found]), np.stack([mask for _, mask in found])

        return encode

    # -- the loop ------------------------------------------------------------------------------------------------

    def _run(
        self,
        denoiser: Denoiser,
        start: Float[Array, "B *X"],
        *,
        start_index: int = 0,
        callback: StepEndCallback | None = None,
        progress_bar: bool = False,
        whole: Callable[[Array], Array] | None = None,
    ) -> Progress:
        """The progress after the last step; raises ``UserError`` naming the first step that is not finite.

        All steps are one call of the compiled program, unless someone looks at each: then they are as many calls of the
        same program. ``whole`` makes of the latents that are sampled those that a callback sees; None where they are
        the same.
        """
        schedule = denoiser.denoising.schedule
        stop = schedule.num_inference_steps
        progress = denoiser.begin(start)
        if callback is not None and not callable(callback):
            raise UserError(
                f"callback_on_step_end {callback!r} is not allowed; give a function of pipeline, step, timestep and "
                "latents, or None"
            )
        if callback is None and not progress_bar:
            progress = denoiser(progress, start_index, stop)
        else:
            bar = _progress_bar(stop - start_index) if progress_bar else None
            try:
                for index in range(start_index, stop):
                    progress = denoiser(progress, index, index + 1)
                    if bar is not None:
                        jax.block_until_ready(progress.first_bad)
                        bar.update()
                    if callback is None:
                        continue
                    latents = progress.state.latents
                    shown = latents if whole is None else whole(latents)
                    if _call_back(self, callback, index, float(schedule.timesteps[index]), shown) is False:
                        break
            finally:
                if bar is not None:
                    bar.close()
        bad = progress.bad_step()
        if bad is not None:
            raise not_finite(f"sampling step {bad[0] + 1} of {stop}", bad[1], self.made)
        return jax.block_until_ready(progress)


class ImagePipeline(SamplingPipeline):
    """A pipeline that draws pictures; arguments as in ``SamplingPipeline``."""

    # -- sizes, noise, pictures in -------------------------------------------------------------------------------

    def _size(
        self,
        height: int | None,
        width: int | None,
        binning: Binning | None,
        latents: Any = None,
        pictures: Sequence[Any] | None = None,
    ) -> Size:
        """The size asked for (by the arguments, the latents, the pictures, or the defaults), and the one sampled."""
        factor = self.autoencoder.spatial_factor
        if latents is not None:
            if np.ndim(latents) != 4:
                raise UserError(f"latents of shape {np.shape(latents)}; allowed is (B, C, h, w): bring them to 4 axes")
            height = np.shape(latents)[2] * factor if height is None else height
            width = np.shape(latents)[3] * factor if width is None else width
            if binning is None:
                binning = "off"  # latents have the size that is sampled
        sizes = {picture.size[::-1] for picture in pictures or ()}
        if len(sizes) > 1 and (height is None or width is None):
            shown = ", ".join(f"{rows}x{columns}" for rows, columns in sorted(sizes))
            raise UserError(f"images of {shown} pixels; several are allowed if of one size: give height and width")
        fallback = (self.defaults.height, self.defaults.width) if not sizes else next(iter(sizes))
        height = fallback[0] if height is None else height
        width = fallback[1] if width is None else width
        sampled = size_to_sample(height, width, binning, self.transformer.config.sample_size, factor)
        multiple = factor * self.transformer.config.patch_size
        check_multiple("height", sampled[0], multiple)
        check_multiple("width", sampled[1], multiple)
        if sampled != (height, width):
            print(
                f"sampling {sampled[0]}x{sampled[1]} pixels, the trained size nearest in shape to {height}x{width}, to "
                "which the pictures are scaled and cropped (binning off samples the size itself)"
            )
        return Size((height, width), sampled)

    def _noise(self, latents: Any, count: int, size: Size, seed: int) -> Float[Array, "B H W C"]:
        """Unit normal starting noise: the given latents, or drawn from the seed."""
        factor = self.autoencoder.spatial_factor
        height, width = size.sampled
        shape = (self.autoencoder.latent_channels, height // factor, width // factor)
        if latents is None:
            latents = initial_latents(seed, count, shape)
        elif np.shape(latents) != (count, *shape):
            raise UserError(
                f"latents of shape {np.shape(latents)}; {count} pictures of {height}x{width} need {(count, *shape)}, "
                "in the order (B, C, h, w): give latents of that shape"
            )
        return jnp.transpose(as_numbers("latents", latents).astype(jnp.float32), (0, 2, 3, 1))

    @property
    def _shortest_side(self) -> int:
        """Pixels that the shorter side of a picture must have: fewer where the model itself draws smaller ones."""
        return min(SHORTEST_SIDE, self.defaults.height, self.defaults.width)

    def _encode_pictures(self, pictures: Sequence[Any], count: int, size: Size, name: str) -> Float[Array, "B H W C"]:
        """Latents of one picture for all, or of one for each; ``pictures`` are PIL images.

        Each lies so that the cropping of the result gives back its place. diffusers stretches it over all that is
        sampled, and where that is then cropped, the result is up to a few per cent out of place.
        """
        if len(pictures) not in (1, count):
            raise UserError(f"{len(pictures)} of {name} for {count} pictures; allowed is one for all or one each")
        window = kept_window(size.sampled, size.requested)
        ready = [place(to_network_range(picture, *window)[0], size.sampled) for picture in pictures]
        if self.autoencoder.image_channels == 1:
            ready = [(picture @ LUMA)[..., None] for picture in ready]
        latents = jnp.asarray(self.autoencoder.encode(jnp.stack(ready)), jnp.float32)
        check_finite("encoding of the picture", latents)
        self._leave(AUTOENCODER)
        return jnp.broadcast_to(latents, (count, *latents.shape[1:]))

    # -- pictures out --------------------------------------------------------------------------------------------

    def _output(
        self,
        latents: Float[Array, "B H W C"],
        size: Size,
        output_type: OutputType,
        finish: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Any:
        """Latents as asked for; ``finish`` works on the decoded pictures, cropped and not yet clamped."""
        if output_type == "latent":
            return np.asarray(jnp.transpose(latents, (0, 3, 1, 2)))
        decoded = self.autoencoder.decode(latents)
        check_finite("decoding", decoded)
        self._leave(AUTOENCODER)
        decoded = resize_and_crop(np.asarray(decoded, np.float32), *size.requested)
        if finish is not None:
            decoded = finish(decoded)
        pictures = np.clip(decoded / 2 + 0.5, 0.0, 1.0)
        return pictures if output_type == "np" else [to_pil(picture) for picture in pictures]


class Stopwatch:
    """Seconds of named stages, one after another, and of the compiling within them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.compile_seconds = 0.0
        self.device_bytes: int | None = None
        self.step_cache: StepCacheReport | None = None
        self._begin = time.perf_counter()

    def compiled(self, program: Program) -> Callable:
        """Notes a program's compiling, which is not counted in its stage; returns the function to call."""
        self.compile_seconds += program.seconds
        self.device_bytes = program.device_bytes
        self._begin += program.seconds
        return program.run

    def end(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._begin
        self._begin = now

    def output(self, images: Any, size: Size, step_cache: StepCacheReport | None = None) -> SanaPipelineOutput:
        """What the pipeline returns."""
        sampling = sum(seconds for stage, seconds in self.seconds.items() if stage != "text")
        return SanaPipelineOutput(
            images, self.compile_seconds, sampling, self.device_bytes, dict(self.seconds), size.sampled, step_cache
        )


def first_step(steps: int, strength: float) -> int:
    """The step at which a run begins that changes a picture by ``strength``.

    Raises:
        UserError: a strength outside (0, 1], or one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength} is not allowed; choose more than 0 and at most 1 (1 draws anew)")
    start = int(max(steps - min(steps * strength, steps), 0))
    if start >= steps:
        raise UserError(f"strength {strength} of {steps} steps leaves none to take; raise one of them")
    if start == 0 and strength < 1:
        lower = f", or a strength of {math.floor(100 - 100 / steps) / 100:g} or less" if steps > 1 else ""
        print(
            f"strength {strength} of {steps} steps takes all of them, as strength 1 does: they begin from noise, and "
            f"what is drawn anew keeps next to nothing of image; to keep some of it, take more steps{lower}"
        )
    return start


def _call_back(
    pipeline: SamplingPipeline, callback: StepEndCallback, index: int, timestep: float, latents: Array
) -> bool | None:
    public = {"latents": jnp.moveaxis(latents, -1, 1)}
    answer = plain_truth(callback(pipeline, index, timestep, dict(public)))
    if answer is False:
        return False
    unchanged = isinstance(answer, Mapping) and all(answer[name] is public.get(name) for name in answer)
    if answer is not None and answer is not True and not unchanged:
        what = "changed values" if isinstance(answer, Mapping) else f"a value of type {type(answer).__name__}"
        raise UserError(
            f"callback_on_step_end returned {what}, which would not be used; allowed is None, what it was given, or "
            "False to stop"
        )
    return None


def _progress_bar(steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc="sampling", unit="step")
