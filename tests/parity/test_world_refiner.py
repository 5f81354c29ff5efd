"""SANA-WM's refiner beside diffusers' SanaWMLTX2Refiner: prompt, loop and window with the same noise."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import SanaWMRefiner
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.errors import UserError
from tests.parity import ltx2_vae_oracle
from tests.parity import refiner_oracle as oracle
from tests.parity.gemma_oracle import relative_error

TOLERANCE = 2e-6
PROMPT = "  A red panda reading a book under a tree\n"
FRAMES = 12


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("refiner")
    oracle.save(path)
    return path


@pytest.fixture(scope="module")
def reference(directory):
    return oracle.load(directory)


@pytest.fixture(scope="module")
def refiner(directory):
    return SanaWMRefiner.from_pretrained(directory, residency="all")


def test_prompt(refiner, reference):
    assert refiner.text_encoder.max_length == oracle.TEXT_TOKENS
    expected, mask = reference._encode_prompt(PROMPT, device="cpu", dtype=reference.transformer.dtype)
    assert mask.all()
    found = refiner.encode_prompt(PROMPT)
    assert relative_error(found, expected.detach().numpy()) <= TOLERANCE


# a window that fills up and slides, with a short last block; the published one; nothing as it is published
@pytest.mark.parametrize(
    ("options", "sinks"),
    [
        ({"kv_max_frames": 6}, [0, 0, 1, 4]),
        ({}, [0, 0, 0, 0]),
        ({"sink_size": 2, "block_size": 4, "kv_max_frames": 5, "sigmas": (0.8, 0.3, 0.0), "fps": 24.0}, [0, 1, 5]),
    ],
)
def test_refined_latents(refiner, reference, monkeypatch, options, sinks):
    latents = oracle.draw_video(FRAMES)
    noise = oracle.draw_video(FRAMES - options.get("sink_size", 1), seed=1)
    expected, positions = oracle.refine(reference, monkeypatch, latents, noise, PROMPT, **{"fps": 16.0, **options})
    found = refiner(latents, PROMPT, noise=noise, **options)
    sampler = RefinerSampler(
        options.get("sigmas", (0.909375, 0.725, 0.421875, 0.0)),
        options.get("block_size", 3),
        options.get("sink_size", 1),
        options.get("kv_max_frames", 11),
    )
    assert [sampler.sink_position(block) for block in range(len(sinks))] == sinks
    # tables of the loop: the sink's own; then of each block the sink's and one for each step and for the reading
    per_block = len(sampler.sigmas) + 1
    assert [places[0] for places in positions[1::per_block]] == sinks
    assert found.block_count == len(sinks)
    assert np.std(expected[:, :, sampler.sink_frames :] - latents[:, :, sampler.sink_frames :]) > 0.3
    np.testing.assert_array_equal(found.frames[:, :, : sampler.sink_frames], latents[:, :, : sampler.sink_frames])
    for start, end in sampler.blocks(FRAMES):
        assert relative_error(found.frames[:, :, start:end], expected[:, :, start:end]) <= TOLERANCE, start


def test_frames(directory, refiner, reference, monkeypatch, tmp_path):
    """With the first stage's autoencoder in the directory: the frames that anchor the video are left out."""
    vae = ltx2_vae_oracle.torch_model("one stage")
    copy = shutil.copytree(directory, tmp_path / "copy")
    vae.save_pretrained(copy / "vae")
    drawing = SanaWMRefiner.from_pretrained(copy)
    drawing.programs = refiner.programs
    latents, noise = oracle.draw_video(4), oracle.draw_video(3, seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(reference, "vae", vae)
        expected, _ = oracle.refine(reference, monkeypatch, latents, noise, PROMPT, output_type="np", fps=16.0)
    found = drawing(latents, PROMPT, noise=noise, output_type="np").frames
    assert found.shape == (1, *expected.shape) == (1, 2 * 3, 4 * oracle.SIZE[0], 4 * oracle.SIZE[1], 3)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-5)


def test_dtypes_and_names(directory, refiner):
    assert refiner.transformer.dtype == refiner.connectors.dtype == refiner.text_encoder.dtype == jnp.float32
    half = SanaWMRefiner.from_pretrained(directory, dtype="bfloat16")
    assert half.transformer.dtype == half.connectors.dtype == half.text_encoder.dtype == jnp.bfloat16
    assert not any(network.loaded for network in half.networks.values() if network is not None)
    assert half.autoencoder is None
    # a run's folder tells weights apart by these
    assert refiner.weights == half.weights
    assert set(refiner.weights) == {"transformer", "connectors", "text_encoder"}


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "SanaWMPipeline"}, "SanaWMPipeline"),
        ("model_index.json", {"text_max_sequence_length": 30}, "max_sequence_length 30"),
        ("scheduler/scheduler_config.json", {"shift": 3.0}, "flow_shift=3.0"),
        ("scheduler/scheduler_config.json", {"_class_name": "SCMScheduler"}, "SCMScheduler with"),
        ("transformer/config.json", {"_class_name": "SanaTransformer2DModel"}, "SanaTransformer2DModel"),
        ("transformer/config.json", {"cross_attn_mod": True}, "LTX-2.3"),
        ("connectors/config.json", {"_class_name": "Other"}, "Other"),
        ("text_encoder/config.json", {"model_type": "gemma2"}, "gemma2"),
    ],
)
def test_directories_that_are_refused(directory, tmp_path, file, changes, said):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **changes}))
    with pytest.raises(UserError) as caught:
        SanaWMRefiner.from_pretrained(copy)
    assert said in str(caught.value)
    with pytest.raises(UserError, match="float16"):
        SanaWMRefiner.from_pretrained(directory, dtype="float16")
