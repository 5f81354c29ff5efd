"""Trains all of a SANA model on, 1.6B or 4.8B, on several hosts with eight GPUs each.

    srun python -m train.main finetune_multihost --model MODEL --data.path photos/ --run-dir /shared/run

Each host's eight GPUs share one copy of the model (``fsdp=8``), so that weights travel within a host alone; hosts
share the batch (``data=-1``), and gradients travel between them once per step. Model, data and run directory are on a
file system that all hosts see. Rate, warm-up and clipping are those of SANA-1.5 (NVlabs/Sana,
configs/sana1-5_config).
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
    preset="finetune_multihost",
    run_dir="runs/finetune_multihost",
    steps=20_000,
    transformer=None,
    data=ImageDataConfig(),
    batch_size=512,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(name="came_8bit", learning_rate=2e-5, warmup_steps=2000, clip_norm=0.1),
    ema=EmaConfig(),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=4),
)
