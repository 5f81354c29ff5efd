"""The video pipelines against diffusers: a tiny random model is saved, read by us from that directory, and compared.

Same prompts, same noise; latents and frames. float32, matrix products in full precision.
"""

from __future__ import annotations

import inspect

import jax
import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance

from sana_jax import SanaImageToVideoPipeline, SanaVideoPipeline
from sana_jax.diffusion.guidance import ProjectedGuidance
from sana_jax.diffusion.samplers import from_scheduler_config
from sana_jax.errors import UserError
from tests.parity import video_pipeline_oracle as oracle
from tests.parity.sana_oracle import relative_error

FRAMES, HEIGHT, WIDTH = 9, 32, 64
LATENTS, PIXELS = 1e-5, 2e-4
TEXT = {"prompt": oracle.PROMPTS, "complex_human_instruction": oracle.INSTRUCTION, "negative_prompt": "blurry"}
SIZE_NAMES = ("frames", "height", "width")
SIZE = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES}
OURS = {"video": SanaVideoPipeline, "image-to-video": SanaImageToVideoPipeline}


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
            made[kind] = theirs, OURS[kind].from_pretrained(directory, residency="all")
        return made[kind]

    return get


def use_sampler(theirs, ours, name: str) -> None:
    theirs.scheduler = oracle.make_scheduler(name)
    ours.sampler = from_scheduler_config({"_class_name": type(theirs.scheduler).__name__, **theirs.scheduler.config})


def run_theirs(pipeline, output_type: str, **arguments) -> np.ndarray:
    arguments["latents"] = torch.from_numpy(arguments["latents"].copy())
    with torch.no_grad():
        frames = pipeline(**arguments, output_type=output_type, use_resolution_binning=False).frames
    return frames.numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)


def compare(theirs, ours, arguments: dict) -> None:
    latents, pixels = (ours(**arguments, binning="off", output_type=kind).frames for kind in ("latent", "np"))
    expected_latents, expected_pixels = (run_theirs(theirs, kind, **arguments) for kind in ("latent", "np"))
    error, difference = relative_error(latents, expected_latents), np.abs(pixels - expected_pixels).max()
    print(f"latents {error:.2e}, pixels {difference:.2e}")
    assert pixels.shape == (*expected_pixels.shape[:1], *(arguments[name] for name in SIZE_NAMES), 3)
    assert expected_pixels.std() > 0.05  # not videos of one colour
    assert error <= LATENTS
    assert difference <= PIXELS


@pytest.mark.parametrize(("sampler", "scale"), [("dpm", 6.0), ("euler", 6.0), ("dpm", 1.0)])
def test_text_to_video(models, sampler, scale):
    theirs, ours = models("video")
    use_sampler(theirs, ours, sampler)
    arguments = {**TEXT, **SIZE, "num_inference_steps": 4, "guidance_scale": scale}
    if scale == 1.0:
        del arguments["negative_prompt"]
    compare(theirs, ours, {**arguments, "latents": oracle.noise(2, FRAMES, HEIGHT, WIDTH, 1)})


@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.5, 1.0), (0.25, 0.75)])
def test_projected_guidance_with_momentum(models, begin, end):
    """With the reference's guider on clean samples; steps that it leaves out add nothing to its momentum."""
    theirs, ours = models("video")
    use_sampler(theirs, ours, "euler")
    scale, steps, noise = 5.0, 4, oracle.noise(2, FRAMES, HEIGHT, WIDTH, 1)
    settings = ProjectedGuidance(eta=0.3, norm_threshold=8.0, momentum=-0.5)
    guider = AdaptiveProjectedGuidance(
        guidance_scale=scale - 1,
        adaptive_projected_guidance_momentum=settings.momentum,
        adaptive_projected_guidance_rescale=settings.norm_threshold,
        adaptive_projected_guidance_norm_dim=(-1, -2, -4),
        eta=settings.eta,
        use_original_formulation=True,
        start=begin,
        stop=end,
    )
    text = {name: value for name, value in TEXT.items() if name != "prompt"}
    theirs.scheduler.set_timesteps(steps)
    sigmas, guided, latents = theirs.scheduler.sigmas, [], torch.from_numpy(noise.copy())
    with torch.no_grad():
        embeds, mask, null_embeds, null_mask = theirs.encode_prompt(oracle.PROMPTS, True, **text)
        prompts = (embeds, mask), (null_embeds, null_mask)
        for step, timestep in enumerate(theirs.scheduler.timesteps):
            guider.set_state(step, steps, timestep)
            guider.prepare_inputs({})
            clean = []
            for own, own_mask in prompts:
                options = {"encoder_attention_mask": own_mask, "timestep": timestep.expand(2)}
                (velocity,) = theirs.transformer(latents, encoder_hidden_states=own, **options, return_dict=False)
                clean.append(latents - sigmas[step] * velocity)
            if guider.num_conditions == 2:
                guided.append(float(sigmas[step]))
            velocity = (latents - guider.forward(*clean).pred) / sigmas[step]
            latents = theirs.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    found = ours(
        **TEXT, **SIZE, num_inference_steps=steps, guidance_scale=scale, latents=noise, binning="off",
        projected_guidance=settings, guidance_interval=(guided[-1], guided[0]), output_type="latent",
    ).frames  # fmt: skip
    assert len(guided) == (end - begin) * steps
    assert relative_error(found, latents.numpy()) <= LATENTS


