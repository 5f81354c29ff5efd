"""Which of a repository's files are downloaded."""

from __future__ import annotations

import pytest

from sana_jax.errors import UserError
from sana_jax.pipelines.opening import files_to_fetch, find_model

REPOSITORY = [
    "README.md",
    "asset/picture.png",
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.bf16-00001-of-00002.safetensors",
    "text_encoder/model.bf16-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.bf16.json",
    "tokenizer/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.bf16.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors",
]


def weights(variant: str | None) -> list[str]:
    return [name for name in files_to_fetch(REPOSITORY, variant) if name.endswith(("safetensors", "bin", "png"))]


def test_plain_files_and_where_there_are_none_the_variant():
    assert weights(None) == [*REPOSITORY[4:6], *REPOSITORY[9:11], REPOSITORY[13]]


def test_the_variant_and_where_there_is_none_the_plain_files():
    assert weights("bf16") == [*REPOSITORY[4:6], REPOSITORY[11], REPOSITORY[13]]


def test_a_variant_that_no_component_has_is_not_downloaded_as_another():
    with pytest.raises(UserError, match="variant 'fp61'; allowed are the plain files, bf16: choose"):
        files_to_fetch(REPOSITORY, "fp61")
    alone = ["config.json", "diffusion_pytorch_model.safetensors"]  # a ControlNet beside a model that has the variant
    assert files_to_fetch(alone, "bf16") == alone


def test_configurations_and_tokenizer_always():
    small = [name for name in REPOSITORY if name.endswith((".json", ".md"))]
    assert set(small) <= set(files_to_fetch(REPOSITORY, None))


@pytest.mark.parametrize("path", [5, None, b"runs/digits", ["runs/digits"]])
def test_what_is_no_path(path):
    with pytest.raises(UserError, match=r"model .* is not allowed; give a directory's path, or organisation/name"):
        find_model(path)
