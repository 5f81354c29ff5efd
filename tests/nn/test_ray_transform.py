"""The rays' matrices inside a program beside those of the host, and what the transforms undo."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import camera
from sana_jax.nn import ray_transform
from sana_jax.nn.rope import rope_3d
from tests.parity.sana_wm_oracle import camera as draw_camera

FRAMES, GRID, HEAD = 3, (2, 3), 24


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=str)
def conditions(request):
    size = tuple(side * patch for side, patch in zip(GRID, request.param))
    return request.param, draw_camera(np.random.default_rng(0), 2, FRAMES, size)


def test_matrices_and_map_are_those_of_the_host(conditions):
    patch, numbers = conditions
    rays = ray_transform.ray_transforms(jnp.asarray(numbers), GRID, patch, None, HEAD)
    expected = camera.ray_matrices(numbers, *GRID, patch)
    np.testing.assert_allclose(rays.matrices.reshape(expected.shape), expected, atol=2e-6)
    product = np.einsum("...ij,...jk->...ik", np.asarray(rays.matrices, np.float64), rays.inverses)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(4), product.shape), atol=2e-6)
    assert rays.rotation is None
    size = tuple(side * p for side, p in zip(GRID, patch))
    found = ray_transform.direction_map(jnp.asarray(numbers), *size)
    np.testing.assert_allclose(found, camera.direction_map(numbers, *size), atol=2e-5)


def test_back_from_the_rays(conditions):
    """What P⁻¹ has moved P moves back; Pᵀ and P⁻¹ meet in the relative pose of two rays."""
    patch, numbers = conditions
    x, y = (
        jnp.asarray(np.random.default_rng(seed).standard_normal((2, FRAMES, 6, 2, HEAD)), jnp.float32)
        for seed in (1, 2)
    )
    rotation = rope_3d((FRAMES, *GRID), HEAD)
    rays = ray_transform.ray_transforms(jnp.asarray(numbers), GRID, patch, rotation, HEAD)
    key = ray_transform.key_to_ray(x, rays)
    np.testing.assert_allclose(ray_transform.from_ray(key, rays), x, atol=1e-5)
    bare = rays._replace(rotation=None)
    found = (ray_transform.query_to_ray(y, bare) * ray_transform.key_to_ray(x, bare))[..., : HEAD // 2].sum(-1)
    expected = (x * y)[..., : HEAD // 2].sum(-1)  # a token meets itself as it is
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_half_the_angles_are_the_first_of_every_axis():
    rotation = rope_3d((FRAMES, *GRID), 112)
    half = ray_transform.half_rotation(rotation, 112)
    columns = [*range(10), *range(20, 29), *range(38, 47)]
    np.testing.assert_array_equal(half.cos, rotation.cos[:, np.array(columns)])
    np.testing.assert_array_equal(half.sin, rotation.sin[:, np.array(columns)])


def test_shrinking_never_enlarges():
    rng = np.random.default_rng(0)
    reference = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    found = jax.jit(ray_transform.shrink_to)(reference, reference * jnp.array([[0.5], [1.0], [2.0], [10.0]]))
    np.testing.assert_allclose(found, reference * np.array([[0.5], [1.0], [1.0], [1.0]]), rtol=1e-5)
