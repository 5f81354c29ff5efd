"""A small SANA-Video learns to draw handwritten digits that move where their captions say, on a CPU.

    python -m train.main moving_digits
    python -m sana_jax.generate --model runs/moving_digits --prompt "a seven moving left" --output seven.gif

The network code is that of the 2B model with small widths; frames are pixels, captions a vector per word. A fifth of
the clips have their first frame given, so that ``--image digit.png`` makes a clip that begins with it.
"""

from __future__ import annotations

from configs.data import MovingDigitsDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)
from sana_jax.models.sana_video import SanaVideoConfig

CONFIG = RunConfig(
    preset="moving_digits",
    run_dir="runs/moving_digits",
    steps=3000,
    transformer=SanaVideoConfig(
        in_channels=1,
        out_channels=1,
        num_attention_heads=6,
        attention_head_dim=16,
        num_layers=4,
        num_cross_attention_heads=3,
        cross_attention_head_dim=32,
        cross_attention_dim=96,
        caption_channels=32,
        sample_size=6,
        patch_size=(1, 2, 2),
        rope_max_seq_len=1024,
    ),
    data=MovingDigitsDataConfig(),
    batch_size=32,
    compute=ComputeConfig(scan_blocks=False),
    # Frames repeat one another: what the caption must decide lies above a level of 0.9.
    flow=VideoFlowConfig(flow_shift=6.0, image_to_video=0.2),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=500),
    preview=PreviewConfig(every=500, per_caption=1, guidance_scale=2.0),
)
