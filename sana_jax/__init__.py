"""The SANA family of linear-attention diffusion transformers in JAX and Flax."""

from sana_jax.errors import CheckpointError, UserError

__version__ = "0.1.0"

__all__ = ["CheckpointError", "SanaPipeline", "UserError"]


def __getattr__(name: str):
    """Pipelines load on first use: importing the library stays light."""
    if name == "SanaPipeline":
        from sana_jax.pipelines.text_to_image import SanaPipeline

        return SanaPipeline
    raise AttributeError(f"module 'sana_jax' has no attribute {name!r}")
