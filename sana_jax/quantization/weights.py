"""Weights on disk or in memory to quantised ones: read, quantised layer by layer, and only then on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.compilation import readable_bytes
from sana_jax.errors import UserError
from sana_jax.quantization.choice import Quantization, check_device
from sana_jax.quantization.trees import quantizable_layers, quantize_params, quantized_abstract, stored_formats
from sana_jax.weights.lazy import LazyArray
from sana_jax.weights.resident import Resident
from sana_jax.weights.streamed import StreamedResident
from sana_jax.weights.trees import abstract_tree, tree_bytes


def quantized_weights(weights: Resident, choice: Quantization, network: str) -> Resident:
    """The same weights with their dense layers quantised, and a printed line of what that takes.

    Weights that are read later are read one array after another, quantised on the device a layer at a time, and never
    on it in their own dtype together. Those that someone holds already are quantised now.

    Args:
        weights: as a component was opened.
        choice: format, and what is left out.
        network: what it is, for messages.

    Raises:
        UserError: no layer to quantise, a format that the device does not multiply, or weights that are quantised in
            another format already.
    """
    abstract = weights.abstract
    if notice := check_device(choice.format):
        print(notice)
    if stored := stored_formats(abstract):
        if set(stored.values()) == {choice.format}:
            print(f"the {network} is stored in {choice.format} already, {readable_bytes(weights.num_bytes)}")
            return weights
        raise UserError(
            f"quantization {network}={choice.format}: its weights are stored in "
            f"{', '.join(sorted(set(stored.values())))}; leave the option out, or name the model that they were made of"
        )
    layers = quantizable_layers(abstract, choice.exclude)
    if not layers:
        raise UserError(
            f"quantization {network}={choice.format}: the network has no dense layer that would be quantised; leave it "
            "out"
        )
    formats = dict.fromkeys(layers, choice.format)
    wanted = quantized_abstract(abstract, formats)
    print(
        f"the {network} in {choice.format}: {len(layers)} kernels, {readable_bytes(tree_bytes(abstract))} become "
        f"{readable_bytes(tree_bytes(wanted))}"
    )
    if weights.stays:
        return Resident.of(weights.name, _on_device(quantize_params(weights.params, formats), wanted))

    def open_tree() -> PyTree:
        return quantize_params(weights.open_tree(), formats)

    def read() -> PyTree:
        return _on_device(open_tree(), wanted)

    if isinstance(weights, StreamedResident):
        quantized = StreamedResident(weights.name, wanted, weights.stacked, open_tree)
    else:
        quantized = Resident(weights.name, tree_bytes(wanted), read, wanted, open_tree)
    quantized.directory = weights.directory
    return quantized


def _on_device(params: PyTree, abstract: PyTree) -> PyTree:
    """Reads LazyArrays one after another, cast as ``open_component`` casts them."""

    def place(lazy: LazyArray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.asarray(lazy.read())
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(leaf.dtype, copy=False)
        return jax.device_put(array, leaf.sharding)

    return jax.tree.map(place, params, abstract_tree(abstract))
