"""Distils a SANA model to one, two and four steps: consistency and adversarial losses (SANA-Sprint, arXiv 2503.09641).

    python -m train.main sprint --model TEACHER --data.path photos/

The published recipe (NVlabs/Sana, train_scripts/train_scm_ladd.py and configs/sana_sprint_config): CAME at 2e-6 with a
warm-up of 5,000 steps for both networks, clipping at 0.1. The moving average, the batch of 16 and the number of steps,
30,000 of each kind, are choices of this preset. The teacher is a flow model that is told times in [0, 1]
(timestep_scale 0.001), with q/k norms, such as Sana_Sprint_1.6B_1024px_teacher. A student of the digits takes minutes
on a CPU: see the README.
"""

from __future__ import annotations

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
from configs.sprint import SprintConfig

CONFIG = RunConfig(
    preset="sprint",
    run_dir="runs/sprint",
    steps=60_000,
    transformer=None,
    data=ImageDataConfig(),
    sprint=SprintConfig(),
    batch_size=16,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(name="came", learning_rate=2e-6, warmup_steps=5000, clip_norm=0.1),
    ema=EmaConfig(),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, guidance_scale=None, captions=4, sampler="scm", num_inference_steps=2),
)
