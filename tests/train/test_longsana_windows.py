"""Self-forcing on windows of a growing video: which there are, what one leaves for the next, and whose step counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.longsana import SelfForcingConfig, StreamConfig
from configs.schema import EmaConfig, OptimizerConfig
from sana_jax import UserError
from tests.train.tiny_run import tiny_config
from tests.train.toy_generator import (
    CHANNELS,
    HEIGHT,
    NEGATIVE,
    PARAMS,
    REAL,
    ROWS,
    TRAINED,
    WIDTH,
    ToyState,
    batch_of,
    empty,
    quickly,
    self_forcing,
    toy_block,
    toy_score,
)
from train.longsana_step import SelfForcingSteps, stream_tree
from train.objectives.longsana.networks import Captions
from train.objectives.longsana.rollout import RolloutDraws
from train.objectives.longsana.self_forcing import SelfForcing
from train.objectives.longsana.streaming import StreamingSelfForcing
from train.objectives.longsana.windows import Windows, history_after
from train.phases import Phase, PhaseOptimizers, steps_of
from train.state import TrainState


def test_the_published_windows():
    c, block = StreamConfig(), SelfForcingConfig().block_frames
    windows = Windows(c.total_frames, c.window_frames, c.overlap_frames, block)
    assert (windows.count, windows.new_frames) == (13, 20)
    firsts = [int(windows.first_frame(step)) for step in range(15)]
    assert firsts == [0, *range(21, 261, 20), 0, 21]
    assert [windows.is_first(step) for step in (0, 1, 12, 13)] == [True, False, False, True]
    assert windows.gradient_mask(first=True).tolist() == [True] * 21
    assert windows.gradient_mask(first=False).tolist() == [False] + [True] * 20
    assert int(jax.jit(windows.first_frame)(jnp.int32(14))) == 21


@pytest.mark.parametrize(
    ("total", "critic_steps", "skipped"),
    [(261, 5, 0), (241, 5, 1), (121, 5, 1), (61, 5, 2), (41, 5, 3), (21, 5, 0), (261, 12, 1), (261, 1, 0), (41, 1, 1)],
)
def test_the_generator_gets_every_window_alike(total, critic_steps, skipped):
    windows, cycle = Windows(total, 21, 1, 10), SelfForcingConfig(critic_steps=critic_steps).cycle
    assert windows.skipped_turns(len(cycle)) == skipped
    kinds = windows.kinds_of_steps(cycle)
    for start in (0, 3 * len(kinds)):  # a run's steps take them again and again
        own = [
            step % windows.count for step in range(start, start + len(kinds)) if kinds[step % len(kinds)] != "critic"
        ]
        assert sorted(own) == list(range(windows.count))  # once each in as many videos as a cycle is long
    if not skipped:
        assert kinds == tuple(cycle[step % len(cycle)] for step in range(len(kinds)))


def test_steps_on_windows_are_four_programs_in_the_order_of_kinds(monkeypatch):
    made = []

    def on_window(steps, streaming, phase, optimizers, first):
        made.append((phase.name, first))
        return made[-1]

    monkeypatch.setattr(SelfForcingSteps, "_on_window", on_window)
    windows, settings = Windows(121, 21, 1, 10), SelfForcingConfig(stream=StreamConfig(121))
    phases = [Phase(name, (), OptimizerConfig(), 1) for name in ("generator", "critic")]
    steps = SelfForcingSteps(settings, None).on_windows(SimpleNamespace(windows=windows), PhaseOptimizers(phases, {}))
    kinds = windows.kinds_of_steps(settings.cycle)
    assert steps == tuple((kind, step % 6 == 0) for step, kind in enumerate(kinds))
    assert (len(made), len(steps)) == (4, 36)
    assert steps.count(("generator", True)) == 1
    assert steps.count(("generator", False)) == 5


def test_schedules_end_with_the_steps_of_their_kind():
    windows, cycle = Windows(41, 21, 1, 10), SelfForcingConfig().cycle
    kinds = windows.kinds_of_steps(cycle)
    assert [step for step, kind in enumerate(kinds) if kind == "generator"] == [0, 3]
    steps = {number: steps_of(SimpleNamespace(steps=number), kinds, "generator") for number in (1, 4, 12, 16)}
    assert steps == {1: 1, 4: 2, 12: 2, 16: 4}
    assert steps_of(SimpleNamespace(steps=7), cycle, "critic") == 6  # 5 of 6, rounded up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((261, 22, 1, 10), "no whole blocks of 10; take 11 or 21"), ((250, 21, 1, 10), "take 241 or 261")],
)
def test_windows_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        Windows(*arguments)


def test_history_is_the_last_frames():
    history, new = jnp.arange(5.0).reshape(1, 5, 1, 1, 1), jnp.arange(5.0, 9.0).reshape(1, 4, 1, 1, 1)
    assert history_after(history, new).ravel().tolist() == [4, 5, 6, 7, 8]
    assert history_after(history, new[:, :2]).ravel().tolist() == [2, 3, 4, 5, 6]


def picture_of(autoencoder, history):
    return autoencoder * history[:, -1:]


@pytest.fixture(scope="module")
def streaming() -> StreamingSelfForcing:
    return StreamingSelfForcing(self_forcing(), Windows(13, 5, 1, 2), picture_of)


def test_windows_of_a_stream_are_one_long_video(streaming):
    """Three windows are the rollout of 13 frames; prompts of later batches wait for the next video."""
    frozen, shape = {"autoencoder": jnp.float32(2.0)}, (ROWS, 5, HEIGHT, WIDTH, CHANNELS)
    batches = [batch_of(5, caption) for caption in (0.3, 0.9, -0.9)]
    draws = [streaming.draw("critic", 0, step, batches[0], first=step == 0) for step in range(3)]
    stream, videos, masks = streaming.init_stream(batch_of(5, 7.0)), [], []
    run = quickly(
        lambda stream, batch, draws, step, first: streaming.next_window(
            PARAMS, frozen, stream, batch, draws, step, first=first
        ),
        static_argnums=4,
    )
    for step in range(3):
        before = stream
        first = step == 0
        video, mask, stream = run(stream, batches[step], draws[step], jnp.int32(step), first)
        assert video.shape == shape
        if step:
            np.testing.assert_allclose(video[:, :1], 2.0 * before.history[:, -1:], rtol=1e-6)
        videos.append(np.asarray(video)[np.asarray(mask)].reshape(ROWS, -1, *shape[2:]))
        masks.append(mask)
    assert [int(mask.sum()) for mask in masks] == [10, 8, 8]
    # the exit step is drawn for each window
    exits = jnp.concatenate([d.rollout.exit_step for d in draws], axis=1)
    joined = [jnp.concatenate(parts, axis=a) for a, parts in zip((1, 2, 1), zip(*(d.rollout[:3] for d in draws)))]
    captions = Captions(batches[0].prompt_embeds, batches[0].prompt_attention_mask)
    whole, state = quickly(lambda d: streaming.losses.roll_out(PARAMS, captions, empty(shape), d))(
        RolloutDraws(*joined, exits)
    )
    np.testing.assert_allclose(np.concatenate(videos, axis=1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream.state.total, state.total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stream.history, whole[:, -5:], rtol=1e-5, atol=1e-6)
    # a new video forgets the old one
    again = run(stream, batches[0], draws[0], jnp.int32(3), True)
    np.testing.assert_allclose(again.video, videos[0], rtol=1e-6)


def test_losses_on_a_window_leave_the_picture_out_and_hand_the_stream_on(streaming):
    batch, step = batch_of(5), jnp.int32(1)
    stream = streaming.init_stream(batch)._replace(history=jnp.asarray(batch.latents))
    trained, frozen = {**TRAINED, "stream": stream}, {"real": REAL, "autoencoder": jnp.float32(2.0)}
    draws = streaming.draw("generator", 0, step, batch, first=False)
    window = quickly(lambda s: streaming.next_window(PARAMS, frozen, s, batch, draws, step, first=False))(stream)
    generator = quickly(lambda t: streaming.generator_losses(t, frozen, batch, draws, step, first=False))(trained)
    captions = Captions(batch.prompt_embeds, batch.prompt_attention_mask)
    losses = streaming.losses
    expected = losses.matching_losses(TRAINED, REAL, window.video, captions, captions, draws, window.mask)
    unmasked = losses.matching_losses(TRAINED, REAL, window.video, captions, captions, draws)
    np.testing.assert_allclose(generator.losses.loss, expected.loss, rtol=1e-6)
    assert not np.allclose(generator.losses.loss, unmasked.loss)
    critic = quickly(lambda t: streaming.critic_losses(t, frozen, batch, draws, step, first=False))(trained)
    expected = losses.denoising_losses(TRAINED, window.video, captions, draws, window.mask)
    np.testing.assert_allclose(critic.losses.loss, expected.loss, rtol=1e-6)
    for found in (generator, critic):
        np.testing.assert_allclose(found.stream.history[:, -4:], window.video[:, 1:], rtol=1e-6)
        assert found.stream.state.passes == 2


class ToySums(NamedTuple):
    """In the shape that checkpoints hold a generator's state in."""

    key_value: Any
    key: Any
    num_cached_blocks: int | None = None


