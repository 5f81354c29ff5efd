"""Sampling steps as one program: one call or several, guidance in one batch or split, steps that are skipped."""

from __future__ import annotations

import numpy as np
import pytest

from sana_jax.diffusion.samplers import DPMSolver
from sana_jax.errors import UserError
from sana_jax.pipelines import denoising
from sana_jax.pipelines.sampling_function import Network

PROMPT = "a handwritten seven"
# steps, guidance_scale, ... of pipelines that go different ways through the program
RUNS = {
    "guided": {"num_inference_steps": 5},
    "unguided": {"guidance_scale": 1.0},
    "interval": {"guidance_interval": (0.5, 0.9)},
    "perturbed": {"pag_scale": 2.0, "pag_adaptive_scale": 0.01, "pag_applied_layers": 1},
    "several": {"num_images_per_prompt": 2},
}


def latents_of(pipe, *arguments, **options) -> np.ndarray:
    return pipe(PROMPT, *arguments, output_type="latent", **options).images


def listening(seen: list):
    return lambda _pipe, index, _timestep, values: seen.append((index, np.array(values["latents"])))


# -- one call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_one_call_is_the_steps_one_by_one(pipe, name):
    """Bit for bit, by one program; the callback's latents after the last step are the result."""
    options, seen = RUNS[name], []
    stepped = latents_of(pipe, callback_on_step_end=listening(seen), **options)
    programs = len(pipe.programs)
    np.testing.assert_array_equal(latents_of(pipe, **options), stepped)
    np.testing.assert_array_equal(latents_of(pipe, progress_bar=True, **options), stepped)
    np.testing.assert_array_equal(seen[-1][1], stepped)
    assert len(seen) == options.get("num_inference_steps", 3)
    assert len(pipe.programs) == programs


def test_one_call_is_one_call(pipe, monkeypatch):
    calls, original = [], denoising.Denoiser.__call__

    def counting(self, progress, start, stop):
        calls.append((start, stop))
        return original(self, progress, start, stop)

    monkeypatch.setattr(denoising.Denoiser, "__call__", counting)
    latents_of(pipe)
    assert calls == [(0, 3)]
    calls.clear()
    latents_of(pipe, progress_bar=True)
    assert calls == [(0, 1), (1, 2), (2, 3)]


def test_other_numbers_of_steps_and_scales_compile_nothing(pipe):
    latents_of(pipe)
    programs = len(pipe.programs)
    for options in ({"num_inference_steps": 8}, {"guidance_scale": 7.0}, {"guidance_interval": (0.1, 0.2)}):
        assert pipe(PROMPT, output_type="latent", **options).compile_seconds == 0
    assert len(pipe.programs) == programs


def test_the_step_that_is_not_finite_is_named_either_way(pipe):
    given = np.full((2, 1, 8, 8), 0.1, np.float32)
    given[1, 0, 3, 4] = np.nan
    messages = []
    for progress_bar in (False, True):
        with pytest.raises(UserError, match=r"sampling step 1 of 3 .* not finite in 1 of 2 pictures") as caught:
            latents_of(pipe, num_images_per_prompt=2, latents=given, progress_bar=progress_bar)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_latents_that_are_given_are_left_alone(pipe):
    import jax.numpy as jnp

    given = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 8, 8)), jnp.float32)
    first = latents_of(pipe, latents=given)
    np.testing.assert_array_equal(latents_of(pipe, latents=given), first)


# -- guidance, batched or split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guided", "interval", "perturbed", "several"])
def test_split_guidance_is_batched_guidance(pipe, name):
    split, batched = (latents_of(pipe, guidance_batching=batching, **RUNS[name]) for batching in ("split", "batched"))
    np.testing.assert_allclose(split, batched, atol=1e-5)
    assert np.abs(batched - latents_of(pipe, seed=1, **RUNS[name])).max() > 0.1


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (None, "in one batch (the device does not say how much is free)"),
        (10**9, "in one batch (it needs "),
        (1000, "one after another (it needs "),
    ],
)
def test_auto_goes_by_the_memory_that_is_free(pipe, monkeypatch, capsys, free, said):
    monkeypatch.setattr(denoising, "free_device_bytes", lambda _params: free)
    pipe.programs.clear()
    made = latents_of(pipe)
    assert said in capsys.readouterr().out
    kinds = [key[0][0][2] for key in pipe.programs._compiled]
    assert kinds == ([False, True] if free == 1000 else [False])
    batching = "split" if free == 1000 else "batched"
    np.testing.assert_array_equal(made, latents_of(pipe, guidance_batching=batching))


