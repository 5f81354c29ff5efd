"""SanaWMPipeline: what is said and refused, before anything is computed; directories and what they say."""

from __future__ import annotations

import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convert.engine import import_model
from sana_jax import SanaPipeline, SanaVideoPipeline, SanaWMPipeline, SanaWMRefiner, SanaWMStreamingPipeline
from sana_jax.camera import action_to_c2w
from sana_jax.contract import infer_contract
from sana_jax.diffusion.samplers import DPMSolver
from sana_jax.errors import CheckpointError, UserError
from sana_jax.pipelines.world_inputs import camera_path, view_at
from sana_jax.pipelines.world_model import _OF_ITS_RUN
from tests.parity.pipeline_oracle import picture
from tests.pipelines.tiny_model import Unreadable
from tests.pipelines.tiny_refiner import tiny_refiner

GOOD = {"prompt": "a red panda", "action": "w-8", "intrinsics": [40.0, 41.0, 26.0, 14.0], "height": 16, "width": 24}


class WithGradient:
    """What NumPy can't read, as a tensor of torch that requires a gradient."""

    def __array__(self, *arguments, **options):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


@pytest.fixture(scope="module")
def pipe(world_model) -> SanaWMPipeline:
    return SanaWMPipeline.from_pretrained(world_model)


def straight(frames: int) -> np.ndarray:
    return np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))


