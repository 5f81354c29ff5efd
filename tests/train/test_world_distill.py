"""Distillation of SANA-WM's streaming student: losses and rollouts, against what they say written out.

Small functions stand in for the networks; what is told to the real ones is looked at, and `make prove` rolls one out.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.longsana import OdeInitializationConfig, SelfForcingConfig, StreamConfig
from sana_jax import UserError
from sana_jax.diffusion.samplers import WorldStreamSampler
from sana_jax.diffusion.samplers.world_model import generate_block, read_block
from tests.train.tiny_run import QUICKLY
from tests.train.tiny_world import CHANNELS, CONFIG, HEIGHT, ROWS, WIDTH, transformer, world_batch, world_params
from train.batch import FIRST_FRAME, FRAME_VALID
from train.objectives.longsana import world
from train.objectives.longsana.dmd import distribution_gradient
from train.objectives.longsana.networks import Captions, captions_of, empty_state
from train.objectives.longsana.ode import OdeInitialization, teacher_levels
from train.objectives.longsana.rollout import RolloutSettings, draw_rollout, rollout
from train.objectives.longsana.self_forcing import SelfForcing
from train.recipes.base import Prompts
from train.recipes.world_distill import world_few_step_sampling

STEPS = (1000, 800, 500)
FRAMES, STARTS = 7, (0, 3, 5)
ODE = OdeInitializationConfig(STEPS, None, 2, "first_plus_one", clean_first_frame=True)
FORCING = SelfForcingConfig(
    timesteps=STEPS,
    flow_shift=None,
    score_flow_shift=None,
    block_frames=2,
    blocks="first_plus_one",
    num_cached_blocks=2,
    sink=True,
    timestep_shift=10.0,
    least_normalizer=1e-6,
)
SHAPE = (ROWS, FRAMES, HEIGHT, WIDTH, CHANNELS)
NEGATIVE = Captions(jnp.full((1, 3, CONFIG.caption_channels), -0.5), jnp.array([[1, 1, 0]], jnp.int32))
PARAMS = {"w": jnp.float32(0.7), "b": jnp.float32(-0.3)}
FAKE, REAL = jnp.float32(0.4), jnp.float32(0.9)


class ToyState(NamedTuple):
    """The mean of all blocks and the number of passes that were kept."""

    total: Any
    passes: Any


def seen(told, noisy, camera) -> Any:
    """A number for every frame that depends on the prompt and on the camera's path."""
    prompt = (told.embeds * told.mask[..., None]).mean((1, 2))
    return (prompt[:, None] + camera.mean(-1))[..., None, None, None] * jnp.ones_like(noisy)


def toy_block(params, noisy, timestep, told, state, first_frame):
    """A network whose answer depends on everything it is given."""
    assert timestep.shape == noisy.shape[:2]
    camera = jax.lax.dynamic_slice_in_dim(told.camera_conditions, first_frame, noisy.shape[1], axis=1)
    inside = params["w"] * noisy + params["b"] * timestep[..., None, None, None] / 1000 + seen(told, noisy, camera)
    velocity = jnp.tanh(inside + 0.1 * state.total[:, None] + 0.01 * first_frame)
    return velocity, ToyState(state.total + velocity.mean(1), state.passes + 1)


def toy_score(params, noisy, timestep, told):
    assert timestep.shape == noisy.shape[:2]
    return jnp.tanh(params * noisy + seen(told, noisy, told.camera_conditions) - timestep[..., None, None, None] / 1000)


def empty(shape) -> ToyState:
    return ToyState(jnp.zeros((shape[0], *shape[2:])), jnp.zeros((), jnp.int32))


def self_forcing(**changes) -> SelfForcing:
    return SelfForcing(toy_block, toy_score, toy_score, empty, dataclasses.replace(FORCING, **changes), NEGATIVE)


@pytest.fixture(scope="module")
def batch():
    return world_batch(0, frames=FRAMES)


def quickly(function, **options):
    return jax.jit(function, compiler_options=QUICKLY, **options)


def assert_near(found, expected, tolerance=2e-5):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


