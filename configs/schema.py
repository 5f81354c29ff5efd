"""What a training run can be told: frozen dataclasses whose every field is an option of ``python -m train.main``.

A nested field ``group.field`` is the option ``--group.field``. Presets (``configs.PRESETS``) are instances of
``RunConfig``; a run directory's ``config.json`` is one, written out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from configs.checks import require
from configs.controlnet import ControlNetConfig
from configs.data import ClipPicturesConfig, ImageDataConfig, MovingDigitsDataConfig, VideoDataConfig
from configs.longsana import ChunkCausalConfig, OdeInitializationConfig, SelfForcingConfig
from configs.longsana_data import PromptsDataConfig, TrajectoriesDataConfig
from configs.lora import LoraConfig
from configs.moving_camera import MovingCameraDataConfig
from configs.optimizer import OptimizerConfig, check_optimizer
from configs.prior import PriorConfig
from configs.sprint import SprintConfig
from configs.tokens import TokensConfig
from configs.world import WorldChunksConfig
from configs.world_data import WorldDataConfig
from kernels.selection import Preference
from sana_jax.errors import UserError
from sana_jax.models.sana import SanaConfig
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.models.sana_wm import SanaWMConfig


@dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed; none of it changes what the network is."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, optimizer, norms, softmax and attention sums are float32 always."""
    remat: Literal["none", "dots", "dots_no_batch", "full", "offload"] = "none"
    """What the backward pass computes again instead of keeping it: from fastest (none) to smallest (full; offload keeps
    even the blocks' inputs in host memory)."""
    scan_blocks: bool = True
    """Compile one block and scan it; False unrolls the blocks, which compiles for longer: for debugging, and for small
    networks on a CPU, where the scan's copies take a third of a step."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""
    emulate_fp16_saturation: bool = False
    """Clip linear attention to ±65504 as float16 does, for base models that were trained in it and need that, such as
    Sana_1600M_1024px_diffusers; what is trained from one needs it in sampling as well."""


@dataclass(frozen=True)
class DigitsDataConfig:
    """The 1,797 handwritten digits that ship inside scikit-learn: 8x8 pixels, gray."""

    caption: str = "a handwritten {digit}"
    """The caption of each picture; {digit} becomes zero, one, ... nine."""
    embedding_dim: int = 32
    """Size of a word's vector; the transformer's caption_channels."""
    max_words: int = 7
    """Words that a prompt may have."""
    digits: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Which digits to train on."""


@dataclass(frozen=True)
class FlowConfig:
    """The flow-matching objective (arXiv 2410.10629, section 3.2)."""

    flow_shift: float | None = 3.0
    """Bends the noise levels towards noise, in training and in sampling; 1 leaves them alone. None takes the base
    model's."""
    density: Literal["uniform", "logit_normal", "stretched_logit_normal", "mode"] = "logit_normal"
    """From which density the noise levels are drawn, before the shift."""
    logit_mean: float = 0.0
    """Mean of the logit-normal densities."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal densities."""
    p_low: float | None = None
    """Lower quantile of the stretched logit-normal density."""
    p_high: float | None = None
    """Upper quantile of the stretched logit-normal density."""
    mode_scale: float | None = None
    """Scale of the mode density; 1.29 in its paper."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the encoding of no text, which classifier-free guidance needs."""
    embedded_guidance: float | None = None
    """The guidance scale that a distilled base model (SANA-Sprint), which has it for an input, is told. None takes the
    one that it is sampled with by default; for other models, which have no such input."""

    @property
    def sampling_shift(self) -> float | None:
        """The shift in sampling."""
        return self.flow_shift


