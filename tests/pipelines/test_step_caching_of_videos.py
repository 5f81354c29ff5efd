"""Step caching and split guidance of the video and world models: the full run, by hand, its error, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import (
    LongSanaVideoPipeline,
    SanaControlNetPipeline,
    SanaImageToVideoPipeline,
    SanaSprintPipeline,
    SanaVideoPipeline,
    SanaWMPipeline,
    SanaWMStreamingPipeline,
)
from sana_jax.diffusion.guidance import ProjectedGuidance
from sana_jax.diffusion.samplers import DPMSolver, FlowEuler
from sana_jax.diffusion.step_caching import StepCache
from sana_jax.errors import UserError
from sana_jax.generate import GenerateConfig, call_arguments
from sana_jax.models.sana_video import init_state
from tests.pipelines import tiny_long_model, tiny_world

STEPS = 7
PROJECTED = {"projected_guidance": ProjectedGuidance(eta=0.5, norm_threshold=3.0, momentum=-0.3)}
# one that leaves out some of the steps, found by trying
THRESHOLDS = {"text": 2.0, "image": 2.0, "world": 1.2, "world in blocks": 1.2}


@pytest.fixture(
    scope="module", params=["text", "image", "world", pytest.param("world in blocks", marks=pytest.mark.prove)]
)
def made(request) -> tuple[str, Callable[..., object]]:
    """What begins the video, and a function that makes one."""
    kind = request.param
    common = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    if kind.startswith("world"):
        world = tiny_world.tiny_world()
        transformer = world.transformer.clone(softmax_dtype=None)  # which makes much of the last bit
        parts = (transformer, world.params, FlowEuler(3.0), world.text_encoder, world.autoencoder)
        pipe = SanaWMPipeline(*parts, world.defaults)
        pipe.causal_blocks = (2, "uniform") if kind == "world in blocks" else None
        given = tiny_world.arguments(4)
    else:
        long = tiny_long_model.tiny_pipeline()
        kinds = {"text": (SanaVideoPipeline, FlowEuler(3.0)), "image": (SanaImageToVideoPipeline, DPMSolver(3.0))}
        chosen, sampler = kinds[kind]
        parts = (long.transformer, long.params, sampler, long.text_encoder, long.autoencoder, long.defaults)
        pipe = chosen(*parts)
        given = {"prompt": tiny_long_model.PROMPT, "frames": 5}
        if kind == "image":
            given["image"] = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return kind, lambda **options: pipe(**{**given, **common, **options})


def latents_of(result) -> np.ndarray:
    """Those that are sampled: the first frame is the given one, or one of them."""
    return np.asarray(result.frames, np.float64)


# -- a whole run -----------------------------------------------------------------------------------------------------


def test_threshold_zero_is_the_full_run(made):
    _, make = made
    full = make()
    cached = make(step_cache=0.0, step_cache_error=True)
    np.testing.assert_allclose(cached.frames, full.frames, rtol=1e-4, atol=1e-4)  # another program, fused otherwise
    assert full.step_cache is None
    assert cached.step_cache.computed == (True,) * STEPS
    assert cached.step_cache.error == 0.0


def test_skipped_steps_their_decisions_and_their_error(made, capsys):
    """What is skipped follows from the changes that are reported; the error is that against the full run."""
    kind, make = made
    full, threshold = latents_of(make()), THRESHOLDS[kind]
    result = make(step_cache=threshold, step_cache_error=True)
    report, accumulated, expected = result.step_cache, 0.0, [True]
    for change in report.changes[1:-1]:
        accumulated += change
        expected.append(accumulated >= threshold)
        accumulated = 0.0 if expected[-1] else accumulated
    assert report.computed == (*expected, True)
    assert 2 < sum(report.computed) < STEPS
    assert f"{sum(report.computed)} of {STEPS} steps were computed" in capsys.readouterr().out
    sampled, first = latents_of(result), 0 if kind == "text" else 1
    off = np.linalg.norm((sampled - full)[:, :, first:]) / np.linalg.norm(full[:, :, first:])
    assert report.error == pytest.approx(off, rel=1e-5)
    assert off > 1e-3
    stepped = make(step_cache=threshold, progress_bar=True)
    np.testing.assert_array_equal(stepped.frames, result.frames)
    assert stepped.step_cache.computed == report.computed
    assert stepped.step_cache.error is None


def test_projected_guidance_remembers_its_sum_beside_the_cache():
    long = tiny_long_model.tiny_pipeline()
    parts = (long.transformer, long.params, FlowEuler(3.0), long.text_encoder, long.autoencoder, long.defaults)
    pipe = SanaVideoPipeline(*parts)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "frames": 3, "output_type": "latent", **PROJECTED}
    full, cached = (pipe(tiny_long_model.PROMPT, step_cache=cache, **options).frames for cache in (None, 0.0))
    np.testing.assert_allclose(cached, full, rtol=1e-4, atol=1e-4)
    skipped = pipe(tiny_long_model.PROMPT, step_cache=100.0, **options)
    assert skipped.step_cache.computed == (True, False, False, True)
    assert np.isfinite(skipped.frames).all()


def test_split_guidance_of_worlds_is_batched_guidance(made):
    kind, make = made
    if kind == "world":
        split, batched = (latents_of(make(guidance_batching=batching)) for batching in ("split", "batched"))
        np.testing.assert_allclose(split, batched, atol=1e-5)
        assert np.abs(batched - latents_of(make(seed=1))).max() > 0.1


# -- one step, by the network alone ------------------------------------------------------------------------------------


def networks():
    """(network, its variables, its arguments but for the latents, latents, tokens' shape)"""
    draw = np.random.default_rng(1)
    long = tiny_long_model.tiny_pipeline()
    latents, caption = (draw.standard_normal(size).astype(np.float32) for size in ((2, 3, 8, 8, 1), (2, 5, 12)))
    times = np.full((2, 3), 700.0, np.float32) * (np.arange(3) > 0)
    yield (
        long.transformer,
        {"params": jax.tree.map(jnp.asarray, long.params)},
        (caption, times),
        latents,
        (2, 3 * 4 * 4, 16),
    )
    world = tiny_world.tiny_world()
    latents, caption = (draw.standard_normal(size).astype(np.float32) for size in ((2, 3, 2, 3, 4), (2, 5, 8)))
    yield (
        world.transformer,
        {"params": jax.tree.map(jnp.asarray, world.params)},
        (caption, times),
        latents,
        (2, 3 * 2 * 3, 16),
    )


@pytest.mark.parametrize(("index", "scanned"), [(0, True), (1, True), pytest.param(0, False, marks=pytest.mark.prove)])
def test_a_step_of_the_network(index, scanned):
    """Computed or reused it is the plain call to rounding; on other latents it is not, nor without what was added."""
    transformer, variables, others, latents, shape = list(networks())[index]
    network = transformer.clone(scan_blocks=scanned)
    run = jax.jit(lambda latents, cache: network.apply(variables, latents, *others, step_cache=cache))
    plain = jax.jit(lambda latents: network.apply(variables, latents, *others))
    cache = StepCache(jnp.zeros(shape), jnp.zeros(shape), jnp.float32(0), jnp.float32(np.inf), jnp.asarray(True))
    velocity, cache, decision = run(latents, cache)
    np.testing.assert_allclose(velocity, plain(latents), rtol=1e-5, atol=1e-5)
    assert bool(decision.compute)
    cache = cache._replace(required=jnp.asarray(False))
    again, after, decision = run(latents, cache)
    assert (bool(decision.compute), float(decision.change)) == (False, 0.0)
    np.testing.assert_allclose(again, velocity, atol=1e-5)
    np.testing.assert_array_equal(after.residual, cache.residual)
    other = latents + 0.5
    reused, after, decision = run(other, cache)
    assert not bool(decision.compute)
    before, now = np.asarray(cache.signal, np.float64), np.asarray(after.signal, np.float64)
    np.testing.assert_allclose(decision.change, np.abs(now - before).mean() / np.abs(before).mean(), rtol=1e-5)
    assert np.abs(reused - plain(other)).max() > 1e-3
    nothing = run(latents, cache._replace(residual=jnp.zeros(shape)))[0]
    assert np.abs(nothing - velocity).max() > 1e-2


@pytest.mark.parametrize("index", [0, 1], ids=["video", "world"])
def test_a_state_and_a_step_cache_exclude_one_another(index):
    transformer, variables, others, latents, shape = list(networks())[index]
    cache = StepCache(jnp.zeros(shape), jnp.zeros(shape), jnp.float32(0), jnp.float32(1), jnp.asarray(True))
    if index == 0:
        state = init_state(transformer.config, 2, (4, 4))
    else:
        from sana_jax.models.sana_wm import init_state as world_state

        state = world_state(transformer.config, 2, (2, 3), 3, camera=False)
    with pytest.raises(UserError, match=r"a state|step_cache with state=True"):
        transformer.apply(variables, latents, *others, state=state, step_cache=cache)


# -- what is refused, and what the command line hands on ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_cache": -0.1}, r"step_cache -0\.1 is not allowed"),
        ({"step_cache": 0.1, "num_inference_steps": 2}, "step_cache would not be used in 2 steps"),
        ({"step_cache_error": True}, "step_cache_error would not be used without step_cache"),
        ({"step_cache": 0.1, "guidance_batching": "split"}, "step_cache with guidance_batching split"),
        ({"guidance_batching": "split", "guidance_scale": 1.0}, "guidance_batching split would not be used"),
    ],
)
def test_options_that_are_refused(made, options, message):
    with pytest.raises(UserError, match=message):
        made[1](**options)


CONFIG = GenerateConfig(
    model="m", prompt=("a seven",), output="a.mp4", step_cache=0.2, step_cache_error=True, guidance_batching="batched"
)


@pytest.mark.parametrize(
    "pipeline", [SanaVideoPipeline, SanaImageToVideoPipeline, SanaWMPipeline, SanaControlNetPipeline]
)
def test_the_command_line_hands_them_on(pipeline):
    arguments = call_arguments(CONFIG, object.__new__(pipeline))
    given = {name: arguments[name] for name in ("step_cache", "step_cache_error", "guidance_batching")}
    assert given == {"step_cache": 0.2, "step_cache_error": True, "guidance_batching": "batched"}


@pytest.mark.parametrize("pipeline", [SanaSprintPipeline, LongSanaVideoPipeline, SanaWMStreamingPipeline])
def test_students_of_few_steps_refuse_them_by_name(pipeline):
    with pytest.raises(
        UserError,
        match="--guidance-batching, --step-cache, --step-cache-error would not be used by " + pipeline.__name__,
    ):
        call_arguments(CONFIG, object.__new__(pipeline))
