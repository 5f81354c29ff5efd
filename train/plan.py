"""What a run would take, before it runs: ``python -m train.main PRESET --plan [--field.sub value ...]``.

Neither data nor weights are read. The configured step is compiled for devices as they are here, as the run would do
it; what other settings would make of it is estimated from shapes and traces, and set right by what was compiled.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from configs.published import PUBLISHED_TRANSFORMERS
from configs.schema import DigitsDataConfig, RunConfig
from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.models.sana import SanaConfig
from sana_jax.pipelines.model_directory import pipeline_of, read_model_directory
from sana_jax.pipelines.opening import find_model
from train.base_model import abstract_base, settle
from train.batch import Batch
from train.data.buckets import size_table
from train.data.digits import DigitsData
from train.recipes import Recipe, make_recipe
from train.sharding import check_batch, replicated
from train.state import StatePlan, plan_state

# Of the published models: pixels per latent, tokens of a prompt, and the dtype that a cache keeps prompts in.
_FACTOR, _PROMPT_TOKENS, _PROMPT_DTYPE = 32, 300, "bfloat16"
_PRICES = {
    "none": "fastest",
    "dots": "computes what is no matrix product twice",
    "dots_no_batch": "computes attention and what is no matrix product twice",
    "full": "computes the forward pass twice, about 1/3 slower",
    "offload": "as full, and moves blocks' inputs to host memory and back",
}


class Shapes(NamedTuple):
    """What is to be known of a run's model and data."""

    height: int
    width: int
    """Latents of the largest size that it is trained at."""
    tokens: int
    """Of a prompt, padding included."""
    prompt_dtype: str


class PlannedRun(NamedTuple):
    """A run as shapes with their places on a mesh."""

    config: RunConfig
    """Settled."""
    shapes: Shapes
    recipe: Recipe
    mesh: Mesh | AbstractMesh
    base: PyTree | None
    """The base model's parameters."""
    state: StatePlan
    batch: Batch

    @property
    def frozen(self) -> PyTree | None:
        """What of the base model stays in memory."""
        return self.base if self.recipe.keeps_base else None

    @property
    def null_encoding(self) -> tuple[jax.Array, jax.Array]:
        """Stands for the encoding of no text."""
        _, tokens, channels = self.batch.prompt_embeds.shape
        return jnp.zeros((1, tokens, channels)), jnp.ones((1, tokens), jnp.int32)

    def jitted_steps(self) -> list[Callable]:
        """The kinds of step as the run compiles them; arguments: state, frozen, batch."""
        shardings = (jax.tree.map(lambda leaf: leaf.sharding, self.state.abstract), replicated(self.mesh))
        functions = self.recipe.step_functions(self.config, self.state.optimizer, self.null_encoding)
        return [jax.jit(function, donate_argnums=0, out_shardings=shardings) for function in functions]


def settled_shapes(config: RunConfig) -> tuple[RunConfig, Shapes]:
    """The configuration with its model's shape, from ``config.json`` files or the table of published models.

    Raises:
        UserError, FileNotFoundError: there is no such model, or none is named where one is needed.
    """
    if isinstance(config.data, DigitsDataConfig):
        data = DigitsData(config.data)
        height, width, _ = data.preview_shape
        shapes = Shapes(height, width, data.text_encoder.max_length, "float32")
        return _with_network(config, *_network_of(config)[:1]), shapes
    network, factor, tokens, dtype = _network_of(config)
    config = _with_network(config, network)
    data, network = config.data, config.transformer
    table = size_table(network.sample_size, factor, data.resolution, aspect_buckets=data.aspect_buckets)
    largest = max(table, key=lambda size: (size.height * size.width, size.height))
    return config, Shapes(largest.height // factor, largest.width // factor, tokens, dtype)


def _network_of(config: RunConfig) -> tuple[SanaConfig | None, int, int, str]:
    """The base model's network, pixels per latent, tokens of a prompt and their dtype."""
    name = config.model or config.encoders
    if name is None:
        if config.transformer is None or config.lora is not None:
            raise UserError(
                f"the preset {config.preset} starts from a model, whose shape the plan needs; name a directory with "
                "--model, or a published one, which is not downloaded for this: --model "
                "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
            )
        return None, _FACTOR, _PROMPT_TOKENS, _PROMPT_DTYPE
    published = PUBLISHED_TRANSFORMERS.get(name.rpartition("/")[2])
    if published is not None and not Path(name).exists():
        return published.config, _FACTOR, _PROMPT_TOKENS, _PROMPT_DTYPE
    directory = find_model(name, config.model_variant)
    try:
        parts = read_model_directory(directory, pipeline_of(directory))
    except FileNotFoundError:  # a directory without weights or tokenizer is enough
        path = directory / "transformer" / "config.json"
        if not path.is_file():
            raise
        return SanaConfig.from_dict(read_json(path)), _FACTOR, _PROMPT_TOKENS, _PROMPT_DTYPE
    encoder = parts.text_encoder
    dtype = jnp.dtype(getattr(encoder, "dtype", jnp.float32)).name
    return parts.transformer_config, parts.autoencoder.spatial_factor, encoder.max_length, dtype


def _with_network(config: RunConfig, network: SanaConfig | None) -> RunConfig:
    """As ``train.base_model.settle``, with a model of which the network alone is known."""
    if config.model is None:
        return settle(config, None)
    unknown = types.SimpleNamespace(guidance_scale=4.5)
    parts = types.SimpleNamespace(transformer_config=network, sampler=None, defaults=unknown)
    return settle(config, types.SimpleNamespace(parts=parts))


def planned_run(config: RunConfig, shapes: Shapes, mesh: Mesh | AbstractMesh) -> PlannedRun:
    """Lays out a settled configuration over a mesh.

    Raises:
        UserError: settings that do not fit one another.
    """
    check_batch(config.batch_size, config.accumulation, mesh)
    recipe = make_recipe(config)
    base = None
    if config.model is not None:
        base = abstract_base(config.transformer_of_base, mesh, config.compute.dtype)
    state = plan_state(config, recipe, base, mesh)
    return PlannedRun(config, shapes, recipe, mesh, base, state, _abstract_batch(config, shapes, recipe, mesh))