# -- what networks are told --------------------------------------------------------------------------------------------


def test_the_network_gets_its_blocks_part_of_the_camera(batch):
    told, calls = captions_of(batch), []
    spy = SimpleNamespace(apply=lambda variables, *inputs, **options: calls.append((inputs, options)))
    noisy = batch.latents[:, 3:5]
    world.block_network(spy)({}, noisy, jnp.array([700.0, 20.5]), told, "state", jnp.int32(3))
    world.score_network(spy, STARTS)({}, batch.latents, jnp.full((ROWS, FRAMES), 5.0), told)
    (inputs, options), (whole, causal) = calls
    np.testing.assert_array_equal(inputs[2], [[700.0] * 2, [20.5] * 2])
    np.testing.assert_array_equal(inputs[4], batch.conditions["camera_conditions"][:, 3:5])
    np.testing.assert_array_equal(inputs[5], batch.conditions["chunk_plucker"][:, 3:5])
    assert options == {"state": "state", "first_frame": 3}
    assert causal == {"block_starts": STARTS}
    assert whole[2].shape == (ROWS, FRAMES)
    np.testing.assert_array_equal(whole[4], batch.conditions["camera_conditions"])
    np.testing.assert_array_equal(told.given, batch.latents[:, :1])


def test_the_state_has_room_for_what_a_block_sees():
    shapes = jax.eval_shape(lambda: empty_state(transformer(), SHAPE, STARTS, 2, True))
    assert shapes.frame_blocks.shape == (5,)  # the first block, and the one before
    assert (shapes.num_cached_blocks, shapes.sink) == (2, True)


# -- ODE initialisation ----------------------------------------------------------------------------------------------


def test_the_ode_loss_written_out(batch):
    states = np.random.default_rng(4).standard_normal((ROWS, len(STEPS), *SHAPE[1:])).astype(np.float32)
    with_states = batch._replace(conditions={**batch.conditions, "trajectory": states})
    objective = OdeInitialization(toy_score, ODE)
    draw = quickly(lambda step: objective.draw(0, step, batch))
    drawn = [draw(step) for step in range(9)]
    assert set(np.concatenate([np.asarray(each.index)[:, 1:].ravel() for each in drawn])) == {*range(4)}
    draws = next(each for each in drawn if len(set(np.asarray(each.weight))) > 1)
    found = quickly(lambda b, d: objective.losses(FAKE, None, b, d))(with_states, draws)

    index = np.asarray(draws.index)
    for row in index:
        assert row[0] == 3  # the given frame is clean
        assert all(len(set(row[first:end])) == 1 for first, end in ((1, 3), (3, 5), (5, 7)))
    trajectory = np.concatenate([states, batch.latents[:, None]], axis=1)
    noisy = np.stack([[trajectory[row, index[row, frame], frame] for frame in range(FRAMES)] for row in range(ROWS)])
    times = np.array([*STEPS, 0], np.float32)[index]
    np.testing.assert_array_equal(noisy[:, 0], batch.latents[:, 0])
    velocity = np.asarray(toy_score(FAKE, noisy, times, captions_of(batch)))
    errors = np.square(noisy - times[..., None, None, None] / 1000 * velocity - batch.latents)[times > 0]
    assert_near(found.loss.mean(), errors.mean())


def test_a_teachers_steps_are_moved_onto_the_published_timesteps():
    levels, kept = teacher_levels((1000, 967, 908, 764), 60, 9.8, snap=True)
    assert kept == (0, 15, 30, 45)
    assert (np.diff(levels) < 0).all()
    np.testing.assert_array_equal(levels[list(kept)], np.array([1.0, 0.967, 0.908, 0.764], np.float32))
    with pytest.raises(UserError, match=r"do not pass the timesteps \[908, 764\]"):
        teacher_levels((1000, 967, 908, 764), 60, 9.8)
    with pytest.raises(UserError, match=r"with 60 at 9\.8"):
        teacher_levels((1000, 967, 908, 764), 8, 3.0, snap=True)


# -- rollouts --------------------------------------------------------------------------------------------------------


