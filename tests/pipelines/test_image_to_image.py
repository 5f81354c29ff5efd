"""Pictures that begin from pictures, and what else a call can be asked for, on tiny published models of every kind."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from sana_jax.autoencoders import DCAutoencoder
from sana_jax.diffusion.samplers import DPMSolver, FlowEuler
from sana_jax.errors import UserError
from sana_jax.pipelines.text_to_image import SanaPipeline
from sana_jax.weights.components import Resident
from tests.parity.pipeline_oracle import noise, picture
from tests.parity.sana_oracle import relative_error

HEIGHT, WIDTH = 64, 96
PROMPT, OTHER = "a red panda", "two small birds on a wire"
OFF = {"binning": "off"}
SIZE = {"height": HEIGHT, "width": WIDTH, **OFF}
TEXT = {"complex_human_instruction": [], "max_sequence_length": 8}
LATENT = {**TEXT, "output_type": "latent", "guidance_scale": 4.0}
NUMPY = {**LATENT, "output_type": "np"}
START = noise(1, HEIGHT, WIDTH, 3)


@pytest.fixture(scope="module")
def pipe(opened) -> SanaPipeline:
    return opened("sana-1.0")


@pytest.fixture(scope="module")
def euler(pipe) -> SanaPipeline:
    """The same networks with the other sampler, whose first sigma is 1."""
    return with_parts(pipe, sampler=FlowEuler(flow_shift=3.0))


def with_parts(pipe: SanaPipeline, **changes) -> SanaPipeline:
    """A pipeline that shares networks, programs and encodings with another one."""
    names = ("transformer", "params", "sampler", "text_encoder", "autoencoder", "defaults")
    other = type(pipe)(*(changes.get(name, getattr(pipe, name)) for name in names), residency="all")
    other.programs, other._encodings = pipe.programs, pipe._encodings
    return other


def latent(pipe, **arguments) -> np.ndarray:
    return pipe(PROMPT, **{**LATENT, "num_inference_steps": 3, **arguments}).images


def encoded(pipe, image: Image.Image) -> np.ndarray:
    """The picture's own latents (1, C, h, w)."""
    values = np.asarray(image, np.float32)[None] / 127.5 - 1
    return np.asarray(pipe.autoencoder.encode(values)).transpose(0, 3, 1, 2)


# -- strength ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sana-1.0", "sprint"])
@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_strengths_that_are_refused(opened, kind, strength):
    with pytest.raises(UserError, match=rf"strength {strength} is not allowed; choose more than 0 and at most 1"):
        opened(kind)(PROMPT, image=picture(HEIGHT, WIDTH), strength=strength, **TEXT, **OFF)


@pytest.mark.parametrize("kind", ["sana-1.0", "sprint"])
def test_a_strength_that_leaves_no_step(opened, kind):
    with pytest.raises(UserError, match=r"strength 1e-20 of 2 steps leaves none"):
        opened(kind)(PROMPT, image=picture(HEIGHT, WIDTH), strength=1e-20, num_inference_steps=2, **TEXT, **OFF)


@pytest.mark.parametrize(("kind", "steps"), [("sana-1.0", 2), ("sprint", 2), ("sprint", 1)])
def test_a_strength_that_takes_all_steps_is_said(opened, kind, steps, capsys):
    """Rounding takes the step that would have kept something of the picture."""
    given = {"image": picture(HEIGHT, WIDTH), "num_inference_steps": steps, **TEXT, **OFF}
    opened(kind)(PROMPT, strength=0.6, **given)
    said = capsys.readouterr().out
    assert f"strength 0.6 of {steps} steps takes all of them" in said
    assert "keeps next to nothing of image" in said
    assert ("or a strength of 0.5 or less" in said) == (steps == 2)
    opened(kind)(PROMPT, strength=0.5 if steps == 2 else 1.0, **given)
    assert "takes all of them" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"mask_image": np.ones((HEIGHT, WIDTH))}])
def test_options_that_need_an_image(pipe, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} would not be used without image"):
        pipe(PROMPT, **options, **TEXT, **SIZE)


