from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import PRESETS
from configs.lora import LoraConfig
from configs.schema import ComputeConfig, OptimizerConfig
from sana_jax import UserError, gpu_compiler
from tests.parity import pipeline_oracle
from tests.simulated_devices import simulated_devices
from tests.train.presets import abstract_mesh, preset_run
from tests.train.tiny_run import QUICKLY, mesh_config, tiny_config
from train import main as trainer
from train import plan
from train.memory import Activations, Choice, advice_when_memory_ends, compiled_bytes, out_of_memory_line
from train.plan import ModelShapes, choices, estimated_memory, planned_run, settled
from train.sharding import AXES, make_mesh

NEAR = 0.15
SMALL_OPTIONS = [
    "--transformer.num-layers=2",
    "--transformer.num-attention-heads=2",
    "--transformer.num-cross-attention-heads=2",
    "--transformer.cross-attention-head-dim=16",
    "--transformer.cross-attention-dim=32",
    "--batch-size=16",
    "--steps=1",
    "--preview.every=0",
]


def configuration(**changes):
    """A tiny run; with ``lora`` beside a model of its own shape."""
    return tiny_config(mesh=mesh_config(), **({"model": "beside"} if "lora" in changes else {}), **changes)


def medium(**changes):
    """Eight blocks of width 256 on 64 tokens."""
    config = configuration(**changes)
    transformer = dataclasses.replace(
        config.transformer,
        num_attention_heads=16,
        num_cross_attention_heads=4,
        cross_attention_head_dim=64,
        cross_attention_dim=256,
        num_layers=8,
        patch_size=1,
    )
    return dataclasses.replace(config, transformer=transformer)


@functools.cache
def run_of(config):
    mesh = make_mesh(config.mesh)
    return planned_run(config, ModelShapes(config.transformer, 1, 8, "float32"), mesh)


@functools.cache
def needed(config) -> int:
    """What the compiler reports for the step."""
    run = run_of(config)
    (step,) = run.jitted_steps()
    with jax.set_mesh(run.mesh):
        return compiled_bytes(step.lower(run.state.abstract, run.frozen, run.batch).compile(QUICKLY))


def estimate(config, option: str) -> int:
    """What a choice would need, set right by the compiled step."""
    run = run_of(config)
    fixed = estimated_memory(run)._replace(activations=0)
    measured = fixed._replace(activations=needed(config) - fixed.total)
    (choice,) = choices(run, measured, only={option})
    return choice.total


FULL = ComputeConfig(remat="full")
LORA = {"lora": LoraConfig(), "compute": FULL}
CASES = [
    pytest.param("--compute.remat full", configuration, {}, {"compute": FULL}, id="remat"),
    pytest.param(
        "--accumulation 2", configuration, LORA, {"accumulation": 2}, id="lora, accumulation", marks=pytest.mark.prove
    ),
    pytest.param(
        "--accumulation 2", configuration, {}, {"accumulation": 2}, id="accumulation", marks=pytest.mark.prove
    ),
    pytest.param(
        "--compute.remat none",
        medium,
        {"compute": FULL},
        {"compute": ComputeConfig()},
        id="medium, remat",
        marks=pytest.mark.prove,
    ),
    pytest.param("--accumulation 2", medium, {}, {"accumulation": 2}, id="medium", marks=pytest.mark.prove),
]


@pytest.mark.parametrize(("option", "make", "changes", "change"), CASES)
def test_what_a_change_would_need_is_what_the_compiler_then_reports(option, make, changes, change):
    config = make(**changes)
    assert estimate(config, option) == pytest.approx(needed(dataclasses.replace(config, **change)), rel=NEAR)


@pytest.mark.parametrize("make", [configuration, medium])
@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig()}], ids=["whole", "lora"])
@pytest.mark.prove
def test_estimates_without_compiling(make, changes):
    config = make(**changes)
    assert estimated_memory(run_of(config)).total == pytest.approx(needed(config), rel=NEAR)


WORLD_OPTIONS = [
    "--data.photographs=china",
    "--transformer.num-layers=4",
    "--transformer.hidden-size=64",
    "--transformer.num-attention-heads=2",
    "--transformer.linear-head-dim=32",
    "--compute.scan-blocks",
    "--steps=1",
]


