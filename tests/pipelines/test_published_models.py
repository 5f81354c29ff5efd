"""Published model directories: what is in memory when, which directories are refused and how, writing and reading."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sana_jax import CheckpointError, SanaControlNetPipeline, SanaPipeline, SanaSprintPipeline, UserError
from sana_jax.compilation import readable_bytes
from sana_jax.pipelines import resolution
from sana_jax.pipelines.best_of import best_of
from sana_jax.weights.components import Resident
from tests.parity.pipeline_oracle import noise, picture
from tests.parity.sana_oracle import relative_error
from tests.pipelines.conftest import CLASSES

HEIGHT, WIDTH = 64, 96
SIZE = {"height": HEIGHT, "width": WIDTH, "binning": "off"}
TEXT = {"complex_human_instruction": [], "max_sequence_length": 8}
SHORT = {**TEXT, "num_inference_steps": 1, "guidance_scale": 1.0}
PROMPT = "a red panda"


def open_again(opened, kind: str, directory, **options):
    """A pipeline of its own that shares the compiled programs of the session's one."""
    pipe, model = CLASSES.get(kind, SanaPipeline).from_pretrained(directory, **options), opened(kind)
    pipe.programs = model.programs
    pipe.autoencoder.programs = model.autoencoder.programs
    pipe.text_encoder = dataclasses.replace(pipe.text_encoder, _compiled=model.text_encoder._compiled)
    return pipe


def leaves(params) -> list:
    return [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]


def alive(references: list) -> int:
    return sum(reference() is not None for reference in references)


# -- memory --------------------------------------------------------------------------------------------------------

STAYS = {
    "all": {"text": "T", "denoise": "TD", "decode": "TDA", "end": "TDA"},
    "text_encoder_freed": {"text": "T", "denoise": "D", "decode": "DA", "end": "DA"},
    "one_at_a_time": {"text": "T", "denoise": "D", "decode": "A", "end": ""},
}


@pytest.mark.parametrize("residency", STAYS)
@pytest.mark.parametrize("kind", ["sana-1.0", "sprint"])
def test_what_is_in_memory_when(published, opened, monkeypatch, kind, residency):
    """By the arrays themselves: what is said to be freed is held by nobody else either."""
    pipe = open_again(opened, kind, published(kind), residency=residency)
    weights = {"T": pipe.text_encoder.weights, "D": pipe.transformer_weights, "A": pipe.autoencoder.weights}
    references: dict[str, list] = {}
    found: dict[str, str] = {}

    def look(stage: str) -> None:
        for name, resident in weights.items():
            if resident.loaded and name not in references:
                references[name] = leaves(resident.params)
        found[stage] = "".join(name for name in weights if alive(references.get(name, [])))

    def at(stage, function):
        def run(*arguments, **options):
            result = function(*arguments, **options)
            look(stage)
            return result

        return run

    monkeypatch.setattr(type(pipe.text_encoder), "encode", at("text", type(pipe.text_encoder).encode))
    monkeypatch.setattr(pipe, "_run", at("denoise", pipe._run))
    monkeypatch.setattr(pipe.autoencoder, "decode", at("decode", pipe.autoencoder.decode))
    first = pipe(PROMPT, output_type="np", seed=3, **SIZE, **SHORT).images
    look("end")
    assert found == STAYS[residency]
    np.testing.assert_array_equal(first, opened(kind)(PROMPT, output_type="np", seed=3, **SIZE, **SHORT).images)
    if residency != "all":
        again = pipe(PROMPT, output_type="np", seed=3, **SIZE, **SHORT).images
        np.testing.assert_array_equal(again, first)
        assert not weights["T"].loaded  # the prompt was not encoded again


