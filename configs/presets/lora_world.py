"""Fine-tunes SANA-WM by LoRA on clips with captions and the camera's path.

    python -m train.main lora_world --model SANA_WM --data.path videos/ [--data.caption "a street in the rain"]

Beside ``a.mp4`` lies ``a.npz`` with ``c2w``, camera-to-world matrices of all its frames, and ``intrinsics``. The clips
are cut out of the videos and prepared once, into a cache. Noise levels are those of the published first stage; rank,
rate and steps are those of ``lora_video``.
"""

from __future__ import annotations

from configs.lora import LoraConfig
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
    preset="lora_world",
    run_dir="runs/lora_world",
    steps=2000,
    transformer=None,
    data=WorldDataConfig(),
    lora=LoraConfig(rank=16),
    batch_size=1,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=9.95, image_to_video=0.9),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=50, epsilon=1e-8, weight_decay=1e-4),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=250),
    preview=PreviewConfig(
        every=500, guidance_scale=None, captions=1, per_caption=1, num_inference_steps=60, sampler="flow_euler"
    ),
)
