"""``LongSanaVideoPipeline``: blocks, prompts that change, files that grow, going on after an end, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import LongSanaVideoPipeline, SanaPipeline, SanaVideoPipeline, generate
from sana_jax.diffusion.samplers import FlowEuler, LongSanaSampler
from sana_jax.errors import UserError, run_command_line
from sana_jax.models.sana_video import init_state
from sana_jax.pipelines import resolution, resumed_folder
from sana_jax.pipelines.long_video_run import _START, _STEPS
from sana_jax.pipelines.long_video_state import ResumeFolder
from sana_jax.pipelines.opening import OpenModel
from sana_jax.pipelines.prompt_schedule import (
    BlockPrompts,
    PromptSwitch,
    note_untimed,
    parse_prompts,
    prompts_of_blocks,
    refuse_schedule,
)
from sana_jax.pipelines.world_stream_folder import StreamFolder
from sana_jax.videos import count_frames, read_video
from tests.pipelines.tiny_long_model import BLOCK, PROMPT, as_longsana, tiny_pipeline
from tests.pipelines.tiny_model import Unreadable
from tests.pipelines.tiny_world import tiny_autoencoder

SWITCHES = [(0, "a handwritten zero"), (1.75, "a handwritten seven")]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipe() -> LongSanaVideoPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def model(video_model, tmp_path_factory) -> pathlib.Path:
    """A directory of LongSANA with a Wan autoencoder."""
    return as_longsana(video_model, tmp_path_factory.mktemp("long") / "model")


def latents(pipe, prompt=PROMPT, frames=10, **options) -> np.ndarray:
    return pipe(prompt, frames=frames, output_type="latent", **options).frames


def stop_after(blocks: int):
    return lambda pipeline, block, values: block + 1 < blocks


# -- what comes out --------------------------------------------------------------------------------------------------


def test_what_comes_out(pipe, capsys):
    seen = []
    result = pipe(
        PROMPT, seed=3, output_type="np", callback_on_block_end=lambda p, b, v: seen.append((b, v["latents"]))
    )
    assert result.frames.shape == (1, 7, 8, 8, 1)
    assert (result.frame_count, result.finished, result.path, result.fps) == (7, True, None, 4.0)
    assert (len(result.block_seconds), result.sampled_size) == (2, (8, 8))
    assert list(result.seconds) == ["text", "denoise", "decode", "write"]
    assert [(block, array.shape) for block, array in seen] == [(0, (1, 1, 4, 8, 8)), (1, (1, 1, 3, 8, 8))]
    said = capsys.readouterr().out
    for part in (
        "7 latent frames in 2 blocks, the first of 4, then 1 of 3",
        "block 2 of 2: latent frames 4 to 6",
        "kB per",
    ):
        assert part in said
    whole = latents(pipe, frames=7, seed=3)
    np.testing.assert_array_equal(whole, np.concatenate([array for _, array in seen], axis=2))
    np.testing.assert_allclose(np.clip(whole[0, 0] / 2 + 0.5, 0, 1), result.frames[0, ..., 0], atol=1e-6)
    (pictures,) = pipe(PROMPT, seed=3, frames=7).frames
    assert [picture.size for picture in pictures] == [(8, 8)] * 7


@pytest.mark.parametrize("window", [None, pytest.param(1, marks=pytest.mark.prove)])
def test_every_pass_by_hand(pipe, window):
    """Blocks, steps, noise, positions, captions and the state that the clean pass leaves."""
    config = pipe.transformer.config
    run = jax.jit(lambda *a, state, first_frame: pipe.transformer.apply(*a, state=state, first_frame=first_frame))
    texts = [text for _, text in SWITCHES]
    embeds, mask = map(np.asarray, pipe.text_encoder.encode(texts))
    state, found = init_state(config, 1, (4, 4), window), []
    schedule = pipe.sampler.schedule()
    for block, (first, end) in enumerate(itertools.pairwise((0, 4, 7, 10, 13))):
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(5), stream), block) for stream in (_START, _STEPS)]
        row = slice(0, 1) if block < 2 else slice(1, 2)

        def velocity(x, timestep, state=state, row=row, first=first):
            inputs = ({"params": pipe.params}, x, embeds[row], jnp.full(1, timestep, jnp.float32), mask[row])
            return run(*inputs, state=state, first_frame=jnp.int32(first))

        x = jax.random.normal(keys[0], (1, end - first, 8, 8, 1))
        for step, timestep in enumerate((1000, 960, 889, 727)):
            clean = x - schedule.sigmas[step] * velocity(x, timestep)[0]
            noise = jax.random.normal(jax.random.fold_in(keys[1], step), x.shape)
            after = schedule.sigmas[step + 1]
            x = (1 - after) * clean + after * noise
        found.append(clean)
        state = velocity(clean, 0)[1]
    expected = np.moveaxis(np.concatenate(found, axis=1), -1, 1)
    np.testing.assert_allclose(
        latents(pipe, SWITCHES, 13, seed=5, num_cached_blocks=window or 0), expected, atol=2e-4 * np.abs(expected).max()
    )


def test_videos_begin_alike_whatever_their_length(pipe):
    short, long = latents(pipe, frames=7), latents(pipe, PROMPT, frames=13)
    np.testing.assert_array_equal(long[:, :, :7], short)
    switched = latents(pipe, [(0, PROMPT), (2.5, "a handwritten one")], frames=13)
    np.testing.assert_array_equal(switched[:, :, :10], long[:, :, :10])
    assert np.abs(switched[:, :, 10:] - long[:, :, 10:]).max() > 1e-3
    assert np.abs(latents(pipe, frames=7, seed=1) - short).max() > 0.1


def test_a_program_for_the_first_block_and_one_for_the_others():
    fresh = tiny_pipeline()
    for frames in (13, 7, 25):
        latents(fresh, frames=frames)
    assert len(fresh.programs) == 2
    latents(fresh, frames=9)  # the first block is as the others
    assert len(fresh.programs) == 2


def test_given_noise_and_embeddings(pipe):
    noise = np.random.default_rng(0).standard_normal((1, 1, 7, 8, 8)).astype(np.float32)
    found = latents(pipe, frames=None, latents=noise)
    assert found.shape == noise.shape
    assert np.abs(found - latents(pipe, frames=7)).max() > 0.1
    embeds, mask = pipe.text_encoder.encode([PROMPT])
    again = latents(pipe, None, None, latents=noise, prompt_embeds=embeds, prompt_attention_mask=mask)
    np.testing.assert_array_equal(again, found)


def test_memory_does_not_grow(pipe, tmp_path):
    """Arrays on the device after every block, of videos 2 and 8 times as long; and what the program needs."""
    found = {}
    for blocks in (3, 6, 24):
        held: list[int] = []

        def note(pipeline, block, values, held=held):
            held.append(sum(array.nbytes for array in jax.live_arrays()))

        result = pipe(
            PROMPT, frames=1 + BLOCK * blocks, output_path=tmp_path / f"{blocks}.mp4", callback_on_block_end=note
        )
        found[blocks] = (max(held[2:]), result.device_bytes)
        assert len(set(held[1:])) == 1, held
    assert len(set(found.values())) == 1, found


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_with_times():
    expected = (PromptSwitch(0, "a fox: asleep"), PromptSwitch(10.5, "it wakes up"))
    assert parse_prompts(["0s: a fox: asleep", "10.5 s : it wakes up"]) == expected
    assert parse_prompts([(0, "a fox: asleep"), (10.5, "it wakes up")]) == expected
    assert parse_prompts([(np.int64(0), "a fox: asleep"), (np.float32(10.5), "it wakes up")]) == expected
    assert parse_prompts("a fox") == parse_prompts(["a fox"]) == (PromptSwitch(0, "a fox"),)
    said: list[str] = []
    assert prompts_of_blocks(expected, [0, 2.5, 5, 7.5, 10, 12.5], 15, said.append) == (0, 0, 0, 0, 1, 1)
    assert said == ["from 0 s (block 1): 'a fox: asleep'", "from 10 s, asked for at 10.5 s (block 5): 'it wakes up'"]


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        (["a zero", "a one"], "2 prompts, 0 of them with a time"),
        (["0s: a zero", "a one"], "2 prompts, 1 of them with a time"),
        ([], "0 prompts"),
        (["0s: a", "2s: b", "1s: c"], "must ascend, and 1 s comes after 2 s"),
        (["0s: a", "0s: b"], "must ascend"),
        (["1s: a", "2s: b"], "the first must begin at 0 s"),
        (["-1s: a", "2s: b"], "the first must begin at 0 s"),
        ([(0, "a"), (float("nan"), "b")], "must begin at 0 s"),
        (["0s: a", "2.5s: b"], "begins at 2.5 s, and the video has 2.5 s"),
        (["0s: a", "0.4s: b"], "fall into one block .block 1, from 0 s"),
        (["0s: a", "1s: "], "the prompt at 1 s is empty"),
        ([(0, "a"), 3], "prompt 3 is not allowed"),
        (5, "prompt 5 is not allowed"),
        (None, "prompt and prompt_embeds: neither given"),
        ("", "the prompt at 0 s is empty"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(pipe, prompt, part):
    with pytest.raises(UserError, match=part) as caught:
        latents(pipe, prompt)
    assert "\n" not in str(caught.value)


# -- files, and going on with them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_the_file_grows_and_the_video_can_be_gone_on_with(pipe, tmp_path, name, capsys):
    grown = []

    def note(pipeline, block, values):
        grown.append(count_frames(tmp_path / "straight" / name))

    options = {"frames": 13, "seed": 2, "enlarge": 2}
    straight = pipe(SWITCHES, **options, output_path=tmp_path / "straight" / name, callback_on_block_end=note)
    assert (straight.frames, straight.frame_count, straight.finished) == (None, 13, True)
    assert all(there >= frames - 1 for there, frames in zip(grown, (4, 7, 10, 13), strict=True)), grown
    assert [path.name for path in (tmp_path / "straight").iterdir()] == [name]
    path = tmp_path / name
    for blocks in (1, 3):
        part = pipe(SWITCHES, **options, output_path=path, resume=blocks > 1, callback_on_block_end=stop_after(blocks))
        assert (part.finished, part.frame_count) == (False, {1: 4, 3: 10}[blocks])
        assert read_video(path).frames.shape == (part.frame_count, 16, 16, 3)
    with pytest.raises(UserError, match=r"was not finished|something in it already"):
        pipe(SWITCHES, **options, output_path=path)
    capsys.readouterr()
    pipe(SWITCHES, **options, output_path=path, resume=True)
    assert "resuming after block 3 of 4: " in capsys.readouterr().out
    np.testing.assert_array_equal(read_video(path).frames, read_video(straight.path).frames)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, "straight"])
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pipe(SWITCHES, **options, output_path=path, resume=True)


def test_a_file_takes_numbers_of_numpy(pipe, tmp_path):
    numbers = {"frames": 7, "seed": 2, "height": 8, "width": 8, "num_cached_blocks": 1, "enlarge": 2}
    of_numpy = {name: np.int64(value) if name != "enlarge" else value for name, value in numbers.items()}
    path = tmp_path / "a"
    assert not pipe(PROMPT, **of_numpy, output_path=path, callback_on_block_end=stop_after(1)).finished
    assert pipe(PROMPT, **numbers, output_path=path, resume=True).finished  # and they are the same settings


def test_a_file_that_was_lost_or_cut_is_made_again(pipe, tmp_path):
    straight = pipe(PROMPT, frames=13, output_path=tmp_path / "straight.mp4")
    for index, harm in enumerate([pathlib.Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 40)]):
        path = tmp_path / f"{index}.mp4"
        pipe(PROMPT, frames=13, output_path=path, callback_on_block_end=stop_after(3))
        harm(path)
        pipe(PROMPT, frames=13, output_path=path, resume=True)
        np.testing.assert_array_equal(read_video(path).frames, read_video(straight.path).frames)


def test_going_on_with_other_settings_is_refused(pipe, tmp_path):
    path = tmp_path / "a.mp4"
    pipe(PROMPT, frames=13, output_path=path, callback_on_block_end=stop_after(2))
    for options, part in [
        ({"seed": 1}, "seed 0 there and 1 here"),
        ({"frames": 16}, "frames 13 there and 16 here"),
        ({"num_cached_blocks": 1}, "num_cached_blocks None there and 1 here"),
        ({"fps": 8.0}, "fps 4.0 there and 8.0 here"),
    ]:
        with pytest.raises(UserError, match=part):
            pipe(**{"prompt": PROMPT, "frames": 13, **options}, output_path=path, resume=True)
    (path.with_name("a.mp4.resume") / "state.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        pipe(PROMPT, frames=13, output_path=path, resume=True)


def test_a_callback_steers_and_what_was_killed_then_goes_on_alike(pipe, tmp_path, monkeypatch, capsys):
    """Killed in the first block with the callback's prompt, which is noted as soon as it is known."""
    planned, options = [(0, "a handwritten zero"), (2.5, PROMPT)], {"frames": 13, "seed": 2}

    def steer(pipeline, block, values):
        return "a handwritten one" if block == 0 else None

    straight = pipe(planned, **options, output_path=tmp_path / "straight.mp4", callback_on_block_end=steer)
    assert "from 1 s (block 2), as the callback says: 'a handwritten one'" in capsys.readouterr().out
    assert straight.prompts == ((0, "a handwritten zero"), (1, "a handwritten one"), (2.5, PROMPT))
    steered = latents(pipe, planned, **options, callback_on_block_end=steer)
    np.testing.assert_array_equal(steered, latents(pipe, straight.prompts, **options))
    assert np.abs(steered - latents(pipe, planned, **options))[:, :, 4:7].max() > 1e-3

    program, calls, path = pipe.block_program, itertools.count(), tmp_path / "a.mp4"

    def killed(watch, arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return program(watch, arguments)

    with monkeypatch.context() as patched:
        patched.setattr(pipe, "block_program", killed)
        with pytest.raises(KeyboardInterrupt):
            pipe(planned, **options, output_path=path, callback_on_block_end=steer)
    resumed = pipe(planned, **options, output_path=path, resume=True)
    assert "of the earlier call's callback: 'a handwritten one' from 1 s (block 2)" in capsys.readouterr().out
    assert resumed.prompts == straight.prompts
    np.testing.assert_array_equal(read_video(path).frames, read_video(straight.path).frames)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4", "straight.mp4"]


def test_prompts_of_what_is_not_made_yet_may_change(pipe, tmp_path, capsys):
    path, zero, later = tmp_path / "a.mp4", "a handwritten zero", [(0, "a handwritten zero"), (1.75, PROMPT)]
    pipe(zero, frames=13, output_path=path, callback_on_block_end=stop_after(2))
    for prompt, part in [(PROMPT, r"at 0 s \(block 1\)"), ([(0, zero), (1, PROMPT)], r"at 1 s \(block 2\)")]:
        said = f"what begins {part} was made with the prompt '{zero}', and .*seven.*may change from 1.75 s .block 3"
        with pytest.raises(UserError, match=said) as caught:
            pipe(prompt, frames=13, output_path=path, resume=True)
        assert "\n" not in str(caught.value)
    capsys.readouterr()
    pipe(later, frames=13, output_path=path, resume=True)
    line = f"prompts have changed: '{PROMPT}' from 1.75 s (block 3) in place of '{zero}'\n"
    assert line in capsys.readouterr().out
    straight = pipe(later, frames=13, output_path=tmp_path / "straight.mp4")
    np.testing.assert_array_equal(read_video(path).frames, read_video(straight.path).frames)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ({"latents": 3}, "returned a value of type dict, .*allowed are None, False to stop"),
        (" ", "the callback's prompt is empty"),
        ("2s: a handwritten one", "begins with a time, and it acts from the next block on"),
        ("a fox", "'fox', which this model has not been trained on"),
    ],
)
def test_answers_of_a_callback_that_are_refused(pipe, answer, part):
    with pytest.raises(UserError, match=part):
        latents(pipe, callback_on_block_end=lambda *_: answer)


