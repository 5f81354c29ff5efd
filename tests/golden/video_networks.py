"""SANA-Video networks of recorded vectors: their shape, their weights, and gradients under original names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convert.renames import RenamedSource
from convert.tables.sana_video_original import DROPPED, video_transformer_table
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer, init_params
from sana_jax.nn.norms import RMSNorm, rms_norm
from sana_jax.weights.rules import flatten, places, read_params
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.tables.sana_video import transformer_rules
from tests.golden.golden_files import GoldenFile

# The training code's; diffusers has 1e-15.
EPSILON = 1e-8
# The same of cross-attention's query and key norms, for which diffusers has 1e-5.
CROSS_NORM_EPSILON = 1e-6


@contextlib.contextmanager
def recorded_numerics() -> Iterator[None]:
    """Within, networks are traced with exact products and with the recorded epsilon of cross-attention's norms."""

    def interceptor(call, args, kwargs, context):
        module = context.module
        crossed = isinstance(module, RMSNorm) and context.method_name == "__call__" and "attn2" in module.path
        if crossed and not module.is_initializing():
            return rms_norm(args[0], module.get_variable("params", "scale"), CROSS_NORM_EPSILON)
        return call(*args, **kwargs)

    with jax.default_matmul_precision("highest"), nn.intercept_methods(interceptor):
        yield


class RecordedWeights:
    """Tensors as a source under their original names."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.location = "recorded weights"
        self._tensors = tensors
        self.tensors = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def recorded_transformer(hparams: dict) -> SanaVideoTransformer:
    """The network of recorded hyperparameters."""
    net = hparams["net"]
    width, channels = net["hidden_size"], net["in_channels"]
    config = SanaVideoConfig(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=width // net["linear_head_dim"],
        attention_head_dim=net["linear_head_dim"],
        num_layers=net["depth"],
        num_cross_attention_heads=net["num_heads"],
        cross_attention_head_dim=width // net["num_heads"],
        cross_attention_dim=width,
        caption_channels=net["caption_channels"],
        mlp_ratio=net["mlp_ratio"],
        patch_size=tuple(net["patch_size"]),
        qk_norm="rms_norm_across_heads" if hparams["qk_norm"] else None,
    )
    return SanaVideoTransformer(config, attention_epsilon=EPSILON)


def _renamed(tensors: dict[str, np.ndarray]) -> RenamedSource:
    return RenamedSource(RecordedWeights(tensors), video_transformer_table(), DROPPED)


def recorded_params(golden: GoldenFile, prefix: str, transformer: SanaVideoTransformer) -> Any:
    """The weights below ``prefix``, read through the tables of original and of published names."""
    abstract = jax.eval_shape(lambda: init_params(transformer, jax.random.key(0)))
    source = _renamed({name.removeprefix(prefix): golden[name] for name in golden.names(prefix)})
    assert list(source.dropped) == ["y_embedder.y_embedding"]
    return jax.tree.map(jnp.asarray, read_params(source, transformer_rules(transformer.config), abstract))


def original_gradient(transformer: SanaVideoTransformer, tree: Any, name: str, recorded: np.ndarray) -> np.ndarray:
    """The leaves of our tree that are the original tensor ``name``, in its layout."""
    where = places(transformer_rules(transformer.config), tree)
    leaves, parts = flatten(tree), []
    for published, info in _renamed({name: recorded}).tensors.items():
        place = where[published]
        leaf = np.asarray(leaves[place.path])
        part = place.layout.to_theirs(leaf if place.layer is None else leaf[place.layer])
        parts.append(part.reshape(info.shape))
    return np.concatenate(parts).reshape(recorded.shape)


def channels_last(video: np.ndarray) -> np.ndarray:
    """(B, C, T, H, W) to (B, T, H, W, C)."""
    return np.moveaxis(video, 1, -1)


def frames_channels_last(video: np.ndarray) -> np.ndarray:
    """(..., T, C, H, W) to (..., T, H, W, C)."""
    return np.moveaxis(video, -3, -1)


def recorded_slots(golden: GoldenFile, prefix: str, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """A layer's three recorded slots in our layout: (key, value) sums, key sums, the last frame (B, h, w, D)."""
    key_value, key, frame = (golden[f"{prefix}/slot{slot}"] for slot in range(3))
    frame = frame[:, :, -1].swapaxes(1, 2).reshape(len(frame), *grid, -1)
    return key_value.swapaxes(-1, -2), key[:, :, 0], frame
