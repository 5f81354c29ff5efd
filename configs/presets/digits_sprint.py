"""Distils the embedded default to one, two and four steps, in minutes on two CPU cores.

    make train
    python -m train.main digits_sprint
    python -m sana_jax.generate --model runs/digits_sprint --prompt "a handwritten seven" --out seven.png

The losses are those of the preset ``sprint``; sizes and rates fit a network of 1.4 million parameters.
"""

from __future__ import annotations

from configs.optimizer import OptimizerConfig
from configs.schema import (
    CheckpointConfig,
    DigitsDataConfig,
    EmaConfig,
    FlowConfig,
    PreviewConfig,
    RunConfig,
)
from configs.sprint import SprintConfig

CONFIG = RunConfig(
    preset="digits_sprint",
    run_dir="runs/digits_sprint",
    steps=400,
    transformer=None,
    model="runs/digits",
    data=DigitsDataConfig(),
    sprint=SprintConfig(
        tangent_warmup_steps=100, guidance_scales=(1.5, 2.0, 2.5), head_blocks=(1, 3), discriminator_learning_rate=3e-4
    ),
    batch_size=64,
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=20),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=100),
    preview=PreviewConfig(
        every=100, per_caption=3, captions=10, guidance_scale=2.0, sampler="scm", num_inference_steps=1
    ),
)
