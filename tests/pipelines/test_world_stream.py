"""``SanaWMStreamingPipeline``: chunks equal to the whole, constant state, files that grow, what is refused."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import re
import threading
import types

import jax
import numpy as np
import pytest

from sana_jax import SanaWMPipeline, SanaWMStreamingPipeline, generate, videos
from sana_jax.diffusion.samplers import FlowEuler, LongSanaSampler, WorldStreamSampler
from sana_jax.errors import UserError, run_command_line
from sana_jax.pipelines import resumed_folder
from sana_jax.pipelines.growing_output import GrowingOutput
from sana_jax.pipelines.image_inputs import read_picture
from sana_jax.pipelines.world_inputs import view_at
from sana_jax.pipelines.world_stream_run import WorldStreamRun
from sana_jax.videos import read_video
from tests.pipelines.tiny_refiner import CHANNELS, SIZE, tiny_refiner
from tests.pipelines.tiny_world import HEIGHT, PROMPT, REFINER, WIDTH, arguments, picture, tiny_autoencoder, tiny_world

FRAMES = 8  # latent ones: four chunks
SECOND = {"refiner_options": REFINER}


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def pipe() -> SanaWMStreamingPipeline:
    return tiny_world()


@pytest.fixture(scope="module")
def refiner():
    return tiny_refiner()


@pytest.fixture(scope="module")
def latents(pipe) -> np.ndarray:
    """The first stage's."""
    return stream(pipe, output_type="latent").frames


def stream(pipe, latent_frames=FRAMES, **options):
    return pipe(**{**arguments(latent_frames), "say": lambda line: None, **options})


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_what_comes_out(pipe, latents):
    lines, seen = [], []

    def on_chunk(pipeline, chunk, shown):
        seen.append((chunk, shown["latents"], shown["refined"]))

    out = stream(pipe, output_type="np", say=lines.append, callback_on_block_end=on_chunk)
    assert out.frames.shape == (1, 15, HEIGHT, WIDTH, 3)
    assert (out.frame_count, out.finished, out.path, out.fps, out.sampled_size) == (15, True, None, 8.0, (8, 12))
    np.testing.assert_array_equal(out.c2w, arguments(FRAMES)["c2w"])
    assert [(chunk, refined) for chunk, _, refined in seen] == [(chunk, None) for chunk in range(4)]
    np.testing.assert_array_equal(np.concatenate([own for _, own, _ in seen], axis=2), latents)
    assert latents.shape == (1, CHANNELS, FRAMES, *SIZE)
    first = pipe.autoencoder.encode(view_of(2).pixels[None])
    np.testing.assert_array_equal(latents[:, :, 0], np.moveaxis(np.asarray(first)[:, 0], -1, 1))
    for part in (
        "8 latent frames in 4 chunks, the first of 2, then 2",
        "with 2 earlier chunks in sight, the first always one of them",
        "chunk 4 of 4: latent frames 6 to 7, 4 frames in",
        "15 of 15 frames done, state",
        "made 15 frames; 4 chunks in",
    ):
        assert any(part in line for line in lines), part
    assert [chunk.latent_frames for chunk in out.chunks] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [chunk.frames for chunk in out.chunks] == [3, 4, 4, 4]
    assert all(set(chunk.stages) == {"denoise", "refine", "decode", "write"} for chunk in out.chunks)
    assert sum(sum(chunk.stages.values()) for chunk in out.chunks) > 0
    (pictures,) = stream(pipe, 4).frames
    assert [image.size for image in pictures] == [(WIDTH, HEIGHT)] * 7


def view_of(latent_frames):
    """The picture and the camera as a call sees them."""
    given = arguments(latent_frames)
    picture = read_picture(given["image"], shortest=8)
    return view_at(picture, given["c2w"], given["intrinsics"], (HEIGHT, WIDTH), 2, 4, lambda line: None)


def test_decoded_in_chunks_is_decoded_at_once(pipe, latents):
    whole = np.asarray(pipe.autoencoder.decode(np.moveaxis(latents, 1, -1)))
    found = stream(pipe, output_type="np").frames
    assert found.std() > 0.1
    np.testing.assert_allclose(found, whole / 2 + 0.5, atol=1e-6)


