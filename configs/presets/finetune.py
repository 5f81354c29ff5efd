"""Trains all of a SANA image model on, on pictures with captions.

    python -m train.main finetune --model MODEL --data.path photos/

The published recipe for SANA-1.5 at a small learning rate (NVlabs/Sana, configs/sana1-5_config: bfloat16, clipping at
0.1). A 1.6B model takes 26 GB of parameters, average and AdamW state: several GPUs with ``--mesh.fsdp``, or
``--optimizer.name adamw_8bit --ema.no-enabled`` on one of 80 GB.
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    FlowConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)

CONFIG = RunConfig(
    preset="finetune",
    run_dir="runs/finetune",
    steps=10_000,
    transformer=None,
    data=ImageDataConfig(),
    batch_size=16,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=500, clip_norm=0.1),
    ema=EmaConfig(),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=4),
)