@dataclass(frozen=True)
class VideoFlowConfig(FlowConfig):
    """The flow-matching objective of videos (SANA-Video, arXiv 2509.24695)."""

    flow_shift: float | None = 3.0
    """Bends the noise levels towards noise in training; 1 leaves them alone. None takes the base model's, which is
    that of its sampler."""
    sampling_flow_shift: float | None = None
    """The shift in sampling, in previews and of the run's directory; None takes the base model's, and flow_shift
    without a base model. The published models are trained with 3 and sampled with 8."""
    image_to_video: float = 0.0
    """Share of clips whose first latent frame is given, as the image of image to video: clean, at timestep 0, and not
    counted in the loss."""

    @property
    def sampling_shift(self) -> float | None:
        """The shift in sampling."""
        return self.flow_shift if self.sampling_flow_shift is None else self.sampling_flow_shift


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the parameters: what sampling uses."""

    enabled: bool = True
    """Whether to keep one; it costs one more copy of the parameters."""
    decay: float = 0.9999
    """Share of the average that stays at each step."""
    warmup: bool = True
    """Let the decay start at 0.1 and rise as (1 + step) / (10 + step), so that early weights are forgotten."""
    start: int = 0
    """Step from which there is an average; until then it is the newest weights."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1 for 'the rest'."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are cut into; the batch is cut along with them."""
    tensor: int = 1
    """Parts that the width of each layer is cut into."""
    context: int = 1
    """Parts that a clip's latent frames are cut into; used by SANA-WM."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved, and what is kept."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """How many of the newest stay."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step stay as well."""
    asynchronous: bool = True
    """Write in the background while training goes on."""


@dataclass(frozen=True)
class PreviewConfig:
    """Grids of samples along the way: the same captions and the same noise each time, with the averaged weights."""

    every: int = 1000
    """Steps between previews; step 0 and the last step always have one. 0 for none at all."""
    at: tuple[int, ...] = ()
    """Further steps with a preview."""
    per_caption: int = 2
    """Pictures of each caption."""
    num_inference_steps: int = 20
    """Sampling steps; the run's directory takes them as its default for sampling."""
    guidance_scale: float | None = 4.5
    """Guidance scale; the run's directory takes it as its default for sampling. None takes the base model's."""
    prompts: tuple[str, ...] = ()
    """What to draw; without any, captions of the data."""
    captions: int = 8
    """How many captions of the data are drawn at most, where no prompts are given."""
    sampler: Literal["dpm_solver", "flow_euler", "scm", "longsana", "world_stream"] = "dpm_solver"
    """Sampler; the run's directory takes it as its default for sampling. scm is SANA-Sprint's, longsana that of ODE
    initialisation and self-forcing, world_stream that of the same for SANA-WM."""
    seed: int = 0
    """Seed of the noise."""


@dataclass(frozen=True)
class ValidationConfig:
    """The loss of held-out pictures, at fixed noise levels with the same noise each time, with the averaged weights."""

    every: int = 0
    """Steps between measurements; the last step always has one. 0 for none at all."""
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels, above 0 and below 1."""
    samples: int = 256
    """How many of the held-out pictures are measured at most."""
    seed: int = 0
    """Seed of the noise."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where numbers go. metrics.jsonl is always written."""

    every: int = 10
    """Steps between rows."""
    sigma_bins: int = 4
    """Bins of noise level by which the loss is also reported."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases, if it is installed; never fatal."""
    wandb_project: str = "sana_jax"
    """Project name there."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one per host. Without these, JAX_COORDINATOR_ADDRESS or SLURM's variables are read."""

    coordinator: str | None = None
    """Address host:port of process 0."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which one this is, from 0."""


