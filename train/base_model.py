"""The model that a run starts from: its parts, its weights on a mesh, and what a configuration takes over from it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from configs.schema import FlowConfig, PreviewConfig, RunConfig, VideoFlowConfig
from kernels.typing import PyTree
from sana_jax.diffusion.samplers import SCM
from sana_jax.errors import UserError
from sana_jax.pipelines.families import TransformerConfig, abstract_params, make_transformer
from sana_jax.pipelines.model_directory import (
    GROWING_PIPELINES,
    WORLD_STREAM,
    ModelDirectory,
    pipeline_of,
    read_model_directory,
)
from sana_jax.pipelines.opening import find_model, model_weights_id, open_transformer_weights
from sana_jax.weights.components import Resident
from train.networks import sharding_rules
from train.sharding import parameter_shardings


class BaseModel(NamedTuple):
    """A published, converted or trained model; its weights are read when they are needed."""

    name: str
    """As the configuration names it."""
    pipeline: str
    """The pipeline that it is for."""
    parts: ModelDirectory
    weights_id: str
    """Of the transformer."""
    variant: str | None = None
    """Of the published weight files."""

    def abstract_weights(self, mesh: Mesh, dtype: str) -> PyTree:
        """Shapes of the transformer's parameters in a dtype, with where they lie on a mesh."""
        return abstract_transformer(self.parts.transformer_config, mesh, dtype)

    def weights(self, abstract: PyTree) -> Resident:
        """The transformer's parameters as ``abstract_weights`` lays them out; read at the first use.

        Raises:
            FileNotFoundError: no weights there.
            CheckpointError: weights that do not fit or are damaged.
        """
        resident, _, _ = open_transformer_weights(self.parts, abstract, variant=self.variant)
        return resident


