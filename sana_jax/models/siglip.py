"""SigLIP's vision tower: a picture to one vector, or to one vector per patch. The layers are the text tower's too.

Papers: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786; its checkpoints of one fixed resolution have the same
network). Field names and parameter names are those of the published transformers checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax_attention import softmax_attention
from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.nn.initializers import scaled_normal, xavier_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.norms import layer_norm

WHOLE_MODEL, VISION_MODEL = "siglip", "siglip_vision_model"  # transformers' model_type
_NATIVE_RESOLUTION = ("siglip2", "siglip2_vision_model")
ACTIVATION = "gelu_pytorch_tanh"
_LABEL = "image encoder config"
# Larger numbers are a damaged file, and describing their arrays could take for ever.
_LARGEST, _MOST_LAYERS = 1 << 16, 1 << 10
# What transformers writes into every config.json, or what belongs to training and to classification.
_WITHOUT_EFFECT = frozenset({
    "add_cross_attention", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label",
    "initializer_factor", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict", "sep_token_id",
    "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_bfloat16",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """Shape of one vision tower; the defaults are those of transformers, SigLIP base at 224 px in patches of 16.

    Attributes:
        hidden_size: width D of the token stream, and size of the pooled vector.
        intermediate_size: hidden width of the MLPs.
        num_hidden_layers: layers.
        num_attention_heads: heads.
        num_channels: of the pictures.
        image_size: pixels per side.
        patch_size: pixels per side of a patch; what is left over at the right and at the bottom is not seen.
        hidden_act: ``gelu_pytorch_tanh``.
        layer_norm_eps: epsilon of the norms.
        vision_use_head: whether there is the attention pooling that makes the one vector.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = ACTIVATION
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True

    def __post_init__(self):
        check_tower(self, _LARGEST, _not_allowed)
        if self.patch_size > self.image_size:
            raise _not_allowed("patch_size", self.patch_size, f"up to image_size, {self.image_size}")
        if type(self.vision_use_head) is not bool:
            raise _not_allowed("vision_use_head", self.vision_use_head, "true or false")

    @property
    def patches_per_side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a picture, N."""
        return self.patches_per_side**2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SiglipVisionConfig:
        """Reads a published ``config.json``, of a whole SigLIP or of its vision tower alone.

        Missing keys keep the default, as in transformers; keys without effect on the result are passed over.

        Raises:
            UserError: another kind of model, a value that is not allowed, or a key that is not known here.
        """
        kind = values.get("model_type", VISION_MODEL)
        if kind in _NATIVE_RESOLUTION:
            raise _not_allowed(
                "model_type", kind, "a SigLIP 2 of one fixed resolution, which calls itself siglip: choose that"
            )
        if kind not in (WHOLE_MODEL, VISION_MODEL):
            raise _not_allowed("model_type", kind, f"{WHOLE_MODEL} or {VISION_MODEL}: choose such a model")
        return cls(**tower_fields(values, "vision_config", cls, _LABEL))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` of a vision tower has them; transformers reads it as well."""
        return {"architectures": ["SiglipVisionModel"], "model_type": VISION_MODEL, **dataclasses.asdict(self)}


def tower_fields(values: dict[str, Any], section: str, config_class: type, label: str) -> dict[str, Any]:
    """The fields of a tower that a published ``config.json`` gives.

    Args:
        values: of a whole SigLIP, or of the tower alone.
        section: the key that a whole SigLIP has the tower under.
        config_class: dataclass of the fields.
        label: what errors call the values.

    Raises:
        UserError: a section that is no object, or a key that is neither a field nor without effect.
    """
    if values.get("model_type") == WHOLE_MODEL or section in values:
        values = values.get(section) or {}
        if not isinstance(values, dict):
            raise tower_error(label, section, values, "an object")
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    fields = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(given) - fields - _WITHOUT_EFFECT):
        raise UserError(
            f"{label} has unknown fields {unknown}, which could change the network; SigLIP's are {sorted(fields)}: "
            "remove the others"
        )
    return {key: value for key, value in given.items() if key in fields}


