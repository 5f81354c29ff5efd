"""SanaPipeline on a tiny real model."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.diffusion.samplers import SCM, DPMSolver
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines import text_to_image
from sana_jax.pipelines.model_directory import read_model_directory, write_model_directory
from sana_jax.pipelines.sampling_function import initial_latents, make_sampling_fn
from tests.pipelines.tiny_model import STEP, Unreadable, random_params, tiny_config, write_run
from tests.simulated_devices import simulated_devices

PROMPT = "a handwritten seven"


def latents_of(pipe, *arguments, **options) -> np.ndarray:
    return pipe(*arguments, output_type="latent", **options).images


# -- what it gives -------------------------------------------------------------------------------------------------


def test_same_seed_same_picture(pipe):
    first, again, other = (latents_of(pipe, PROMPT, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - latents_of(pipe, "a zero", seed=3)).max() > 1e-3


def test_programs_are_kept(pipe):
    pipe.programs.clear()
    first = pipe(PROMPT, output_type="np")
    assert first.compile_seconds > 0
    assert first.device_bytes > 0
    again = pipe("a zero", seed=1, guidance_scale=3.0, output_type="np")
    assert again.compile_seconds == 0
    assert len(pipe.programs) == 1


def test_output_types(pipe):
    latents = latents_of(pipe, PROMPT)
    pictures = pipe(PROMPT, output_type="np").images
    image = pipe(PROMPT).images[0]
    assert latents.shape == (1, 1, 8, 8)
    assert pictures.shape == (1, 8, 8, 1)
    np.testing.assert_allclose(pictures[..., 0], np.clip(latents[:, 0] / 2 + 0.5, 0, 1), atol=1e-6)
    assert (image.mode, image.size) == ("L", (8, 8))
    np.testing.assert_array_equal(np.asarray(image), np.round(pictures[0, ..., 0] * 255))


def test_loop_equals_scan(pipe):
    seen = []
    looped = latents_of(pipe, PROMPT, callback_on_step_end=lambda *arguments: seen.append(arguments))
    np.testing.assert_allclose(looped, latents_of(pipe, PROMPT), atol=2e-5)
    assert [(index, round(timestep)) for _, index, timestep, _ in seen] == [(0, 1000), (1, 751), (2, 9)]
    assert all(owner is pipe for owner, *_ in seen)
    np.testing.assert_array_equal(seen[-1][3]["latents"], looped)
    interval = {"guidance_interval": (0.5, 0.9)}
    np.testing.assert_allclose(
        latents_of(pipe, PROMPT, progress_bar=True, **interval), latents_of(pipe, PROMPT, **interval), atol=2e-5
    )


def test_callback_stops_and_cannot_change(pipe):
    seen = []

    def stop(_pipe, index, _timestep, values):
        seen.append(values["latents"])
        return index < 1 and values

    np.testing.assert_array_equal(latents_of(pipe, PROMPT, callback_on_step_end=stop), seen[-1])
    assert len(seen) == 2
    with pytest.raises(UserError, match="changed"):
        pipe(PROMPT, callback_on_step_end=lambda _pipe, _index, _timestep, values: {"latents": 0 * values["latents"]})


def test_noise_of_a_picture_does_not_depend_on_the_batch(pipe):
    np.testing.assert_array_equal(initial_latents(5, 1, (1, 8, 8)), initial_latents(5, 4, (1, 8, 8))[:1])
    noise = np.asarray(initial_latents(5, 64, (1, 8, 8)))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    four = latents_of(pipe, PROMPT, num_images_per_prompt=4, seed=5)
    one = latents_of(pipe, PROMPT, seed=5)
    np.testing.assert_allclose(four[:1], one, atol=2e-5)
    assert np.abs(four[0] - four[1]).max() > 0.1


def test_pictures_of_a_prompt_stand_side_by_side(pipe):
    noise = np.asarray(initial_latents(2, 4, (1, 8, 8)))
    both = latents_of(pipe, [PROMPT, "a zero"], num_images_per_prompt=2, seed=2)
    first = latents_of(pipe, PROMPT, num_images_per_prompt=2, latents=noise[:2])
    second = latents_of(pipe, "a zero", num_images_per_prompt=2, latents=noise[2:])
    np.testing.assert_allclose(both, np.concatenate([first, second]), atol=2e-5)


def test_latents_are_in_the_order_of_pytorch(pipe):
    noise = np.asarray(initial_latents(0, 1, (1, 8, 16)))
    given = latents_of(pipe, PROMPT, latents=noise)
    assert given.shape == (1, 1, 8, 16)
    np.testing.assert_array_equal(given, latents_of(pipe, PROMPT, height=8, width=16))
    assert pipe(PROMPT, latents=noise).images[0].size == (16, 8)


@functools.partial(jax.jit, static_argnums=0)
def call_transformer(transformer, params, latents, embeds, mask, timestep):
    return transformer.apply({"params": params}, latents, embeds, timestep, encoder_attention_mask=mask)


def by_hand(pipe, scale: float, interval=(0.0, 1.0), steps: int = 3) -> np.ndarray:
    """Euler's steps with the transformer called for each prompt on its own."""
    schedule = pipe.sampler.schedule(steps)
    latents = jnp.transpose(initial_latents(0, 1, (1, 8, 8)), (0, 2, 3, 1))
    encodings = [pipe.text_encoder.encode([PROMPT]), pipe.text_encoder.null_encoding()]
    for index in range(steps):
        timestep = jnp.full((1,), schedule.timesteps[index])
        positive, negative = (
            call_transformer(pipe.transformer, pipe.params, latents, embeds, mask, timestep)
            for embeds, mask in encodings
        )
        active = interval[0] <= schedule.sigmas[index] <= interval[1]
        velocity = negative + scale * (positive - negative) if active else positive
        latents = latents + (schedule.sigmas[index + 1] - schedule.sigmas[index]) * velocity
    return np.transpose(latents, (0, 3, 1, 2))


