from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.chunk_timesteps import (
    ChunkMixture,
    ChunkTimesteps,
    IncrementalTimesteps,
    draw_timesteps,
    first_frame_index,
    process_timesteps,
    sample_timesteps,
)
from sana_jax.diffusion.timesteps import TimestepDensity, density_from_draw, timestep_index
from sana_jax.errors import UserError

STARTS, FRAMES, BATCH = (0, 4, 7, 8), 10, 64
MIXTURE = ChunkMixture(same_t=0.1, incremental=0.4, last_chunk_anchor=0.4, teacher_forcing_clean=0.1)
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def _settings(**settings) -> ChunkTimesteps:
    return ChunkTimesteps(**{"num_frames": FRAMES, "chunk_starts": STARTS, **settings})


def test_counts_are_binomials():
    sampler = IncrementalTimesteps(num_chunks=5, num_levels=7)
    upward = [[math.comb(6 - t + 4 - f, 4 - f) for f in range(5)] for t in range(7)]
    downward = [[math.comb(t + f, f) for f in range(5)] for t in range(7)]
    np.testing.assert_allclose(np.exp(sampler.log_upward), upward, rtol=1e-12)
    np.testing.assert_allclose(np.exp(sampler.log_downward), downward, rtol=1e-12)


def test_counts_of_a_minute_of_video_do_not_overflow():
    table = IncrementalTimesteps(num_chunks=40).log_downward
    np.testing.assert_allclose(table[999, 39], math.log(math.comb(999 + 39, 39)), rtol=1e-12)


@pytest.mark.parametrize("anchor_chunk", [0, 1, 2])
def test_every_sequence_through_the_anchor_is_equally_likely(anchor_chunk):
    sampler, level, count = IncrementalTimesteps(num_chunks=3, num_levels=4), 2, 30_000
    sequences = [s for s in itertools.combinations_with_replacement(range(4), 3) if s[anchor_chunk] == level]
    uniform = jax.random.uniform(jax.random.key(anchor_chunk), (count, 3))
    drawn = np.asarray(sampler.sample(jnp.full(count, anchor_chunk), jnp.full(count, level), uniform))
    found = np.array([(drawn == np.array(s)).all(1).sum() for s in sequences])
    assert found.sum() == count
    expected = count / len(sequences)
    degrees = len(sequences) - 1
    # Chi-squared, five standard deviations above its mean.
    assert ((found - expected) ** 2 / expected).sum() < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("draw", [0.0, float(BELOW_ONE)])
@pytest.mark.parametrize("level", [0, 500, 999])
def test_extreme_draws_stay_among_the_levels_allowed(draw, level):
    chunks = 40
    sampler = IncrementalTimesteps(num_chunks=chunks)
    anchors = jnp.arange(chunks)
    levels = np.asarray(sampler.sample(anchors, jnp.full(chunks, level), jnp.full((chunks, chunks), draw)))
    assert (np.diff(levels, axis=1) >= 0).all()
    assert (levels[np.arange(chunks), np.arange(chunks)] == level).all()
    assert levels.min() >= 0
    assert levels.max() <= 999


def test_float32_agrees_with_float64():
    """Training runs in float32; only draws within rounding of a step of the distribution may fall elsewhere."""
    sampler, batch = IncrementalTimesteps(num_chunks=5), 2000
    rng = np.random.default_rng(0)
    chunk, level = rng.integers(0, 5, batch), rng.integers(0, 1000, batch)
    uniform = rng.uniform(size=(batch, 5)).astype(np.float32)
    in_float32 = np.asarray(sampler.sample(chunk, level, uniform))
    with jax.enable_x64(True):
        in_float64 = np.asarray(sampler.sample(chunk, level, uniform.astype(np.float64)))
    assert (in_float32 != in_float64).mean() < 2e-3
    assert np.abs(in_float32 - in_float64).max() <= 2


