"""LoRA files that we write: read back to the bit, taken by diffusers, and the same as PEFT's where PEFT wrote them."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sana_jax import SanaPipeline
from sana_jax.errors import UserError
from sana_jax.lora import init_lora, lora_tree, read_lora, save_lora_weights, scaled_lora, write_lora
from sana_jax.pipelines.opening import abstract_params
from sana_jax.weights.rules import flatten
from sana_jax.weights.tables.sana import transformer_rules
from tests.lora import lora_oracle
from tests.lora.files import CONFIG, QUERY, abstract, good, pair, read, write
from tests.parity import pipeline_oracle as oracle
from tests.parity.sana_oracle import relative_error
from tests.parity.test_pipelines import HEIGHT, LATENTS, SIZE, TEXT, WIDTH, run_theirs

RULES = transformer_rules(CONFIG)
EVERYTHING = ("all_linear_and_pointwise", "patch_embed/proj")


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def trained(shapes, targets=EVERYTHING, rank: int = 3, seed: int = 0):
    """A LoRA as a training leaves it: every value random, without its scale."""
    fresh = init_lora(shapes, targets, rank, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) * 0.4 / leaf.shape[-2] ** 0.5, fresh)


def header_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


def contents(path) -> tuple[dict, dict]:
    """A file's tensors by name, as dtype, shape and bytes, and its header with JSON entries read."""
    tensors = {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in load_file(path).items()}
    return tensors, {key: json.loads(text) if text[0] == "{" else text for key, text in header_of(path).items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("alpha", [None, 5.0, 1.7])
def test_read_back_to_the_bit(tmp_path, dtype, alpha):
    tree = trained(abstract())
    file = save_lora_weights(tmp_path, tree, RULES, abstract(), alpha=alpha, dtype=dtype)
    assert file == tmp_path / lora_oracle.FILE
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    lora = read(tmp_path)
    assert lora.unmatched == lora.unsupported == ()
    assert {layer.alpha for layer in lora.layers} == {alpha or 3}
    assert {layer.down.dtype for layer in lora.layers} == {np.dtype(dtype)}
    stored = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), tree)
    expected = flatten(scaled_lora(stored, (alpha or 3) / 3))
    found = flatten(lora_tree([(lora, 1.0)], abstract()))
    assert set(found) == set(expected)
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])
    # and once more: the file is the same
    again = write_lora(tmp_path / "again.safetensors", lora, RULES, abstract())
    assert contents(again) == contents(file)


def test_header(tmp_path):
    """It named the dropout of the training, with which diffusers then sampled."""
    notes = {"base_model": "org/name", "steps": 7, "targets": ["all_linear"]}
    tree = trained(abstract(), ("attention", "proj_out", "transformer_blocks/ff/conv_point"))
    file = save_lora_weights(tmp_path / "style.safetensors", tree, RULES, abstract(), alpha=6, notes=notes)
    header = header_of(file)
    assert set(header) == {"format", "lora_adapter_metadata", "sana_jax"}
    assert header["format"] == "pt"
    assert json.loads(header["sana_jax"]) == notes
    metadata = json.loads(header["lora_adapter_metadata"])
    assert all(name.startswith("transformer.") for name in metadata)
    told = {name.removeprefix("transformer."): value for name, value in metadata.items()}
    assert (told["r"], told["lora_alpha"], told["lora_dropout"]) == (3, 6, 0.0)
    ends = [f"attn{number}.to_{name}" for number in (1, 2) for name in ("k", "out.0", "q", "v")]
    assert told["target_modules"] == sorted([*ends, "ff.conv_point", "proj_out"])
    assert told["rank_pattern"] == told["alpha_pattern"] == {}
    # a single block's layer is not named by an end that others share
    lora = read(tmp_path, pair(QUERY.format(1)))
    again = write_lora(tmp_path / "one.safetensors", lora, RULES, abstract(), notes={})
    assert json.loads(header_of(again)["sana_jax"]) == {}
    kohya = {"lora_unet_transformer_blocks_1_attn1_to_q.lora_down.weight": np.ones((2, 16), np.float32)}
    kohya |= {"lora_unet_transformer_blocks_1_attn1_to_q.lora_up.weight": np.ones((16, 2), np.float32)}
    kohya |= {"lora_unet_transformer_blocks_1_attn1_to_q.alpha": np.float32(1).reshape(())}
    one = write_lora(tmp_path / "kohya.safetensors", read(tmp_path, kohya), RULES, abstract())
    assert contents(one)[1]["lora_adapter_metadata"]["transformer.target_modules"] == [QUERY.format(1)]
    assert read(one).layers[0].scale == 0.5


CONFIGS = {
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": lora_oracle.ATTENTION},
    "everything": {"r": 4, "lora_alpha": 6, "target_modules": lora_oracle.ALL_LINEAR + lora_oracle.CONV},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.2,
        "target_modules": lora_oracle.ALL_LINEAR,
        "rank_pattern": {"attn1.to_q": 2, "^transformer_blocks.1.attn2.to_k": 7},
        "alpha_pattern": {"attn1.to_q": 1, "to_v": 3},
    },
    "rank-stabilised": {"r": 9, "lora_alpha": 2, "use_rslora": True, "target_modules": lora_oracle.ATTENTION},
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """(theirs, ours), of the same random weights."""
    directory = tmp_path_factory.mktemp("model")
    theirs = oracle.save("sana-1.0", directory)
    return theirs, SanaPipeline.from_pretrained(directory)