def test_a_worlds_frames_are_cut_over_devices(monkeypatch):
    config = trainer.read_command_line(["moving_camera", *WORLD_OPTIONS])
    model = ModelShapes(None, 1, 8, "float32", 1)
    monkeypatch.setattr(plan, "traced_activations", lambda *_: Activations(3000, 1000))
    found = []
    for frames in (1, 2):
        mesh = AbstractMesh((1, 1, 1, frames), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        found.append(estimated_memory(planned_run(config, model, mesh)))
    assert found[0].parameters == found[1].parameters > 0
    assert [memory.activations for memory in found] == [4000, 2000]


@pytest.mark.parametrize("preset", ["sana_wm_ode", "sana_wm_self_forcing", "sana_wm_2b_chunk_causal", "finetune_world"])
def test_published_worlds_are_planned_by_shapes_in_every_stage(preset):
    """State, batch and what single changes would make of them, of the full size; a student is no LoRA."""
    name = "Efficient-Large-Model/SANA-WM_bidirectional"
    config, model = settled(trainer.read_command_line([preset, "--model", name, "--mesh.data=1", "--mesh.context=2"]))
    mesh = AbstractMesh((1, config.mesh.fsdp, 1, 2), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    run = planned_run(config, model, mesh)
    camera = run.batch.latents.shape[:2]
    assert run.batch.conditions["camera_conditions"].shape == (*camera, 20)
    assert run.batch.conditions["chunk_plucker"].shape == (*camera, 22, 40, 48)
    found = [option for option, *_ in plan._alternatives(run)]
    assert "--optimizer.name adamw_8bit" in found
    assert ("the preset lora_world instead" in found) == (preset == "finetune_world")


@pytest.mark.prove
def test_what_a_change_needs_where_frames_are_cut():
    """As a user asks, on two simulated devices: the plan's figure for another remat policy is the compiler's own."""
    words = ["moving_camera", "--plan", "--mesh.context=2", *WORLD_OPTIONS]
    environment = {**os.environ, "XLA_FLAGS": simulated_devices(2)}

    def planned(*more: str) -> str:
        command = [sys.executable, "-m", "train.main", *words, *more]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def size_of(pattern: str, text: str) -> float:
        number, unit = re.search(rf"{pattern} +([\d.]+) (\w?B)", text).groups()
        return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]

    as_it_is, other = planned(), planned("--compute.remat=full")
    assert size_of("in all", as_it_is) > 1.2 * size_of("in all", other)
    assert size_of("--compute.remat full", as_it_is) == pytest.approx(size_of("in all", other), rel=NEAR)
    assert size_of("--compute.remat none", other) == pytest.approx(size_of("in all", as_it_is), rel=NEAR)


def test_the_figures_of_a_plan_add_up():
    run = run_of(configuration(lora=LoraConfig(rank=2), optimizer=OptimizerConfig(name="adamw"), batch_size=8))
    memory = estimated_memory(run)
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.abstract.params))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(run.frozen))
    assert (memory.parameters, memory.average, memory.gradients) == (4 * trained,) * 3
    assert memory.frozen == 4 * frozen
    assert memory.optimizer == pytest.approx(8 * trained, abs=64)
    assert memory.batch == 8 * (64 * 4 + 8 * 32 * 4 + 8 * 4)
    assert memory.total == sum(memory)


@pytest.mark.prove
def test_every_choice_is_listed_and_its_state_is_exact():
    config = configuration(batch_size=8)
    run = run_of(config)
    found = {choice.option: choice.total for choice in choices(run, None)}
    policies = {f"--compute.remat {name}" for name in ("dots", "dots_no_batch", "full", "offload")}
    optimizers = {"--optimizer.name adamw_8bit", "--optimizer.name came_8bit", "--ema.no-enabled"}
    meshes = {"--mesh.fsdp 2", "--mesh.fsdp 4", "--mesh.fsdp 8", "--mesh.fsdp 16 --batch-size 16"}
    assert found.keys() == {*policies, *optimizers, *meshes, "--accumulation 2"}
    for option in found:
        trainer.read_command_line(["finetune", *option.split()])
    memory = estimated_memory(run)
    assert memory.total - found["--ema.no-enabled"] == memory.average
    assert found["--compute.remat full"] < found["--compute.remat dots"] < memory.total


