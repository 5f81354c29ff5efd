"""The networks of SANA-WM and of its refiner: their inputs, where both sides are listened to, how both are called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.families import Network
from convert.verify.networks import (
    Inputs,
    Pass,
    Whole,
    blocks_taps,
    draw_caption,
    from_torch,
    latent_size,
    normal,
    to_torch,
)
from convert.verify.taps import Tap

_FRAMES, _FPS = 3, 16.0


# -- SANA-WM ---------------------------------------------------------------------------------------------------------


def world_model_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """Two videos of three latent frames with moving cameras, a time for each frame, two captions, one with padding.

    Softmax layers round to bfloat16, and PyTorch's kernel for CPUs has an exponential of its own there: in float32
    neither side rounds. PyTorch knows the legacy revision alone, so that is what ours computes.
    """
    from sana_jax.models.sana_wm import SanaWMTransformer

    config = dataclasses.replace(network.config, revision="legacy")
    size = latent_size(inputs)
    latents = normal(inputs.seed, "latents", 2, _FRAMES, *size, config.in_channels)
    texts, mask = draw_caption(config, inputs.seed)
    time = np.array([[0.0] + [999.0] * (_FRAMES - 1), [412.5] * _FRAMES], np.float32)
    camera = _cameras(inputs.seed, size)
    plucker = None
    if config.use_chunk_plucker_post_attn:
        plucker = normal(inputs.seed, "plucker", 2, _FRAMES, *size, config.chunk_plucker_channels)

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        import torch

        rounding = without_rounding() if dtype == torch.float32 else contextlib.nullcontext()
        with rounding:
            out = model(
                hidden_states=to_torch(np.moveaxis(latents, -1, 1), dtype),
                encoder_hidden_states=to_torch(texts[:, None], dtype),
                timestep=to_torch(time[:, None]),
                mask=to_torch(mask),
                camera_conditions=to_torch(camera),
                chunk_plucker=None if plucker is None else to_torch(np.moveaxis(plucker, -1, 1), dtype),
                return_dict=False,
            )[0]
        return {"output": np.moveaxis(from_torch(out), 1, -1)}

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        rounded = None if jnp.dtype(dtype) == jnp.float32 else jnp.bfloat16
        out = SanaWMTransformer(config, dtype=dtype, softmax_dtype=rounded).apply(
            {"params": params},
            jnp.asarray(latents, dtype),
            jnp.asarray(texts, dtype),
            jnp.asarray(time),
            jnp.asarray(mask),
            jnp.asarray(camera),
            None if plucker is None else jnp.asarray(plucker, dtype),
        )
        return {"output": out}

    return [Pass(tuple(_world_model_taps(config)), theirs, ours)], []


def _world_model_taps(config: Any) -> Iterator[Tap]:
    # Blocks of both kinds have modules of the same names, which are called in the order of the layers.
    yield Tap("caption_projection", "y_embedder", ("caption_projection",))
    for layer in range(config.num_layers):
        name, at = f"blocks.{layer}", functools.partial(Tap, call=layer)
        yield at(f"{name}: norm and modulation before attn", f"{name}.attn", ("attn1",), of_input=True)
        yield at(f"{name}.attn", f"{name}.attn", ("attn1",))
        yield at(f"{name}.cross_attn: tokens before it", f"{name}.cross_attn", ("attn2",), of_input=True)
        yield at(f"{name}.cross_attn", f"{name}.cross_attn", ("attn2",))
        first, last = (("ff_1",), ("ff_2",)) if config.ffn_type == "mlp" else (("ff",), ("ff",))
        yield at(f"{name}: norm and modulation before mlp", f"{name}.mlp", first, of_input=True)
        yield at(f"{name}.mlp", f"{name}.mlp", last)
    yield Tap("final_layer: norm and modulation", "final_layer.linear", ("proj_out",), of_input=True)
    yield Tap("final_layer.linear", "final_layer.linear", ("proj_out",))


def _cameras(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Conditions (2, T, 20) of two cameras that move and turn."""
    rows, columns = size
    conditions = np.zeros((2, _FRAMES, 20), np.float32)
    for sample in range(2):
        drawn = np.random.default_rng([seed, 17, sample])
        turn = drawn.standard_normal((3, 3))
        step, pose = 0.3 * drawn.standard_normal(3), np.eye(4)
        once = np.linalg.qr(np.eye(3) + 0.1 * (turn - turn.T))[0]
        once *= np.sign(np.diag(once))
        for frame in range(_FRAMES):
            conditions[sample, frame, :16] = pose.reshape(-1)
            pose[:3, :3] = pose[:3, :3] @ once
            pose[:3, 3] += step
    conditions[..., 16:18] = 0.9 * columns
    conditions[..., 18:] = np.array([columns, rows]) / 2
    return conditions