def test_guidance_equals_two_calls_by_hand(pipe):
    np.testing.assert_allclose(latents_of(pipe, PROMPT, guidance_scale=4.0), by_hand(pipe, 4.0), atol=1e-4)
    np.testing.assert_allclose(latents_of(pipe, PROMPT), by_hand(pipe, 2.5), atol=1e-4)  # the model's default
    np.testing.assert_allclose(latents_of(pipe, PROMPT, guidance_scale=1.0), by_hand(pipe, 1.0), atol=1e-4)
    part = latents_of(pipe, PROMPT, guidance_scale=4.0, guidance_interval=(0.5, 0.9))
    np.testing.assert_allclose(part, by_hand(pipe, 4.0, (0.5, 0.9)), atol=1e-4)
    assert np.abs(part - by_hand(pipe, 4.0)).max() > 1e-3


def test_without_guidance_the_transformer_sees_each_picture_once(pipe, monkeypatch):
    batches = []
    original = SanaTransformer.apply

    def counting(self, variables, hidden_states, *arguments, **options):
        batches.append(hidden_states.shape[0])
        return original(self, variables, hidden_states, *arguments, **options)

    monkeypatch.setattr(SanaTransformer, "apply", counting)
    pipe.programs.clear()
    pipe(PROMPT, guidance_scale=1.0, output_type="latent")
    assert set(batches) == {1}
    batches.clear()
    pipe(PROMPT, guidance_scale=1.5, output_type="latent")
    assert set(batches) == {2}


def test_negative_prompt(pipe):
    plain = latents_of(pipe, PROMPT)
    negative = latents_of(pipe, PROMPT, negative_prompt="a zero")
    assert np.abs(plain - negative).max() > 1e-3
    twice = latents_of(pipe, [PROMPT, PROMPT], ["", "a zero"], num_images_per_prompt=1)
    np.testing.assert_allclose(twice[0], plain[0], atol=2e-5)
    assert np.abs(twice[1] - latents_of(pipe, [PROMPT, PROMPT])[1]).max() > 1e-3


def test_embeddings_equal_the_prompt(pipe):
    embeds, mask = pipe.text_encoder.encode([PROMPT])
    negative_embeds, negative_mask = pipe.text_encoder.encode(["a zero"])
    expected = latents_of(pipe, PROMPT, "a zero")
    encoded = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    given = latents_of(
        pipe, **encoded, negative_prompt_embeds=negative_embeds, negative_prompt_attention_mask=negative_mask
    )
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_array_equal(latents_of(pipe, **encoded, negative_prompt="a zero"), expected)
    np.testing.assert_array_equal(latents_of(pipe, **encoded), latents_of(pipe, PROMPT))


