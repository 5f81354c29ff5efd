"""A tree of parameters as a published checkpoint's tensors."""

from __future__ import annotations

from sana_jax.weights.rules import TreeSource


def write_params(params, rules):
    """The inverse of ``read_params``, as ``write_safetensors`` takes it: (name -> dtype and shape, (name, array)s)."""
    source = TreeSource(params, rules)
    return source.tensors, ((name, source.read(name)) for name in source.tensors)