def test_refined_in_chunks_is_refined_at_once(pipe, refiner, latents):
    whole = refiner(latents, fps=8.0, say=lambda line: None, **REFINER)
    found = stream(pipe, refine=refiner, **SECOND, output_type="latent")
    np.testing.assert_array_equal(found.frames, whole.frames)
    assert np.abs(found.frames - latents)[:, :, 1:].mean() > 0.2
    drawing = refiner.with_autoencoder(pipe.autoencoder)
    whole = drawing(latents, fps=8.0, say=lambda line: None, output_type="np", **REFINER)
    seen = []
    found = stream(
        pipe, refine=refiner, **SECOND, output_type="np", callback_on_block_end=lambda *given: seen.append(given[2])
    )
    np.testing.assert_allclose(found.frames, whole.frames, atol=1e-6)
    # the frame that anchors the refiner is not shown; its blocks lie across the chunks, and the last has one frame
    assert [chunk.frames for chunk in found.chunks] == [0, 4, 4, 6]
    assert [None if shown["refined"] is None else shown["refined"].shape[2] for shown in seen] == [None, 2, 2, 3]
    np.testing.assert_array_equal(found.c2w, arguments(FRAMES)["c2w"][1:])


def test_videos_begin_alike_and_noise_is_the_seed_s(pipe, latents):
    longer = stream(pipe, FRAMES + 2, output_type="latent").frames
    np.testing.assert_array_equal(longer[:, :, :FRAMES], latents)
    assert np.abs(stream(pipe, seed=1, output_type="latent").frames - latents)[:, :, 1:].max() > 0.1
    noise = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    given = stream(pipe, latents=noise, output_type="latent").frames
    assert np.abs(given - latents)[:, :, 1:].max() > 0.1
    noise[:, :, 0] = 7  # where the picture stands
    np.testing.assert_array_equal(stream(pipe, latents=noise, output_type="latent").frames, given)
    other = stream(pipe, timesteps=(1000, 300, 0), output_type="latent").frames
    assert np.abs(other - latents)[:, :, 1:].max() > 0.01
    with pytest.raises(UserError, match="not finite"):
        stream(pipe, latents=np.full_like(noise, np.inf), output_type="latent")


def test_forty_chunks(pipe, refiner):
    """What is remembered has one size, and nothing is compiled but once."""
    live = []

    def on_chunk(pipeline, chunk, shown):
        live.append(sum(array.nbytes for array in jax.live_arrays()))

    out = stream(pipe, 80, refine=refiner, **SECOND, output_type="np", callback_on_block_end=on_chunk)
    assert len(out.chunks) == 40
    assert out.frames.shape[1] == 158
    states = [chunk.state_bytes for chunk in out.chunks]
    assert all(state == states[1] for state in states[1:-1])  # the refiner's begins with the second chunk
    assert all(size > 0 for size in states[1].values())
    assert len(set(live[5:-2])) == 1, live
    assert len(pipe.programs) == 3  # the first chunk, the others, reading
    assert len(refiner.programs) == 3


