"""Trains all of a SANA model on, 1.6B or 4.8B, on one host with eight GPUs of 80 GB.

    python -m train.main finetune_8x80gb --model MODEL --data.path photos/

Parameters, average and 8-bit CAME's state are cut over the eight GPUs (``fsdp=8``), of which each has 16 pictures.
Rate, warm-up and clipping are those of SANA-1.5 (NVlabs/Sana, configs/sana1-5_config).
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    FlowConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)

CONFIG = RunConfig(
    preset="finetune_8x80gb",
    run_dir="runs/finetune_8x80gb",
    steps=20_000,
    transformer=None,
    data=ImageDataConfig(),
    batch_size=128,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(name="came_8bit", learning_rate=2e-5, warmup_steps=2000, clip_norm=0.1),
    ema=EmaConfig(),
    mesh=MeshConfig(data=1, fsdp=8),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=4),
)
