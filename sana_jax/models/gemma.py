"""Gemma-2 and Gemma-3 without their language-model head: the text encoders of the SANA family, top to bottom.

Reports: Gemma 2 (arXiv 2408.00118), Gemma 3 (arXiv 2503.19786), whose configuration is in ``gemma3_config.py``. Field
names and parameter names are those of the published transformers checkpoints; the output is the last hidden state
after the final norm, or the states of all layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.softmax_attention import softmax_attention
from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.nn.activations import gelu_tanh
from sana_jax.nn.initializers import scaled_normal
from sana_jax.nn.linear import Linear

SLIDING, FULL = "sliding_attention", "full_attention"
_ACTIVATION = "gelu_pytorch_tanh"
# Larger numbers are a damaged file, and describing their arrays could take for ever.
_LARGEST, _MOST_LAYERS = 1 << 20, 1 << 10
# What transformers writes into every config.json, or what belongs to generation, training and the language-model head.
WITHOUT_EFFECT = frozenset({
    "add_cross_attention", "architectures", "attention_dropout", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "eos_token_id",
    "final_logit_softcapping", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "hidden_act",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict",
    "sep_token_id", "sliding_window_size", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
})  # fmt: skip
# Keys that would change the network, with the values that leave it as it is here.
_ALLOWED_VALUES = {
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
    "pruned_heads": ({}, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Shape of one Gemma-2; the defaults are Gemma-2 2B, the text encoder of every SANA.

    Attributes:
        vocab_size: rows of the embedding table.
        hidden_size: width D of the token stream.
        intermediate_size: width of the gated feed-forward network.
        num_hidden_layers: layers.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of keys and values, each shared by as many heads of queries.
        head_dim: size of a head.
        hidden_activation: ``gelu_pytorch_tanh``.
        max_position_embeddings: the longest text the model was trained on.
        rms_norm_eps: epsilon of the norms.
        rope_theta: base of the rotary position embedding.
        query_pre_attn_scalar: logits are divided by its square root.
        sliding_window: how many tokens a sliding layer sees, the token itself included.
        layer_types: ``sliding_attention`` or ``full_attention`` for each layer; None alternates, sliding first.
        attn_logit_softcapping: logits are kept within ± this by a tanh; None leaves them.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = _ACTIVATION
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    layer_types: tuple[str, ...] | None = None
    attn_logit_softcapping: float | None = 50.0

    model_type: ClassVar[str] = "gemma2"
    family: ClassVar[str] = "Gemma-2"
    # whether queries and keys are normalised, head by head, before they are rotated
    qk_norm: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or not 1 <= value <= _LARGEST):
                raise not_allowed(field.name, value, f"a whole number from 1 to {_LARGEST}")
            optional = value is None and "None" in field.type
            if field.type.startswith("float") and not optional and not positive_number(value):
                raise not_allowed(field.name, value, "a finite number above 0")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise not_allowed("num_hidden_layers", self.num_hidden_layers, f"up to {_MOST_LAYERS}")
        if self.num_attention_heads * self.head_dim > _LARGEST:
            raise not_allowed("head_dim", self.head_dim, f"up to {_LARGEST} channels of all heads")
        if self.hidden_activation != _ACTIVATION:
            raise not_allowed("hidden_activation", self.hidden_activation, _ACTIVATION)
        if self.num_attention_heads % self.num_key_value_heads:
            raise not_allowed(
                "num_key_value_heads", self.num_key_value_heads, f"a divisor of the {self.num_attention_heads} heads"
            )
        if self.head_dim % 2:
            raise not_allowed("head_dim", self.head_dim, "an even number, since positions rotate pairs of channels")
        if self.layer_types is not None:
            types = self.layer_types
            known = isinstance(types, (list, tuple)) and all(kind in (SLIDING, FULL) for kind in types)
            if not known or len(types) != self.num_hidden_layers:
                raise not_allowed("layer_types", types, f"{self.num_hidden_layers} times {SLIDING} or {FULL}")
            # One form for one network: transformers 5 writes the usual order out.
            usual = all((kind == SLIDING) == self.usually_slides(layer) for layer, kind in enumerate(types))
            object.__setattr__(self, "layer_types", None if usual else tuple(types))

    def usually_slides(self, layer: int) -> bool:
        """Whether a layer sees a window only where ``layer_types`` does not say."""
        return layer % 2 == 0

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """Which layers see a window only."""
        if self.layer_types is None:
            return tuple(self.usually_slides(layer) for layer in range(self.num_hidden_layers))
        return tuple(kind == SLIDING for kind in self.layer_types)

    def rotation(self, sliding: bool) -> tuple[float, float]:
        """(theta, linear factor that positions are divided by) of a layer's rotary position embedding."""
        del sliding  # one for all layers
        return self.rope_theta, 1.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GemmaConfig:
        """Reads a published ``config.json``.

        Keys without effect on the hidden states are passed over; missing ones keep the default, as transformers does.

        Raises:
            UserError: another kind of model, a value of the wrong type, or a key that could change the network and is
                not known here.
        """
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        if given.get("model_type", cls.model_type) != cls.model_type:
            raise not_allowed(
                "model_type", given["model_type"], f"{cls.model_type}: choose a model with this text encoder"
            )
        given = cls._read_rotation(given)
        for key, allowed in _ALLOWED_VALUES.items():
            if key in given and given.pop(key) not in allowed:
                raise not_allowed(key, values[key], " or ".join(map(str, allowed)))
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - fields - WITHOUT_EFFECT):
            raise UserError(
                f"text encoder config has unknown fields {unknown}, which could change the network; {cls.family}'s are "
                f"{sorted(fields)}: remove the others"
            )
        return cls(**{key: value for key, value in given.items() if key in fields})

    @classmethod
    def _read_rotation(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The file's values with those of the rotary position embedding as fields."""
        rope = given.pop("rope_parameters", None)
        if rope is not None:
            # how transformers 5 writes rope_theta
            plain = isinstance(rope, dict) and set(rope) <= {"rope_theta", "rope_type"}
            if not plain or rope.get("rope_type", "default") != "default":
                raise not_allowed("rope_parameters", rope, "rope_theta, and rope_type 'default'")
            given = {**given, **{key: value for key, value in rope.items() if key == "rope_theta"}}
        return given

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them; transformers reads it as well."""
        fields = dataclasses.asdict(self)
        if self.layer_types is None:
            del fields["layer_types"]
        else:
            fields["layer_types"] = list(self.layer_types)
        return {"architectures": ["Gemma2Model"], "model_type": self.model_type, **fields}


def positive_number(value: Any) -> bool:
    """Whether a field's value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < float("inf")


def not_allowed(name: str, value: Any, allowed: str) -> UserError:
    """The error for a field's value; ``allowed`` says what it may be."""
    return UserError(
        f"text encoder config: {name}={value!r} is not allowed; allowed is {allowed}: mend its config.json"
    )


def init_params(gemma: Gemma, key: PRNGKeyArray) -> PyTree:
    """Random parameters; under ``jax.eval_shape`` their shapes alone."""
    return gemma.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


class GemmaRMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + ε) · (1 + scale)`` in float32, rounded once to ``x``'s dtype; the scale starts at 0."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B L *rest"]) -> Float[Array, "B L *rest"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