@contextlib.contextmanager
def without_rounding() -> Iterator[None]:
    """PyTorch's softmax layers keep float32, and are computed by their formula."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rounding = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.Tensor.bfloat16 = rounding


# -- the refiner -----------------------------------------------------------------------------------------------------


def ltx2_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """The video half of LTX-2: two videos of three latent frames, as the refiner sees a video's first ones."""
    from sana_jax.models.ltx2 import LTX2VideoTransformer

    config = network.config
    size = latent_size(inputs)
    latents = normal(inputs.seed, "latents", 2, _FRAMES, *size, config.in_channels)
    texts, mask = draw_caption(config, inputs.seed)
    time = np.array([[909.375] * _FRAMES, [0.0] + [421.875] * (_FRAMES - 1)], np.float32)

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        import torch

        places = list(range(_FRAMES))
        rotation = model.build_rotary_emb_for_absolute_positions(2, places, *size, torch.device("cpu"), _FPS)
        out = model(
            hidden_states=to_torch(latents.reshape(2, -1, config.in_channels), dtype),
            encoder_hidden_states=to_torch(texts, dtype),
            timestep=to_torch(np.repeat(time, size[0] * size[1], axis=1)),
            video_rotary_emb=rotation,
            encoder_attention_mask=to_torch(mask),
            return_dict=False,
        )[0]
        return {"output": from_torch(out).reshape(2, _FRAMES, *size, -1)}

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        out = LTX2VideoTransformer(config, dtype=dtype).apply(
            {"params": params},
            jnp.asarray(latents, dtype),
            jnp.asarray(texts, dtype),
            jnp.asarray(time),
            jnp.asarray(mask),
            rotation=config.rotation((_FRAMES, *size), fps=_FPS),
        )
        return {"output": out}

    # As in SANA-Video, PyTorch embeds a frame's time once for each of its tokens.
    taps = (
        Tap("caption_projection", "caption_projection", ("caption_projection",)),
        *blocks_taps(config.num_layers, False, patches="proj_in", channels_first=False),
        Tap("norm_out", "proj_out", ("proj_out",), of_input=True),
        Tap("proj_out", "proj_out", ("proj_out",)),
    )
    return [Pass(taps, theirs, ours)], []


def connectors_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """LTX-2's video connector: states of three texts with padding on the left, one of which has none."""
    from sana_jax.models.ltx2_connectors import LTX2Connectors

    config = network.config
    registers = config.video_connector_num_learnable_registers or 1
    length = registers * -(-24 // registers)
    states = normal(inputs.seed, "states", 3, length, config.caption_channels, config.text_proj_in_factor)
    padding = np.array([[length // 3], [0], [length - 2]])
    mask = (np.arange(length) >= padding).astype(np.int32)

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        return {"prompt": from_torch(model(to_torch(states, dtype), to_torch(mask))[0])}

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        out, _ = LTX2Connectors(config, dtype=dtype).apply(
            {"params": params}, jnp.asarray(states, dtype), jnp.asarray(mask)
        )
        return {"prompt": out}

    return [Pass((Tap("text_proj_in", "text_proj_in", ("text_proj_in",)),), theirs, ours)], []