def test_strength_one_is_text_to_image(pipe, euler):
    """Exactly where the first sigma is 1; with the DPM solver's 0.9997 or so, a trace of the picture is left."""
    given = picture(HEIGHT, WIDTH)
    from_image = latent(euler, image=given, strength=1.0, latents=START, **OFF)
    np.testing.assert_array_equal(from_image, latent(euler, latents=START, **OFF))
    traces = latent(pipe, image=given, strength=1.0, latents=START, **OFF)
    error = relative_error(traces, latent(pipe, latents=START, **OFF))
    sigma = float(pipe.sampler.schedule(3).sigmas[0])
    assert isinstance(pipe.sampler, DPMSolver)
    assert 0 < error < 20 * (1 - sigma) < 0.05


@pytest.mark.parametrize("sampler", ["dpm", "euler"])
def test_the_weaker_the_nearer(pipe, euler, sampler):
    """The last of many steps leaves the picture nearly as it was; more steps take it farther away."""
    used, given = {"dpm": pipe, "euler": euler}[sampler], picture(HEIGHT, WIDTH)
    near = encoded(used, given)
    errors = [
        relative_error(latent(used, image=given, strength=strength, num_inference_steps=20, latents=START, **OFF), near)
        for strength in (0.05, 0.3, 0.9)
    ]
    assert errors[0] < 0.35
    assert errors[0] < errors[1] < errors[2]


def test_the_first_step_starts_from_the_noised_picture(euler, monkeypatch):
    """x = (1 - sigma) x0 + sigma noise, of the step that the strength begins with."""
    given, seen, starts, run = picture(HEIGHT, WIDTH), [], [], euler._run

    def spy(denoiser, start, **options):
        starts.append(np.asarray(start).transpose(0, 3, 1, 2))
        return run(denoiser, start, **options)

    monkeypatch.setattr(euler, "_run", spy)
    latent(euler, image=given, strength=0.6, latents=START, callback_on_step_end=lambda *a: seen.append(a[1:3]), **OFF)
    schedule = euler.sampler.schedule(3)
    assert seen == [(step, float(schedule.timesteps[step])) for step in (1, 2)]
    sigma = float(schedule.sigmas[1])
    assert 0.3 < sigma < 0.95
    assert relative_error(starts[0], (1 - sigma) * encoded(euler, given) + sigma * START) <= 1e-6


def test_size_comes_from_the_image(pipe, capsys):
    result = pipe(PROMPT, image=picture(HEIGHT, WIDTH), num_inference_steps=3, strength=0.3, **NUMPY, **OFF)
    assert result.images.shape == (1, HEIGHT, WIDTH, 3)
    result = pipe(PROMPT, image=picture(200, 130), num_inference_steps=3, strength=0.3, **NUMPY, **SIZE)
    assert result.images.shape == (1, HEIGHT, WIDTH, 3)
    with pytest.raises(UserError, match=r"height 70 .*multiple of 32.*64 or 96"):
        pipe(PROMPT, image=picture(70, 96), **NUMPY, **OFF)


# -- several pictures ----------------------------------------------------------------------------------------------


def test_one_image_each(pipe):
    """Two prompts with a picture each give what each gives alone."""
    given, start = [picture(HEIGHT, WIDTH, seed) for seed in (1, 2)], noise(2, HEIGHT, WIDTH, 5)
    options = {**LATENT, **OFF, "num_inference_steps": 3, "strength": 0.6}
    together = pipe([PROMPT, OTHER], image=given, latents=start, **options).images
    for index, prompt in enumerate((PROMPT, OTHER)):
        alone = pipe(prompt, image=given[index], latents=start[index : index + 1], **options).images
        assert relative_error(together[index : index + 1], alone) <= 1e-5
    shared = pipe([PROMPT, OTHER], image=given[0], latents=start, **options).images
    assert relative_error(shared[:1], together[:1]) <= 1e-5
    assert relative_error(shared[1:], together[1:]) > 1e-3
    stack = np.stack([np.asarray(one) for one in given])
    np.testing.assert_array_equal(pipe([PROMPT, OTHER], image=stack, latents=start, **options).images, together)


