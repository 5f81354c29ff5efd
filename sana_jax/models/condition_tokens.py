"""Condition tokens: further conditions of a transformer (a picture's embedding, a number) beside the caption's tokens.

Named encoders each turn one condition into N tokens, which are appended to the prompt embeddings before the caption
projection, or after it (and then before the caption norm, so that they have the scale of the caption's tokens).

**Zero-effect start.** A token that is merely appended dilutes the softmax of cross-attention, whatever it holds. So
every encoder has a learned weight w >= 0 that starts at 0 and multiplies ``exp(logit)`` of its tokens: an additive
attention bias ``log(w + 1e-24)``. At the start the network gives what it gives without tokens, to float32 rounding
(unless a token's logit is 35 and more above those of the caption, as in random networks without q/k norms).

**Gradients** are healthy from there on, for two reasons. That of w is ``exp(logit)/Z`` times what the token would
change, not scaled by w; and below 0, where w is cut off, it passes on as if it were not, so that w can come back. That
of the tokens' content has the factor w, about 0 at first, which is divided out again while w < 1: what is left is
the direction and size that it would have at w = 1, and so the encoders learn from the first step, also while w has yet
to find that they help.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.nn.attention import MASKED, mask_to_bias
from sana_jax.nn.initializers import scaled_normal
from sana_jax.nn.linear import Linear

# exp(logit) of a token whose weight is 0 is multiplied with this. It is nothing in float32 also for a token whose logit
# is 35 above those of the caption, which happens where queries are not normalised; and float32 still holds gradients
# that have this factor.
SMALLEST_WEIGHT = 1e-24
# The parameter behind a weight is a tenth of it, because optimizers that move every parameter by about the learning
# rate would otherwise need 1 / learning_rate steps until a token counts as much as a word.
WEIGHT_PER_PARAMETER = 10.0
_SMALLEST_NORM = 1e-12


@dataclasses.dataclass(frozen=True)
class TokenEncoderConfig:
    """An MLP that turns one condition into tokens."""

    kind: Literal["vector", "scalar"]
    """What the condition is: a vector, such as a picture's embedding, or a number."""
    width: int | None = None
    """Size of the vector; for kind vector, where it is required."""
    normalize: bool = False
    """Whether the vector is brought to a mean square of 1 first; for kind vector."""
    value_range: tuple[float, float] | None = None
    """Lowest and highest number that occurs in training; for kind scalar. None: 0 to 1."""
    frequencies: int = 0
    """Sines and cosines of the number at 1, 2, 4, ... half periods over the range; for kind scalar. 0: none."""
    num_tokens: int = 1
    """Tokens that it makes, N."""
    layers: int = 2
    """Dense layers; between them stands the activation."""
    hidden: int | None = None
    """Width between the layers; None: that of a token."""
    activation: Literal["silu", "gelu"] = "silu"
    """Activation between the layers; gelu in its tanh form."""
    inject: Literal["before", "after"] = "before"
    """Where the tokens come in: before the caption projection, as the text encoder's do, or after it."""
    dropout: float = 0.1
    """Share of the samples whose condition is replaced by the null tokens in training."""
    dropped_with_caption: bool = True
    """Whether a sample whose caption is dropped loses the condition too, which guidance needs."""
    null: Literal["learned", "zero"] = "learned"
    """The null tokens: learned vectors, or zeros."""

    def __post_init__(self):
        def require(name: str, condition: bool, allowed: str) -> None:
            if not condition:
                raise UserError(
                    f"token encoder: {name}={getattr(self, name)!r} is not allowed; allowed is {allowed}: change it, "
                    "or leave it out"
                )

        for name, allowed in _CHOICES.items():
            require(name, getattr(self, name) in allowed, " or ".join(allowed))
        for name in ("num_tokens", "layers"):
            value = getattr(self, name)
            require(name, type(value) is int and 1 <= value <= _MOST, f"a whole number from 1 to {_MOST}")
        for name in ("width", "hidden"):
            value = getattr(self, name)
            require(name, value is None or (type(value) is int and 1 <= value <= _WIDEST), f"1 to {_WIDEST}")
        for name in ("normalize", "dropped_with_caption"):
            require(name, type(getattr(self, name)) is bool, "true or false")
        require("dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "0 up to, not including, 1")
        require(
            "frequencies",
            type(self.frequencies) is int and 0 <= self.frequencies <= _MOST_FREQUENCIES,
            f"0 to {_MOST_FREQUENCIES}",
        )
        if self.kind == "vector":
            require("width", self.width is not None, "the size of the vector, which kind vector needs")
            require("value_range", self.value_range is None, "none for kind vector, which does not read it")
            require("frequencies", self.frequencies == 0, "0 for kind vector, which does not read it")
        else:
            require("width", self.width is None, "none for kind scalar, which does not read it")
            require("normalize", not self.normalize, "false for kind scalar, which does not read it")
            given = self.value_range
            pair = isinstance(given, list | tuple) and len(given) == 2 and all(map(_is_number, given))
            require("value_range", given is None or (pair and given[0] < given[1]), "a lower and a higher number")
            if given is not None:
                object.__setattr__(self, "value_range", tuple(float(value) for value in given))

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest number of training."""
        return (0.0, 1.0) if self.value_range is None else self.value_range

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> TokenEncoderConfig:
        """Reads what ``dataclasses.asdict`` gave; ``source`` names it in errors.

        Raises:
            UserError: unknown or missing fields, or values that are not allowed.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) - fields or "kind" not in values:
            raise UserError(f"{source} is {values!r}; allowed are kind (required) and {sorted(fields)}: mend it")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


