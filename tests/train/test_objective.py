from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import FlowConfig
from sana_jax import UserError
from tests.train.tiny_run import TinyRun, tiny_config, tiny_run
from train.batch import Batch
from train.randomness import stream
from train.recipes.whole import WholeTransformer


@pytest.fixture(scope="module")
def run() -> TinyRun:
    return tiny_run(tiny_config())


def blank(*shape: int) -> Batch:
    """A batch of which only the latents' shape matters."""
    return Batch(np.zeros(shape, np.float32), np.zeros((shape[0], 1, 1)), np.ones((shape[0], 1), int))


def spied(objective, spy):
    """The objective with the spy for its network."""
    return dataclasses.replace(objective, recipe=WholeTransformer(spy))


class Spy:
    """Stands in for the network and keeps what it is told."""

    def __init__(self, config):
        self.config = config

    def apply(self, variables, noisy, embeds, timestep, encoder_attention_mask):
        self.noisy, self.embeds, self.timestep, self.mask = noisy, embeds, timestep, encoder_attention_mask
        return jnp.zeros_like(noisy)


def test_streams_are_functions_of_seed_step_and_name():
    def numbers(*arguments):
        return np.asarray(jax.random.key_data(stream(*arguments))).tolist()

    base = numbers(1, 2, "noise")
    assert numbers(1, 2, "noise") == base
    assert numbers(1, jnp.int32(2), "noise") == base
    assert np.asarray(jax.jit(lambda step: jax.random.key_data(stream(1, step, "noise")))(2)).tolist() == base
    assert (
        len({tuple(numbers(*a)) for a in [(1, 2, "noise"), (2, 1, "noise"), (1, 3, "noise"), (1, 2, "timestep")]}) == 4
    )


def test_draws_repeat_at_the_same_step_and_differ_at_another(run):
    batch = blank(16, 8, 8, 1)
    one, again, other = (run.objective.draw(0, step, batch) for step in (5, 5, 6))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, again))
    assert not np.array_equal(one.index, other.index)
    assert not np.array_equal(one.noise, other.noise)
    assert not np.array_equal(one.noise, run.objective.draw(1, 5, batch).noise)


def test_the_noise_is_standard_normal(run):
    noise = np.asarray(run.objective.draw(0, 0, blank(2000, 8, 8, 1)).noise, np.float64)
    count = noise.size
    assert abs(noise.mean()) < 4 / np.sqrt(count)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / count)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_captions_are_dropped_at_the_configured_rate(run, rate):
    objective = dataclasses.replace(run.objective, config=FlowConfig(caption_dropout=rate))
    drawn = np.concatenate([objective.draw(0, step, blank(4000, 1, 1, 1)).drop_caption for step in range(3)])
    assert abs(drawn.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(drawn))


def test_a_dropped_caption_becomes_the_encoding_of_no_text_and_its_mask(run):
    spy = Spy(run.config.transformer)
    objective = spied(run.objective, spy)
    batch = next(run.loader)
    draws = objective.draw(0, 0, batch)
    drop = np.arange(16) % 3 == 0
    objective.losses({}, None, batch, draws._replace(drop_caption=drop))
    null_embeds, null_mask = map(np.asarray, (objective.null_embeds, objective.null_mask))
    for row in range(16):
        embeds, mask = (
            (null_embeds[0], null_mask[0])
            if drop[row]
            else (batch.prompt_embeds[row], batch.prompt_attention_mask[row])
        )
        assert np.array_equal(spy.embeds[row], embeds)
        assert np.array_equal(spy.mask[row], mask)
    assert not np.array_equal(null_mask[0], batch.prompt_attention_mask[0])


def test_the_network_is_told_the_timestep_times_its_scale(run):
    batch = next(run.loader)
    draws = run.objective.draw(0, 0, batch)
    told = []
    for scale in (1.0, 0.001):
        spy = Spy(dataclasses.replace(run.config.transformer, timestep_scale=scale))
        spied(run.objective, spy).losses({}, None, batch, draws)
        told.append(np.asarray(spy.timestep))
    assert told[0].max() > 100
    np.testing.assert_allclose(told[1], told[0] / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    "flow",
    [FlowConfig(density="uniform", logit_mean=1.0), FlowConfig(density="mode"), FlowConfig(p_low=0.1)],
)
def test_settings_that_the_density_does_not_read(run, flow):
    with pytest.raises(UserError):
        _ = dataclasses.replace(run.objective, config=flow).density


def test_the_density_decides_the_levels(run):
    batch = blank(20000, 1, 1, 1)

    def mean(**settings):
        objective = dataclasses.replace(run.objective, config=FlowConfig(**settings))
        return float(np.asarray(objective.draw(0, 0, batch).index).mean()) / 1000

    assert mean(density="uniform") == pytest.approx(0.5, abs=0.01)
    assert mean(density="logit_normal", logit_mean=1.0) == pytest.approx(0.697, abs=0.01)