def check_tower(config: Any, largest: int, not_allowed: Callable[[str, Any, str], UserError]) -> None:
    """Raises what ``not_allowed`` makes of the first field, of those that both towers have, with a wrong value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (type(value) is not int or not 1 <= value <= largest):
            raise not_allowed(field.name, value, f"a whole number from 1 to {largest}")
    if config.num_hidden_layers > _MOST_LAYERS:
        raise not_allowed("num_hidden_layers", config.num_hidden_layers, f"up to {_MOST_LAYERS}")
    if config.hidden_size % config.num_attention_heads:
        raise not_allowed("num_attention_heads", config.num_attention_heads, f"a divisor of {config.hidden_size}")
    if config.hidden_act != ACTIVATION:
        raise not_allowed("hidden_act", config.hidden_act, ACTIVATION)
    if type(config.layer_norm_eps) not in (int, float) or not 0 < config.layer_norm_eps < 1:
        raise not_allowed("layer_norm_eps", config.layer_norm_eps, "a number between 0 and 1")


def tower_error(label: str, name: str, value: Any, allowed: str) -> UserError:
    """The error about one value of a tower's configuration."""
    return UserError(f"{label}: {name}={value!r} is not allowed; allowed is {allowed}: mend its config.json")


_not_allowed = functools.partial(tower_error, _LABEL)


def init_params(vision: SiglipVision, key: PRNGKeyArray) -> PyTree:
    """Random parameters; under ``jax.eval_shape`` their shapes alone."""
    side, channels = vision.config.image_size, vision.config.num_channels
    return vision.init(key, jnp.zeros((1, side, side, channels)))["params"]


class ImageFeatures(NamedTuple):
    """What the tower sees in pictures: a vector per patch, row by row, and one for the whole, if it has the head."""

    patches: Float[Array, "B N D"]
    pooled: Float[Array, "B D"] | None


class LayerNorm(nn.Module):
    """Layer normalisation with scale and shift, in float32, rounded once to ``x``'s dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        return (layer_norm(x, self.epsilon) * scale + bias).astype(x.dtype)


class SiglipAttention(nn.Module):
    """Softmax attention of every token to every token."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Attends."""
        batch, tokens, features = x.shape
        heads = (batch, tokens, self.num_heads, features // self.num_heads)

        def project(name: str) -> Float[Array, "B N h d"]:
            return dense(features, self.dtype, name)(x).reshape(heads)

        # The default scale is 1/sqrt(d); logits and softmax are float32 inside.
        attended = softmax_attention(project("q_proj"), project("k_proj"), project("v_proj"))
        return dense(features, self.dtype, "out_proj")(attended.reshape(batch, tokens, features))


class SiglipMLP(nn.Module):
    """Linear -> GELU (tanh form) -> Linear."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Mixes channels."""
        hidden = jax.nn.gelu(dense(self.hidden, self.dtype, "fc1")(x), approximate=True)
        return dense(x.shape[-1], self.dtype, "fc2")(hidden)


class SiglipLayer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual around it; ``config`` is either tower's."""

    config: Any
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Runs the layer."""
        cfg = self.config
        attention = SiglipAttention(cfg.num_attention_heads, self.dtype, name="self_attn")
        x = x + attention(LayerNorm(cfg.layer_norm_eps, name="layer_norm1")(x))
        mlp = SiglipMLP(cfg.intermediate_size, self.dtype, name="mlp")
        return x + mlp(LayerNorm(cfg.layer_norm_eps, name="layer_norm2")(x))


class AttentionPooling(nn.Module):
    """One learned query that attends to all patches, then an MLP with a residual: the picture's one vector."""

    config: SiglipVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        """Pools."""
        cfg, (batch, _, features) = self.config, patches.shape
        probe = self.param("probe", scaled_normal(features**-0.5), (1, 1, features), jnp.float32)
        attended = _PoolingAttention(cfg.num_attention_heads, self.dtype, name="attention")(
            jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, features)), patches
        )
        mixed = SiglipMLP(cfg.intermediate_size, self.dtype, name="mlp")(
            LayerNorm(cfg.layer_norm_eps, name="layernorm")(attended)
        )
        return (attended + mixed)[:, 0]