@pytest.mark.parametrize("sampler", ["euler", "dpm"])
def test_image_to_video(models, sampler):
    theirs, ours = models("image-to-video")
    use_sampler(theirs, ours, sampler)
    arguments = {**TEXT, **SIZE, "num_inference_steps": 4, "guidance_scale": 4.0}
    arguments |= {"image": oracle.picture(2 * HEIGHT, 2 * WIDTH), "latents": oracle.noise(2, FRAMES, HEIGHT, WIDTH, 1)}
    compare(theirs, ours, arguments)


@pytest.mark.parametrize("kind", ["video", "image-to-video"])
def test_latents_of_ltx2(tmp_path, kind):
    """As the 720p model: every latent is a token, and the autoencoder's decoder is not causal."""
    theirs = oracle.save(kind, tmp_path, "ltx2")
    ours = OURS[kind].from_pretrained(tmp_path, residency="all")
    size = {"frames": 17, "height": 64, "width": 96}
    arguments = {**TEXT, **size, "num_inference_steps": 2, "guidance_scale": 4.0}
    arguments["latents"] = oracle.noise(2, *size.values(), seed=1, autoencoder="ltx2")
    if kind == "image-to-video":
        arguments["image"] = oracle.picture(64, 96)
    compare(theirs, ours, arguments)
    with pytest.raises(UserError, match=r"16 frames; a video has 1 \+ 8·k of them"):
        ours(**{**arguments, "frames": 16, "latents": None})


def test_several_videos_of_each_prompt_and_image(models):
    """Each video is the one that its prompt and image alone give; diffusers fails here."""
    theirs, ours = models("image-to-video")
    noise = oracle.noise(4, FRAMES, HEIGHT, WIDTH, 2)
    images = [oracle.picture(HEIGHT, WIDTH, seed) for seed in (1, 2)]
    options = {**SIZE, "num_inference_steps": 2, "binning": "off", "output_type": "latent"}
    together = ours(images, oracle.PROMPTS, num_videos_per_prompt=2, latents=noise, **options).frames
    for index, (image, prompt) in enumerate(zip(images, oracle.PROMPTS)):
        alone = ours(image, [prompt] * 2, latents=noise[2 * index :][:2], **options).frames
        assert relative_error(together[2 * index :][:2], alone) <= LATENTS
    with pytest.raises(RuntimeError):
        run_theirs(
            theirs,
            "latent",
            image=images[0],
            prompt=oracle.PROMPTS[0],
            num_videos_per_prompt=2,
            latents=noise[:2],
            **SIZE,
        )


def test_the_default_instruction(models):
    """It is the one of the video pipelines, from which that of pictures differs."""
    theirs, ours = models("video")
    default = inspect.signature(type(theirs).__call__).parameters["complex_human_instruction"].default
    assert list(ours.text_encoder.complex_human_instruction) == default
    embeds, mask, *_ = theirs.encode_prompt(oracle.PROMPTS, False, complex_human_instruction=default)
    ours_embeds, ours_mask = ours.text_encoder.encode(oracle.PROMPTS)
    np.testing.assert_array_equal(ours_mask, mask.numpy())
    kept = ours_mask.astype(bool)
    assert relative_error(ours_embeds[kept], embeds.detach().numpy()[kept]) <= LATENTS


def test_all_trained_sizes_of_both_tables():
    """The reference's own tables."""
    from diffusers.pipelines.sana_video import pipeline_sana_video as reference

    from sana_jax.pipelines.resolution import VIDEO_BINS

    for sample_size, table in ((30, reference.ASPECT_RATIO_480_BIN), (22, reference.ASPECT_RATIO_720_BIN)):
        expected = [(float(ratio), int(height), int(width)) for ratio, (height, width) in table.items()]
        assert [tuple(each) for each in VIDEO_BINS[sample_size]] == expected