@pytest.mark.prove
def test_a_plan_prints_what_the_run_then_needs_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainer.main(["--plan", *SMALL_OPTIONS]) == 0
    plan = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert re.search(r"1 devices|each of 1", plan)
    planned = re.search(r"in all +([\d.]+ \wB)", plan)[1]
    assert trainer.main(SMALL_OPTIONS) == 0
    trained = capsys.readouterr().out
    (reported,) = re.findall(r"compiled the train step .*?memory per device: ([\d.]+ \wB)", trained)
    assert planned == reported
    for option in ("--compute.remat full", "--accumulation 2", "--optimizer.name came_8bit", "--mesh.fsdp 8"):
        assert option in plan


def test_a_plan_for_gpus_that_are_not_here(capsys, monkeypatch):
    """All but the compiler, in whose place is that of this machine's processor."""
    asked = []
    monkeypatch.setattr(gpu_compiler, "PLATFORM", "cpu")
    monkeypatch.setattr(gpu_compiler, "OPTIONS", {})
    monkeypatch.setattr(
        gpu_compiler.Target, "devices", lambda target, count: asked.append((target, count)) or jax.devices("cpu")[:1]
    )
    assert trainer.main(["digits", "--plan", *SMALL_OPTIONS]) == 0
    here = capsys.readouterr().out
    assert trainer.main(["digits", "--plan=rtx4090", *SMALL_OPTIONS]) == 0
    found = capsys.readouterr().out
    assert asked == [(gpu_compiler.Target(gpu_compiler.GPUS["rtx4090"], None), 1)]
    totals = [re.search(r"in all +([\d.]+ \wB)(.*)", text).groups() for text in (here, found)]
    assert totals[0][0] == totals[1][0]
    assert totals[1][1] == "  of 24.70 GB that such a device has"
    with pytest.raises(UserError, match="triton needs the GPU itself; choose auto, xla or pallas"):
        trainer.main(["digits", "--plan=h100", "--compute.kernels", "triton"])


def test_gpus_of_a_plan(monkeypatch):
    words = ["digits", "--plan=h100x16", "--steps", "2"]
    assert plan.plan_words(words) == (["digits", "--steps", "2"], True, (gpu_compiler.GPUS["h100"], 16))
    assert plan.plan_words(["--plan", "a100", "digits"]) == (["digits"], True, (gpu_compiler.GPUS["a100"], None))
    assert plan.plan_words(["--plan", "digits"]) == (["digits"], True, None)
    assert plan.plan_words(words[:1]) == (["digits"], False, None)
    for name in ("h2", "", "h100x0", "h100x"):
        with pytest.raises(UserError, match=f"GPU '{name}' is not known; choose h100, a100, rtx4090, with a number"):
            plan.plan_words([f"--plan={name}"])
    with pytest.raises(UserError, match="12 GPUs: allowed are 1 to 8, and multiples of 8"):
        gpu_compiler.parse_target("a100x12").devices()

    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda12\]==\S+' brings it, and needs no GPU"):
        gpu_compiler.parse_target("a100").devices()


def test_other_meshes_are_of_the_same_devices(monkeypatch):
    """Their outlines do not say what they are of; a CPU keeps bfloat16 in float32."""
    run = run_of(configuration(compute=ComputeConfig(dtype="bfloat16")))
    monkeypatch.setattr(plan, "_platform", lambda mesh: "gpu" if mesh is run.mesh else "cpu")
    (found,) = choices(run, None, only=["--mesh.fsdp 2"])
    monkeypatch.setattr(plan, "_platform", lambda mesh: "gpu")
    assert choices(run, None, only=["--mesh.fsdp 2"]) == [found]
    monkeypatch.setattr(plan, "_platform", lambda mesh: "cpu")
    (wide,) = choices(run, None, only=["--mesh.fsdp 2"])
    assert found.total < wide.total


