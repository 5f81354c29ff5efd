from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.samplers import SCM, DPMSolver, FlowEuler
from sana_jax.diffusion.sampling import begin_steps, pad_steps, sample_loop, sample_scan, sample_steps, step_noise
from sana_jax.errors import UserError

RNG = np.random.default_rng(11)
MIX = (RNG.normal(size=(4, 4)) / 2).astype(np.float32)
LATENTS = RNG.normal(size=(2, 3, 5, 4)).astype(np.float32)
KEY = jax.random.key(5)
RUNS = [
    (FlowEuler(flow_shift=3.0), 1),
    (FlowEuler(flow_shift=8.0), 20),
    (DPMSolver(), 1),
    (DPMSolver(), 2),
    (DPMSolver(flow_shift=8.0), 20),
    (SCM(), 2),
    (SCM(intermediate_timesteps=None), 1),
    (SCM(intermediate_timesteps=None), 5),
]


@jax.jit
def velocity_fn(latents, timestep):
    return jnp.tanh(latents @ MIX) + timestep / 1000.0


def assert_states_equal(first, second):
    """Equal but for the last bit or two, which XLA's choice of fused multiply-adds decides."""
    assert type(first) is type(second)
    for one, other in zip(first, second):
        scale = max(1.0, float(jnp.abs(one).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-7 * scale)


@pytest.mark.parametrize(("sampler", "steps"), RUNS, ids=str)
def test_scan_equals_loop(sampler, steps):
    schedule = sampler.schedule(steps)
    looped = sample_loop(sampler, schedule, velocity_fn, LATENTS, KEY)
    assert_states_equal(sample_scan(sampler, schedule, velocity_fn, LATENTS, KEY), looped)
    jitted = jax.jit(lambda schedule, latents, key: sample_scan(sampler, schedule, velocity_fn, latents, key))
    assert_states_equal(jitted(schedule, LATENTS, KEY), looped)
    if steps > 2:
        # Starting late: every sampler must begin afresh there, of first order.
        late = [
            loop(sampler, schedule, velocity_fn, LATENTS, KEY, start_index=2) for loop in (sample_scan, sample_loop)
        ]
        assert_states_equal(*late)
        assert not np.allclose(late[0].latents, looped.latents)


def test_starting_late_is_a_run_of_the_rest():
    sampler = DPMSolver()
    schedule = sampler.schedule(6)
    late = sample_loop(sampler, schedule, velocity_fn, LATENTS, start_index=3)
    state = sampler.init(LATENTS)
    for index in range(3, 6):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        velocity = velocity_fn(state.latents, jnp.float32(schedule.timesteps[index]))
        if index == 3:
            # Of first order a step of this solver is a step of Euler.
            euler = state.latents + (next_sigma - sigma) * velocity
        state = sampler.step(schedule, state, index, velocity)
        if index == 3:
            np.testing.assert_allclose(state.latents, euler, atol=2e-6)
    assert_states_equal(late, state)


def test_timesteps_arrive_as_float32_scalars_in_the_models_units():
    seen = []

    def recording(latents, timestep):
        assert timestep.shape == ()
        assert timestep.dtype == jnp.float32
        seen.append(float(timestep))
        return jnp.zeros_like(latents)

    for sampler, steps, expected in [
        (DPMSolver(flow_shift=3.0), 4, [999, 899, 749, 499]),
        (FlowEuler(flow_shift=1.0), 2, [1000.0, 1.0]),
        (SCM(), 2, [1.5708, 1.3]),
    ]:
        seen.clear()
        sample_loop(sampler, sampler.schedule(steps), recording, LATENTS, KEY)
        np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_callback_sees_every_step_and_can_stop():
    sampler = DPMSolver()
    schedule = sampler.schedule(5)
    seen = []

    def on_step(index, timestep, latents):
        seen.append((index, timestep, latents))
        return None if index < 2 else False

    stopped = sample_loop(sampler, schedule, velocity_fn, LATENTS, on_step=on_step)
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == schedule.timesteps[:3].tolist()
    np.testing.assert_array_equal(stopped.latents, seen[-1][2])
    state = sampler.init(LATENTS)
    for index in range(3):
        velocity = velocity_fn(state.latents, jnp.float32(schedule.timesteps[index]))
        state = sampler.step(schedule, state, index, velocity)
    assert_states_equal(stopped, state)


def test_a_falsy_answer_that_is_not_false_does_not_stop():
    seen = []
    sampler = FlowEuler()
    sample_loop(sampler, sampler.schedule(3), velocity_fn, LATENTS, on_step=lambda i, t, x: seen.append(i))
    assert seen == [0, 1, 2]


def test_noise_is_a_function_of_key_and_step():
    sampler = SCM(intermediate_timesteps=None)
    schedule = sampler.schedule(4)
    noise = jnp.stack([step_noise(KEY, index, LATENTS.shape) for index in range(4)])
    assert noise.dtype == jnp.float32
    assert len({float(draw.sum()) for draw in noise}) == 4
    from_key = sample_loop(sampler, schedule, velocity_fn, LATENTS, KEY)
    for loop in (sample_loop, sample_scan):
        assert_states_equal(loop(sampler, schedule, velocity_fn, LATENTS, noise=noise), from_key)
    other = sample_loop(sampler, schedule, velocity_fn, LATENTS, jax.random.key(6))
    assert not np.allclose(other.denoised, from_key.denoised)


def test_the_samplers_step_is_traced_once_for_all_steps_and_runs():
    traced = []

    class CountingEuler(FlowEuler):
        def step(self, *arguments):
            traced.append(self)
            return super().step(*arguments)

    def traces(latents) -> int:
        sampler, before = CountingEuler(flow_shift=2.5), len(traced)
        sample_loop(sampler, sampler.schedule(7), velocity_fn, latents)
        return len(traced) - before

    assert traces(LATENTS) == 1
    assert traces(LATENTS) == 0
    assert traces(LATENTS[:1]) == 1


@pytest.mark.parametrize("loop", [sample_loop, sample_scan])
def test_bad_runs_are_named(loop):
    euler, scm = FlowEuler(), SCM()
    noise = np.zeros((2, *LATENTS.shape), np.float32)
    with pytest.raises(UserError, match="takes no noise"):
        loop(euler, euler.schedule(2), velocity_fn, LATENTS, noise=noise)
    for randomness in ({}, {"key": KEY, "noise": noise}):
        with pytest.raises(UserError, match="exactly one of key and noise"):
            loop(scm, scm.schedule(2), velocity_fn, LATENTS, **randomness)
    with pytest.raises(UserError, match=r"noise of shape \(1, 2, 3, 5, 4\)"):
        loop(scm, scm.schedule(2), velocity_fn, LATENTS, noise=noise[:1])
    for start in (-1, 2):
        with pytest.raises(UserError, match=f"start_index={start}"):
            loop(euler, euler.schedule(2), velocity_fn, LATENTS, start_index=start)
    with pytest.raises(UserError, match="velocity has shape"):
        loop(euler, euler.schedule(2), lambda latents, timestep: latents[..., :2], LATENTS)


# -- the loop that pipelines compile -------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "steps"), [RUNS[1], RUNS[4], RUNS[7]], ids=str)
def test_any_cut_of_the_steps_is_the_same_run(sampler, steps):
    """All steps in one call, one by one and in between, by one program: bit for bit; and it is what the loop gives."""
    noise = jnp.stack([step_noise(KEY, index, LATENTS.shape) for index in range(steps)]) if sampler.stochastic else None
    tables = pad_steps(steps, jax.tree.map(jnp.asarray, (sampler.schedule(steps), noise)))
    assert {len(table) for table in (tables[0].timesteps, tables[0].sigmas[1:])} == {8 if steps < 9 else 32}
    traces = []

    @jax.jit
    def run(tables, progress, start, stop):
        traces.append(start)
        schedule, noise = tables

        def velocity(index, latents, calls):
            return velocity_fn(latents, schedule.timesteps[index]), calls + 1

        return sample_steps(sampler, schedule, velocity, progress, start, stop, noise=noise)

    def cut(*stops):
        progress = begin_steps(sampler, LATENTS, jnp.int32(0))
        for start, stop in zip((0, *stops), (*stops, steps)):
            progress = run(tables, progress, start, stop)
        return progress

    whole = cut()
    for stops in (range(1, steps), (2,)):
        jax.tree.map(np.testing.assert_array_equal, cut(*stops), whole)
    assert len(traces) == 1
    assert (int(whole.memory), int(whole.next_step), whole.bad_step()) == (steps, steps, None)
    assert_states_equal(whole.state, sample_loop(sampler, sampler.schedule(steps), velocity_fn, LATENTS, noise=noise))


def test_the_first_step_that_is_not_finite_is_remembered():
    sampler = FlowEuler()
    schedule = sampler.schedule(6)
    bad = jnp.full((6, 2), 0.0).at[3, 1].set(jnp.nan).at[4, 0].set(jnp.inf)

    def velocity(index, latents, memory):
        return latents + bad[index][:, None, None, None], memory

    def amend(index, latents):
        return jnp.where(jnp.isfinite(latents), latents, 0.0) if mends else latents

    for mends in (False, True):
        done = sample_steps(sampler, schedule, velocity, begin_steps(sampler, LATENTS), 0, 6, amend=amend)
        step = done.bad_step()
        if mends:  # what is looked at are the latents that the next step gets
            assert step is None
        else:
            assert step[0] == 3
            np.testing.assert_array_equal(step[1], [True, False])


def test_beginning_shares_no_memory_with_the_latents():
    given = jnp.asarray(LATENTS)
    jax.jit(lambda progress: progress, donate_argnums=0)(begin_steps(FlowEuler(), given))
    np.testing.assert_array_equal(given, LATENTS)
    with pytest.raises(UserError, match="SCM needs noise; give noise="):
        sample_steps(SCM(), SCM().schedule(2), lambda i, x, m: (x, m), begin_steps(SCM(), given), 0, 2)
