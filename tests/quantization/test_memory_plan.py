"""Memory budgets: what is chosen from shapes alone, what is refused, and the check afterwards."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.autoencoders.tiling import Tiles
from sana_jax.compilation import Program, readable_bytes
from sana_jax.diffusion.samplers import LongSanaSampler
from sana_jax.errors import UserError
from sana_jax.generate import GenerateConfig
from sana_jax.generate_memory import memory_budget
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer, state_bytes
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from sana_jax.pipelines.denoising import fitting_program
from sana_jax.pipelines.memory_plan import USABLE, MemoryBudget, Work, choose_plan, parse_memory, work_of
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.pipelines.text_to_image import SanaPipeline
from sana_jax.quantization.tables import block_errors, network_bytes
from sana_jax.quantization.trees import quantizable_layers, quantized_abstract
from sana_jax.weights.components import Resident
from sana_jax.weights.trees import tree_bytes
from tests.pipelines.tiny_model import random_params, tiny_config, write_run

GB = 10**9
# bytes of a text encoder, a transformer and an autoencoder without dense layers
WORK = Work(text=GB, layer=0, sample=2 * GB, sums=GB, samples=2, decode=6 * GB, tile=GB)


def _network(parameters: float, key: str = "kernel") -> Resident:
    """Weights of one dense layer in bfloat16; nothing of that size is made."""
    abstract = {"layer": {key: jax.ShapeDtypeStruct((10000, int(parameters) // 10000), jnp.bfloat16)}}
    return Resident("network", tree_bytes(abstract), lambda: abstract, abstract)


def _networks(text: float, transformer: float) -> dict[str, Resident]:
    sizes = {"text_encoder": _network(text), "transformer": _network(transformer)}
    return {**sizes, "autoencoder": _network(0.5 * GB, "conv")}


def _plan(budget: str, text: float = 2.5 * GB, transformer: float = 1.5 * GB):
    return choose_plan(parse_memory(budget), _networks(text, transformer), "text_encoder_freed", WORK)


def test_plans_change_as_little_as_the_budget_allows():
    # The largest stage each: all weights and the decoding of a later call; what is at work and guidance in one batch.
    plan = _plan("24g")
    assert (plan.residency, plan.tiling, plan.guidance_batching) == ("text_encoder_freed", None, "auto")
    assert dict(plan.quantization) == {}
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["text"].weights == 9 * GB
    assert stages["decode"].total == (3 + 1 + 6) * GB
    assert stages["denoise"].total == (3 + 1 + 2 * 2) * GB
    alone = _plan("9g")
    assert alone.residency == "one_at_a_time"
    assert alone.tiling is None
    assert {stage.name: stage.total for stage in alone.stages} == {"text": 6 * GB, "denoise": 7 * GB, "decode": 7 * GB}
    assert _plan("7.6g", transformer=GB).tiling is True
    split = _plan("7g")
    assert split.guidance_batching == "split"
    assert not split.quantization
    # Only the network that does not fit is quantised, in the better format where that is enough.
    assert {name: one.format for name, one in _plan("6g").quantization.items()} == {"text_encoder": "int8"}
    assert {name: one.format for name, one in _plan("16g", transformer=10 * GB).quantization.items()} == {
        "transformer": "int8"
    }
    assert {name: one.format for name, one in _plan("12g", transformer=10 * GB).quantization.items()} == {
        "transformer": "nvfp4"
    }
    for plan in (_plan("24g"), alone, split):
        assert plan.fits
        assert plan.peak <= USABLE * plan.budget


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can():
    with pytest.raises(UserError, match=r"memory 3g is not enough.*the least that is enough is ([\d.]+)g") as caught:
        _plan("3g", transformer=10 * GB)
    least = float(str(caught.value).rsplit(" ", 1)[1].removesuffix("g"))
    assert _plan(f"{least:g}g", transformer=10 * GB).fits
    with pytest.raises(UserError, match="is not enough"):
        _plan(f"{least - 0.1:g}g", transformer=10 * GB)


GROWING = WORK._replace(grows=True, state=GB, tiled_state=2 * GB, network_state=GB // 4, samples=1)


@pytest.mark.parametrize(
    ("budget", "tiling", "formats"),
    [
        ("12.3g", None, {}),
        ("11.6g", True, {}),
        ("10g", True, {"text_encoder": "int8"}),
        ("8.6g", True, {"text_encoder": "int8", "transformer": "int8"}),
        ("8.2g", True, {"text_encoder": "int8", "transformer": "nvfp4"}),
    ],
)
def test_a_video_that_grows_keeps_what_every_block_needs(budget, tiling, formats):
    """Text encoder 5 GB, transformer 3, autoencoder 1; whole decoding takes 6 GB and tiles 1 beside their states."""
    plan = choose_plan(parse_memory(budget), _networks(2.5 * GB, 1.5 * GB), "text_encoder_freed", GROWING)
    assert (plan.residency, plan.tiling, plan.guidance_batching) == ("text_encoder_freed", tiling, "auto")
    assert {name: one.format for name, one in plan.quantization.items()} == formats
    assert plan.fits
    if not formats:
        held = 2.25 * GB if tiling else 1.25 * GB
        assert {one.name: one.total for one in plan.stages} == {
            "text": 10 * GB, "denoise": 6 * GB + held, "decode": (5 if tiling else 10) * GB + held
        }  # fmt: skip
        # neither the autoencoder's weights nor its state are the sampling program's
        assert plan.budget - plan.for_sampling == GB + held - GB // 4


def test_a_video_that_grows_and_no_budget_that_is_enough():
    networks = _networks(2.5 * GB, 1.5 * GB)
    with pytest.raises(UserError, match="with the text encoder freed, quantised and in tiles") as caught:
        choose_plan(parse_memory("5g"), networks, "text_encoder_freed", GROWING)
    least = str(caught.value).rsplit(" ", 1)[1]
    assert choose_plan(parse_memory(least), networks, "text_encoder_freed", GROWING).fits


def test_the_work_of_a_video_that_grows():
    """Its first block at its longest, whatever the video's length; states of the decoder, its tiles and the network."""
    config = SanaVideoConfig(num_layers=2, sample_size=8)
    model = _model("AutoencoderKLWan", SamplingDefaults(height=480, width=832), SanaVideoTransformer(config))
    model.sampler = LongSanaSampler(block_frames=10)
    model.autoencoder.tiles = Tiles((256, 256), (192, 192))
    work, words = work_of(model, MemoryBudget("1g", guidance_scale=1.0, frames=961))
    assert words.startswith("blocks of up to 73 frames of 480x832 pixels with ")
    assert work.state == pytest.approx(3.8e9, rel=0.01)
    assert work.state + work.decode == pytest.approx(9e9, rel=0.01)
    assert work.tiled_state == 9500 * (256 + 256 + 96) * (4 * 256 + 64)
    assert work.tile == pytest.approx(0.9e9, rel=0.03)
    assert work.network_state == state_bytes(config, (30, 52)).total
    # a call's own window in place of the model's, which is all
    window, words = work_of(model, MemoryBudget("1g", guidance_scale=1.0, num_cached_blocks=50))
    assert window.network_state == state_bytes(config, (30, 52), num_cached_blocks=50).total > 2 * work.network_state
    assert window == work._replace(network_state=window.network_state)
    assert words.endswith(f"with {readable_bytes(window.state + window.network_state)} kept from block to block")
    assert work_of(model, MemoryBudget("1g", guidance_scale=1.0, num_cached_blocks=0))[0] == work


