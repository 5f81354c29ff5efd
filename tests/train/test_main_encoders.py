"""A network of one's own, trained from scratch on pictures that another model's encoders prepare; a LoRA on top."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sana_jax.generate import main as generate
from sana_jax.pipelines.text_to_image import SanaPipeline
from tests.pipelines.tiny_model import random_params, tiny_config, write_run
from tests.train.run_training import cache_directory, call, in_this_process, pixels, rows, saved_state
from train.example_pictures import main as write_pictures

STEPS = 3
PROMPT = "a handwritten seven"
# of another shape than the model that the encoders are of
NETWORK = {
    "in-channels": 1, "out-channels": 1, "num-layers": 2, "num-attention-heads": 1, "attention-head-dim": 16,
    "num-cross-attention-heads": 1, "cross-attention-head-dim": 16, "cross-attention-dim": 16, "caption-channels": 12,
    "sample-size": 8,
}  # fmt: skip
OF_BOTH = {
    "steps": STEPS, "batch-size": 2, "accumulation": 1, "device": "cpu", "compute.dtype": "float32",
    "compute.remat": "none", "optimizer.name": "adamw", "optimizer.learning-rate": 1e-2, "optimizer.warmup-steps": 0,
    "logging.every": 1, "checkpoint.every": STEPS, "preview.every": STEPS, "preview.num-inference-steps": 2,
    "preview.per-caption": 1, "preview.sampler": "flow_euler", "preview.guidance-scale": 2.0, "data.caption": PROMPT,
}  # fmt: skip


def words(preset: str, options: dict) -> list[str]:
    return [preset, *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.prove
def test_from_scratch_with_anothers_encoders_then_a_lora(tmp_path, tmp_path_factory, capfd):
    write_pictures([str(tmp_path / "pictures"), "--digits", "7", "--count", "4"])
    config = tiny_config(patch_size=2)
    encoders = tmp_path / "encoders"
    write_run(encoders, random_params(config, 1), random_params(config, 2), config)
    shutil.rmtree(encoders / "checkpoints")  # text encoder and autoencoder alone are used
    scratch, lora = tmp_path / "scratch", tmp_path / "lora"
    data = {"data.path": tmp_path / "pictures", "data.cache": tmp_path / "cache"}
    network = {f"transformer.{name}": value for name, value in NETWORK.items()}

    with in_this_process(cache_directory(tmp_path_factory)):
        options = words(
            "sana_600m_512", {**OF_BOTH, **data, **network, "encoders": encoders, "run-dir": scratch, "mesh.data": 1}
        )
        status, out, err = call(capfd, *options)
        assert status == 0, err
        assert "4 pictures from the cache" in out
        assert len(rows(scratch)) == STEPS
        assert np.isfinite([row["loss"] for row in rows(scratch)]).all()
        shapes = {name: array.shape for name, array in saved_state(scratch, STEPS).items()}
        assert shapes["params/transformer_blocks/attn1/to_q/kernel"] == (2, 16, 16)
        assert json.loads((scratch / "base_model.json").read_text())["path"] == str(encoders)

        # the run's directory is a model, with the encoders where they are
        pipeline = SanaPipeline.from_pretrained(scratch)
        assert pipeline.transformer.config.attention_head_dim == 16
        generate(["--model", str(scratch), "--prompt", PROMPT, "--steps", "2", "--output", str(tmp_path / "7.png")])
        with Image.open(tmp_path / "7.png") as picture:
            assert np.asarray(picture).std() > 1

        # and it can be trained on, with the encoders that it names
        on_top = words("lora", {**OF_BOTH, **data, "model": scratch, "run-dir": lora, "lora.rank": 2})
        status, out, err = call(capfd, *on_top)
        assert status == 0, err
        assert "cache: complete" in out or "4 of them there" in out
        before, after = pixels(lora, 0), pixels(lora, STEPS)
        assert np.abs(before.astype(int) - after).max() > 0
        shutil.move(encoders, tmp_path / "elsewhere")
        status, out, err = call(capfd, "--resume", str(scratch), "--steps", str(STEPS + 1))
        assert status == 2
        assert str(encoders) in err
