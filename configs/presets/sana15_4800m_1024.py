"""SANA-1.5 4.8B at 1024 px: sixty blocks.

    python -m train.main sana15_4800m_1024 --encoders MODEL --data.path pictures/

NVlabs/Sana, configs/sana1-5_config/1024ms/Sana_4800M_..._came8bit_grow_constant: bfloat16, 8-bit CAME at 2e-5 after a
warm-up of 2000, constant, clipping at 0.1, from latents prepared before. Different here: a moving average, 16
pictures per GPU instead of 2, and no growing: the published model began as the 1.6B one with new blocks (arXiv
2501.18427). For 8 x 80 GB (``fsdp=8``), or several such hosts (``data=-1``).
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    FlowConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
)
from sana_jax.models.sana import SanaConfig

CONFIG = RunConfig(
    preset="sana15_4800m_1024",
    run_dir="runs/sana15_4800m_1024",
    steps=200_000,
    transformer=SanaConfig.sana15_4800m(),
    data=ImageDataConfig(caption_choice="clipscore"),
    batch_size=128,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=3.0),
    optimizer=OptimizerConfig(name="came_8bit", learning_rate=2e-5, warmup_steps=2000, clip_norm=0.1),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=5000),
    preview=PreviewConfig(every=5000),
)
