from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.trigflow import flow_input, sigma_from_angle, trigflow_velocity

SIGMA_DATA = 0.5


def test_levels_of_the_published_angles():
    # 1.5708 is a little more than π/2, so its level is a little more than 1.
    np.testing.assert_allclose(sigma_from_angle(jnp.array([1.5708, 1.3, 0.0])), [1.0000037, 0.78270799, 0.0], rtol=2e-7)


@pytest.mark.parametrize("angles", [(0.0, 0.4), (1.3, 1.5)])
def test_a_perfect_flow_network_is_a_perfect_trigflow_network(angles):
    """On a pair of data and noise the flow velocity noise − x0 must become cos(t)·z − sin(t)·x0."""
    data, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 5))
    angle = jnp.array(angles)
    broadcast = angle[:, None, None, None]
    x0, z = data * SIGMA_DATA, noise * SIGMA_DATA
    latents = jnp.cos(broadcast) * x0 + jnp.sin(broadcast) * z
    network_input = flow_input(latents, angle, SIGMA_DATA)
    sigma = sigma_from_angle(angle)[:, None, None, None]
    np.testing.assert_allclose(network_input, (1 - sigma) * data + sigma * noise, atol=2e-6)
    velocity = trigflow_velocity(network_input, noise - data, angle, SIGMA_DATA)
    np.testing.assert_allclose(velocity, jnp.cos(broadcast) * z - jnp.sin(broadcast) * x0, atol=2e-6)


def test_results_are_float32():
    latents = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    network_input = flow_input(latents, jnp.array([1.3]), SIGMA_DATA)
    assert network_input.dtype == jnp.float32
    assert trigflow_velocity(network_input, latents, jnp.float32(1.3), SIGMA_DATA).dtype == jnp.float32
