"""SanaWMRefiner: going on after any end, another run's folder, noise by block, videos out, mistakes."""

from __future__ import annotations

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.errors import UserError
from sana_jax.pipelines import resumed_folder
from sana_jax.pipelines.world_refiner import SanaWMRefiner
from sana_jax.pipelines.world_refiner_blocks import block_noise, block_place, denoise_block, read_block
from sana_jax.weights.components import Resident
from tests.pipelines.tiny_model import Unreadable
from tests.pipelines.tiny_refiner import (
    BLOCKS,
    CHANNELS,
    FRAMES,
    OPTIONS,
    SIZE,
    WIDTH,
    draw_latents,
    draw_prompt,
    half_a_file,
    tiny_refiner,
)

PROMPT = draw_prompt()


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def refiner() -> SanaWMRefiner:
    """In bfloat16, so that what is kept in float32 must come back as it was."""
    return tiny_refiner()


@pytest.fixture(scope="module")
def straight(refiner) -> np.ndarray:
    """The latents of a run without an end, and the only programs that any run of this size needs."""
    out = refine(refiner)
    assert out.finished
    assert out.block_count == len(out.block_seconds) == BLOCKS
    assert len(refiner.programs) == 3  # the sink's, a block's and its reading's
    assert out.compile_seconds > 0
    assert np.isfinite(out.frames).all()
    assert np.abs(out.frames - draw_latents())[:, :, 1:].mean() > 0.2
    return out.frames


def refine(refiner, latents=None, **options):
    latents = draw_latents() if latents is None else latents
    if "prompt" not in options:
        options = {"prompt_embeds": PROMPT, **options}
    return refiner(latents, **{"say": lambda line: None, **OPTIONS, **options})


# --- going on -------------------------------------------------------------------------------------------------------


def test_killed_at_every_block(refiner, straight, tmp_path, monkeypatch):
    folder, save = tmp_path / "blocks", np.save
    at = [0]  # the block that is killed: first while its file is written, then behind it

    def half(file, array):
        if f"block-{at[0]:05d}" in file.name:
            half_a_file(file, array)
            raise Killed
        save(file, array)

    def end(pipeline, block, shown):
        assert shown["latents"].shape == (1, CHANNELS, 1, *SIZE)
        if block == at[0]:
            raise Killed

    for block in range(BLOCKS):
        at[0] = block
        with monkeypatch.context() as patched:
            patched.setattr(resumed_folder.np, "save", half)
            with pytest.raises(Killed):
                refine(refiner, checkpoint_dir=folder)
        assert len(list(folder.glob("block-*.npy"))) == block
        with pytest.raises(Killed):
            refine(refiner, checkpoint_dir=folder, callback_on_block_end=end)
        assert len(list(folder.glob("block-*.npy"))) == block + 1
    lines = []
    out = refine(refiner, checkpoint_dir=folder, say=lines.append)
    assert out.resumed_blocks == BLOCKS
    assert out.finished
    assert "nothing is refined" in lines[-1]
    np.testing.assert_array_equal(out.frames, straight)
    assert len(refiner.programs) == 3


@pytest.mark.parametrize("blocks", [1, 7])
def test_goes_on_behind_a_block(refiner, straight, tmp_path, blocks):
    # a callback may end a call too
    out = refine(
        refiner,
        checkpoint_dir=tmp_path,
        callback_on_block_end=lambda pipeline, block, shown: False if block == blocks - 1 else None,
    )
    assert (out.finished, out.block_count) == (False, blocks)
    np.testing.assert_array_equal(out.frames, straight[:, :, : 1 + blocks])
    lines = []
    out = refine(refiner, checkpoint_dir=tmp_path, say=lines.append)
    assert (out.finished, out.resumed_blocks, len(out.block_seconds)) == (True, blocks, BLOCKS - blocks)
    np.testing.assert_array_equal(out.frames, straight)
    assert any(f"going on behind block {blocks} of {BLOCKS}" in line for line in lines)


