"""SANA-WM's pipeline on both sides: one prompt, a picture, a camera that moves, and the same noise."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.sources import Model
from convert.verify import loading
from convert.verify.networks import Inputs, from_torch, smooth_picture
from convert.verify.world_networks import without_rounding
from sana_jax.autoencoders.base import pixel_frames

KIND = "SanaWMPipeline"
_GUIDANCE, _LATENT_FRAMES = 4.5, 3


@dataclasses.dataclass(frozen=True)
class WorldCase:
    """One call, with all noise drawn.

    Attributes:
        inputs: sizes and seed.
        prompt: what the video shows.
        steps: of sampling.
        temporal_factor: frames per latent frame.
        latents: the noise (1, C, T, h, w).
    """

    inputs: Inputs
    prompt: str
    steps: int
    temporal_factor: int
    latents: np.ndarray

    @classmethod
    def draw(cls, places: Mapping[str, loading.Place], inputs: Inputs, prompt: str, steps: int) -> WorldCase:
        """A case for a model's networks."""
        config = places["vae"].component.network.config
        size = inputs.height // inputs.factor, inputs.width // inputs.factor
        shape = (1, config.latent_channels, _LATENT_FRAMES, *size)
        latents = np.random.default_rng([inputs.seed, 11]).standard_normal(shape).astype(np.float32)
        return cls(inputs, prompt, steps, config.temporal_factor, latents)

    def shared(self) -> dict[str, Any]:
        """Arguments that both pipelines take."""
        from PIL import Image

        frames = pixel_frames(_LATENT_FRAMES, self.temporal_factor)
        poses, angle = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1)), 0.03
        for frame in range(frames):
            turn = angle * frame
            poses[frame, :3, :3] = [
                [np.cos(turn), 0, np.sin(turn)],
                [0, 1, 0],
                [-np.sin(turn), 0, np.cos(turn)],
            ]
            poses[frame, :3, 3] = [0.02 * frame, -0.01 * frame, 0.1 * frame]
        height, width = self.inputs.height, self.inputs.width
        return {
            "image": Image.fromarray(np.round((smooth_picture(self.inputs) + 1) * 127.5).astype(np.uint8)),
            "c2w": poses,
            "intrinsics": [0.9 * width, 0.9 * width, width / 2, height / 2],
            "height": height,
            "width": width,
            "num_frames": frames,
            "num_inference_steps": self.steps,
            "guidance_scale": _GUIDANCE,
        }


def run_theirs(case: WorldCase, model: Model, places: Mapping[str, loading.Place], dtype: str) -> dict[str, np.ndarray]:
    """PyTorch's latents after every step, and pixels; the text encoder is freed before the others are read."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaWMPipeline
    from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT
    from transformers import AutoTokenizer

    wanted = getattr(torch, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(model.path / "scheduler"), local_files_only=True)
    reader = AutoTokenizer.from_pretrained(str(model.path / "tokenizer"), local_files_only=True)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    found: dict[str, np.ndarray] = {}

    def keep(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        found[f"latents after step {index + 1}"] = from_torch(values["latents"])
        return values

    with torch.no_grad():
        encoder = loading.load_theirs(places["text_encoder"]).to(wanted)
        made = SanaWMPipeline(reader, encoder, None, None, scheduler)
        encoded = made.encode_prompt(case.prompt, "", device=torch.device("cpu"), chi_prompt=DEFAULT_CHI_PROMPT)
        del encoder, made
        loading.collect()
        vae, transformer = (loading.load_theirs(places[name]).to(wanted) for name in ("vae", "transformer"))
        made = SanaWMPipeline(None, None, vae, transformer, scheduler)
        made.set_progress_bar_config(disable=True)
        rounding = without_rounding() if dtype == "float32" else contextlib.nullcontext()
        with _given_noise(case.latents), rounding:
            result = made(
                **case.shared(), prompt=None, **dict(zip(names, encoded)), output_type="np", callback_on_step_end=keep
            )
    return {**found, "pixels": np.asarray(result.frames, np.float32)}


@contextlib.contextmanager
def _given_noise(latents: np.ndarray) -> Iterator[None]:
    """PyTorch's pipeline draws its noise itself and takes none."""
    import torch
    from diffusers.pipelines.sana_wm import pipeline_sana_wm

    draw = pipeline_sana_wm.randn_tensor

    def given(shape: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
        if tuple(shape) != latents.shape:
            raise RuntimeError(f"PyTorch's pipeline draws noise of {tuple(shape)}, not of {latents.shape}")
        return torch.from_numpy(latents.copy()).to(dtype)

    pipeline_sana_wm.randn_tensor = given
    try:
        yield
    finally:
        pipeline_sana_wm.randn_tensor = draw


def run_ours(case: WorldCase, model: Model, dtype: str, variant: str | None) -> dict[str, np.ndarray]:
    """The same of ours."""
    from sana_jax import SanaWMPipeline
    from sana_jax.autoencoders import load_autoencoder
    from sana_jax.text_encoders.gemma import GemmaTextEncoder

    pipeline = SanaWMPipeline.from_pretrained(model.path, dtype=dtype, variant=variant, residency="one_at_a_time")
    config = dataclasses.replace(pipeline.transformer.config, revision="legacy")
    rounded = None if dtype == "float32" else jnp.bfloat16
    pipeline.transformer = pipeline.transformer.clone(config=config, softmax_dtype=rounded)
    # The model's contract may want others; both sides compute everything in one dtype here.
    encoder = GemmaTextEncoder.from_directory(model.path, dtype=dtype, variant=variant)
    kept = {name: getattr(pipeline.text_encoder, name) for name in ("complex_human_instruction", "cleans_prompts")}
    pipeline.text_encoder = dataclasses.replace(encoder, **kept)
    pipeline.autoencoder = load_autoencoder(model.path / "vae", dtype=jnp.dtype(dtype), variant=variant)
    found: dict[str, np.ndarray] = {}

    def keep(pipeline: Any, index: int, timestep: float, values: dict[str, Any]) -> None:
        found[f"latents after step {index + 1}"] = np.asarray(values["latents"], np.float32)

    result = pipeline(
        **case.shared(), prompt=case.prompt, latents=case.latents, output_type="np", callback_on_step_end=keep
    )
    return {**found, "pixels": np.asarray(result.frames[0], np.float32)}