def rotary_table(
    length: int, head_dim: int, theta: float, *, factor: float = 1.0, first: int = 0
) -> Float[np.ndarray, "2 L half"]:
    """Cosine and sine of ``position / factor · theta^(-2k / head_dim)``, (2, length, head_dim / 2), float32.

    Positions run from ``first``.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Powers and their reciprocals each rounded to float32, as the published weights have met them.
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers / np.float32(factor)
    angles = (np.arange(first, first + length, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x: Float[Array, "B L h d"], table: Float[Array, "2 L half"]) -> Float[Array, "B L h d"]:
    """Rotates channel k together with channel k + d/2 by the position's angle, in float32."""
    cos, sin = table[0][:, None], table[1][:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class GemmaAttention(nn.Module):
    """Softmax attention; several heads of queries share one of keys and values.

    Gemma-2 caps the logits; Gemma-3 normalises queries and keys instead.
    """

    config: GemmaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], table: Float[Array, "2 L half"], visible: Bool[Array, "B L L"]
    ) -> Float[Array, "B L D"]:
        """Attends from every token (axis 1 of ``visible``) to the tokens that it sees (axis 2)."""
        cfg, (batch, length, features) = self.config, x.shape

        def project(name: str, heads: int) -> Float[Array, "B L h d"]:
            return _dense(heads * cfg.head_dim, self.dtype, name)(x).reshape(batch, length, heads, cfg.head_dim)

        def normalise(x: Float[Array, "B L h d"], name: str) -> Float[Array, "B L h d"]:
            return GemmaRMSNorm(cfg.rms_norm_eps, name=name)(x) if cfg.qk_norm else x

        kv_heads = cfg.num_key_value_heads
        query = rotate(normalise(project("q_proj", cfg.num_attention_heads), "q_norm"), table)
        key = rotate(normalise(project("k_proj", kv_heads), "k_norm"), table)
        value = project("v_proj", kv_heads)
        # No mask but a bias that swallows any logit: padding that sees nothing has the mean of all values.
        bias = jnp.where(visible[:, None], 0.0, jnp.finfo(jnp.float32).min)
        scale, soft_cap = cfg.query_pre_attn_scalar**-0.5, cfg.attn_logit_softcapping
        attended = softmax_attention(query, key, value, bias=bias, scale=scale, soft_cap=soft_cap)
        return _dense(features, self.dtype, "o_proj")(attended.reshape(batch, length, -1))


