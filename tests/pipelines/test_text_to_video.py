"""``SanaVideoPipeline``: sizes, numbers of frames, guidance, what comes out, and what is refused."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from convert.engine import import_model
from sana_jax import SanaPipeline, SanaVideoPipeline
from sana_jax.contract import infer_contract
from sana_jax.diffusion.guidance import ProjectedGuidance
from sana_jax.diffusion.samplers import SCM, DPMSolver
from sana_jax.errors import UserError
from sana_jax.lora import init_lora, save_lora_weights
from sana_jax.pipelines import resolution
from sana_jax.pipelines.families import abstract_params, rules_of
from sana_jax.pipelines.video_base import frames_of_seconds
from sana_jax.pipelines.world_refiner_run import goes_on
from sana_jax.text_encoders.instructions import VIDEO_INSTRUCTION

PROMPT = "a red panda"
QUICK = {"max_sequence_length": 8, "complex_human_instruction": (), "num_inference_steps": 2}
SIZE = {"height": 32, "width": 64, "frames": 5, "binning": "off"}
SHAPE = (4, 2, 4, 8)  # latents (C, T, h, w) of that
EMBEDDED = {
    "prompt": None,
    "prompt_embeds": np.zeros((1, 8, 24)),
    "prompt_attention_mask": np.ones((1, 8)),
    "max_sequence_length": None,
    "complex_human_instruction": None,
}


pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(scope="module")
def pipe(video_model) -> SanaVideoPipeline:
    return SanaVideoPipeline.from_pretrained(video_model, residency="all")


def latents(pipe, prompt=PROMPT, **options) -> np.ndarray:
    return pipe(prompt, **{**QUICK, **SIZE, "output_type": "latent", **options}).frames


def test_what_comes_out(pipe):
    seen = []

    def watch(pipeline, step, timestep, values):
        seen.append((step, values["latents"].shape))

    result = pipe(PROMPT, **QUICK, **SIZE, seed=3, output_type="np", callback_on_step_end=watch)
    assert result.frames.shape == (1, 5, 32, 64, 3)
    assert 0 <= result.frames.min() < result.frames.max() <= 1
    assert result.frames.std() > 0.05
    assert seen == [(0, (1, *SHAPE)), (1, (1, *SHAPE))]
    assert list(result.seconds) == ["text", "denoise", "decode"]
    assert (result.fps, result.sampled_size) == (16, (32, 64))
    assert result.device_bytes > 0
    (pictures,) = pipe(PROMPT, **QUICK, **SIZE, seed=3).frames
    assert [picture.size for picture in pictures] == [(64, 32)] * 5
    difference = np.stack([np.asarray(picture) for picture in pictures]) / 255 - result.frames[0]
    assert np.abs(difference).max() <= 0.5 / 255 + 1e-6
    stopped = latents(pipe, seed=3, callback_on_step_end=lambda *_: False)
    assert np.abs(stopped - latents(pipe, seed=3)).max() > 1e-3


def test_a_comparison_of_arrays_ends_the_sampling(pipe):
    """What NumPy and JAX call False is as good as Python's."""
    stopped = latents(pipe, callback_on_step_end=lambda *_: False)
    for values in (np.zeros(3), jax.numpy.zeros(3)):
        found = latents(pipe, callback_on_step_end=lambda *_, values=values: values.max() > 1)
        np.testing.assert_array_equal(found, stopped)
    assert goes_on(None)
    assert not goes_on(np.False_)


def test_numbers_of_numpy(pipe):
    whole = {**QUICK, "max_sequence_length": 8, "num_inference_steps": 2, **SIZE}
    whole = {name: np.int64(value) if isinstance(value, int) else value for name, value in whole.items()}
    found = pipe(PROMPT, **whole, guidance_scale=np.float32(6), output_type="latent").frames
    np.testing.assert_array_equal(found, latents(pipe, guidance_scale=6.0))


def test_given_latents_say_the_size(pipe):
    noise = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
    found = pipe(PROMPT, **QUICK, latents=noise, output_type="latent").frames
    np.testing.assert_array_equal(found, latents(pipe, latents=noise))


def test_every_trained_size_can_be_sampled(pipe, capsys):
    """Seven of them are refused by the reference."""
    for each in resolution.VIDEO_BINS[30]:
        assert pipe._video_size(each.height, each.width, "error").sampled == (each.height, each.width)
        assert pipe._video_size(each.height, each.width, None).sampled == (each.height, each.width)
    assert capsys.readouterr().out == ""
    assert pipe._video_size(None, None, None).sampled == (480, 832)
    assert pipe._video_size(224, 224, "nearest").sampled == (624, 624)
    said = capsys.readouterr().out
    assert "sampling 624x624 pixels" in said
    assert "224x224" in said
    with pytest.raises(UserError, match="nearest is 624x624"):
        pipe._video_size(224, 224, "error")


