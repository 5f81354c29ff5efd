"""Gemma-2 beside transformers' implementation: hidden states, half precision, weights in and out."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from sana_jax.errors import UserError
from sana_jax.models.gemma import Gemma, GemmaConfig, init_params, rotary_table
from sana_jax.weights.components import TRANSFORMERS_STEM, open_component
from sana_jax.weights.rules import misfits, places, read_params
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file, write_safetensors
from sana_jax.weights.tables.gemma import IGNORED, gemma_rules, name_prefix
from tests.compiling import AS_USERS_COMPILE
from tests.parity import gemma_oracle as oracle
from tests.weights.written import write_params

OUTPUT_TOLERANCE = 2e-6
# Two compiled forms of one program differ by how their sums are fused.
SAME_PROGRAM_TOLERANCE = 2e-6
BF16_FACTOR = 1.5
PARAMETERS_2B = 2_614_341_888
# For programs of which only values are wanted, not speed: LLVM's optimiser is most of the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def abstract(config: GemmaConfig) -> dict:
    return jax.eval_shape(lambda: init_params(Gemma(config), jax.random.key(0)))


@functools.cache
def params(variant: str, dtype=jnp.float32) -> dict:
    config = oracle.jax_config(variant)
    return oracle.our_params(oracle.torch_model(variant), config, abstract(config), dtype)


@functools.cache
def network(variant: str, dtype=jnp.float32, scan_blocks: bool = True):
    gemma = Gemma(oracle.jax_config(variant), dtype=dtype, scan_blocks=scan_blocks)
    # The first variant is compiled as users compile it.
    as_users = variant == "three layers" and dtype == jnp.float32 and scan_blocks
    options = AS_USERS_COMPILE if as_users else QUICK_COMPILE
    return jax.jit(
        lambda params, ids, mask: gemma.apply({"params": params}, ids, mask, all_hidden_states=True),
        compiler_options=options,
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_hidden_states(variant, masked):
    ids, mask = oracle.draw_ids(300), oracle.MASK if masked else None
    expected, expected_states = oracle.torch_output(variant, ids, mask)
    found, states = network(variant)(params(variant), ids, mask)
    assert np.std(expected) > 0.3
    kept = np.ones_like(ids, bool) if mask is None else mask == 1
    assert oracle.relative_error(found[kept], expected[kept]) <= OUTPUT_TOLERANCE
    for text in range(len(ids)):
        assert oracle.relative_error(found[text][kept[text]], expected[text][kept[text]]) <= OUTPUT_TOLERANCE
    for state, expected_state in zip(states, expected_states):
        assert oracle.relative_error(state[kept], expected_state[kept]) <= OUTPUT_TOLERANCE
    assert np.isfinite(found).all()


@pytest.mark.parametrize("change", [{"sliding_window": 9}, {"attn_logit_softcapping": 45.0}, {"rope_theta": 9900.0}])
def test_a_changed_field_is_noticed(change):
    # each of these changes the result by far more than the tolerance
    variant, ids = "three layers", oracle.draw_ids(300)
    expected, _ = oracle.torch_output(variant, ids, None)
    gemma = Gemma(GemmaConfig(**{**oracle.TINY, **change}))
    found = jax.jit(gemma.apply, compiler_options=QUICK_COMPILE)({"params": params(variant)}, ids)
    assert oracle.relative_error(found, expected) > 50 * OUTPUT_TOLERANCE


def test_long_text():
    # positions far from 0, where the rounding of an angle shows
    variant, ids = "three layers", oracle.draw_ids(300, length=600, batch=1)
    expected, _ = oracle.torch_output(variant, ids, None)
    found, _ = network(variant)(params(variant), ids, None)
    assert oracle.relative_error(found, expected) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("variant", ["three layers", "six heads on two"])
def test_bfloat16(variant):
    ids, kept = oracle.draw_ids(300), oracle.MASK == 1
    exact, _ = oracle.torch_output(variant, ids, oracle.MASK)
    theirs, _ = oracle.torch_output(variant, ids, oracle.MASK, torch.bfloat16)
    ours, _ = network(variant, jnp.bfloat16)(params(variant, jnp.bfloat16), ids, oracle.MASK)
    assert ours.dtype == jnp.bfloat16
    their_error = oracle.relative_error(theirs[kept], exact[kept])
    our_error = oracle.relative_error(np.asarray(ours, np.float32)[kept], exact[kept])
    assert our_error <= BF16_FACTOR * their_error
    assert their_error < 0.1


@pytest.mark.parametrize("variant", ["three layers", "other order of layers"])
def test_scan_and_unrolled_layers_agree(variant):
    ids = oracle.draw_ids(300)
    scanned, scanned_states = network(variant)(params(variant), ids, oracle.MASK)
    unrolled, unrolled_states = network(variant, scan_blocks=False)(params(variant), ids, oracle.MASK)
    assert oracle.relative_error(unrolled, scanned) <= SAME_PROGRAM_TOLERANCE
    assert oracle.relative_error(unrolled_states, scanned_states) <= SAME_PROGRAM_TOLERANCE
    gemma = Gemma(oracle.jax_config(variant))
    alone = jax.jit(gemma.apply, compiler_options=QUICK_COMPILE)({"params": params(variant)}, ids, oracle.MASK)
    assert oracle.relative_error(alone, scanned) <= SAME_PROGRAM_TOLERANCE


def test_what_stands_to_the_right_has_no_influence():
    variant, ids = "three layers", oracle.draw_ids(300, length=40)
    run = network(variant)
    whole, _ = run(params(variant), ids, None)
    other = ids.copy()
    other[:, 20:] = (ids[:, 20:] + 7) % 300
    changed, _ = run(params(variant), other, None)
    np.testing.assert_array_equal(whole[:, :20], changed[:, :20])
    assert oracle.relative_error(changed[:, 20:], whole[:, 20:]) > 0.1
    shorter, _ = run(params(variant), ids[:, :20], None)
    assert oracle.relative_error(shorter, whole[:, :20]) <= SAME_PROGRAM_TOLERANCE


def test_rotary_table_is_float32_of_exact_functions():
    cos, sin = rotary_table(7, 8, 1e4)
    assert cos.shape == sin.shape == (7, 4)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=2e-7)
    np.testing.assert_allclose(sin[3], np.sin(3 * 1e4 ** (-np.arange(4) / 4)), rtol=1e-6)


def test_the_embedding_table_is_not_copied():
    config = GemmaConfig(**{**oracle.TINY, "vocab_size": 100_000})
    table_bytes = 100_000 * config.hidden_size * 4
    shapes, ids = abstract(config), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        gemma = Gemma(config, dtype=dtype)
        compiled = jax.jit(lambda p, i, gemma=gemma: gemma.apply({"params": p}, i)).lower(shapes, ids).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < table_bytes / 2


# --- weights --------------------------------------------------------------------------------------------------------


def test_parameter_count_of_the_2b_model():
    shapes = abstract(GemmaConfig())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS_2B


@pytest.mark.parametrize(("model_class", "prefix"), [(Gemma2Model, ""), (Gemma2ForCausalLM, "model.")])
def test_rules_cover_the_2b_model(model_class, prefix):
    with torch.device("meta"):
        source = oracle.StateDict(model_class(Gemma2Config()).state_dict())
    assert name_prefix(source.tensors) == prefix
    wanted = places(gemma_rules(GemmaConfig(), prefix), abstract(GemmaConfig()))
    assert not misfits(source, wanted, IGNORED)
    expected = 26 * 11 + 2
    assert len(wanted) == expected
    assert len(source.tensors) == expected + (prefix != "")
    # another size does fit in neither direction
    smaller = GemmaConfig(num_hidden_layers=25, intermediate_size=9215)
    problems = misfits(source, places(gemma_rules(smaller, prefix), abstract(smaller)), IGNORED)
    assert len(problems.unexpected) == 11
    assert len(problems.misshapen) == 25 * 3


@pytest.mark.parametrize("language_model", [False, True])
def test_saved_model_is_read_back(tmp_path, language_model):
    variant = "six heads on two"
    model = oracle.torch_model(variant)
    if language_model:
        whole = Gemma2ForCausalLM(oracle.torch_config(variant))
        whole.model.load_state_dict(model.state_dict())
        whole.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        oracle.randomise(Gemma2Model(oracle.torch_config(variant)), list(oracle.VARIANTS).index(variant)).to(
            torch.bfloat16
        ).save_pretrained(tmp_path, max_shard_size="20KB")
    file = find_weights_file(tmp_path, TRANSFORMERS_STEM)
    assert file.suffix == ".json"
    source, config = SafetensorsSource(file), GemmaConfig.from_dict(saved_config(tmp_path))
    assert config.sliding_layers == oracle.jax_config(variant).sliding_layers
    rules = gemma_rules(config, name_prefix(source.tensors))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(config))
    resident = open_component(tmp_path, rules, shapes, stem=TRANSFORMERS_STEM, ignored=IGNORED)
    assert not resident.loaded
    for found, expected in zip(jax.tree.leaves(resident.params), jax.tree.leaves(params(variant, jnp.bfloat16))):
        np.testing.assert_array_equal(found, expected)


def saved_config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_import_and_export_are_bitwise_equal(tmp_path):
    variant = "three layers"
    config = oracle.jax_config(variant)
    oracle.randomise(Gemma2Model(oracle.torch_config(variant)), 5).to(torch.bfloat16).save_pretrained(tmp_path)
    source, rules = SafetensorsSource(tmp_path / "model.safetensors"), gemma_rules(config)
    tree = read_params(source, rules, abstract(config), ignored=IGNORED)
    infos, tensors = write_params(tree, rules)
    (tmp_path / "again").mkdir()
    write_safetensors(tmp_path / "again" / "model.safetensors", infos, tensors)
    again = SafetensorsSource(tmp_path / "again" / "model.safetensors")
    assert again.tensors == source.tensors
    for name in source.tensors:
        assert again.read(name).tobytes() == source.read(name).tobytes()
    (tmp_path / "again" / "config.json").write_text(json.dumps(config.to_dict()))
    model, report = Gemma2Model.from_pretrained(
        tmp_path / "again", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert GemmaConfig.from_dict(model.config.to_dict()) == GemmaConfig.from_dict(
        oracle.torch_config(variant).to_dict()
    )


# --- configurations -------------------------------------------------------------------------------------------------

PUBLISHED = {
    "_name_or_path": "google/gemma-2-2b-it", "architectures": ["Gemma2Model"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip


def test_published_configurations():
    assert GemmaConfig.from_dict(PUBLISHED) == GemmaConfig()
    assert GemmaConfig.from_dict(GemmaConfig().to_dict()) == GemmaConfig()
    # all that the installed transformers would write
    assert GemmaConfig.from_dict(Gemma2Config().to_dict()) == GemmaConfig()
    assert GemmaConfig.from_dict({**PUBLISHED, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}) == (
        GemmaConfig(rope_theta=5e3)
    )
    assert Gemma2Config(**GemmaConfig(rope_theta=5e3).to_dict()).rope_parameters["rope_theta"] == 5e3


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"hidden_size": "2304"}, "hidden_size='2304'"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 2**40}, "hidden_size="),
        ({"num_hidden_layers": 2**20}, "num_hidden_layers="),
        ({"num_attention_heads": 2**20}, "head_dim=256"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": None}, "rope_theta=None"),
        ({"attn_logit_softcapping": [50]}, "attn_logit_softcapping=[50]"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"sliding_window": None}, "sliding_window=None"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": 5}, "layer_types=5"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"altup_num_inputs": 4}, "altup_num_inputs"),
    ],
)
def test_configurations_that_are_not_allowed(changes, part):
    with pytest.raises(UserError) as caught:
        GemmaConfig.from_dict({**PUBLISHED, **changes})
    assert part in str(caught.value)