def test_a_folder_takes_numbers_of_numpy(refiner, straight, tmp_path):
    numbers = {"seed": np.int64(42), "block_size": np.int64(1), "fps": np.float32(16)}
    refine(refiner, checkpoint_dir=tmp_path, callback_on_block_end=lambda *_: False, **numbers)
    np.testing.assert_array_equal(refine(refiner, checkpoint_dir=tmp_path).frames, straight)


def test_a_finished_folder_needs_no_network(refiner, straight, tmp_path):
    refine(refiner, checkpoint_dir=tmp_path)
    again = tiny_refiner()

    def read():
        raise AssertionError("weights are read")

    again.transformer_weights = Resident("transformer", 1, read, refiner.transformer_weights.abstract)
    np.testing.assert_array_equal(refine(again, checkpoint_dir=tmp_path).frames, straight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latents": draw_latents(seed=1)}, "latents"),
        ({"latents": draw_latents(frames=12)}, "latents"),
        ({"prompt_embeds": draw_prompt(1)}, "the embeddings of the prompt differ"),
        ({"prompt": "a cat"}, "prompt None there and 'a cat' here"),
        ({"fps": 24.0}, "fps 16.0 there and 24.0 here"),
        ({"seed": 43}, "seed 42 there and 43 here"),
        ({"noise": draw_latents(FRAMES - 1)}, "the noise differs"),
        ({"kv_max_frames": 6}, "kv_max_frames 5 there and 6 here"),
        ({"sink_size": 2}, "sink_size 1 there and 2 here"),
        ({"block_size": 2}, "block_size 1 there and 2 here"),
        ({"sigmas": (0.9, 0.3, 0.0)}, "sigmas [0.9, 0.4, 0.0] there and [0.9, 0.3, 0.0] here"),
    ],
)
def test_the_folder_of_another_run(refiner, straight, tmp_path, options, said):
    refine(refiner, checkpoint_dir=tmp_path, callback_on_block_end=lambda *_: False)
    with pytest.raises(UserError) as caught:
        refine(refiner, checkpoint_dir=tmp_path, **options)
    assert "other settings" in str(caught.value)
    assert said in str(caught.value)


