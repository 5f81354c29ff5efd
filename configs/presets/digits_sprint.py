"""Distils the embedded default to one, two and four steps, in minutes on two CPU cores.

    make train
    python -m train.main digits_sprint
    python -m sana_jax.generate --model runs/digits_sprint --prompt "a handwritten seven" --out seven.png

The losses are those of the preset ``sprint``; rates fit a network of 0.7 million parameters. There is one guidance
scale, since a run this short does not teach the student to tell several apart. The first preview is what the
undistilled model draws in one step: nearly the same blurred digit for every noise.
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
        tangent_warmup_steps=100, guidance_scales=(1.25,), head_blocks=(1, 3), discriminator_learning_rate=2e-3
    ),
    batch_size=64,
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=10),
    ema=EmaConfig(decay=0.98),
    checkpoint=CheckpointConfig(every=100),
    preview=PreviewConfig(
        every=100, per_caption=3, captions=10, guidance_scale=1.25, sampler="scm", num_inference_steps=1
    ),
)
