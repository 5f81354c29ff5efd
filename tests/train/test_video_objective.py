"""Flow matching of clips: what a given first frame changes, and what not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import load_preset
from configs.lora import LoraConfig
from configs.schema import FlowConfig, VideoFlowConfig
from sana_jax.diffusion.flow import noise_level
from sana_jax.models.sana_video import SanaVideoConfig
from tests.train.tiny_run import QUICKLY
from train.batch import Batch
from train.objectives.flow_matching import FlowMatching
from train.recipes import make_recipe
from train.recipes.whole import WholeTransformer

NETWORK = SanaVideoConfig(
    in_channels=1,
    out_channels=1,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=4,
    sample_size=2,
)
SHAPE = (6, 3, 4, 4, 1)


class Spy:
    """Stands in for the network and keeps what it is told."""

    config = NETWORK

    def apply(self, variables, noisy, embeds, timestep, encoder_attention_mask):
        self.noisy, self.timestep = noisy, timestep
        return jnp.zeros_like(noisy)


def batch(*shape: int) -> Batch:
    latents = np.random.default_rng(0).normal(size=shape or SHAPE).astype(np.float32)
    rows = latents.shape[0]
    return Batch(latents, np.ones((rows, 2, 4), np.float32), np.ones((rows, 2), np.int32))


def objective(share: float | None, recipe=None) -> FlowMatching:
    flow = FlowConfig() if share is None else VideoFlowConfig(image_to_video=share)
    null = jnp.zeros((1, 2, 4)), jnp.ones((1, 2), jnp.int32)
    return FlowMatching(WholeTransformer(Spy()) if recipe is None else recipe, flow, *null)


def test_a_given_first_frame_is_clean_at_time_0_and_not_in_the_loss():
    whole, clips = objective(0.5), batch()
    draws = whole.draw(0, 0, clips)
    given = np.asarray([True, False, True, False, False, True])
    loss, sigma = whole.losses({}, None, clips, draws._replace(first_given=jnp.asarray(given)))
    spy, level = whole.recipe.transformer, noise_level(draws.index, 3.0)
    times = np.repeat(np.asarray(level.timestep, np.float32)[:, None], 3, axis=1)
    times[given, 0] = 0
    np.testing.assert_array_equal(spy.timestep, times)
    np.testing.assert_array_equal(spy.noisy[given, 0], clips.latents[given, 0])
    assert np.abs(np.asarray(spy.noisy)[~given, 0] - clips.latents[~given, 0]).max() > 0.1
    squared = np.square(np.asarray(draws.noise) - clips.latents).mean((2, 3, 4))
    expected = np.where(given, squared[:, 1:].mean(1), squared.mean(1))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(sigma, level.sigma)  # of the clip, by which losses are reported


@pytest.mark.parametrize("share", [None, 0.0])
def test_without_given_frames_a_clip_has_one_time(share):
    plain = objective(share)
    draws = plain.draw(0, 0, batch())
    assert draws.first_given is None
    plain.losses({}, None, batch(), draws)
    assert plain.recipe.transformer.timestep.shape == (6,)


def test_the_share_of_given_frames_and_pictures_among_clips():
    drawn = objective(0.3).draw(1, 2, batch(4000, 2, 1, 1, 1))
    assert float(np.mean(drawn.first_given)) == pytest.approx(0.3, abs=0.03)
    assert objective(0.3).draw(1, 2, batch(4, 1, 2, 2, 1)).first_given is None
    # nothing else that is random moves with it
    without = objective(0.0).draw(1, 2, batch(4000, 2, 1, 1, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, drawn._replace(first_given=None), without))


def test_lora_dropout_with_a_time_for_every_frame():
    config = dataclasses.replace(
        load_preset("lora_video"), transformer=NETWORK, lora=LoraConfig(2, dropout=0.5, targets=("all_linear",))
    )
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="float32", remat="none"))
    recipe = make_recipe(config)
    shapes = jax.eval_shape(lambda: WholeTransformer(recipe.transformer).initialize(jax.random.key(0), None))
    rng = np.random.default_rng(1)
    base = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, recipe.initialize(jax.random.key(0), base))
    flow = objective(0.5, recipe)
    draws = flow.draw(0, 0, batch())
    losses = jax.jit(flow.losses, compiler_options=QUICKLY)
    whole = losses(trained, base, batch(), draws).loss
    # a sample's dropout is its own: two halves of the batch give what the whole gives
    for part in (slice(0, 3), slice(3, 6)):
        some = jax.tree.map(lambda array, part=part: array[part], (batch(), draws))
        np.testing.assert_allclose(losses(trained, base, *some).loss, whole[part], rtol=2e-5)
    other = draws._replace(network=flow.draw(0, 1, batch()).network)
    assert np.abs(losses(trained, base, batch(), other).loss - whole).max() > 1e-4
