"""What belongs to a transformer's configuration: the network, its initial parameters, its table of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.models import sana, sana_video, sana_wm
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from sana_jax.weights.rules import Rule
from sana_jax.weights.tables import sana as sana_table
from sana_jax.weights.tables import sana_wm as wm_table

TransformerConfig = SanaConfig | SanaVideoConfig | SanaWMConfig
Transformer = SanaTransformer | SanaVideoTransformer | SanaWMTransformer

IMAGE_TRANSFORMER, VIDEO_TRANSFORMER = "SanaTransformer2DModel", "SanaVideoTransformer3DModel"
WORLD_TRANSFORMER = "SanaWMTransformer3DModel"


class Family(NamedTuple):
    """One kind of transformer.

    Attributes:
        config: the class of its configuration.
        transformer: the class of the network.
        init_params: (network, key) -> its initial parameters.
        rules: (configuration, names of the checkpoint's tensors) -> the table of its weights.
        ignored: patterns of published tensors that are no parameters.
    """

    config: type
    transformer: type
    init_params: Callable[[Any, Any], PyTree]
    rules: Callable[[Any, Collection[str]], tuple[Rule, ...]]
    ignored: tuple[str, ...] = ()


def _image_rules(config: SanaConfig, names: Collection[str]) -> tuple[Rule, ...]:
    return sana_table.transformer_rules(config)


def _video_rules(config: SanaVideoConfig, names: Collection[str]) -> tuple[Rule, ...]:
    from sana_jax.weights.tables.sana_video import transformer_rules

    return transformer_rules(config)


# by the published class
FAMILIES = {
    IMAGE_TRANSFORMER: Family(SanaConfig, SanaTransformer, sana.init_params, _image_rules),
    VIDEO_TRANSFORMER: Family(SanaVideoConfig, SanaVideoTransformer, sana_video.init_params, _video_rules),
    WORLD_TRANSFORMER: Family(
        SanaWMConfig,
        SanaWMTransformer,
        sana_wm.init_params,
        wm_table.transformer_rules,
        (*wm_table.NOT_PARAMETERS, *wm_table.DROPPED),
    ),
}


def family_of(config: TransformerConfig) -> Family:
    """The family of a configuration."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))


def make_transformer(
    config: TransformerConfig, dtype: Any = jnp.float32, emulate_fp16_saturation: bool = False
) -> Transformer:
    """The network of a configuration.

    Raises:
        UserError: float16's saturation for a video model, none of which was trained with it.
    """
    if isinstance(config, SanaConfig):
        return SanaTransformer(config, dtype=dtype, fp16_saturation=emulate_fp16_saturation)
    if emulate_fp16_saturation:
        raise UserError(
            "--emulate-fp16-saturation: video models were not trained with float16's saturation; leave the option out"
        )
    return family_of(config).transformer(config, dtype=dtype)


def abstract_params(transformer: Transformer, dtype: Any = jnp.float32) -> PyTree:
    """Shapes of a transformer's parameters, as ``ShapeDtypeStruct``s of ``dtype``; nothing is computed."""
    initial = family_of(transformer.config).init_params
    shapes = jax.eval_shape(lambda: initial(transformer, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def rules_of(config: TransformerConfig, names: Collection[str] = ()) -> tuple[Rule, ...]:
    """The table of a transformer's weights; ``names`` of its tensors tell where one network has several spellings."""
    return family_of(config).rules(config, names)