@pytest.mark.parametrize("kind", ["sana-1.0", "sprint"])
def test_wrong_numbers_of_images(opened, kind):
    given = picture(HEIGHT, WIDTH)
    with pytest.raises(UserError, match=r"2 of image for 3 pictures; allowed is one for all or one each"):
        opened(kind)(PROMPT, num_images_per_prompt=3, image=[given, given], **TEXT, **OFF)
    with pytest.raises(UserError, match="image is an empty list"):
        opened(kind)(PROMPT, image=[], **TEXT, **OFF)
    with pytest.raises(UserError, match=r"images of 64x96, 96x64 pixels; .*give height and width"):
        opened(kind)([PROMPT, OTHER], image=[given, picture(WIDTH, HEIGHT)], **TEXT, **OFF)


def test_control_images(opened):
    pipe, given = opened("controlnet"), [picture(HEIGHT, WIDTH, seed) for seed in (1, 2)]
    start = np.concatenate([START, START])
    options = {**LATENT, **SIZE, "num_inference_steps": 1, "guidance_scale": 1.0}
    first, second = pipe([PROMPT, PROMPT], control_image=given, latents=start, **options).images
    assert relative_error(first, second) > 1e-3
    both = pipe([PROMPT, PROMPT], control_image=given[0], latents=start, **options).images
    assert relative_error(both[1], first) <= 1e-5
    for control, message in (
        (None, "control_image is missing"),
        ([], "control_image is an empty list"),
        ([given[0]] * 3, "3 of control_image for 2 pictures"),
        (Image.new("RGB", (1, 1)), "control_image of 1x1 pixels is too small"),
    ):
        with pytest.raises(UserError, match=message):
            pipe([PROMPT, PROMPT], control_image=control, latents=start, **options)
    with pytest.raises(UserError, match="controlnet_conditioning_scale nan"):
        pipe(PROMPT, control_image=given[0], controlnet_conditioning_scale=float("nan"), **options)
    with pytest.raises(TypeError, match=r"SanaControlNetPipeline: .*colour"):
        pipe(PROMPT, control_image=given[0], colour="red")


# -- inpainting ----------------------------------------------------------------------------------------------------


def mask_of(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[height // 2 + 3 :, : width // 3 + 5] = True
    return mask


@pytest.mark.parametrize("sampler", ["dpm", "euler"])
def test_inpainting(pipe, euler, sampler):
    used, given, mask = {"dpm": pipe, "euler": euler}[sampler], picture(HEIGHT, WIDTH), mask_of(HEIGHT, WIDTH)
    options = {**TEXT, **OFF, "num_inference_steps": 3, "strength": 1.0, "latents": START}
    (result,) = used(PROMPT, image=given, mask_image=mask, **options).images
    before, after = np.asarray(given, int), np.asarray(result, int)
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).any(axis=-1).mean() > 0.9
    everywhere = used(PROMPT, image=given, mask_image=np.ones_like(mask), **{**options, "output_type": "latent"}).images
    without = used(PROMPT, image=given, **{**options, "output_type": "latent"}).images
    np.testing.assert_array_equal(everywhere, without)


def test_latents_outside_the_mask_are_the_pictures_own(euler):
    given, mask = picture(HEIGHT, WIDTH), np.zeros((HEIGHT, WIDTH), bool)
    mask[:20, 40:50] = True  # the second of three latent columns, the first row
    seen = []
    keep = lambda pipeline, step, timestep, values: seen.append(np.asarray(values["latents"]))  # noqa: E731
    found = latent(euler, image=given, mask_image=mask, strength=1.0, latents=START, callback_on_step_end=keep, **OFF)
    near, cells = encoded(euler, given), np.zeros((2, 3), bool)
    cells[0, 1] = True
    np.testing.assert_allclose(found[:, :, ~cells], near[:, :, ~cells], atol=1e-5)
    assert relative_error(found[:, :, cells], near[:, :, cells]) > 0.01
    for step, values in enumerate(seen):
        sigma = float(euler.sampler.schedule(3).sigmas[step + 1])
        expected = (1 - sigma) * near + sigma * START
        np.testing.assert_allclose(values[:, :, ~cells], expected[:, :, ~cells], atol=1e-5)


def test_inpainting_is_exact_after_scaling_and_cropping(pipe, monkeypatch, capsys):
    """A picture of a size that is not sampled: what is not masked is the picture itself, in its own place."""
    from sana_jax.pipelines import resolution

    monkeypatch.setitem(resolution.BINS, 32, (resolution.Bin(0.67, HEIGHT, WIDTH), resolution.Bin(1.5, WIDTH, HEIGHT)))
    given, mask = picture(50, 100), mask_of(50, 100)
    result = pipe(PROMPT, image=given, mask_image=mask, strength=0.5, num_inference_steps=3, seed=1, **TEXT)
    assert result.sampled_size == (HEIGHT, WIDTH)
    before, after = np.asarray(given, int), np.asarray(result.images[0], int)
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).any(axis=-1).mean() > 0.9
    lines = [line for line in capsys.readouterr().out.splitlines() if "compil" not in line]
    assert lines == [
        "sampling 64x96 pixels, the trained size nearest in shape to 50x100, to which the pictures are scaled and "
        "cropped (binning off samples the size itself)"
    ]


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture(HEIGHT, WIDTH), np.ones((WIDTH, HEIGHT)), "mask_image of 96x64 for an image of 64x96"),
        (picture(HEIGHT, WIDTH), np.zeros((HEIGHT, WIDTH)), "no white"),
        ([picture(HEIGHT, WIDTH)], np.ones((HEIGHT, WIDTH)), "mask_image goes with one image"),
        (np.zeros((2, HEIGHT, WIDTH, 3)), np.ones((HEIGHT, WIDTH)), "mask_image goes with one image"),
    ],
)
def test_masks_that_are_refused(pipe, image, mask, message):
    """Before a text is encoded or anything is compiled."""
    programs = len(pipe.programs)
    with pytest.raises(UserError, match=message):
        pipe("birds", image=image, mask_image=mask, **TEXT, **OFF)
    assert len(pipe.programs) == programs
    assert not any(key[0] == "birds" for key in pipe._encodings)


