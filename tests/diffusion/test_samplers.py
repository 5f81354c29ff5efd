"""Samplers against diffusers' schedulers on a toy velocity, and against exact solutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.schedulers import scheduling_scm

from sana_jax.diffusion.samplers import SAMPLERS, SCM, DPMSolver, FlowEuler, Schedule, make_sampler
from sana_jax.diffusion.sampling import sample_loop
from sana_jax.errors import UserError

STEPS, SHIFTS = (1, 2, 4, 20, 50), (1.0, 3.0, 6.0, 8.0)
# Rounding of float32 over up to 50 steps, relative to the largest latent; measured: at most 7e-7.
TRAJECTORY_TOLERANCE = 2e-6
RNG = np.random.default_rng(7)
MIX, DRIFT = (RNG.normal(size=(4, 4)) / 2).astype(np.float32), RNG.normal(size=4).astype(np.float32)
LATENTS = RNG.normal(size=(2, 3, 5, 4)).astype(np.float32)
NOISE = RNG.normal(size=(50, *LATENTS.shape)).astype(np.float32)


@jax.jit
def toy_velocity(latents, timestep):
    return jnp.tanh(latents @ MIX) + timestep / 1000.0 * DRIFT


def torch_velocity(latents, timestep):
    return torch.tanh(latents @ torch.tensor(MIX)) + timestep / 1000.0 * torch.tensor(DRIFT)


def assert_trajectory(sampler, schedule, scheduler, **noise):
    """Every latent of a run equals that of a diffusers scheduler, whose timesteps are already set."""
    ours = []
    state = sample_loop(
        sampler, schedule, toy_velocity, LATENTS, on_step=lambda i, t, latents: ours.append(latents), **noise
    )
    latents = torch.tensor(LATENTS)
    assert len(ours) == len(schedule.timesteps)
    for mine, timestep in zip(ours, scheduler.timesteps):  # SCM lists one more, the end, which is not stepped from
        latents, *rest = scheduler.step(torch_velocity(latents, timestep), timestep, latents, return_dict=False)
        allowed = TRAJECTORY_TOLERANCE * float(latents.abs().max())
        np.testing.assert_allclose(mine, latents.numpy(), rtol=0, atol=allowed)
    return state, rest


def dpm_scheduler(flow_shift, **settings):
    return DPMSolverMultistepScheduler(
        flow_shift=flow_shift, use_flow_sigmas=True, prediction_type="flow_prediction", **settings
    )


@pytest.mark.parametrize("flow_shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_equals_diffusers(steps, flow_shift):
    scheduler, sampler = dpm_scheduler(flow_shift), DPMSolver(flow_shift=flow_shift)
    scheduler.set_timesteps(steps)
    schedule = sampler.schedule(steps)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
    assert_trajectory(sampler, schedule, scheduler)


@pytest.mark.parametrize("steps", [1, 3, 14, 16])
def test_dpm_solver_of_first_order_equals_diffusers(steps):
    scheduler, sampler = dpm_scheduler(3.0, solver_order=1), DPMSolver(flow_shift=3.0, solver_order=1)
    scheduler.set_timesteps(steps)
    assert_trajectory(sampler, sampler.schedule(steps), scheduler)


@pytest.mark.parametrize("settings", [{"lower_order_final": False}, {"euler_at_final": True}])
def test_order_reductions_that_the_final_zero_forces_change_nothing(settings):
    scheduler, sampler = dpm_scheduler(3.0, **settings), DPMSolver(flow_shift=3.0)
    scheduler.set_timesteps(20)
    assert_trajectory(sampler, sampler.schedule(20), scheduler)


@pytest.mark.parametrize("flow_shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler_equals_diffusers(steps, flow_shift):
    scheduler, sampler = FlowMatchEulerDiscreteScheduler(shift=flow_shift), FlowEuler(flow_shift=flow_shift)
    scheduler.set_timesteps(steps)
    schedule = sampler.schedule(steps)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
    assert_trajectory(sampler, schedule, scheduler)


SCM_RUNS = [
    (SCM(), 2, {}),
    (SCM(intermediate_timesteps=None), 2, {"intermediate_timesteps": None}),
    *((SCM(intermediate_timesteps=None), n, {"intermediate_timesteps": None}) for n in (1, 4, 20, 50)),
    (
        SCM(sigma_data=0.7, max_timesteps=1.5, intermediate_timesteps=0.9),
        2,
        {"max_timesteps": 1.5, "intermediate_timesteps": 0.9},
    ),
    (
        SCM(timesteps=(1.57, 1.2, 0.6, 0.1), max_timesteps=None, intermediate_timesteps=None),
        3,
        {"timesteps": [1.57, 1.2, 0.6, 0.1], "max_timesteps": None, "intermediate_timesteps": None},
    ),
]


@pytest.mark.parametrize(("sampler", "steps", "settings"), SCM_RUNS)
def test_scm_equals_diffusers_given_the_noise(monkeypatch, sampler, steps, settings):
    scheduler = SCMScheduler(sigma_data=sampler.sigma_data)
    scheduler.set_timesteps(steps, **settings)
    schedule = sampler.schedule(steps)
    angles = scheduler.timesteps.numpy()
    np.testing.assert_array_equal(schedule.timesteps, angles[:-1])
    np.testing.assert_allclose(schedule.sigmas, np.sin(angles) / (np.cos(angles) + np.sin(angles)), rtol=1e-6)
    draws = iter(torch.tensor(NOISE))
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *args, **kwargs: next(draws))
    state, (denoised,) = assert_trajectory(sampler, schedule, scheduler, noise=NOISE[:steps])
    allowed = TRAJECTORY_TOLERANCE * float(denoised.abs().max())
    np.testing.assert_allclose(state.denoised, denoised.numpy(), rtol=0, atol=allowed)


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize("name", ["flow_euler", "dpm_solver"])
def test_a_straight_flow_is_solved_exactly(name, steps):
    """With all data at one point the velocity is (x − x0)/σ, and any number of steps lands on the point."""
    sampler = make_sampler(name, flow_shift=3.0)
    schedule = sampler.schedule(steps)
    point = np.float32([0.5, -1.0, 2.0, 0.25])
    state = sampler.init(LATENTS)
    for index in range(steps):
        state = sampler.step(schedule, state, index, (state.latents - point) / schedule.sigmas[index])
    np.testing.assert_allclose(state.latents, np.broadcast_to(point, LATENTS.shape), atol=3e-6)


def test_second_order_converges_faster_than_first():
    """Error against a fine run falls with 1/n at order 1 and clearly faster at order 2."""
    finest = sample_loop(DPMSolver(), DPMSolver().schedule(800), toy_velocity, LATENTS).latents

    def error(sampler, steps):
        return float(
            jnp.abs(sample_loop(sampler, sampler.schedule(steps), toy_velocity, LATENTS).latents - finest).max()
        )

    first, second = DPMSolver(solver_order=1), DPMSolver()
    assert error(second, 20) < error(first, 20) / 3
    assert error(second, 40) < error(second, 10) / 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_is_float32_of_fixed_shapes(name):
    sampler = make_sampler(name)
    schedule = sampler.schedule(2)
    half = jnp.asarray(LATENTS, jnp.bfloat16)
    noise = half if sampler.stochastic else None
    state = sampler.init(half)
    stepped = sampler.step(schedule, state, 0, half, noise)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stepped) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert stepped.latents.dtype == jnp.float32
    traced = jax.jit(lambda schedule, state, index: sampler.step(schedule, state, index, half, noise))
    np.testing.assert_allclose(traced(schedule, state, 0).latents, stepped.latents, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_hashable_values(name):
    assert make_sampler(name) == make_sampler(name)
    assert hash(make_sampler(name)) == hash(make_sampler(name))


def test_a_schedule_of_own_levels_serves_euler():
    sigmas = np.float32([1.0, 0.9, 0.4, 0.0])
    sampler, schedule = FlowEuler(), Schedule(timesteps=sigmas[:-1] * 1000, sigmas=sigmas)
    ones = np.ones_like(LATENTS)
    state = sample_loop(sampler, schedule, lambda latents, timestep: ones, LATENTS)
    np.testing.assert_allclose(state.latents, LATENTS - 1.0, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_bad_step_counts_are_named(name, steps):
    with pytest.raises(UserError, match=f"num_inference_steps={steps}"):
        make_sampler(name).schedule(steps)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("heun", {}, "'heun'.*flow_euler, dpm_solver, scm"),
        ("dpm_solver", {"shift": 3.0}, "no setting shift; it has flow_shift"),
        ("dpm_solver", {"flow_shift": -1.0}, "flow_shift=-1.0"),
        ("dpm_solver", {"solver_order": 3}, "solver_order=3"),
        ("flow_euler", {"flow_shift": float("nan")}, "flow_shift=nan"),
        ("flow_euler", {"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ("scm", {"sigma_data": 0.0}, "sigma_data=0.0"),
        ("scm", {"max_timesteps": None}, "max_timesteps or timesteps"),
        ("scm", {"intermediate_timesteps": 1.6}, "intermediate_timesteps=1.6"),
        ("scm", {"timesteps": (1.5, 0.0)}, "takes the place of max_timesteps and intermediate_timesteps"),
        (
            "scm",
            {"timesteps": (0.5, 0.7), "max_timesteps": None, "intermediate_timesteps": None},
            "angles that decrease",
        ),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        make_sampler(name, **settings)


def test_scm_names_the_wrong_number_of_steps():
    with pytest.raises(UserError, match="set intermediate_timesteps to None"):
        SCM().schedule(4)
    own = SCM(timesteps=(1.5, 0.7, 0.0), max_timesteps=None, intermediate_timesteps=None)
    with pytest.raises(UserError, match="num_inference_steps=2"):
        own.schedule(3)
    with pytest.raises(UserError, match="num_train_timesteps=10"):
        SCM(intermediate_timesteps=None, num_train_timesteps=10).schedule(11)


def test_wrong_inputs_of_a_step_are_named():
    sampler = FlowEuler()
    schedule, state = sampler.schedule(2), sampler.init(LATENTS)
    with pytest.raises(UserError, match=r"velocity has shape \(2, 3, 5, 1\)"):
        sampler.step(schedule, state, 0, LATENTS[..., :1])
    with pytest.raises(UserError, match="deterministic"):
        sampler.step(schedule, state, 0, LATENTS, LATENTS)
    scm = SCM()
    with pytest.raises(UserError, match="SCM adds noise"):
        scm.step(scm.schedule(2), scm.init(LATENTS), 0, LATENTS)
