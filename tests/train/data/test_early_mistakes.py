"""Mistakes that would only show in training are found before anything is prepared; pictures without captions train."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from configs import load_preset
from configs.lora import LoraConfig
from configs.prior import PriorConfig
from configs.schema import FlowConfig, ValidationConfig
from configs.tokens import TokenEncoderConfig, condition_tokens
from sana_jax.errors import UserError
from tests.train.data.cache_cases import gray_model, gray_pictures, prepared, run_config
from train.assembly import assemble
from train.base_model import BaseModel, settle
from train.data import CachedData
from train.main import Run
from train.previews import Previewer


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return gray_model(tmp_path_factory.mktemp("gray"))


TOKENS = condition_tokens(object=TokenEncoderConfig(kind="vector", width=4))


@pytest.mark.parametrize(
    ("run", "data", "says"),
    [
        ({"validation": ValidationConfig(every=5)}, {}, "--validation.every 5.*--data.validation-share"),
        ({"flow": FlowConfig(mode_scale=1.29)}, {}, "^--flow.mode-scale=1.29 is not read"),
        ({}, {"caption_choice": "proportion", "proportions": ("llava=1",)}, "kind prompt, .*weight to llava alone"),
        ({}, {"caption_choice": "clipscore"}, "clipscore: none of the 3 captions has a score"),
        ({"lora": LoraConfig(), "prior": PriorConfig()}, {"max_bad_share": 0.5, "minimum_size": 9999}, "no picture"),
        ({}, {"validation_share": 0.2, "group_column": "folder"}, "all 3 pictures belong to one group"),
        ({}, {"conditions": ("control=canny",)}, "declares control, which nothing in this run reads"),
        ({"lora": LoraConfig(), "tokens": TOKENS}, {}, "reads the condition object, which the data does not have"),
        (
            {"lora": LoraConfig(), "tokens": TOKENS},
            {"conditions": ("object=vector",)},
            r"--tokens.object reads a vector of 4 numbers, .* a vector of 3 numbers; .*--tokens.object.width 3",
        ),
        (
            {"lora": LoraConfig(), "tokens": condition_tokens(object=TokenEncoderConfig(kind="scalar"))},
            {"conditions": ("object=vector",)},
            r"--tokens.object reads a number, .* a vector of 3 numbers; set --tokens.object.kind vector",
        ),
    ],
)
def test_before_anything_is_prepared(gray, tmp_path, run, data, says):
    pictures = gray_pictures(tmp_path / "pictures", 3)
    if "conditions" in data:
        rows = [f'{{"file_name": "p{i:03d}.png", "text": "a one", "object": [1, 2, 3]}}' for i in range(3)]
        (pictures / "metadata.jsonl").write_text("\n".join(rows))
    base = BaseModel(str(gray.path), "SanaPipeline", gray, "0123")
    config = run_config(pictures, tmp_path / "cache", **data)
    config = settle(dataclasses.replace(config, model=str(gray.path), **run), base)
    lines: list[str] = []
    with pytest.raises(UserError, match=says):
        assemble(config, base, lines.append, None)
    assert not list(tmp_path.glob("cache/*.arrayrecord"))
    assert any("prior preservation: none; --prior.caption" in line for line in lines) == ("prior" in run)


@pytest.mark.parametrize("every", [0, 1])
def test_pictures_without_captions_have_previews_of_none(gray, tmp_path, every):
    pictures = gray_pictures(tmp_path / "pictures", 2)
    for path in pictures.glob("*.txt"):
        path.unlink()
    config = run_config(pictures, tmp_path / "cache", missing_captions="empty")
    prepared(config, gray)
    data = CachedData(tmp_path / "cache", config.data)
    embeds, mask = data.encode([])
    assert embeds.shape == (0, 5, 12)
    assert mask.shape == (0, 5)
    assert embeds.dtype == data.null_encoding()[0].dtype
    preview = dataclasses.replace(load_preset("finetune").preview, every=every)
    parts = SimpleNamespace(
        config=dataclasses.replace(config, preview=preview), dataset=data, recipe=SimpleNamespace(conditions=())
    )
    previewer = Previewer(parts, None, contextlib.nullcontext())
    assert previewer.captions == [""]
    assert previewer.example_prompt == ""
    said: list[str] = []
    run = SimpleNamespace(
        config=parts.config,
        parts=SimpleNamespace(recipe=SimpleNamespace(kind="whole")),
        previewer=previewer,
        nonfinite=0,
        writer=None,
        say=said.append,
    )
    Run.finish(run, 5, 5)
    assert " --prompt TEXT " in said[-1]  # generate takes no empty one
    np.testing.assert_array_equal(data.encode(previewer.captions)[0], gray.text_encoder.null_encoding()[0])
