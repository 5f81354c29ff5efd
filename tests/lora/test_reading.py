"""LoRA files are read in every spelling, and whatever is wrong with one is said in a line."""

from __future__ import annotations

import math
import time

import ml_dtypes
import numpy as np
import pytest

from sana_jax.errors import CheckpointError, UserError
from sana_jax.lora import parse_lora_option, read_lora
from sana_jax.weights.tables.sana import transformer_rules
from tests.lora.files import CONFIG, QUERY, WIDTH, abstract, delta, good, normal, pair, read, tree, write

Q = ("transformer_blocks", "attn1", "to_q")


def renamed(tensors: dict, *replacements: tuple[str, str]) -> dict:
    result = {}
    for key, tensor in tensors.items():
        for old, new in replacements:
            key = key.replace(old, new)
        result[key] = tensor
    return result


SPELLINGS = {
    "diffusers": (),
    "PEFT": (("transformer.", "base_model.model."),),
    "PEFT of a pipeline, adapter named": (
        ("transformer.", "base_model.model.transformer."),
        (".weight", ".default.weight"),
    ),
    "no prefix": (("transformer.", ""),),
    "before PEFT": (("lora_A", "lora.down"), ("lora_B", "lora.up")),
    "layers": (("lora_A", "lora_linear_layer.down"), ("lora_B", "lora_linear_layer.up")),
    "processors": (("to_q.lora_A", "processor.to_q_lora.down"), ("to_q.lora_B", "processor.to_q_lora.up")),
    "kohya": (
        ("transformer.", "lora_unet_"),
        ("transformer_blocks.", "transformer_blocks_"),
        (".attn1.to_q.", "_attn1_to_q."),
        ("lora_A", "lora_down"),
        ("lora_B", "lora_up"),
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(tmp_path, spelling):
    tensors = good()
    found = tree((read(tmp_path, renamed(tensors, *SPELLINGS[spelling])), 1.0))
    assert set(found) == {(*Q, "down"), (*Q, "up")}
    for block in (0, 2):
        a, b = (tensors[f"transformer.{QUERY.format(block)}.lora_{part}.weight"] for part in "AB")
        np.testing.assert_allclose(delta(found, *Q)[block], (b @ a).T, rtol=1e-5, atol=1e-6)
    assert not delta(found, *Q)[1].any()  # a block without one is padded with zeros


def test_the_output_layer_of_attention_by_its_short_name(tmp_path):
    lora = read(tmp_path, pair("transformer_blocks.1.attn2.to_out"))
    assert [layer.module for layer in lora.layers] == ["transformer_blocks.1.attn2.to_out.0"]


def test_convolutions(tmp_path):
    """A 1x1 convolution, with or without its two axes of length 1, and patches in PyTorch's order."""
    hidden = CONFIG.mlp_hidden
    point = normal(3, hidden), normal(WIDTH, 3)
    patch = normal(3, 4, 2, 2), normal(WIDTH, 3, 1, 1)
    for axes in ((), (1, 1)):
        tensors = {
            "transformer.transformer_blocks.0.ff.conv_point.lora_A.weight": point[0].reshape(*point[0].shape, *axes),
            "transformer.transformer_blocks.0.ff.conv_point.lora_B.weight": point[1].reshape(*point[1].shape, *axes),
            "transformer.patch_embed.proj.lora_A.weight": patch[0],
            "transformer.patch_embed.proj.lora_B.weight": patch[1],
        }
        found = tree((read(tmp_path, tensors), 1.0))
        np.testing.assert_allclose(
            delta(found, "transformer_blocks", "ff", "conv_point")[0], (point[1] @ point[0]).T, rtol=1e-5, atol=1e-5
        )
        expected = np.einsum("or,rchw->hwco", patch[1][:, :, 0, 0], patch[0]).reshape(-1, WIDTH)
        np.testing.assert_allclose(delta(found, "patch_embed", "proj"), expected, rtol=1e-5, atol=1e-5)


def test_alpha_tensors(tmp_path):
    alphas = {f"transformer.{QUERY.format(0)}.alpha": np.float32(3).reshape(())}
    alphas |= {f"transformer.{QUERY.format(2)}.alpha": np.ones(1, ml_dtypes.bfloat16)}
    assert [layer.scale for layer in read(tmp_path, good() | alphas).layers] == [1.5, 0.5]


@pytest.mark.parametrize(
    ("metadata", "scales"),
    [
        (None, [1.0, 1.0]),
        ({"transformer.r": 2, "transformer.lora_alpha": 5}, [2.5, 2.5]),
        ({"r": 2, "lora_alpha": 5}, [2.5, 2.5]),
        ({"transformer.r": 2, "transformer.lora_alpha": 5, "transformer.init_lora_weights": "gaussian"}, [2.5, 2.5]),
        ({"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.use_rslora": True}, [4 / math.sqrt(2)] * 2),
        ({"transformer.r": 8, "transformer.lora_alpha": 4, "transformer.rank_pattern": {"to_q": 2}}, [2.0, 2.0]),
        (
            {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"2.attn1.to_q": 6}},
            [1.0, 3.0],
        ),
        (
            {"transformer.r": 2, "transformer.lora_alpha": 2}
            | {"transformer.alpha_pattern": {r"^transformer_blocks\.0.*": 6, "o_q": 1}},  # "o_q": not a whole part
            [3.0, 1.0],
        ),
        ({"transformer.target_modules": ["to_q"]}, [1.0, 1.0]),
        ({}, [1.0, 1.0]),
    ],
)
def test_metadata(tmp_path, metadata, scales):
    assert [layer.scale for layer in read(tmp_path, good(), metadata).layers] == pytest.approx(scales)


def refused(tmp_path, tensors: dict, *words: str, metadata=None) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, tensors, metadata)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1500
    for word in words:
        assert word in message, message


