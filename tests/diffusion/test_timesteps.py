from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax.diffusion.timesteps import (
    DENSITIES,
    TimestepDensity,
    density_from_draw,
    draw_for_density,
    sample_density,
    sample_timestep_index,
    timestep_index,
)
from sana_jax.errors import UserError

ALL = (
    TimestepDensity("uniform"),
    TimestepDensity("logit_normal"),
    TimestepDensity("logit_normal", mean=-0.6, std=1.4),
    TimestepDensity("stretched_logit_normal", mean=0.3, std=0.9, p_low=0.02, p_high=0.98),
    TimestepDensity("mode", mode_scale=1.29),
    TimestepDensity("mode", mode_scale=-0.7),
    TimestepDensity("logit_normal_trigflow", mean=0.2, std=1.6),
)
NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))


def _distribution(u: np.ndarray, density: TimestepDensity) -> np.ndarray:
    """The cumulative distribution of a density at u, in float64, from its definition."""
    cdf = lambda z: NORMAL.cdf(torch.as_tensor(z, dtype=torch.float64)).numpy()  # noqa: E731
    mean, std = density.mean, density.std
    match density.name:
        case "uniform":
            return u
        case "logit_normal":
            return cdf((np.log(u / (1 - u)) - mean) / std)
        case "logit_normal_trigflow":
            return cdf((np.log(density.sigma_data * np.tan(u)) - mean) / std)
        case "stretched_logit_normal":
            low, high = density.p_low, density.p_high
            z = NORMAL.icdf(torch.tensor([low, high], dtype=torch.float64)).numpy() * std + mean
            ends = 1 / (1 + np.exp(-z))
            raw = ends[0] + u * (ends[1] - ends[0])
            return (cdf((np.log(raw / (1 - raw)) - mean) / std) - low) / (high - low)
        case "mode":
            # u falls as r rises, so P(U <= u) = 1 − r(u); solve by interpolation on a fine grid.
            r = np.linspace(0, 1, 200_001)
            grid = 1 - r - density.mode_scale * (np.cos(np.pi * r / 2) ** 2 - 1 + r)
            return 1 - np.interp(u, grid[::-1], r[::-1])


@pytest.mark.parametrize("density", ALL, ids=str)
def test_samples_follow_the_density(density):
    count = 20_000
    u = np.sort(np.asarray(sample_density(jax.random.key(1), (count,), density), np.float64))
    expected = _distribution(u, density)
    statistic = np.abs(expected - (np.arange(count) + 0.5) / count).max()
    assert statistic < 1.63 / np.sqrt(count)  # Kolmogorov and Smirnov, 1 %


def test_every_density_is_tried():
    assert {density.name for density in ALL} == set(DENSITIES)


@pytest.mark.parametrize("density", ALL, ids=str)
def test_sampling_is_drawing_then_transforming(density):
    key = jax.random.key(3)
    sample = jax.jit(sample_density, static_argnums=(1, 2))(key, (2, 7), density)
    assert sample.shape == (2, 7)
    assert sample.dtype == jnp.float32
    draw = draw_for_density(key, (2, 7), density)
    np.testing.assert_allclose(sample, density_from_draw(draw, density), rtol=1e-5, atol=1e-6)


def test_index_is_the_floor_within_the_table():
    u = jnp.array([-1e-7, 0.0, 0.000999, 0.001, 0.5, 0.9999999, 1.0])
    assert timestep_index(u).tolist() == [0, 0, 0, 1, 500, 999, 999]
    assert timestep_index(jnp.array([0.99]), num_levels=10).tolist() == [9]
    assert timestep_index(u).dtype == jnp.int32


def test_ends_of_the_draw_stay_in_the_table():
    uniform = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    cut = density_from_draw(uniform, TimestepDensity("stretched_logit_normal", p_low=0.02, p_high=0.98))
    np.testing.assert_allclose(cut, [0.0, 1.0], atol=1e-6)
    assert timestep_index(cut).tolist() == [0, 999]
    # Nothing cut off: the plain logit-normal, whose quantile at 1 − 2^−24 is 5.29 standard deviations.
    whole = density_from_draw(uniform, TimestepDensity("stretched_logit_normal", p_low=0.0, p_high=1.0))
    np.testing.assert_allclose(whole, [0.0, 1 / (1 + np.exp(-5.2932))], atol=1e-5)


def test_indices_depend_on_the_key_alone():
    density = TimestepDensity()
    first, again = (sample_timestep_index(jax.random.key(5), (64,), density) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != sample_timestep_index(jax.random.key(6), (64,), density)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gaussian"}, "gaussian.*choose one of uniform"),
        ({"name": "uniform", "mean": 1.0}, "mean=1.0 is not read"),
        ({"name": "logit_normal", "p_low": 0.1}, "p_low=0.1 is not read"),
        ({"name": "logit_normal", "std": 0.0}, "std=0.0"),
        ({"name": "stretched_logit_normal"}, "p_low=None"),
        ({"name": "stretched_logit_normal", "p_low": 0.9, "p_high": 0.1}, "p_low=0.9"),
        ({"name": "mode"}, "mode_scale.*None"),
        ({"name": "mode", "mode_scale": 2.0}, "2.0"),
        ({"name": "logit_normal_trigflow", "sigma_data": 0.0}, "sigma_data=0.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        TimestepDensity(**settings)


def test_angles_are_refused_as_indices():
    with pytest.raises(UserError, match="angles"):
        sample_timestep_index(jax.random.key(0), (2,), TimestepDensity("logit_normal_trigflow"))
