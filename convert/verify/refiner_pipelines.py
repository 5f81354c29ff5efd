"""SANA-WM's refiner on both sides: a prompt through Gemma-3 and the connectors, then its blocks with the same noise."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.sources import Model
from convert.verify import loading
from convert.verify.networks import Inputs, from_torch, normal
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.pipelines.world_refiner_opening import PUBLISHED_CLASSES

KINDS = PUBLISHED_CLASSES
PARTS = ("transformer", "text_encoder", "connectors")
_FPS, _TOKENS = 16.0, 1024  # tokens of a prompt where the directory does not say
_FRAMES = 6  # the sink, a whole block and a short one


@dataclasses.dataclass(frozen=True)
class RefinerCase:
    """One call, with all noise drawn.

    Attributes:
        prompt: what the video shows.
        latents: the first stage's (1, C, T, h, w).
        noise: (1, C, T - sink, h, w).
        tokens: of a prompt, padding included.
    """

    prompt: str
    latents: np.ndarray
    noise: np.ndarray
    tokens: int

    @classmethod
    def draw(cls, model: Model, places: Mapping[str, loading.Place], inputs: Inputs, prompt: str) -> RefinerCase:
        """A case for a model's networks."""
        channels = places["transformer"].component.network.config.in_channels
        size = inputs.height // inputs.factor, inputs.width // inputs.factor
        latents = normal(inputs.seed, "latents", 1, channels, _FRAMES, *size)
        noise = normal(inputs.seed, "noise", 1, channels, _FRAMES - RefinerSampler().sink_frames, *size)
        return cls(prompt, latents, noise, int(model.index.get("text_max_sequence_length", _TOKENS)))

    def found(self, prompt: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
        """What is compared: the prompt as the transformer sees it, and every block's refined latents."""
        blocks = RefinerSampler().blocks(_FRAMES)
        named = {f"latents of block {n}": latents[:, :, start:end] for n, (start, end) in enumerate(blocks, 1)}
        return {"prompt": np.asarray(prompt, np.float32)} | named


def run_theirs(
    case: RefinerCase, model: Model, places: Mapping[str, loading.Place], dtype: str
) -> dict[str, np.ndarray]:
    """PyTorch's; the text encoder is freed before the transformer is read."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.sana_wm import refiner
    from transformers import AutoTokenizer

    wanted, cpu = getattr(torch, dtype), torch.device("cpu")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(model.path / "scheduler"), local_files_only=True)
    reader = AutoTokenizer.from_pretrained(str(model.path / "tokenizer"), local_files_only=True)
    with torch.no_grad():
        # alone, since the pipeline asks its transformer what the prompt's dtype is
        encoder = loading.load_theirs(places["text_encoder"]).to(wanted)
        connectors = loading.load_theirs(places["connectors"]).to(wanted)
        parts = {"tokenizer": reader, "scheduler": scheduler, "text_max_sequence_length": case.tokens, "vae": None}
        made = refiner.SanaWMLTX2Refiner(transformer=None, connectors=connectors, text_encoder=encoder, **parts)
        encoded = made._encode_prompt(case.prompt, device=cpu, dtype=wanted)
        del encoder, connectors, made
        loading.collect()
        transformer = loading.load_theirs(places["transformer"]).to(wanted)
        made = refiner.SanaWMLTX2Refiner(transformer=transformer, connectors=None, text_encoder=None, **parts)
        made.set_progress_bar_config(disable=True)
        made._encode_prompt = lambda *_, **__: encoded
        with _given_noise(case.noise):
            latents = made(torch.from_numpy(case.latents).to(wanted), case.prompt, fps=_FPS, output_type="latent")
    latents = getattr(latents, "frames", latents)
    return case.found(from_torch(encoded[0]), from_torch(torch.as_tensor(latents)))


@contextlib.contextmanager
def _given_noise(noise: np.ndarray) -> Iterator[None]:
    """PyTorch's pipeline draws every block's noise itself and takes none."""
    import torch
    from diffusers.pipelines.sana_wm import refiner

    draw, drawn = refiner.randn_tensor, 0

    def given(shape: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
        nonlocal drawn
        begin, drawn = drawn, drawn + shape[2]
        return torch.from_numpy(noise[:, :, begin:drawn].copy()).to(dtype)

    refiner.randn_tensor = given
    try:
        yield
    finally:
        refiner.randn_tensor = draw
    if drawn != noise.shape[2]:
        raise RuntimeError(f"PyTorch's refiner draws noise for {drawn} frames, not for {noise.shape[2]}")


def run_ours(case: RefinerCase, model: Model, dtype: str, variant: str | None) -> dict[str, np.ndarray]:
    """The same of ours."""
    from sana_jax import SanaWMRefiner

    refiner = SanaWMRefiner.from_pretrained(model.path, dtype=dtype, variant=variant, residency="one_at_a_time")
    prompt = refiner.encode_prompt(case.prompt)
    result = refiner(case.latents, prompt_embeds=prompt, noise=case.noise, fps=_FPS)
    return case.found(prompt, np.asarray(result.frames, np.float32))