def test_answers_that_nothing_is_made_of(pipe, capsys):
    embeds, mask = pipe.text_encoder.encode([PROMPT])
    with pytest.raises(UserError, match="returned a prompt, and the video has prompt_embeds"):
        latents(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask, callback_on_block_end=lambda *_: PROMPT)
    latents(pipe, frames=7, callback_on_block_end=lambda pipeline, block, values: "a zero" if block else None)
    assert "'a zero', which the callback returned after the last block, is not used" in capsys.readouterr().out
    latents(pipe, frames=7, callback_on_block_end=stop_after(1))
    assert "ended by the callback after 4 frames" in capsys.readouterr().out  # without a file it is not to be resumed


@pytest.mark.parametrize("kind", [ResumeFolder, StreamFolder])
def test_files_of_others_are_never_removed(tmp_path, kind):
    said: list[str] = []
    folder = kind(tmp_path / "a.mp4", {"seed": 1}, said.append)
    folder.path.mkdir()
    for name in (".latents-00000.npy.7.tmp", "notes.txt"):
        (folder.path / name).write_text("")
    with pytest.raises(UserError, match=r"files that no video of this kind has left, notes.txt: move them away"):
        folder.begin()
    folder.remove()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    assert "stays, since it has files that are not of this video" in said[0]


