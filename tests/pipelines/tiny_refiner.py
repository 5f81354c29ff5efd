"""A tiny refiner; as a program, a run of it that kills itself: ``FOLDER BLOCK|none [mid-write]``."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import SanaWMRefiner
from sana_jax.models import ltx2, ltx2_connectors
from sana_jax.models.ltx2 import LTX2VideoTransformer
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.ltx2_connectors import LTX2Connectors, LTX2ConnectorsConfig

CHANNELS, WIDTH, SIZE = 4, 6, (2, 3)
# ten blocks behind the sink, of which the last five see a window that slides
FRAMES, OPTIONS = 11, {"block_size": 1, "kv_max_frames": 5, "sigmas": (0.9, 0.4, 0.0)}
BLOCKS = 10


def tiny_refiner(dtype: Any = jnp.bfloat16, layers: int = 2, **options: Any) -> SanaWMRefiner:
    """Without a text encoder."""
    config = LTX2Config(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=layers, caption_channels=WIDTH, rope_type="split",
    )  # fmt: skip
    transformer = LTX2VideoTransformer(config, dtype=dtype)
    connectors = LTX2Connectors(
        LTX2ConnectorsConfig(
            caption_channels=WIDTH, text_proj_in_factor=3, video_connector_num_attention_heads=1,
            video_connector_attention_head_dim=WIDTH, video_connector_num_learnable_registers=4,
        )
    )  # fmt: skip
    params = random_like(jax.eval_shape(lambda: ltx2.init_params(transformer, jax.random.key(0))), dtype)
    connectors_params = jax.eval_shape(lambda: ltx2_connectors.init_params(connectors, jax.random.key(0)))
    return SanaWMRefiner(transformer, params, connectors, random_like(connectors_params, dtype), **options)


def random_like(shapes: Any, dtype: Any) -> Any:
    """Every parameter random."""
    leaves, structure = jax.tree.flatten(shapes)
    draw = np.random.default_rng(5)
    own = [draw.standard_normal(leaf.shape) * (leaf.shape[-2] if leaf.ndim > 1 else 4) ** -0.5 for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(array, dtype) for array in own])


def draw_latents(frames: int = FRAMES, batch: int = 1, seed: int = 0) -> np.ndarray:
    """(B, C, T, h, w); a longer video begins alike."""
    draws = [
        [np.random.default_rng([seed, video, frame]).standard_normal((CHANNELS, *SIZE)) for frame in range(frames)]
        for video in range(batch)
    ]
    return np.moveaxis(np.asarray(draws, np.float32), 1, 2)


def draw_prompt(seed: int = 0) -> np.ndarray:
    return np.random.default_rng([9, seed]).standard_normal((1, 4, WIDTH)).astype(np.float32)


def half_a_file(file: Any, array: np.ndarray) -> None:
    """The beginning of what ``np.save`` would write."""
    file.write(b"\x93NUMPY\x01\x00" + array.tobytes()[: array.nbytes // 2])
    file.flush()


def main(folder: str, kill_at: str, mid_write: str = "") -> None:
    """Refines into ``folder`` and kills itself at a block, behind or within its file; else writes ``latents.npy``."""
    from sana_jax.pipelines import resumed_folder

    block_to_die = None if kill_at == "none" else int(kill_at)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if mid_write:
        save = np.save

        def half_then_die(file: Any, array: np.ndarray) -> None:
            if f"block-{block_to_die:05d}" not in str(getattr(file, "name", "")):
                save(file, array)
                return
            half_a_file(file, array)
            die()

        resumed_folder.np.save = half_then_die

    def on_block(pipeline: SanaWMRefiner, block: int, shown: dict) -> None:
        if block == block_to_die:
            die()

    path = pathlib.Path(folder)
    out = tiny_refiner()(
        draw_latents(), prompt_embeds=draw_prompt(), checkpoint_dir=path / "blocks", callback_on_block_end=on_block,
        **OPTIONS,
    )  # fmt: skip
    np.save(path / "latents.npy", out.frames)


if __name__ == "__main__":
    main(*sys.argv[1:])