_CHOICES = {
    "kind": ("vector", "scalar"),
    "activation": ("silu", "gelu"),
    "inject": ("before", "after"),
    "null": ("learned", "zero"),
}
# Larger numbers are a damaged file.
_MOST, _WIDEST, _MOST_FREQUENCIES = 1024, 1 << 16, 24


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class ConditionTokens(NamedTuple):
    """What ``SanaTransformer`` appends to a caption of L tokens: first those of ``before``, then those of ``after``.

    Attributes:
        before: tokens that go through the caption projection; there may be none (N = 0).
        after: tokens that come in after it; there may be none (M = 0).
        log_weight: what is added to the attention logits of each, in this order; -10000 hides a token.
    """

    before: Float[Array, "B N Ctext"]
    after: Float[Array, "B M D"]
    log_weight: Float[Array, "B NM"]


@dataclasses.dataclass(frozen=True)
class ConditionEncoders:
    """The encoders of one transformer by the names of their conditions; tokens stand in this order.

    Attributes:
        encoders: name -> shape.
        caption_channels: the transformer's, width of tokens that come in before the projection.
        inner_dim: the transformer's, width of tokens that come in after it.
    """

    encoders: Mapping[str, TokenEncoderConfig]
    caption_channels: int
    inner_dim: int

    def __post_init__(self) -> None:
        if not self.encoders:
            raise UserError("no token encoders are named; name one or more")
        for name in self.encoders:
            if not isinstance(name, str) or not name.isidentifier():
                raise UserError(f"token encoder {name!r}: a name is allowed of letters, digits and _: rename it")

    def width(self, name: str) -> int:
        """Width of an encoder's tokens."""
        return self.caption_channels if self.encoders[name].inject == "before" else self.inner_dim

    def module(self, name: str) -> TokenEncoder:
        """An encoder's network."""
        return TokenEncoder(self.encoders[name], self.width(name))