def test_what_a_video_left_in_its_first_block_is_removed(tmp_path):
    folder = ResumeFolder(tmp_path / "a.mp4", {"seed": 1})
    folder.path.mkdir()
    for name in (".state.npz.7.tmp", "latents-00000.npy", "prompts.json"):
        (folder.path / name).write_text("")
    folder.begin()
    assert not folder.path.exists()
    folder.path.write_text("")
    with pytest.raises(UserError, match="is a file, and a folder is needed there"):
        folder.begin()


def test_going_on_elsewhere_is_said(tmp_path, monkeypatch):
    said: list[str] = []
    folder, state = ResumeFolder(tmp_path / "a.mp4", {"seed": 1}, said.append), {"a": jnp.ones(3)}
    folder.save(0, np.zeros((1, 2, 3, 3, 4)), state)
    folder.load(state)
    assert not said
    monkeypatch.setattr(resumed_folder, "computing_device", lambda: "another device, jax 9")
    folder.load(state)
    (line,) = said
    assert re.search("comes from .*cpu.* and goes on on another device, jax 9: later blocks will not be the same", line)


@pytest.mark.parametrize("text", ["{", "{}", '{"planned": [[1, "a"]], "given": []}', '{"planned": 3, "given": []}'])
def test_noted_prompts_that_are_damaged(tmp_path, text):
    folder = ResumeFolder(tmp_path / "a.mp4", {})
    folder.save_prompts(BlockPrompts(((0, "a"), (3, "b")), ((3, "c"),)))
    assert folder.load_prompts().runs(range(5)) == [(0, "a"), (3, "c")]
    (folder.path / "prompts.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        folder.load_prompts()


def test_a_state_in_bfloat16_comes_back(tmp_path):
    state = {"a": jnp.linspace(-3, 3, 7).astype(jnp.bfloat16), "b": (jnp.ones((2, 3)), jnp.int32(4))}
    folder = ResumeFolder(tmp_path / "a.mp4", {"seed": 1})
    folder.save(0, np.zeros((1, 2, 3, 3, 4)), state)
    done, again = folder.load(jax.eval_shape(lambda: state))
    assert done == 1
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(again)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    with pytest.raises(UserError, match="a state of another shape"):
        folder.load(jax.eval_shape(lambda: {**state, "a": jnp.zeros(7)}))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"guidance_scale": 4.0}, "guidance_scale 4: this model was distilled with guidance"),
        ({"guidance_scale": "high"}, "guidance_scale 'high' is not allowed"),
        ({"num_inference_steps": 20}, "distilled to the 4 steps"),
        ({"block_frames": 10}, "block_frames 10 does not fit this model, .* blocks of 3 latent frames"),
        ({"frames": 1025}, "1025 latent frames.* positions for 1024 .* at most 1024 frames, 256 seconds"),
        ({"seconds": 300.0, "frames": None}, "1201 latent frames.*make it shorter, or make several videos"),
        ({"seconds": 2.0}, "seconds beside frames"),
        ({"num_cached_blocks": -1}, "num_cached_blocks -1"),
        ({"height": 9}, "height 9|binning"),
        ({"fps": 0}, "fps 0"),
        ({"seed": -1}, "seed -1"),
        ({"latents": np.zeros((2, 1, 10, 8, 8))}, "latents of 2 videos"),
        ({"latents": np.zeros((1, 3, 10, 8, 8))}, r"1 videos of 8x8 need \(1, 1, 10, 8, 8\)"),
        ({"latents": np.zeros((1, 1, 10, 8, 8)), "height": 16}, r"1 videos of 16x8 need \(1, 1, 10, 16, 8\)"),
        ({"latents": Unreadable((1, 1, 10, 8, 8))}, "latents can't be read as an array"),
        ({"latents": np.full((1, 1, 10, 8, 8), np.nan)}, "block 1 of 3 gave values that are not finite"),
        ({"output_path": "a.mp4"}, "output_type 'latent' would not be used"),
        ({"output_path": "a.gif", "output_type": None}, "frames come one after another"),
        ({"resume": True}, "resume would not be used without output_path"),
        ({"enlarge": 0}, "enlarge 0"),
        ({"height": 4096, "width": 4096, "binning": "off", "frames": 1024}, "give an output_path"),
    ],
)  # fmt: skip
def test_mistakes(pipe, options, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=part) as caught:
        pipe(**{"prompt": PROMPT, "frames": 10, "output_type": "latent", **options})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_components_that_are_refused(pipe):
    parts = (pipe.transformer, pipe.params)
    rest = (pipe.text_encoder, pipe.autoencoder, pipe.defaults)
    with pytest.raises(UserError, match="allowed is LongSanaSampler"):
        LongSanaVideoPipeline(*parts, FlowEuler(3.0), *rest)
    with pytest.raises(UserError, match="--low-memory"):
        LongSanaVideoPipeline(*parts, pipe.sampler, *rest, residency="one_at_a_time")
    with pytest.raises(UserError, match="allowed are DPMSolver and FlowEuler"):
        SanaVideoPipeline(*parts, pipe.sampler, *rest)
    with pytest.raises(UserError, match="LTX2VideoAutoencoder, which decodes whole videos alone"):
        LongSanaVideoPipeline(*parts, pipe.sampler, pipe.text_encoder, tiny_autoencoder(causal=False), pipe.defaults)


