"""Every image pipeline against diffusers: a tiny random model is saved, read by us from that directory, and compared.

Same prompts, same noise; latents and pixels. float32, matrix products in full precision.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from sana_jax import SanaControlNetPipeline, SanaPipeline, SanaSprintPipeline
from sana_jax.pipelines.resolution import resize_and_crop, size_to_sample
from tests.parity import pipeline_oracle as oracle
from tests.parity.sana_oracle import relative_error

HEIGHT, WIDTH = 96, 64
LATENTS, PIXELS = 1e-5, 2e-4
TEXT = {"prompt": oracle.PROMPTS, "complex_human_instruction": oracle.INSTRUCTION}
SIZE = {"height": HEIGHT, "width": WIDTH}
OURS = {"sprint": SanaSprintPipeline, "sprint-img2img": SanaSprintPipeline, "controlnet": SanaControlNetPipeline}


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (their pipeline, ours read from the directory that theirs wrote)."""
    made = {}

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            theirs = oracle.save(kind, directory)
            made[kind] = theirs, OURS.get(kind, SanaPipeline).from_pretrained(directory)
        return made[kind]

    return get


def run_theirs(pipeline, output_type: str, **arguments) -> np.ndarray:
    if "latents" in arguments:
        arguments["latents"] = torch.from_numpy(arguments["latents"].copy())
    with torch.no_grad():
        images = pipeline(**arguments, output_type=output_type, use_resolution_binning=False).images
    return images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)


def compare(theirs, ours, our_arguments: dict, their_arguments: dict) -> None:
    latents, pixels = (ours(**our_arguments, binning="off", output_type=kind).images for kind in ("latent", "np"))
    expected_latents = run_theirs(theirs, "latent", **their_arguments)
    expected_pixels = run_theirs(theirs, "np", **their_arguments)
    error = relative_error(latents, expected_latents)
    print(f"latents {error:.2e}, pixels {np.abs(pixels - expected_pixels).max():.2e}")
    assert expected_pixels.std() > 0.05  # not a picture of one colour
    assert error <= LATENTS
    assert np.abs(pixels - expected_pixels).max() <= PIXELS


@pytest.mark.parametrize("kind", ["sana-1.0", "sana-1.5", "2k", "scaled-time"])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_text_to_image(models, kind, guidance_scale):
    arguments = {**TEXT, **SIZE, "num_inference_steps": 4, "guidance_scale": guidance_scale}
    arguments["latents"] = oracle.noise(2, HEIGHT, WIDTH)
    if guidance_scale > 1:
        arguments["negative_prompt"] = "blurry"
    compare(*models(kind), arguments, arguments)


def test_several_pictures_of_one_prompt(models):
    arguments = {**TEXT, **SIZE, "prompt": oracle.PROMPTS[1], "num_inference_steps": 2, "num_images_per_prompt": 3}
    arguments["latents"] = oracle.noise(3, HEIGHT, WIDTH, 1)
    compare(*models("sana-1.5"), arguments, arguments)


def test_several_pictures_of_several_prompts_keep_their_own_masks(models):
    """Each picture is the one that its prompt alone gives; diffusers pairs prompts with the wrong masks here."""
    _, ours = models("sana-1.0")
    noise = oracle.noise(4, HEIGHT, WIDTH, 2)
    options = {**SIZE, "num_inference_steps": 2, "binning": "off", "output_type": "latent"}
    together = ours(oracle.PROMPTS, num_images_per_prompt=2, latents=noise, **options).images
    for index, prompt in enumerate(oracle.PROMPTS):
        alone = ours(prompt, num_images_per_prompt=2, latents=noise[2 * index :][:2], **options).images
        assert relative_error(together[2 * index :][:2], alone) <= LATENTS


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_perturbed_attention_guidance(models, guidance_scale):
    shared = {**TEXT, **SIZE, "num_inference_steps": 3, "guidance_scale": guidance_scale}
    shared |= {"pag_scale": 3.0, "pag_adaptive_scale": 0.002, "latents": oracle.noise(2, HEIGHT, WIDTH, 3)}
    compare(*models("pag"), {**shared, "pag_applied_layers": "transformer_blocks.1"}, shared)


