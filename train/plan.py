"""What a run would take, before it runs: ``python -m train.main PRESET --plan [--field.sub value ...]``.

Neither data nor weights are read. The configured step is compiled for devices as they are here, as the run would do
it, or with ``--plan=h100x8`` for GPUs that are not here; what other settings would make of it is estimated from shapes
and traces, and set right by what was compiled.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from configs.data import MovingDigitsDataConfig, VideoDataConfig
from configs.longsana_data import PromptsDataConfig, TrajectoriesDataConfig
from configs.lora import LoraConfig
from configs.moving_camera import MovingCameraDataConfig
from configs.optimizer import READS, OptimizerConfig
from configs.published import (
    PUBLISHED_TRANSFORMERS,
    PUBLISHED_VIDEO_TRANSFORMERS,
    PUBLISHED_WORLD_TRANSFORMERS,
    PublishedVideoTransformer,
)
from configs.schema import DigitsDataConfig, RunConfig
from configs.world import WorldChunksConfig
from configs.world_data import WorldDataConfig
from kernels import triton_programs
from kernels.selection import preferring
from kernels.typing import PyTree
from sana_jax.autoencoders.base import latent_frames
from sana_jax.compilation import compile_ahead, enable_compilation_cache, readable_bytes
from sana_jax.contract import Contract, contract_of
from sana_jax.devices import choose_device, prefer_device, using_kernels
from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.gpu_compiler import ForGpu, Target, is_target, parse_target
from sana_jax.models.context_parallel import CONTEXT_AXIS
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.models.sana_wm import SanaWMConfig
from sana_jax.nn.remat import REMAT_POLICIES
from sana_jax.pipelines.families import FAMILIES, IMAGE_TRANSFORMER, TransformerConfig
from sana_jax.pipelines.model_directory import pipeline_of, read_model_directory
from sana_jax.pipelines.opening import find_model
from train.assembly import RunParts, made_clips
from train.base_model import abstract_transformer, refuse_distilled, settle
from train.batch import CAMERA, PLUCKER, Batch
from train.data.buckets import size_table
from train.data.digits import DigitsData
from train.data.trajectories import TrajectoriesData
from train.data.video.moving_camera import MovingCameraData
from train.data.video.moving_digits import MovingDigitsData
from train.data.video.sizes import clip_sizes
from train.memory import Choice, Memory, compiled_bytes, fixed_memory, traced_activations
from train.objectives.flow_matching import FlowMatching
from train.objectives.longsana.ode import TRAJECTORY
from train.optimizers import stop_frozen
from train.phases import schedules_of
from train.recipes import Recipe, make_recipe
from train.sharding import AXES, BATCH_AXES, batch_sharding, check_batch, make_mesh, replicated
from train.state import parameter_count
from train.state_plan import StatePlan, plan_state
from train.trained_table import trained_count, trained_table

# Of the published models: pixels per latent, tokens of a prompt, and the dtype that a cache keeps prompts in.
_FACTOR, _PROMPT_TOKENS, _PROMPT_DTYPE = 32, 300, "bfloat16"
# In the environment of a process that has the devices that it was started for.
_SIMULATED = "SANA_JAX_PLAN_IS_SIMULATED"
_PRICES = {
    "none": "fastest",
    "dots": "computes what is no matrix product twice",
    "dots_no_batch": "computes attention and what is no matrix product twice",
    "full": "computes the forward pass twice, about 1/3 slower",
    "offload": "as full, and moves blocks' inputs to host memory and back",
}


class ModelShapes(NamedTuple):
    """What is to be known of a model before its weights and data are."""

    network: TransformerConfig | None
    """The base model's; None where training starts from nothing."""
    factor: int
    """Pixels per latent, along each axis."""
    tokens: int
    """Of an encoded prompt, padding included."""
    prompt_dtype: str
    temporal_factor: int | None = None
    """Frames per latent frame; None for models of pictures."""
    contract: Contract | None = None
    """What the base model's weights need of the computation; None where that is not known."""