@pytest.mark.parametrize("text", ["24", "lots", "-3g", "0g", "12m"])
def test_a_budget_in_another_form_is_refused(text):
    with pytest.raises(UserError, match="allowed are 24g, 16g, 12g"):
        parse_memory(text)
    assert parse_memory("12g") == parse_memory("12 GB") == 12 * GB


class _Device:
    def __init__(self, used):
        self.used = used

    def memory_stats(self):
        return None if self.used is None else {"peak_bytes_in_use": self.used}


def test_the_check_says_when_the_budget_was_exceeded():
    plan = _plan("24g")  # denoise 8 GB, the largest stage 10 GB
    assert plan.check(device=_Device(8 * GB)).startswith("memory check: kept: the device reports 8.00 GB")
    assert "more than planned, within the budget" in plan.check(device=_Device(20 * GB))
    assert "EXCEEDED the budget of 24.00 GB: the device reports 25.00 GB" in plan.check(device=_Device(25 * GB))
    assert "kept: the compiler reports for sampling 7.00 GB" in plan.check(7 * GB, _Device(None))
    assert "more than planned" in plan.check(9 * GB, _Device(None))
    assert "neither the device nor the compiler" in plan.check(None, _Device(None))


def _model(name: str, defaults: SamplingDefaults, transformer=None):
    autoencoder = types.SimpleNamespace(
        spatial_factor=8, temporal_factor=4, dtype="float32", to_config=lambda: {"_class_name": name}
    )
    transformer = SanaTransformer(SanaConfig(num_layers=1, sample_size=8)) if transformer is None else transformer
    text_encoder = types.SimpleNamespace(config=types.SimpleNamespace(intermediate_size=1000))
    return types.SimpleNamespace(
        transformer=transformer, autoencoder=autoencoder, defaults=defaults, text_encoder=text_encoder
    )


