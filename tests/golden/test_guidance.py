"""Adaptive projected guidance against recorded vectors: the function, its momentum, and inside a sampling run."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.guidance import ProjectedGuidance, projected_guidance
from sana_jax.diffusion.samplers import DPMSolver
from tests.golden.golden_files import GoldenFile, assert_golden, load_golden

FUNCTION_TOLERANCE, TRAJECTORY_TOLERANCE = 5e-6, 1e-3
OVER = {"hw": "frame", "thw": "clip", "t": "time", "image": "clip"}


@pytest.fixture(scope="module")
def golden() -> GoldenFile:
    return load_golden("guidance")


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1)


def settings(values: dict, mode: str) -> ProjectedGuidance:
    threshold = values["norm_threshold"] if "norm_threshold" in values else values["threshold"]
    rescale = values["guidance_rescale"]
    return ProjectedGuidance(values["eta"], threshold, values["momentum"] or 0.0, rescale, OVER[mode])


@pytest.mark.parametrize("mode", list(OVER))
def test_predictions(golden, mode):
    ending = "4" if mode == "image" else ""
    negative, positive = (channels_last(golden[f"in/apg_{name}{ending}"]) for name in ("uncond", "cond"))
    for number, values in enumerate(golden.hparams["apg"]):
        found, _ = projected_guidance(negative, positive, values["scale"], settings(values, mode))
        name = f"out/apg/{number}_{mode}"
        assert_golden(np.moveaxis(found, -1, 1), golden[name], FUNCTION_TOLERANCE, name)


def test_momentum(golden):
    """One setting, three predictions one after another."""
    (name,) = golden.names("out/apg/2_momentum")
    values, running = golden.hparams["apg"][2], None
    for step, expected in enumerate(golden[name]):
        negative, positive = (channels_last(golden[f"in/apg_seq_{kind}"][step]) for kind in ("uncond", "cond"))
        found, running = projected_guidance(negative, positive, values["scale"], settings(values, "hw"), running)
        assert_golden(np.moveaxis(found, -1, 1), expected, FUNCTION_TOLERANCE, f"{name} {step}")


def test_inside_the_dpm_solver():
    """On clean samples, with a toy velocity."""
    golden = load_golden("samplers")
    name, case = "out/dpm_video_apg", golden.hparams["cases"]["dpm_video_apg"]
    sampler = DPMSolver(flow_shift=case["shift"])
    schedule = sampler.schedule(case["steps"])
    assert_golden(schedule.sigmas, golden[f"{name}/timesteps"], 1e-6, "timesteps")
    apg, running = case["apg"], None
    state = sampler.init(channels_last(golden[f"in/{case['input']}"]))

    def clean(latents, sigma, condition):
        mixed = jnp.tanh(latents @ golden["in/W"].T + golden[f"in/{condition}"][:, None, None, None])
        return latents - sigma * (mixed + sigma * golden["in/u"])

    for step in range(case["steps"]):
        sigma = schedule.sigmas[step]
        negative, positive = (clean(state.latents, sigma, kind) for kind in ("uncond_vid", "cond_vid"))
        guided, running = projected_guidance(negative, positive, apg["scale"], settings(apg, apg["mode"]), running)
        state = sampler.step(schedule, state, step, (state.latents - guided) / sigma)
        expected = golden[f"{name}/trajectory"][step + 1]
        assert_golden(np.moveaxis(state.latents, -1, 1), expected, TRAJECTORY_TOLERANCE, f"step {step}")
    assert_golden(np.moveaxis(state.latents, -1, 1), golden[f"{name}/final"], TRAJECTORY_TOLERANCE, "final")
