"""Condition tokens of a training run: named encoders, each with options of its own.

A preset names them::

    tokens=condition_tokens(
        object=TokenEncoderConfig(kind="vector", width=1152),
        zoom=TokenEncoderConfig(kind="scalar", frequencies=6),
    )

and every field of each is an option: ``--tokens.zoom.dropout 0.2``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from sana_jax.errors import UserError
from sana_jax.models.condition_tokens import ConditionEncoders, TokenEncoderConfig
from sana_jax.models.sana import SanaConfig

__all__ = ["TokenEncoderConfig", "TokensConfig", "condition_tokens"]


@dataclasses.dataclass(frozen=True)
class TokensConfig:
    """Encoders of condition tokens, trained beside the network; ``condition_tokens`` makes one, with their names."""

    @property
    def encoders(self) -> dict[str, TokenEncoderConfig]:
        """The encoders by name, in their order; a name is that of a condition of the data."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def network(self, transformer: SanaConfig) -> ConditionEncoders:
        """The encoders for a transformer."""
        return ConditionEncoders(self.encoders, transformer.caption_channels, transformer.inner_dim)

    @staticmethod
    def class_for(names: Iterable[str]) -> type[TokensConfig]:
        """The configuration class whose fields have these names: what reads a run's ``config.json``."""
        return _class_for(tuple(names))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_mapping, (self.encoders,)


def condition_tokens(**encoders: TokenEncoderConfig) -> TokensConfig:
    """A configuration of encoders by their names.

    Raises:
        UserError: none is named.
    """
    return _from_mapping(encoders)


def _from_mapping(encoders: Mapping[str, TokenEncoderConfig]) -> TokensConfig:
    if not encoders:
        raise UserError("no token encoders are named; name one or more")
    return _class_for(tuple(encoders))(**encoders)


@functools.cache
def _class_for(names: tuple[str, ...]) -> type[TokensConfig]:
    fields = [(name, TokenEncoderConfig) for name in names]
    made = dataclasses.make_dataclass(
        TokensConfig.__name__, fields, bases=(TokensConfig,), frozen=True, namespace={"__doc__": TokensConfig.__doc__}
    )
    made.__module__ = __name__
    return made
