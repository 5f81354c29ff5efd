"""The embedded default: a small SANA learns to write handwritten digits from their captions.

    make train                      # or: python -m train.main

The network code is that of the 1.6B model with small widths and 2x2 patches; pictures are pixels, captions a vector
per word. Expect a few minutes on two CPU cores, a loss near 0.39, and all samples read as the digit asked for by a
support vector machine; BUILD_NOTES.md has the measurements.
"""

from __future__ import annotations

from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    DigitsDataConfig,
    EmaConfig,
    FlowConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)
from sana_jax.models.sana import SanaConfig

CONFIG = RunConfig(
    preset="digits",
    run_dir="runs/digits",
    steps=700,
    transformer=SanaConfig(
        in_channels=1,
        out_channels=1,
        num_attention_heads=6,
        attention_head_dim=16,
        num_layers=4,
        num_cross_attention_heads=3,
        cross_attention_head_dim=32,
        cross_attention_dim=96,
        caption_channels=32,
        sample_size=8,
        patch_size=2,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,  # times in [0, 1], which a consistency model can be distilled from
    ),
    data=DigitsDataConfig(),
    batch_size=64,
    compute=ComputeConfig(scan_blocks=False),
    flow=FlowConfig(flow_shift=1.0),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=200),
    preview=PreviewConfig(every=200, captions=10, per_caption=3, guidance_scale=2.0),
)