def test_plan(published, opened):
    """Every line's sum is that of the sizes that the networks really have."""
    for kind, network in (("sana-1.0", "transformer"), ("controlnet", "controlnet")):
        pipe = open_again(opened, kind, published(kind), residency="one_at_a_time")
        sizes = {}
        for name, resident in pipe.networks.items():
            sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(resident.params))
            resident.free()
        text, transformer, autoencoder = (sizes[name] for name in ("text encoder", "transformer", "autoencoder"))
        denoise = f"denoise: transformer {readable_bytes(transformer)}"
        if kind == "controlnet":
            together = readable_bytes(transformer + sizes["controlnet"])
            denoise += f", controlnet {readable_bytes(sizes['controlnet'])}; together {together}"
        expected = [
            f"text: text encoder {readable_bytes(text)}",
            f"encode: autoencoder {readable_bytes(autoencoder)}",
            denoise,
            f"decode: autoencoder {readable_bytes(autoencoder)}",
        ]
        assert pipe.describe_plan(encodes_a_picture=True) == expected
        assert pipe.describe_plan() == [expected[0], *expected[2:]]
        assert network in " ".join(expected)
    pipe = open_again(opened, "sana-1.0", published("sana-1.0"))
    both = readable_bytes(transformer + autoencoder)
    assert pipe.describe_plan()[2].endswith(f"; together {both}")
    pipe.text_encoder.weights.params  # noqa: B018
    pipe.autoencoder.weights.params  # noqa: B018
    everything = readable_bytes(text + autoencoder)
    assert pipe.describe_plan()[0].endswith(f"; together {everything}")
    with pytest.raises(UserError, match=r"residency 'some' is not allowed; choose one of all, text_encoder_freed"):
        SanaPipeline.from_pretrained(published("sana-1.0"), residency="some")