# trajectories say what they are of
@pytest.mark.parametrize("name", sorted({*PRESETS} - {"moving_camera_ode", "moving_digits_ode"}))
def test_changes_of_every_preset_are_allowed(name):
    """Windows of long videos are not cut in parts: their plan ended in an error about an option that nobody gave."""
    run = preset_run(name, abstract_mesh())
    found = [option for option, *_ in plan._alternatives(run)]
    windows = run.config.self_forcing is not None and run.config.self_forcing.stream is not None
    assert not (windows and any(option.startswith("--accumulation") for option in found))
    assert any(option.startswith("--optimizer.name") for option in found)


def test_a_smaller_part_of_the_batch_is_off_by_a_smaller_part():
    """What the estimate is off by goes along with the samples that are computed at once."""
    run = run_of(configuration())
    estimated = estimated_memory(run)
    measured = estimated._replace(activations=3 * estimated.activations)
    (halved,) = choices(run, measured, only=["--accumulation 2"])
    (alone,) = choices(run, None, only=["--accumulation 2"])
    fixed = alone.total - (measured.total - measured.activations)
    assert halved.total - alone.total == pytest.approx(2 * (fixed - measured.gradients), rel=0.02)


def test_shapes_come_from_a_configuration_file_alone(tmp_path):
    network = {**tiny_config().transformer.to_dict(), "num_layers": 3}
    path = tmp_path / "model" / "transformer" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(network))
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    config, model = settled(dataclasses.replace(trainer.read_command_line(["lora"]), model=str(tmp_path / "model")))
    assert config.transformer.num_layers == model.network.num_layers == 3


def test_shapes_are_those_of_the_chosen_variant(tmp_path):
    """Of a directory with several and no plain files, whose own encoders and contract count."""
    pipeline_oracle.save("sana-1.0", tmp_path / "model")
    for folder in ("transformer", "vae"):
        file = next((tmp_path / "model" / folder).glob("*.safetensors"))
        shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
        file.rename(file.with_name(f"{file.stem}.bf16.safetensors"))
    words = ["lora", "--model", str(tmp_path / "model"), "--model-variant", "bf16"]
    _, model = settled(trainer.read_command_line(words))
    assert model.contract is not None
    assert model.prompt_dtype == "float32"


def test_published_models_are_not_looked_for():
    name = "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers"
    config, _ = settled(trainer.read_command_line(["lora_24gb", "--model", name]))
    assert config.transformer.num_layers == 60


def test_a_plan_of_a_preset_without_its_model():
    with pytest.raises(UserError, match="the preset lora starts from a model, whose shape the plan needs"):
        settled(trainer.read_command_line(["lora"]))


def exhausted():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 47 bytes.")


def test_a_device_without_memory_gives_advice():
    listed = [Choice("--much", 50, ""), Choice("--none", 100, ""), Choice("--some", 80, "")]
    with pytest.raises(UserError) as caught, advice_when_memory_ends(lambda: (100, listed)):
        exhausted()
    message = str(caught.value)
    assert "needs 100 B on each device; it would need less with --much (about 50 B), --some (about 80 B)," in message
    assert "47 bytes" in message
    assert "--none" not in message
    assert "\n" not in message
    assert "no single setting" in out_of_memory_line("", 100, listed[1:2])


def test_other_errors_of_a_device_pass_through():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), advice_when_memory_ends(lambda: (None, [])):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_asks_for_advice(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "compile_ahead", lambda *_, **__: exhausted())
    monkeypatch.setattr(trainer, "needed_and_choices", lambda *_: (None, [Choice("--less", 50, "")]))
    with pytest.raises(UserError, match=r"ran out of memory .*it would need less with --less \(about 50 B\)"):
        trainer.main([*SMALL_OPTIONS, "--run-dir", str(tmp_path / "run")])


@pytest.mark.prove
def test_a_run_that_finds_no_memory_says_what_would_need_less(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "compile_ahead", lambda *_, **__: exhausted())
    with pytest.raises(UserError, match=r"ran out of memory .*it would need less with --.*about"):
        trainer.main([*SMALL_OPTIONS, "--run-dir", str(tmp_path / "run")])