def test_a_size_that_is_not_trained_is_sampled_if_binning_is_off(pipe):
    result = pipe(PROMPT, **{**QUICK, "num_inference_steps": 1}, height=224, width=224, frames=5, binning="off",
                  output_type="latent", guidance_scale=1)  # fmt: skip
    assert result.frames.shape == (1, 4, 2, 28, 28)
    assert result.sampled_size == (224, 224)


def test_binned_frames_are_scaled_and_cropped(pipe, monkeypatch):
    monkeypatch.setitem(resolution.VIDEO_BINS, 30, (resolution.Bin(0.5, 32, 64),))
    whole = pipe(PROMPT, **QUICK, height=32, width=64, frames=5, output_type="np").frames
    cropped = pipe(PROMPT, **QUICK, height=32, width=50, frames=5, output_type="np")
    assert cropped.sampled_size == (32, 64)
    np.testing.assert_array_equal(cropped.frames, whole[:, :, :, 7:57])


@pytest.mark.parametrize(
    ("frames", "parts"),
    [(80, ("80 frames", "77 or 81")), (82, ("81 or 85",)), (0, ("nearest are 1",)), (8.0, ("8.0",)), (True, ("True",))],
)
def test_numbers_of_frames_that_are_not_allowed(pipe, frames, parts):
    with pytest.raises(UserError) as caught:
        latents(pipe, frames=frames)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_frames_of_seconds(capsys):
    assert frames_of_seconds(5, 16, 4) == 81
    assert capsys.readouterr().out == "5 seconds at 16 frames per second: 81 frames (1 + 4 x 20)\n"
    assert [frames_of_seconds(seconds, 16, 4, say=lambda _: None) for seconds in (60, 0.01, 0.3)] == [961, 1, 5]
    assert frames_of_seconds(np.float32(5), np.int64(16), 4, say=lambda _: None) == 81
    for wrong in (0, -1, math.nan, True, "5"):
        with pytest.raises(UserError, match="seconds"):
            frames_of_seconds(wrong, 16, 4)


def test_motion_score(pipe):
    with_score = latents(pipe, motion_score=30)
    np.testing.assert_array_equal(with_score, latents(pipe, f"{PROMPT} motion score: 30."))
    assert np.abs(with_score - latents(pipe)).max() > 1e-4


def test_projected_guidance(pipe):
    """With all of the difference kept it is classifier-free guidance; what it bounds or weakens, it is not."""
    plain = latents(pipe, guidance_scale=3.0)
    same = latents(pipe, guidance_scale=3.0, projected_guidance=ProjectedGuidance(eta=1.0))
    np.testing.assert_allclose(same, plain, atol=2e-4)
    settings = ProjectedGuidance(0.3, norm_threshold=0.5, momentum=-0.5)
    assert np.abs(latents(pipe, guidance_scale=3.0, projected_guidance=settings) - plain).max() > 1e-3
    with pytest.raises(UserError, match=r"momentum 1\.5"):
        ProjectedGuidance(momentum=1.5)


