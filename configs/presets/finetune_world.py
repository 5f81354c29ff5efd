"""Trains all of a SANA-WM on, on clips with captions and the camera's path.

    python -m train.main finetune_world --model SANA_WM --data.path videos/ --mesh.fsdp 8

Beside ``a.mp4`` lie ``a.txt``, its caption, and ``a.npz`` with ``c2w``, camera-to-world matrices of all its frames, and
``intrinsics``. Optimizer and noise levels are those of the published first stage; clips are shorter, of ten seconds. A
2.6B model takes 43 GB of parameters, average and AdamW state, cut over the GPUs of ``fsdp``.
"""

from __future__ import annotations

from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)
from configs.world_data import WorldDataConfig

CONFIG = RunConfig(
    preset="finetune_world",
    run_dir="runs/finetune_world",
    steps=10_000,
    transformer=None,
    data=WorldDataConfig(),
    batch_size=8,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=9.95, image_to_video=0.9),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", clip_norm=0.5, epsilon=1e-10),
    ema=EmaConfig(),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(
        every=1000, guidance_scale=None, captions=2, per_caption=1, num_inference_steps=60, sampler="flow_euler"
    ),
)