def test_the_work_is_that_of_the_request():
    picture = _model("AutoencoderDC", SamplingDefaults(height=64, width=64))
    one, words = work_of(picture, MemoryBudget("1g"))
    assert words == "1 x 64x64 pixels at once"
    assert one.samples == 2
    many, words = work_of(picture, MemoryBudget("1g", prompts=2, samples=6, height=128, guidance_scale=1.0))
    assert words == "6 x 128x64 pixels at once"
    assert (many.sample, many.sums) == (12 * one.sample, 12 * one.sums)
    assert (many.text, many.layer, many.samples) == (2 * one.text, one.layer, 1)
    assert (many.decode, many.tile) == (12 * one.decode, 12 * one.tile)
    # from 2048x2048 pixels on, pictures are decoded one after another
    apart, _ = work_of(picture, MemoryBudget("1g", samples=1025))
    assert apart.decode == one.decode
    assert work_of(picture, MemoryBudget("1g", perturbed=True))[0].samples == 3
    batched, _ = work_of(picture, MemoryBudget("1g", perturbed=True, batched=True))
    assert (batched.sample, batched.sums, batched.samples) == (3 * one.sample, 3 * one.sums, 1)
    with pytest.raises(UserError, match="binning"):
        work_of(picture, MemoryBudget("1g", binning="nearest"))


def test_the_work_of_videos_counts_their_frames():
    network = SanaVideoTransformer(SanaVideoConfig(num_layers=1, sample_size=8))
    video = _model("AutoencoderKLLTX2Video", SamplingDefaults(height=64, width=64, frames=17, fps=16.0), network)
    one, words = work_of(video, MemoryBudget("1g"))
    assert words == "1 x 17 frames of 64x64 pixels at once"
    for asked in (MemoryBudget("1g", samples=2, frames=33), MemoryBudget("1g", samples=2, seconds=2.0)):
        more, words = work_of(video, asked)
        assert words == "2 x 33 frames of 64x64 pixels at once"
        assert more.sample == 2 * one.sample * 9 // 5  # 1 + 32/4 latent frames in place of 1 + 16/4
        assert more.decode * 17 == one.decode * 33
    world = _model("", video.defaults, SanaWMTransformer(SanaWMConfig(num_layers=1)))
    assert work_of(world, MemoryBudget("1g", frames=9))[1] == "1 x 9 frames of 64x64 pixels at once"


def test_the_command_line_plans_for_what_it_asks_for(tmp_path):
    def asked(*prompts, name="SanaPipeline", **options):
        output = "a.png" if name == "SanaPipeline" else "a.mp4"
        return memory_budget(GenerateConfig("runs/d", prompts, output, memory="1g", **options), name)

    assert memory_budget(GenerateConfig("runs/d", ("a",), "a.png"), "SanaPipeline") is None
    wanted = MemoryBudget("1g", 2, 600, 64, 32, "off", guidance_scale=1.0, perturbed=True)
    options = {"height": 64, "width": 32, "binning": "off", "guidance_scale": 1.0, "pag_scale": 2.0}
    assert asked("a", "b", num_images=300, **options) == wanted
    assert asked("a", name="SanaVideoPipeline", frames=33) == MemoryBudget("1g", frames=33)
    for option in ({"guidance_batching": "batched"}, {"step_cache": 0.1}):  # neither can be split
        assert asked("a", **option) == MemoryBudget("1g", batched=True)
    assert asked("a", guidance_batching="split") == MemoryBudget("1g")
    assert asked("a", name="SanaWMPipeline", action="w-8,jw-8", image="a.png") == MemoryBudget("1g", frames=17)
    assert asked("a", "b", name="LongSanaVideoPipeline", frames=321) == MemoryBudget("1g")
    window = MemoryBudget("1g", num_cached_blocks=50)
    assert asked("a", name="LongSanaVideoPipeline", num_cached_blocks=50) == window
    # as many frames as the camera has poses, of which --frames takes the first
    camera = {"name": "SanaWMPipeline", "image": "a.png", "c2w": str(tmp_path / "poses.npy")}
    for poses, frames in ((np.tile(np.eye(4), (961, 1, 1)), 961), (np.float32(3), 1)):
        np.save(camera["c2w"], poses)
        assert asked("a", **camera) == MemoryBudget("1g", frames=frames)
        assert asked("a", **camera, frames=9) == MemoryBudget("1g", frames=9)


