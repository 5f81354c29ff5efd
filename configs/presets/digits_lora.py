"""Fine-tunes the embedded default by LoRA on a few pictures of 8x8 pixels, in about a minute on two CPU cores.

    make train
    python -m train.example_pictures pictures/
    python -m train.main digits_lora --data.path pictures/
    python -m sana_jax.generate --model runs/digits_lora --prompt "a handwritten three" --out three.png

As the preset ``lora``, with batches, rate and steps for a network of 0.7 million parameters; with ``--prior.caption``
as the preset ``dreambooth``.
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.lora import LoraConfig
from configs.prior import PriorConfig
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
    preset="digits_lora",
    run_dir="runs/digits_lora",
    steps=300,
    transformer=None,
    model="runs/digits",
    data=ImageDataConfig(),
    lora=LoraConfig(rank=16, targets=("all_linear_and_pointwise",)),
    prior=PriorConfig(),
    batch_size=8,
    compute=ComputeConfig(scan_blocks=False),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=100),
    preview=PreviewConfig(every=100, captions=10, per_caption=3, guidance_scale=None),
)