class _PoolingAttention(nn.Module):
    """PyTorch's multi-head attention: one kernel holds the projections of queries, keys and values side by side."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, query: Float[Array, "B M D"], patches: Float[Array, "B N D"]) -> Float[Array, "B M D"]:
        features = patches.shape[-1]
        # Two products instead of one: queries come from another place than keys and values.
        in_proj = dense(3 * features, self.dtype, "in_proj")
        query, (key, value) = in_proj(query)[..., :features], jnp.split(in_proj(patches)[..., features:], 2, axis=-1)
        heads = (self.num_heads, features // self.num_heads)
        query, key, value = (array.reshape(*array.shape[:2], *heads) for array in (query, key, value))
        attended = softmax_attention(query, key, value)
        return dense(features, self.dtype, "out_proj")(attended.reshape(*attended.shape[:2], features))


def dense(features: int, dtype: jnp.dtype, name: str) -> Linear:
    """A layer with bias."""
    return Linear(features, dtype=dtype, kernel_init=xavier_uniform(), name=name)


class SiglipVision(nn.Module):
    """The vision tower. Parameters of the layers are stacked on a leading axis under ``layers``, in both forms below.

    Attributes:
        config: the shape.
        dtype: compute dtype, float32 or bfloat16; norms, logits and softmax run in float32.
        scan_blocks: True compiles one layer and scans it; False unrolls the layers, for debugging. Equal outputs.
    """

    config: SiglipVisionConfig
    dtype: jnp.dtype = jnp.float32
    scan_blocks: bool = True

    @nn.compact
    def __call__(self, pictures: Float[Array, "B H W C"]) -> ImageFeatures:
        """Runs the network on pictures of ``image_size`` pixels per side, channels-last, normalised.

        Raises:
            UserError: pictures of another shape.
        """
        cfg = self.config
        if pictures.ndim != 4 or pictures.shape[1:] != (cfg.image_size, cfg.image_size, cfg.num_channels):
            raise UserError(
                f"pictures of shape {pictures.shape}; this image encoder takes (B, {cfg.image_size}, {cfg.image_size}, "
                f"{cfg.num_channels}): resize them"
            )
        x = _PatchEmbeddings(cfg, self.dtype, name="embeddings")(pictures)
        x = run_layers(self, x)
        patches = LayerNorm(cfg.layer_norm_eps, name="post_layernorm")(x)
        pooled = AttentionPooling(cfg, self.dtype, name="head")(patches) if cfg.vision_use_head else None
        return ImageFeatures(patches, pooled)


def run_layers(tower: Any, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """All layers of a tower, called in its ``__call__``; they are its ``layers``."""
    cfg = tower.config
    if tower.scan_blocks or tower.is_initializing():
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(SiglipLayer(cfg, tower.dtype, name="layers"), x, None)[0]
    stacked, layer = tower.variables["params"]["layers"], SiglipLayer(cfg, tower.dtype, parent=None)
    for index in range(cfg.num_hidden_layers):
        x = layer.apply({"params": jax.tree.map(lambda array, index=index: array[index], stacked)}, x)
    return x


class _PatchEmbeddings(nn.Module):
    """A convolution of stride ``patch_size`` as one product over each patch's values, and a learned position."""

    config: SiglipVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pictures: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        cfg, batch = self.config, pictures.shape[0]
        side, p, channels = cfg.patches_per_side, cfg.patch_size, cfg.num_channels
        seen = pictures[:, : side * p, : side * p].reshape(batch, side, p, side, p, channels)
        seen = seen.swapaxes(2, 3).reshape(batch, cfg.num_patches, p * p * channels)
        position = self.param(
            "position_embedding", scaled_normal(cfg.hidden_size**-0.5), (cfg.num_patches, cfg.hidden_size), jnp.float32
        )
        return dense(cfg.hidden_size, self.dtype, "patch_embedding")(seen) + position.astype(self.dtype)
