"""Trains all of a SANA-Video model on, on clips with captions.

    python -m train.main finetune_video --model MODEL --data.path videos/ --mesh.fsdp 8

NVlabs/Sana, configs/sana_video_config (480p): AdamW at 5e-5 without weight decay, a warm-up of 500, clipping at 0.1,
shift 3. Batches are smaller here, and so is the rate. A 2B model takes 33 GB of parameters, average and AdamW state,
cut over the GPUs of ``fsdp``.
"""

from __future__ import annotations

from configs.data import VideoDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)

CONFIG = RunConfig(
    preset="finetune_video",
    run_dir="runs/finetune_video",
    steps=10_000,
    transformer=None,
    data=VideoDataConfig(),
    batch_size=8,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=3.0, image_to_video=0.1),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=500, clip_norm=0.1),
    ema=EmaConfig(),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=2, per_caption=1, num_inference_steps=50),
)
