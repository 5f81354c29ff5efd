"""What a run says of what it trains: counts without the frozen ones, the table of patterns, each kind's schedule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from configs.schema import EmaConfig, OptimizerConfig
from tests.train.tiny_run import mesh_config, tiny_config
from train.batch import Batch
from train.objectives.base import PhaseLosses
from train.optimizers import evaluation_params
from train.phases import Phase, Schedule, make_phase_optimizers, make_phase_step, schedules_of
from train.plan import ModelShapes, planned_run, report
from train.sharding import make_mesh
from train.state import TrainState
from train.trained_table import trained_count, trained_table

PARAMS = {
    "blocks": {"attn": {"kernel": jnp.zeros((2, 3, 4))}, "ff": {"kernel": jnp.zeros((2, 5, 5))}},
    "out": {"bias": jnp.zeros(7)},
}


def one(**options) -> list[Schedule]:
    return [Schedule(None, None, OptimizerConfig(**options), 10)]


def test_counts_and_table():
    assert (trained_count(one(), PARAMS), trained_table(one(), PARAMS)) == (81, [])
    some = one(trained=(r".*/attn/.*", "out/bias"), learning_rates=("out/bias=0.5",))
    assert trained_count(some, PARAMS) == 31
    head, *rows, last = trained_table(some, PARAMS)
    assert head.split() == ["option", "pattern", "matches", "parameters"]
    assert [row.split() for row in rows] == [
        ["--optimizer.trained", ".*/attn/.*", "1", "24"],
        ["--optimizer.trained", "out/bias", "1", "7"],
        ["--optimizer.learning-rates", "out/bias=0.5", "1", "7"],
    ]
    assert last == "trained: 31 of 81 parameters (38.3 %)"
    assert trained_count(one(frozen=(r"blocks/.*",)), PARAMS) == 7


def test_a_plan_counts_what_is_trained():
    config = tiny_config(mesh=mesh_config(), optimizer=OptimizerConfig(trained=(r"proj_out/.*",)))
    run = planned_run(config, ModelShapes(None, 1, 8, "float32"), make_mesh(mesh_config()))
    out = run.state.abstract.params["proj_out"]
    count = sum(leaf.size for leaf in jax.tree.leaves(out))
    lines = report(run, None, [], jax.devices()[0])
    assert any(line.startswith(f"digits: {count:,} trained parameters;") for line in lines), lines
    assert any(line.startswith("--optimizer.trained") for line in lines)
    assert any("of them frozen" in line for line in lines)


def test_schedules_are_those_of_the_kinds():
    phases = [Phase("a", ("out",), OptimizerConfig(), 4), Phase("b", ("blocks",), OptimizerConfig(), 8)]
    found = schedules_of(make_phase_optimizers(phases, PARAMS), tiny_config())
    assert [(schedule.name, schedule.steps) for schedule in found] == [("a", 4), ("b", 8)]
    assert trained_count(found, PARAMS) == 81
    config = dataclasses.replace(tiny_config(), steps=30)
    assert [(schedule.name, schedule.steps) for schedule in schedules_of(object(), config)] == [(None, 30)]


def test_the_average_of_schedule_free_phases_is_its_own():
    options = OptimizerConfig(name="schedule_free_adamw", learning_rate=0.1)
    config = tiny_config(optimizer=options, ema=EmaConfig())
    params = {"net": {"w": jnp.asarray([1.0, -2.0])}, "beside": {"w": jnp.ones(2)}}
    phase = Phase("one", ("net", "beside"), options, 20)
    optimizers = make_phase_optimizers([phase], params)

    def losses(trained, frozen, batch, draws, step):
        rows = jnp.sum(trained["net"]["w"] ** 2 * trained["beside"]["w"] ** 2) * jnp.ones(batch.latents.shape[0])
        return PhaseLosses(rows, jnp.zeros_like(rows), {}), ()

    step = make_phase_step(phase, optimizers.transformations["one"], config, lambda *_: (), losses, averaged=("net",))
    state = TrainState(jnp.zeros((), jnp.int32), params, {"net": params["net"]}, optimizers.init(params))
    batch = Batch(jnp.zeros((4, 1, 1, 1)), jnp.zeros((4, 1, 1)), jnp.ones((4, 1), jnp.int32), {})
    for _ in range(3):
        state, _ = step(state, None, batch)
    expected = evaluation_params(state.opt_state["one"], state.params)["net"]["w"]
    assert jnp.array_equal(state.ema["net"]["w"], expected)
    assert not jnp.array_equal(expected, state.params["net"]["w"])