# -- guidance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"pag_scale": -1.0}, ("pag_scale -1.0", "0 (off) or more")),
        ({"pag_scale": float("nan")}, ("pag_scale nan",)),
        ({"pag_scale": 3.0, "pag_adaptive_scale": -0.1}, ("pag_adaptive_scale -0.1",)),
        ({"pag_applied_layers": 1}, ("would not be used with pag_scale 0",)),
        ({"pag_adaptive_scale": 0.1}, ("would not be used with pag_scale 0",)),
        ({"pag_scale": 3.0}, ("for a model of 3 layers none is published", "0 to 2")),
        ({"pag_scale": 3.0, "pag_applied_layers": 3}, ("[3]", "0 to 2")),
        ({"pag_scale": 3.0, "pag_applied_layers": [0, -1]}, ("[0, -1]",)),
        ({"pag_scale": 3.0, "pag_applied_layers": []}, ("[]", "0 to 2")),
        ({"pag_scale": 3.0, "pag_applied_layers": "blocks.1"}, ("blocks.1", "'transformer_blocks.<number>'")),
        ({"guidance_interval": (0.5, 0.1)}, ("(0.5, 0.1)",)),
        ({"guidance_interval": (0.0, 1.5)}, ("1.5",)),
        ({"guidance_scale": float("inf")}, ("guidance_scale inf",)),
    ],
)
def test_guidance_that_is_refused(pipe, options, parts):
    with pytest.raises(UserError) as caught:
        pipe(PROMPT, **{**LATENT, **SIZE, **options})
    for part in parts:
        assert part in str(caught.value)


def test_perturbed_attention(pipe):
    """Acts, adds up over layers, is named in any spelling; an adaptive scale turns it off towards the end."""
    options = {"latents": START, "num_inference_steps": 2, **OFF}
    plain = latent(pipe, **options)
    first = latent(pipe, **options, pag_scale=3.0, pag_applied_layers=0)
    assert relative_error(first, plain) > 1e-3
    spelt = latent(pipe, **options, pag_scale=3.0, pag_applied_layers=["transformer_blocks.0.attn1", 0])
    np.testing.assert_array_equal(spelt, first)
    assert relative_error(latent(pipe, **options, pag_scale=1e-6, pag_applied_layers=0), plain) < 1e-4
    adaptive = latent(pipe, **options, pag_scale=3.0, pag_applied_layers=0, pag_adaptive_scale=1e6)
    assert relative_error(adaptive, plain) < relative_error(first, plain)