@pytest.mark.prove
def test_the_first_stage_in_the_one_shot_form():
    """Every step by hand, without a state: what is clean stands before the chunk; cut as published."""
    pipe = tiny_world({}, block_frames=3, blocks="first_plus_one", num_cached_blocks=None, sink=False)
    pipe.transformer = pipe.transformer.clone(softmax_dtype=None)
    noise = np.random.default_rng(1).standard_normal((1, CHANNELS, 12, *SIZE)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        out = stream(pipe, 12, latents=noise, output_type="latent")
        assert [chunk.latent_frames for chunk in out.chunks] == [(0, 4), (4, 7), (7, 12)]  # the rest joins the last
        found, noise = (np.moveaxis(array, 1, -1) for array in (out.frames, noise))
        camera = view_of(12).camera
        embeds, mask = pipe.text_encoder.encode([PROMPT])
        done = found[:, :0]
        for number, (start, end) in enumerate(itertools.pairwise((0, 4, 7, 12))):
            given = int(start == 0)
            x = np.concatenate([found[:, :given], noise[:, start + given : end]], axis=1)
            starts = (0, 4, 7)[: number + 1]
            run = jax.jit(functools.partial(pipe.transformer.apply, block_starts=starts))
            for sigma, following in ((1.0, 0.7), (0.7, 0.0)):
                times = np.full((1, end), 1000 * sigma, np.float32)
                times[:, : start + given] = 0
                whole = np.concatenate([done, x], axis=1)
                path = (camera.conditions[None, :end], camera.chunk_plucker[None, :end])
                velocity = np.asarray(run({"params": pipe.params}, whole, embeds, times, mask, *path))[:, start:]
                x[:, given:] += (following - sigma) * velocity[:, given:]
            done = np.concatenate([done, x], axis=1)
    np.testing.assert_allclose(done, found, atol=2e-5 * np.abs(found).max())


# --- files that grow --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(pipe, refiner, tmp_path_factory) -> np.ndarray:
    """The frames of a refined film that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    out = film(pipe, refiner, folder / "out.mp4")
    assert (out.frames, out.frame_count, out.path.name) == (None, 14, "out.mp4")
    assert [entry.name for entry in folder.iterdir()] == ["out.mp4"]
    video = read_video(folder / "out.mp4")
    assert (video.frames.shape, video.fps) == ((14, HEIGHT, WIDTH, 3), 8.0)
    return video.frames


def film(pipe, refiner, path, **options):
    return stream(pipe, refine=refiner, **SECOND, output_path=path, **options)


def half_then_end(name):
    save = np.save

    def half(file, array):
        if name in file.name:
            file.write(b"\x93NUMPY\x01\x00half")
            raise Killed
        save(file, array)

    return half


def test_ended_in_every_stage_and_gone_on(pipe, refiner, whole, tmp_path, monkeypatch):
    path, folder = tmp_path / "out.mp4", tmp_path / "out.mp4.resume"
    append = GrowingOutput.append

    def append_then_end(self, block):
        append(self, block)
        raise Killed

    def end(pipeline, chunk, shown):
        raise Killed

    ends = [
        (resumed_folder.np, "save", half_then_end("latents-00000")),
        (resumed_folder.np, "save", half_then_end("latents-00001")),
        (resumed_folder.np, "save", half_then_end("refined-00000")),
        (GrowingOutput, "append", append_then_end),
        (GrowingOutput, "append", append_then_end),
        (None, None, end),
        (resumed_folder.np, "save", half_then_end("refined-00003")),
    ]
    kept = []
    for target, name, function in ends:
        options = {"resume": bool(kept)}
        with monkeypatch.context() as patched:
            if target is None:
                options["callback_on_block_end"] = function
            else:
                patched.setattr(target, name, function)
            with pytest.raises(Killed):
                film(pipe, refiner, path, **options)
        kept.append(tuple(len(list(folder.glob(f"{kind}-*.npy"))) for kind in ("latents", "refined")))
    assert kept == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 1), kept[5], (4, 3)]
    assert kept[5] > (2, 1)
    lines = []
    out = film(pipe, refiner, path, resume=True, say=lines.append)
    assert any("resuming behind chunk 4 of 4 and 3 blocks of the refiner" in line for line in lines)
    assert len(out.chunks) == 1
    np.testing.assert_array_equal(read_video(path).frames, whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert len(pipe.programs) == 3


def test_a_callback_ends_it_and_it_is_gone_on_with(pipe, refiner, whole, tmp_path):
    path = tmp_path / "out.mp4"
    out = film(pipe, refiner, path, callback_on_block_end=lambda p, chunk, shown: False if chunk == 1 else None)
    assert (out.finished, out.frame_count, len(out.chunks), len(out.c2w)) == (False, 4, 2, 4)
    assert len(read_video(path).frames) == 4
    with pytest.raises(UserError, match="not finished; go on with it with --resume"):
        film(pipe, refiner, path)
    for options, said in (
        ({"seed": 1}, "seed 0 there and 1 here"),
        ({"timesteps": (1000, 500)}, r"timesteps \[1000.0, 700.0\] there and \[1000.0, 500.0\] here"),
        ({"c2w": arguments(10)["c2w"]}, "the camera's path differs; "),
        ({"image": 255 - picture()}, "the image differs; "),
        ({"refiner_options": {**REFINER, "seed": 3}}, "refiner"),
    ):
        with pytest.raises(UserError, match=f"other settings: .*{said}"):
            stream(pipe, **{"refine": refiner, **SECOND, "output_path": path, "resume": True, **options})
    film(pipe, refiner, path, resume=True)
    np.testing.assert_array_equal(read_video(path).frames, whole)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        film(pipe, refiner, path, resume=True)


def test_an_error_of_the_writing_thread_comes_out(pipe, tmp_path, monkeypatch):
    write = videos._Mp4Stream.write

    def full(self, frame, index):
        if index == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, frame, index)

    told = r"No space left on device\); the first 3 frames can be played: make room on the disk and go on with --resume"
    with monkeypatch.context() as patched:
        patched.setattr(videos._Mp4Stream, "write", full)
        with pytest.raises(UserError, match=told):
            stream(pipe, output_path=tmp_path / "out.mp4")
    assert len(read_video(tmp_path / "out.mp4").frames) == 3
    out = stream(pipe, output_path=tmp_path / "out.mp4", resume=True)
    assert (out.finished, out.frame_count) == (True, 15)


def test_a_chunk_is_written_while_the_next_one_is_made(pipe, refiner, tmp_path, monkeypatch):
    """All stages of a chunk have been asked of the device before the one before it is fetched and written."""
    asked = [threading.Event() for _ in range(4)]
    dispatch, deliver, waited = WorldStreamRun._dispatch, WorldStreamRun._deliver, []

    def asking(self, chunk, *rest):
        made = dispatch(self, chunk, *rest)
        asked[chunk].set()
        return made

    def delivering(self, made, *rest):
        if made.chunk < 3:  # without overlap this would never come
            waited.append(asked[made.chunk + 1].wait(30))
        return deliver(self, made, *rest)

    monkeypatch.setattr(WorldStreamRun, "_dispatch", asking)
    monkeypatch.setattr(WorldStreamRun, "_deliver", delivering)
    out = stream(pipe, refine=refiner, **SECOND, output_path=tmp_path / "out.mp4")
    assert (out.finished, waited) == (True, [True] * 3)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale 5: this model was distilled with guidance"),
        ({"guidance_scale": [1.0, 1.0]}, "guidance_scale [1.0, 1.0] is not allowed"),
        ({"block_frames": 3}, "trained with chunks of 2 latent frames"),
        ({"timesteps": (700, 1000)}, "must be whole numbers that decrease"),
        ({"timesteps": 1000}, "timesteps=1000 must be whole numbers that decrease"),
        ({"timesteps": ["1000", "700"]}, "must be whole numbers that decrease"),
        ({"num_cached_blocks": -1}, "num_cached_blocks -1"),
        ({"output_type": "np", "output_path": "out.mp4"}, "'np' would not be used"),
        ({"output_type": "pt"}, "'pt'"),
        ({"output_path": "out.gif"}, "allowed are .mp4"),
        ({"resume": True}, "resume would not be used without output_path"),
        ({"latents": np.zeros((1, CHANNELS, 7, *SIZE))}, "(1, 4, 7, 2, 3)"),
        ({"latents": np.zeros((1, CHANNELS, 8, *SIZE)), "seed": 1}, "seed 1 would not be used"),
        ({"action": "w-14"}, "both are given"),
        ({"prompt": ["a", "b"]}, "a world has one text"),
        ({"refiner_options": {"seed": 1}}, "would not be used without refine"),
        ({"refine": tiny_refiner(), "refiner_options": {"checkpoint_dir": "x"}}, "has checkpoint_dir; allowed are"),
        ({"refine": tiny_refiner(residency="one_at_a_time"), **SECOND}, "weights of the refiner anew in every chunk"),
        ({"refine": tiny_refiner(), "refiner_options": {**REFINER, "block_size": None}}, "single shot"),
        ({"height": 9}, "height 9"),
    ],
)  # fmt: skip
def test_mistakes(pipe, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        stream(pipe, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_components_that_do_not_go_together():
    pipe = tiny_world()
    pipe.sampler = FlowEuler()
    with pytest.raises(UserError, match="sampler FlowEuler; allowed is WorldStreamSampler"):
        stream(pipe)
    parts = (pipe.transformer, pipe.transformer_weights, WorldStreamSampler(), pipe.text_encoder)
    with pytest.raises(UserError, match="would read the weights of the transformer anew"):
        SanaWMStreamingPipeline(*parts, pipe.autoencoder, pipe.defaults, residency="one_at_a_time")
    with pytest.raises(UserError, match="decodes whole videos"):
        SanaWMStreamingPipeline(*parts, tiny_autoencoder(causal=False), pipe.defaults)
    SanaWMStreamingPipeline(*parts, tiny_autoencoder(causal=False, streaming_context=1), pipe.defaults)


# --- directories and the command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(pipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "student"
    pipe.save_pretrained(place)
    return place


def test_directories(pipe, directory):
    assert json.loads((directory / "model_index.json").read_text())["_class_name"] == "SanaWMStreamingPipeline"
    again = SanaWMStreamingPipeline.from_pretrained(directory)
    assert (again.sampler, again.defaults) == (pipe.sampler, pipe.defaults)
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.params)
    with pytest.raises(UserError, match="use SanaWMStreamingPipeline"):
        SanaWMPipeline.from_pretrained(directory)


def call(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: generate.main([str(word) for word in words]))
    return caught.value.code


def test_the_command_line(pipe, directory, tmp_path, capsys, monkeypatch):
    from PIL import Image

    opened = SanaWMStreamingPipeline.from_pretrained

    def open_again(path, **options):  # the directory is looked at, and the pipeline that has its programs is used
        opened(path, **options)
        return pipe

    monkeypatch.setattr(SanaWMStreamingPipeline, "from_pretrained", open_again)
    Image.fromarray(picture()).save(tmp_path / "first.png")
    words = ("--model", directory, "--image", tmp_path / "first.png", "--action", "w-8,jw-6", "--prompt", PROMPT)
    words += ("--intrinsics", "20", "20", "12", "8", "--output", tmp_path / "out.mp4", "--enlarge", 2)
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert re.search(r"chunk 4 of 4: .* 15 of 15 frames done", said)
    assert f"video: {tmp_path / 'out.mp4'}, 15 frames, 1.88 seconds" in said
    assert read_video(tmp_path / "out.mp4").frames.shape == (15, 2 * HEIGHT, 2 * WIDTH, 3)
    for more, part in (
        (("--stream", "--resume"), "nothing to resume"),
        (("--low-memory",), "allowed are text_encoder_freed and all"),
        (("--memory", "80g"), "memory 80g is not for streamed worlds"),
        (("--refiner", "r", "--refiner-checkpoint", "x"), "--refiner-checkpoint would not be used by a streamed world"),
        (("--steps", 3), "--steps would not be used by SanaWMStreamingPipeline"),
        (("--flow-shift", 3), "has a sampler of its own"),
        (("--negative-prompt", "x"), "--negative-prompt would not be used"),
    ):
        assert call(*words, *more) == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="memory 80g is not for streamed worlds"):
        SanaWMStreamingPipeline.from_pretrained("nowhere/at/all", memory="80g")


def test_a_film_notes_the_steps_and_blocks_that_its_call_asked_for(pipe, directory, tmp_path, capsys, monkeypatch):
    import av
    from PIL import Image

    monkeypatch.setattr(SanaWMStreamingPipeline, "from_pretrained", lambda path, **options: pipe)
    Image.fromarray(picture()).save(tmp_path / "first.png")
    path = tmp_path / "out.mp4"
    words = ("--model", directory, "--image", tmp_path / "first.png", "--action", "w-8,jw-6", "--prompt", PROMPT)
    words += ("--intrinsics", "20", "20", "12", "8", "--output", path, "--timesteps", 1000, 900, 500, 0)
    assert call(*words, "--num-cached-blocks", 0) == 0
    assert "3 steps of WorldStreamSampler(timesteps=(1000, 900, 500), " in capsys.readouterr().out
    with av.open(str(path)) as container:
        notes = json.loads(container.metadata["comment"])
    assert (notes["steps"], notes["frames"]) == ("3", "15")
    assert "timesteps=(1000, 900, 500), " in notes["sampler"]
    assert notes["sampler"].endswith("num_cached_blocks=None, sink=False)")


def test_what_a_call_takes_in_place_of_its_model():
    def taken(sampler, **options):
        config = generate.GenerateConfig("m", ("a",), "a.mp4", **options)
        defaults = types.SimpleNamespace(num_inference_steps=4)
        return generate.steps_taken(config, types.SimpleNamespace(sampler=sampler, defaults=defaults))

    long = LongSanaSampler(block_frames=3, num_cached_blocks=5)
    assert taken(long) == {"steps": 4, "sampler": str(long)}
    assert taken(long, num_cached_blocks=2)["sampler"].endswith("num_cached_blocks=2)")
    assert taken(long, num_cached_blocks=0)["sampler"].endswith("num_cached_blocks=None)")
    assert taken(long, num_cached_blocks=-1) == taken(long)  # the call refuses it
    assert taken(FlowEuler(flow_shift=3.0), steps=7) == {"steps": 7, "sampler": str(FlowEuler(flow_shift=3.0))}


def test_a_refined_film_notes_the_frames_that_it_has():
    settings, metadata = {"height": 256, "width": 256, "frames": 25}, {"frames": 25, "seed": 3}
    for refiner, frames in ((None, 25), ("refiner", 24)):
        config = generate.GenerateConfig("m", ("a",), "a.mp4", refiner=refiner)
        assert generate.long_video_arguments(config, settings, metadata)["metadata"] == {"frames": frames, "seed": 3}
