"""LongSANA's distillation against recorded vectors: ODE initialisation, rollouts, matching, critic, gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.longsana import OdeInitializationConfig, SelfForcingConfig
from sana_jax.diffusion.samplers.longsana import causal_block_starts
from sana_jax.models.sana_video import SanaVideoTransformer
from tests.golden.golden_files import GoldenFile, assert_golden, assert_golden_exact, load_golden
from tests.golden.video_networks import (
    channels_last,
    frames_channels_last,
    original_gradient,
    recorded_numerics,
    recorded_params,
    recorded_slots,
    recorded_transformer,
)
from tests.train.tiny_run import QUICKLY
from train.batch import Batch
from train.objectives.longsana.critic import velocity_from_x0
from train.objectives.longsana.dmd import distribution_gradient, score_timestep
from train.objectives.longsana.networks import Captions, score_network
from train.objectives.longsana.ode import OdeDraws, OdeInitialization, frame_indices, ode_samples
from train.objectives.longsana.rollout import RolloutDraws, exit_steps
from train.objectives.longsana.self_forcing import ScoreDraws, SelfForcing, SelfForcingDraws

VALUES = 5e-5
GRADIENTS = 3e-4
GRADIENT_FLOOR = 1e-6
LOSSES = 2e-5
TABLES = 5e-6


@pytest.fixture(scope="module", autouse=True)
def _recorded_numerics():
    with recorded_numerics():
        yield


@pytest.fixture(scope="module")
def golden() -> GoldenFile:
    return load_golden("longsana_distill")


@functools.cache
def transformer() -> SanaVideoTransformer:
    return recorded_transformer(load_golden("longsana_distill").hparams)


@functools.cache
def network(name: str) -> Any:
    """Parameters of ``generator``, ``fake`` or ``real``."""
    return recorded_params(load_golden("longsana_distill"), f"w/{name}/", transformer())


def recorded_captions(golden: GoldenFile, name: str) -> Captions:
    return Captions(jnp.asarray(golden[f"in/{name}"]), jnp.asarray(golden[f"in/{name}_mask"], jnp.int32))


@functools.cache
def config() -> SelfForcingConfig:
    hparams = load_golden("longsana_distill").hparams
    return SelfForcingConfig(
        timesteps=tuple(step for step in hparams["steps"] if step),
        flow_shift=hparams["gshift"],
        score_flow_shift=hparams["sshift"],
        block_frames=hparams["base"],
        num_cached_blocks=hparams["ncb"] if hparams["ncb"] > 0 else None,
        guidance=hparams["guidance"],
        timestep_shift=hparams["tshift"],
        least_timestep=hparams["min_step"],
        greatest_timestep=hparams["max_step"],
    )


def self_forcing(**changes: Any) -> SelfForcing:
    negative = recorded_captions(load_golden("longsana_distill"), "y_neg")
    options = dataclasses.replace(config(), **changes)
    return SelfForcing.of_transformers(transformer(), transformer(), options, negative)


def assert_gradients(golden: GoldenFile, tree: Any, where: str) -> None:
    names = golden.names(f"out/{where}/")
    assert names
    for name in names:
        original = name.removeprefix(f"out/{where}/")
        wide = name.replace("out/", "out64/", 1)
        recorded = golden[wide if wide in golden else name]
        assert_golden(
            original_gradient(transformer(), tree, original, recorded), recorded, GRADIENTS, name, GRADIENT_FLOOR
        )


# -- ODE initialisation ----------------------------------------------------------------------------------------------


@functools.cache
def ode_objective() -> OdeInitialization:
    hparams = load_golden("longsana_distill").hparams
    *steps, last = hparams["ode_step_list"]
    assert last == 0
    starts = tuple(hparams["ode_chunks"])
    options = OdeInitializationConfig(
        timesteps=tuple(steps), flow_shift=hparams["gshift"], block_frames=hparams["base"]
    )
    return OdeInitialization(score_network(transformer(), starts), options)


@functools.cache
def compiled_ode() -> Any:
    """``(params, batch, draws) -> (loss, velocity), gradients``"""

    def loss(params, batch, draws):
        return ode_objective().losses(params, None, batch, draws).loss.mean()

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICKLY)


@pytest.mark.parametrize("case", ["ode", "ode_i2v"])
def test_ode_initialization(golden, case):
    objective, trajectory = ode_objective(), frames_channels_last(golden["in/ode_latent"])
    frames, last = trajectory.shape[2], trajectory.shape[1] - 1
    (drawn,) = golden.names(f"rng/{case}/")
    # they draw (block, sample)
    index = frame_indices(
        jnp.asarray(golden[drawn].T), tuple(golden.hparams["ode_chunks"]), frames, last, case == "ode_i2v"
    )
    assert_golden_exact(index, golden[f"out/{case}/index"], case)
    samples = ode_samples(jnp.asarray(trajectory), index, objective.timesteps)
    assert_golden_exact(samples.timestep, golden[f"out/{case}/timestep"], case)
    assert_golden_exact(samples.noisy, frames_channels_last(golden[f"out/{case}/noisy"]), case)

    captions = recorded_captions(golden, "y")
    batch = Batch(trajectory[:, -1], *captions, {"trajectory": trajectory[:, :-1]})
    rows = jnp.ones(len(trajectory))
    loss, grads = compiled_ode()(network("generator"), batch, OdeDraws(index, rows))
    assert_golden(loss, golden[f"out64/{case}/loss"], LOSSES, case)
    assert_gradients(golden, grads, f"{case}/grad_param")


# -- rollouts --------------------------------------------------------------------------------------------------------

ROLLOUTS = {
    "rollout_same_step": {},
    "rollout_per_block": {"same_exit_step": False},
    "rollout_last_step": {"always_last_step": True},
    "rollout_cache_by_end": {"state_from_last_step": True},
}


def recorded_rollout(golden: GoldenFile, case: str) -> RolloutDraws:
    """The recorded draws, each in its place; what is not read is not a number."""
    options = dataclasses.replace(config(), **ROLLOUTS[case])
    start = channels_last(golden["in/noise"])
    frames, last = start.shape[1], len(options.timesteps) - 1
    starts = causal_block_starts(frames, options.block_frames)
    first, *noises = golden.names(f"rng/{case}/")
    exits = exit_steps(
        jnp.asarray(golden[first], jnp.int32),
        len(options.timesteps),
        same_for_all_blocks=options.same_exit_step,
        always_last=options.always_last_step,
    )
    between = np.full((1, last, *start.shape[1:]), np.nan, np.float32)
    context = np.full_like(start, np.nan)
    for begin, end, exit_step in zip(starts, (*starts[1:], frames), exits):
        for step in range(last if options.state_from_last_step else int(exit_step)):
            between[0, step, begin:end] = frames_channels_last(golden[noises.pop(0)])
        context[0, begin:end] = frames_channels_last(golden[noises.pop(0)])
    assert not noises
    return RolloutDraws(jnp.asarray(start), jnp.asarray(between), jnp.asarray(context), exits[None])


@functools.cache
def compiled_rollout(state_from_last_step: bool) -> Any:
    """``(params, captions, draws, probe) -> (sum of output x probe, (output, state)), gradients``"""
    losses = self_forcing(state_from_last_step=state_from_last_step)

    def probed(params, captions, draws, probe):
        video, state = losses.roll_out(params, captions, losses.empty_state(draws.start.shape), draws)
        return (video * probe).sum(), (video, state)

    return jax.jit(jax.value_and_grad(probed, has_aux=True), compiler_options=QUICKLY)


@pytest.mark.parametrize("case", ROLLOUTS)
def test_rollout(golden, case):
    draws, probe = recorded_rollout(golden, case), channels_last(golden["in/probe"])
    run = compiled_rollout(case == "rollout_cache_by_end")
    (_, (video, state)), grads = run(network("generator"), recorded_captions(golden, "y"), draws, probe)
    assert_golden(video, channels_last(golden[f"out64/{case}/output"]), VALUES, case)

    height, width = (
        probe.shape[2] // transformer().config.patch_size[1],
        probe.shape[3] // transformer().config.patch_size[2],
    )
    blocks = draws.exit_step.shape[1]
    slots = [
        recorded_slots(golden, f"out/{case}/cache/chunk{block}/block0", (height, width)) for block in range(blocks)
    ]
    kept = min(config().num_cached_blocks or blocks, blocks)
    for ours, number in ((state.attention.key_value[0], 0), (state.attention.key[0], 1)):
        theirs = np.stack([slot[number] for slot in slots[-kept:]])
        if config().num_cached_blocks is None:
            theirs = theirs.sum(0, keepdims=True)
        assert_golden(ours[-len(theirs) :], theirs, VALUES, f"{case}/slot{number}")
    assert_golden(state.last_frame[0], slots[-1][2], VALUES, f"{case}/slot2")

    times = golden[f"out/{case}/denoised_timestep_from_to"]
    if times[0] >= 0:
        assert tuple(times) == (config().timesteps[0], config().timesteps[int(draws.exit_step[0, 0])])
    assert_gradients(golden, grads, f"{case}/grad_probe")


# -- distribution matching and critic ---------------------------------------------------------------------------------


def recorded_score_draws(golden: GoldenFile, case: str, rollout: RolloutDraws | None = None) -> SelfForcingDraws:
    """The recorded level as the uniform number that gives it, and the recorded noise."""
    level, noise = golden.names(f"rng/{case}/")
    uniform = (golden[level][:, 0] + 0.5) / 1000
    draws = ScoreDraws(jnp.asarray(uniform, jnp.float32), jnp.asarray(frames_channels_last(golden[noise])))
    return SelfForcingDraws(rollout, draws)


def frames_first(video: np.ndarray) -> np.ndarray:
    """(B, T, H, W, C) to (B, T, C, H, W)."""
    return np.moveaxis(np.asarray(video), -1, 2)


@functools.cache
def compiled_matching() -> Any:
    """``(video, trained, real, captions, real captions, draws, mask) -> (loss, parts), gradient``"""
    losses = self_forcing()

    def loss(video, trained, real, captions, real_captions, draws, mask):
        found = losses.matching_losses(trained, real, video, captions, real_captions, draws, mask)
        seen = losses.seen_by_scores(video, draws.score)
        predicted = losses.compare(trained["fake"], real, seen, captions, real_captions)
        return found.loss.mean(), (seen, *predicted, distribution_gradient(video, *predicted))

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)


def trained_networks() -> dict[str, Any]:
    return {"transformer": network("generator"), "fake": network("fake")}


def matching(golden: GoldenFile, case: str, video: Any, mask: np.ndarray | None = None) -> tuple[Any, Any]:
    """Loss and gradient of a video, once its parts are as recorded."""
    draws = recorded_score_draws(golden, case)
    captions, real_captions = (recorded_captions(golden, name) for name in ("y", "y_real"))
    mask = jnp.ones(video.shape) if mask is None else jnp.asarray(mask)
    (loss, (seen, real, fake, (gradient, normalizer))), pull = compiled_matching()(
        video, trained_networks(), network("real"), captions, real_captions, draws, mask
    )
    where = f"out64/{case}"
    frames = np.broadcast_to(np.asarray(seen.timestep)[:, None], golden[f"{where}/timestep"].shape)
    assert_golden(frames, golden[f"{where}/timestep"], TABLES, case)
    for name, ours in {"noisy": seen.noisy, "x0_real": real, "x0_fake": fake, "grad": gradient}.items():
        assert_golden(frames_first(ours), golden[f"{where}/{name}"], VALUES, f"{case}/{name}")
    assert_golden(normalizer, golden[f"{where}/normalizer"].reshape(-1), VALUES, f"{case}/normalizer")
    assert_golden(loss, golden[f"{where}/loss"], LOSSES, case)
    return loss, pull


@pytest.mark.parametrize("case", ["dmd_given_tensor", "dmd_given_tensor_masked_tsschedule"])
def test_matching_of_a_given_video(golden, case):
    mask = frames_channels_last(golden["in/gradient_mask"]) if case.endswith("masked_tsschedule") else None
    _, grad = matching(golden, case, jnp.asarray(frames_channels_last(golden["in/x_gen"])), mask)
    assert_golden(frames_first(grad), golden[f"out64/{case}/grad_image"], GRADIENTS, case, GRADIENT_FLOOR)


def test_matching_of_a_rollout(golden):
    """The whole of a generator's step: rollout, scores, loss, gradients of its parameters."""
    case, losses = "dmd_from_rollout", self_forcing()
    draws = recorded_score_draws(golden, case, recorded_rollout(golden, "rollout_same_step"))
    matching(golden, case, jnp.asarray(channels_last(golden["out/rollout_same_step/output"])))
    own = recorded_captions(golden, "y_real")
    conditions = {"real_prompt_embeds": own.embeds, "real_prompt_attention_mask": own.mask}
    batch = Batch(draws.rollout.start, *recorded_captions(golden, "y"), conditions)

    def loss(trained, real, batch, draws):
        return losses.generator_losses(trained, real, batch, draws).loss.mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), compiler_options=QUICKLY)
    value, grads = value_and_grad(trained_networks(), network("real"), batch, draws)
    assert_golden(value, golden[f"out64/{case}/loss"], LOSSES, case)
    assert_gradients(golden, grads["transformer"], f"{case}/grad_param")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["fake"]))


