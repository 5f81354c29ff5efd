"""Pipelines with token encoders: files, conditions of a call, guidance, sweeps, the command line, bad values."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax import generate
from sana_jax.condition_tokens_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    SavedTokens,
    load_condition_tokens,
    save_condition_tokens,
)
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.condition_tokens import (
    ConditionEncoders,
    TokenEncoderConfig,
    apply_tokens,
    init_tokens,
    null_tokens,
)
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.conditions import read_numbers
from sana_jax.pipelines.sampling_function import initial_latents, make_sampling_fn
from sana_jax.pipelines.sweep import Sweep, draw_sweep, parse_condition
from sana_jax.pipelines.text_to_image import SanaPipeline
from tests.pipelines.tiny_model import random_params, tiny_config, write_run

CONFIG = tiny_config()
ENCODERS = ConditionEncoders(
    {
        "object": TokenEncoderConfig("vector", width=6, num_tokens=2),
        "zoom": TokenEncoderConfig("scalar", frequencies=2, inject="after", value_range=(0.0, 2.0)),
    },
    CONFIG.caption_channels,
    CONFIG.inner_dim,
)
PROMPT, VECTOR = "a handwritten seven", np.arange(6, dtype=np.float32) / 6
QUICK = {"num_inference_steps": 2, "seed": 3, "output_type": "latent"}


def trained(seed: int = 0) -> dict:
    """Parameters as after training: the tokens count as much as a word."""
    params = init_tokens(ENCODERS, jax.random.key(seed))
    return {name: {**encoder, "attention_weight": jnp.float32(0.3)} for name, encoder in params.items()}


@pytest.fixture(scope="module")
def saved() -> SavedTokens:
    return SavedTokens(ENCODERS, trained())


@pytest.fixture
def pipeline(run, saved) -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(run.directory)
    pipeline.load_condition_tokens(saved)
    return pipeline


# --- files ----------------------------------------------------------------------------------------------------------


def test_files(tmp_path, saved):
    written = saved._replace(image_encoders={"object": {"directory": "siglip", "id": "abc", "normalize": True}})
    save_condition_tokens(tmp_path, written)
    found = load_condition_tokens(tmp_path)
    assert found.encoders == ENCODERS
    assert list(found.encoders.encoders) == ["object", "zoom"]
    assert found.image_encoders == written.image_encoders
    jax.tree.map(np.testing.assert_array_equal, found.params, saved.params)
    assert b"diffusers" in (tmp_path / WEIGHTS_NAME).read_bytes()


def test_damaged_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        load_condition_tokens(tmp_path)
    save_condition_tokens(tmp_path, saved)
    good = (tmp_path / CONFIG_NAME).read_text()

    def refused(change, match, error=UserError):
        values = json.loads(good)
        change(values)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
        with pytest.raises(error, match=match):
            load_condition_tokens(tmp_path)

    refused(lambda values: values.pop("inner_dim"), "it must have")
    refused(lambda values: values["encoders"]["zoom"].update(layers=-1), r"encoders\.zoom.*layers=-1")
    refused(lambda values: values["encoders"]["zoom"].update(colour=1), "colour")
    refused(lambda values: values["encoders"]["zoom"].update(hidden=5), "written together", CheckpointError)
    (tmp_path / CONFIG_NAME).write_text(good)
    (tmp_path / WEIGHTS_NAME).write_bytes((tmp_path / WEIGHTS_NAME).read_bytes()[:-5])
    with pytest.raises(CheckpointError):
        load_condition_tokens(tmp_path)


def test_a_directory_with_the_files_and_saving(tmp_path, run, saved, pipeline):
    write_run(tmp_path / "run", run.params, run.ema, run.config)
    save_condition_tokens(tmp_path / "run", saved)
    conditions = {"zoom": 0.5, "object": VECTOR}
    expected = pipeline(PROMPT, conditions=conditions, **QUICK).images
    with_files = SanaPipeline.from_pretrained(tmp_path / "run")
    np.testing.assert_array_equal(with_files(PROMPT, conditions=conditions, **QUICK).images, expected)
    with_files.save_pretrained(tmp_path / "copy")
    again = SanaPipeline.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(again(PROMPT, conditions=conditions, **QUICK).images, expected)


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_call_is_the_sampling_function_with_tokens(pipeline, saved, guidance_scale):
    """Conditions on the positive branch and null tokens on the negative one, for several prompts and pictures."""
    zooms, prompts, repeats = [0.2, 1.9], [PROMPT, "a handwritten zero"], 2
    found = pipeline(
        prompts, conditions={"zoom": zooms, "object": VECTOR}, num_images_per_prompt=repeats,
        guidance_scale=guidance_scale, **QUICK,
    ).images  # fmt: skip
    encoder = pipeline.text_encoder
    embeds, mask = (jnp.repeat(jnp.asarray(array), repeats, axis=0) for array in encoder.encode(prompts))
    null_embeds, null_mask = (jnp.asarray(array) for array in encoder.null_encoding())
    conditions = {"zoom": jnp.repeat(jnp.array(zooms), repeats), "object": jnp.tile(VECTOR, (4, 1))}
    sample = make_sampling_fn(pipeline.transformer, pipeline.sampler, 2, guidance_scale)
    expected = jax.jit(sample)(
        pipeline.params, initial_latents(3, 4, (1, 8, 8)).transpose(0, 2, 3, 1), embeds, mask,
        null_embeds, null_mask, None, None, apply_tokens(ENCODERS, saved.params, conditions),
        null_tokens(ENCODERS, saved.params, 1),
    )  # fmt: skip
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=2e-5)
    other = pipeline(
        prompts, conditions={"zoom": zooms[::-1], "object": VECTOR}, num_images_per_prompt=repeats,
        guidance_scale=guidance_scale, **QUICK,
    ).images  # fmt: skip
    assert np.abs(other - found).max() > 1e-3


def test_fresh_and_unloaded_encoders_draw_what_the_model_draws(pipe):
    """With normalised queries and keys: in a random network without, logits differ by 100, and no weight is small."""
    config = tiny_config(qk_norm="rms_norm_across_heads")
    parts = (pipe.sampler, pipe.text_encoder, pipe.autoencoder, pipe.defaults)
    pipeline = SanaPipeline(SanaTransformer(config), random_params(config, 2), *parts)
    expected = pipeline(PROMPT, **QUICK).images
    conditions = {"zoom": 1.0, "object": VECTOR}
    pipeline.load_condition_tokens(SavedTokens(ENCODERS, trained()))
    assert np.abs(pipeline(PROMPT, conditions=conditions, **QUICK).images - expected).max() > 1e-3
    pipeline.load_condition_tokens(SavedTokens(ENCODERS, init_tokens(ENCODERS, jax.random.key(0))))
    fresh = pipeline(PROMPT, conditions=conditions, **QUICK).images
    np.testing.assert_allclose(fresh, expected, atol=1e-5 * np.abs(expected).max())
    pipeline.unload_condition_tokens()
    np.testing.assert_array_equal(pipeline(PROMPT, **QUICK).images, expected)


def test_perturbed_attention_and_tokens(pipeline):
    guided = pipeline(PROMPT, conditions={"zoom": 1.0}, pag_scale=2.0, pag_applied_layers=0, **QUICK).images
    assert np.isfinite(guided).all()


def test_what_is_not_given_is_left_open(pipeline, saved, capsys):
    pipeline(PROMPT, conditions={"object": VECTOR}, **QUICK)
    assert "condition zoom is not given" in capsys.readouterr().out
    outside = pipeline(PROMPT, conditions={"zoom": 2.5, "object": VECTOR}, **QUICK)
    assert "condition zoom=2.5 is outside 0 to 2" in capsys.readouterr().out
    assert np.isfinite(outside.images).all()


@pytest.mark.parametrize(
    ("conditions", "part"),
    [
        ({"zoom": float("nan")}, "not finite"),
        ({"zoom": "near"}, "is no number"),
        ({"zoom": [0.1, 0.2, 0.3]}, "3 values of condition zoom for 1 prompts"),
        ({"zoom": np.zeros((2, 2))}, "allowed is a number"),
        ({"object": np.zeros(5)}, "a vector of 6 numbers"),
        ({"object": np.full(6, np.inf)}, "not finite"),
        ({"size": 1.0}, "this model's are object, zoom"),
        ({"object": np.zeros((16, 16, 3), np.uint8)}, r"its directory as image_encoder \(--image-encoder\)"),
        ({"zoom": np.zeros((16, 16, 3), np.uint8)}, "allowed is a number"),
    ],
)
def test_bad_conditions(pipeline, conditions, part):
    with pytest.raises(UserError, match=part):
        pipeline(PROMPT, conditions=conditions, **QUICK)


def test_other_mistakes(run, saved, tmp_path):
    plain = SanaPipeline.from_pretrained(run.directory)
    with pytest.raises(UserError, match="no token encoders"):
        plain(PROMPT, conditions={"zoom": 1.0}, **QUICK)
    with pytest.raises(CheckpointError, match="caption_channels 13"):
        plain.load_condition_tokens(SavedTokens(dataclasses.replace(ENCODERS, caption_channels=13), {}))
    with pytest.raises(FileNotFoundError, match=r"gone\.npy"):
        read_numbers("object", "gone.npy", ENCODERS.encoders["object"])
    (tmp_path / "bad.npy").write_bytes(b"not numpy")
    with pytest.raises(UserError, match="save it again"):
        read_numbers("object", tmp_path / "bad.npy", ENCODERS.encoders["object"])


class _FakeEncoder:
    """Stands for SigLIP: a picture's mean colour, twice."""

    id, shape = "f00", (6,)

    def __init__(self):
        self.freed = 0

    def encode(self, pictures):
        return np.stack([np.tile(np.asarray(p, np.float32).mean((0, 1)) / 255, 2) for p in pictures])

    def free(self):
        self.freed += 1


