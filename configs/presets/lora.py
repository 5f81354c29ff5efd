"""Fine-tunes any SANA image model by LoRA on pictures with captions; one 24 GB GPU is enough for 1024 px.

    python -m train.main lora --model MODEL --data.path photos/ [--data.caption "a photo of sks dog"]

The pictures are prepared once, into a cache. What is trained goes out as ``pytorch_lora_weights.safetensors``, which
diffusers loads as well. The flow shift is the base model's, as in its own training; diffusers' script trains unshifted.
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.lora import LoraConfig
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
    preset="lora",
    run_dir="runs/lora",
    steps=1000,
    transformer=None,
    data=ImageDataConfig(),
    lora=LoraConfig(rank=16),
    batch_size=1,
    accumulation=1,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, epsilon=1e-8, weight_decay=1e-4),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=250),
    preview=PreviewConfig(every=250, guidance_scale=None, captions=4),
)