def rollout_draws(fresh_noise: bool, exit_step: int):
    settings = RolloutSettings(fresh_noise=fresh_noise, context_noise=False)
    draws = draw_rollout(3, 0, "x", SHAPE, 3, 3, settings)
    return draws._replace(exit_step=jnp.full((ROWS, 3), exit_step, jnp.int32))


@pytest.fixture(scope="module")
def rolled() -> Any:
    losses = self_forcing(fresh_noise=False)
    return quickly(lambda batch, draws: losses.roll_out(PARAMS, captions_of(batch), empty(SHAPE), draws))


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_a_rollout_is_the_streaming_samplers_video_up_to_the_exit_step(batch, rolled, exit_step):
    """Jumping to clean from a step is a run of the steps up to it."""
    draws = rollout_draws(fresh_noise=False, exit_step=exit_step)
    assert draws.between is draws.context is None
    video, after = rolled(batch, draws)
    sampler = WorldStreamSampler(STEPS[: exit_step + 1], block_frames=2)
    assert sampler.block_starts(FRAMES) == STARTS
    told, state, found = captions_of(batch), empty(SHAPE), []
    for first, end in zip(STARTS, (*STARTS[1:], FRAMES)):

        def velocity(noisy, timestep, state, first=first):
            return toy_block(PARAMS, noisy, timestep, told, state, first)

        given = batch.latents[:, :1] if first == 0 else None
        found.append(generate_block(velocity, state, draws.start[:, first:end], sampler.schedule(), given))
        state = read_block(velocity, state, found[-1])
    assert_near(video, np.concatenate(found, axis=1))
    np.testing.assert_array_equal(video[:, 0], batch.latents[:, 0])
    assert_near(after.total, state.total)
    assert after.passes == 3


def by_hand(params, batch, draws, block=toy_block, state=None):
    """A rollout that exits at step 1 with fresh noise, block after block; gradients through that step alone."""
    told, fixed, found = captions_of(batch), jax.lax.stop_gradient(params), []
    state = empty(SHAPE) if state is None else state
    for first, end in zip(STARTS, (*STARTS[1:], FRAMES)):
        own = jnp.arange(first, end) > 0
        level = own.astype(jnp.float32)[None, :, None, None, None]

        def clean(of, x, step, first=first, state=state, own=own, level=level):
            times = jnp.broadcast_to(step * own, (ROWS, len(own)))
            return x - step / 1000 * level * block(of, x, times, told, state, first)[0]

        x = level * draws.start[:, first:end] + (1 - level) * batch.latents[:, :1]
        x = (1 - 0.8 * level) * clean(fixed, x, 1000.0) + 0.8 * level * draws.between[:, 0, first:end]
        found.append(clean(params, x, 800.0))
        kept = jax.lax.stop_gradient(found[-1])
        state = jax.lax.stop_gradient(block(fixed, kept, jnp.zeros((ROWS, end - first)), told, state, first)[1])
    return jnp.concatenate(found, axis=1)


def test_gradients_pass_through_the_exit_step_alone(batch):
    losses, draws = self_forcing(), rollout_draws(fresh_noise=True, exit_step=1)
    probe = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)

    def probed(run):
        def function(params, batch, draws):
            video = run(params, batch, draws)
            return (video * probe).sum(), video

        return quickly(jax.value_and_grad(function, has_aux=True))(PARAMS, batch, draws)

    def rolled(params, batch, draws):
        return losses.roll_out(params, captions_of(batch), empty(SHAPE), draws)[0]

    ((_, video), grads), ((_, expected), expected_grads) = probed(rolled), probed(by_hand)
    assert_near(video, expected)
    jax.tree.map(functools.partial(assert_near, tolerance=1e-4), grads, expected_grads)


