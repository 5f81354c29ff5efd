"""The loss at fixed noise levels: its value, and that its noise depends on nothing but seed and sample."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import load_preset
from configs.longsana import ChunkCausalConfig
from sana_jax.errors import UserError
from tests.simulated_devices import simulated_devices
from train.batch import Batch
from train.evaluation.validation_loss import sample_losses, validation_losses, validation_noise
from train.validation import gives_first

ROOT = Path(__file__).parents[3]
SIGMAS = (0.1, 0.57, 0.9)
SHAPE = (4, 6, 2)


def batch(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    latents, embeds = (rng.standard_normal((rows, *shape)).astype(np.float32) for shape in (SHAPE, (3, 5)))
    return Batch(latents, embeds, np.ones((rows, 3), np.int32))


def rows_of(batch: Batch, rows) -> Batch:
    return Batch(*(array[rows] for array in batch[:3]))


def network(noisy, timestep, batch):
    """Depends on everything that it is given."""
    told = timestep[:, None, None, None] / 1000 + batch.prompt_embeds.mean(axis=(1, 2))[:, None, None, None]
    return jnp.sin(noisy) * told


def test_value_by_hand():
    given = batch(3)
    noise = np.asarray(validation_noise(4, jnp.arange(3), SHAPE))
    expected = np.zeros((3, 3))
    for level, (sigma, timestep) in enumerate(zip(SIGMAS, (100, 570, 900))):
        noisy = (1 - sigma) * np.asarray(given.latents) + sigma * noise
        velocity = np.asarray(network(jnp.asarray(noisy), jnp.full(3, timestep), given))
        expected[level] = ((velocity - (noise - np.asarray(given.latents))) ** 2).mean(axis=(1, 2, 3))
    found = sample_losses(network, given, SIGMAS, 4)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(validation_losses(network, given, SIGMAS, 4), expected.mean(axis=1), rtol=1e-5)


def test_a_perfect_network_has_no_loss():
    given = batch(2)
    noise = validation_noise(0, jnp.arange(2), SHAPE)
    losses = validation_losses(lambda noisy, timestep, batch: noise - batch.latents, given, SIGMAS, 0)
    np.testing.assert_array_equal(losses, np.zeros(3))


def test_the_network_is_told_the_training_timestep():
    told = []
    with jax.disable_jit():
        sample_losses(lambda noisy, timestep, batch: told.append(timestep) or noisy, batch(1), (0.29, 0.5, 0.9999), 0)
    assert [int(each[0]) for each in told] == [290, 500, 999]


def test_noise_is_the_samples_own():
    """A sample's loss does not change with the batch, its size or its order, nor with what only fills the batch."""
    given = batch(6)
    whole = np.asarray(sample_losses(network, given, SIGMAS, 7))
    some = np.array([4, 1])
    part = np.asarray(sample_losses(network, rows_of(given, some), SIGMAS, 7, indices=jnp.asarray(some)))
    np.testing.assert_allclose(part, whole[:, some], rtol=1e-6)
    noise = validation_noise(7, jnp.arange(6), SHAPE)
    np.testing.assert_array_equal(validation_noise(7, jnp.asarray(some), SHAPE), noise[some])
    assert not np.array_equal(validation_noise(8, jnp.arange(6), SHAPE), noise)
    assert abs(float(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1])) < 0.5

    filled = given._replace(latents=np.where(np.arange(6)[:, None, None, None] < 4, given.latents, np.nan))
    counted = jnp.array([1, 1, 1, 1, 0, 0])
    found = validation_losses(network, filled, SIGMAS, 7, counted=counted)
    np.testing.assert_allclose(found, whole[:, :4].mean(axis=1), rtol=1e-6)
    assert np.asarray(validation_losses(network, filled, SIGMAS, 7, counted=jnp.zeros(6))).tolist() == [0, 0, 0]


def test_jit_is_the_same_and_compiles_the_network_once():
    calls = []

    def counting(noisy, timestep, given):
        calls.append(noisy.shape)
        return network(noisy, timestep, given)

    given = batch(3)
    jitted = jax.jit(lambda latents, embeds, mask: validation_losses(counting, Batch(latents, embeds, mask), SIGMAS, 4))
    found = jitted(*given[:3])
    assert calls == [(3, *SHAPE)]
    np.testing.assert_allclose(found, validation_losses(network, given, SIGMAS, 4), rtol=1e-6)


DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.train.evaluation.test_validation_loss import SHAPE, SIGMAS, batch, network
from train.batch import Batch
from train.evaluation.validation_loss import sample_losses
mesh = jax.make_mesh((4,), ("data",))
given = batch(8)
expected = sample_losses(network, given, SIGMAS, 4)
cut = jax.device_put(given[:3], NamedSharding(mesh, PartitionSpec("data")))
found = jax.jit(lambda *arrays: sample_losses(network, Batch(*arrays), SIGMAS, 4))(*cut)
assert len(cut[0].sharding.device_set) == 4
np.testing.assert_allclose(found, expected, rtol=1e-6)
"""


def test_the_same_on_four_devices():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": simulated_devices(4)}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sigmas", [(), (0.0,), (0.5, 1.0), (-0.1,), (float("nan"),)])
def test_levels_that_are_not_allowed(sigmas):
    with pytest.raises(UserError, match="noise level"):
        validation_losses(network, batch(1), sigmas, 0)


@pytest.mark.parametrize(
    ("preset", "given"),
    [("digits", False), ("moving_digits", False), ("sana_wm_2b_chunk_causal", True), ("longsana_chunk_causal", False)],
)
def test_the_first_frame_is_given_where_training_gives_it(preset, given):
    assert gives_first(load_preset(preset)) == given


def test_the_first_frame_is_given_in_causal_blocks_that_are_trained_so():
    config = load_preset("longsana_chunk_causal")
    chunks = dataclasses.replace(config.chunk_causal, image_to_video=True)
    assert isinstance(chunks, ChunkCausalConfig)
    assert gives_first(dataclasses.replace(config, chunk_causal=chunks))
