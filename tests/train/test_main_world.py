"""World models through the trainer: clips with poses, previews, resuming, causal blocks, LoRA, latents in zip files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import pytest

from configs.world import WorldChunksConfig
from sana_jax import SanaWMPipeline, SanaWMStreamingPipeline
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.errors import UserError
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.image_inputs import read_picture
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.pipelines.opening import open_model
from sana_jax.pipelines.world_inputs import view_at
from sana_jax.text_encoders import WordEncoder
from sana_jax.weights.rules import flatten
from tests.pipelines.tiny_world import random_like
from tests.train.data.test_world_data import INTRINSICS, path_of, save_videos
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    pixels,
    rows,
    saved_state,
)
from train.batch import CAMERA, FIRST_FRAME, PLUCKER
from train.main import main as train
from train.preview_clips import clip_table
from train.recipes.base import Prompts
from train.recipes.world import WorldChunkCausalTraining
from train.run_directory import read_config

STEPS, SAVE_EVERY, FRAMES, SIZE = 4, 2, 5, (4, 8)
NETWORK = SanaWMConfig(
    in_channels=3, num_layers=1, hidden_size=16, num_attention_heads=2, softmax_every_n=0, linear_head_dim=8,
    caption_channels=8, mlp_ratio=2.0, chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=1, revision="current",
)  # fmt: skip
OPTIONS = {
    "steps": STEPS,
    "batch-size": 2,
    "data.clip-frames": FRAMES,
    "data.clip-fps": 10,
    "data.clip-size": list(SIZE),
    "data.max-bad-share": 0.4,
    "compute.dtype": "float32",
    "compute.remat": "none",
    "compute.scan-blocks": False,
    "optimizer.warmup-steps": 0,
    "optimizer.learning-rate": 1e-3,
    "optimizer.epsilon": 1e-3,
    "logging.every": 1,
    "logging.tensorboard": False,
    "checkpoint.every": SAVE_EVERY,
    "checkpoint.keep-last": 9,
    "preview.every": STEPS,
    "preview.captions": 1,
    "preview.num-inference-steps": 2,
    "preview.guidance-scale": 1.0,
}


def words(preset: str, place, name: str, values: dict | None = None) -> list[str]:
    model = {"run-dir": place / name, "model": place / "base", "data.path": place / "videos"}
    found = [preset]
    options = {**model, **OPTIONS, **(values or {})}
    for option, value in ((option, value) for option, value in options.items() if value is not None):
        found += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return found


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny random world model, and three videos of which one has a path that is bent."""
    directory = tmp_path_factory.mktemp("worlds")
    transformer = SanaWMTransformer(NETWORK)
    pipeline = SanaWMPipeline(
        transformer,
        random_like(abstract_params(transformer), 0, 0.1),
        FlowEuler(9.8),
        WordEncoder(("a", "street", "0", "1", "2"), embedding_dim=8, max_length=6),
        PixelVideoAutoencoder(channels=3),
        SamplingDefaults(guidance_scale=1.0, num_inference_steps=2, height=SIZE[0], width=SIZE[1], frames=5, fps=10.0),
    )
    pipeline.save_pretrained(directory / "base")
    save_videos(directory / "videos", 3)
    bent = path_of(12)
    bent[3, :3, :3] *= 1.1
    np.savez(directory / "videos" / "2.npz", c2w=bent, intrinsics=INTRINSICS)
    return directory


@pytest.fixture(scope="module")
def tuned(place):
    assert train(words("finetune_world", place, "run")) == 0
    return place / "run"


def test_a_world_learns_from_clips_with_poses(place, tuned):
    assert np.isfinite([row["loss"] for row in rows(tuned)]).all()
    index = json.loads((tuned / "model_index.json").read_text())
    assert index["_class_name"] == "SanaWMPipeline"
    config = read_config(tuned)
    assert config.transformer == NETWORK
    assert (config.flow.flow_shift, config.flow.sampling_flow_shift, config.flow.image_to_video) == (9.95, 9.8, 0.9)
    state, before = saved_state(tuned, STEPS), flatten(random_like(abstract_params(SanaWMTransformer(NETWORK)), 0, 0.1))
    learned = {path for path, leaf in before.items() if np.abs(state["/".join(("params", *path))] - leaf).max() > 0}
    # beside Plücker coordinates the map of directions is not used
    assert {path[0] for path in set(before) - learned} == {"raymap_embedding"}


def test_the_run_is_a_world_model(place, tuned):
    pipeline = SanaWMPipeline.from_pretrained(tuned)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    camera = {"c2w": path_of(FRAMES).astype(np.float32), "intrinsics": [8.0, 8.0, 4.0, 2.0]}
    made = pipeline(image, "a street", **camera, output_type="np")
    assert made.frames.shape == (1, FRAMES, *SIZE, 3)
    np.testing.assert_allclose(made.frames[0, 0], image / 255, atol=1e-6)
    # previews are drawn in the same way, from the sample's own first frame
    first, last = pixels(tuned, 0).astype(np.int64), pixels(tuned, STEPS).astype(np.int64)
    shape = np.asarray(clip_table(made.frames, ["a street 0"])).shape
    assert first.shape == last.shape == shape
    assert np.abs(first - last).max() > 0