def test_blocks_of_one_length_are_scanned_with_the_given_frame_in_the_first(batch):
    """Where the first block is as long as the others, it is known only when the program runs which frame is given."""
    draws = rollout_draws(fresh_noise=True, exit_step=2)
    cut = jax.tree.map(lambda array: array[:, :6] if array.ndim == 5 else array, draws)
    cut = cut._replace(between=draws.between[:, :, :6])
    sampler = dataclasses.replace(FORCING, blocks="uniform").sampler
    assert sampler.block_starts(6) == (0, 2, 4)
    run = quickly(lambda b, d: rollout(toy_block, PARAMS, captions_of(b), empty(SHAPE), d, sampler, (0, 2, 4)))
    video, _ = run(batch, cut)
    other = cut._replace(start=cut.start.at[:, 0].set(7.0), between=cut.between.at[:, :, 0].set(-7.0))
    np.testing.assert_array_equal(video[:, 0], batch.latents[:, 0])
    np.testing.assert_array_equal(run(batch, other)[0], video)  # the noise of a given frame is not read


# -- distribution matching and critic ---------------------------------------------------------------------------------


def test_losses_written_out(batch):
    """The first frame is clean to the scores, and no loss falls on it."""
    losses, video = self_forcing(), np.random.default_rng(6).standard_normal(SHAPE).astype(np.float32)
    video[:, 0] = batch.latents[:, 0]
    draws, told, trained = losses.draw_generator(0, 1, batch), captions_of(batch), {"fake": FAKE}

    def matching(video, draws):
        found = losses.matching_losses(trained, REAL, video, told, told, draws)
        return found.loss.sum(), found

    (_, found), pull = quickly(jax.value_and_grad(matching, has_aux=True))(video, draws)
    critic = quickly(lambda draws: losses.denoising_losses(trained, video, told, draws))(draws)

    level = np.floor(1000 * np.asarray(draws.score.level)) / 1000
    times = np.clip(1000 * 10 * level / (1 + 9 * level), 20, 980)[:, None] * (np.arange(FRAMES) > 0)
    sigma, noise = times[..., None, None, None] / 1000, np.asarray(draws.score.noise)
    noisy = (1 - sigma) * video + sigma * noise
    without = told._replace(embeds=NEGATIVE.embeds, mask=NEGATIVE.mask)
    flows = (toy_score(FAKE, noisy, times, told), *(toy_score(REAL, noisy, times, each) for each in (told, without)))
    fake, cond, uncond = (noisy - sigma * np.asarray(flow) for flow in flows)
    real = cond + 3.0 * (cond - uncond)
    normalizer = np.abs(video - real).mean((1, 2, 3, 4))
    gradient = (fake - real) / normalizer[:, None, None, None, None]
    assert_near(found.figures["normalizer"], normalizer)
    assert_near(found.loss, 0.5 * np.square(gradient[:, 1:]).mean((1, 2, 3, 4)))
    assert_near(pull[:, 1:], gradient[:, 1:] / gradient[0, 1:].size)
    assert not np.asarray(pull[:, 0]).any()
    assert_near(critic.loss, np.square(flows[0] - (noise - video))[:, 1:].mean((1, 2, 3, 4)), 1e-4)
    assert_near(found.sigma, times[:, 1] / 1000)


def test_each_step_trains_its_own_network_and_follows_its_camera(batch):
    losses = self_forcing()
    draws = losses.draw_generator(1, 0, batch)
    assert draws.rollout.context is None
    assert draws.rollout.between.shape == (ROWS, 2, *SHAPE[1:])

    def both(trained, batch, draws):
        generator = jax.value_and_grad(lambda t: losses.generator_losses(t, REAL, batch, draws).loss.mean())
        critic = jax.value_and_grad(lambda t: losses.critic_losses(t, batch, draws).loss.mean())
        return generator(trained), critic(trained)

    run, trained = quickly(both), {"transformer": PARAMS, "fake": FAKE}
    found = run(trained, batch, draws)
    for (value, grads), own, other in zip(found, ("transformer", "fake"), ("fake", "transformer")):
        assert np.isfinite(value)
        assert all(float(leaf) != 0 for leaf in jax.tree.leaves(grads[own]))
        assert not any(float(leaf) for leaf in jax.tree.leaves(grads[other]))
    turned = {**batch.conditions, "camera_conditions": batch.conditions["camera_conditions"][::-1]}
    moved = run(trained, batch._replace(conditions=turned), draws)
    assert not any(np.allclose(one[0], other[0]) for one, other in zip(found, moved))


