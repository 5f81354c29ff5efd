"""Gemma-3's text tower beside transformers' implementation: all hidden states, weights in and out, configurations."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config as TorchConfig,
)
from transformers import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextModel,
)

from convert.families import network_of
from sana_jax.errors import UserError
from sana_jax.models.gemma import Gemma, init_params
from sana_jax.models.gemma3_config import Gemma3Config
from sana_jax.weights.rules import misfits, places, read_params
from sana_jax.weights.safetensors_files import SafetensorsSource, write_safetensors
from sana_jax.weights.tables.gemma import IGNORED, IMAGE_TOWER, gemma_rules, name_prefix
from tests.parity import gemma_oracle as oracle
from tests.weights.written import write_params

TOLERANCE = 2e-6
BF16_FACTOR = 1.5
PARAMETERS_12B = 11_766_034_176
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

TINY = {
    "head_dim": 10, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "vocab_size": 300, "query_pre_attn_scalar": 14, "sliding_window": 5,
    "max_position_embeddings": 512, "sliding_window_pattern": 3, "rope_local_base_freq": 900.0, "rope_theta": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rms_norm_eps": 1e-4,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
LENGTH, LENGTHS = 23, (9, 23, 1)  # tokens of the three texts, padded to the left
MASK = (np.arange(LENGTH) >= LENGTH - np.array(LENGTHS)[:, None]).astype(np.int32)


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def torch_model(dtype: torch.dtype = torch.float32) -> Gemma3TextModel:
    """Do not change it."""
    config = Gemma3TextConfig(**TINY, attn_implementation="eager")
    return oracle.randomise(Gemma3TextModel(config), 4).to(dtype)


def our_config() -> Gemma3Config:
    return Gemma3Config.from_dict(TINY)


@functools.cache
def abstract(config: Gemma3Config) -> dict:
    return jax.eval_shape(lambda: init_params(Gemma(config), jax.random.key(0)))


@functools.cache
def params(dtype=jnp.float32) -> dict:
    return oracle.our_params(torch_model(), our_config(), abstract(our_config()), dtype)


@functools.cache
def states_program(dtype=jnp.float32, scan_blocks: bool = True, packed_length: int = LENGTH):
    gemma = Gemma(our_config(), dtype=dtype, scan_blocks=scan_blocks)
    return jax.jit(
        lambda params, ids, mask: gemma.apply({"params": params}, ids, mask, packed_length=packed_length),
        compiler_options=QUICK_COMPILE,
    )


@functools.cache
def torch_states(dtype: torch.dtype = torch.float32) -> np.ndarray:
    """All hidden states (B, L, C, layers + 1)."""
    with torch.no_grad():
        out = torch_model(dtype)(
            torch.from_numpy(oracle.draw_ids(300, LENGTH)).long(),
            attention_mask=torch.from_numpy(MASK),
            output_hidden_states=True,
        )
    return np.stack([oracle.to_numpy(state) for state in out.hidden_states], axis=-1)


def test_all_states_packed():
    ids, expected = oracle.draw_ids(300, LENGTH), torch_states()
    found = np.asarray(states_program()(params(), ids, MASK))
    assert found.shape == (3, LENGTH, 24, 5)
    assert np.isfinite(found).all()
    assert np.std(expected[MASK == 1]) > 0.3
    for text, kept in enumerate(MASK == 1):
        for state in range(5):
            assert (
                oracle.relative_error(found[text, kept][..., state], expected[text, kept][..., state]) <= TOLERANCE
            ), (text, state)
    # the last one is after the final norm, unlike what the other forms give between layers
    gemma = Gemma(our_config())
    last, stacked = jax.jit(
        lambda params, ids: gemma.apply({"params": params}, ids, MASK, all_hidden_states=True),
        compiler_options=QUICK_COMPILE,
    )(params(), ids)
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), stacked, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(last, stacked[-1])


def test_padding_need_not_be_run():
    # the last 12 of 23 positions, for the texts that fit there
    ids, rows, run = oracle.draw_ids(300, LENGTH), [0, 2], 12
    expected, kept = torch_states()[rows], MASK[rows] == 1
    given = (ids[rows][:, -run:], MASK[rows][:, -run:])
    found = np.asarray(states_program()(params(), *given))
    assert oracle.relative_error(found[kept], expected[kept]) <= TOLERANCE
    np.testing.assert_array_equal(found[:, :-run], 0)
    # a rotation from position 0 on gives the same up to rounding: positions matter by their differences alone
    shifted = np.asarray(states_program(packed_length=run)(params(), *given))
    assert oracle.relative_error(shifted[kept[:, -run:]], expected[kept]) <= 1e-5


def test_unrolled_layers_and_bfloat16():
    ids, kept, exact = oracle.draw_ids(300, LENGTH), MASK == 1, torch_states()
    unrolled = np.asarray(states_program(scan_blocks=False)(params(), ids, MASK))
    assert oracle.relative_error(unrolled[kept], exact[kept]) <= TOLERANCE
    theirs = torch_states(torch.bfloat16)
    ours = np.asarray(states_program(jnp.bfloat16)(params(jnp.bfloat16), ids, MASK))
    assert ours.dtype == jnp.bfloat16
    # the scaled embedding is one rounding of one product: alike in every bit
    np.testing.assert_array_equal(ours[kept][..., 0].astype(np.float32), theirs[kept][..., 0])
    their_error = oracle.relative_error(theirs[kept], exact[kept])
    assert their_error < 0.1
    assert oracle.relative_error(ours[kept].astype(np.float32), exact[kept]) <= BF16_FACTOR * their_error


@pytest.mark.parametrize(
    "change",
    [{"rope_local_base_freq": 800.0}, {"rope_theta": 9e3}, {"rope_scaling": None}, {"sliding_window": 6},
     {"sliding_window_pattern": 4}],
)  # fmt: skip
def test_a_changed_field_is_noticed(change):
    gemma = Gemma(Gemma3Config.from_dict({**TINY, **change}))
    run = jax.jit(
        lambda params, ids: gemma.apply({"params": params}, ids, MASK, packed_length=LENGTH),
        compiler_options=QUICK_COMPILE,
    )
    found = np.asarray(run(params(), oracle.draw_ids(300, LENGTH)))
    assert oracle.relative_error(found[MASK == 1], torch_states()[MASK == 1]) > 50 * TOLERANCE


def test_the_states_are_held_once():
    config = Gemma3Config(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=24, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    gemma = Gemma(config)
    compiled = (
        jax.jit(lambda params, ids: gemma.apply({"params": params}, ids, packed_length=128))
        .lower(abstract(config), jax.ShapeDtypeStruct((1, 64), jnp.int32))
        .compile()
    )
    memory, states = compiled.memory_analysis(), 128 * 64 * 25 * 4
    assert memory.output_size_in_bytes == states
    assert memory.temp_size_in_bytes < states / 2


# --- weights --------------------------------------------------------------------------------------------------------

PUBLISHED_12B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {**VISION, "model_type": "siglip_vision_model"},
}  # fmt: skip


def test_rules_cover_the_12b_model():
    config = Gemma3Config.from_dict(PUBLISHED_12B)
    assert config.rotation(False) == (1e6, 8.0)
    assert config.rotation(True) == (1e4, 1.0)
    assert config.sliding_layers == tuple((layer + 1) % 6 != 0 for layer in range(48))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config))) == PARAMETERS_12B
    theirs = {key: value for key, value in PUBLISHED_12B.items() if key not in ("architectures", "model_type")}
    for model_class, kind in ((Gemma3ForConditionalGeneration, TorchConfig), (Gemma3ForCausalLM, Gemma3TextConfig)):
        with torch.device("meta"):
            given = theirs if kind is TorchConfig else {**theirs["text_config"]}
            given.pop("model_type", None)
            source = oracle.StateDict(model_class(kind(**given)).state_dict())
        wanted = places(gemma_rules(config, name_prefix(source.tensors)), abstract(config))
        assert len(wanted) == 48 * 13 + 2
        assert not misfits(source, wanted, (*IGNORED, *IMAGE_TOWER))
        assert bool(misfits(source, wanted, IGNORED)) == (kind is TorchConfig)


def save_with_images(directory, vocab_size: int = TINY["vocab_size"]) -> None:
    """A model with an image tower, every weight random, in bfloat16."""
    text = {**TINY, "vocab_size": vocab_size}
    model = Gemma3ForConditionalGeneration(TorchConfig(text_config=text, vision_config=VISION))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(directory)


def test_import_and_export_are_bitwise_equal(tmp_path):
    save_with_images(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    source = SafetensorsSource(tmp_path / "model.safetensors")
    network = network_of(values, "config.json", source.tensors)
    assert network.config == our_config()
    assert network.family == "Gemma-3 of 4 layers, width 24"
    tree = read_params(source, network.rules, network.abstract, ignored=network.ignored)
    again = network_of(values, "config.json")  # as an export sees it, without the published names
    infos, tensors = write_params(tree, again.rules)
    written = dict(tensors)
    assert written.keys() < source.tensors.keys()
    for name, tensor in written.items():
        assert tensor.tobytes() == source.read(name).tobytes()
    others = [name for name in source.tensors if name not in infos]
    assert len(others) > 20
    assert all(name.startswith(("vision_tower.", "multi_modal_projector.")) for name in others)
    # a text model's own files, which transformers reads
    infos, tensors = write_params(tree, gemma_rules(network.config))
    (tmp_path / "text").mkdir()
    write_safetensors(tmp_path / "text" / "model.safetensors", infos, tensors)
    (tmp_path / "text" / "config.json").write_text(json.dumps(network.config.to_dict()))
    model, report = Gemma3TextModel.from_pretrained(tmp_path / "text", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert Gemma3Config.from_dict(model.config.to_dict()) == network.config


# --- configurations -------------------------------------------------------------------------------------------------


def test_published_configurations():
    assert Gemma3Config.from_dict(Gemma3TextConfig().to_dict()) == Gemma3Config()
    assert Gemma3Config.from_dict(Gemma3TextConfig(**TINY).to_dict()) == our_config()
    assert Gemma3Config.from_dict(our_config().to_dict()) == our_config()
    whole = TorchConfig(text_config={**TINY}, vision_config=VISION).to_dict()
    assert Gemma3Config.from_dict(whole) == our_config()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "gemma3", "text_config": None}, "text_config=None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "beta": 1}}, "beta"),
        ({"rope_scaling": 8}, "rope_scaling=8"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention"),
        ({"rope_local_base_freq": -1}, "rope_local_base_freq=-1"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"altup_num_inputs": 4}, "altup_num_inputs"),
    ],
)
def test_configurations_that_are_not_allowed(changes, part):
    with pytest.raises(UserError) as caught:
        Gemma3Config.from_dict({**TINY, **changes})
    assert part in str(caught.value)