def test_strategies_per_sample_and_uniform():
    key = jax.random.key(0)
    per_sample = ChunkTimesteps(num_frames=FRAMES)
    index = sample_timesteps(key, BATCH, per_sample)
    assert index.shape == (BATCH,)
    assert index.dtype == jnp.int32

    uniform = _settings(strategy="uniform")
    draws = draw_timesteps(key, BATCH, uniform)
    frames = process_timesteps(draws, uniform)
    assert frames.shape == (BATCH, FRAMES)
    chunks = timestep_index(density_from_draw(draws.chunks, uniform.density))
    np.testing.assert_array_equal(frames, np.repeat(chunks, [4, 3, 1, 2], axis=1))


@pytest.mark.parametrize("sequence", ["path_counting", "uniform_below"])
def test_incremental_frames_never_decrease(sequence):
    settings = _settings(strategy="incremental", sequence=sequence)
    draws = draw_timesteps(jax.random.key(1), BATCH, settings)
    frames = np.asarray(process_timesteps(draws, settings))
    assert (np.diff(frames, axis=1) >= 0).all()
    assert (np.diff(frames, axis=1) > 0).any()
    anchor = timestep_index(density_from_draw(draws.anchor, settings.density))
    chunk = np.full(BATCH, 3) if sequence == "uniform_below" else draws.anchor_chunk
    np.testing.assert_array_equal(frames[np.arange(BATCH), np.array(STARTS)[chunk]], anchor)


@pytest.mark.parametrize("strategy", ["uniform", "incremental"])
def test_same_timestep_prob_decides_for_the_whole_batch(strategy):
    settings = _settings(strategy=strategy, same_timestep_prob=0.3)
    draws = draw_timesteps(jax.random.key(2), BATCH, settings)
    base = np.asarray(timestep_index(density_from_draw(draws.base, settings.density)))
    same = process_timesteps(draws._replace(same_timestep=jnp.float32(0.2999)), settings)
    np.testing.assert_array_equal(same, np.repeat(base[:, None], FRAMES, 1))
    differing = np.asarray(process_timesteps(draws._replace(same_timestep=jnp.float32(0.3)), settings))
    assert (differing != differing[:, :1]).any()


def test_mixture_modes():
    settings = _settings(strategy="mixture", mixture=MIXTURE)
    draws = draw_timesteps(jax.random.key(3), BATCH, settings)
    anchor = np.asarray(timestep_index(density_from_draw(draws.anchor, settings.density)))

    def frames(mode):
        return np.asarray(process_timesteps(draws._replace(mode=jnp.full(BATCH, mode, jnp.float32)), settings))

    np.testing.assert_array_equal(frames(0.05), np.repeat(anchor[:, None], FRAMES, 1))
    incremental = frames(0.3)
    assert (np.diff(incremental, axis=1) >= 0).all()
    chosen = np.array(STARTS)[np.asarray(draws.anchor_chunk)]
    np.testing.assert_array_equal(incremental[np.arange(BATCH), chosen], anchor)
    last = frames(0.7)
    assert (np.diff(last, axis=1) >= 0).all()
    np.testing.assert_array_equal(last[:, -1], anchor)
    forced = frames(0.95)
    chunk_of_frame = settings.chunk_of_frame
    clean = chunk_of_frame[None] < np.asarray(draws.clean_prefix)[:, None]
    np.testing.assert_array_equal(forced, np.where(clean, 0, last))
    assert clean.any(axis=1).all()
    assert not clean[:, -1].any()


def test_mixture_weights_are_normalised_and_respected():
    settings = _settings(strategy="mixture", mixture=ChunkMixture(same_t=3.0, last_chunk_anchor=1.0))
    np.testing.assert_allclose(settings.mixture.upper_bounds, [0.75, 0.75, 1.0])
    frames = np.asarray(sample_timesteps(jax.random.key(4), 4000, settings))
    same = (frames == frames[:, :1]).all(1).mean()
    assert 0.72 < same < 0.79