def test_a_vanishing_divisor_is_kept_away_from_zero():
    same = jnp.ones(SHAPE)
    assert distribution_gradient(same, same, same + 1e-3, 1e-6).normalizer.tolist() == [np.float32(1e-6)] * ROWS


# -- the network itself ------------------------------------------------------------------------------------------------


@pytest.mark.prove
def test_the_network_rolled_out(batch):
    """As the student is sampled; with fresh noise as by hand, its gradients too, which reach the camera's weights."""
    params = world_params(1)
    with jax.default_matmul_precision("highest"):
        losses = SelfForcing.of_transformers(
            transformer(), transformer(), dataclasses.replace(FORCING, fresh_noise=False), NEGATIVE
        )

        def roll_out(params, batch, draws):
            return losses.roll_out(params, captions_of(batch), losses.empty_state(SHAPE), draws)

        draws = rollout_draws(fresh_noise=False, exit_step=2)
        video, state = quickly(roll_out)(params, batch, draws)
        prompts = Prompts(batch.prompt_embeds, batch.prompt_attention_mask, *NEGATIVE)
        conditions = {**batch.conditions, FIRST_FRAME: batch.latents[:, :1]}
        sample = quickly(world_few_step_sampling(transformer(), losses.sampler))
        assert_near(video, sample(params, draws.start, prompts, conditions))
        assert np.asarray(state.frame_blocks).tolist() == [0, 0, 0, 2, 2]  # the sink and the newest

        draws = rollout_draws(fresh_noise=True, exit_step=1)
        probe = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
        network = jax.jit(world.block_network(transformer()))  # inside a gradient, where no compiler takes options

        def expected(params, batch, draws):
            return by_hand(params, batch, draws, network, losses.empty_state(SHAPE))

        both = [
            jax.value_and_grad(lambda p, run=run: (run(p, batch, draws) * probe).sum())(params)
            for run in (jax.jit(lambda *inputs: roll_out(*inputs)[0]), expected)
        ]
    jax.tree.map(functools.partial(assert_near, tolerance=3e-4), *both)
    for block in ("delta_blocks", "softmax_blocks"):
        assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(both[0][1][block]["attn1"]["to_q_camera"]))
    assert np.asarray(both[0][1]["plucker_embedding"]["kernel"]).any()


# -- what is not allowed ----------------------------------------------------------------------------------------------


def test_clips_that_are_filled_up_are_refused(batch):
    valid = {**batch.conditions, FRAME_VALID: np.ones((ROWS, FRAMES), bool)}
    with pytest.raises(UserError, match="clips of one length"):
        captions_of(batch._replace(conditions=valid))


MISTAKES = {
    "a table": ({"flow_shift": 7.0}, "--self-forcing.blocks first_plus_one is not allowed"),
    "a score's table": ({"score_flow_shift": 8.0}, "--self-forcing.score-flow-shift 8.0 is not allowed"),
    "LongSANA's blocks": ({"blocks": "rest_first"}, "--self-forcing.blocks rest_first is not allowed"),
    "a sink alone": ({"num_cached_blocks": None}, "--self-forcing.sink"),
    "windows": ({"stream": StreamConfig()}, "--self-forcing.stream of windows"),
    "no divisor": ({"least_normalizer": -1.0}, "--self-forcing.least-normalizer -1.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_do_not_go_together(mistake):
    changes, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        dataclasses.replace(FORCING, **changes)


def test_longsana_has_neither_sink_nor_its_own_noise():
    for changes, said in (({"sink": True, "num_cached_blocks": 2}, "sink"), ({"fresh_noise": False}, "no-fresh-noise")):
        with pytest.raises(UserError, match=said):
            SelfForcingConfig(**changes)
    with pytest.raises(UserError, match="no-clean-first-frame"):
        dataclasses.replace(ODE, clean_first_frame=False)