def test_numbers_and_texts_of_numpy(pipe):
    """What comes out of ``np.arange``, ``np.linspace`` or an array of strings does what Python's own values do."""
    options = {"num_inference_steps": np.int64(4), "num_images_per_prompt": np.int64(2), "step_cache": np.float32(0.5)}
    layers = {"pag_scale": np.float32(3), "pag_applied_layers": np.array([0, 1])}
    expected = pipe(
        [PROMPT, "a one"], ["a", "zero"], 4, num_images_per_prompt=2, output_type="np", step_cache=0.5,
        pag_scale=3.0, pag_applied_layers=[0, 1],
    ).images  # fmt: skip
    texts = {"prompt": np.array([PROMPT, "a one"]), "negative_prompt": np.array(["a", "zero"])}
    np.testing.assert_array_equal(pipe(**texts, **options, **layers, output_type="np").images, expected)


@pytest.mark.parametrize("nothing", [None, "", [""], ("",), np.array([""])])
def test_an_empty_negative_prompt_is_none_given(pipe, nothing):
    expected = latents_of(pipe, PROMPT, guidance_scale=1.0)
    np.testing.assert_array_equal(latents_of(pipe, PROMPT, nothing, guidance_scale=1.0), expected)


ON_ANOTHER_DEVICE = """
import sys, jax, numpy as np
from sana_jax import SanaPipeline
pipe, other = SanaPipeline.from_pretrained(sys.argv[1]), jax.devices()[1]
latents = np.random.default_rng(0).standard_normal((1, 1, 8, 8), np.float32)
embeds, mask = pipe.text_encoder.encode(["a seven"])
given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "latents": latents}
options = {"num_inference_steps": 2, "output_type": "np"}
moved = pipe(**jax.device_put(given, other), **options).images
np.testing.assert_array_equal(moved, pipe(**given, **options).images)
"""


def test_arrays_of_another_device_come_to_the_network(run):
    environment = {**os.environ, "XLA_FLAGS": simulated_devices(2)}
    command = [sys.executable, "-c", ON_ANOTHER_DEVICE, str(run.directory)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_without_jit_nothing_is_sampled(pipe):
    with jax.disable_jit(), pytest.raises(UserError, match=r"the transformer .* which jax_disable_jit .* forbids"):
        latents_of(pipe, PROMPT)
    latents_of(pipe, PROMPT)


def test_sampling_function_is_what_the_pipeline_does(pipe):
    embeds, mask = pipe.text_encoder.encode([PROMPT, "a zero"])
    null = pipe.text_encoder.null_encoding()
    noise = jnp.transpose(initial_latents(0, 2, (1, 8, 8)), (0, 2, 3, 1))
    fn = jax.jit(make_sampling_fn(pipe.transformer, pipe.sampler, 3, 2.5))
    made = fn(pipe.params, noise, embeds, mask, *null, jax.random.key(0))
    expected = latents_of(pipe, [PROMPT, "a zero"])
    np.testing.assert_allclose(np.transpose(made, (0, 3, 1, 2)), expected, atol=2e-5)
    unguided = jax.jit(make_sampling_fn(pipe.transformer, pipe.sampler, 3, 1.0))(pipe.params, noise, embeds, mask)
    expected = latents_of(pipe, [PROMPT, "a zero"], guidance_scale=1.0)
    np.testing.assert_allclose(np.transpose(unguided, (0, 3, 1, 2)), expected, atol=1e-4)


def test_timestep_scale_reaches_the_transformer(pipe):
    scaled = SanaPipeline(
        SanaTransformer(tiny_config(timestep_scale=0.001)),
        pipe.params,
        pipe.sampler,
        pipe.text_encoder,
        pipe.autoencoder,
        pipe.defaults,
    )
    assert np.abs(latents_of(scaled, PROMPT) - latents_of(pipe, PROMPT)).max() > 1e-3


def test_colour_patches_and_another_solver(tmp_path):
    config = tiny_config(in_channels=3, out_channels=3, patch_size=2)
    write_run(tmp_path, random_params(config, 3), None, config, channels=3)
    pipe = SanaPipeline.from_pretrained(tmp_path, dtype="bfloat16")
    assert pipe.weights == "params"
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {jnp.dtype("bfloat16")}
    pipe.sampler = DPMSolver(3.0)
    image = pipe(PROMPT, height=4, width=10).images[0]
    assert (image.mode, image.size) == ("RGB", (10, 4))
    with pytest.raises(UserError, match=r"width 9 .*multiple of 2 .*8 or 10"):
        pipe(PROMPT, width=9)
    with pytest.raises(CheckpointError, match="ema"):
        SanaPipeline.from_pretrained(tmp_path, weights="ema")


# -- weights and directories ---------------------------------------------------------------------------------------


def test_which_weights(run, pipe):
    assert (pipe.weights, pipe.checkpoint_step) == ("ema", STEP)
    raw = SanaPipeline.from_pretrained(run.directory, weights="params", checkpoint_step=STEP)
    assert (raw.weights, raw.checkpoint_step) == ("params", STEP)
    jax.tree.map(np.testing.assert_array_equal, pipe.params, run.ema)
    jax.tree.map(np.testing.assert_array_equal, raw.params, run.params)
    with pytest.raises(CheckpointError, match="step 8"):
        SanaPipeline.from_pretrained(run.directory, checkpoint_step=8)


def test_save_pretrained_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = SanaPipeline.from_pretrained(tmp_path / "model")
    assert (again.weights, again.checkpoint_step) == (None, None)
    assert (again.sampler, again.text_encoder, again.autoencoder) == (
        pipe.sampler,
        pipe.text_encoder,
        pipe.autoencoder,
    )
    assert again.transformer.config == pipe.transformer.config
    assert again.defaults == pipe.defaults
    np.testing.assert_array_equal(latents_of(again, PROMPT), latents_of(pipe, PROMPT))
    with pytest.raises(UserError, match="exists already"):
        pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="one set of weights"):
        SanaPipeline.from_pretrained(tmp_path / "model", weights="ema")