class PlannedRun(NamedTuple):
    """A run as shapes with their places on a mesh."""

    config: RunConfig
    """Settled."""
    model: ModelShapes
    recipe: Recipe
    mesh: Mesh | AbstractMesh
    frozen: PyTree | None
    """What of the base model stays in memory."""
    state: StatePlan
    batch: Batch

    @property
    def null_encoding(self) -> tuple[jax.Array, jax.Array]:
        """Stands for the encoding of no text."""
        _, tokens, channels = self.batch.prompt_embeds.shape
        return jnp.zeros((1, tokens, channels), self.batch.prompt_embeds.dtype), jnp.ones((1, tokens), jnp.int32)

    @property
    def rows(self) -> int:
        """Samples that a device computes at once."""
        return self.config.batch_size // self.config.accumulation // _batch_parts(self.mesh)

    def jitted_steps(self) -> list[Callable]:
        """The kinds of step as the run compiles them; arguments: state, frozen, batch."""
        shardings = (jax.tree.map(lambda leaf: leaf.sharding, self.state.abstract), replicated(self.mesh))
        functions = self.recipe.step_functions(self.config, self.state.optimizer, self.null_encoding)
        distinct = dict.fromkeys(functions)
        return [jax.jit(function, donate_argnums=0, out_shardings=shardings) for function in distinct]