class TokenEncoder(nn.Module):
    """The network of one encoder: an MLP, the null tokens, the weight.

    Attributes:
        config: the shape.
        features: width of a token, E.
    """

    config: TokenEncoderConfig
    features: int

    @nn.compact
    def __call__(
        self, condition: Float[Array, "B *X"], dropped: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B N E"], Float[Array, ""]]:
        """Tokens of conditions, (B,) or (B, width), with the null tokens where ``dropped``; and the weight w."""
        cfg, shape = self.config, (self.config.num_tokens, self.features)
        if cfg.kind == "vector":
            hidden = _unit_mean_square(condition) if cfg.normalize else condition
        else:
            hidden = scalar_features(condition, cfg.bounds, cfg.frequencies)
        hidden = hidden.astype(jnp.float32)
        activation = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}[cfg.activation]
        for layer in range(1, cfg.layers):
            hidden = activation(Linear(cfg.hidden or self.features, name=f"linear_{layer}")(hidden))
        tokens = Linear(math.prod(shape), name=f"linear_{cfg.layers}")(hidden).reshape(-1, *shape)
        null = (
            self.param("null", scaled_normal(0.02), shape, jnp.float32) if cfg.null == "learned" else jnp.zeros(shape)
        )
        tokens = jnp.where(dropped[:, None, None], null, tokens)

        parameter = self.param("attention_weight", nn.initializers.zeros, (), jnp.float32)
        raw = WEIGHT_PER_PARAMETER * parameter
        weight = raw + jax.lax.stop_gradient(jax.nn.relu(raw) - raw)  # cut off at 0, with the gradient of raw
        # The gradient of what a token holds, as it would be at w = 1; values stay what they are, to the bit.
        factor = jax.lax.stop_gradient(1 / jnp.minimum(weight + SMALLEST_WEIGHT, 1.0))
        held = jax.lax.stop_gradient(tokens)
        return held + factor * (tokens - held), weight


