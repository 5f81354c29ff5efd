"""Fine-tunes SANA-Video by LoRA on clips with captions.

    python -m train.main lora_video --model MODEL --data.path videos/ [--data.caption "a video of sks dog"]

The clips are cut out of the videos and prepared once, into a cache. What is trained goes out as
``pytorch_lora_weights.safetensors``, which diffusers loads as well. Training is at shift 3, as the published models',
and sampling at the base model's own; a tenth of the clips have their first frame given, so that image to video is kept.
"""

from __future__ import annotations

from configs.data import VideoDataConfig
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

CONFIG = RunConfig(
    preset="lora_video",
    run_dir="runs/lora_video",
    steps=2000,
    transformer=None,
    data=VideoDataConfig(),
    lora=LoraConfig(rank=16),
    batch_size=1,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=3.0, image_to_video=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=50, epsilon=1e-8, weight_decay=1e-4),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=250),
    preview=PreviewConfig(every=500, guidance_scale=None, captions=1, per_caption=1, num_inference_steps=50),
)
