"""The model card beside a LoRA file says what was trained, and how to use it; its header is YAML."""

from __future__ import annotations

import pytest
import yaml

from configs.lora import LoraConfig
from sana_jax.errors import UserError
from train.model_card import LoraCard, write_model_card
from train.publishing import _prompt_and_template

CARD = LoraCard(
    base_model="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    lora=LoraConfig(rank=8, alpha=16, dropout=0.1, targets=("attention", "proj_out|x")),
    steps=1500,
    data="12 pictures, 512 px",
    prompt='a photo of "sks" dog: it\'s a `dog`\n# not a comment',
    license="apache-2.0",
    facts={"Learning rate": "1e-4", "Batch size": 4},
)


def read(path) -> tuple[dict, str]:
    text = path.read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def change(**values) -> LoraCard:
    import dataclasses

    return dataclasses.replace(CARD, **values)


def test_a_base_that_diffusers_cannot_open(tmp_path):
    header, body = read(write_model_card(tmp_path, change(base_model="runs/digits", for_diffusers=False)))
    assert header["library_name"] == "sana_jax"
    assert "diffusers" not in header["tags"]
    assert "from diffusers" not in body
    assert "from sana_jax import SanaPipeline" in body


def test_card(tmp_path):
    (tmp_path / "samples grid.png").write_bytes(b"")
    path = write_model_card(tmp_path, change(preview="samples grid.png"))
    assert path == tmp_path / "README.md"
    header, body = read(path)
    prompt = 'a photo of "sks" dog: it\'s a `dog` # not a comment'
    assert header["base_model"] == CARD.base_model
    assert header["license"] == "apache-2.0"
    assert header["instance_prompt"] == prompt
    assert {"lora", "sana_jax", "diffusers"} <= set(header["tags"])
    assert header["widget"] == [{"text": prompt, "output": {"url": "samples grid.png"}}]
    for row in (
        "| Rank | 8 |",
        "| Alpha | 16 (scale 2) |",
        "| Dropout | 0.1 |",
        "| Steps | 1,500 |",
        "| Batch size | 4 |",
    ):
        assert row in body
    assert "| Targets | `attention`, `proj_out\\|x` |" in body
    assert "| Data | 12 pictures, 512 px |" in body
    assert "![Samples](<samples grid.png>)" in body
    assert 'weight_name="pytorch_lora_weights.safetensors"' in body
    assert "python -m sana_jax.generate --model Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers --lora " in body
    blocks = body.split("```python\n")[1:]
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")
    assert len(blocks) == 2
    assert "apache-2.0, as the base model" in body


def test_a_local_base_model_is_named_without_its_path(tmp_path):
    model = tmp_path / "secret" / "my model"
    model.mkdir(parents=True)
    header, body = read(write_model_card(tmp_path, change(base_model=str(model), license=None, prompt=None)))
    assert "base_model" not in header
    assert "license" not in header
    assert "instance_prompt" not in header
    assert "my model" in body
    assert "secret" not in body
    assert "not stated" in body


def test_another_licence_and_pipeline(tmp_path):
    card = change(license="NVIDIA Open Model License: see LICENSE", pipeline="SanaSprintPipeline")
    header, body = read(write_model_card(tmp_path, card))
    assert header["license"] == "other"
    assert header["license_name"] == "NVIDIA Open Model License: see LICENSE"
    assert "from diffusers import SanaSprintPipeline" in body


def test_a_template_is_no_prompt(tmp_path):
    assert _prompt_and_template("a photo of {name}") == (None, "a photo of {name}")
    assert _prompt_and_template("a {{sks}} dog") == ("a {sks} dog", None)
    assert _prompt_and_template(None) == (None, None)
    (tmp_path / "grid.png").write_bytes(b"")
    header, body = read(write_model_card(tmp_path, change(prompt=None, example="a photo of Rex", preview="grid.png")))
    assert "instance_prompt" not in header
    assert "Prompt that it was trained on" not in body
    assert header["widget"][0]["text"] == "a photo of Rex"
    assert "--prompt 'a photo of Rex'" in body


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="picture"):
        write_model_card(tmp_path, change(preview="absent.png"))
    with pytest.raises(UserError, match="pipeline 'Other'"):
        write_model_card(tmp_path, change(pipeline="Other"))
    assert not list(tmp_path.iterdir())