def test_pictures_go_through_the_image_encoder_of_training(pipeline, saved):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    recorded = saved._replace(image_encoders={"object": {"directory": "gone", "id": "f00"}})
    encoder = _FakeEncoder()
    pipeline.load_condition_tokens(recorded, image_encoder=encoder)
    found = pipeline(PROMPT, conditions={"object": picture, "zoom": 1.0}, **QUICK).images
    vector = encoder.encode([picture])
    expected = pipeline(PROMPT, conditions={"object": vector, "zoom": 1.0}, **QUICK).images
    np.testing.assert_array_equal(found, expected)
    assert encoder.freed == 1
    films = draw_sweep(pipeline, Sweep("zoom", (1.0, 0.0)), [PROMPT], {"conditions": {"object": picture}, **QUICK})
    assert encoder.freed == 2  # once for all values
    np.testing.assert_array_equal(films[0].images, found)
    encoder.id = "0ff"
    with pytest.raises(CheckpointError, match=r"0ff.*trained with f00"):
        pipeline(PROMPT, conditions={"object": picture}, **QUICK)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory, run, saved):
    directory = tmp_path_factory.mktemp("conditions") / "run"
    write_run(directory, run.params, run.ema, run.config)
    save_condition_tokens(directory, saved)
    np.save(directory.parent / "object.npy", VECTOR)
    return directory