def test_guidance_in_an_interval(pipe):
    nowhere = latents(pipe, guidance_scale=3.0, guidance_interval=(0.0, 0.0))
    np.testing.assert_allclose(nowhere, latents(pipe, guidance_scale=1.0), atol=1e-4)
    everywhere = latents(pipe, guidance_scale=3.0, guidance_interval=(0.0, 1.0))
    np.testing.assert_array_equal(everywhere, latents(pipe, guidance_scale=3.0))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"height": 40}, "height 40 is not allowed.*multiple of 16.*32 or 48"),
        ({"width": 8}, "width 8 is not allowed.*16"),
        ({"guidance_scale": 1.0, "projected_guidance": ProjectedGuidance()}, "projected_guidance would not be used"),
        ({"guidance_scale": 1.0, "negative_prompt": "blurry"}, "negative_prompt would not be used"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance interval"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt 0"),
        ({"guidance_scale": np.array([6.0, 5.0])}, "guidance_scale array.* is not allowed; choose one finite number"),
        ({"guidance_scale": "high"}, "guidance_scale 'high' is not allowed"),
        ({"projected_guidance": {"eta": 0.5}}, "projected_guidance {'eta': 0.5} is not allowed.*ProjectedGuidance"),
        ({"motion_score": 2.5}, "motion_score 2.5"),
        ({"motion_score": 1001}, "motion_score 1001 is not allowed; choose a whole number from 0 to 1000"),
        ({"prompt": 5}, "prompt 5 is not allowed; allowed is a text, or a list"),
        ({"prompt": ["0s: a bird", "10s: a red panda"]}, "'0s: a bird' begins with a time, and prompts of SanaVideo"),
        ({"motion_score": 30, **EMBEDDED}, "motion_score would not be used"),
        ({"latents": np.zeros((1, 4, 4, 8))}, r"shape \(1, 4, 4, 8\).*\(B, C, T, h, w\)"),
        ({"latents": np.zeros((1, *SHAPE)), "frames": 9}, "frames 9 for latents of 2 latent frames, which are 5"),
        ({"latents": np.zeros((1, *SHAPE)), "seed": 1}, "seed 1 would not be used"),
        ({"latents": np.zeros((2, *SHAPE))}, r"1 videos of 32x64 need \(1, 4, 2, 4, 8\)"),
        ({"latents": np.full((1, *SHAPE), np.inf)}, "not finite in 1 of 1 videos"),
        ({"binning": "floor"}, "binning 'floor'"),
        ({"output_type": "mp4"}, "output_type 'mp4'"),
        ({"prompt": ""}, "is empty"),
    ],
)  # fmt: skip
def test_mistakes(pipe, options, part):
    with pytest.raises(UserError, match=part) as caught:
        latents(pipe, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["saved", "imported"])
def test_what_is_written_is_read_back(pipe, video_model, tmp_path, way):
    directory = tmp_path / "model"
    if way == "saved":
        pipe.save_pretrained(directory)
        index = json.loads((directory / "model_index.json").read_text())
        assert index["_class_name"] == "SanaVideoPipeline"
        assert (index["defaults"]["frames"], index["defaults"]["fps"]) == (81, 16.0)
    else:
        import_model(video_model, directory)
    again = SanaVideoPipeline.from_pretrained(directory, dtype="float32")
    assert again.defaults == pipe.defaults
    assert again.sampler == pipe.sampler == DPMSolver(flow_shift=8.0)
    assert again.text_encoder.complex_human_instruction == VIDEO_INSTRUCTION
    again.programs = pipe.programs
    np.testing.assert_array_equal(latents(again, seed=1), latents(pipe, seed=1))


def test_contract(video_model):
    contract = infer_contract(video_model)
    assert contract.family == "SANA-Video of 2 blocks, width 24"
    assert (contract.flow_shift, contract.sampler) == (8.0, "dpm_solver")
    assert contract.image_size == 480
    assert contract.fp16_saturation is False
    with pytest.raises(UserError, match="--emulate-fp16-saturation"):
        SanaVideoPipeline.from_pretrained(video_model, emulate_fp16_saturation=True)


def test_models_of_another_kind(video_model, published, pipe):
    with pytest.raises(UserError, match=r"looks like SANA-Video.*use SanaVideoPipeline"):
        SanaPipeline.from_pretrained(video_model)
    with pytest.raises(UserError, match=r"looks like an image model.*choose a video model"):
        SanaVideoPipeline.from_pretrained(published("sana-1.0"))
    before = pipe.sampler
    pipe.sampler = SCM()
    try:
        with pytest.raises(UserError, match="allowed are DPMSolver and FlowEuler"):
            pipe.check_components()
    finally:
        pipe.sampler = before


def test_a_lora_beside_the_weights_and_merged(pipe, tmp_path):
    plain = latents(pipe)
    abstract = abstract_params(pipe.transformer)
    lora, draw = init_lora(abstract, ("qkv", ".*/ff/conv_temp"), 2, jax.random.key(0)), np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: 0.3 * draw.standard_normal(leaf.shape, np.float32), lora)
    save_lora_weights(tmp_path, lora, rules_of(pipe.transformer.config), abstract, alpha=2)
    try:
        pipe.load_lora_weights(tmp_path)
        beside = latents(pipe)
        assert np.abs(beside - plain).max() > 0.1
        pipe.fuse_lora()
        np.testing.assert_allclose(latents(pipe), beside, atol=5e-3 * np.abs(beside).max())
    finally:
        pipe.unload_lora_weights()
    np.testing.assert_array_equal(latents(pipe), plain)