def test_model_directory_round_trip(run):
    model = read_model_directory(run.directory)
    assert model.transformer_config == run.config
    index = json.loads((run.directory / "model_index.json").read_text())
    assert index["_class_name"] == "SanaPipeline"
    assert index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    assert not list(run.directory.rglob("*.tmp"))


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "vae/config.json",
    ],
)
def test_missing_and_damaged_files(run, tmp_path, name):
    directory = tmp_path / "digits"
    shutil.copytree(run.directory, directory, ignore=shutil.ignore_patterns("checkpoints"))
    (directory / name).write_text("{")
    with pytest.raises(UserError, match=r"config\.json|model_index\.json"):
        read_model_directory(directory)
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.main") as caught:
        read_model_directory(directory)
    assert str(directory / name) in str(caught.value)


def test_directories_that_are_no_model(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*train\.main"):
        SanaPipeline.from_pretrained(tmp_path / "nowhere")
    directory = tmp_path / "digits"
    shutil.copytree(run.directory, directory, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(CheckpointError, match="no weights"):
        SanaPipeline.from_pretrained(directory)
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="'FluxPipeline'"):
        read_model_directory(directory)
    (directory / "model_index.json").write_text(json.dumps({**index, "defaults": {"steps": 3}}))
    with pytest.raises(UserError, match=r"steps.*num_inference_steps"):
        read_model_directory(directory)


def test_components_that_do_not_fit(run, pipe, tmp_path):
    parts = {
        "sampler": pipe.sampler,
        "text_encoder": pipe.text_encoder,
        "autoencoder": pipe.autoencoder,
        "defaults": pipe.defaults,
    }
    for config, part in ((tiny_config(caption_channels=8), "caption_channels 8"), (tiny_config(in_channels=3), "3")):
        with pytest.raises(UserError, match=part):
            write_model_directory(tmp_path / "model", transformer_config=config, **parts)
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="SANA-Sprint"):
        SanaPipeline(pipe.transformer, pipe.params, SCM(), pipe.text_encoder, pipe.autoencoder, pipe.defaults)


# -- mistakes ------------------------------------------------------------------------------------------------------