def bent(**changes) -> np.ndarray:
    poses = straight(9)
    for place, value in changes.items():
        frame, row, column = map(int, place[1:].split("_"))
        poses[frame, row, column] = value
    return poses


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"action": "x-8"}, ("'x'", "scheme v1 has w forward")),
        ({"action": "w"}, ("no hyphen",)),
        ({"action": "w-"}, ("no number of frames",)),
        ({"action": "w-0"}, ("cannot last '0' frames",)),
        ({"action": "w--3"}, ("negative",)),
        ({"action": "w-8,"}, ("segment 2 is empty", "comma at the end")),
        ({"action": "-3"}, ("no keys", "none-3")),
        ({"action": ""}, ("is empty",)),
        ({"num_frames": 7}, ("makes 9 frames", "shorten it by 2")),
        ({"num_frames": 4, "action": "w-3"}, ("num_frames 4", "1 + 2k", "for 3 or 5, with ,none-1 at", "end for 5")),
        ({"num_frames": 2, "action": "w-1"}, ("num_frames 2", "ask for 3, with ,none-1 at")),
        ({"num_frames": 8, "action": None, "c2w": straight(9)}, ("num_frames 8", "1 + 2k frames: ask for 7 or 9",)),
        ({"num_frames": 11}, ("makes 9 frames", "add ,none-2")),
        ({"num_frames": 9.0}, ("num_frames 9.0 is not allowed",)),
        ({"action": "w-1"}, ("2 frames are less", "3 or more")),
        ({"action_scheme": "v3"}, ("'v3'", "v1")),
        ({"action": None}, ("action and c2w: neither is given",)),
        ({"c2w": straight(9)}, ("action and c2w: both are given",)),
        ({"action": None, "c2w": bent(_3_0_0=1.5)}, ("not rigid", "frame 3")),
        ({"action": None, "c2w": bent(_2_1_3=np.nan)}, ("NaN", "frame 2")),
        ({"action": None, "c2w": straight(9)[:, :3]}, ("(9, 3, 4)", "0 0 0 1")),
        ({"action": None, "c2w": straight(9), "num_frames": 11}, ("c2w of 9 poses", "ask for 9")),
        ({"action": None, "c2w": straight(9), "action_scheme": "v2"}, ("action_scheme would not be used",)),
        ({"action": None, "c2w": straight(2051)}, ("1026 latent frames", "2047 frames and fewer")),
        ({"intrinsics": [1.0, 2.0, 3.0]}, ("intrinsics of shape (3,)", "(4,), (3, 3)")),
        ({"intrinsics": [40.0, 41.0, 60.0, 14.0]}, ("outside the image", "50 wide and 30 high")),
        ({"image": np.zeros((8, 40, 3), np.uint8)}, ("8x40 pixels is too small", "16")),
        ({"image": Image.new("F", (50, 30), 7.0)}, ("image of mode F", "8-bit png")),
        ({"image": "nowhere.png"}, ("nowhere.png is not a file",)),
        ({"height": 18}, ("height 18", "16 or 20")),
        ({"latents": np.zeros((1, 8, 4, 4, 6))}, ("(1, 8, 4, 4, 6)", "(1, 8, 5, 4, 6)")),
        ({"image": Unreadable((30, 50, 3))}, ("image can't be read as an array", "BFloat16")),
        ({"action": None, "c2w": WithGradient()}, ("c2w is no array of real numbers (", "detach")),
        ({"intrinsics": WithGradient()}, ("intrinsics are no array of real numbers (", "detach")),
        ({"prompt": ["a", "b"]}, ("a world has one text",)),
        ({"prompt": None}, ("prompt and prompt_embeds: neither",)),
        ({"prompt": None, "prompt_embeds": np.zeros((2, 8, 24))}, ("prompt_embeds of shape (2, 8, 24)", "one text")),
        ({"prompt": None, "prompt_embeds": Unreadable((1, 1, 8, 24))}, ("prompt_embeds can't be read",)),
        ({"negative_prompt_embeds": np.zeros((2, 1, 8, 24))}, ("negative_prompt_embeds of shape (2, 8, 24)",)),
        ({"height": 16.0}, ("height 16.0 is not allowed; give a whole number",)),
        ({"width": "24"}, ("width '24' is not allowed; give a whole number",)),
        ({"chi_prompt": "User Prompt: "}, ("chi_prompt is a list of lines",)),
        ({"guidance_scale": 1.0, "negative_prompt": "blurry"}, ("negative_prompt would not be used",)),
        ({"refine": "a directory"}, ("refine str", "SanaWMRefiner.from_pretrained")),
        ({"refiner_options": {"seed": 1}}, ("refiner_options would not be used without refine",)),
        ({"fps": 0}, ("fps 0",)),
        ({"output_type": "pt"}, ("output_type 'pt'",)),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_computed(pipe, changes, parts):
    arguments = {"image": picture(30, 50), **GOOD, **changes}
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        pipe(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not len(pipe.programs)
    assert not pipe.transformer_weights.loaded


def test_refiners_that_do_not_fit(pipe):
    arguments = {"image": picture(30, 50), **GOOD}
    refiner = tiny_refiner()
    with pytest.raises(UserError, match=r"4 .* with an autoencoder of 8; all must be alike"):
        pipe(**arguments, refine=refiner)
    with pytest.raises(UserError, match="refiner_options has sede; allowed are prompt, sink_size"):
        pipe(**arguments, refine=refiner, refiner_options={"sede": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": None}, "in a single shot, is not allowed"),
        ({"sigmas": (0.5, 0.9, 0.0)}, "sigmas"),
        ({"sink_size": 5}, "5 latent frames with sink_size=5"),
        ({"noise": np.zeros((1, 8, 1, 4, 6))}, "noise of shape"),
        ({"prompt_embeds": np.zeros((1, 8, 16)), "prompt": "a"}, "both given"),
    ],
)
def test_a_refiners_arguments_are_checked_before_its_latents_are_there(options, message):
    """``SanaWMPipeline`` asks this before it samples them."""
    refiner = tiny_refiner()
    channels = refiner.transformer.config.in_channels
    with pytest.raises(UserError, match=message):
        refiner.check((1, 5, 4, 6, channels), "latent", **{"prompt": "a", **options})
    with pytest.raises(TypeError, match="sede"):
        refiner.check((1, 5, 4, 6, channels), "latent", prompt="a", sede=1)


def test_what_a_refiner_is_asked_beforehand_are_arguments_of_its_call():
    """With the same defaults; the others are about how the call goes."""
    call, check = (inspect.signature(method).parameters for method in (SanaWMRefiner.__call__, SanaWMRefiner.check))
    for name in call.keys() - {"self", "latents", *_OF_ITS_RUN}:
        assert check[name].default == call[name].default, name
    assert check.keys() - call.keys() == {"shape"}


def test_frames_and_lenses_that_are_changed_are_said(capsys):
    def frames_of(count, **options):
        poses = camera_path(None, straight(count), options.get("num_frames"), None, 8)
        return len(poses), capsys.readouterr().out

    assert frames_of(81) == (81, "")
    assert frames_of(80) == (73, "80 frames become 73: videos of this model have 1 + 8k frames\n")
    assert frames_of(81, num_frames=17) == (17, "c2w: the first 17 of 81 poses are taken\n")
    assert len(camera_path("w-80,jw-40", None, None, None, 8)) == 121
    assert len(camera_path("w-9", None, None, None, 8)) == 9
    assert capsys.readouterr().out == (
        "10 frames become 9: videos of this model have 1 + 8k frames; end the action with ,none-7 for 17\n"
    )
    for scheme, given in (("v1", None), ("v2", "v2")):
        poses = camera_path("d-8", None, None, given, 8)
        np.testing.assert_array_equal(poses, action_to_c2w("d-8", scheme))

    def lens(focal):
        values = None if focal is None else [focal, focal, 25.0, 15.0]
        view = view_at(picture(30, 50), straight(9), values, (16, 24), 2, 4)
        assert view.pixels.shape == (1, 16, 24, 3)
        assert view.camera.conditions.shape == (5, 20)
        return view.intrinsics, capsys.readouterr().out

    cropped = "image of 30x50 pixels for a video of 16x24: 11.1% of its width is cropped, half on each side\n"
    assert lens(40.0)[1] == cropped
    for focal in (5.0, 200.0):
        assert "outside 25 to 120" in lens(focal)[1]
    default, said = lens(None)
    assert "none are given; a camera is taken that spans 60 degrees across, fx and fy 43.3" in said
    np.testing.assert_allclose(default[0], [43.301 * 16 / 30, 43.301 * 16 / 30, 25 * 27 / 50 - 1, 8], rtol=0.02)
    view_at(picture(30, 50), straight(9), None, (16, 24), 2, 4, field=118.0)  # wide across the picture before cropping
    said = capsys.readouterr().out
    assert "one as in training is taken, which spans 118 degrees across what is left of the picture" in said
    assert "outside 25 to 120" not in said


def test_another_sampler_is_refused(world_model):
    pipe = SanaWMPipeline.from_pretrained(world_model)
    pipe.sampler = DPMSolver()
    with pytest.raises(UserError, match="sampler DPMSolver; allowed is FlowEuler"):
        pipe(picture(30, 50), **GOOD)


def test_a_directory_and_its_contract(world_model, tmp_path, capsys):
    """Published, converted and written again: the same weights, the same defaults."""
    pipe = SanaWMPipeline.from_pretrained(world_model)
    contract = pipe.contract
    assert contract.family == "SANA-WM of 2 blocks, width 48"
    assert (contract.flow_shift, contract.sampler, contract.image_size) == (9.8, "flow_euler", 720)
    defaults = pipe.defaults
    assert (defaults.height, defaults.width, defaults.frames, defaults.fps) == (704, 1280, 161, 16.0)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (60, 5.0)
    assert pipe.transformer.dtype == jnp.float32
    import_model(world_model, tmp_path / "converted")
    assert "contract: compute in" in capsys.readouterr().out
    converted = SanaWMPipeline.from_pretrained(tmp_path / "converted")
    assert infer_contract(tmp_path / "converted") == converted.contract == contract
    converted.save_pretrained(tmp_path / "written")
    written = SanaWMPipeline.from_pretrained(tmp_path / "written")
    assert (written.defaults, written.contract, written.sampler) == (defaults, contract, pipe.sampler)
    assert written.text_encoder.complex_human_instruction == pipe.text_encoder.complex_human_instruction
    assert not written.text_encoder.cleans_prompts
    for other in (converted, written):
        for name, weights in pipe.networks.items():
            jax.tree.map(np.testing.assert_array_equal, weights.params, other.networks[name].params)


def test_the_early_spelling_of_the_embedder(world_model, tmp_path):
    """The original names of the times' layers, which the published directory may have."""
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(world_model, tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    spelling = {"t_embedder.linear_1": "t_embedder.mlp.0", "t_embedder.linear_2": "t_embedder.mlp.2"}
    tensors = load_file(file)
    for new, old in spelling.items():
        tensors |= {f"{old}.{part}": tensors.pop(f"{new}.{part}") for part in ("weight", "bias")}
    save_file(tensors, file)
    pipes = [SanaWMPipeline.from_pretrained(path) for path in (world_model, copy)]
    jax.tree.map(np.testing.assert_array_equal, *(pipe.params for pipe in pipes))
    tensors.pop("blocks.0.attn.qkv.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="qkv"):
        SanaWMPipeline.from_pretrained(copy)


def test_streamed_without_being_distilled_for_it(world_model, capsys):
    """Any world model can be; what it does not say of itself is said."""
    teacher = SanaWMStreamingPipeline.from_pretrained(world_model)
    said = capsys.readouterr().out
    assert "does not say how it is streamed; the published student's settings are taken" in said
    assert "the decoder is not causal; every block is decoded with 1 latent frame before it again" in said
    assert teacher.sampler.timesteps == (1000, 960, 889, 727)
    assert (teacher.defaults.num_inference_steps, teacher.defaults.guidance_scale) == (4, 1.0)


def test_directories_of_other_kinds(world_model, video_model, tmp_path):
    for kind in (SanaVideoPipeline, SanaPipeline):
        with pytest.raises(UserError, match="SanaWMPipeline"):
            kind.from_pretrained(world_model)
    with pytest.raises(UserError, match="use SanaVideoPipeline"):
        SanaWMPipeline.from_pretrained(video_model)
    with pytest.raises(UserError, match="emulate-fp16-saturation"):
        SanaWMPipeline.from_pretrained(world_model, emulate_fp16_saturation=True)
    with pytest.raises(UserError, match="SanaWMPipeline"):
        SanaWMRefiner.from_pretrained(world_model)
    refiner = tmp_path / "refiner"
    refiner.mkdir()
    (refiner / "model_index.json").write_text(json.dumps({"_class_name": "SanaWMLTX2Refiner"}))
    with pytest.raises(UserError, match=r"is SANA-WM's refiner.*as refiner"):
        SanaWMPipeline.from_pretrained(refiner)