class ToyVideoState(NamedTuple):
    """Likewise."""

    attention: ToySums
    last_frame: Any


def test_a_window_whose_step_does_not_count_is_followed_by_the_next():
    """What it leaves is not of the window before, or, of a video's first window, of another video."""

    def block(params, noisy, timestep, captions, state, first_frame):
        seen, toy = toy_block(params, noisy, timestep, captions, ToyState(*state.attention[:2]), first_frame)
        return seen, ToyVideoState(ToySums(*toy), seen[:, -1])

    def nothing_seen(shape):
        return ToyVideoState(ToySums(*empty(shape)), jnp.zeros((shape[0], *shape[2:])))

    settings = SelfForcingConfig(timesteps=(1000, 800, 500), block_frames=2, stream=StreamConfig(13, 5))
    losses = SelfForcing(block, toy_score, toy_score, nothing_seen, settings, NEGATIVE)
    streaming, batch = StreamingSelfForcing(losses, Windows(13, 5, 1, 2), picture_of), batch_of(5)
    steps = SelfForcingSteps(settings, tiny_config(ema=EmaConfig(enabled=False), accumulation=1))
    optimizers = steps.optimizers(TRAINED, streaming.windows)
    kinds = streaming.windows.kinds_of_steps(settings.cycle)
    opening = next(n for n, kind in enumerate(kinds) if kind == "critic" and streaming.windows.is_first(n))
    step, stream = quickly(steps.on_windows(streaming, optimizers)[opening]), stream_tree(streaming.init_stream(batch))
    left = {}
    for name, fake in (("counts", TRAINED["fake"]), ("not finite", jnp.float32(jnp.nan))):
        trained = {**TRAINED, "fake": fake}
        state = TrainState(jnp.int32(opening), {**trained, "stream": stream}, None, optimizers.init(trained))
        after, metrics = step(state, {"real": REAL, "autoencoder": jnp.float32(2.0)}, batch)
        assert bool(metrics.finite) == (name == "counts")
        left[name] = after.params.pop("stream")
    jax.tree.map(np.testing.assert_array_equal, after.params, trained)
    jax.tree.map(np.testing.assert_array_equal, left["not finite"], left["counts"])
    assert np.abs(left["counts"]["history"]).min() > 0
