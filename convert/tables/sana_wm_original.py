"""SANA-WM as NVlabs save it: original name -> ``SanaWMTransformer3DModel``'s. All other names are the same in both."""

from __future__ import annotations

from convert.renames import Rename, both


def world_model_table() -> tuple[Rename, ...]:
    """The tensors whose names differ: those of the embedder of times."""
    return (
        *both("t_embedder.mlp.0", "t_embedder.linear_1"),
        *both("t_embedder.mlp.2", "t_embedder.linear_2"),
    )
