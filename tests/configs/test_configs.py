from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import typing

import jax
import jax.numpy as jnp
import pytest

from configs import DEFAULT_PRESET, PRESETS, load_preset
from configs.changes import CHANGEABLE_ON_RESUME, differing_fields
from configs.published import PUBLISHED_TRANSFORMERS
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    FlowConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)
from configs.serialization import from_dict, to_dict
from sana_jax import UserError
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.nn.remat import REMAT_POLICIES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_know_their_name(name):
    config = load_preset(name)
    assert isinstance(config, RunConfig)
    assert config.preset == name
    assert config.run_dir == f"runs/{name}"


def test_a_preset_that_is_not_there():
    with pytest.raises(UserError, match=r"unknown preset 'digit'.*did you mean digits"):
        load_preset("digit")
    assert DEFAULT_PRESET in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name):
    config = load_preset(name)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(clip_norm=None, frozen=("a/.*", "b")))
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(config))), "config.json")
    assert again == config
    assert hash(again) == hash(config)  # tuples came back as tuples


def test_a_file_of_an_older_version_takes_defaults():
    values = to_dict(load_preset("digits"))
    del values["nonfinite"], values["optimizer"]["beta1"]
    assert from_dict(RunConfig, values, "config.json") == load_preset("digits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(speed=1), "config.json has the unknown field speed; allowed here: preset, run_dir"),
        (lambda v: v["optimizer"].update(beta4=1), "unknown field optimizer.beta4; allowed here: name"),
        (lambda v: v.pop("steps"), "config.json lacks fields: .*steps"),
        (lambda v: v.update(steps="many"), "steps is 'many'"),
        (lambda v: v.update(optimizer=3), "optimizer is 3"),
        (lambda v: v["optimizer"].update(frozen="a"), "optimizer.frozen is 'a'"),
        (lambda v: v["optimizer"].update(schedule="wavy"), "optimizer.schedule is 'wavy'"),
        (lambda v: v["ema"].update(enabled=1), "ema.enabled is 1"),
        (lambda v: v.update(batch_size=None), "batch_size is None"),
        (lambda v: v.update(batch_size=0), "batch-size 0 is not allowed"),
    ],
)
def test_a_damaged_file(change, message):
    values = to_dict(load_preset("digits"))
    change(values)
    with pytest.raises(UserError, match=message):
        from_dict(RunConfig, values, "config.json")


def schema_classes() -> list[type]:
    found, todo = [], [RunConfig]
    while todo:
        config_class = todo.pop()
        found.append(config_class)
        todo += [hint for hint in typing.get_type_hints(config_class).values() if dataclasses.is_dataclass(hint)]
    return found


@pytest.mark.parametrize("config_class", schema_classes())
def test_every_option_has_help(config_class):
    """Either a docstring under the field, or a line of the class's ``Attributes``."""
    assert config_class.__doc__
    body = ast.parse(inspect.getsource(config_class)).body[0].body
    described = set()
    for statement, after in itertools.pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and is_text and len(after.value.value) > 10:
            described.add(statement.target.id)
    for field in dataclasses.fields(config_class):
        is_group = dataclasses.is_dataclass(typing.get_type_hints(config_class)[field.name])
        assert is_group or field.name in described or f"\n        {field.name}: " in config_class.__doc__, field.name


def test_configurations_are_frozen():
    assert all(config_class.__dataclass_params__.frozen for config_class in schema_classes())


def changed(**changes) -> RunConfig:
    return dataclasses.replace(load_preset("digits"), **changes)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"accumulation": 0}, "--accumulation 0"),
        ({"seed": -1}, "--seed -1"),
        ({"max_nonfinite": -1}, "--max-nonfinite -1"),
        ({"checkpoint": CheckpointConfig(keep_every=0)}, "--checkpoint.keep-every 0"),
        ({"flow": FlowConfig(caption_dropout=1.0)}, "--flow.caption-dropout 1.0"),
        ({"flow": FlowConfig(flow_shift=0.0)}, "--flow.flow-shift 0.0"),
        ({"ema": EmaConfig(decay=1.0)}, "--ema.decay 1.0"),
        ({"optimizer": OptimizerConfig(learning_rate=0.0)}, "--optimizer.learning-rate 0.0"),
        ({"optimizer": OptimizerConfig(learning_rate=float("nan"))}, "--optimizer.learning-rate nan"),
        ({"optimizer": OptimizerConfig(warmup_steps=-1)}, "--optimizer.warmup-steps -1"),
        ({"optimizer": OptimizerConfig(beta1=1.0)}, "--optimizer.beta1 1.0"),
        ({"optimizer": OptimizerConfig(beta2=-0.1)}, "--optimizer.beta2 -0.1"),
        ({"optimizer": OptimizerConfig(epsilon=0.0)}, "--optimizer.epsilon 0.0"),
        ({"optimizer": OptimizerConfig(weight_decay=-1.0)}, "--optimizer.weight-decay -1.0"),
        ({"optimizer": OptimizerConfig(clip_norm=0.0)}, "--optimizer.clip-norm 0.0"),
        ({"optimizer": OptimizerConfig(final_learning_rate=1e-5)}, "--optimizer.final-learning-rate 1e-05"),
        (
            {"optimizer": OptimizerConfig(schedule="linear", final_learning_rate=1.0)},
            "--optimizer.final-learning-rate 1.0",
        ),
        ({"mesh": MeshConfig(context=2)}, "--mesh.context 2"),
        ({"preview": PreviewConfig(every=0, at=(3,))}, "--preview.at 3"),
        ({"data": dataclasses.replace(load_preset("digits").data, embedding_dim=64)}, "--data.embedding-dim 64"),
    ],
)
def test_values_that_are_not_allowed(changes, option):
    with pytest.raises(UserError) as caught:
        changed(**changes)
    assert option in str(caught.value)
    assert "allowed" in str(caught.value)


def test_what_a_resumed_run_may_change():
    base = load_preset("digits")
    same = changed(steps=1000, mesh=MeshConfig(fsdp=2), run_dir="elsewhere")
    assert differing_fields(base, same) == {}
    other = changed(seed=3, ema=EmaConfig(decay=0.5), transformer=dataclasses.replace(base.transformer, num_layers=3))
    assert differing_fields(base, other) == {"seed": (0, 3), "ema.decay": (0.99, 0.5), "transformer.num_layers": (4, 3)}
    assert set(CHANGEABLE_ON_RESUME) <= {field.name for field in dataclasses.fields(RunConfig)}


def test_choices_are_those_of_the_library():
    assert set(typing.get_args(typing.get_type_hints(ComputeConfig)["remat"])) == set(REMAT_POLICIES)


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_published_sizes(name):
    published = PUBLISHED_TRANSFORMERS[name]
    config = published.config

    def init():
        guidance = jnp.zeros(1) if config.guidance_embeds else None
        latents, caption = jnp.zeros((1, 1, 1, config.in_channels)), jnp.zeros((1, 1, config.caption_channels))
        return SanaTransformer(config).init(jax.random.key(0), latents, caption, jnp.zeros(1), guidance)["params"]

    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init))) == published.parameters
    assert SanaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
