"""Flow matching of world models: given first frames, padding, causal blocks, and gradients of the camera's layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import VideoFlowConfig
from configs.world import WorldChunksConfig
from sana_jax.diffusion.flow import noise_level
from sana_jax.errors import UserError
from tests.train import tiny_world
from train.batch import FRAME_VALID, Batch
from train.objectives.flow_matching import FlowMatching
from train.objectives.world import WorldChunkCausal, block_starts
from train.recipes.whole import WholeTransformer
from train.recipes.world import WorldChunkCausalTraining

ROWS, FRAMES = 2000, 13
FLOW = VideoFlowConfig(flow_shift=9.95, image_to_video=0.9)
NULL = jnp.zeros((1, 2, 1)), jnp.ones((1, 2), jnp.int32)


class Recorder:
    """A network that notes its times and predicts zero."""

    def draw(self, seed, step, drop_caption):
        return ()

    def velocity(self, trained, frozen, noisy, timestep, batch, draws):
        self.noisy, self.timestep = noisy, timestep
        return jnp.zeros_like(noisy)


def plain_batch(rows: int = ROWS, frames: int = FRAMES, **conditions) -> Batch:
    latents = np.random.default_rng(0).standard_normal((rows, frames, 1, 1, 1)).astype(np.float32)
    return Batch(latents, np.zeros((rows, 2, 1), np.float32), np.ones((rows, 2), np.int32), conditions)


def test_the_published_mixture_of_levels():
    network = Recorder()
    objective = WorldChunkCausal(network, FLOW, *NULL)
    batch = plain_batch()

    def run(batch):
        draws = objective.draw(3, 7, batch)
        losses = objective.losses(None, None, batch, draws)
        return draws, losses, network.timestep, network.noisy

    draws, losses, network.timestep, network.noisy = jax.jit(run)(batch)
    index, given = np.asarray(draws.index), np.asarray(draws.first_given)
    starts = block_starts(FRAMES, objective.chunks)
    assert starts == (0, 4, 7, 10)
    blocks = index[:, list(starts)]
    np.testing.assert_array_equal(index, np.repeat(blocks, np.diff((*starts, FRAMES)), axis=1))
    assert (np.diff(blocks, axis=1) >= 0).all()
    same = (blocks == blocks[:, :1]).all(1)
    assert same.mean() == pytest.approx(0.1, abs=0.03)
    clean = (blocks[:, 0] == 0) & ~same
    # a tenth has one to three of its four blocks clean; rising levels begin at 0 now and then
    assert 0.09 < clean.mean() < 0.2
    assert given.mean() == pytest.approx(0.9, abs=0.03)
    level = noise_level(draws.index, 9.95)
    expected = np.asarray(level.timestep, np.float32)
    expected[given, 0] = 0
    np.testing.assert_array_equal(network.timestep, expected)
    np.testing.assert_array_equal(network.noisy[given, 0], batch.latents[given, 0])
    counted = np.ones((ROWS, FRAMES))
    counted[given, 0] = 0
    squares = np.square(np.asarray(draws.noise) - batch.latents)[..., 0, 0, 0]
    np.testing.assert_allclose(losses.loss, (squares * counted).sum(1) / counted.sum(1), rtol=1e-5)
    np.testing.assert_allclose(losses.sigma, np.asarray(level.sigma).mean(1), rtol=1e-5)


def test_padding_does_not_count():
    network = Recorder()
    valid = np.arange(FRAMES) < np.array([[13], [5], [1]])
    batch = plain_batch(3, **{FRAME_VALID: valid})
    objective = FlowMatching(network, dataclasses.replace(FLOW, image_to_video=1.0), *NULL)

    def run(batch):
        draws = objective.draw(0, 0, batch)
        return draws, objective.losses(None, None, batch, draws).loss

    draws, loss = jax.jit(run)(batch)
    squares = np.square(np.asarray(draws.noise) - batch.latents)[..., 0, 0, 0]
    np.testing.assert_allclose(loss, [squares[0, 1:].mean(), squares[1, 1:5].mean(), 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"block_frames": 0}, "block-frames 0"), ({"same_t": -0.1}, "same-t -0.1")],
)
def test_chunks_that_are_refused(changes, option):
    with pytest.raises(UserError, match=f"--chunk-causal.{option} is not allowed"):
        WorldChunksConfig(**changes)


@pytest.fixture(scope="module")
def gradients():
    """Of the loss in causal blocks with padding, at parameters as they are drawn; and the loss of other padding."""
    transformer = tiny_world.transformer()
    recipe = WorldChunkCausalTraining(transformer, chunks=WorldChunksConfig(block_frames=3))
    batch = tiny_world.world_batch(0, rows=2)
    valid = np.ones(batch.latents.shape[:2], bool)
    valid[1, -1] = False
    batch = batch._replace(conditions={**batch.conditions, FRAME_VALID: valid})
    null = jnp.zeros((1, *batch.prompt_embeds.shape[1:])), jnp.ones((1, batch.prompt_embeds.shape[1]), jnp.int32)
    objective = WorldChunkCausal(recipe, FLOW, *null, chunks=recipe.chunks)

    def loss(params, batch):
        return objective.losses(params, None, batch, objective.draw(0, 0, batch)).loss.mean()

    graded = jax.jit(jax.value_and_grad(loss))
    initial = jax.jit(lambda: recipe.initialize(jax.random.key(0), None))()
    padded = batch._replace(latents=np.where(valid[..., None, None, None], batch.latents, 9.0))
    return graded(initial, batch), graded(tiny_world.world_params(1), batch), graded(tiny_world.world_params(1), padded)


@pytest.mark.prove
def test_gradients_reach_the_camera(gradients):
    (_, initial), (_, everywhere), _ = gradients
    # what begins at zero is reached at once: the camera's way out, and the embedding of Plücker coordinates' way in
    first = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in _leaves(initial)}
    for block in ("delta_blocks", "softmax_blocks"):
        assert float(jnp.abs(first[f"{block}/attn1/to_out_camera/kernel"]).min(axis=(1, 2)).max()) >= 0
        assert jnp.abs(first[f"{block}/attn1/to_out_camera/kernel"]).max() > 1e-6
    unreached = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in _leaves(everywhere)
        if not jnp.abs(leaf).max() > 0
    ]
    # not used beside Plücker coordinates, and by softmax blocks
    assert all(path.startswith("raymap_embedding") or path.startswith("softmax_blocks") for path in unreached), (
        unreached
    )
    assert not any("camera/kernel" in path and "conv" not in path for path in unreached)
    assert not any("plucker" in path for path in unreached)


@pytest.mark.prove
def test_what_padding_holds_changes_nothing(gradients):
    _, (loss, _), (padded, _) = gradients
    np.testing.assert_allclose(loss, padded, rtol=1e-5)


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_what_a_world_reads_from_a_batch():
    transformer = tiny_world.transformer()
    assert WholeTransformer(transformer).conditions == ("camera_conditions", "chunk_plucker")
    plain = dataclasses.replace(tiny_world.CONFIG, use_chunk_plucker_post_attn=False)
    assert WholeTransformer(transformer.clone(config=plain)).conditions == ("camera_conditions",)
