"""Every published SANA, SANA-Video and SANA-WM transformer: its shape, its size, and how it is meant to be sampled.

Names are those of the Hub repositories (``Efficient-Large-Model/<name>``).
"""

from __future__ import annotations

from dataclasses import dataclass

from sana_jax.models.sana import SanaConfig
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.models.sana_wm import SanaWMConfig


@dataclass(frozen=True)
class PublishedTransformer:
    """One published transformer.

    Attributes:
        config: its shape.
        parameters: the exact number of parameters.
        dtype: the compute dtype it was published for.
        flow_shift: shift of its sampler's noise schedule; None for SANA-Sprint, whose sampler has none.
    """

    config: SanaConfig
    parameters: int
    dtype: str
    flow_shift: float | None = 3.0


_600M, _1600M = 591_747_872, 1_604_462_752

PUBLISHED_TRANSFORMERS = {
    "Sana_600M_512px_diffusers": PublishedTransformer(SanaConfig.sana_600m(sample_size=16), _600M, "float16"),
    "Sana_600M_1024px_diffusers": PublishedTransformer(SanaConfig.sana_600m(), _600M, "float16"),
    "Sana_1600M_512px_diffusers": PublishedTransformer(SanaConfig.sana_1600m(sample_size=16), _1600M, "float16"),
    "Sana_1600M_512px_MultiLing_diffusers": PublishedTransformer(
        SanaConfig.sana_1600m(sample_size=16), _1600M, "float16"
    ),
    "Sana_1600M_1024px_diffusers": PublishedTransformer(SanaConfig.sana_1600m(), _1600M, "float16"),
    "Sana_1600M_1024px_MultiLing_diffusers": PublishedTransformer(SanaConfig.sana_1600m(), _1600M, "float16"),
    "Sana_1600M_1024px_BF16_diffusers": PublishedTransformer(SanaConfig.sana_1600m(), _1600M, "bfloat16"),
    "Sana_1600M_2Kpx_BF16_diffusers": PublishedTransformer(SanaConfig.sana_1600m_2k(), _1600M, "bfloat16"),
    "Sana_1600M_4Kpx_BF16_diffusers": PublishedTransformer(SanaConfig.sana_1600m_4k(), _1600M, "bfloat16", 6.0),
    "SANA1.5_1.6B_1024px_diffusers": PublishedTransformer(SanaConfig.sana15_1600m(), 1_604_641_952, "bfloat16"),
    "SANA1.5_4.8B_1024px_diffusers": PublishedTransformer(SanaConfig.sana15_4800m(), 4_721_825_952, "bfloat16"),
    "Sana_Sprint_0.6B_1024px_diffusers": PublishedTransformer(SanaConfig.sprint_600m(), 593_501_216, "bfloat16", None),
    "Sana_Sprint_1.6B_1024px_diffusers": PublishedTransformer(
        SanaConfig.sprint_1600m(), 1_610_237_472, "bfloat16", None
    ),
}


@dataclass(frozen=True)
class PublishedVideoTransformer:
    """One published video transformer.

    Attributes:
        config: its shape.
        parameters: the exact number of parameters.
        spatial_factor: pixels per latent of its autoencoder.
        temporal_factor: frames per latent frame.
        flow_shift: of its sampler; it was trained with 3.
        dtype: the compute dtype it was published for.
    """

    config: SanaVideoConfig
    parameters: int
    spatial_factor: int
    temporal_factor: int
    flow_shift: float = 8.0
    dtype: str = "bfloat16"


PUBLISHED_VIDEO_TRANSFORMERS = {
    "SANA-Video_2B_480p_diffusers": PublishedVideoTransformer(
        SanaVideoConfig.sana_video_2b_480p(), 2_056_862_144, spatial_factor=8, temporal_factor=4
    ),
    "SANA-Video_2B_720p_diffusers": PublishedVideoTransformer(
        SanaVideoConfig.sana_video_2b_720p(), 2_057_148_928, spatial_factor=32, temporal_factor=8
    ),
}

# by its first stage; it was trained with a shift of 9.95
PUBLISHED_WORLD_TRANSFORMERS = {
    "SANA-WM_bidirectional": PublishedTransformer(SanaWMConfig(), 2_661_800_448, "bfloat16", 9.8),
}
