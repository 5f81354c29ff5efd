"""A LoRA of a 1.6B model at 1024 px on one GPU of 24 GB.

    python -m train.main lora_24gb --model MODEL --data.path photos/

The preset ``lora`` in batches of four, with an 8-bit state. A step takes 4.5 GB (``--plan=rtx4090``): the frozen model
in bfloat16 (3.2 GB), and activations; the forward pass is computed twice. ``--compute.remat dots_no_batch`` computes
little twice, is a tenth faster by reckoning, and takes 10.9 GB; SANA-1.5 4.8B takes 11.7 GB as it is. Text encoder
(5.2 GB) and autoencoder are in memory only while the pictures are prepared, and for previews.
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
    preset="lora_24gb",
    run_dir="runs/lora_24gb",
    steps=1000,
    transformer=None,
    data=ImageDataConfig(),
    lora=LoraConfig(rank=16),
    batch_size=4,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(name="adamw_8bit", learning_rate=1e-4, warmup_steps=20, epsilon=1e-8, weight_decay=1e-4),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=250),
    preview=PreviewConfig(every=250, guidance_scale=None, captions=4),
)