class GemmaMLP(nn.Module):
    """``down(gelu(gate(x)) · up(x))``, gelu in its tanh form."""

    config: GemmaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Mixes channels."""
        hidden = self.config.intermediate_size
        gate = gelu_tanh(_dense(hidden, self.dtype, "gate_proj")(x))
        return _dense(x.shape[-1], self.dtype, "down_proj")(gate * _dense(hidden, self.dtype, "up_proj")(x))


def _dense(features: int, dtype: jnp.dtype, name: str) -> Linear:
    return Linear(features, use_bias=False, dtype=dtype, kernel_init=scaled_normal(0.02), name=name)


class GemmaLayer(nn.Module):
    """Attention and feed-forward network, each with a norm before it and one after it."""

    config: GemmaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        sliding: Bool[Array, ""],
        tables: Float[Array, "2 2 L half"],
        visible: Bool[Array, "B L L"],
        within_window: Bool[Array, "L L"],
    ) -> Float[Array, "B L D"]:
        """Runs the layer; ``sliding`` says whether it sees ``within_window`` only and takes the second table."""

        def norm(name: str) -> GemmaRMSNorm:
            return GemmaRMSNorm(self.config.rms_norm_eps, name=name)

        seen = visible & (within_window | ~sliding)
        table = jnp.where(sliding, tables[1], tables[0])
        attended = GemmaAttention(self.config, self.dtype, name="self_attn")(norm("input_layernorm")(x), table, seen)
        x = x + norm("post_attention_layernorm")(attended)
        mixed = GemmaMLP(self.config, self.dtype, name="mlp")(norm("pre_feedforward_layernorm")(x))
        return x + norm("post_feedforward_layernorm")(mixed)


def embed_tokens(
    config: GemmaConfig, table: Float[Array, "V D"], input_ids: Int[Array, "B L"], dtype: jnp.dtype
) -> Float[Array, "B L D"]:
    """The tokens' rows of the table times sqrt(D), which is rounded to the compute dtype."""
    # Rows are taken before anything is cast: the table is the largest array of the network.
    return table[input_ids].astype(dtype) * jnp.asarray(config.hidden_size**0.5, dtype)


def shared_by_layers(
    config: GemmaConfig, length: int, attention_mask: Int[Array, "B L"] | None = None, first_position: int = 0
) -> tuple[Float[Array, "2 2 L half"], Bool[Array, "B L L"], Bool[Array, "L L"]]:
    """What every layer is given besides ``x`` and its kind: rotations, what a token sees, and what is in its window.

    Rotations are those of layers that see everything, then those of layers that see a window.
    """
    position = np.arange(length)
    distance = position[:, None] - position
    visible = jnp.asarray(distance >= 0)[None]
    if attention_mask is not None:
        visible = visible & (attention_mask != 0)[:, None, :]
    kinds = [config.rotation(sliding) for sliding in (False, True)]
    tables = [rotary_table(length, config.head_dim, theta, factor=by, first=first_position) for theta, by in kinds]
    return jnp.asarray(np.stack(tables)), visible, jnp.asarray(distance < config.sliding_window)


def empty_states(config: GemmaConfig, batch: int, length: int, dtype: jnp.dtype) -> Float[Array, "B M D layers1"]:
    """Room for what goes into every layer and the result, the layers on the last axis: M tokens, all zero."""
    return jnp.zeros((batch, length, config.hidden_size, config.num_hidden_layers + 1), dtype)


def pack_state(
    packed: Float[Array, "B M D layers1"], x: Float[Array, "B L D"], layer: Int[Array, ""] | int
) -> Float[Array, "B M D layers1"]:
    """Writes ``x`` as the state of ``layer`` of the last L tokens."""
    first = packed.shape[1] - x.shape[1]
    return jax.lax.dynamic_update_slice(packed, x[..., None].astype(packed.dtype), (0, first, 0, layer))


