"""Rotary positions of video tokens: beside diffusers' tables, at offsets known and traced, and beyond the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_sana_video import WanRotaryPosEmbed

from kernels.linear_attention.rotation import rotate_pairs
from sana_jax.errors import UserError
from sana_jax.nn.rope import axis_channels, check_positions, rope_3d

GRID = (3, 5, 4)


def theirs(head_dim: int, grid: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (N, d/2) of diffusers' tables, which repeat every value."""
    embedding = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    frames, rows, columns = grid
    cos, sin = embedding(torch.zeros(1, 1, frames, 2 * rows, 2 * columns))
    return cos[0, :, 0, 0::2].numpy(), sin[0, :, 0, 1::2].numpy()


@pytest.mark.parametrize("head_dim", [112, 16, 10])
def test_tables(head_dim):
    for found, expected in zip(rope_3d(GRID, head_dim), theirs(head_dim, GRID)):
        assert found.dtype == jnp.float32
        # NumPy's and PyTorch's float64 powers differ in the last place, and so do a few of the rounded cosines
        np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)


def test_channels_of_the_axes():
    assert axis_channels(112) == (40, 36, 36)
    assert axis_channels(16) == (8, 4, 4)


@pytest.mark.parametrize("first_frame", [0, 7, 1021])
def test_offsets_are_positions_in_the_whole_video(first_frame):
    whole = rope_3d((1024, 2, 3), 16)
    tokens = slice(first_frame * 6, (first_frame + 3) * 6)
    known = rope_3d((3, 2, 3), 16, first_frame=first_frame)
    traced = jax.jit(lambda first: rope_3d((3, 2, 3), 16, first_frame=first))(first_frame)
    for expected, *found in zip(whole, known, traced):
        for table in found:
            np.testing.assert_array_equal(table, expected[tokens])


@pytest.mark.parametrize("first_frame", [1022, 5000, -1])
def test_a_traced_position_beyond_the_table_gives_nan(first_frame):
    cos, _ = jax.jit(lambda first: rope_3d((3, 2, 3), 16, first_frame=first))(first_frame)
    inside = [0 <= first_frame + frame < 1024 for frame in range(3)]
    assert [bool(np.isfinite(frame).all()) for frame in cos.reshape(3, -1)] == inside
    # only the frame's channels know
    assert np.isfinite(cos[:, 4:]).all()


@pytest.mark.parametrize(
    ("first_frame", "grid", "message"),
    [
        (1022, (3, 2, 3), "1025 frames of tokens exceed the 1024 rotary positions"),
        (0, (1025, 2, 3), "1025 frames"),
        (0, (1, 2000, 3), "2000 rows"),
        (0, (1, 2, 1030), "1030 columns"),
        (-1, (1, 2, 3), "first_frame=-1"),
    ],
)
def test_a_known_position_beyond_the_table_is_refused(first_frame, grid, message):
    for refuse in (
        lambda: rope_3d(grid, 16, first_frame=first_frame),
        lambda: check_positions(first_frame, grid, 1024),
    ):
        with pytest.raises(UserError, match=message):
            refuse()


def test_another_length_of_the_table():
    with pytest.raises(UserError, match="the 8 rotary positions"):
        rope_3d((3, 2, 3), 16, first_frame=6, max_positions=8)


def test_rotation_keeps_lengths_and_depends_on_differences():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 2, 16)), jnp.float32) for _ in range(2))

    def product(position: int, distance: int) -> np.ndarray:
        turned = [
            rotate_pairs(x, *rope_3d((1, 1, 1), 16, first_frame=p))
            for x, p in ((query, position), (key, position + distance))
        ]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(query), rtol=1e-6)
        return np.asarray((turned[0] * turned[1]).sum(-1))

    np.testing.assert_allclose(product(3, 5), product(40, 5), atol=2e-5)
    assert np.abs(product(3, 5) - product(3, 6)).max() > 0.1
