"""python -m convert.main: words, statuses, what inspect says, and the memory that a conversion takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sana_jax
from convert.main import COMMANDS, main
from convert.renames import RenamedSource
from convert.tables.sana_original import transformer_table
from convert.torch_files import TorchSource
from sana_jax import SanaVideoPipeline
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file
from tests.benchmarks.conversion import measure, same_tensors, write_random_component
from tests.convert.cases import controlnet, transformer
from tests.pipelines.tiny_model import write_video_run
from tests.train.run_training import straight_run

ROOT = Path(__file__).parents[2]


def program(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "convert.main", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_program_needs_no_accelerator_and_says_one_line_of_an_error(tmp_path):
    transformer().save_pretrained(tmp_path / "published")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    code = (
        "import jax\nfrom convert.main import main\n"
        f"assert main(['inspect', {str(tmp_path / 'published')!r}]) == 0\n"
        "import jax._src.xla_bridge as bridge\nassert set(bridge._backends) <= {'cpu'}, bridge._backends\n"
        "assert not jax.live_arrays()\nimport sys\nassert 'torch' not in sys.modules and 'orbax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = program("import", str(tmp_path / "nowhere"), str(tmp_path / "ours"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no ")
    assert done.stderr.count("\n") == 1
    done = program("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("import", "export", "inspect"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command; allowed are import, export, merge, inspect"),
        (["convert"], "'convert' is no command"),
        (["import"], "--source is missing"),
        (["import", "a"], "--destination is missing"),
        (["import", "a", "b", "c"], "unexpected 'c'"),
        (["import", "a", "b", "--colour", "red"], "unknown option --colour"),
        (["import", "a", "b", "--weights", "mean"], "--weights cannot be 'mean'"),
        (["export", "a", "b", "--max-shard-size", "big"], "'big' is not a size"),
        (["inspect", "a", "b"], "unexpected 'b'"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UserError, match=message):
        main(words)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--source" in text
    for field in COMMANDS[command].config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text


def test_inspect_describes_everything(published, capsys):
    assert main(["inspect", str(published("controlnet"))]) == 0
    text = capsys.readouterr().out
    assert "SanaControlNetPipeline (published)" in text
    for start in (
        "transformer: SANA of 3 blocks, width 32, 72,072 parameters, float32",
        "vae: DC-AE f32c8",
        "contract: ",
    ):
        assert start in text
    assert "controlnet: ControlNet of 2 blocks, width 32, 56,928 parameters, float32" in text
    assert "text_encoder: Gemma-2 of 3 layers, width 24, 28,248 parameters" in text
    assert text.rstrip().endswith("everything fits")


def test_inspect_names_every_tensor_that_does_not_fit(tmp_path, capsys):
    transformer().save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "num_layers": 4, "patch_size": 2}))
    assert main(["inspect", str(tmp_path / "a")]) == 1
    few = capsys.readouterr().out
    assert "patch_embed.proj.weight float32[32,8,1,1], not [32, 8, 2, 2]" in few
    assert "more; --all names them" in few
    assert main(["inspect", str(tmp_path / "a"), "--all"]) == 1
    every = capsys.readouterr().out
    assert sum("missing: transformer_blocks.3." in line for line in every.splitlines()) == 19
    assert "something does not fit" in every


def test_inspect_goes_on_after_a_component_that_cannot_be_opened(published, tmp_path, capsys):
    import shutil

    shutil.copytree(published("sana-1.0"), tmp_path / "a")
    (tmp_path / "a" / "vae" / "config.json").write_text("{")
    (tmp_path / "a" / "text_encoder" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert main(["inspect", str(tmp_path / "a")]) == 1
    text = capsys.readouterr().out
    assert "transformer: SANA of 3 blocks" in text
    assert "vae: DOES NOT FIT: " in text
    assert "git lfs pull" in text


def test_a_model_of_our_own_has_components_without_weights(tmp_path, capsys):
    """Words and pixels, which are in their config.json; a damaged one does not fit."""
    write_video_run(tmp_path / "run")
    SanaVideoPipeline.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    for part in ("text_encoder: WordEncoder, which has no weights", "vae: PixelVideoAutoencoder, which has no weights"):
        assert f"note: {part}" in out
    assert "everything fits" in out
    (tmp_path / "model" / "text_encoder" / "config.json").write_text('{"_class_name": "WordEncoder"}')
    assert main(["inspect", str(tmp_path / "model")]) == 1
    assert "text_encoder: DOES NOT FIT: WordEncoder configuration lacks" in capsys.readouterr().out


def test_other_families_are_recognised(tmp_path, capsys):
    from diffusers import SanaVideoTransformer3DModel

    video = SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    video.save_pretrained(tmp_path / "video")
    (tmp_path / "video" / "config.json").write_text('{"_class_name": "OtherTransformer"}')
    with pytest.raises(UserError, match=r"OtherTransformer.*looks like SANA-Video: has patch_embedding"):
        main(["inspect", str(tmp_path / "video")])
    config = transformer().config
    (tmp_path / "video" / "config.json").write_text(json.dumps({**config, "_class_name": "SanaTransformer2DModel"}))
    assert main(["inspect", str(tmp_path / "video")]) == 1
    assert "looks like SANA-Video" in capsys.readouterr().out
    controlnet().save_pretrained(tmp_path / "controlnet")
    config = json.loads((tmp_path / "controlnet" / "config.json").read_text())
    config["_class_name"] = "SanaTransformer2DModel"
    (tmp_path / "controlnet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit"):
        main(["import", str(tmp_path / "controlnet"), str(tmp_path / "ours")])


def test_folders_that_are_no_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "checkpoints" / "Sana.pth")
    with pytest.raises(FileNotFoundError, match=r"name the file: .*Sana\.pth"):
        main(["inspect", str(tmp_path)])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no file of weights"):
        main(["inspect", str(tmp_path / "a.txt")])


def test_a_training_run_is_exported(tmp_path, tmp_path_factory, capsys):
    """The averaged weights by default, the raw ones on request; diffusers loads both."""
    from diffusers import SanaTransformer2DModel

    run = straight_run(tmp_path_factory)
    for which in ("auto", "ema", "params"):
        assert main(["export", str(run), str(tmp_path / which), "--weights", which]) == 0
        _, info = SanaTransformer2DModel.from_pretrained(tmp_path / which, output_loading_info=True)
        assert not any(info.values())
        file = tmp_path / f"{which}.pth"
        assert main(["export", str(run), str(file), "--weights", which, "--layout", "original"]) == 0
        original = RenamedSource(TorchSource(file), transformer_table(guidance=False), ())
        exported = SafetensorsSource(find_weights_file(tmp_path / which, "diffusion_pytorch_model"))
        assert original.tensors == exported.tensors
        assert all(np.array_equal(original.read(name), exported.read(name)) for name in exported.tensors)
    said = capsys.readouterr().out
    assert "left out: scheduler, text_encoder, vae" in said
    assert f"python -m sana_jax.generate --model {run} samples the run" in said
    whole = tmp_path / "whole"
    assert f"export with --components-from {run} writes a whole model directory of it" in said
    assert main(["export", str(run), str(whole), "--components-from", str(run)]) == 0  # what is advised leads there
    drawn, before = (
        sana_jax.SanaPipeline.from_pretrained(model)("a handwritten seven", num_inference_steps=2, output_type="np")
        for model in (whole, run)
    )
    np.testing.assert_array_equal(drawn.images, before.images)
    auto, ema, params = ((tmp_path / which) for which in ("auto", "ema", "params"))
    assert same_tensors(auto, ema)
    assert not same_tensors(auto, params)
    with pytest.raises(UserError, match="use export"):
        main(["import", str(run), str(tmp_path / "ours")])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.prove)])
def test_a_conversion_holds_a_few_arrays_at_a_time(tmp_path, dtype):
    """What import and export take beside what the program itself takes, on weights that are large beside one array."""
    config = {"num_layers": 48, "num_attention_heads": 16, "attention_head_dim": 32, "cross_attention_dim": 512}
    config |= {"num_cross_attention_heads": 4, "cross_attention_head_dim": 128, "caption_channels": 256}
    config["_class_name"] = "SanaTransformer2DModel"
    small = {**config, "num_layers": 1}
    size = write_random_component(tmp_path / "large", config, dtype)
    write_random_component(tmp_path / "small", small, dtype)
    peaks = {}
    for name in ("small", "large"):
        published, ours, back = (str(tmp_path / place) for place in (name, f"{name} ours", f"{name} back"))
        peaks[name] = [measure(["import", published, ours])[1], measure(["export", ours, back])[1]]
        assert same_tensors(Path(published), Path(back))
    for little, much in zip(peaks["small"], peaks["large"]):
        # Holding the tree and what Orbax copies of it takes more than 2 x. One array is a third of everything here, and
        # less of it in the published sizes (python -m tests.benchmarks.conversion).
        assert much - little < 1.2 * size, f"{(much - little) / size:.2f} x the checkpoint of {size / 1e6:.0f} MB"
