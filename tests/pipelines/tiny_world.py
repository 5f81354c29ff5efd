"""A tiny world that is streamed, in memory; as a program, a run of it that kills itself: ``FOLDER CHUNK STAGE``."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sana_jax import SanaWMStreamingPipeline
from sana_jax.autoencoders.ltx2 import init_params
from sana_jax.autoencoders.ltx2_autoencoder import LTX2VideoAutoencoder
from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig
from sana_jax.diffusion.samplers import WorldStreamSampler
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.text_encoders import WordEncoder
from tests.pipelines.tiny_refiner import CHANNELS, SIZE, draw_prompt, tiny_refiner

TEMPORAL, SPATIAL = 2, 4
HEIGHT, WIDTH = (SPATIAL * length for length in SIZE)
PROMPT = "a handwritten seven"
STEPS = (1000, 700)
# blocks of two frames behind the sink: in the first stage's chunks of two each takes a frame of two of them
REFINER = {"prompt_embeds": draw_prompt(), "block_size": 2, "kv_max_frames": 5, "sigmas": (0.9, 0.4, 0.0)}


# of the network, so that it compiles faster; without norms of its keys the delta rule would not last forty chunks
PLAIN = {"conv_kernel_size": 0}


def tiny_world(shape: Mapping[str, Any] = PLAIN, **settings: Any) -> SanaWMStreamingPipeline:
    """Videos of 8 x 12 pixels in chunks of two latent frames; one block of each kind."""
    autoencoder = tiny_autoencoder()
    settings = {"timesteps": STEPS, "block_frames": 2, "blocks": "uniform", **settings}
    config = SanaWMConfig(
        in_channels=CHANNELS, num_layers=2, hidden_size=16, num_attention_heads=2, softmax_every_n=2,
        linear_head_dim=8, caption_channels=8, mlp_ratio=2.0, chunk_plucker_channels=6 * TEMPORAL,
        chunk_plucker_post_attn_blocks=2, **shape,
    )  # fmt: skip
    transformer = SanaWMTransformer(config)
    return SanaWMStreamingPipeline(
        transformer,
        random_like(abstract_params(transformer), 0),
        WorldStreamSampler(**settings),
        WordEncoder(("a", "handwritten", "seven"), embedding_dim=8, max_length=4),
        autoencoder,
        SamplingDefaults(guidance_scale=1.0, num_inference_steps=2, height=HEIGHT, width=WIDTH, fps=8.0),
    )


def tiny_autoencoder(causal: bool = True, **options: Any) -> LTX2VideoAutoencoder:
    """One stage; two frames and four pixels a latent."""
    config = LTX2AutoencoderConfig(
        latent_channels=CHANNELS, block_out_channels=(8,), down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(True,),
        upsample_factor=(2,), patch_size=2, decoder_causal=causal,
    )  # fmt: skip
    params = random_like(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), 1, 0.15)
    params["statistics"]["std"] = np.abs(params["statistics"]["std"]) + 0.5
    return LTX2VideoAutoencoder.from_params(config, params, say=lambda line: None, **options)


def random_like(shapes: Any, seed: int, scale: float = 0.3) -> Any:
    """Every parameter random."""
    leaves, structure = jax.tree.flatten(shapes)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [scale * draw.standard_normal(x.shape, np.float32) for x in leaves])


def camera(frames: int) -> np.ndarray:
    """A path that turns and walks, without an end."""
    angle = 0.03 * np.arange(frames)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 0] = poses[:, 2, 2] = np.cos(angle)
    poses[:, 0, 2], poses[:, 2, 0] = np.sin(angle), -np.sin(angle)
    poses[:, :3, 3] = np.stack([0.02 * np.arange(frames), np.zeros(frames), 0.05 * np.arange(frames)], axis=1)
    return poses.astype(np.float32)


def picture() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (16, 24, 3)).astype(np.uint8)


def arguments(latent_frames: int) -> dict[str, Any]:
    """Of a call that makes a video of so many latent frames."""
    frames = 1 + TEMPORAL * (latent_frames - 1)
    return {"image": picture(), "prompt": PROMPT, "c2w": camera(frames), "intrinsics": [20.0, 20.0, 12.0, 8.0]}


def main(folder: str, chunk: str, stage: str) -> None:
    """Streams into ``folder``; kills itself when a chunk's ``stage`` is saved, half of it, or written.

    ``stage`` is latents, refined, frames or none. A video that was begun is gone on with.
    """
    from sana_jax.pipelines import resumed_folder
    from sana_jax.pipelines.growing_output import GrowingOutput

    place, number = pathlib.Path(folder), int(chunk)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save, append = np.save, GrowingOutput.append
    seen = [0]

    def half_then_die(file: Any, array: np.ndarray) -> None:
        save(file, array)
        if f"{stage}-{number:05d}" in str(getattr(file, "name", "")):
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    def append_then_die(self: GrowingOutput, block: np.ndarray) -> None:
        append(self, block)
        seen[0] += 1
        if stage == "frames" and seen[0] == 1:
            die()

    resumed_folder.np.save, GrowingOutput.append = half_then_die, append_then_die
    resume = (place / "out.mp4.resume" / "manifest.json").is_file()
    tiny_world()(
        **arguments(8), refine=tiny_refiner(), refiner_options=REFINER, output_path=place / "out.mp4", resume=resume
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
