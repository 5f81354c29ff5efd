"""Every published SANA image transformer, built abstractly, has exactly the published number of parameters."""

import jax
import pytest

from configs.published import PUBLISHED_TRANSFORMERS
from sana_jax.errors import UserError
from sana_jax.models.sana import SanaConfig, SanaTransformer, init_params


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_parameter_count(name):
    published = PUBLISHED_TRANSFORMERS[name]
    shapes = jax.eval_shape(lambda: init_params(SanaTransformer(published.config), jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == published.parameters


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_config_round_trip(name):
    config = PUBLISHED_TRANSFORMERS[name].config
    assert SanaConfig.from_dict(config.to_dict()) == config


def test_older_config_files_lack_newer_fields():
    values = SanaConfig.sana_1600m().to_dict()
    for newer in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"):
        del values[newer]
    assert SanaConfig.from_dict(values) == SanaConfig.sana_1600m()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"qk_norm": "layer_norm"}, "rms_norm_across_heads"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"cross_attention_dim": 7}, "2240"),
    ],
)
def test_impossible_fields_are_named(changes, names):
    with pytest.raises(UserError, match=names):
        SanaConfig(**changes)


def test_unknown_config_field_is_named():
    with pytest.raises(UserError, match="colour"):
        SanaConfig.from_dict({"colour": 3})
