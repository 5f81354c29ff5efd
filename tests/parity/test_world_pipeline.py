"""SANA-WM's pipeline beside diffusers' SanaWMPipeline: a tiny random model read from the directory that theirs wrote.

Same picture, prompt, camera and noise; latents and frames, alone and with the refiner behind it. float32, matrix
products in full precision; softmax layers without their rounding to bfloat16, which the transformer's own tests have.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT

from sana_jax import SanaWMPipeline, SanaWMRefiner
from tests.parity import refiner_oracle
from tests.parity import world_pipeline_oracle as oracle
from tests.parity.pipeline_oracle import INSTRUCTION, picture
from tests.parity.sana_oracle import relative_error

HEIGHT, WIDTH, FRAMES, STEPS = 16, 24, 9, 3
LATENTS, PIXELS = 1e-5, 2e-4
ACTION = "w-4, JW-4"
LENS = [40.0, 41.0, 26.0, 14.0]  # of the picture as it is given
COMMON = {
    "prompt": "A red panda reading, on a wire ", "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS,
    "max_sequence_length": 7, "chi_prompt": INSTRUCTION,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Their pipeline, and ours read from its directory."""
    directory = tmp_path_factory.mktemp("world")
    theirs = oracle.save(directory)
    ours = SanaWMPipeline.from_pretrained(directory, residency="all")
    ours.transformer = ours.transformer.clone(softmax_dtype=None)
    return theirs, ours


@pytest.fixture(scope="module")
def image():
    return picture(30, 50)


def compare(models, monkeypatch, arguments: dict, **ours_only):
    """Both outputs, once they agree."""
    theirs, ours = models
    noise = oracle.noise(FRAMES, HEIGHT, WIDTH, 1)
    expected = oracle.run(theirs, monkeypatch, noise, **arguments, output_type="np")
    found = ours(**arguments, **ours_only, latents=noise, output_type="np")
    error = relative_error(found.latents, expected.latent.numpy())
    difference = np.abs(found.frames[0] - expected.frames).max()
    print(f"latents {error:.2e}, pixels {difference:.2e}")
    assert found.frames.shape == (1, *expected.frames.shape) == (1, FRAMES, HEIGHT, WIDTH, 3)
    assert expected.frames.std() > 0.02  # not a video of one colour
    assert np.std(expected.latent.numpy()[:, :, 1:] - noise[:, :, 1:]) > 0.3
    assert error <= LATENTS
    assert difference <= PIXELS
    np.testing.assert_allclose(found.c2w, expected.c2w, rtol=0, atol=1e-6)
    return found, expected


def test_an_action_with_guidance(models, monkeypatch, image):
    arguments = {**COMMON, "image": image, "action": ACTION, "intrinsics": LENS, "guidance_scale": 5.0}
    arguments |= {"negative_prompt": "blurry Birds"}
    compare(models, monkeypatch, arguments)


def test_poses_without_guidance_and_step_by_step(models, monkeypatch, image, capsys):
    """Of eleven poses the nine that were asked for; a lens for every frame. The first frame stays bit for bit."""
    lenses = np.array([[[40 + frame, 0, 25], [0, 42, 15], [0, 0, 1]] for frame in range(11)], np.float32)
    arguments = {**COMMON, "image": image, "c2w": oracle.drifting_camera(11), "intrinsics": lenses}
    arguments |= {"guidance_scale": 1.0, "num_frames": FRAMES}
    found, _ = compare(models, monkeypatch, arguments)
    assert "c2w: the first 9 of 11 poses are taken" in capsys.readouterr().out
    seen = []

    def on_step(pipeline, step, timestep, shown):
        seen.append((step, timestep, np.asarray(shown["latents"])))

    noise = oracle.noise(FRAMES, HEIGHT, WIDTH, 1)
    stepped = models[1](**arguments, latents=noise, output_type="latent", callback_on_step_end=on_step)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    sigmas = models[0].scheduler.sigmas.numpy()
    np.testing.assert_allclose([time for _, time, _ in seen], 1000 * sigmas[:3], rtol=1e-6)
    assert relative_error(stepped.frames, found.latents) <= LATENTS
    for _, _, latents in seen:
        np.testing.assert_array_equal(latents[:, :, 0], stepped.latents[:, :, 0])
    np.testing.assert_array_equal(found.latents[:, :, 0], stepped.latents[:, :, 0])


def test_the_default_instruction(models):
    theirs, ours = models
    assert list(ours.text_encoder.complex_human_instruction) == DEFAULT_CHI_PROMPT
    prompt = "A red Panda , two small birds"
    with torch.no_grad():
        embeds, mask, negative, negative_mask = theirs.encode_prompt(prompt, "Blurry", chi_prompt=DEFAULT_CHI_PROMPT)
    ours_embeds, ours_mask = ours.text_encoder.encode([prompt])
    np.testing.assert_array_equal(ours_mask, mask.numpy())
    kept = ours_mask.astype(bool)
    assert relative_error(ours_embeds[kept], embeds[:, 0].numpy()[kept]) <= LATENTS
    ours_embeds, ours_mask = ours.text_encoder.encode(["Blurry"], negative=True)
    np.testing.assert_array_equal(ours_mask, negative_mask.numpy())
    kept = ours_mask.astype(bool)
    assert relative_error(ours_embeds[kept], negative[:, 0].numpy()[kept]) <= LATENTS


def test_with_the_refiner_behind_it(models, monkeypatch, image, tmp_path):
    """Both of diffusers' pipelines in a row; the frame that anchors the video is left out, with its pose."""
    theirs, ours = models
    refiner_oracle.save(tmp_path)
    reference = refiner_oracle.load(tmp_path)
    arguments = {**COMMON, "image": image, "action": ACTION, "intrinsics": LENS, "guidance_scale": 1.0}
    noise = oracle.noise(FRAMES, HEIGHT, WIDTH, 1)
    first = oracle.run(theirs, monkeypatch, noise, **arguments, output_type="latent").latent.numpy()
    second = oracle.noise(FRAMES, HEIGHT, WIDTH, 2)[:, :, 1:]
    refined, _ = refiner_oracle.refine(reference, monkeypatch, first, second, COMMON["prompt"], fps=16.0)
    with monkeypatch.context() as patched:
        patched.setattr(reference, "vae", theirs.vae)
        options = {"fps": 16.0, "output_type": "np"}
        frames, _ = refiner_oracle.refine(reference, monkeypatch, first, second, COMMON["prompt"], **options)
    refiner = SanaWMRefiner.from_pretrained(tmp_path)
    found = ours(
        **arguments, latents=noise, refine=refiner, refiner_options={"noise": second}, output_type="np"
    )  # fmt: skip
    assert refiner.autoencoder is None
    assert relative_error(found.latents, first) <= LATENTS
    assert found.frames.shape == (1, *frames.shape) == (1, FRAMES - 1, HEIGHT, WIDTH, 3)
    difference = np.abs(found.frames[0] - frames).max()
    print(f"refined frames {difference:.2e}")
    assert difference <= PIXELS
    assert np.std(refined - first) > 0.3
    assert found.c2w.shape == (FRAMES - 1, 4, 4)
    np.testing.assert_allclose(found.c2w[0, 2, 3], 0.05, rtol=1e-5)
    assert found.refined.finished
