"""A run small enough to be compiled many times: two blocks of width 64 that learn the digits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs import load_preset
from configs.schema import ComputeConfig, EmaConfig, MeshConfig, OptimizerConfig, RunConfig
from train.data import DigitsData, Loader
from train.objectives.flow_matching import FlowMatching
from train.recipes import make_recipe
from train.sharding import batch_sharding, local_rows, make_mesh, replicated, to_global
from train.state_plan import StatePlan, plan_state
from train.step import make_train_step

# The same program from XLA's passes, turned into machine code in half the time.
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "True"}


def tiny_config(**changes: Any) -> RunConfig:
    """The digits preset with a small network; ``changes`` are fields of ``RunConfig``."""
    digits = load_preset("digits")
    transformer = dataclasses.replace(
        digits.transformer,
        num_attention_heads=4,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=2,
    )
    small = {
        "transformer": transformer,
        "compute": ComputeConfig(),
        "steps": 20,
        "batch_size": 16,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.01),
        "ema": EmaConfig(decay=0.9),
    }
    return dataclasses.replace(digits, **{**small, **changes})


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """The parts of a run, put together as ``train.main`` does."""

    config: RunConfig
    mesh: Mesh
    plan: StatePlan
    objective: FlowMatching
    loader: Loader

    @property
    def step_function(self):
        """The step without a base model, not yet jitted."""
        step = make_train_step(self.objective, self.plan.optimizer, self.config)
        return lambda state, batch: step(state, None, batch)

    def jitted_step(self):
        """The step as a run compiles it; the state is donated."""
        shardings = (jax.tree.map(lambda leaf: leaf.sharding, self.plan.abstract), replicated(self.mesh))
        return jax.jit(self.step_function, donate_argnums=0, out_shardings=shardings)

    def compiled_step(self):
        """The step, compiled for this run's shapes."""
        start = self.loader.position()
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.next_batch())
        self.loader.restore(start)
        return self.jitted_step().lower(self.plan.abstract, batch).compile(QUICKLY)

    def initialize(self):
        """The state of step 0."""
        return self.plan.initialize.lower(None).compile(QUICKLY)(None)

    def next_batch(self):
        """The next batch, on the devices."""
        sharding = batch_sharding(self.mesh)
        first, _ = local_rows(sharding, self.config.batch_size)
        return to_global(next(self.loader), sharding, self.config.batch_size, first)


def tiny_run(config: RunConfig) -> TinyRun:
    """Builds a run over the mesh of its configuration."""
    mesh = make_mesh(config.mesh)
    recipe, dataset = make_recipe(config), DigitsData(config.data)
    null = map(jnp.asarray, dataset.null_encoding())
    rows = local_rows(batch_sharding(mesh), config.batch_size)
    return TinyRun(
        config,
        mesh,
        plan_state(config, recipe, None, mesh),
        FlowMatching(recipe, config.flow, *null),
        Loader(dataset, seed=config.seed, batch_size=config.batch_size, rows=rows),
    )


def mesh_config(**axes: int) -> MeshConfig:
    """A mesh whose other axes are 1."""
    return MeshConfig(**{"data": 1, **axes})
