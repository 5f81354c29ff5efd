"""Image encoders: pictures to vectors that a network can be conditioned on."""

from __future__ import annotations

from sana_jax.image_encoders.preprocessing import Preprocessing
from sana_jax.image_encoders.siglip import SiglipImageEncoder

__all__ = ["Preprocessing", "SiglipImageEncoder"]