def their_noise(seed: int, draws: int) -> np.ndarray:
    """What diffusers draws, one after another, for two pictures."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, oracle.LATENT_CHANNELS, HEIGHT // 32, WIDTH // 32)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(draws)]).numpy()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sprint(models, steps):
    shared = {**TEXT, **SIZE, "num_inference_steps": steps, "latents": oracle.noise(2, HEIGHT, WIDTH, 4)}
    generator = torch.Generator().manual_seed(7)
    theirs = {**shared, "generator": generator}
    if steps != 2:
        theirs["intermediate_timesteps"] = None  # their default is an error for other numbers of steps
    pipelines = models("sprint")
    latents = pipelines[1](**shared, step_noise=their_noise(7, steps), binning="off", output_type="latent").images
    assert relative_error(latents, run_theirs(pipelines[0], "latent", **theirs)) <= LATENTS
    theirs["generator"] = torch.Generator().manual_seed(7)
    pixels = pipelines[1](**shared, step_noise=their_noise(7, steps), binning="off", output_type="np").images
    assert np.abs(pixels - run_theirs(pipelines[0], "np", **theirs)).max() <= PIXELS


@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_sprint_image_to_image(models, strength):
    picture = oracle.picture(130, 70)
    shared = {**TEXT, **SIZE, "image": picture, "strength": strength, "num_inference_steps": 2}
    steps = 1 if strength <= 0.5 else 2
    noise = their_noise(9, 1 + steps)
    ours = {**shared, "latents": noise[0], "step_noise": noise[1:], "binning": "off"}
    pipelines = models("sprint-img2img")
    for kind, bound in (("latent", None), ("np", PIXELS)):
        expected = run_theirs(pipelines[0], kind, **shared, generator=torch.Generator().manual_seed(9))
        found = pipelines[1](**ours, output_type=kind).images
        if bound is None:
            assert relative_error(found, expected) <= LATENTS
        else:
            assert np.abs(found - expected).max() <= bound


def test_controlnet(models):
    shared = {**TEXT, **SIZE, "control_image": oracle.picture(100, 80), "controlnet_conditioning_scale": 0.7}
    shared |= {"num_inference_steps": 3, "latents": oracle.noise(2, HEIGHT, WIDTH, 5)}
    theirs, ours = models("controlnet")
    compare(theirs, ours, shared, shared)
    off = ours(**{**shared, "controlnet_conditioning_scale": 0.0}, binning="off", output_type="latent").images
    on = ours(**shared, binning="off", output_type="latent").images
    assert relative_error(off, on) > 1e-3


@pytest.mark.parametrize("size", [(720, 1280), (1000, 1500), (1920, 500)])
def test_binning_and_cropping(size):
    """The size that is sampled, and the scaling and cropping behind it, on the reference's own decoder output."""
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

    binned = PixArtImageProcessor.classify_height_width_bin(*size, ratios=ASPECT_RATIO_1024_BIN)
    assert size_to_sample(*size, None, 32, 32) == tuple(binned)
    decoded = np.random.default_rng(0).standard_normal((1, *binned, 3)).astype(np.float32)
    expected = PixArtImageProcessor.resize_and_crop_tensor(
        torch.from_numpy(decoded.transpose(0, 3, 1, 2)), size[1], size[0]
    )
    np.testing.assert_allclose(resize_and_crop(decoded, *size), expected.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def test_a_size_whose_scaling_rounds_down_keeps_its_last_row():
    """Where diffusers scales to 499 rows and crops 500 of them, which leaves a single one."""
    assert resize_and_crop(np.zeros((1, 1216, 832, 3), np.float32), 500, 333).shape == (1, 500, 333, 3)