def test_a_decoder_that_is_not_causal_decodes_blocks_with_what_was_before(pipe, capsys):
    """As the published decoder of LTX-2: seen by a model's opening, not after the first block."""
    autoencoder = tiny_autoencoder(causal=False)
    model = OpenModel(
        pathlib.Path("there"), pipe.transformer, pipe.transformer_weights, pipe.sampler, pipe.text_encoder, autoencoder,
        pipe.defaults,
    )  # fmt: skip
    assert LongSanaVideoPipeline._from_model(model, "all").autoencoder.streaming_context == 1
    assert "there: the decoder is not causal; every block is decoded with 1 latent frame" in capsys.readouterr().out


def test_times_in_prompts_are_not_words_elsewhere():
    for prompt in ("0s: a fox sleeps", ["0s: a fox sleeps", "10s: it wakes up"], (" 0.0 s : a fox",)):
        with pytest.raises(UserError, match="begins with a time, and prompts of SanaPipeline do not change") as caught:
            refuse_schedule(prompt, "SanaPipeline")
        assert "\n" not in str(caught.value)
    for prompt in ("1920s: a jazz band", "a fox", ["a: b", "0s: c"], None, [], 5):
        refuse_schedule(prompt, "SanaPipeline")


def test_the_size_that_is_sampled_is_said_where_all_is_said(pipe, monkeypatch, capsys):
    said: list[str] = []
    monkeypatch.setitem(resolution.VIDEO_BINS, 8, (resolution.Bin(1.0, 8, 8),))
    monkeypatch.setitem(resolution._VIDEO_TOKENS, 8, 2)
    pipe._plan(None, None, 7, (8, 10), None, None, None, None, said.append)
    assert said[0].startswith("sampling 8x8 pixels, the trained size nearest in shape to 8x10")
    assert capsys.readouterr().out == ""


