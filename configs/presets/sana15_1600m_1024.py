"""SANA-1.5 1.6B at 1024 px: q and k are normalised, which bfloat16 needs.

    python -m train.main sana15_1600m_1024 --encoders MODEL --data.path pictures/

NVlabs/Sana, configs/sana1-5_config/1024ms/Sana_1600M_1024px_allqknorm_bf16_lr2e5: bfloat16, 2e-5, clipping at 0.1.
The rate is that of a model that was trained before; from nothing 1e-4 is usual. Different here: 8-bit CAME as in the
file for 4.8B, a moving average, and a batch for 8 x 80 GB (``fsdp=8``), or several such hosts (``data=-1``).
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
    preset="sana15_1600m_1024",
    run_dir="runs/sana15_1600m_1024",
    steps=200_000,
    transformer=SanaConfig.sana15_1600m(),
    data=ImageDataConfig(caption_choice="clipscore"),
    batch_size=512,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=3.0),
    optimizer=OptimizerConfig(name="came_8bit", learning_rate=2e-5, warmup_steps=2000, clip_norm=0.1),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=5000),
    preview=PreviewConfig(every=5000),
)
