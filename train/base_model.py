"""The model that a run starts from: its parts, its weights on a mesh, and what a configuration takes over from it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from configs.schema import RunConfig, VideoFlowConfig
from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.pipelines.families import TransformerConfig, abstract_params, make_transformer
from sana_jax.pipelines.model_directory import ModelDirectory, pipeline_of, read_model_directory
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
            "training starts from whole models: name that one, or merge a LoRA first with python -m convert.main merge"
        )
    return BaseModel(name, pipeline, parts, model_weights_id(parts), variant)


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
    if config.few_steps is not None:  # which has levels of its own
        return dataclasses.replace(config, transformer=network, preview=preview)
    flow = dataclasses.replace(config.flow, flow_shift=shift)
    if isinstance(flow, VideoFlowConfig) and flow.sampling_flow_shift is None:
        flow = dataclasses.replace(flow, sampling_flow_shift=own_shift)
    return dataclasses.replace(config, transformer=network, flow=flow, preview=preview)


def absolute(name: str) -> str:
    """The base model's path from anywhere, or its name on the Hub."""
    return os.path.abspath(name) if Path(name).exists() else name