# -- a model's directory, and the command line ------------------------------------------------------------------------


def test_a_directory_says_what_it_is(model, video_model, tmp_path):
    pipe = LongSanaVideoPipeline.from_pretrained(model)
    assert pipe.sampler == LongSanaSampler(block_frames=BLOCK)
    assert pipe.transformer.attention_epsilon == 1e-8
    assert pipe.contract.family.startswith("LongSANA")
    defaults = pipe.defaults
    assert (defaults.guidance_scale, defaults.num_inference_steps, defaults.frames, defaults.fps) == (1, 4, 81, 16)
    pipe.save_pretrained(tmp_path / "saved")
    again = LongSanaVideoPipeline.from_pretrained(tmp_path / "saved")
    assert (again.sampler, again.defaults, again.contract) == (pipe.sampler, pipe.defaults, pipe.contract)
    for pipeline, directory, use in [
        (SanaVideoPipeline, model, "use LongSanaVideoPipeline"),
        (LongSanaVideoPipeline, video_model, "use SanaVideoPipeline"),
        (SanaPipeline, model, "or use LongSanaVideoPipeline"),
    ]:
        with pytest.raises(UserError, match=use):
            pipeline.from_pretrained(directory)
    path = tmp_path / "saved" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_chunk_frames": 0}))
    with pytest.raises(UserError, match="block_frames=0"):
        LongSanaVideoPipeline.from_pretrained(tmp_path / "saved")


