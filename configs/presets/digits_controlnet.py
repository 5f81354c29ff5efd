"""Trains a ControlNet for the embedded default on pictures of digits, in minutes on two CPU cores.

    make train
    python -m train.example_pictures digits/ --digits 0 1 2 3 4 5 6 7 8 9 --count 0 --style moved
    python -m train.main digits_controlnet --data.path digits/
    python -m sana_jax.generate --model runs/digits_controlnet --prompt "a handwritten seven" \\
        --control-image edges.png --out seven.png

As the preset ``controlnet``, with blocks, rate and steps for a network of 0.7 million parameters.
"""

from __future__ import annotations

from configs.controlnet import ControlNetConfig
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
    preset="digits_controlnet",
    run_dir="runs/digits_controlnet",
    steps=500,
    transformer=None,
    model="runs/digits",
    data=ImageDataConfig(conditions=("control=canny",)),
    controlnet=ControlNetConfig(num_layers=2),
    batch_size=32,
    compute=ComputeConfig(scan_blocks=False),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=30),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=250),
    preview=PreviewConfig(every=250, per_caption=2, captions=10, guidance_scale=None),
)
