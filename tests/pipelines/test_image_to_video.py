"""``SanaImageToVideoPipeline``: the image that a video begins with, its size and shape, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaImageToVideoPipeline
from sana_jax.errors import UserError
from sana_jax.pipelines import resolution
from sana_jax.pipelines.image_inputs import to_network_range
from sana_jax.pipelines.image_to_video import fit_picture
from sana_jax.pipelines.video_base import VideoRequest
from tests.parity.pipeline_oracle import picture

PROMPT = "a red panda"
OPTIONS = {
    "max_sequence_length": 8,
    "complex_human_instruction": (),
    "num_inference_steps": 2,
    "guidance_scale": 1,
    "height": 32,
    "width": 64,
    "frames": 5,
    "binning": "off",
}


pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(scope="module")
def pipe(video_model) -> SanaImageToVideoPipeline:
    """From the directory of a text-to-video model: the weights are the same."""
    return SanaImageToVideoPipeline.from_pretrained(video_model, residency="all")


def test_the_first_frame_is_the_image(pipe):
    image, seen = picture(32, 64), []

    def watch(pipeline, step, timestep, values):
        seen.append(np.asarray(values["latents"]))

    given = np.random.default_rng(0).standard_normal((2, 4, 2, 4, 8)).astype(np.float32)
    before = given.copy()
    found = pipe(
        image, [PROMPT, "a bird"], **OPTIONS, latents=given, output_type="latent", callback_on_step_end=watch
    ).frames
    np.testing.assert_array_equal(given, before)  # the reference writes into it
    encoded = np.moveaxis(np.asarray(pipe.autoencoder.encode(to_network_range(image, 32, 64)[:, None])), -1, 1)
    for values in (*seen, found):
        assert values.shape == (2, 4, 2, 4, 8)
        np.testing.assert_array_equal(values[:, :, :1], np.repeat(encoded, 2, axis=0))
    assert np.abs(found[:, :, 1:] - given[:, :, 1:]).max() > 0.1
    # and what it is has an effect on the rest
    other = pipe(picture(32, 64, 1), [PROMPT, "a bird"], **OPTIONS, latents=given, output_type="latent").frames
    assert np.abs(found[:, :, 1:] - other[:, :, 1:]).max() > 1e-3


def test_frames_and_stages(pipe):
    noise = np.random.default_rng(0).standard_normal((2, 4, 2, 4, 8)).astype(np.float32)
    result = pipe(picture(32, 64), [PROMPT, "a bird"], **OPTIONS, latents=noise, output_type="np")
    assert result.frames.shape == (2, 5, 32, 64, 3)
    assert list(result.seconds) == ["text", "encode", "denoise", "decode"]


@pytest.mark.parametrize(
    ("shape", "expected"), [((3000, 4000), (560, 720)), ((1280, 720), (832, 480)), ((500, 501), (624, 624))]
)
def test_without_a_size_the_image_says_which(pipe, capsys, shape, expected):
    image = Image.new("RGB", shape[::-1])
    size = pipe._size_for(VideoRequest(), [image])
    assert size == (expected, expected)
    line = (
        f"size {expected[0]}x{expected[1]}, the trained size nearest in shape to the image of {shape[0]}x{shape[1]}\n"
    )
    assert capsys.readouterr().out == line
    assert pipe._size_for(VideoRequest(height=480, width=832), [image]).sampled == (480, 832)
    assert pipe._size_for(VideoRequest(binning="off"), [image]).sampled == (480, 832)


def test_an_image_of_the_result_s_shape_is_not_cropped(pipe, monkeypatch, capsys):
    """At a size that is not trained the middle of what is sampled is kept; there the image lies, whole."""
    monkeypatch.setitem(resolution.VIDEO_BINS, 30, (resolution.Bin(0.5, 32, 64),))
    image, seen = picture(32, 50), []
    size = pipe._size_for(VideoRequest(height=32, width=50), [image])
    assert size == ((32, 50), (32, 64))
    monkeypatch.setattr(pipe.autoencoder, "encode", lambda videos: seen.append(videos) or videos)
    options = {name: OPTIONS[name] for name in ("max_sequence_length", "complex_human_instruction", "frames")}
    monkeypatch.setattr(pipe, "_noise", lambda *_: pytest.fail("seen"))
    with pytest.raises(pytest.fail.Exception, match="seen"):
        pipe(image, PROMPT, height=32, width=50, **options)
    (videos,) = seen
    shown = np.asarray(videos)[0]
    assert shown.shape == (1, 32, 64, 3)
    np.testing.assert_array_equal(resolution.resize_and_crop(shown, 32, 50)[0], to_network_range(image, 32, 50)[0])
    assert "cropped, half on each side" not in capsys.readouterr().out


def test_an_image_of_another_shape_is_cropped_or_refused(capsys):
    image = np.zeros((100, 100, 3), np.uint8)
    image[25:75] = 255  # what a video of twice the width keeps
    fitted = fit_picture(Image.fromarray(image), (16, 32), None)
    assert fitted.size == (32, 16)
    assert np.asarray(fitted)[1:-1].min() > 240
    line = "image of 100x100 pixels for a video of 16x32: 50.0% of its height is cropped, half on each side\n"
    assert capsys.readouterr().out == line
    with pytest.raises(UserError, match="another shape; crop it to 50x100"):
        fit_picture(Image.fromarray(image), (16, 32), "error")
    # a difference of less than a pixel is none
    assert fit_picture(Image.new("RGB", (1921, 1080)), (54, 96), "error").size == (96, 54)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("image", "options", "part"),
    [
        (None, {}, "image is missing"),
        ([], {}, "image is an empty list"),
        ([picture(32, 64)] * 3, {}, "3 images for 2 prompts with 1 videos each"),
        (picture(32, 64), {"frames": 1}, "frames 1 would be the image alone; choose 5 or more"),
        (picture(32, 64), {"frames": 8}, "8 frames.*5 or 9"),
        (picture(32, 4), {}, "too small"),
        (np.zeros((32, 64)), {}, "shape"),
    ],
)
def test_mistakes(pipe, image, options, part):
    with pytest.raises(UserError, match=part) as caught:
        pipe(image, [PROMPT, "a bird"], **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)


def test_an_image_that_is_not_there(pipe):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        pipe("nowhere.png", PROMPT, **OPTIONS)