def test_other_weights_and_damaged_folders(refiner, straight, tmp_path, monkeypatch):
    folder = tmp_path / "blocks"
    refine(refiner, checkpoint_dir=folder, callback_on_block_end=lambda *_: False)
    other = tiny_refiner(weights={"transformer": "0123"})
    with pytest.raises(UserError, match="transformer weights None there and '0123' here"):
        refine(other, checkpoint_dir=folder)
    with pytest.raises(UserError, match="dtype 'bfloat16' there and 'float32' here"):
        refine(tiny_refiner(jnp.float32), checkpoint_dir=folder)
    # another device is told, not refused
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "computed_on": "an abacus"}))
    lines = []
    refine(refiner, checkpoint_dir=folder, say=lines.append)
    assert any("comes from an abacus" in line for line in lines)
    (folder / "block-00003.npy").write_bytes(b"\x93NUMPY\x01\x00half")
    with pytest.raises(UserError, match=r"block-00003\.npy is damaged"):
        refine(refiner, checkpoint_dir=folder)
    np.save(folder / "block-00003.npy", np.zeros((1, 2, 2, 3, 4), np.float32))
    with pytest.raises(UserError, match="of shape"):
        refine(refiner, checkpoint_dir=folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        refine(refiner, checkpoint_dir=folder)
    for name, allowed in ((".manifest.json.12.tmp", True), ("notes.txt", False)):
        strange = tmp_path / name.strip(".")
        strange.mkdir()
        (strange / name).write_text("half")
        if allowed:
            assert refine(refiner, checkpoint_dir=strange, callback_on_block_end=lambda *_: False).block_count == 1
        else:
            with pytest.raises(UserError, match="is no refinement's"):
                refine(refiner, checkpoint_dir=strange)

    def full_disk(file, array):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(resumed_folder.np, "save", full_disk)
        with pytest.raises(UserError, match=r"No space left .* go on"):
            refine(refiner, checkpoint_dir=tmp_path / "full")


# --- noise, blocks, state -------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_block_and_video(refiner, straight):
    longer = refine(refiner, draw_latents(13)).frames
    np.testing.assert_array_equal(longer[:, :, :FRAMES], straight)
    drawn = [block_noise(42, block, 1, (1, *SIZE, CHANNELS)) for block in range(BLOCKS)]
    noise = np.moveaxis(np.concatenate(drawn, axis=1), -1, 1)
    np.testing.assert_array_equal(refine(refiner, noise=noise).frames, straight)
    assert np.abs(refine(refiner, seed=43).frames - straight).max() > 0.1
    assert np.abs(np.diff(np.concatenate(drawn), axis=0)).min(axis=(1, 2, 3, 4)).min() > 0
    np.testing.assert_array_equal(block_noise(42, 3, 2, (1, *SIZE, CHANNELS))[:1], drawn[3])


def test_several_videos_and_a_short_last_block():
    refiner = tiny_refiner(jnp.float32)
    options, video = {"block_size": 3, "kv_max_frames": 5}, draw_latents(10, batch=2)
    longer = refine(refiner, video, **options).frames
    shorter = refine(refiner, video[:, :, :9], **options).frames
    np.testing.assert_array_equal(longer[:, :, :7], shorter[:, :, :7])
    # the last block's third frame is seen where it is there
    assert np.abs(longer[:, :, 7:9] - shorter[:, :, 7:9]).max() > 1e-3
    # videos of one call do not see each other, and differ in their noise
    changed = refine(refiner, np.stack([video[0], video[0]]), **options).frames
    np.testing.assert_array_equal(changed[0], longer[0])
    assert np.abs(changed[1] - changed[0])[:, 1:].max() > 0.1
    assert len(refiner.programs) == 3


def test_the_pure_functions_are_what_the_pipeline_runs(refiner, straight):
    sampler = RefinerSampler(OPTIONS["sigmas"], 1, 1, 5)
    transformer, params = refiner.transformer, refiner.transformer_weights.params
    video = np.moveaxis(draw_latents(), 1, -1)
    state = refiner.start(video[:, :1], PROMPT, sampler, 16.0)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    schedule = sampler.schedule()
    denoise = jax.jit(lambda *inputs: denoise_block(transformer, params, *inputs, schedule))
    read = jax.jit(lambda *inputs: read_block(transformer, params, *inputs))
    prompt = jnp.asarray(PROMPT, jnp.bfloat16)
    for block in range(2):
        place = block_place(transformer.config, sampler, SIZE, block, 1, 16.0)
        latents = jnp.asarray(video[:, 1 + block : 2 + block], jnp.bfloat16)
        noise = block_noise(42, block, 1, latents.shape[1:]).astype(jnp.bfloat16)
        refined = denoise(latents, noise, prompt, place, state)
        state = read(refined, prompt, place, state)
        expected = np.moveaxis(straight[:, :, 1 + block : 2 + block], 1, -1)
        np.testing.assert_allclose(np.asarray(refined, np.float32), expected, atol=0.05)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert int(state.history_frames) == 2


# --- videos out -----------------------------------------------------------------------------------------------------


class Decoder:
    """Latents to frames that say which latent they are of: eight of every latent but the first."""

    latent_channels, temporal_factor, spatial_factor, image_channels = CHANNELS, 8, 32, 3

    def decode(self, latents):
        frames = jnp.concatenate([latents[:, :1], jnp.repeat(latents[:, 1:], 8, axis=1)], axis=1)
        return jnp.clip(frames[..., :3], -1, 1)


def test_videos(refiner, straight):
    drawing = SanaWMRefiner(
        refiner.transformer, refiner.transformer_weights, refiner.connectors, refiner.connectors_weights,
        autoencoder=Decoder(),
    )  # fmt: skip
    drawing.programs = refiner.programs
    video = refine(drawing, output_type="np").frames
    assert video.shape == (1, 8 * BLOCKS, *SIZE, 3)
    expected = np.clip(np.moveaxis(straight[0, :3, 1:], 0, -1), -1, 1) / 2 + 0.5
    np.testing.assert_allclose(video[0, ::8], expected, atol=1e-6)
    pictures = refine(drawing).frames
    assert len(pictures[0]) == 8 * BLOCKS
    assert isinstance(pictures[0][0], Image.Image)
    np.testing.assert_array_equal(refine(drawing, output_type="latent").frames, straight)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": None}, "single shot"),
        ({"block_size": 0}, "block_size=0"),
        ({"sink_size": 0}, "sink_size=0"),
        ({"sink_size": True}, "sink_size=True"),
        ({"kv_max_frames": 1}, "kv_max_frames=1"),
        ({"sink_size": 11, "kv_max_frames": 12}, "11 latent frames with sink_size=11"),
        ({"sigmas": (0.4, 0.9, 0.0)}, "sigmas="),
        ({"sigmas": (0.9, 0.4)}, "sigmas="),
        ({"sigmas": (1.2, 0.0)}, "sigmas="),
        ({"sigmas": (True, 0)}, "sigmas=(True, 0)"),
        ({"sigmas": 3}, "sigmas=3"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"seed": -1}, "seed -1"),
        ({"noise": draw_latents()}, "noise of shape"),
        ({"noise": draw_latents(FRAMES - 1) * 1j}, "noise of complex64 is not allowed"),
        ({"noise": draw_latents(FRAMES - 1), "seed": 3}, "seed 3 would not be used"),
        ({"prompt": "a cat", "prompt_embeds": PROMPT}, "both given"),
        ({"prompt_embeds": None}, "neither given"),
        ({"prompt": ["a", "b"]}, "call once for each"),
        ({"prompt": "a cat"}, "no text encoder"),
        ({"prompt_embeds": np.zeros((3, 4, WIDTH))}, "prompt_embeds of shape"),
        ({"prompt_embeds": np.zeros((1, 0, WIDTH))}, "prompt_embeds of shape (1, 0, 6)"),
        ({"prompt_embeds": PROMPT * 1j}, "prompt_embeds of complex64 is not allowed"),
        ({"prompt_embeds": Unreadable(PROMPT.shape)}, "prompt_embeds can't be read as an array"),
        ({"latents": Unreadable(draw_latents().shape)}, "latents can't be read as an array"),
        ({"latents": draw_latents() * 1j}, "latents of complex64 is not allowed"),
        ({"latents": draw_latents()[:, :3]}, "latents of shape"),
        ({"latents": np.full_like(draw_latents(), np.nan)}, "the first stage gave values that are not finite"),
        ({"output_type": "np"}, "needs an autoencoder"),
        ({"output_type": "mp4"}, "output_type 'mp4'"),
    ],
)
def test_arguments_that_are_not_allowed(refiner, options, said):
    with pytest.raises(UserError) as caught:
        refine(refiner, **options)
    assert said in str(caught.value)


def test_lines_on_what_was_not_trained_for(refiner, straight):
    lines = []
    refine(refiner, say=lines.append, fps=2.0, callback_on_block_end=lambda *_: False)
    assert "trained with sink_size 1, block_size 3" in lines[0]
    assert "40.5 seconds" in lines[1]
    with pytest.raises(UserError, match="would not be used"):
        refine(refiner, callback_on_block_end=lambda *_: 3)


def test_arguments_are_those_of_the_released_pipeline():
    ours = inspect.signature(SanaWMRefiner.__call__).parameters
    assert ours["sigmas"].default == (0.909375, 0.725, 0.421875, 0.0)
    defaults = {"sink_size": 1, "block_size": 3, "kv_max_frames": 11, "fps": 16.0, "seed": 42}
    assert {name: ours[name].default for name in defaults} == defaults