def _platform(mesh: Mesh | AbstractMesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def _batch_parts(mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


# -- shapes --------------------------------------------------------------------------------------------------------


def settled(config: RunConfig) -> tuple[RunConfig, ModelShapes]:
    """The configuration with what it leaves to its model, of which ``config.json`` files are read, or nothing at all
    where it is a published one.

    Raises:
        UserError, FileNotFoundError: there is no such model, or none is named where one is needed.
    """
    model = _model_shapes(config)
    if config.model is None:
        return settle(config, None), model
    # Neither sampler nor sampling defaults change the step.
    parts = types.SimpleNamespace(
        transformer_config=model.network,
        sampler=None,
        defaults=types.SimpleNamespace(guidance_scale=4.5),
        contract=model.contract,
    )
    return settle(config, types.SimpleNamespace(parts=parts)), model


def _model_shapes(config: RunConfig) -> ModelShapes:
    name = config.model or config.encoders
    if (digits := _digits(config)) is not None and name is None:
        temporal = getattr(digits.autoencoder, "temporal_factor", None)
        return ModelShapes(None, 1, digits.text_encoder.max_length, "float32", temporal)
    if name is None:
        causal = None if isinstance(config.chunk_causal, WorldChunksConfig) else config.chunk_causal
        beside = (config.lora, config.controlnet, config.sprint, causal, config.few_steps)
        if config.transformer is None or any(way is not None for way in beside):
            example = "SANA-Video_2B_480p_diffusers" if config.trains_on_clips else "Sana_1600M_1024px_BF16_diffusers"
            example = "SANA-WM_bidirectional" if config.trains_a_world else example
            raise UserError(
                f"the preset {config.preset} starts from a model, whose shape the plan needs; name its directory with "
                "--model, or a published one, which is not downloaded for that: --model "
                f"Efficient-Large-Model/{example}"
            )
        return _published(None, config.transformer)
    known = {**PUBLISHED_TRANSFORMERS, **PUBLISHED_VIDEO_TRANSFORMERS, **PUBLISHED_WORLD_TRANSFORMERS}
    published = known.get(name.rpartition("/")[2])
    if published is not None and not Path(name).exists():
        contract = contract_of(published.config, names=[name], stored={})
        return _published(published.config, published.config)._replace(contract=contract)
    directory = find_model(name, config.model_variant)
    pipeline = pipeline_of(directory)
    if config.model is not None:
        refuse_distilled(config, pipeline)
    try:
        parts = read_model_directory(directory, pipeline, variant=config.model_variant)
    except FileNotFoundError:  # without weights or tokenizer the network's shape is enough
        path = directory / "transformer" / "config.json"
        if not path.is_file():
            raise
        values = read_json(path)
        family = FAMILIES.get(values.get("_class_name"), FAMILIES[IMAGE_TRANSFORMER])
        network = family.config.from_dict(values)
        return _published(network, network)
    encoder = parts.text_encoder
    dtype = jnp.dtype(getattr(encoder, "dtype", jnp.float32)).name
    temporal = getattr(parts.autoencoder, "temporal_factor", None)
    factor, tokens = parts.autoencoder.spatial_factor, encoder.max_length
    return ModelShapes(parts.transformer_config, factor, tokens, dtype, temporal, parts.contract)


def _digits(config: RunConfig) -> DigitsData | MovingDigitsData | MovingCameraData | None:
    """The data that a run makes in memory, which is its own autoencoder; None for other data."""
    if isinstance(config.data, DigitsDataConfig):
        return DigitsData(config.data)
    made = isinstance(config.data, MovingDigitsDataConfig | MovingCameraDataConfig)
    return made_clips(config.data) if made else None


def _published(base: TransformerConfig | None, network: TransformerConfig) -> ModelShapes:
    """A network with the autoencoder and the text encoder of the published models of its kind."""
    found = ModelShapes(base, _FACTOR, _PROMPT_TOKENS, _PROMPT_DTYPE)
    if isinstance(network, SanaWMConfig):
        return found._replace(temporal_factor=max(1, network.chunk_plucker_channels // 6))
    kinds = {video.config.in_channels: video for video in PUBLISHED_VIDEO_TRANSFORMERS.values()}
    if isinstance(network, SanaVideoConfig):
        kind: PublishedVideoTransformer = kinds.get(network.in_channels) or next(iter(kinds.values()))
        return found._replace(factor=kind.spatial_factor, temporal_factor=kind.temporal_factor)
    return found


def planned_run(config: RunConfig, model: ModelShapes, mesh: Mesh | AbstractMesh) -> PlannedRun:
    """Lays out a settled configuration over a mesh.

    Raises:
        UserError: settings that do not fit one another.
    """
    check_batch(config.batch_size, config.accumulation, mesh)
    recipe = make_recipe(config)  # of a stream of windows without what a video leaves for the next: see ``report``
    base = None
    if config.model is not None:
        base = abstract_transformer(model.network, mesh, config.compute.dtype)
    state = plan_state(config, recipe, base, mesh)
    frozen = recipe.frozen(base, mesh)
    return PlannedRun(config, model, recipe, mesh, frozen, state, _abstract_batch(config, model, recipe, mesh))


def _abstract_batch(config: RunConfig, model: ModelShapes, recipe: Recipe, mesh: Mesh | AbstractMesh) -> Batch:
    """A batch of the largest size that the run has."""
    rows, network, sharding = config.batch_size, config.transformer, batch_sharding(mesh)
    if (digits := _digits(config)) is not None:
        sizes = digits.preview_shape[:-1]
    else:
        sizes = _largest_latents(config, model)

    def array(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=sharding)

    latents = (*sizes, network.in_channels)
    names = [*recipe.conditions, *(["loss_weight"] if config.prior is not None and config.prior.caption else [])]
    names += [] if config.ode is None else [TRAJECTORY]
    return Batch(
        array(latents),
        array((model.tokens, network.caption_channels), model.prompt_dtype),
        array((model.tokens,), "int32"),
        {name: array(_condition_shape(name, config, latents)) for name in names},
    )


def _largest_latents(config: RunConfig, model: ModelShapes) -> tuple[int, ...]:
    """([T,] H, W) of the largest pictures or clips of a run."""
    data, network, frames = config.data, config.transformer, ()
    if isinstance(data, TrajectoriesDataConfig):
        if data.path is not None:
            return max(TrajectoriesData(data.path).buckets, key=math.prod)[:-1]
        # trajectories that are still to be made: of the published clips
        data = WorldDataConfig(clip_frames=337) if isinstance(network, SanaWMConfig) else VideoDataConfig()
    if isinstance(data, PromptsDataConfig):
        frames = latent_frames(data.clip_frames, model.temporal_factor)
        return frames, *(length // model.factor for length in data.clip_size)
    if config.trains_on_clips:
        table = clip_sizes(data, getattr(network, "sample_size", 1), model.factor, network.patch_size[-1])
        frames = (latent_frames(data.clip_frames, model.temporal_factor),)
    else:
        table = size_table(network.sample_size, model.factor, data.resolution, aspect_buckets=data.aspect_buckets)
    largest = max(table, key=lambda size: (size.height * size.width, -abs(size.height - size.width)))
    return *frames, largest.height // model.factor, largest.width // model.factor


def _condition_shape(name: str, config: RunConfig, latents: tuple[int, ...]) -> tuple[int, ...]:
    """Of one sample's further input: a control picture is encoded as the picture is, all else is small."""
    if config.controlnet is not None and name == config.controlnet.condition:
        return latents
    if name == CAMERA:
        return (latents[0], 20)
    if name == PLUCKER:
        return (*latents[:-1], config.transformer.chunk_plucker_channels)
    if name == TRAJECTORY:
        return (len(config.ode.timesteps), *latents)
    tokens = getattr(config, "tokens", None)
    encoder = tokens.encoders.get(name) if tokens is not None else None
    return (encoder.width,) if encoder is not None and encoder.kind == "vector" else ()


# -- figures -------------------------------------------------------------------------------------------------------


def measured_memory(run: PlannedRun, say: Callable[[str], None], target: Target | None = None) -> Memory | None:
    """Compiles the step; of several kinds of step, the one that needs most. None where the backend does not say.

    ``target`` are the GPUs of the run's mesh where these are not here.
    """
    jitted = run.jitted_steps()
    if target is not None:
        jitted = [ForGpu(step, target.gpu) for step in jitted]
    shape = "x".join(map(str, run.batch.latents.shape))
    fixed, needed = _fixed(run), []
    for number, step in enumerate(jitted):
        which = "the train step" if len(jitted) == 1 else f"train step {number + 1} of {len(jitted)}"
        compiled = compile_ahead(
            f"{which} for latents {shape}", step, run.state.abstract, run.frozen, run.batch, say=say
        )
        needed.append(compiled_bytes(compiled))
    return None if None in needed else fixed._replace(activations=max(needed) - fixed.total)


def _fixed(run: PlannedRun) -> Memory:
    copies = 1 if run.config.accumulation == 1 else 2  # the sum, and what is added to it
    return fixed_memory(run.state.abstract, run.frozen, run.batch, copies)


def estimated_memory(run: PlannedRun, platform: str | None = None) -> Memory | None:
    """The same without compiling; None for a recipe whose loss is not flow matching's.

    ``platform`` is that of the devices, where an outline of a mesh does not say it.
    """
    fixed = _fixed(run)
    if not hasattr(run.recipe, "velocity"):
        return None
    layers = run.config.transformer.num_layers
    all_kept = dataclasses.replace(run.config, compute=dataclasses.replace(run.config.compute, remat="none"))
    arguments = _one_devices_share(run)
    losses = [_loss(run, recipe) for recipe in (run.recipe, make_recipe(all_kept))]
    found = traced_activations(*losses, arguments, layers, run.config.compute.remat, platform or _platform(run.mesh))
    gathered = 0
    if run.mesh.shape["fsdp"] > 1:  # a layer's weights, and the one that is fetched meanwhile
        weights = run.frozen if run.frozen is not None else run.state.abstract.params
        gathered = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)) // layers
    # Frames are cut inside the loss, which counts what is kept on all devices of that axis together.
    parts = run.mesh.shape["tensor"] * run.mesh.shape[CONTEXT_AXIS]
    return fixed._replace(activations=(found.saved + found.working) // parts + gathered)


def _one_devices_share(run: PlannedRun) -> tuple[PyTree, PyTree, Batch, PyTree]:
    """Whole parameters, and the samples that a device computes at once with what is random about them, as shapes."""
    trees = run.state.abstract.params, run.frozen
    params, frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trees)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((run.rows, *leaf.shape[1:]), leaf.dtype), run.batch)
    objective = FlowMatching(run.recipe, run.config.flow, *run.null_encoding)
    draws = jax.eval_shape(lambda batch: objective.draw(run.config.seed, 0, batch), batch)
    return params, frozen, batch, draws


def _loss(run: PlannedRun, recipe: Recipe) -> Callable[..., jax.Array]:
    """The mean loss, as a function of ``_one_devices_share``."""
    optimizer = run.config.optimizer
    objective = FlowMatching(recipe, run.config.flow, *run.null_encoding)

    def loss(params: PyTree, *others: PyTree) -> jax.Array:
        return objective.losses(stop_frozen(params, optimizer.frozen, optimizer.trained), *others).loss.mean()

    return loss


# -- choices -------------------------------------------------------------------------------------------------------


def choices(run: PlannedRun, measured: Memory | None, only: Container[str] | None = None) -> list[Choice]:
    """What other settings would need, set right by what the configured one was measured to need.

    Args:
        run: as it is configured.
        measured: what that needs.
        only: the options to look at; None for all.
    """
    as_it_is = estimated_memory(run)
    correction = 0 if measured is None or as_it_is is None else measured.activations - as_it_is.activations
    found = []
    for option, price, config, mesh in _alternatives(run):
        if only is not None and option not in only:
            continue
        try:
            other = planned_run(config, run.model, mesh)
        except UserError:  # settings that do not go together, such as patterns of paths that a LoRA has not
            continue
        same = [getattr(config, field) == getattr(run.config, field) for field in ("compute", "accumulation", "lora")]
        if all(same) and mesh == run.mesh:  # what is kept for the backward pass does not change
            known = measured or as_it_is
            memory = _fixed(other)._replace(activations=0 if known is None else known.activations)
        elif as_it_is is None:
            continue  # nothing is known of its activations
        else:
            memory = estimated_memory(other, _platform(run.mesh))
            if mesh == run.mesh and other.rows == run.rows:
                corrected = memory.activations + correction
            else:  # with a share of the samples goes as large a share of what the estimate is off by
                corrected = memory.activations * (1 + correction / max(1, as_it_is.activations))
            memory = memory._replace(activations=max(0, round(corrected)))
        found.append(Choice(option, memory.total, price))
    return found


def needed_and_choices(
    parts: RunParts, mesh: Mesh, compiled: Iterable[jax.stages.Compiled]
) -> tuple[int | None, list[Choice]]:
    """What a run's compiled steps need on each device, None where there are none yet, and what would need less."""
    dtype = jnp.dtype(getattr(parts.text_encoder, "dtype", jnp.float32)).name
    network = None if parts.base is None else parts.base.parts.transformer_config
    factor, temporal = parts.autoencoder.spatial_factor, getattr(parts.autoencoder, "temporal_factor", None)
    model = ModelShapes(network, factor, parts.text_encoder.max_length, dtype, temporal)
    run, needed = planned_run(parts.config, model, mesh), [compiled_bytes(step) for step in compiled]
    if not needed or None in needed:
        return None, choices(run, None)
    fixed = _fixed(run)
    return max(needed), choices(run, fixed._replace(activations=max(needed) - fixed.total))


def _alternatives(run: PlannedRun) -> Iterator[tuple[str, str, RunConfig, Mesh | AbstractMesh]]:
    """(option, what it costs, configuration, mesh) of single changes."""
    config, mesh, change = run.config, run.mesh, dataclasses.replace
    for remat in REMAT_POLICIES:
        if remat != config.compute.remat:
            compute = change(config.compute, remat=remat)
            yield f"--compute.remat {remat}", _PRICES[remat], change(config, compute=compute), mesh
    # a CPU computes bfloat16 in float32, with which the estimate would not be right
    if config.compute.dtype == "float32" and _platform(mesh) != "cpu":
        compute = change(config.compute, dtype="bfloat16")
        yield "--compute.dtype bfloat16", "less exact, much faster on a GPU", change(config, compute=compute), mesh
    parts = 2 * config.accumulation
    windows = config.self_forcing is not None and config.self_forcing.stream is not None  # one part alone is allowed
    if not windows and config.batch_size % (parts * _batch_parts(mesh)) == 0:
        price = "the batch in smaller parts, one after the other"
        yield f"--accumulation {parts}", price, change(config, accumulation=parts), mesh
    for name in ("adamw_8bit", "came_8bit"):
        if name != config.optimizer.name:
            optimizer = _with_optimizer(config.optimizer, name)
            yield f"--optimizer.name {name}", "another optimizer", change(config, optimizer=optimizer), mesh
    if config.ema.enabled and config.optimizer.name != "schedule_free_adamw":
        ema = change(config.ema, enabled=False)
        yield "--ema.no-enabled", "samples are drawn with the last weights", change(config, ema=ema), mesh
    if run.recipe.kind == "whole" and config.model is not None and config.few_steps is None:
        ema = change(config.ema, enabled=False)
        lora = change(config, lora=LoraConfig(), ema=ema)
        preset = "lora_video" if config.trains_on_clips else "lora"
        preset = "lora_world" if config.trains_a_world else preset
        yield f"the preset {preset} instead", "trains a low-rank change alone", lora, mesh
    for size in (2, 4, 8, 16):
        if size > mesh.shape["fsdp"]:
            axes = tuple(size if axis == "fsdp" else mesh.shape[axis] for axis in AXES)
            wider = AbstractMesh(axes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
            parts = _batch_parts(wider) * config.accumulation
            batch = config.batch_size if config.batch_size % parts == 0 else parts
            option = f"--mesh.fsdp {size}" + ("" if batch == config.batch_size else f" --batch-size {batch}")
            yield option, f"{math.prod(axes)} devices", change(config, batch_size=batch), wider


def _with_optimizer(optimizer: OptimizerConfig, name: str) -> OptimizerConfig:
    """Another optimizer; settings that it does not read fall back to their defaults."""
    own = {setting for settings in READS.values() for setting in settings}
    left = {field.name: field.default for field in dataclasses.fields(optimizer) if field.name in own - {*READS[name]}}
    return dataclasses.replace(optimizer, name=name, **left)


# -- command -------------------------------------------------------------------------------------------------------


def plan_words(words: Sequence[str]) -> tuple[list[str], bool, Target | None]:
    """A command line's words without ``--plan``, ``--plan=GPU`` or ``--plan GPU``, whether it is there, and for which.

    Raises:
        UserError: GPUs that are not known.
    """
    others, asked, named = [], False, None
    for number, word in enumerate(words):
        if word == "--plan" or word.startswith("--plan="):
            asked, named = True, word.partition("=")[2] if "=" in word else named
        elif number and words[number - 1] == "--plan" and is_target(word):
            named = word
        else:
            others.append(word)
    return others, asked, None if named is None else parse_target(named)


def print_plan(
    config: RunConfig, words: Sequence[str], say: Callable[[str], None], target: Target | None = None
) -> int:
    """Prints what a run would take on each device, and what would change it; returns the exit status.

    Args:
        config: the run.
        words: of its command line, for a process with as many simulated devices as its mesh has.
        say: prints a line.
        target: GPUs that it is for, in place of the devices that are here.

    Raises:
        UserError, FileNotFoundError: one line about what does not fit.
    """
    if target is not None:
        if config.compute.kernels == "triton" and not triton_programs.lower_without_a_gpu():
            raise UserError(
                "--compute.kernels triton needs the GPU itself; choose auto, xla or pallas for this plan, or install "
                "sana-jax[gpu] on Python 3.12 or later, whose jax-triton does not"
            )
        prefer_device("cpu")  # what is computed while tracing
        mesh = make_mesh(config.mesh, target.devices(_given_size(config)))
        limit = f"  of {readable_bytes(target.gpu.memory)} that such a device has"
        # not the mesh itself: nothing can be computed on devices that are not here
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), preferring(config.compute.kernels):
            return _print_plan_on(mesh, config, say, limit, target)
    prefer_device(config.device)
    device = choose_device(config.device)
    wanted = _given_size(config)
    if jax.device_count() % wanted and _SIMULATED not in os.environ:
        here = jax.device_count()
        say(f"the mesh wants {wanted} devices, here are {here}: planning on {wanted} simulated CPU devices")
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={wanted}"
        environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", _SIMULATED: "1"}
        command = [sys.executable, "-m", "train.main", *words]
        return subprocess.run(command, env=environment, check=False).returncode
    enable_compilation_cache()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), using_kernels(config.compute.kernels, device, "--compute.kernels"):
        return _print_plan_on(mesh, config, say, _of_the_device(device))


def _print_plan_on(
    mesh: Mesh, config: RunConfig, say: Callable[[str], None], limit: str, target: Target | None = None
) -> int:
    config, model = settled(config)
    run = planned_run(config, model, mesh)
    measured = measured_memory(run, say, target)
    for line in report(run, measured, choices(run, measured), mesh.devices.flat[0], limit):
        say(line)
    return 0


def _given_size(config: RunConfig) -> int:
    """Of the mesh, as far as it is given."""
    return math.prod(max(1, getattr(config.mesh, axis)) for axis in AXES)


def report(
    run: PlannedRun, measured: Memory | None, changes: list[Choice], device: jax.Device, limit: str = ""
) -> list[str]:
    """The lines of a plan; ``limit`` says what there is on the device."""
    memory, config = measured or estimated_memory(run), run.config
    schedules, params = schedules_of(run.state.optimizer, config), run.state.abstract.params
    trained, every = trained_count(schedules, params), parameter_count(params)
    lines = [
        *trained_table(schedules, params),
        f"{config.preset}: {trained:,} trained parameters; on each of "
        f"{run.mesh.size} devices ({device.device_kind}), {run.rows} of {config.batch_size} samples at once:",
    ]
    if memory is None:
        return [*lines, "this backend reports no memory, and there is no estimate for this recipe"]
    origin = "estimated" if measured is None else "measured by compiling"
    names = {
        "parameters": "trained parameters" if trained == every else f"parameters, {every - trained:,} of them frozen",
        "frozen": "base model, frozen",
        "optimizer": f"state of {config.optimizer.name}",
        "average": "moving average",
        "batch": "batch",
        "gradients": "gradients",
        "activations": f"activations ({config.compute.remat}), {origin}",
    }
    rows = [(text, getattr(memory, field), "") for field, text in names.items() if getattr(memory, field)]
    rows.append(("in all", memory.total, limit))
    lines += [f"  {text:<44}{readable_bytes(size):>10}{note}" for text, size, note in rows]
    lines.append("one change at a time, estimated:")
    for choice in sorted(changes, key=lambda choice: choice.total):
        difference = choice.total - memory.total
        sign = "+" if difference >= 0 else "-"
        sizes = f"{readable_bytes(choice.total):>10}  {sign}{readable_bytes(abs(difference)):<10}"
        lines.append(f"  {choice.option:<44}{sizes} {choice.price}")
    lines.append("not in it: text encoder and autoencoder, which are in memory before training and for previews alone")
    if config.self_forcing is not None and config.self_forcing.stream is not None:
        lines.append("not in it either: what a video's windows leave for the next, and the autoencoder that they need")
    if device.platform == "cpu" and config.compute.dtype == "bfloat16":
        lines.append(
            "a CPU computes bfloat16 in float32: on a GPU the activations are about half of these; --plan=h100 "
            "compiles for one"
        )
    return lines


def _of_the_device(device: jax.Device) -> str:
    statistics = device.memory_stats() or {}
    limit = statistics.get("bytes_limit")
    return "" if limit is None else f"  of {readable_bytes(limit)} that JAX may use on this device"