def test_split_guidance_needs_less_memory(pipe):
    """Two parts' activations in one batch; the compiler's own figure, parameters and all."""
    sizes = {}
    for batching in ("batched", "split"):
        pipe(PROMPT, height=32, width=32, binning="off", guidance_batching=batching, output_type="latent")
        sizes[batching] = next(reversed(pipe.programs._compiled.values()))[2]
    assert sizes["split"] < 0.7 * sizes["batched"]


# -- step caching --------------------------------------------------------------------------------------------------

MANY = {"num_inference_steps": 12, "seed": 2}


@pytest.mark.parametrize("options", [{}, {"pag_scale": 2.0, "pag_applied_layers": 1}, {"guidance_scale": 1.0}], ids=str)
def test_threshold_zero_is_the_full_run(pipe, options):
    full = latents_of(pipe, **MANY, **options)
    cached = pipe(PROMPT, step_cache=0.0, step_cache_error=True, output_type="latent", **MANY, **options)
    np.testing.assert_array_equal(cached.images, full)
    assert cached.step_cache.computed == (True,) * 12
    assert cached.step_cache.error == 0.0


def test_larger_thresholds_compute_less_and_err_more(pipe, capsys):
    full = latents_of(pipe, **MANY)
    programs, counts, errors = None, [], []
    for threshold in (0.0, 0.8, 1.0, 1.2, 100.0):
        out = pipe(PROMPT, step_cache=threshold, step_cache_error=True, output_type="latent", **MANY)
        programs = programs or len(pipe.programs)
        report = out.step_cache
        counts.append(sum(report.computed))
        errors.append(report.error)
        assert report.computed[0]
        assert report.computed[-1]
        assert report.error == pytest.approx(np.linalg.norm(out.images - full) / np.linalg.norm(full), rel=1e-4)
        assert f"step cache {threshold:g}: {counts[-1]} of 12 steps were computed" in capsys.readouterr().out
    assert len(pipe.programs) == programs  # thresholds share a program
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (12, 2)
    assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4]
    assert errors[:4] == sorted(errors[:4])
    assert errors[1] > 0.01


def test_step_caching_by_hand(pipe):
    """The decisions follow from the changes that are reported."""
    report = pipe(PROMPT, step_cache=1.0, output_type="latent", **MANY).step_cache
    accumulated, expected = 0.0, [True]
    for change in report.changes[1:-1]:
        accumulated += change
        expected.append(accumulated >= 1.0)
        accumulated = 0.0 if expected[-1] else accumulated
    assert report.computed == (*expected, True)
    assert report.error is None
    assert "not measured" in str(report)


def test_step_caching_with_a_callback_another_solver_and_an_early_end(pipe):
    sampler, pipe.sampler = pipe.sampler, DPMSolver(3.0)
    try:
        once = pipe(PROMPT, step_cache=1.0, output_type="latent", **MANY)
        stepped = pipe(PROMPT, step_cache=1.0, output_type="latent", progress_bar=True, **MANY)
        stopped = pipe(PROMPT, step_cache=1.0, callback_on_step_end=lambda _p, index, *_: index < 4, **MANY)
    finally:
        pipe.sampler = sampler
    np.testing.assert_array_equal(once.images, stepped.images)
    assert once.step_cache.computed == stepped.step_cache.computed
    assert stopped.step_cache.computed == once.step_cache.computed[:5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_cache": -0.1}, r"step_cache -0\.1 is not allowed"),
        ({"step_cache": float("nan")}, "step_cache nan is not allowed"),
        ({"step_cache": 0.1, "num_inference_steps": 2}, "step_cache would not be used in 2 steps"),
        ({"step_cache_error": True}, "step_cache_error would not be used without step_cache"),
        ({"step_cache": 0.1, "guidance_batching": "split"}, "step_cache with guidance_batching split"),
        ({"guidance_batching": "both"}, "guidance_batching 'both' is not allowed; choose one of auto"),
        ({"guidance_batching": "split", "guidance_scale": 1.0}, "guidance_batching split would not be used"),
    ],
)
def test_options_that_are_refused(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe(PROMPT, **options)


def test_step_caching_with_a_controlnet_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "_network", lambda: Network(pipe.transformer, controlnet=object()))
    with pytest.raises(UserError, match="step_cache with a ControlNet is not allowed"):
        pipe(PROMPT, step_cache=0.1)