def call(*words) -> None:
    generate.main([str(word) for word in words])


def test_generate(with_tokens, tmp_path, capsys):
    words = ("--model", with_tokens, "--prompt", PROMPT, "--steps", 2, "--seed", 3)
    given = ("--condition", f"object={with_tokens.parent / 'object.npy'}", "--condition", "zoom=0.5")
    call(*words, *given, "--out", tmp_path / "one.png")
    assert "conditions: object (a vector of 6" in capsys.readouterr().out
    pipeline = SanaPipeline.from_pretrained(with_tokens)
    expected = pipeline(PROMPT, conditions={"zoom": 0.5, "object": VECTOR}, num_inference_steps=2, seed=3).images[0]
    with Image.open(tmp_path / "one.png") as image:
        np.testing.assert_array_equal(np.asarray(image)[::16, ::16], np.asarray(expected))
        assert "zoom=0.5" in image.text["condition"]
    call(*words, *given[:2], "--sweep", "zoom=0:2:3", "--out", tmp_path / "sweep.png")
    call(*words, *given[:2], "--sweep", "zoom=0:2:3", "--out", tmp_path / "sweep.gif", "--enlarge", 2)
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width > 3 * 128
        assert image.text["sweep"] == "zoom=0:2:3"
    with Image.open(tmp_path / "sweep.gif") as image:
        assert (image.n_frames, image.size) == (4, (16, 16))  # there and back


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--sweep", "zoom=0:1", "--out", "a.png"), "NAME=FIRST:LAST:COUNT"),
        (("--sweep", "zoom=0:1:3", "--out", "a.jpg"), r"\.png"),
        (("--out", "a.gif"), r"\.png"),
        (("--sweep", "zoom=0:1:3", "--condition", "zoom=1", "--out", "a.png"), "leave one of them out"),
        (("--condition", "zoom", "--out", "a.png"), "NAME=VALUE"),
        (("--condition", "size=1", "--out", "a.png"), "unknown conditions size"),
    ],
)
def test_generate_refuses(with_tokens, words, part):
    with pytest.raises(UserError, match=part):
        call("--model", with_tokens, "--prompt", PROMPT, "--steps", 1, *words)


def test_options_that_would_not_be_used(run, published, tmp_path):
    with pytest.raises(UserError, match="no token encoders"):
        call("--model", run.directory, "--prompt", PROMPT, "--condition", "zoom=1", "--out", tmp_path / "a.png")
    with pytest.raises(UserError, match="--image-encoder would not be used"):
        call("--model", run.directory, "--prompt", PROMPT, "--image-encoder", "x", "--out", tmp_path / "a.png")
    with pytest.raises(UserError, match="SanaSprintPipeline"):
        call("--model", published("sprint"), "--prompt", "x", "--condition", "zoom=1", "--out", tmp_path / "a.png")


def test_texts_to_sweeps_and_conditions():
    assert Sweep.parse("zoom=0:1:5") == Sweep("zoom", (0.0, 0.25, 0.5, 0.75, 1.0))
    assert Sweep.parse("zoom=1:0:2").values == (1.0, 0.0)
    assert parse_condition("zoom=1e-1") == ("zoom", 0.1)
    assert parse_condition("object=a=b.png") == ("object", "a=b.png")