def abstract_transformer(config: TransformerConfig, mesh: Mesh | AbstractMesh, dtype: str) -> PyTree:
    """Shapes of a transformer's parameters in a dtype, with where they lie on a mesh."""
    shapes = abstract_params(make_transformer(config), jnp.dtype(dtype))
    shardings, _ = parameter_shardings(shapes, sharding_rules(config), mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def in_dtype(params: PyTree, dtype: str) -> PyTree:
    """Parameters, or their shapes, in a dtype and where they were; None stays None.

    Arrays are let go of one after another, so that they are freed if nothing else holds them.
    """
    leaves, structure = jax.tree.flatten(params)
    del params
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            leaves[index] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
        elif leaf.dtype != jnp.dtype(dtype):
            leaves[index] = jax.device_put(leaf.astype(dtype), leaf.sharding)
    return jax.tree.unflatten(structure, leaves)


def open_base_model(name: str, variant: str | None = None) -> BaseModel:
    """Opens the model that a configuration names; weights are read later.

    Raises:
        FileNotFoundError, UserError, CheckpointError: as ``ImagePipeline.from_pretrained``.
    """
    directory = find_model(name, variant)
    pipeline = pipeline_of(directory)
    # a run's network alone, as it is trained and as previews draw
    pipeline = {
        "SanaControlNetPipeline": "SanaPipeline",
        "SanaImageToVideoPipeline": "SanaVideoPipeline",
    }.get(pipeline, pipeline)
    parts = read_model_directory(directory, pipeline, variant=variant)
    if parts.trained_from is not None and parts.trained_from.kind == "sprint":
        raise UserError(
            f"--model {name} is a Sprint run, whose checkpoints hold more than a model; save its model first: "
            "SanaSprintPipeline.from_pretrained(...).save_pretrained(...)"
        )
    if parts.transformer_source is not parts:
        raise UserError(
            f"--model {name} is a run that has trained a {parts.trained_from.kind} beside {parts.trained_from.model}; "
            f"training starts from whole models: name that one{_whole_with_lora(name, pipeline, parts)}"
        )
    return BaseModel(name, pipeline, parts, model_weights_id(parts), variant)


def _whole_with_lora(name: str, pipeline: str, parts: ModelDirectory) -> str:
    """How the base model and a run's LoRA become one model; nothing for a run of another kind."""
    if parts.trained_from.kind != "lora":
        return ""
    how = f"python -m convert.main export {name} DIR --lora merged"
    if parts.base.trained_from is not None:
        # conversion takes the transformer alone from a run that leans on a base model of its own; float32 as it was
        # trained, for a pipeline saves what it computes with
        how = (
            f"in Python pipe = sana_jax.{pipeline}.from_pretrained({name!r}, dtype='float32'); pipe.fuse_lora(); "
            "pipe.save_pretrained('DIR')"
        )
    return f", or put the LoRA into its weights ({how}) and start from --model DIR"


def open_encoders(config: RunConfig) -> BaseModel:
    """The model whose text encoder and autoencoder prepare the data of a settled run: its base model, or the one that
    ``encoders`` names, as if it had the run's own network.

    Raises:
        UserError: neither is named.
        FileNotFoundError, CheckpointError: as ``open_base_model``.
    """
    name = config.model or config.encoders
    if name is None:
        # what starts from a model has no network of its own
        option = "--model" if config.transformer is None else "--encoders"
        raise UserError(
            f"the preset {config.preset} prepares its pictures with a model's autoencoder and text encoder; name one "
            f"with {option} DIRECTORY"
        )
    found = open_base_model(name, config.model_variant)
    if config.model is None:
        found = found._replace(parts=dataclasses.replace(found.parts, transformer_config=config.transformer))
    return found


def refuse_distilled(config: RunConfig, pipeline: str) -> None:
    """Stops where a run would start from a few-step generator that takes the model's place.

    Such a generator has no velocity of the data at every noise level, which flow matching goes on from and a score
    network is. ODE initialisation alone may go on with one.

    Raises:
        UserError: with what to name instead.
    """
    if pipeline not in GROWING_PIPELINES or config.ode is not None:
        return
    instead = f"name the {'SANA-WM' if pipeline == WORLD_STREAM else 'SANA-Video'} that it was distilled from"
    if config.self_forcing is not None:
        instead += ", and this one with --self-forcing.generator"
    raise UserError(
        f"--model {config.model} is a generator of a few steps ({pipeline}), and the preset {config.preset} starts "
        f"from a model that knows all noise levels; {instead}"
    )


def settle(config: RunConfig, base: BaseModel | None) -> RunConfig:
    """The configuration with what it left open taken from its base model.

    Raises:
        UserError: it leaves open what only a base model could say, or contradicts its base model.
    """
    if base is None:
        missing = "--transformer" if config.transformer is None else "--flow.flow-shift"
        if config.transformer is None or config.flow.flow_shift is None:
            raise UserError(
                f"the preset {config.preset} has no {missing} of its own and starts from a model: name one with "
                "--model DIRECTORY (a published or converted model, or a training run such as runs/digits)"
            )
        return config
    contract_notice(config, base)
    network = base.parts.transformer_config
    if config.sprint is not None:
        network = dataclasses.replace(network, guidance_embeds=True)  # the student's
    if config.transformer not in (None, network):
        raise UserError(
            f"--model {config.model} has another network than the preset {config.preset}, which trains one of its own; "
            "leave --model out (--encoders takes its text encoder and autoencoder alone), or choose a preset that "
            "starts from a model: finetune or lora"
        )
    own_shift = float(getattr(base.parts.sampler, "flow_shift", None) or 1.0)
    shift = own_shift if config.flow.flow_shift is None else float(config.flow.flow_shift)
    preview = config.preview
    if preview.guidance_scale is None:
        preview = dataclasses.replace(preview, guidance_scale=base.parts.defaults.guidance_scale)
    if config.few_steps is not None or config.sprint is not None:  # which have levels of their own
        return dataclasses.replace(config, transformer=network, preview=preview)
    flow = dataclasses.replace(config.flow, flow_shift=shift)
    if getattr(network, "guidance_embeds", False):
        flow, preview = _of_a_distilled_model(config, flow, preview, base)
    if isinstance(flow, VideoFlowConfig) and flow.sampling_flow_shift is None:
        flow = dataclasses.replace(flow, sampling_flow_shift=own_shift)
    return dataclasses.replace(config, transformer=network, flow=flow, preview=preview)


def _of_a_distilled_model(
    config: RunConfig, flow: FlowConfig, preview: PreviewConfig, base: BaseModel
) -> tuple[FlowConfig, PreviewConfig]:
    """What training a SANA-Sprint on takes over from it: the guidance scale that it is told, and how it is sampled.

    Raises:
        UserError: settings that such a model has no use for.
    """
    defaults, sigma_data = base.parts.defaults, getattr(base.parts.sampler, "sigma_data", SCM.sigma_data)
    unknown = {
        "ControlNet": config.controlnet,
        "--tokens": config.tokens,
        "--prior.caption": None if config.prior is None else config.prior.caption,
    }
    if asked := [name for name, value in unknown.items() if value is not None]:
        raise UserError(
            f"--model {config.model} is distilled to few steps (SANA-Sprint), for which there is no {asked[0]}; choose "
            "SANA or SANA-1.5"
        )
    if sigma_data != SCM.sigma_data:
        raise UserError(
            f"--model {config.model} is sampled with sigma_data {sigma_data}; training goes on from SANA-Sprint models "
            f"of {SCM.sigma_data} alone: name another, or distil it anew with the preset sprint"
        )
    if flow.embedded_guidance is None:
        flow = dataclasses.replace(flow, embedded_guidance=defaults.guidance_scale)
    if preview.sampler == PreviewConfig.sampler:
        steps = preview.num_inference_steps
        if steps == PreviewConfig.num_inference_steps:
            steps = getattr(defaults, "num_inference_steps", steps)
        preview = dataclasses.replace(preview, sampler="scm", num_inference_steps=steps)
    return flow, preview


def contract_notice(config: RunConfig, base: BaseModel | None) -> str | None:
    """A line that the user should see about the base model's weights in the run's dtype; None where there is none.

    Raises:
        UserError: these weights draw broken pictures in that dtype, and would be trained on from there.
    """
    compute, contract = config.compute, None if base is None else base.parts.contract
    if contract is None:
        return None
    option = "--compute.emulate-fp16-saturation"
    return contract.check(compute.dtype, compute.emulate_fp16_saturation, option)


def absolute(name: str) -> str:
    """The base model's path from anywhere, or its name on the Hub."""
    return os.path.abspath(name) if Path(name).exists() else name