def test_an_encoded_prompt_is_not_encoded_again(opened, monkeypatch):
    pipe, asked = opened("sana-1.0"), []
    encode = type(pipe.text_encoder).encode

    def count(self, prompts, *, negative=False):
        asked.append((tuple(prompts), negative))
        return encode(self, prompts, negative=negative)

    monkeypatch.setattr(type(pipe.text_encoder), "encode", count)
    monkeypatch.setattr(pipe, "_encodings", {})
    options = {**TEXT, "num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "latent", **SIZE}
    pipe(PROMPT, **options)
    assert asked == [((PROMPT,), False), (("",), True)]
    pipe(PROMPT, **options)
    pipe([PROMPT, "birds", "birds"], **options)
    assert asked[2:] == [(("birds",), False)]
    pipe(PROMPT, **{**options, "max_sequence_length": 9})  # another encoding
    assert len(asked) == 5


# -- writing and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sana-1.0", pytest.param("2k", marks=pytest.mark.prove), "sprint", "controlnet"])
def test_what_is_saved_is_read_back(opened, tmp_path, kind):
    pipe = opened(kind)
    pipe.save_pretrained(tmp_path / "model")
    again = open_again(opened, kind, tmp_path / "model")
    arguments = {**SHORT, **SIZE, "output_type": "np", "seed": 2}
    if kind == "controlnet":
        arguments["control_image"] = picture(HEIGHT, WIDTH)
    np.testing.assert_array_equal(again(PROMPT, **arguments).images, pipe(PROMPT, **arguments).images)
    assert again.contract == pipe.contract
    assert again.defaults == pipe.defaults
    assert again.sampler == pipe.sampler
    assert again.num_parameters == pipe.num_parameters
    with pytest.raises(UserError, match="exists already"):
        pipe.save_pretrained(tmp_path / "model")
    if kind == "controlnet":
        with pytest.raises(UserError, match=r"'SanaControlNetPipeline'.*use SanaControlNetPipeline"):
            SanaPipeline.from_pretrained(tmp_path / "model")


def test_a_controlnet_of_its_own(published, opened):
    """A plain model with the ControlNet of another directory, which may be the component or the model around it."""
    arguments = {**SHORT, **SIZE, "output_type": "latent", "control_image": picture(HEIGHT, WIDTH)}
    base, other = published("sana-1.0"), published("controlnet")
    found = [
        open_again(opened, "controlnet", base, controlnet=folder)(PROMPT, **arguments).images
        for folder in (other, other / "controlnet")
    ]
    np.testing.assert_array_equal(*found)
    assert relative_error(found[0], opened("controlnet")(PROMPT, **arguments).images) > 1e-3
    with pytest.raises(UserError, match=r"use SanaPipeline, or name the directory of a ControlNet as controlnet"):
        SanaControlNetPipeline.from_pretrained(base)
    with pytest.raises(UserError, match=r"has a ControlNet of its own, so controlnet .* would not be used"):
        SanaControlNetPipeline.from_pretrained(other, controlnet=other)
    with pytest.raises(UserError, match=r"SanaTransformer2DModel.*SanaControlNetModel"):
        SanaControlNetPipeline.from_pretrained(base, controlnet=base / "transformer")
    with pytest.raises(UserError, match="SanaSprintPipeline"):
        SanaControlNetPipeline.from_pretrained(published("sprint"), controlnet=other)


# -- sizes and other arguments -------------------------------------------------------------------------------------


def test_binning(opened, monkeypatch, capsys):
    pipe = opened("sana-1.0")
    monkeypatch.setitem(resolution.BINS, 32, (resolution.Bin(0.67, HEIGHT, WIDTH), resolution.Bin(1.5, WIDTH, HEIGHT)))
    result = pipe(PROMPT, height=40, width=70, output_type="np", **SHORT)
    assert (result.images.shape, result.sampled_size) == ((1, 40, 70, 3), (HEIGHT, WIDTH))
    said = "sampling 64x96 pixels, the trained size nearest in shape to 40x70"
    assert said in capsys.readouterr().out
    pipe(PROMPT, height=HEIGHT, width=WIDTH, output_type="np", binning="error", **SHORT)
    assert "sampling" not in capsys.readouterr().out
    for options, message in (
        ({"height": 40, "width": 70, "binning": "error"}, r"size 40x70 is not one .*the nearest is 64x96: choose that"),
        ({"height": 40, "width": 96, "binning": "off"}, r"height 40 .*multiple of 32 .*nearest is 32 or 64"),
        ({"height": 64, "width": 0, "binning": "off"}, r"width 0 .*nearest is 32"),
        ({"height": -1, "width": 70}, r"size -1x70 is not allowed"),
        ({"height": 1, "width": 10**6}, "more than 268435456 pixels"),
        ({"binning": "closest"}, r"binning 'closest' is not allowed; choose nearest, off or error"),
        ({"latents": noise(1, HEIGHT, WIDTH), "binning": "error", "height": 32}, r"size 32x96 is not one"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(PROMPT, **options, **SHORT)


def test_latents_have_the_size_that_is_sampled(opened):
    result = opened("sana-1.0")(PROMPT, latents=noise(1, HEIGHT, WIDTH), output_type="latent", **SHORT)
    assert result.images.shape == (1, 8, 2, 3)
    with pytest.raises(UserError, match=r"latents of shape \(2, 8, 2, 3\); 1 pictures of 64x96 need \(1, 8, 2, 3\)"):
        opened("sana-1.0")(PROMPT, latents=noise(2, HEIGHT, WIDTH), **SHORT)


@pytest.mark.parametrize("kind", ["sana-1.0", "sprint", "controlnet"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": -1}, r"num_inference_steps=-1 must be at least 1"),
        ({"num_inference_steps": 1.5}, r"num_inference_steps=1\.5 is not a whole number"),
        ({"seed": 2**32}, r"seed 4294967296 is not allowed"),
        ({"num_images_per_prompt": 0}, r"num_images_per_prompt 0"),
        ({"output_type": "pt"}, r"output_type 'pt'"),
        ({"prompt": "  "}, r"prompt '  ' is empty"),
        ({"prompt": []}, r"prompt is an empty list"),
        ({"prompt": None}, r"neither given"),
        ({"max_sequence_length": 1}, r"max_sequence_length 1 is not allowed"),
        ({"complex_human_instruction": "one text"}, r"a list of lines"),
    ],
)
def test_arguments_that_are_refused(opened, kind, options, message):
    given = {"prompt": PROMPT, **SIZE, **TEXT, **options}
    if kind == "controlnet":
        given["control_image"] = picture(HEIGHT, WIDTH)
    with pytest.raises(UserError, match=message):
        opened(kind)(**given)


def test_prompts_and_negative_prompts_in_pairs(opened):
    options = {**TEXT, **SIZE, "num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
    with pytest.raises(UserError, match=r"2 negative prompts for 3 prompts; allowed is one for all or one each"):
        opened("sana-1.0")(["a", "red", "panda"], negative_prompt=["blurry", "a"], **options)
    with pytest.raises(UserError, match="negative_prompt would not be used with guidance_scale 1"):
        opened("sana-1.0")("a", negative_prompt="blurry", **{**options, "guidance_scale": 1.0})


# -- directories that are refused ----------------------------------------------------------------------------------


@pytest.fixture
def copy(published, tmp_path):
    """kind -> a copy of its directory that may be changed."""

    def get(kind: str):
        return shutil.copytree(published(kind), tmp_path / "copy")

    return get


def change_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(directory, kind=SanaPipeline, error=UserError, **options) -> str:
    with pytest.raises(error) as caught:
        kind.from_pretrained(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "family"),
    [("SanaVideoPipeline", "SANA-Video"), ("LongSanaVideoPipeline", "LongSANA"), ("SanaWMPipeline", "SANA-WM")],
)
def test_models_of_another_family(copy, name, family):
    directory = copy("sana-1.0")
    change_json(directory / "model_index.json", _class_name=name)
    message = refusal(directory)
    assert f"looks like {family}: it has _class_name {name!r}" in message
    assert "choose an image model" in message


def test_a_video_transformer(copy):
    directory = copy("sana-1.0")
    change_json(directory / "transformer" / "config.json", _class_name="SanaVideoTransformer3DModel")
    assert "looks like SANA-Video; allowed is SanaTransformer2DModel" in refusal(directory)


def test_flow_models_and_consistency_models(published, copy):
    assert "use SanaSprintPipeline" in refusal(published("sprint"))
    assert "use SanaPipeline" in refusal(published("sana-1.0"), SanaSprintPipeline)
    assert "use SanaControlNetPipeline" in refusal(published("controlnet"))
    # an index that says otherwise than the networks
    directory = copy("sprint")
    change_json(directory / "model_index.json", _class_name="SanaPipeline")
    assert "consistency model (SANA-Sprint)" in refusal(directory)


@pytest.mark.parametrize(
    ("name", "error", "parts"),
    [
        ("model_index.json", FileNotFoundError, ("model_index.json is missing",)),
        ("scheduler/scheduler_config.json", FileNotFoundError, ("scheduler_config.json is missing",)),
        ("tokenizer/tokenizer.json", FileNotFoundError, ("tokenizer.json is missing", "download or copy")),
        ("transformer/config.json", FileNotFoundError, ("transformer/config.json is missing",)),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            CheckpointError,
            ("has no weights", "transformer/*.safetensors (published)"),
        ),
        ("text_encoder/model.safetensors", FileNotFoundError, ("text_encoder has no model.safetensors",)),
        ("vae/diffusion_pytorch_model.safetensors", FileNotFoundError, ("vae has no diffusion_pytorch_model",)),
    ],
)
def test_missing_and_damaged_files(copy, name, error, parts):
    directory = copy("sana-1.0")
    (directory / name).unlink()
    message = refusal(directory, error=error)
    for part in parts:
        assert part in message
    (directory / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert (directory / name).name in refusal(directory, error=(UserError, CheckpointError))


def halve(component) -> None:
    """Writes a component's float16 variant beside its plain file."""
    name = component / "diffusion_pytorch_model"
    tensors = safetensors.numpy.load_file(f"{name}.safetensors")
    halves = {key: value.astype(np.float16) for key, value in tensors.items()}
    safetensors.numpy.save_file(halves, f"{name}.fp16.safetensors", {"format": "pt"})


def test_a_variant_that_some_components_have(copy, published, capsys):
    """The others are read from their plain files, each said once, as ``convert`` and diffusers do; a typo is not."""
    directory = copy("sana-1.0")
    halve(directory / "transformer")
    other = published("controlnet") / "controlnet"
    capsys.readouterr()
    pipeline = SanaControlNetPipeline.from_pretrained(directory, controlnet=other, variant="fp16", dtype="float32")
    assert [line for line in capsys.readouterr().out.splitlines() if "variant" in line] == [
        "text_encoder: no variant fp16, so model.safetensors is read",
        "vae: no variant fp16, so diffusion_pytorch_model.safetensors is read",
        "controlnet: no variant fp16, so diffusion_pytorch_model.safetensors is read",
    ]
    plain = jax.tree.leaves(SanaPipeline.from_pretrained(directory, dtype="float32").params)
    halves = jax.tree.leaves(pipeline.params)
    assert all(np.array_equal(a.astype(np.float16), b.astype(np.float16)) for a, b in zip(plain, halves))
    assert not all(np.array_equal(a, b) for a, b in zip(plain, halves))
    message = refusal(directory, error=FileNotFoundError, variant="fp61")
    assert "'fp61'; variants that are there: text_encoder: plain; transformer: plain, fp16; vae: plain" in message


def test_weights_in_a_format_that_is_not_read(copy):
    directory = copy("sana-1.0")
    for folder in ("transformer", "vae"):
        path = directory / folder / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_suffix(".bin"))
        message = refusal(directory, error=FileNotFoundError)
        assert f"{folder} has no {path.name}; its weights are in diffusion_pytorch_model.bin" in message
        path.with_suffix(".bin").rename(path)


def test_variants_and_dtypes(published):
    assert "variant" in refusal(published("sana-1.0"), error=(UserError, FileNotFoundError), variant="fp16")
    assert "'float16' is not allowed; choose float32 or bfloat16" in refusal(published("sana-1.0"), dtype="float16")
    message = refusal(published("sana-1.0"), weights="ema")
    assert "is not a training run" in message


def test_a_hub_name_without_network(tmp_path):
    """One line, soon; a process of its own, for the library reads its settings when it is imported."""
    code = (
        "from sana_jax import SanaPipeline\n"
        "try: SanaPipeline.from_pretrained('Efficient-Large-Model/Sana_600M_512px_diffusers')\n"
        "except FileNotFoundError as error: print('CAUGHT', error)\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    # nor what an earlier test has asked of the library
    environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
    environment.pop("HF_HUB_OFFLINE", None)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert time.perf_counter() - begin < 60
    said, caught = done.stdout.splitlines()
    assert said == "Efficient-Large-Model/Sana_600M_512px_diffusers: no such directory here, looking for it on the Hub"
    for part in ("CAUGHT", "neither a directory here nor to be had from the Hub", "ConnectError", "download it where"):
        assert part in caught


# -- weights that were trained with float16's saturation -----------------------------------------------------------


def test_the_original_float16_weights(copy, tmp_path, opened, capsys):
    """Refused with the reason; with the option they are read, and what overflows is clipped."""
    directory = tmp_path / "Sana_1600M_1024px_diffusers"
    copy("sana-1.0").rename(directory)
    file = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: value.astype(np.float16) for name, value in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(tensors, file)
    for dtype in (None, "float32", "bfloat16"):
        message = refusal(directory, dtype=dtype)
        for part in ("trained in float16", "±65504", "emulate_fp16_saturation", "diffusers#10336", "_BF16_"):
            assert part in message
    pipe = SanaPipeline.from_pretrained(directory, emulate_fp16_saturation=True)
    assert pipe.transformer.fp16_saturation
    assert pipe.contract.source == "Sana_1600M_1024px"

    plain = dataclasses.replace(pipe.transformer, fp16_saturation=False)
    latents, caption, time_ = jnp.ones((1, 2, 3, 8)), jnp.ones((1, 4, 24)), jnp.ones(1)
    quick = {"xla_backend_optimization_level": 0}
    both = [jax.jit(model.apply, compiler_options=quick) for model in (pipe.transformer, plain)]
    params = pipe.params
    np.testing.assert_array_equal(*(run({"params": params}, latents, caption, time_) for run in both))
    for name in ("to_v", "to_out"):  # sums of some 10^8
        params["transformer_blocks"]["attn1"][name]["kernel"] *= 1e4
    clipped, unclipped = (run({"params": params}, latents, caption, time_) for run in both)
    assert np.isfinite(clipped).all()
    assert np.isfinite(unclipped).all()
    assert relative_error(clipped, unclipped) > 1e-3

    # the option is for weights that have use for it
    other = tmp_path / "Sana_1600M_1024px_BF16_diffusers"
    directory.rename(other)
    assert "leave the option out" in refusal(other, emulate_fp16_saturation=True)


# -- best of several -----------------------------------------------------------------------------------------------


def test_best_of(opened):
    pipe = opened("sprint")
    options = {**SHORT, **SIZE, "output_type": "np"}
    brightness = lambda image, prompt: float(image.mean()) if prompt == PROMPT else None  # noqa: E731
    found = best_of(pipe, PROMPT, brightness, 4, keep=2, seed=5, **options)
    expected = [pipe(PROMPT, seed=5 + i, **options).images[0] for i in range(4)]
    scores = [float(image.mean()) for image in expected]
    assert found.all_scores == scores
    assert found.scores == sorted(scores, reverse=True)[:2]
    for image, score, seed in zip(found.images, found.scores, found.seeds):
        np.testing.assert_array_equal(image, expected[seed - 5])
        assert score == scores[seed - 5]


def test_best_of_ties_and_mistakes(opened):
    pipe = opened("sprint")
    options = {**SHORT, **SIZE, "output_type": "latent"}
    assert best_of(pipe, PROMPT, lambda *_: 1, 3, keep=2, seed=7, **options).seeds == [7, 8]
    assert best_of(pipe, PROMPT, lambda *_: -float("inf"), 1, **options).scores == [-float("inf")]
    for arguments, message in (
        ((PROMPT, lambda *_: float("nan"), 2), "score_fn gave nan for candidate 0"),
        ((PROMPT, lambda *_: None, 2), "score_fn gave None for candidate 0"),
        ((PROMPT, lambda *_: "good", 2), "score_fn gave 'good' for candidate 0"),
        ((PROMPT, lambda *_: 1, 0), "num_candidates 0"),
        (([PROMPT], lambda *_: 1, 2), "best_of takes one prompt, not list"),
    ):
        with pytest.raises(UserError, match=message):
            best_of(pipe, *arguments, **options)
    for changes, message in (
        ({"keep": 3}, "keep 3"),
        ({"keep": 0}, "keep 0"),
        ({"seed": 2**32 - 1}, r"seed 4294967295 with 2 candidates.*from 0 to 4294967294"),
        ({"latents": noise(1, HEIGHT, WIDTH)}, "would draw one candidate again"),
        ({"num_images_per_prompt": 2}, "would draw one candidate again"),
    ):
        with pytest.raises(UserError, match=message):
            best_of(pipe, PROMPT, lambda *_: 1, 2, **options, **changes)


def test_parameters_that_were_handed_over_stay(opened):
    """Freeing only lets go of what can be read again."""
    resident = Resident.of("own", {"a": jnp.ones(2)})
    assert resident.params["a"].shape == (2,)
    resident.free()
    assert resident.params["a"].shape == (2,)