def test_resume_is_exact(tuned, capfd):
    copy = tuned.with_name("copy")
    shutil.copytree(tuned, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    for path in (copy / "samples").glob(f"step_{STEPS:06d}.*"):
        path.unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert f"resumed at step {SAVE_EVERY} of {STEPS}" in out
    assert "the run goes on with the samples that it began with" in out
    assert_same_run(copy, tuned, STEPS)
    assert not left_behind(copy)


@pytest.mark.prove
def test_causal_blocks_from_a_world(place, capfd):
    options = {
        "chunk-causal.block-frames": 2,
        "preview.guidance-scale": 2.0,
        "validation.every": STEPS,
        "data.validation-share": 0.4,
        "mesh.fsdp": 1,
    }
    status, out, err = call(capfd, *words("sana_wm_2b_chunk_causal", place, "causal", options))
    assert status == 0, err
    assert "causal blocks of 2 latent frames (first_plus_one)" in out
    assert rows(place / "causal")[-1]["validation_loss"] > 0
    assert read_config(place / "causal").chunk_causal == WorldChunksConfig(block_frames=2)
    assert SanaWMPipeline.from_pretrained(place / "causal").causal_blocks == (2, "first_plus_one")
    assert "has been trained in causal blocks" in capfd.readouterr().out


def test_a_run_in_causal_blocks_is_sampled_as_its_previews_are(place, tmp_path, capsys):
    model = open_model(place / "base", "SanaWMPipeline")
    recipe = WorldChunkCausalTraining(model.transformer, WorldChunksConfig(block_frames=2))
    run = BaseModelFile(recipe.kind, "base", str(place / "base"), "0", recipe.settings())
    causal = SanaWMPipeline._from_model(dataclasses.replace(model, trained_from=run), "all")
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    poses, lens = path_of(FRAMES).astype(np.float32), [8.0, 8.0, 4.0, 2.0]
    noise = np.random.default_rng(1).standard_normal((1, 3, FRAMES, *SIZE)).astype(np.float32)
    asked = {"c2w": poses, "intrinsics": lens, "latents": noise, "output_type": "latent"}
    found = causal(image, "a street", **asked).frames
    whole = SanaWMPipeline._from_model(model, "all")(image, "a street", **asked).frames
    given = causal._given(view_at(read_picture(image, shortest=min(SIZE)), poses, lens, SIZE, 1, 1))
    embeds, mask = causal.text_encoder.encode(["a street"])
    conditions = {CAMERA: given.camera_conditions, PLUCKER: given.chunk_plucker, FIRST_FRAME: given.frames}
    sample = recipe.sampling_function(causal.sampler, 2, 1.0)
    preview = sample(causal.params, None, np.moveaxis(noise, 1, -1), Prompts(embeds, mask, None, None), conditions)
    np.testing.assert_allclose(found, np.moveaxis(preview, -1, 1), rtol=0, atol=1e-5)
    assert np.abs(found - whole).max() > 1e-2
    causal.save_pretrained(tmp_path / "saved")
    assert "does not say that the model was trained in causal blocks" in capsys.readouterr().out
    assert (
        SanaWMStreamingPipeline._from_model(dataclasses.replace(model, trained_from=run), "all").sampler.block_frames
        == 2
    )


@pytest.mark.prove
def test_a_lora_of_a_world(place, capfd):
    options = {"lora.rank": 2, "lora.targets": "all_linear", "optimizer.learning-rate": 3e-2}
    status, out, err = call(capfd, *words("lora_world", place, "lora", options))
    assert status == 0, err
    assert "delta_blocks/attn1/to_qkv" in out
    first, last = (pixels(place / "lora", step).astype(np.int64) for step in (0, STEPS))
    assert np.abs(first - last).max() > 0
    assert {name.split("/")[1] for name in saved_state(place / "lora", STEPS) if name.startswith("params/")} == {"lora"}
    pipeline = SanaWMPipeline.from_pretrained(place / "base")
    pipeline.load_lora_weights(place / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.prove
def test_latents_of_zip_files(place, capfd):
    folder = place / "zips"
    folder.mkdir()
    rng, metadata = np.random.default_rng(0), {}
    camera = {"c2w": path_of(FRAMES).tolist(), "intrinsics": [8.0, 8.0, 4.0, 2.0]}
    with zipfile.ZipFile(folder / "0.zip", "w") as archive:
        for name in "abc":
            with archive.open(f"{name}.npy", "w") as member:
                count = FRAMES - (name == "c")
                np.save(member, rng.standard_normal((3, count, *SIZE)).astype(np.float16))
            poses = {"c2w": camera["c2w"][:count], "intrinsics": camera["intrinsics"]}
            metadata[name] = {"prompt": "a street", **poses}
    (folder / "0.json").write_text(json.dumps(metadata))
    options = {"data.path": folder, "data.format": "zip_latents", "data.short-clips": "pad", "preview.every": 0}
    options |= {"data.clip-size": None, "preview.captions": None}  # latents have a size of their own; none is drawn
    status, out, err = call(capfd, *words("finetune_world", place, "zipped", options))
    assert status == 0, err
    assert "1 samples are filled up to 5 latent frames" in out
    assert np.isfinite([row["loss"] for row in rows(place / "zipped")]).all()


def test_what_does_not_go_together(place):
    with pytest.raises(UserError, match=r"trains on data without a camera, and --model .* is a world model"):
        train(["finetune_video", "--model", str(place / "base"), "--data.path", str(place / "videos"), "--device=cpu"])
    with pytest.raises(UserError, match=r"--preview.sampler dpm_solver is not allowed; allowed is flow_euler"):
        train(words("finetune_world", place, "never", {"preview.sampler": "dpm_solver"}))
    with pytest.raises(UserError, match=r"--data.joint-interval 4 is not allowed; allowed is 0 for worlds"):
        train(words("finetune_world", place, "never", {"data.joint-interval": 4, "data.joint-pictures": "x"}))
    assert not (place / "never").exists()