def test_critic(golden):
    losses, draws = self_forcing(), recorded_score_draws(golden, "critic")
    video = jnp.asarray(frames_channels_last(golden["in/x_gen"]))
    captions = recorded_captions(golden, "y")

    def loss(fake, video, captions, draws):
        found = losses.denoising_losses({"fake": fake}, video, captions, draws).loss.mean()
        seen = losses.seen_by_scores(video, draws.score)
        x0 = losses.score_x0(losses.fake_score, fake, seen, captions)
        return found, (seen, x0, velocity_from_x0(seen.noisy, x0, seen.sigma))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)
    (value, (seen, x0, velocity)), grads = run(network("fake"), video, captions, draws)
    frames = np.broadcast_to(np.asarray(seen.timestep)[:, None], golden["out64/critic/timestep"].shape)
    assert_golden(frames, golden["out64/critic/timestep"], TABLES, "timestep")
    assert_golden(frames_first(seen.noisy), golden["out64/critic/noisy"], VALUES, "noisy")
    assert_golden(frames_first(x0), golden["out64/critic/x0_fake"], VALUES, "x0")
    assert_golden(
        frames_first(velocity).reshape(golden["out64/critic/flow_pred"].shape),
        golden["out64/critic/flow_pred"],
        VALUES,
        "velocity",
    )
    assert_golden(value, golden["out64/critic/loss"], LOSSES, "loss")
    assert_gradients(golden, grads, "critic/grad_param")


def test_the_timestep_of_every_level_is_in_bounds(golden):
    hparams = golden.hparams
    times = score_timestep(jnp.arange(1000), hparams["tshift"], hparams["min_step"], hparams["max_step"])
    assert times.min() == hparams["min_step"]
    assert times.max() == hparams["max_step"]
