"""What the recorded vectors of LongSANA's training do not show: draws, rollouts, matched scores and refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.longsana import ChunkCausalConfig, OdeInitializationConfig, SelfForcingConfig, StreamConfig
from configs.schema import FlowConfig
from sana_jax import UserError
from sana_jax.diffusion.flow import noise_level
from sana_jax.diffusion.samplers.longsana import nearest_sigma
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer, init_params
from tests.train.toy_generator import (
    CHANNELS,
    HEIGHT,
    NEGATIVE,
    PARAMS,
    REAL,
    ROWS,
    TRAINED,
    WIDTH,
    batch_of,
    empty,
    quickly,
    self_forcing,
    toy_block,
    toy_score,
)
from train.batch import Batch
from train.objectives.longsana.chunk_causal import ChunkCausal
from train.objectives.longsana.dmd import (
    distribution_gradient,
    dmd_loss,
    guided_prediction,
    score_level,
    score_timestep,
)
from train.objectives.longsana.networks import Captions
from train.objectives.longsana.ode import OdeInitialization, teacher_levels, teacher_trajectory
from train.objectives.longsana.rollout import RolloutDraws, RolloutSettings, draw_rollout, exit_steps, rollout
from train.objectives.longsana.self_forcing import SelfForcing


def generator_step(losses: SelfForcing, batch: Batch, draws: Any) -> Any:
    return quickly(lambda batch, draws: losses.generator_losses(TRAINED, REAL, batch, draws))(batch, draws)


# -- ODE initialisation ----------------------------------------------------------------------------------------------


def ode_case(rows: int = 3) -> tuple[OdeInitialization, Batch]:
    options = OdeInitializationConfig(timesteps=(1000, 800, 500), block_frames=2)
    batch = batch_of(5, rows=rows)
    states = np.random.default_rng(1).normal(size=(rows, 3, *batch.latents.shape[1:])).astype(np.float32)
    return OdeInitialization(toy_score, options), batch._replace(conditions={"trajectory": states})


def test_the_ode_loss_is_a_mean_over_the_frames_of_the_batch_that_are_not_clean():
    objective, batch = ode_case()
    # a step at which samples have different numbers of clean blocks
    draw = quickly(lambda step: objective.draw(0, step, batch))
    draws = next(d for d in map(draw, range(50)) if len(set(np.asarray(d.weight))) > 1)
    losses = quickly(lambda batch, draws: objective.losses(jnp.float32(0.4), None, batch, draws))(batch, draws)
    index = np.asarray(draws.index)
    for row in range(3):
        assert (index[row, :3] == index[row, 0]).all()
        assert (index[row, 3:] == index[row, 3]).all()
    trajectory = np.concatenate([batch.conditions["trajectory"], batch.latents[:, None]], axis=1)
    times = np.array([1000, 800, 500, 0], np.float32)[index]
    noisy = np.stack([[trajectory[row, index[row, frame], frame] for frame in range(5)] for row in range(3)])
    velocity = toy_score(jnp.float32(0.4), noisy, jnp.asarray(times), Captions(batch.prompt_embeds, None))
    x0 = noisy - np.asarray(nearest_sigma(jnp.asarray(times), 7.0))[..., None, None, None] * np.asarray(velocity)
    errors = np.square(x0 - batch.latents)[times > 0]
    np.testing.assert_allclose(losses.loss.mean(), errors.mean(), rtol=1e-5)
    assert losses.sigma.shape == (3,)


def test_a_batch_whose_frames_are_all_clean_has_no_loss():
    objective, batch = ode_case(rows=1)
    draw = quickly(lambda step: objective.draw(0, step, batch))
    draws = next(d for d in map(draw, range(200)) if (np.asarray(d.index) == 3).all())
    loss = quickly(jax.value_and_grad(lambda p: objective.losses(p, None, batch, draws).loss.mean()))
    value, grad = loss(jnp.float32(0.4))
    assert value == grad == 0


def test_trajectories_for_other_timesteps_are_refused():
    objective, batch = ode_case()
    batch = batch._replace(conditions={"trajectory": batch.conditions["trajectory"][:, :2]})
    with pytest.raises(UserError, match="make them again with the timesteps"):
        objective.losses(jnp.float32(0.4), None, batch, objective.draw(0, 0, batch))


def test_the_teachers_steps_pass_the_published_timesteps():
    levels, kept = teacher_levels((1000, 960, 889, 727), 48, 8.0)
    assert kept == (0, 12, 24, 36)
    assert levels[0] == 1
    assert levels[-1] == 0
    with pytest.raises(UserError, match=r"do not pass the timesteps \[960"):
        teacher_levels((1000, 960, 889, 727), 50, 3.0)


def test_a_trajectory_ends_where_the_flow_does():
    """Towards one point every velocity is straight, so that any number of steps arrives."""
    noise, goal = jnp.asarray(batch_of(2).latents), 0.5

    def velocity(latents, timestep):
        return (latents - goal) / jnp.maximum(timestep / 1000, 1e-6)

    states = quickly(lambda noise: teacher_trajectory(velocity, noise, (1000, 500), 4, 1.0))(noise)
    assert states.shape == (ROWS, 3, *noise.shape[1:])
    np.testing.assert_array_equal(states[:, 0], noise)
    np.testing.assert_allclose(states[:, 1], 0.5 * (noise + goal), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[:, 2], jnp.full_like(noise, goal), atol=1e-5)


# -- rollouts --------------------------------------------------------------------------------------------------------


def test_a_scan_over_blocks_is_one_block_after_another():
    losses = self_forcing(same_exit_step=False)
    shape = (ROWS, 7, HEIGHT, WIDTH, CHANNELS)
    draws = draw_rollout(3, 0, "x", shape, 3, 3, RolloutSettings(same_for_all_blocks=False))
    captions = Captions(*batch_of(7)[1:3])
    assert len(set(np.asarray(draws.exit_step[0]))) > 1
    whole, state = quickly(lambda d: losses.roll_out(PARAMS, captions, empty(shape), d, 4))(draws)
    alone = quickly(
        lambda state, cut, first: rollout(
            toy_block, PARAMS, captions, state, cut, losses.sampler, (0,), first_frame=first
        )
    )
    parts, own = [], empty(shape)
    for block, (begin, end) in enumerate([(0, 3), (3, 5), (5, 7)]):
        cut = RolloutDraws(
            draws.start[:, begin:end],
            draws.between[:, :, begin:end],
            draws.context[:, begin:end],
            draws.exit_step[:, block : block + 1],
        )
        video, own = alone(own, cut, jnp.int32(4 + begin))
        parts.append(video)
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.total, own.total, rtol=1e-5, atol=1e-6)
    assert state.passes == own.passes == 3


def test_gradients_pass_through_the_exit_step_alone():
    losses, shape = self_forcing(), (1, 4, HEIGHT, WIDTH, CHANNELS)
    draws = draw_rollout(0, 0, "x", shape, 2, 3, RolloutSettings())
    draws = draws._replace(exit_step=jnp.full((1, 2), 1, jnp.int32))
    captions, sigmas = Captions(NEGATIVE.embeds, NEGATIVE.mask), losses.sampler.schedule().sigmas

    def rolled(params):
        return losses.roll_out(params, captions, empty(shape), draws)[0].sum()

    def by_hand(params):
        total, state = 0.0, empty(shape)
        for first in (0, 2):
            x, between = draws.start[:, first : first + 2], draws.between[:, :, first : first + 2]
            x0 = x - sigmas[0] * toy_block(PARAMS, x, jnp.full(1, 1000.0), captions, state, first)[0]
            x = (1 - sigmas[1]) * x0 + sigmas[1] * between[:, 0]
            x0 = x - sigmas[1] * toy_block(params, x, jnp.full(1, 800.0), captions, state, first)[0]
            total += x0.sum()
            level, fixed = losses.sampler.context_sigma, jax.lax.stop_gradient(x0)
            read = (1 - level) * fixed + level * draws.context[:, first : first + 2]
            state = toy_block(PARAMS, read, jnp.zeros(1), captions, state, first)[1]
        return total

    found, expected = (quickly(jax.value_and_grad(f))(PARAMS) for f in (rolled, by_hand))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), found, expected)


def test_exit_steps():
    drawn = jnp.array([2, 0, 3])
    assert exit_steps(drawn, 4).tolist() == [2, 2, 2]
    assert exit_steps(drawn, 4, same_for_all_blocks=False).tolist() == [2, 0, 3]
    assert exit_steps(drawn, 4, always_last=True).tolist() == [3, 3, 3]


def test_draws_are_functions_of_seed_step_and_phase():
    losses, batch = self_forcing(same_exit_step=False), batch_of(7)
    draw = quickly(lambda step: losses.draw_generator(0, step, batch))
    one, again, later = map(draw, (5, 5, 6))
    critic = quickly(lambda: losses.draw_critic(0, 5, batch))()
    assert jax.tree.all(jax.tree.map(np.array_equal, one, again))
    for other in (later, critic):
        assert not np.array_equal(one.rollout.start, other.rollout.start)
        assert not np.array_equal(one.score.noise, other.score.noise)
        assert not np.array_equal(one.score.level, other.score.level)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(one)} == {ROWS}
    exits = np.concatenate([np.asarray(draw(step).rollout.exit_step[0]) for step in range(20)])
    assert set(exits) == {0, 1, 2}


# -- distribution matching -------------------------------------------------------------------------------------------


def test_guidance_of_3_is_a_scale_of_4():
    assert guided_prediction(jnp.float32(2.0), jnp.float32(1.0), 3.0) == 1 + 4 * (2 - 1)


def test_levels_begin_at_the_lowest():
    uniform = jnp.array([0.0, 0.5, np.float32(1 - 2**-24)])
    assert score_level(uniform).tolist() == [0, 500, 999]
    assert score_level(uniform, jnp.int32(960)).tolist() == [960, 980, 999]
    assert score_level(uniform, 1000).tolist() == [999, 999, 999]
    times = score_timestep(jnp.arange(1000), 5.0, 20, 980)
    assert (times.min(), times.max()) == (20, 980)
    np.testing.assert_allclose(times[200], 1000 * 5 * 0.2 / (1 + 4 * 0.2), rtol=1e-6)


def test_where_scores_agree_nothing_moves():
    video = jnp.asarray(batch_of(3).latents)
    assert not np.asarray(distribution_gradient(video, video, video).gradient).any()
    assert not np.asarray(distribution_gradient(video, video + 1, video + 1).gradient).any()


@pytest.mark.parametrize("which", ["real", "fake"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_makes_a_loss_that_is_not(which, value):
    video = jnp.asarray(batch_of(3).latents)
    scores = {"real": video + 1, "fake": video - 1}
    scores[which] = scores[which].at[0, 1, 1, 2, 0].set(value)
    loss = dmd_loss(video, distribution_gradient(video, **scores).gradient)
    assert np.isfinite(loss).tolist() == [False, True]


def test_the_loss_moves_a_video_along_the_gradient():
    video, gradient = jnp.asarray(batch_of(4).latents), jnp.asarray(batch_of(4, rows=ROWS).latents[::-1].copy())
    mask = jnp.array([[0, 1, 1, 1]] * ROWS, bool)
    losses, pull = jax.vjp(lambda v: dmd_loss(v, gradient, mask), video)
    (moved,) = pull(jnp.ones(ROWS))
    count = 3 * HEIGHT * WIDTH * CHANNELS
    np.testing.assert_allclose(moved[:, 1:], gradient[:, 1:] / count, rtol=1e-6)
    assert not np.asarray(moved[:, 0]).any()
    np.testing.assert_allclose(losses, 0.5 * np.square(gradient[:, 1:]).mean((1, 2, 3, 4)), rtol=1e-5)


def test_each_loss_trains_its_own_network_and_accumulation_changes_nothing():
    losses, batch = self_forcing(), batch_of(5, rows=4)
    draws = losses.draw_generator(1, 0, batch)

    def generator(trained, batch, draws):
        return losses.generator_losses(trained, REAL, batch, draws).loss

    def critic(trained, batch, draws):
        return losses.critic_losses(trained, batch, draws).loss

    for function, trains, leaves in ((generator, "transformer", "fake"), (critic, "fake", "transformer")):
        run = quickly(lambda *a, function=function: jax.value_and_grad(lambda t: function(t, *a[1:]).mean())(a[0]))
        value, grads = run(TRAINED, batch, draws)
        assert all(float(g) != 0 for g in jax.tree.leaves(grads[trains]))
        assert not any(float(g) for g in jax.tree.leaves(grads[leaves]))
        halves = [run(TRAINED, *jax.tree.map(lambda x, n=n: x[n::2], (batch, draws))) for n in range(2)]
        mean = jax.tree.map(lambda *parts: sum(parts) / 2, *halves)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), (value, grads), mean)


def test_scores_are_compared_no_lower_than_the_exit_step():
    losses = self_forcing(above_exit_step=True, timestep_shift=1.0, least_timestep=1, greatest_timestep=1000)
    batch = batch_of(5)
    draws = losses.draw_generator(0, 0, batch)
    rolled = draws.rollout._replace(exit_step=jnp.full_like(draws.rollout.exit_step, 1))
    draws = draws._replace(rollout=rolled, score=draws.score._replace(level=jnp.zeros(ROWS)))
    found = generator_step(losses, batch, draws)
    np.testing.assert_allclose(found.sigma, nearest_sigma(jnp.float32(800), 7.0))


def test_the_real_score_is_told_its_own_captions():
    losses, batch = self_forcing(), batch_of(5)
    draws = losses.draw_generator(0, 0, batch)
    own = {"real_prompt_embeds": batch.prompt_embeds + 0.2, "real_prompt_attention_mask": batch.prompt_attention_mask}
    plain, told = (
        losses.generator_losses(TRAINED, REAL, b, draws).loss for b in (batch, batch._replace(conditions=own))
    )
    assert not np.allclose(plain, told)


def test_prompts_and_negative_prompt_have_the_same_length():
    losses = dataclasses.replace(self_forcing(), negative=Captions(jnp.zeros((1, 7, 5)), jnp.ones((1, 7), jnp.int32)))
    batch = batch_of(5)
    with pytest.raises(UserError, match="the negative prompt has 7 tokens and the prompts 4"):
        losses.generator_losses(TRAINED, REAL, batch, losses.draw_generator(0, 0, batch))


# -- chunk-causal pre-training ----------------------------------------------------------------------------------------


class Spy:
    """Stands in for the recipe and keeps what its network is told."""

    def draw(self, seed, step, drop_caption):
        return ()

    def velocity(self, trained, frozen, noisy, timestep, batch, draws):
        self.noisy, self.timestep = noisy, timestep
        return trained * noisy


def chunk_causal(**changes) -> ChunkCausal:
    null = jnp.zeros((1, 4, 5)), jnp.ones((1, 4), jnp.int32)
    return ChunkCausal(Spy(), FlowConfig(), *null, chunks=ChunkCausalConfig(block_frames=3, **changes))


def test_blocks_have_levels_of_their_own_that_never_fall():
    objective, batch = chunk_causal(), batch_of(10, rows=32)
    draws = quickly(lambda: objective.draw(0, 7, batch))()
    index, starts = np.asarray(draws.index), objective.block_starts(10)
    assert starts == (0, 4, 7)
    assert index.shape == (32, 10)
    for block, (begin, end) in enumerate([(0, 4), (4, 7), (7, 10)]):
        assert (index[:, begin:end] == index[:, [begin]]).all(), block
    assert (np.diff(index, axis=1) >= 0).all()
    assert (np.diff(index, axis=1) > 0).any()
    losses = objective.losses(jnp.float32(0.5), None, batch, draws)
    level = noise_level(draws.index, 3.0)
    np.testing.assert_array_equal(objective.recipe.timestep, level.timestep)
    sigma = np.asarray(level.sigma)[..., None, None, None]
    noisy = (1 - sigma) * batch.latents + sigma * draws.noise
    np.testing.assert_allclose(objective.recipe.noisy, noisy, atol=1e-6)
    expected = np.square(0.5 * noisy - (draws.noise - batch.latents)).mean((1, 2, 3, 4))
    np.testing.assert_allclose(losses.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.sigma, level.sigma.mean(1), rtol=1e-6)


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5])
def test_a_given_first_frame_is_clean_or_nearly_and_not_in_the_loss(noise_multiplier):
    options = {"image_to_video": True, "strategy": "uniform", "noise_multiplier": noise_multiplier}
    objective, batch = chunk_causal(**options), batch_of(10, rows=4)
    draws = quickly(lambda: objective.draw(0, 0, batch))()
    index = np.asarray(draws.index)
    assert (index[:, 0] > 0).any() == (noise_multiplier > 0)
    losses = objective.losses(jnp.float32(0.5), None, batch, draws)
    level = noise_level(draws.index, 3.0)
    np.testing.assert_array_equal(objective.recipe.timestep, level.timestep)
    sigma = np.asarray(level.sigma)[..., None, None, None]
    noisy = (1 - sigma) * batch.latents + sigma * draws.noise
    np.testing.assert_allclose(objective.recipe.noisy, noisy, atol=1e-6)
    errors = np.square(0.5 * noisy - (draws.noise - batch.latents)).mean((2, 3, 4))
    np.testing.assert_allclose(losses.loss, errors[:, 1:].mean(1), rtol=1e-5)
    assert np.abs(losses.loss / errors.mean(1) - 1).max() > 1e-3


def test_a_picture_among_clips_has_no_given_frame():
    objective, picture = chunk_causal(image_to_video=True, noise_multiplier=0.5), batch_of(1, rows=8)
    draws = quickly(lambda: objective.draw(0, 0, picture))()
    without = quickly(lambda: chunk_causal().draw(0, 0, picture))()
    assert draws.first_given is None
    np.testing.assert_array_equal(draws.index, without.index)


# -- the published size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cached_blocks", [pytest.param(None, marks=pytest.mark.prove), 2])
def test_a_step_of_the_published_size_traces_in_bfloat16(num_cached_blocks):
    """Shapes and types of losses and gradients at 480p, 21 latent frames; nothing is computed."""
    config = SanaVideoConfig.sana_video_2b_480p()
    network = SanaVideoTransformer(config, jnp.bfloat16, "full", attention_epsilon=1e-8)
    text = (300, config.caption_channels)
    negative = Captions(jax.ShapeDtypeStruct((1, *text), jnp.bfloat16), jax.ShapeDtypeStruct((1, 300), jnp.int32))

    def step(trained, real, batch, negative):
        options = SelfForcingConfig(num_cached_blocks=num_cached_blocks)
        losses = SelfForcing.of_transformers(network, network, options, negative)
        draws = losses.draw_generator(0, 0, batch)
        generator = jax.value_and_grad(lambda t: losses.generator_losses(t, real, batch, draws).loss.mean())(trained)
        critic = jax.value_and_grad(lambda t: losses.critic_losses(t, batch, draws).loss.mean())(trained)
        return generator, critic

    params = jax.eval_shape(lambda: init_params(network, jax.random.key(0)))
    latents = jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32)
    captions = (jax.ShapeDtypeStruct((1, *text), jnp.bfloat16), jax.ShapeDtypeStruct((1, 300), jnp.int32))
    trained = {"transformer": params, "fake": params}
    for loss, grads in jax.eval_shape(step, trained, params, Batch(latents, *captions), negative):
        assert (loss.shape, loss.dtype) == ((), jnp.float32)
        assert jax.tree.all(jax.tree.map(lambda g, p: (g.shape, g.dtype) == (p.shape, p.dtype), grads, trained))


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SelfForcingConfig, {"timesteps": (500, 800)}, "timesteps that fall"),
        (SelfForcingConfig, {"flow_shift": 0.0}, "--self-forcing.flow-shift 0.0"),
        (SelfForcingConfig, {"critic_steps": 0}, "--self-forcing.critic-steps 0"),
        (SelfForcingConfig, {"least_timestep": 990}, "below the greatest"),
        (SelfForcingConfig, {"same_exit_step": False, "above_exit_step": True}, "left out without"),
        (SelfForcingConfig, {"same_exit_step": False, "always_last_step": True}, "left out where"),
        (SelfForcingConfig, {"num_cached_blocks": 0}, "None for all"),
        (StreamConfig, {"overlap_frames": 2}, "a single picture"),
        (StreamConfig, {"total_frames": 5}, "21 or more"),
        (OdeInitializationConfig, {"block_frames": 0}, "--ode.block-frames 0"),
        (ChunkCausalConfig, {"noise_multiplier": 0.5}, "0 without --chunk-causal.image-to-video"),
    ],
)
def test_options_that_are_not_allowed(kind, changes, message):
    with pytest.raises(UserError, match=message):
        kind(**changes)