def test_plans_name_the_formats_that_networks_have_already():
    networks = _networks(2.5 * GB, 1.5 * GB)
    layers = quantizable_layers(networks["transformer"].abstract, ())
    abstract = quantized_abstract(networks["transformer"].abstract, dict.fromkeys(layers, "int8"))
    networks["transformer"] = Resident("network", tree_bytes(abstract), lambda: abstract, abstract)
    plan = choose_plan(24 * GB, networks, "text_encoder_freed", WORK, "3 x 8x8 pixels at once")
    assert plan.lines()[0].startswith("memory plan for 24.00 GB, 22.08 GB of it usable; 3 x 8x8 pixels at once")
    assert "quantization transformer=int8 (as asked for or stored)," in plan.lines()[0]
    # the sums of 8-bit products are counted, as where the plan itself chooses the format
    assert next(stage.work for stage in plan.stages if stage.name == "denoise") == 2 * (WORK.sample + WORK.sums)


def test_a_program_is_refused_before_it_runs_where_the_budget_is_not_enough():
    plan = _plan("24g")  # while sampling, the autoencoder's 1 GB stays
    assert plan.for_sampling == 23 * GB
    plan.check_program(23 * GB, 20 * GB, 4)
    plan.check_program(None, None, 4)
    with pytest.raises(
        UserError, match=r"sampling 4 at once holds 26.00 GB, beside 1.00 GB.*to 27g, or sample about 3"
    ):
        plan.check_program(26 * GB, 20 * GB, 4)
    with pytest.raises(UserError, match="smaller size"):
        plan.check_program(26 * GB, 20 * GB, 1)


def test_a_call_that_needs_more_than_planned_is_refused_before_sampling(tmp_path, monkeypatch):
    config = tiny_config()
    write_run(tmp_path / "run", random_params(config, 1), None, config)
    pipe = SanaPipeline.from_pretrained(tmp_path / "run", memory="0.01g")
    options = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np"}
    pipe("seven", **options)
    monkeypatch.setattr(pipe, "_run", lambda *_, **__: pytest.fail("it was sampled"))
    with pytest.raises(UserError, match=r"sampling 2000 at once holds .* nothing was sampled") as caught:
        pipe("seven", num_images_per_prompt=2000, **options)
    assert "\n" not in str(caught.value)
    asked = MemoryBudget("0.01g", samples=20000, height=8, width=8)
    with pytest.raises(UserError, match="is not enough for 20000 x 8x8 pixels at once"):
        SanaPipeline.from_pretrained(tmp_path / "run", memory=asked)


@pytest.mark.parametrize(("budget", "splits"), [(9, True), (10, False), (None, False)])
def test_guidance_is_split_where_the_budget_is_not_enough_for_one_batch(budget, splits):
    def compiled(split):
        return Program(None, 0.0, 6 if split else 10, 5), split

    assert fitting_program("auto", True, compiled, {}, budget=budget, say=lambda _: None)[1] is splits


def test_tables():
    networks = {row.network: row for row in network_bytes()}
    assert networks["SANA 1.6B"].parameters == 1_604_462_752
    for row in networks.values():
        # bits per quantised value: 8 and a column's scale, 4 and a block's of 16 bits per 32 or 8 bits per 16
        rest = row.bytes["bfloat16"] * (1 - row.quantised_share)
        count = row.bytes["bfloat16"] * row.quantised_share / 2
        for format_name, bits in (("int8", 8), ("fp8", 8), ("int4", 4.5), ("nvfp4", 4.5)):
            assert row.bytes[format_name] == pytest.approx(rest + count * bits / 8, rel=0.005)
    errors = {row.format: row.relative_error for row in block_errors(full_width=False)}
    assert errors["int8"] < errors["fp8"] < errors["nvfp4"] < errors["int4"] < 0.2