def test_mixture_over_a_single_chunk_is_never_cleaned():
    settings = ChunkTimesteps(
        num_frames=3, chunk_starts=(0,), strategy="mixture", mixture=ChunkMixture(teacher_forcing_clean=1.0)
    )
    draws = draw_timesteps(jax.random.key(5), BATCH, settings)
    anchor = timestep_index(density_from_draw(draws.anchor, settings.density))
    np.testing.assert_array_equal(process_timesteps(draws, settings), np.repeat(anchor[:, None], 3, 1))


def test_first_frame_of_image_to_video():
    clean = _settings(strategy="uniform", image_to_video=True)
    plain = _settings(strategy="uniform")
    key = jax.random.key(6)
    frames = sample_timesteps(key, BATCH, clean)
    np.testing.assert_array_equal(frames[:, 0], np.zeros(BATCH))
    np.testing.assert_array_equal(frames[:, 1:], sample_timesteps(key, BATCH, plain)[:, 1:])

    noisy = ChunkTimesteps(num_frames=FRAMES, image_to_video=True, noise_multiplier=0.3)
    first = np.asarray(sample_timesteps(key, 4000, noisy))[:, 0]
    assert first.min() == 0
    assert 290 <= first.max() <= 299
    # The product is rounded to float32 before it is truncated: 0.3 in float32 lies above 0.3.
    assert first_frame_index(jnp.array([0, 3, 10, 999]), 0.3).tolist() == [0, 0, 3, 299]


def test_one_jitted_program_serves_every_step():
    settings = _settings(strategy="mixture", mixture=MIXTURE, image_to_video=True)
    traced = []

    @jax.jit
    def jitted(key):
        traced.append(key)
        return sample_timesteps(key, BATCH, settings)

    for seed in range(2):
        key = jax.random.key(seed)
        np.testing.assert_array_equal(jitted(key), sample_timesteps(key, BATCH, settings))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "random"}, "'random'.*choose one of per_sample"),
        ({"strategy": "uniform", "sequence": "sorted"}, "'sorted'.*choose one of path_counting"),
        ({"strategy": "per_sample"}, "per_sample takes no chunk_starts"),
        ({"strategy": "uniform", "chunk_starts": None}, "chunk_starts=None"),
        ({"strategy": "uniform", "chunk_starts": (1, 4)}, "must begin with 0"),
        ({"strategy": "uniform", "chunk_starts": (0, 4, 4)}, "increase"),
        ({"strategy": "uniform", "chunk_starts": (0, 10)}, "below num_frames=10"),
        ({"strategy": "uniform", "chunk_starts": ()}, "must begin with 0"),
        ({"strategy": "uniform", "num_frames": 0, "chunk_starts": (0,)}, "num_frames=0"),
        ({"strategy": "mixture"}, "needs mixture"),
        ({"strategy": "uniform", "mixture": MIXTURE}, "does not read mixture"),
        ({"strategy": "mixture", "mixture": MIXTURE, "same_timestep_prob": 0.5}, "does not read same_timestep_prob"),
        ({"strategy": "uniform", "sequence": "uniform_below"}, "does not read sequence"),
        ({"strategy": "uniform", "noise_multiplier": 0.5}, "does not read noise_multiplier"),
        ({"strategy": "uniform", "same_timestep_prob": 1.5}, "same_timestep_prob=1.5"),
        ({"strategy": "uniform", "image_to_video": True, "noise_multiplier": 2.0}, "noise_multiplier=2.0"),
        ({"strategy": "uniform", "density": TimestepDensity("logit_normal_trigflow")}, "angles"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        _settings(**settings)


def test_bad_mixtures_and_tables_are_named():
    with pytest.raises(UserError, match="not all 0"):
        ChunkMixture()
    with pytest.raises(UserError, match=r"same_t.*-1"):
        ChunkMixture(same_t=-1.0, incremental=3.0)
    with pytest.raises(UserError, match="num_chunks=0"):
        IncrementalTimesteps(0)