@dataclass(frozen=True)
class RunConfig:
    """One training run: [PRESET] [--field.sub value ...] starts it, --resume RUN_DIR [...] continues it."""

    preset: str
    """The preset it started from: the first word of the command, not an option."""
    run_dir: str
    """Where everything of the run goes."""
    steps: int
    """Optimizer steps in all."""
    transformer: SanaConfig | SanaVideoConfig | SanaWMConfig | None
    """The network's shape; None where it is the base model's."""
    data: (
        DigitsDataConfig
        | ImageDataConfig
        | VideoDataConfig
        | MovingDigitsDataConfig
        | MovingCameraDataConfig
        | WorldDataConfig
        | TrajectoriesDataConfig
        | PromptsDataConfig
    )
    """What it is trained on."""
    model: str | None = None
    """The model that training starts from: a published, converted or trained model's directory, or its name on the
    Hub."""
    model_variant: str | None = None
    """Variant of its published weight files: bf16, fp16."""
    encoders: str | None = None
    """Where a network of its own is trained from scratch: the model whose text encoder and autoencoder prepare the
    pictures; a directory, or its name on the Hub."""
    lora: LoraConfig | None = None
    """Trains a LoRA beside the base model instead of the model itself."""
    tokens: TokensConfig | None = None
    """Trains encoders of condition tokens beside the LoRA."""
    controlnet: ControlNetConfig | None = None
    """Trains a ControlNet beside the base model instead of the model itself."""
    sprint: SprintConfig | None = None
    """Distils the base model to a few steps."""
    prior: PriorConfig | None = None
    """Prior preservation, for pictures of one subject."""
    chunk_causal: ChunkCausalConfig | WorldChunksConfig | None = None
    """Trains a video model on, or a world model, with causal blocks of frames, each at a noise level of its own."""
    ode: OdeInitializationConfig | None = None
    """Trains a video model with causal blocks to end its teacher's trajectories in a few steps (LongSANA, stage 1)."""
    self_forcing: SelfForcingConfig | None = None
    """Trains such a model on the videos that it makes itself (LongSANA, stages 2 and 3)."""
    batch_size: int = 64
    """Samples per optimizer step, over all devices."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    """Seed of initialisation, data order, noise and dropout."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What to run on; auto takes the fastest that JAX sees."""
    nonfinite: Literal["error", "skip"] = "error"
    """When a loss or gradient is not finite: stop, or leave that step out and go on (at most max_nonfinite times)."""
    max_nonfinite: int = 20
    """How many steps may be left out."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    flow: FlowConfig | VideoFlowConfig = field(default_factory=FlowConfig)
    """The objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        require("steps", self.steps, self.steps >= 1, "1 or more")
        require("batch-size", self.batch_size, self.batch_size >= 1, "1 or more")
        require("accumulation", self.accumulation, self.accumulation >= 1, "1 or more")
        prepares = self.encoders is None or (self.model is None and isinstance(self.data, ImageDataConfig))
        allowed = "None with --model, whose own are used, and where the data is no pictures"
        require("encoders", self.encoders, prepares, allowed)
        require("seed", self.seed, 0 <= self.seed < 2**32, "0 to 4294967295")
        require("checkpoint.every", self.checkpoint.every, self.checkpoint.every >= 1, "1 or more")
        require("checkpoint.keep-last", self.checkpoint.keep_last, self.checkpoint.keep_last >= 1, "1 or more")
        kept = self.checkpoint.keep_every
        require("checkpoint.keep-every", kept, kept is None or kept >= 1, "1 or more, or None")
        require("logging.every", self.logging.every, self.logging.every >= 1, "1 or more")
        require("logging.sigma-bins", self.logging.sigma_bins, self.logging.sigma_bins >= 1, "1 or more")
        require("preview.every", self.preview.every, self.preview.every >= 0, "0 (none) or more")
        require("preview.per-caption", self.preview.per_caption, self.preview.per_caption >= 1, "1 or more")
        dropout = self.flow.caption_dropout
        require("flow.caption-dropout", dropout, 0 <= dropout < 1, "0 up to, not including, 1")
        shift, scale = self.flow.flow_shift, self.preview.guidance_scale
        require("flow.flow-shift", shift, shift is None or shift > 0, "above 0")
        averages = self.optimizer.name != "schedule_free_adamw" or self.ema.enabled
        require("ema.enabled", self.ema.enabled, averages, "True with schedule_free_adamw, whose average it keeps")
        require("ema.decay", self.ema.decay, 0 <= self.ema.decay < 1, "0 up to, not including, 1")
        own = self.optimizer.name != "schedule_free_adamw" or not self.ema.start
        require("ema.start", self.ema.start, self.ema.start >= 0, "0 or more")
        require("ema.start", self.ema.start, own, "0 with schedule_free_adamw, whose average it keeps")
        steps = self.preview.num_inference_steps
        require("preview.num-inference-steps", steps, steps >= 1, "1 or more")
        require("preview.guidance-scale", scale, scale is None or scale >= 0, "0 or more")
        require("preview.captions", self.preview.captions, self.preview.captions >= 1, "1 or more")
        require("max-nonfinite", self.max_nonfinite, self.max_nonfinite >= 0, "0 or more")
        check_optimizer(self.optimizer)
        self._check_context()
        require("tokens", "without --lora", self.tokens is None or self.lora is not None, "tokens beside a LoRA")
        self._check_few_steps()
        v = self.validation
        few = self.sprint or self.few_steps
        allowed = "0 where the loss is not flow matching's: for Sprint, ODE initialisation and self-forcing"
        require("validation.every", v.every, not few or not v.every, allowed)
        require("validation.every", v.every, v.every >= 0, "0 (none) or more")
        require("validation.samples", v.samples, v.samples >= 1, "1 or more")
        levels = bool(v.sigmas) and all(0 < sigma < 1 for sigma in v.sigmas)
        require("validation.sigmas", " ".join(map(str, v.sigmas)), levels, "one or more above 0 and below 1")
        at = " ".join(map(str, self.preview.at))
        require("preview.at", at, self.preview.every > 0 or not at, "none where --preview.every is 0")
        in_memory = isinstance(self.data, DigitsDataConfig | MovingDigitsDataConfig | MovingCameraDataConfig)
        if in_memory and self.transformer is not None:
            width, wanted = self.data.embedding_dim, self.transformer.caption_channels
            require("data.embedding-dim", width, width == wanted, f"--transformer.caption-channels, which is {wanted}")
        if isinstance(self.flow, VideoFlowConfig):
            share, shift = self.flow.image_to_video, self.flow.sampling_flow_shift
            require("flow.image-to-video", share, 0 <= share <= 1, "0 to 1")
            require("flow.sampling-flow-shift", shift, shift is None or shift > 0, "above 0")
        self._check_unread()
        self._check_kind()
        self._check_longsana()

    def _check_unread(self) -> None:
        """What a run of this kind would not read is left alone."""
        variant, named = self.model_variant, self.model is not None or self.encoders is not None
        require("model-variant", variant, variant is None or named, "None without --model or --encoders")
        emulates = self.compute.emulate_fp16_saturation
        allowed = "False without --model, whose weights may need it"
        require("compute.emulate-fp16-saturation", emulates, not emulates or self.model is not None, allowed)
        told, network = self.flow.embedded_guidance, self.transformer
        if network is not None and self.sprint is None:
            distilled = getattr(network, "guidance_embeds", False)
            allowed = "a scale of 0 or more for a network that has it for an input" if distilled else _NO_INPUT
            good = told is None if not distilled else told is not None and 0 <= told < math.inf
            require("flow.embedded-guidance", told, good, allowed)
        if self.sprint is None:
            return
        unread = FlowConfig(flow_shift=None)
        for entry in dataclasses.fields(self.flow):
            value, alone = getattr(self.flow, entry.name), getattr(unread, entry.name)
            allowed = f"{alone} for Sprint, which reads none of --flow but has levels of its own (--sprint)"
            require(f"flow.{entry.name}", value, value == alone, allowed)

    @property
    def trains_a_world(self) -> bool:
        """Whether the network is told of a camera."""
        of_a_world = self.few_steps is not None and self.few_steps.is_world
        return of_a_world or isinstance(self.transformer, SanaWMConfig) or isinstance(self.data, _WORLD_DATA)

    @property
    def trains_on_clips(self) -> bool:
        """Whether the data is for a video model: clips, pictures as clips of one frame, trajectories, or prompts."""
        in_memory = MovingDigitsDataConfig | _WORLD_DATA
        return isinstance(self.data, VideoDataConfig | ClipPicturesConfig | in_memory | _FOR_LONGSANA)

    @property
    def few_steps(self) -> OdeInitializationConfig | SelfForcingConfig | None:
        """What says how the model of ODE initialisation or self-forcing is sampled; None for other runs."""
        return self.ode or self.self_forcing

    def _check_context(self) -> None:
        """World models alone cut a sample, over its frames; a network that is not known yet may be one."""
        either = self.transformer is None and isinstance(self.data, _FOR_LONGSANA)
        context, world = self.mesh.context, self.trains_a_world or either
        require("mesh.context", context, context == 1 or world, "1: of all networks SANA-WM's alone cuts its frames")

    def _check_few_steps(self) -> None:
        """Previews of distilled models are drawn with their own sampler, LongSANA's in its own steps, unguided."""
        distilled = self.sprint or getattr(self.transformer, "guidance_embeds", False)
        wanted = "scm" if distilled else None
        if self.few_steps is not None:
            wanted = "world_stream" if self.few_steps.is_world else "longsana"
        sampler = self.preview.sampler
        fits = sampler == wanted if wanted else sampler not in ("scm", "longsana", "world_stream")
        names = {
            "scm": "scm for SANA-Sprint",
            "longsana": "longsana for ODE initialisation and self-forcing",
            "world_stream": "world_stream for ODE initialisation and self-forcing of SANA-WM",
        }
        require("preview.sampler", sampler, fits, names.get(wanted, "dpm_solver or flow_euler"))
        if self.few_steps is not None:
            steps, scale, count = (
                self.preview.num_inference_steps,
                self.preview.guidance_scale,
                len(self.few_steps.timesteps),
            )
            require("preview.num-inference-steps", steps, steps == count, f"{count}, as the timesteps are")
            require("preview.guidance-scale", scale, scale == 1, "1: the model learns guided predictions")
            unread = "left alone: this training reads none of --flow, but its own settings"
            require("flow", "with changes", self.flow == VideoFlowConfig(), unread)

    def _check_longsana(self) -> None:
        """One way of training at a time, and the data that it reads."""
        ways = ("lora", "chunk_causal", "ode", "self_forcing")
        chosen = [name.replace("_", "-") for name in ways if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise UserError(f"--{chosen[0]} and --{chosen[1]} are two ways of training; choose one of them")
        if chosen and chosen[0] != "lora" and not self.trains_on_clips:
            raise UserError(f"--{chosen[0]} is for video models, and the preset {self.preset} trains on pictures")
        data, allowed = self.data, "ODE initialisation (--ode), and nothing else trains on them"
        require("data", "trajectories", isinstance(data, TrajectoriesDataConfig) == (self.ode is not None), allowed)
        prompts = isinstance(data, PromptsDataConfig) and self.self_forcing is None
        require("data", "prompts without videos", not prompts, "self-forcing (--self-forcing)")
        rows, size = getattr(data, "joint_batch_size", None), self.batch_size
        allowed = f"a multiple of --batch-size {size}, as {4 * size}"
        require("data.joint-batch-size", rows, rows is None or rows % size == 0, allowed)
        if isinstance(self.chunk_causal, ChunkCausalConfig):
            share, instead = self.flow.image_to_video, "0 with --chunk-causal; set --chunk-causal.image-to-video"
            require("flow.image-to-video", share, share == 0, instead)
        if self.few_steps is not None:
            self._check_few_step_network()
        if self.self_forcing is None:
            return
        stream = self.self_forcing.stream
        parts, one = self.accumulation, "1 with --self-forcing.stream, whose windows follow one another"
        require("accumulation", parts, stream is None or parts == 1, one)
        negative = getattr(data, "negative_prompt", "")
        allowed = "none with --self-forcing.guidance 0, which has no unconditional branch"
        require("data.negative-prompt", repr(negative), not negative or self.self_forcing.guidance > 0, allowed)

    def _check_few_step_network(self) -> None:
        """LongSANA's settings are for video models, and SANA-WM's for world models, which need a camera."""
        world = self.few_steps.is_world
        found = {
            "--model": None if self.transformer is None else isinstance(self.transformer, SanaWMConfig),
            "--data": None if isinstance(self.data, _FOR_LONGSANA) else isinstance(self.data, _WORLD_DATA),
        }
        for option, is_world in found.items():
            if is_world not in (None, world):
                kinds = ("SANA-WM, which is told of a camera", "SANA-Video, which is not")
                distilled, other = kinds if world else kinds[::-1]
                use = "longsana_ode, longsana_self_forcing" if world else "sana_wm_ode, sana_wm_self_forcing"
                raise UserError(
                    f"the preset {self.preset} distils {distilled}, and {option} is for {other}; name another, or "
                    f"choose a preset of that kind: {use}"
                )
        camera = not (world and isinstance(self.data, PromptsDataConfig))
        require("data", "prompts without videos", camera, "clips with the camera's path, for SANA-WM")

    def _check_kind(self) -> None:
        """Clips are for video models, clips with a camera for world models, and pictures for the others."""
        clips, network = self.trains_on_clips, self.transformer
        self._check_world()
        wanted = SanaVideoConfig | SanaWMConfig if clips else SanaConfig
        if network is not None and not isinstance(network, wanted):
            kinds = ("clips", "a model of pictures") if clips else ("pictures", "a video model")
            which = "its network" if self.model is None else f"--model {self.model}"
            use = "finetune, lora" if clips else "finetune_video, lora_video"
            raise UserError(
                f"the preset {self.preset} trains on {kinds[0]}, and {which} is {kinds[1]}; choose a model for "
                f"{kinds[0]}, or a preset that trains on {'pictures' if clips else 'clips'}: {use}"
            )
        if isinstance(self.flow, VideoFlowConfig) and not clips:
            raise UserError(f"the preset {self.preset} trains on pictures with the objective of videos; use FlowConfig")
        names = ("tokens", "controlnet", "sprint", "prior")
        unused = [name for name in names if clips and getattr(self, name) is not None]
        if unused:
            raise UserError(f"--{unused[0]} is for models of pictures, and this run trains on clips; leave it out")

    def _check_world(self) -> None:
        """World models are trained on clips with a camera, and sampled by Euler's method."""
        of_either = isinstance(self.data, _FOR_LONGSANA)  # clips that a model has made
        if self.transformer is not None and not of_either:
            network, data = isinstance(self.transformer, SanaWMConfig), isinstance(self.data, _WORLD_DATA)
            which = "its network" if self.model is None else f"--model {self.model}"
            if network and not data:
                raise UserError(
                    f"the preset {self.preset} trains on data without a camera, and {which} is a world model "
                    "(SANA-WM); choose a preset whose clips have the camera's path: finetune_world, lora_world"
                )
            if data and not network:
                raise UserError(
                    f"the preset {self.preset} trains on clips with a camera, and {which} is no world model; choose a "
                    "SANA-WM, or a preset of its own kind: finetune_video, lora_video, finetune, lora"
                )
        if not self.trains_a_world:
            of_a_world = isinstance(self.chunk_causal, WorldChunksConfig)
            require("chunk-causal", "of a world model", not of_a_world or self.transformer is None, "for SANA-WM alone")
            return
        sampler = self.preview.sampler
        require("preview.sampler", sampler, bool(self.few_steps) or sampler == "flow_euler", "flow_euler for SANA-WM")
        longsana = isinstance(self.chunk_causal, ChunkCausalConfig)
        require("chunk-causal", "of a video model", not longsana, "that of world models: sana_wm_2b_chunk_causal")


_WORLD_DATA = MovingCameraDataConfig | WorldDataConfig
_FOR_LONGSANA = TrajectoriesDataConfig | PromptsDataConfig


_NO_INPUT = "None for a network that has no such input, as all but SANA-Sprint's"
