from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

from configs import PRESETS, load_preset
from configs.published import (
    PUBLISHED_TRANSFORMERS,
    PUBLISHED_VIDEO_TRANSFORMERS,
    PUBLISHED_WORLD_TRANSFORMERS,
)
from sana_jax import UserError
from sana_jax.command_line import parse
from tests.train.presets import abstract_mesh, needs_model, preset_run
from train import main as trainer
from train.evaluation.comparison_plan import CompareConfig
from train.state import parameter_count

ROOT = Path(__file__).parents[2]
FROM_SCRATCH = {
    "sana_600m_512": "Sana_600M_512px_diffusers",
    "sana_1600m_512": "Sana_1600M_512px_diffusers",
    "sana_1600m_1024": "Sana_1600M_1024px_diffusers",
    "sana_1600m_2k": "Sana_1600M_2Kpx_BF16_diffusers",
    "sana_1600m_4k": "Sana_1600M_4Kpx_BF16_diffusers",
    "sana15_1600m_1024": "SANA1.5_1.6B_1024px_diffusers",
    "sana15_4800m_1024": "SANA1.5_4.8B_1024px_diffusers",
    "sana_video_2b_480p": "SANA-Video_2B_480p_diffusers",
    "sana_video_2b_720p": "SANA-Video_2B_720p_diffusers",
    "sana_wm_2b_bidirectional": "SANA-WM_bidirectional",
}
PUBLISHED = {**PUBLISHED_TRANSFORMERS, **PUBLISHED_VIDEO_TRANSFORMERS, **PUBLISHED_WORLD_TRANSFORMERS}


# Their clips are of the size of trajectories, which are still to be made: tests/train/test_main_longsana.py and
# test_main_world_distill.py run them.
OF_TRAJECTORIES = ("moving_digits_ode", "moving_camera_ode")


# Their steps are those of sana_wm_2b_chunk_causal but for its levels, or of sana_wm_self_forcing or longsana but for
# sizes, and take as long to trace.
AT_LENGTH = (
    *("finetune_world", "sana_wm_2b_bidirectional", "longsana_self_forcing"),
    *("sana_wm_self_forcing_t121", "moving_camera_self_forcing"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.prove] if name in AT_LENGTH else [])
        for name in PRESETS
        if name not in OF_TRAJECTORIES
    ],
)
def test_the_step_of_every_preset_has_shapes(name):
    run = preset_run(name, abstract_mesh())
    arguments = run.state.abstract, run.frozen, run.batch
    for step in run.jitted_steps():
        state, metrics = jax.eval_shape(step, *arguments)
        same = jax.tree.map(lambda new, old: (new.shape, new.dtype) == (old.shape, old.dtype), state, arguments[0])
        assert jax.tree.all(same)
        assert metrics.loss.shape == ()


@pytest.mark.parametrize(("name", "published"), FROM_SCRATCH.items())
def test_networks_from_scratch_are_the_published_ones(name, published):
    config, published = load_preset(name), PUBLISHED[published]
    revision = {"revision": "current"} if name.startswith("sana_wm") else {}  # as the original trainer computes now
    assert config.transformer == dataclasses.replace(published.config, **revision)
    assert config.flow.sampling_shift == published.flow_shift
    assert not needs_model(config)
    run = preset_run(name, abstract_mesh(fsdp=8))
    assert parameter_count(run.state.abstract.params) == published.parameters


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_file_says_how_it_is_started(name):
    load_preset(name)
    text = inspect.getdoc(sys.modules[PRESETS[name]])
    assert f"train.main {name}" in text or name == "digits"
    assert len(text.splitlines()) >= 4


def test_a_24_gb_gpu_is_enough_for_a_lora():
    from train.plan import estimated_memory

    assert estimated_memory(preset_run("lora_24gb", abstract_mesh())).total < 12e9


def test_training_from_scratch_asks_for_encoders(tmp_path):
    (tmp_path / "pictures").mkdir()
    words = ["sana_600m_512", "--mesh.data=1", "--batch-size=1", f"--run-dir={tmp_path / 'run'}", "--device=cpu"]
    with pytest.raises(UserError, match=r"prepares its pictures with a model's .* with --encoders DIRECTORY"):
        trainer.main([*words, f"--data.path={tmp_path / 'pictures'}"])