def test_nothing_matches(tmp_path):
    """Three names of both sides."""
    tensors = {}
    for i in range(4):
        tensors |= pair(f"double_blocks.{i}.img_attn.proj")
    refused(
        tmp_path,
        tensors,
        "nothing of",
        "transformer.double_blocks.0.img_attn.proj.lora_A.weight",
        "transformer.double_blocks.1.img_attn.proj.lora_A.weight",
        "transformer.patch_embed.proj.lora_A.weight",
    )
    refused(tmp_path, {"a.weight": normal(2)}, "nothing of")


def test_another_width(tmp_path):
    tensors = pair(QUERY.format(0), 24, 24) | pair("proj_out", 24, WIDTH)
    refused(tmp_path, tensors, "a LoRA for width 24, and this model has width 16", "2 of 2 layers")
    refused(tmp_path, pair("proj_out", 24, WIDTH), "do not fit this network", "proj_out")


@pytest.mark.parametrize("spelling", ["diffusers", "PEFT", "kohya"])
def test_more_blocks(tmp_path, spelling):
    tensors = renamed(good() | pair(QUERY.format(7)), *SPELLINGS[spelling])
    refused(tmp_path, tensors, "a LoRA for 8 blocks or more, and this model has 3")


def test_depthwise_convolution(tmp_path):
    name = "transformer.transformer_blocks.0.ff.conv_depth"
    tensors = {f"{name}.lora_A.weight": normal(80, 1, 3, 3), f"{name}.lora_B.weight": normal(80, 1, 1, 1)}
    refused(tmp_path, good() | tensors, "ff.conv_depth", "depthwise")


def test_what_is_not_supported_is_listed(tmp_path):
    name = f"transformer.{QUERY.format(0)}"
    extra = {
        f"{name}.dora_scale": normal(WIDTH, 1),
        f"{name}.lora_B.bias": normal(WIDTH),
        "transformer.proj_out.weight": normal(16, 16),
        "text_encoder.layers.0.q_proj.lora_A.weight": normal(2, 8),
        "text_encoder.layers.0.q_proj.lora_B.weight": normal(8, 2),
    }
    lora = read(tmp_path, good() | extra)
    assert len(lora.layers) == 2
    assert lora.unsupported == (
        f"{name}.dora_scale (DoRA)",
        f"{name}.lora_B.bias (bias of a LoRA)",
        "transformer.proj_out.weight (unknown)",
    )
    assert len(lora.unmatched) == 2
    text = "\n".join(lora.summary())
    assert "3 tensors are not supported" in text
    assert "2 tensors are not used" in text
    table = lora.table()
    assert f"not supported: {name}.dora_scale (DoRA)" in table
    assert "not matched: text_encoder.layers.0.q_proj.lora_A.weight" in table
    assert f"{QUERY.format(2)}      2" in table


def test_a_lora_that_changes_nothing_is_said(tmp_path):
    tensors = {key: np.zeros_like(t) if "lora_B" in key else t for key, t in good().items()}
    assert "all of its layers change nothing" in read(tmp_path, tensors).summary()[-1]
    tensors |= pair(QUERY.format(1))
    assert "2 of 3 of its layers change nothing" in read(tmp_path, tensors).summary()[-1]
    assert len(read(tmp_path, good()).summary()) == 1


def test_the_size_of_the_change(tmp_path):
    lora = read(tmp_path, good(), {"r": 2, "lora_alpha": 5})
    leaves = tree((lora, 1.0))
    for layer in lora.layers:
        assert layer.change == pytest.approx(np.linalg.norm(delta(leaves, *Q)[layer.layer]), rel=1e-5)


A, B = (f"transformer.{QUERY.format(0)}.lora_{part}.weight" for part in "AB")
ALPHA = f"transformer.{QUERY.format(0)}.alpha"
RANK_2 = {"transformer.r": 2, "transformer.lora_alpha": 2}