def words(model, output, *more) -> list[str]:
    own = ("--max-sequence-length", 8, "--instruction", "none", "--enlarge", 1, "--seed", 3, "--seconds", 5)
    size = ("--height", 16, "--width", 32, "--binning", "off")
    prompts = ("--prompt", "0s: a red panda", "3s: a tram in the rain")
    return [str(word) for word in ("--model", model, "--output", output, *prompts, *own, *size, *more)]


def call(*options) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: generate.main(list(options)))
    return caught.value.code


@pytest.mark.prove  # half a minute; what a killed run has left is resumed in this process above
def test_killed_and_resumed_from_the_command_line(model, tmp_path, capsys):
    """SIGKILL in the middle of a block; the file that comes out is the one of a call that was left in peace."""
    straight, path = tmp_path / "straight.mp4", tmp_path / "killed.mp4"
    assert call(*words(model, straight)) == 0
    said = capsys.readouterr().out
    assert "5 seconds at 16 frames per second: 81 frames (1 + 4 x 20)" in said
    assert "from 2.8125 s, asked for at 3 s (block 5): 'a tram in the rain'" in said
    assert said.splitlines()[-1] == f"video: {straight}, 81 frames, 5.06 seconds"
    assert read_video(straight).frames.shape == (81, 16, 32, 3)

    command = [sys.executable, "-u", "-m", "sana_jax.generate", *words(model, path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("block 3 of 7"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "killed.mp4.resume" / "state.npz").is_file()
    assert 0 < len(read_video(path).frames) < 81
    assert call(*words(model, path, "--resume")) == 0
    assert "resuming after block " in capsys.readouterr().out
    np.testing.assert_array_equal(read_video(path).frames, read_video(straight).frames)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["killed.mp4", "straight.mp4"]


def test_frames_of_blocks_are_those_of_the_whole(model):
    """The autoencoder's state carries over from block to block."""
    pipe = LongSanaVideoPipeline.from_pretrained(model, residency="all")
    options = {"frames": 33, "height": 16, "width": 32, "binning": "off", "max_sequence_length": 8}
    options["complex_human_instruction"] = ()
    whole = pipe("a red panda", **options, output_type="latent").frames
    decoded = pipe.autoencoder.decode(np.moveaxis(whole, 1, -1))
    found = pipe("a red panda", **options, output_type="np").frames
    assert found.std() > 0.05
    np.testing.assert_allclose(found, np.asarray(decoded) / 2 + 0.5, atol=2e-5)


def test_a_prompt_that_begins_as_with_a_time():
    said = []
    note_untimed(["0s a fox", "0s: a fox", "2 seasons", "1920s: jazz", "a fox"], said.append)
    assert said == ["prompt '0s a fox' is text from its beginning; a time has a colon behind it: \"0s: a fox\""]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--guidance-scale", "4"), "--guidance-scale 4: this model was distilled"),
        (("--steps", "20"), r"--steps 20 is not allowed; .* distilled to the 4 steps at .*\): leave the number out$"),
        (("--num-videos", "2"), "--num-videos 2: .* one long video at a time"),
        (("--low-memory",), "--low-memory"),
        (("--sampler", "flow_euler"), "--sampler and --flow-shift would not be used by LongSanaVideoPipeline"),
        (("--apg-eta", "1"), "--apg-eta, .* would not be used by LongSanaVideoPipeline"),
        (("--negative-prompt", "blurry"), "--negative-prompt would not be used"),
        (("--image", "a.png"), "--image a.png is not a file"),
        (("--resume",), "nothing to resume"),
        (("--block-frames", "10"), "--block-frames 10 does not fit this model"),
        (("--output", "a.gif"), "a.gif"),
    ],
)
def test_mistakes_on_the_command_line(model, tmp_path, capsys, more, part):
    assert call(*words(model, tmp_path / "a.mp4", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(part, error), error
    assert not list(tmp_path.iterdir())


def test_a_budget_of_memory_keeps_the_networks_that_every_block_needs(model, capsys):
    """The whole decoder with its state takes 9 GB at 480x832, its tiles with theirs 7 GB."""
    pipe = LongSanaVideoPipeline.from_pretrained(model, memory="9g")
    assert (pipe.residency, pipe.autoencoder.tiling) == ("text_encoder_freed", True)
    assert "blocks of up to 17 frames of 480x832 pixels" in capsys.readouterr().out


def test_an_option_of_long_videos_is_refused_elsewhere(video_model, tmp_path, capsys):
    options = ("--model", video_model, "--prompt", "a red panda", "--output", tmp_path / "a.mp4", "--resume")
    assert call(*map(str, options)) == 2
    assert "--resume would not be used by SanaVideoPipeline" in capsys.readouterr().err
