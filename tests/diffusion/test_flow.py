from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import flow
from sana_jax.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 8.0, 9.95])
def test_shift_keeps_the_ends_and_is_monotone(flow_shift):
    sigma = np.linspace(0.0, 1.0, 101)
    shifted = flow.shift_sigma(sigma, flow_shift)
    assert shifted[0] == 0.0
    np.testing.assert_allclose(shifted[-1], 1.0, rtol=1e-15)
    assert (np.diff(shifted) > 0).all()
    # Shifting divides the odds of data against noise.
    inside = sigma[1:-1]
    odds = (1 - inside) / inside / flow_shift
    np.testing.assert_allclose((1 - shifted[1:-1]) / shifted[1:-1], odds, rtol=1e-10)


def test_shift_keeps_type_and_dtype():
    assert isinstance(flow.shift_sigma(0.5, 3), float)
    assert flow.shift_sigma(np.float32([0.5]), np.float64(3.0)).dtype == np.float32
    assert flow.shift_sigma(jnp.bfloat16(0.5), 3.0).dtype == jnp.bfloat16


def test_tables_without_shift_truncate_below_the_index():
    """1 − (a line from 1 to 0.001) rounds below i/1000 for many i; the truncated timestep is then i − 1."""
    timesteps = flow.training_timesteps(1.0)
    index = np.arange(1000)
    assert timesteps.dtype == np.int32
    assert set((index - timesteps).tolist()) == {0, 1}
    assert int((index - timesteps).sum()) == 144
    np.testing.assert_allclose(flow.training_sigmas(1.0), index / 1000, atol=2e-16)


def test_noise_level_follows_the_index_shape():
    level = jax.jit(lambda index: flow.noise_level(index, 3.0))(jnp.array([[0, 500, 999]]))
    assert level.sigma.shape == level.timestep.shape == (1, 3)
    assert level.sigma.dtype == jnp.float32
    assert level.timestep.dtype == jnp.int32
    np.testing.assert_allclose(level.sigma[0], [0.0, 0.75, 2.997 / 2.998], rtol=1e-6)
    assert level.timestep.tolist() == [[0, 750, 999]]


@pytest.mark.parametrize(
    ("shape", "sigma_shape"), [((2, 4, 5, 3), (2,)), ((2, 6, 4, 5, 3), (2, 6)), ((2, 4, 5, 3), ())]
)
def test_noising_and_its_inverse(rng, shape, sigma_shape):
    x0, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    sigma = rng.uniform(size=sigma_shape).astype(np.float32)
    noisy, velocity = flow.add_noise(x0, noise, sigma), flow.velocity_target(x0, noise)
    flat = np.broadcast_to(sigma.reshape(sigma_shape + (1,) * (len(shape) - len(sigma_shape))), shape)
    np.testing.assert_allclose(noisy, (1 - flat) * x0 + flat * noise, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(flow.x0_from_velocity(noisy, velocity, sigma), x0, atol=2e-6)
    # Its derivative by σ is the velocity.
    _, derivative = jax.jvp(lambda s: flow.add_noise(x0, noise, s), (sigma,), (np.ones_like(sigma),))
    np.testing.assert_allclose(derivative, velocity, atol=1e-6)


def test_half_precision_inputs_are_noised_in_float32(rng):
    x0, noise = jnp.asarray(rng.normal(size=(2, 1, 8, 8, 4)), jnp.bfloat16)
    sigma = jnp.array([0.123])
    noisy = flow.add_noise(x0, noise, sigma)
    assert noisy.dtype == flow.velocity_target(x0, noise).dtype == jnp.float32
    np.testing.assert_array_equal(noisy, flow.add_noise(x0.astype(jnp.float32), noise.astype(jnp.float32), sigma))


def test_loss_is_a_mean_per_sample(rng):
    velocity, target = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    loss = flow.flow_matching_loss(velocity, target)
    np.testing.assert_allclose(loss, ((velocity - target) ** 2).mean((1, 2, 3)), rtol=1e-6)
    assert flow.flow_matching_loss(jnp.bfloat16(velocity), target).dtype == jnp.float32


def test_masked_loss_averages_what_counts(rng):
    velocity, target = rng.normal(size=(2, 3, 5, 2, 2, 4)).astype(np.float32)
    mask = np.ones((3, 5), bool)
    mask[0, 0] = mask[1, 3:] = mask[2] = False
    loss = flow.flow_matching_loss(velocity, target, mask)
    error = ((velocity - target) ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(loss, [error[0, 1:].mean(), error[1, :3].mean(), 0.0], rtol=1e-6)
    elementwise = np.broadcast_to(mask[:, :, None, None, None], velocity.shape)
    np.testing.assert_allclose(flow.flow_matching_loss(velocity, target, elementwise), loss, rtol=1e-6)
    np.testing.assert_allclose(
        flow.flow_matching_loss(velocity, target, np.ones((3, 1, 1, 1, 1))),
        flow.flow_matching_loss(velocity, target),
        rtol=1e-6,
    )
    gradient = jax.grad(lambda v: flow.flow_matching_loss(v, target, mask).sum())(velocity)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[~mask])


def test_errors_name_value_and_shape(rng):
    x = np.zeros((2, 3, 4, 5), np.float32)
    with pytest.raises(UserError, match="flow_shift=0"):
        flow.shift_sigma(0.5, 0)
    with pytest.raises(UserError, match="num_levels=0"):
        flow.training_sigmas(1.0, 0)
    with pytest.raises(UserError, match=r"sigma of shape \(3,\).*\(2, 3, 4, 5\)"):
        flow.add_noise(x, x, np.zeros(3, np.float32))
    with pytest.raises(UserError, match=r"x0 has shape .* noise has shape"):
        flow.add_noise(x, x[:1], 0.5)
    with pytest.raises(UserError, match="velocity has shape"):
        flow.flow_matching_loss(x, x[:, :1])
    with pytest.raises(UserError, match="mask of shape"):
        flow.flow_matching_loss(x, x, np.ones((2, 4)))