def scalar_features(value: Float[Array, " B"], bounds: tuple[float, float], frequencies: int) -> Float[Array, "B F"]:
    """``[2u - 1, sin(π 2^k u), cos(π 2^k u)]`` for k < frequencies, u being the place of the value in its bounds."""
    lowest, highest = bounds
    place = ((value.astype(jnp.float32) - lowest) / (highest - lowest))[:, None]
    angles = place * (np.pi * 2.0 ** np.arange(frequencies)).astype(np.float32)
    return jnp.concatenate([2 * place - 1, jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _unit_mean_square(vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
    wide = vectors.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + _SMALLEST_NORM)


def init_tokens(encoders: ConditionEncoders, key: PRNGKeyArray) -> PyTree:
    """Fresh parameters, name -> an encoder's; its draw depends on (key, its name) alone."""
    params = {}
    for name, config in encoders.encoders.items():
        condition = jnp.zeros((1,) if config.kind == "scalar" else (1, config.width))
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        params[name] = encoders.module(name).init(own_key, condition, jnp.zeros(1, bool))["params"]
    return params


def apply_tokens(
    encoders: ConditionEncoders,
    params: PyTree,
    conditions: Mapping[str, Float[Array, "B *X"]],
    dropped: Mapping[str, Bool[Array, " B"]] | None = None,
    present: Mapping[str, Bool[Array, " B"]] | None = None,
) -> ConditionTokens:
    """Tokens of a batch.

    Args:
        encoders: the encoders.
        params: as ``init_tokens`` gives them.
        conditions: by name: (B,) for kind scalar, (B, width) for kind vector; others are not read.
        dropped: by name, where the null tokens take the place; missing names drop nothing.
        present: by name, where there are tokens at all; elsewhere they are hidden like padding. Missing names are
            present everywhere.

    Raises:
        UserError: a condition that is missing or of another shape.
    """
    for name, config in encoders.encoders.items():
        check_condition(name, config, conditions)
    batch = next(conditions[name].shape[0] for name in encoders.encoders)
    dropped, present = dropped or {}, present or {}
    parts: dict[str, list[Array]] = {"before": [], "after": []}
    log_weights: dict[str, list[Array]] = {"before": [], "after": []}
    for name, config in encoders.encoders.items():
        variables = {"params": params[name]}
        where_dropped = dropped.get(name, jnp.zeros(batch, bool))
        tokens, weight = encoders.module(name).apply(variables, conditions[name], where_dropped)
        log_weight = jnp.broadcast_to(jnp.log(weight + SMALLEST_WEIGHT), tokens.shape[:2])
        if name in present:
            log_weight = jnp.where(present[name][:, None], log_weight, MASKED)
        parts[config.inject].append(tokens)
        log_weights[config.inject].append(log_weight)
    return ConditionTokens(
        before=jnp.concatenate([jnp.zeros((batch, 0, encoders.caption_channels)), *parts["before"]], axis=1),
        after=jnp.concatenate([jnp.zeros((batch, 0, encoders.inner_dim)), *parts["after"]], axis=1),
        log_weight=jnp.concatenate([*log_weights["before"], *log_weights["after"]], axis=1),
    )


def null_tokens(encoders: ConditionEncoders, params: PyTree, batch: int) -> ConditionTokens:
    """The tokens of B samples without any condition: what guidance holds against the conditions."""
    conditions = {
        name: jnp.zeros((batch,) if config.kind == "scalar" else (batch, config.width))
        for name, config in encoders.encoders.items()
    }
    everywhere = dict.fromkeys(encoders.encoders, jnp.ones(batch, bool))
    return apply_tokens(encoders, params, conditions, dropped=everywhere)


def draw_dropped(
    encoders: ConditionEncoders, keys: Mapping[str, PRNGKeyArray], drop_caption: Bool[Array, " B"]
) -> dict[str, Bool[Array, " B"]]:
    """Which samples lose which condition in training: with their captions, and each by its own dropout besides.

    Args:
        encoders: the encoders.
        keys: one for each name.
        drop_caption: which samples lose their captions.
    """
    found = {}
    for name, config in encoders.encoders.items():
        own = jax.random.bernoulli(keys[name], config.dropout, drop_caption.shape)
        found[name] = own | drop_caption if config.dropped_with_caption else own
    return found


def check_condition(name: str, config: TokenEncoderConfig, conditions: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for a condition that is missing, or whose array is not of its encoder's shape."""
    if name not in conditions:
        raise UserError(f"condition {name} is missing; there are {sorted(conditions) or 'none'}: name it in the data")
    shape = tuple(np.shape(conditions[name]))
    wanted = "(B,)" if config.kind == "scalar" else f"(B, {config.width})"
    fitting = f"--tokens.{name}.width {shape[-1]}" if len(shape) == 2 and config.kind == "vector" else "another kind"
    if len(shape) != (1 if config.kind == "scalar" else 2) or (config.kind == "vector" and shape[1] != config.width):
        raise UserError(
            f"condition {name} has the shape {shape}; its encoder of kind {config.kind} takes {wanted}: give it what "
            f"it was made for, or train one that fits with {fitting}"
        )


def append_tokens(caption: Float[Array, "B L C"], tokens: Float[Array, "B N C"]) -> Float[Array, "B LN C"]:
    """A caption with tokens behind it, in the caption's dtype.

    Raises:
        UserError: tokens of another width.
    """
    if caption.shape[-1] != tokens.shape[-1]:
        raise UserError(
            f"condition tokens of width {tokens.shape[-1]} beside a caption of {caption.shape[-1]}; they were made for "
            "another transformer: use the one that they were trained with"
        )
    return jnp.concatenate([caption, tokens.astype(caption.dtype)], axis=1)


def bias_with_tokens(mask: Int[Array, "B L"] | None, tokens: ConditionTokens, length: int) -> Float[Array, "B 1 1 LNM"]:
    """What is added to the attention logits of a caption of L tokens, masked or not, and of the tokens behind it."""
    batch = tokens.log_weight.shape[0]
    caption_bias = jnp.zeros((batch, 1, 1, length))
    token_bias = tokens.log_weight.astype(jnp.float32)[:, None, None, :]
    if mask is not None:
        caption_bias = mask_to_bias(mask)
        # A caption of nothing but padding is attended to as if it were unmasked; the tokens join it there.
        token_bias = token_bias + jnp.where((mask != 0).any(axis=1), 0.0, MASKED)[:, None, None, None]
    return jnp.concatenate([caption_bias, token_bias], axis=-1)
