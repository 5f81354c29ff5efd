"""The networks that can be converted: how their configuration is read, and which table of rules is theirs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax

from kernels.typing import PyTree
from sana_jax.contract import family_name
from sana_jax.errors import UserError
from sana_jax.weights.components import DIFFUSERS_STEM, TRANSFORMERS_STEM
from sana_jax.weights.recognition import looks_like
from sana_jax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class Network:
    """One component's network, of a shape that its configuration gives.

    Attributes:
        class_name: the published class.
        family: "SANA 1.6B", "DC-AE f32c32", ..., or the shape in words.
        config: the configuration, read.
        abstract: our tree of ShapeDtypeStructs.
        rules: the table.
        stem: how the published weight files are called.
        kept: patterns of published tensors that our tree has no place for and an export needs.
        dropped: patterns of published tensors that nobody needs, or that our network has no use for.
        dropped_part: what the latter are, for messages: "the audio half".
    """

    class_name: str
    family: str
    config: Any
    abstract: PyTree
    rules: Sequence[Rule]
    stem: str = DIFFUSERS_STEM
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    dropped_part: str = ""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns of published tensors that are no parameters of ours."""
        return (*self.kept, *self.dropped)


# transformers' configurations name a kind of model in place of a class
_BY_MODEL_TYPE = {
    "gemma2": "Gemma2Model",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3TextModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a ``config.json`` names, in diffusers' or transformers' way."""
    name = config.get("_class_name")
    if isinstance(name, str):
        return name
    return _BY_MODEL_TYPE.get(config.get("model_type"))


def stem_of(class_name: str | None) -> str:
    """How a class's published weight files are called."""
    return TRANSFORMERS_STEM if class_name in _BY_MODEL_TYPE.values() else DIFFUSERS_STEM


# components of our own that a configuration describes in full
WITHOUT_WEIGHTS = ("WordEncoder", "PixelAutoencoder", "PixelVideoAutoencoder")


def is_without_weights(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a component of our own training runs that it describes in full.

    Raises:
        UserError: it is of one, and is damaged.
    """
    from sana_jax.autoencoders.pixel import PixelAutoencoder, PixelVideoAutoencoder
    from sana_jax.text_encoders.words import WordEncoder

    for kind in (WordEncoder, PixelAutoencoder, PixelVideoAutoencoder):
        if config.get("_class_name") == kind.__name__:
            kind.from_config(config)
            return True
    return False


def network_of(config: Mapping[str, Any], where: str, names: Collection[str] = ()) -> Network:
    """The network of a ``config.json``.

    Args:
        config: the parsed file.
        where: the file, for messages.
        names: the weights' names, which say more where the class is not known, or where one class has two spellings.

    Raises:
        UserError: a class without a table, or a configuration that is not one.
    """
    class_name = class_of(config)
    if class_name not in _NETWORKS:
        seen = looks_like(names)
        raise UserError(
            f"{where} is of class {class_name!r}{f', {seen}' if seen else ''}; allowed are {', '.join(_NETWORKS)}: "
            "choose a component of a SANA model"
        )
    try:
        return _NETWORKS[class_name](dict(config), names)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError, MemoryError, RecursionError, ZeroDivisionError) as error:
        # a value that passed the configuration's own checks and has no network, such as one of 10^30 channels
        raise UserError(f"{where} describes no network ({type(error).__name__}: {error}); download it again") from error


def _transformer(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.sana import SanaConfig, SanaTransformer, init_params
    from sana_jax.weights.tables.sana import transformer_rules

    config = SanaConfig.from_dict(values)
    abstract = _shapes_of(SanaTransformer, config, init_params)
    return Network("SanaTransformer2DModel", family_name(config), config, abstract, transformer_rules(config))


def _video_transformer(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer, init_params
    from sana_jax.weights.tables.sana_video import transformer_rules

    config = SanaVideoConfig.from_dict(values)
    abstract = _shapes_of(SanaVideoTransformer, config, init_params)
    return Network("SanaVideoTransformer3DModel", family_name(config), config, abstract, transformer_rules(config))


def _world_model(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, init_params
    from sana_jax.models.sana_wm_config import CLASS_NAME
    from sana_jax.weights.tables.sana_wm import DROPPED, NOT_PARAMETERS, transformer_rules

    config = SanaWMConfig.from_dict(values)
    abstract = _shapes_of(SanaWMTransformer, config, init_params)
    rules = transformer_rules(config, names)
    unused = {"kept": NOT_PARAMETERS, "dropped": DROPPED}
    return Network(CLASS_NAME, family_name(config), config, abstract, rules, **unused)


def _ltx2_transformer(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.ltx2 import LTX2VideoTransformer, init_params
    from sana_jax.models.ltx2_config import LTX2Config
    from sana_jax.weights.tables.ltx2 import AUDIO, transformer_rules

    config = LTX2Config.from_dict(values)
    abstract = _shapes(lambda: init_params(LTX2VideoTransformer(config), jax.random.key(0)))
    family = f"video half of LTX-2 of {config.num_layers} blocks, width {config.inner_dim}"
    audio = {"dropped": AUDIO, "dropped_part": "the audio half"}
    return Network(class_of(values) or "", family, config, abstract, transformer_rules(config), **audio)


def _ltx2_connectors(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.ltx2_connectors import CLASS_NAME, LTX2Connectors, LTX2ConnectorsConfig, init_params
    from sana_jax.weights.tables.ltx2 import AUDIO, connectors_rules

    config = LTX2ConnectorsConfig.from_dict(values)
    abstract = _shapes(lambda: init_params(LTX2Connectors(config), jax.random.key(0)))
    audio = {"dropped": AUDIO, "dropped_part": "the audio connector"}
    family = f"LTX-2's video connector of {config.video_connector_num_layers} blocks, width {config.caption_channels}"
    return Network(CLASS_NAME, family, config, abstract, connectors_rules(config), **audio)


def _controlnet(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.controlnet import SanaControlNet, SanaControlNetConfig, init_controlnet_params
    from sana_jax.weights.tables.sana import controlnet_rules

    config = SanaControlNetConfig.from_dict(values)
    abstract = _shapes_of(SanaControlNet, config, init_controlnet_params)
    return Network("SanaControlNetModel", family_name(config), config, abstract, controlnet_rules(config))


def _autoencoder(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.autoencoders.dc_ae import init_params
    from sana_jax.autoencoders.dc_ae_config import DCAEConfig
    from sana_jax.weights.tables.dc_ae import NOT_PARAMETERS, dc_ae_rules

    config = DCAEConfig.from_dict(values)
    abstract = _shapes(lambda: init_params(config, jax.random.key(0)))
    family = f"DC-AE f{config.spatial_factor}c{config.latent_channels}"
    return Network("AutoencoderDC", family, config, abstract, dc_ae_rules(config), kept=NOT_PARAMETERS)


def _video_autoencoder(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.autoencoders.wan import init_params
    from sana_jax.autoencoders.wan_config import CLASS_NAME, WanConfig
    from sana_jax.weights.tables.wan import wan_rules

    config = WanConfig.from_dict(values)
    abstract = _shapes(lambda: init_params(config, jax.random.key(0)))
    family = f"Wan autoencoder f{config.spatial_factor}t{config.temporal_factor}c{config.z_dim}"
    return Network(CLASS_NAME, family, config, abstract, wan_rules(config))


def _ltx2_autoencoder(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.autoencoders.ltx2 import init_params
    from sana_jax.autoencoders.ltx2_config import CLASS_NAME, LTX2AutoencoderConfig
    from sana_jax.weights.tables.ltx2_vae import ltx2_vae_rules

    config = LTX2AutoencoderConfig.from_dict(values)
    abstract = _shapes(lambda: init_params(config, jax.random.key(0)))
    family = f"LTX-2 autoencoder f{config.spatial_factor}t{config.temporal_factor}c{config.latent_channels}"
    return Network(CLASS_NAME, family, config, abstract, ltx2_vae_rules(config))


def _text_encoder(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.gemma import Gemma, GemmaConfig, init_params
    from sana_jax.weights.tables.gemma import CAUSAL_LM_PREFIX, IGNORED, gemma_rules, name_prefix

    config = GemmaConfig.from_dict(values)
    abstract = _shapes(lambda: init_params(Gemma(config), jax.random.key(0)))
    whole = GemmaConfig()
    published = (config.hidden_size, config.num_hidden_layers) == (whole.hidden_size, whole.num_hidden_layers)
    family = "Gemma-2 2B" if published else f"Gemma-2 of {config.num_hidden_layers} layers, width {config.hidden_size}"
    if names:
        prefix = name_prefix(names)
    else:
        prefix = CAUSAL_LM_PREFIX if "Gemma2ForCausalLM" in (values.get("architectures") or ()) else ""
    rules = gemma_rules(config, prefix)
    return Network("Gemma2Model", family, config, abstract, rules, stem=TRANSFORMERS_STEM, dropped=IGNORED)


def _gemma3(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.gemma import Gemma, init_params
    from sana_jax.models.gemma3_config import WITH_IMAGES, Gemma3Config
    from sana_jax.weights.tables.gemma import GEMMA3_PREFIXES, IGNORED, IMAGE_TOWER, gemma_rules, name_prefix

    config = Gemma3Config.from_dict(values)
    abstract = _shapes(lambda: init_params(Gemma(config), jax.random.key(0)))
    published = (config.hidden_size, config.num_hidden_layers) == (3840, 48)
    family = "Gemma-3 12B" if published else f"Gemma-3 of {config.num_hidden_layers} layers, width {config.hidden_size}"
    class_name = class_of(values) or _BY_MODEL_TYPE[config.model_type]
    by_class = GEMMA3_PREFIXES.get((values.get("architectures") or (class_name,))[0], "")
    rules = gemma_rules(config, name_prefix(names) if names else by_class)
    # the image tower stays as it is, so that an export is the whole model that its config.json describes
    kept = IMAGE_TOWER if values.get("model_type") == WITH_IMAGES else ()
    return Network(class_name, family, config, abstract, rules, stem=TRANSFORMERS_STEM, kept=kept, dropped=IGNORED)


def _image_encoder(values: dict[str, Any], names: Collection[str]) -> Network:
    from sana_jax.models.siglip import SiglipVision, SiglipVisionConfig, init_params
    from sana_jax.weights.tables.siglip import NOT_PARAMETERS, OTHER_TOWER, PREFIX, name_prefix, siglip_rules

    config = SiglipVisionConfig.from_dict(values)
    abstract = _shapes(lambda: init_params(SiglipVision(config), jax.random.key(0)))
    family = (
        f"SigLIP vision of {config.num_hidden_layers} layers, width {config.hidden_size}, {config.image_size} px in "
        f"patches of {config.patch_size}"
    )
    rules = siglip_rules(config, name_prefix(names) if names else PREFIX)
    # the text tower stays as it is, so that an export is the whole SigLIP that its config.json describes
    kept = (*OTHER_TOWER, *NOT_PARAMETERS)
    return Network("SiglipVisionModel", family, config, abstract, rules, stem=TRANSFORMERS_STEM, kept=kept)


_NETWORKS: dict[str | None, Callable[[dict[str, Any], Collection[str]], Network]] = {
    "SanaTransformer2DModel": _transformer,
    "SanaVideoTransformer3DModel": _video_transformer,
    "SanaWMTransformer3DModel": _world_model,
    "SanaControlNetModel": _controlnet,
    "SanaWMLTX2RefinerTransformer3DModel": _ltx2_transformer,
    "LTX2VideoTransformer3DModel": _ltx2_transformer,
    "LTX2TextConnectors": _ltx2_connectors,
    "AutoencoderDC": _autoencoder,
    "AutoencoderKLWan": _video_autoencoder,
    "AutoencoderKLLTX2Video": _ltx2_autoencoder,
    "Gemma2Model": _text_encoder,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Gemma3TextModel": _gemma3,
    "SiglipVisionModel": _image_encoder,
}


def _shapes_of(network: type, config: Any, initialise: Callable[[Any, Any], PyTree]) -> PyTree:
    """``_shapes``, kept: a conversion opens one network several times, and SANA-WM's takes a second."""
    return jax.tree.map(lambda leaf: leaf, _kept_shapes(network, config, initialise))


@functools.lru_cache(maxsize=8)
def _kept_shapes(network: type, config: Any, initialise: Callable[[Any, Any], PyTree]) -> PyTree:
    return _shapes(lambda: initialise(network(config), jax.random.key(0)))


def _shapes(initialise: Callable[[], PyTree]) -> PyTree:
    shapes = jax.eval_shape(initialise)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def parameter_count(tree: PyTree | Iterable[Any]) -> int:
    """The number of parameters of a tree of shapes; the statistics of an autoencoder's latents are none."""
    if isinstance(tree, Mapping):
        tree = {name: branch for name, branch in tree.items() if name != "statistics"}
    count = 0
    for leaf in jax.tree.leaves(tree):
        size = 1
        for length in leaf.shape:
            size *= length
        count += size
    return count