@pytest.mark.parametrize("words", [["finetune", "--model", "a", "--encoders", "b"], ["digits", "--encoders", "b"]])
def test_encoders_that_would_not_be_used_are_refused(words):
    with pytest.raises(UserError, match="--encoders b is not allowed"):
        trainer.read_command_line(words)


def test_the_cartoon_lora_has_twelve_million_parameters():
    run = preset_run("tom_and_jerry_lora", abstract_mesh())
    attention, others = 20 * 8 * 16 * 2 * 2240, 543_744  # the others: embeddings and projections
    assert parameter_count(run.state.abstract.params) == attention + others == 12_012_544
    assert run.batch.latents.shape == (8, 21, 28, 28, 16)
    config = run.config
    assert (config.lora.scale, config.lora.dropout, config.optimizer.learning_rate) == (2.0, 0.1, 2e-4)
    due = {step for step in range(config.steps + 1) if step % config.preview.every == 0 or step in config.preview.at}
    assert due == {0, 100, 1000, 2000, 5000, 7500, 10000}


@pytest.mark.parametrize("name", PRESETS)
def test_files_that_a_preset_names_are_there(name):
    text = inspect.getdoc(sys.modules[load_preset(name) and PRESETS[name]])
    for path in re.findall(r"configs/presets/\S+\.txt", text):
        assert len((ROOT / path).read_text().splitlines()) >= 2, path


def test_the_cartoon_lora_has_five_prompts():
    text = inspect.getdoc(sys.modules[PRESETS["tom_and_jerry_lora"]])
    file = ROOT / "configs" / "presets" / "tom_and_jerry_prompts.txt"
    command = " ".join(re.search(r"train\.compare (.*)", text, re.DOTALL)[1].replace("\\", " ").split())
    config = parse(CompareConfig, shlex.split(f"--models {command}"), prog="compare")
    assert (config.prompts_file, config.seeds) == (str(file.relative_to(ROOT)), (32420,))
    prompts = file.read_text().splitlines()
    caption = load_preset("tom_and_jerry_lora").data.caption
    assert len(set(prompts)) == 5
    assert prompts[0] == caption
    assert all(prompt.startswith(caption) for prompt in prompts)


@pytest.mark.parametrize("name", ["longsana_self_forcing", "longsana"])
def test_all_networks_are_told_the_published_motion_score(name):
    data = load_preset(name).data
    assert (data.motion_score, data.real_motion_score, data.negative_prompt) == (10, None, "")


def test_a_negative_prompt_that_nothing_reads():
    preset = load_preset("longsana")
    data = dataclasses.replace(preset.data, negative_prompt="jump cuts")
    without = dataclasses.replace(preset.self_forcing, guidance=0.0)
    with pytest.raises(UserError, match=r"--data.negative-prompt 'jump cuts' .* none with --self-forcing.guidance 0"):
        dataclasses.replace(preset, data=data, self_forcing=without)
    dataclasses.replace(preset, data=data)


def test_batches_of_pictures_are_multiples_of_those_of_clips():
    preset = load_preset("sana_video_2b_480p")
    joint = {"joint_interval": 4, "joint_pictures": "pictures"}
    dataclasses.replace(preset, data=dataclasses.replace(preset.data, **joint, joint_batch_size=256))
    with pytest.raises(UserError, match=r"--data.joint-batch-size 100 .* a multiple of --batch-size 64, as 256"):
        dataclasses.replace(preset, data=dataclasses.replace(preset.data, **joint, joint_batch_size=100))
    with pytest.raises(UserError, match=r"--data.joint-batch-size 64 .* none without --data.joint-pictures"):
        dataclasses.replace(preset.data, joint_batch_size=64)


def test_clips_are_for_video_models():
    for words in (
        ["finetune", "--model", "SANA-Video_2B_480p_diffusers", "--plan"],
        ["lora_video", "--model", "Sana_1600M_1024px_BF16_diffusers", "--plan"],
    ):
        with pytest.raises(UserError, match=r"trains on (pictures|clips), and --model .* or a preset that trains on"):
            trainer.main(words)


@pytest.mark.parametrize("name", ["digits", "digits_lora", "digits_sprint", "digits_controlnet"])
def test_previews_show_every_digit(name):
    assert load_preset(name).preview.captions == 10
