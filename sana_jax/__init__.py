"""The SANA family of linear-attention diffusion transformers in JAX and Flax."""

import importlib

from sana_jax.errors import CheckpointError, UserError

__version__ = "0.1.0"

_PIPELINES = {
    "LongSanaVideoPipeline": "sana_jax.pipelines.long_video",
    "SanaControlNetPipeline": "sana_jax.pipelines.controlnet",
    "SanaImageToVideoPipeline": "sana_jax.pipelines.image_to_video",
    "SanaPipeline": "sana_jax.pipelines.text_to_image",
    "SanaSprintPipeline": "sana_jax.pipelines.sprint",
    "SanaVideoPipeline": "sana_jax.pipelines.text_to_video",
    "SanaWMPipeline": "sana_jax.pipelines.world_model",
    "SanaWMRefiner": "sana_jax.pipelines.world_refiner",
    "SanaWMStreamingPipeline": "sana_jax.pipelines.world_stream",
}
__all__ = [
    "CheckpointError",
    "LongSanaVideoPipeline",
    "SanaControlNetPipeline",
    "SanaImageToVideoPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "SanaVideoPipeline",
    "SanaWMPipeline",
    "SanaWMRefiner",
    "SanaWMStreamingPipeline",
    "UserError",
]


def __getattr__(name: str):
    """Pipelines load on first use: importing the library stays light."""
    if name in _PIPELINES:
        return getattr(importlib.import_module(_PIPELINES[name]), name)
    raise AttributeError(f"module 'sana_jax' has no attribute {name!r}")