def split_layers(stacked: PyTree) -> list[PyTree]:
    """Each layer's parameters out of the stacked ones, on a CPU and in place: nothing is copied.

    XLA copies a layer's weights out of the stacked ones before it multiplies with them, 0.3 GB for each layer of the
    2B model. On an accelerator that does not show; on a CPU it takes half as long as a short text's products.
    """
    leaves, structure = jax.tree.flatten(stacked)
    views = [np.asarray(leaf) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [jax.device_put(view[layer], may_alias=True) for view in views])
        for layer in range(len(views[0]))
    ]


class Gemma(nn.Module):
    """Hidden states of a text, one per token; a token's own depends on those before it alone.

    Parameters of the layers are stacked on a leading axis under ``layers``, in both forms below.

    Attributes:
        config: the shape.
        dtype: compute dtype, float32 or bfloat16; norms, rotations, logits and softmax run in float32.
        scan_blocks: True compiles one layer and scans it; False unrolls the layers, for debugging. Equal outputs.
    """

    config: GemmaConfig
    dtype: jnp.dtype = jnp.float32
    scan_blocks: bool = True

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Int[Array, "B L"] | None = None,
        all_hidden_states: bool = False,
        packed_length: int | None = None,
    ) -> (
        Float[Array, "B L D"]
        | tuple[Float[Array, "B L D"], Float[Array, "layers1 B L D"]]
        | Float[Array, "B M D layers1"]
    ):
        """Runs the network on positions 0 .. L-1, or M-L .. M-1 where M is ``packed_length``.

        Args:
            input_ids: tokens, each below ``vocab_size``.
            attention_mask: 1 for tokens, 0 for padding, which is not attended to; None keeps all. Padding that stands
                to the right of a text has no influence on it, with or without a mask.
            all_hidden_states: also return what goes into each layer, and the result, stacked on a first axis of
                ``num_hidden_layers + 1``.
            packed_length: M, at least L: return only these states, with the layers on the last axis, of a text that
                was padded on the left to M tokens of which the L last ones are given; zero before them. The states
                are held once.

        Returns:
            The last layer's output after the final norm, in the compute dtype.
        """
        cfg, length = self.config, input_ids.shape[1]
        first = 0 if packed_length is None else packed_length - length
        if first < 0 or (all_hidden_states and packed_length is not None):
            raise ValueError(f"packed_length {packed_length} of {length} tokens, all_hidden_states {all_hidden_states}")
        table = self.param("embed_tokens", scaled_normal(0.02), (cfg.vocab_size, cfg.hidden_size), jnp.float32)
        x = embed_tokens(cfg, table, input_ids, self.dtype)
        shared = shared_by_layers(cfg, length, attention_mask, first)
        norm = GemmaRMSNorm(cfg.rms_norm_eps, name="norm")
        if packed_length is not None:
            packed = empty_states(cfg, x.shape[0], packed_length, self.dtype)
            x, packed = self._layers(x, shared, packed=packed)
            return pack_state(packed, norm(x), cfg.num_hidden_layers)
        x, inputs = self._layers(x, shared, all_hidden_states)
        x = norm(x)
        return (x, jnp.concatenate([inputs, x[None]])) if all_hidden_states else x

    def _layers(self, x, shared, keep_inputs=False, packed=None):
        """Runs the layers over ``x``; returns also their inputs, stacked or packed, where these are to be kept."""
        cfg = self.config
        sliding = jnp.asarray(cfg.sliding_layers)
        if self.scan_blocks or self.is_initializing():

            def body(layer, carry, own):
                (x, packed), (own_sliding, index) = carry, own
                packed = None if packed is None else pack_state(packed, x, index)
                return (layer(x, own_sliding, *shared), packed), x if keep_inputs else None

            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=cfg.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            layer = GemmaLayer(cfg, self.dtype, name="layers")
            (x, packed), inputs = scan(layer, (x, packed), (sliding, jnp.arange(cfg.num_hidden_layers)))
            return x, inputs if packed is None else packed
        stacked = self.variables["params"]["layers"]
        layer, inputs = GemmaLayer(cfg, self.dtype, parent=None), []
        for index in range(cfg.num_hidden_layers):
            params = jax.tree.map(lambda array, index=index: array[index], stacked)
            if packed is not None:
                packed = pack_state(packed, x, index)
            inputs.append(x)
            x = layer.apply({"params": params}, x, sliding[index], *shared)
        if packed is not None:
            return x, packed
        return x, jnp.stack(inputs) if keep_inputs else None