def test_guidance_interval(euler):
    options = {"latents": START, **OFF}
    full, none = latent(euler, **options), latent(euler, guidance_scale=1.0, **options)
    np.testing.assert_array_equal(latent(euler, guidance_interval=(0.0, 1.0), **options), full)
    assert relative_error(latent(euler, guidance_interval=(0.0, 0.0), **options), none) <= 1e-5
    middle = latent(euler, guidance_interval=(0.6, 0.9), **options)
    assert relative_error(middle, full) > 1e-4
    assert relative_error(middle, none) > 1e-4


# -- callbacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sana-1.0", "sprint"])
def test_callbacks_and_early_stop(opened, kind):
    pipe, seen = opened(kind), []

    def watch(pipeline, step, timestep, values):
        assert pipeline is pipe
        seen.append((step, timestep, np.asarray(values["latents"])))
        return values if step == 0 else None  # what it was given may be handed back

    options = {**LATENT, **SIZE, "num_inference_steps": 3, "seed": 4}
    whole = pipe(PROMPT, callback_on_step_end=watch, **options).images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    scale = 1 if kind == "sana-1.0" else 2
    assert relative_error(scale * seen[-1][2], whole) <= 1e-6
    stopped = pipe(PROMPT, callback_on_step_end=lambda _p, step, _t, _v: step < 1, **options).images
    if kind == "sana-1.0":
        np.testing.assert_array_equal(stopped, seen[1][2])
    assert relative_error(stopped, whole) > 1e-3
    with pytest.raises(UserError, match="callback_on_step_end 'print' is not allowed; give a function"):
        pipe(PROMPT, callback_on_step_end="print", **options)
    with pytest.raises(UserError, match="callback_on_step_end returned changed values"):
        pipe(PROMPT, callback_on_step_end=lambda *a: {"latents": np.zeros(1)}, **options)
    with pytest.raises(UserError, match=r"returned a value of type .*Array.*, which would not be used"):
        pipe(PROMPT, callback_on_step_end=lambda *a: 0 * a[3]["latents"], **options)  # drawn on as if it were not there


# -- SANA-Sprint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_every_number_of_steps(opened, steps):
    pipe, angles = opened("sprint"), []
    result = pipe(
        PROMPT, num_inference_steps=steps, callback_on_step_end=lambda *a: angles.append(a[2]), **LATENT, **SIZE
    )
    assert np.isfinite(result.images).all()
    assert len(angles) == steps
    expected = [1.5708, 1.3] if steps == 2 else 1.5708 * (1 - np.arange(steps) / steps)
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