EMBEDS, MASK = np.zeros((1, 5, 12), np.float32), np.ones((1, 5), np.int32)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"prompt": None}, ("prompt", "neither")),
        ({"prompt": []}, ("empty list",)),
        ({"prompt": "a nine"}, ("'nine'", "seven")),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, ("both",)),
        ({"prompt": None, "prompt_embeds": EMBEDS}, ("prompt_attention_mask", "belong together")),
        ({"prompt_attention_mask": MASK}, ("belong together",)),
        (
            {"prompt": None, "prompt_embeds": EMBEDS[..., :3], "prompt_attention_mask": MASK},
            ("(1, 5, 3)", "(B, L, 12)"),
        ),
        ({"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:, :3]}, ("mask (1, 3)",)),
        ({"negative_prompt": "a", "negative_prompt_embeds": EMBEDS}, ("negative_prompt_embeds", "only one")),
        ({"negative_prompt_embeds": EMBEDS}, ("negative_prompt_attention_mask",)),
        ({"negative_prompt_embeds": EMBEDS[:, :3], "negative_prompt_attention_mask": MASK[:, :3]}, ("3 tokens", "5")),
        ({"prompt": ["a"] * 3, "negative_prompt": ["a", "one"]}, ("2 negative prompts for 3",)),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, ("negative_prompt", "not be used", "guidance_scale 1")),
        ({"guidance_interval": (0.0, 0.5), "guidance_scale": 0.0}, ("guidance_interval", "not be used")),
        ({"guidance_interval": (0.5, 0.1)}, ("(0.5, 0.1)",)),
        ({"height": 0}, ("height 0", "1")),
        ({"num_inference_steps": 0}, ("num_inference_steps=0",)),
        ({"num_images_per_prompt": 0}, ("num_images_per_prompt 0",)),
        ({"output_type": "pt"}, ("'pt'", "pil, np, latent")),
        ({"seed": -1}, ("seed -1",)),
        ({"seed": 3, "latents": np.zeros((1, 1, 8, 8))}, ("seed 3", "not be used")),
        ({"latents": np.zeros((1, 8, 8, 1))}, ("(1, 8, 8, 1)", "(1, 1, 8, 1)")),
        ({"latents": np.zeros((8, 8))}, ("(8, 8)",)),
        ({"latents": np.zeros((1, 1, 8, 8)), "height": 16}, ("16x8",)),
        ({"latents": np.full((1, 1, 8, 8), np.nan)}, ("sampling", "1 of 1")),
        ({"prompt": None, "prompt_embeds": EMBEDS * np.nan, "prompt_attention_mask": MASK}, ("text encoding",)),
        ({"prompt": ["a", None]}, ("prompt None is not a text",)),
        ({"prompt": b"a seven"}, ("prompt 97 is not a text",)),
        ({"prompt": ["a", "one"], "negative_prompt": np.array(["a"] * 3)}, ("3 negative prompts for 2",)),
        ({"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": -1e4 * MASK}, ("0 and 1",)),
        ({"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": 2 * MASK}, ("mask has other values",)),
        ({"prompt": None, "prompt_embeds": EMBEDS[:0], "prompt_attention_mask": MASK[:0]}, ("(0, 5, 12)",)),
        ({"latents": Unreadable((1, 1, 8, 8))}, ("latents can't be read", "ScalarType", ".detach().float().numpy()")),
        ({"prompt": None, "prompt_embeds": Unreadable((1, 5, 12)), "prompt_attention_mask": MASK}, ("embeds can't",)),
        ({"latents": np.zeros((1, 1, 8, 8), np.complex64)}, ("latents of complex64", "real numbers")),
        ({"num_images_per_prompt": 2.0}, ("num_images_per_prompt 2.0", "a whole number")),
        ({"height": 8.0}, ("height 8.0", "a whole number")),
        ({"width": "8"}, ("width '8'", "a whole number")),
        ({"guidance_interval": 0.5}, ("guidance_interval 0.5", "highest")),
        ({"pag_scale": 3.0, "pag_applied_layers": [0.5]}, ("pag_applied_layers [0.5]", "0 to 1")),
    ],
)
def test_mistakes(pipe, arguments, parts):
    with pytest.raises(UserError) as caught:
        pipe(**{"prompt": "a seven", **arguments})
    for part in parts:
        assert part in str(caught.value)


def test_values_that_are_not_finite_name_their_stage(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.autoencoder), "decode", lambda _self, latents: latents / 0)
    with pytest.raises(UserError, match=r"decoding gave values that are not finite in 1 of 1"):
        pipe(PROMPT)


def test_dtype_that_is_not_allowed(run):
    with pytest.raises(UserError, match=r"'int8'.*float32"):
        text_to_image.SanaPipeline.from_pretrained(run.directory, dtype="int8")


def test_text_settings_that_would_not_be_used(pipe):
    embeds, mask = pipe.text_encoder.encode([PROMPT])
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 1.0}
    with pytest.raises(UserError, match="max_sequence_length would not be used, since embeddings are given"):
        pipe(**given, max_sequence_length=4)
    with pytest.raises(UserError, match="would not be used: the text encoder WordEncoder has no such setting"):
        pipe(PROMPT, complex_human_instruction=["draw"])
    with pytest.raises(UserError, match=r"seed 1\.5"):
        pipe(PROMPT, seed=1.5)


def test_a_save_that_fails_leaves_nothing(pipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sana_jax.pipelines.opening.write_model_directory", fail)
    with pytest.raises(UserError, match="No space left on device"):
        pipe.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