def network(ours) -> tuple:
    return transformer_rules(ours.transformer.config), abstract_params(ours.transformer)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_peft_wrote_comes_out_the_same(pipelines, tmp_path, config, metadata):
    theirs, ours = pipelines
    source = lora_oracle.make_lora(theirs, tmp_path / "theirs", CONFIGS[config], metadata=metadata)
    back = write_lora(tmp_path / "back", read_lora(source, *network(ours)), *network(ours))
    assert contents(back) == contents(source / lora_oracle.FILE)


def loaded_without_complaint(pipeline, path, caplog) -> None:
    """diffusers takes the file, uses all of its tensors and misses none."""
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            pipeline.load_lora_weights(path)
    finally:
        logging.disable_propagation()
    assert not caplog.records, caplog.text
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert {f"transformer.{name.replace('.default_0', '')}" for name in loaded} == set(
        load_file(path / lora_oracle.FILE)
    )


@pytest.mark.parametrize("case", ["everything", "attention", "mixed ranks", "kohya's alphas"])
def test_diffusers_draws_the_same(pipelines, tmp_path, caplog, case):
    theirs, ours = pipelines
    rules, shapes = network(ours)
    scale = 5 / 3
    if case in ("everything", "attention"):
        targets = EVERYTHING if case == "everything" else ("attention",)
        tree = trained(shapes, targets)
        save_lora_weights(tmp_path, tree, rules, shapes, alpha=5)
        runtime = scaled_lora(tree, scale)
    else:
        config = {**CONFIGS["patterns"], "lora_alpha": 3}
        source = lora_oracle.make_lora(theirs, tmp_path / "theirs", config)
        if case == "kohya's alphas":

            def rename(key, tensor):
                stem, part = key.removeprefix("transformer.").split(".lora_")
                stem = "lora_unet_" + stem.replace(".", "_")
                pair = (f"{stem}.lora_{'down' if part[0] == 'A' else 'up'}.weight", tensor)
                return [pair, (f"{stem}.alpha", torch.tensor(1.0 + len(stem) % 3))]

            source = lora_oracle.rewrite(source, tmp_path / "kohya", rename)
        lora = read_lora(source, rules, shapes)
        # a header of ours: other ranks and alphas by whole names
        write_lora(tmp_path, type(lora)("", lora.layers), rules, shapes)
        runtime = lora_tree([(lora, 1.0)], shapes)
        if case == "kohya's alphas":
            assert len({layer.alpha for layer in lora.layers}) == 3
    theirs.unload_lora_weights()
    ours.unload_lora_weights()
    arguments = {**TEXT, **SIZE, "num_inference_steps": 2, "latents": oracle.noise(2, HEIGHT, WIDTH, 4)}
    without = ours(**arguments, binning="off", output_type="latent").images
    loaded_without_complaint(theirs, tmp_path, caplog)
    expected = run_theirs(theirs, "latent", **arguments)
    theirs.unload_lora_weights()
    ours.load_lora_weights(tmp_path)
    for path, leaf in flatten(ours._runtime_lora).items():
        np.testing.assert_array_equal(leaf, flatten(runtime)[path])
    found = ours(**arguments, binning="off", output_type="latent").images
    ours.unload_lora_weights()
    assert relative_error(expected, without) > 0.01
    assert relative_error(found, expected) <= LATENTS


def test_refused(tmp_path):
    tree = trained(abstract(), ("attention",))
    for alpha in (0, -1, math.inf, math.nan):
        with pytest.raises(UserError, match="LoRA alpha"):
            save_lora_weights(tmp_path, tree, RULES, abstract(), alpha=alpha)
    with pytest.raises(UserError, match="changes other/layer, which"):
        save_lora_weights(
            tmp_path, {"other": {"layer": tree["transformer_blocks"]["attn1"]["to_q"]}}, RULES, abstract()
        )
    broken = jax.tree.map(lambda leaf: leaf.at[..., 0, 0].set(jnp.nan), tree)
    with pytest.raises(UserError, match="not finite"):
        save_lora_weights(tmp_path, broken, RULES, abstract())
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_not_used_are_said(tmp_path, capsys):
    extra = {"transformer.other.lora_A.weight": np.ones((2, 16), np.float32)}
    source = write(tmp_path / "lora.safetensors", good() | extra, {"transformer.r": 2, "transformer.lora_alpha": 4})
    back = write_lora(tmp_path / "back.safetensors", read(source), RULES, abstract())
    assert "1 tensors that are not used are not written: transformer.other" in capsys.readouterr().out
    assert set(contents(back)[0]) == set(good())
    assert {layer.scale for layer in read(back).layers} == {2.0}