def test_sprint_timesteps(opened):
    pipe = opened("sprint")
    options = {**LATENT, **SIZE, "seed": 2}
    default = pipe(PROMPT, num_inference_steps=2, **options).images
    np.testing.assert_array_equal(
        pipe(PROMPT, num_inference_steps=2, timesteps=[1.5708, 1.3, 0.0], **options).images, default
    )
    other = pipe(PROMPT, num_inference_steps=2, timesteps=[1.5708, 1.0, 0.0], **options).images
    assert relative_error(other, default) > 1e-3
    by_name = pipe(PROMPT, num_inference_steps=2, intermediate_timesteps=1.0, **options).images
    np.testing.assert_array_equal(by_name, other)
    for wrong, message in (
        ({"timesteps": [1.5, 0.0]}, r"2 timesteps do not make 2 steps; give 3 angles"),
        ({"timesteps": [0.0, 1.0, 1.5]}, r"angles that decrease"),
        ({"timesteps": [1.5, 1.0, 0.0], "max_timesteps": 1.5}, r"timesteps take the place of max_timesteps"),
        ({"intermediate_timesteps": 1.6}, r"intermediate_timesteps=1\.6 must lie between 0 and max_timesteps"),
        ({"max_timesteps": -1.0}, r"max_timesteps=-1\.0"),
        ({"num_inference_steps": 3, "intermediate_timesteps": 1.0}, r"goes with 2 steps, not 3"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(PROMPT, **{"num_inference_steps": 2, **wrong}, **options)


def test_sprint_step_noise(opened):
    pipe = opened("sprint")
    own = np.random.default_rng(0).standard_normal((2, *START.shape)).astype(np.float32)
    options = {**LATENT, **SIZE, "num_inference_steps": 2, "latents": START}
    given = pipe(PROMPT, step_noise=own, **options).images
    assert relative_error(pipe(PROMPT, **options).images, given) > 1e-3
    np.testing.assert_array_equal(pipe(PROMPT, step_noise=own * [[[[[1]]]], [[[[9]]]]], **options).images, given)
    with pytest.raises(UserError, match=r"seed 5 would not be used, since latents and step_noise are given"):
        pipe(PROMPT, step_noise=own, seed=5, **options)
    for wrong in (own[:1], own[:, :, :3], own.transpose(0, 1, 3, 4, 2), own[0]):
        with pytest.raises(UserError, match=r"step_noise of shape .*2 steps here need \(2, 1, 8, 2, 3\)"):
            pipe(PROMPT, step_noise=wrong, **options)


def test_sprint_image_to_image(opened):
    """Half the strength of two steps takes the second one; strength 1 takes both from all but pure noise."""
    pipe, given, angles = opened("sprint"), picture(HEIGHT, WIDTH), []
    options = {**LATENT, **OFF, "num_inference_steps": 2, "latents": START}
    watch = lambda *a: angles.append(a[2])  # noqa: E731
    half = pipe(PROMPT, image=given, strength=0.5, callback_on_step_end=watch, **options).images
    assert angles == pytest.approx([1.3])
    with pytest.raises(UserError, match=r"1 steps here need \(1, 1, 8, 2, 3\)"):
        pipe(PROMPT, image=given, strength=0.5, step_noise=np.zeros((2, *START.shape)), **options)
    other = pipe(PROMPT, image=picture(HEIGHT, WIDTH, 9), strength=0.5, **options).images
    assert relative_error(other, half) > 1e-3
    full = pipe(PROMPT, image=given, strength=1.0, **options).images
    assert relative_error(full, pipe(PROMPT, **options, height=HEIGHT, width=WIDTH).images) < 1e-3


# -- values that are not finite ------------------------------------------------------------------------------------


def poisoned(params: dict, *path: str) -> Resident:
    """The parameters with one tensor of NaN."""
    params = jax.tree.map(lambda leaf: leaf, params)  # new dictionaries
    node = params
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = node[path[-1]] * np.nan
    return Resident.of("poisoned", params)


def test_values_that_are_not_finite_name_their_stage(opened):
    """The text encoder, a step, the encoder and the decoder of pictures, each by one poisoned tensor of its own."""
    pipe = opened("sprint")
    options = {**TEXT, **OFF, "num_inference_steps": 3, "image": picture(HEIGHT, WIDTH), "strength": 0.6}

    def message(**changes) -> str:
        broken = with_parts(pipe, **changes)
        if "text_encoder" in changes:
            broken._encodings = {}
        with pytest.raises(UserError) as caught:
            broken(PROMPT, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = dataclasses.replace(pipe.text_encoder, weights=poisoned(pipe.text_encoder.weights.params, "norm", "scale"))
    assert message(text_encoder=text).startswith("text encoding gave values that are not finite in 1 of 1 pictures")
    transformer = poisoned(pipe.params, "transformer_blocks", "attn2", "to_v", "bias")
    # 0.6 of 3 steps begins with the second
    assert message(params=transformer).startswith("sampling step 2 of 3 gave values that are not finite")

    def autoencoder(half: str) -> DCAutoencoder:
        whole = pipe.autoencoder
        params = jax.tree.map(lambda leaf: leaf, whole.weights.params)
        params[half] = jax.tree.map(lambda leaf: leaf * np.nan, params[half])
        broken = DCAutoencoder(whole.config, Resident.of("vae", params), whole.dtype)
        broken.programs = whole.programs
        return broken

    assert message(autoencoder=autoencoder("encoder")).startswith("encoding of the picture gave values")
    assert message(autoencoder=autoencoder("decoder")).startswith("decoding gave values")
