"""What a run's folder says of its networks: whose weights, how they are stored, and what they are computed in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sana_jax.quantization.trees import plain_dtypes, stored_formats
from sana_jax.weights.identity import weights_id
from sana_jax.weights.resident import Resident

# attributes of a text encoder or an autoencoder that change what it computes from the same weights
_OPTIONS = ("max_length", "tiling", "tiles", "frame_tiles", "streaming_context")


def weights_settings(
    networks: Mapping[str, Any], weights: Mapping[str, Resident | None], names: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides a run's result beside its arguments, network by network, as values of JSON.

    A run that goes on with other weights, another quantization, dtype or tiling would mix two models' blocks.

    Args:
        networks: name -> the network; those without weights, or None, have less to say.
        weights: name -> its weights.
        names: name -> a short name for its weights' bytes; of a network that is not there it is made from the
            directory that the weights are read from, and is None for those that come from nowhere.
    """
    found: dict[str, Any] = {}
    for name, network in networks.items():
        own = weights.get(name)
        if own is not None:
            made = None if own.directory is None else weights_id(own.directory)
            found[f"{name} weights"] = names.get(name, made)
            found[f"{name} stored in"] = None if own.abstract is None else _stored(own.abstract)
        if (dtype := getattr(network, "dtype", None)) is not None:
            found[f"{name} dtype"] = str(jnp.dtype(dtype))
        for option in _OPTIONS:
            if (value := getattr(network, option, None)) is not None:
                found[f"{name} {option}"] = value if isinstance(value, bool | int) else str(value)
    return found


def _stored(abstract: Any) -> str:
    """The dtypes of parameters and, of quantised kernels, format, number and a short name for which they are."""
    formats = stored_formats(abstract)
    parts = sorted(plain_dtypes(abstract))
    for one in sorted(set(formats.values())):
        layers = sorted("/".join(path) for path, own in formats.items() if own == one)
        which = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:6]
        parts.append(f"{one} ({len(layers)} kernels, {which})")
    return ", ".join(parts)
