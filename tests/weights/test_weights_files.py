"""Which file of a component's directory is read, and what is said where there is none."""

from __future__ import annotations

import re

import pytest

from sana_jax.weights.safetensors_files import check_variant, find_weights_file

STEM = "diffusion_pytorch_model"
SHARDS = [f"-0000{number}-of-00002" for number in (1, 2)]


@pytest.fixture
def model(tmp_path):
    """A model with both files of the transformer, one of text encoder and autoencoder; they are not opened here."""
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        f"transformer/{STEM}.safetensors",
        *(f"transformer/{STEM}.fp16{shard}.safetensors" for shard in SHARDS),
        f"transformer/{STEM}.safetensors.index.fp16.json",
        f"vae/{STEM}.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_component_without_the_variant_is_read_as_if_none_were_chosen(model):
    lines: list[str] = []
    for folder, stem, name in (
        ("text_encoder", "model", "model.safetensors"),
        ("transformer", STEM, f"{STEM}.safetensors.index.fp16.json"),
        ("vae", STEM, f"{STEM}.safetensors"),
    ):
        assert find_weights_file(model / folder, stem, "fp16", say=lines.append) == model / folder / name
    assert lines == [
        "text_encoder: no variant fp16, so model.safetensors is read",
        f"vae: no variant fp16, so {STEM}.safetensors is read",
    ]
    check_variant(model, "fp16")


def test_a_variant_that_no_component_has_is_an_error(model):
    seen = "text_encoder: plain; transformer: plain, fp16; vae: plain"
    for folder in ("transformer", "vae"):
        with pytest.raises(FileNotFoundError, match=f"'fp61'; variants that are there: {seen}"):
            find_weights_file(model / folder, STEM, "fp61")


def test_a_component_that_is_no_models_has_its_own_variants_alone(model):
    (model / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="variants that are there: plain: choose one"):
        find_weights_file(model / "vae", STEM, "fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_without_their_index(model, variant):
    """Not another variant in their place: they are what was asked for."""
    if variant is None:
        (model / "transformer" / f"{STEM}.safetensors").unlink()
        for shard in SHARDS:
            (model / "transformer" / f"{STEM}{shard}.safetensors").touch()
        index = f"{STEM}.safetensors.index.json"
    else:
        index = f"{STEM}.safetensors.index.fp16.json"
        (model / "transformer" / index).unlink()
    with pytest.raises(FileNotFoundError, match=f"without their index: {re.escape(index)} is missing"):
        find_weights_file(model / "transformer", STEM, variant)


@pytest.mark.parametrize(
    ("folder", "stem", "name"),
    [("vae", STEM, f"{STEM}.bin"), ("text_encoder", "model", "pytorch_model-00001-of-00002.bin")],
)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_a_format_that_is_not_read_are_named(model, variant, folder, stem, name):
    (model / folder / f"{stem}.safetensors").rename(model / folder / name)
    with pytest.raises(FileNotFoundError, match=rf"its weights are in {re.escape(name)}, .*save_pretrained"):
        find_weights_file(model / folder, stem, variant)