@pytest.mark.parametrize(
    ("changes", "metadata", "words"),
    [
        ({B: None}, None, ["no up tensor", A]),
        ({A: None}, None, ["no down tensor", B]),
        ({A: normal(3, WIDTH)}, None, ["do not fit"]),
        ({A: normal(2 * WIDTH)}, None, ["do not fit"]),
        ({A: np.float32(1).reshape(())}, None, ["rank 0"]),
        ({A: normal(0, WIDTH), B: normal(WIDTH, 0)}, None, ["rank 0", "1 to 2048"]),
        ({A: normal(3000, WIDTH), B: normal(WIDTH, 3000)}, None, ["rank 3000"]),
        ({A: np.ones((2, WIDTH), np.int32)}, None, ["int32[2,16]", "floating-point"]),
        ({A: np.full((2, WIDTH), np.nan, np.float32)}, None, ["not finite"]),
        ({A: np.full((2, WIDTH), 3e38, np.float32), B: np.full((WIDTH, 2), 1e30, np.float32)}, None, ["too large"]),
        ({f"base_model.model.{A}": normal(2, WIDTH)}, None, ["two tensors for down"]),
        ({ALPHA: np.float32(0).reshape(())}, None, ["alpha", "above 0"]),
        ({ALPHA: np.float32(-1).reshape(())}, None, ["alpha", "above 0"]),
        ({ALPHA: normal(2)}, None, ["one number"]),
        ({ALPHA: np.ones((), np.int64)}, None, ["floating-point"]),
        ({ALPHA: np.float32(4).reshape(())}, RANK_2, ["4 by its tensor and 2 by the file's header"]),
        ({}, {"transformer.r": 4, "transformer.lora_alpha": 4}, ["rank 2 by its tensors and 4"]),
        ({}, "{", ["not JSON"]),
        ({}, "[" * 100_000, ["not JSON"]),
        ({}, "[1]", ["not a JSON object"]),
        ({}, {"r": "2", "lora_alpha": 2}, ["r in its header"]),
        ({}, {"r": True, "lora_alpha": 2}, ["r in its header"]),
        ({}, {"r": 2.5, "lora_alpha": 2}, ["whole number"]),
        ({}, {"r": 2}, ["lora_alpha in its header is 'None'"]),
        ({}, {"r": 2, "lora_alpha": float("nan")}, ["lora_alpha"]),
        ({}, {"r": 2, "lora_alpha": float("inf")}, ["lora_alpha"]),
        ({}, RANK_2 | {"transformer.alpha_pattern": [1]}, ["alpha_pattern"]),
        ({}, RANK_2 | {"transformer.alpha_pattern": {"to_q": None}}, ["alpha_pattern"]),
        ({}, RANK_2 | {"transformer.alpha_pattern": {"(a+)+": 2}}, ["not supported"]),
        ({}, RANK_2 | {"transformer.alpha_pattern": {".*" * 30: 2}}, ["not supported"]),
        ({}, RANK_2 | {"transformer.rank_pattern": {"to_q": 2.5}}, ["rank_pattern"]),
        ({}, RANK_2 | {"transformer.init_lora_weights": "pissa_niter_4"}, ["'pissa_niter_4'", "does not fit"]),
        ({}, RANK_2 | {"transformer.init_lora_weights": "olora"}, ["'olora'", "path_initial_model"]),
    ],
)
def test_bad_files(tmp_path, changes, metadata, words):
    tensors = {key: tensor for key, tensor in (good() | changes).items() if tensor is not None}
    begin = time.monotonic()
    refused(tmp_path, tensors, *words, metadata=metadata)
    assert time.monotonic() - begin < 5


def test_random_damage(tmp_path):
    """Whatever is changed in a file, it is read or refused in a line."""
    rng = np.random.default_rng(0)
    whole = write(tmp_path / "whole.safetensors", good(), RANK_2).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    messages = []
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            # most of it in the header, where a byte changes more
            data[rng.integers(0, header + 8 if rng.random() < 0.8 else len(data))] = rng.integers(0, 256)
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(data[: rng.integers(0, len(data))] if rng.random() < 0.1 else data)
        try:
            read(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert 50 < len(messages) < 200
    assert not any("\n" in message for message in messages)


def test_finding_the_file(tmp_path):
    def found(path, **options):
        return read_lora(path, transformer_rules(CONFIG), abstract(), **options).location.rsplit("/", 1)[-1]

    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        found(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        found(tmp_path / "absent.safetensors")
    one = write(tmp_path / "one.safetensors", good())
    assert found(tmp_path) == found(one) == "one.safetensors"
    write(tmp_path / "two.safetensors", good())
    with pytest.raises(UserError, match=r"several LoRA files.*one\.safetensors"):
        found(tmp_path)
    assert found(tmp_path, weight_name="two.safetensors") == "two.safetensors"
    with pytest.raises(UserError, match="would not be used"):
        found(one, weight_name="two.safetensors")
    write(tmp_path / "pytorch_lora_weights.safetensors", good())
    assert found(tmp_path) == "pytorch_lora_weights.safetensors"


def test_options(tmp_path):
    assert parse_lora_option("style.safetensors") == ("style.safetensors", 1.0)
    assert parse_lora_option("some/dir:0.75") == ("some/dir", 0.75)
    assert parse_lora_option("a:b:-1") == ("a:b", -1.0)
    odd = tmp_path / "odd:3"
    odd.mkdir()
    assert parse_lora_option(str(odd)) == (str(odd), 1.0)
    for bad in ("", ":1", "a:", "a:much", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="FILE:WEIGHT"):
            parse_lora_option(bad)
