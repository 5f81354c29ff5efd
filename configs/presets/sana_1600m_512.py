"""SANA 1.6B at 512 px, trained from scratch.

    python -m train.main sana_1600m_512 --encoders MODEL --data.path pictures/

The recipe of NVlabs/Sana, configs/sana_config/512ms (see ``sana_600m_512`` for what differs here). For 8 x 80 GB, and
for several such hosts: each host's eight GPUs share one copy of the model (``fsdp=8``), hosts share the batch
(``data=-1``).
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
    preset="sana_1600m_512",
    run_dir="runs/sana_1600m_512",
    steps=200_000,
    transformer=SanaConfig.sana_1600m(sample_size=16),
    data=ImageDataConfig(caption_choice="clipscore"),
    batch_size=1024,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=3.0),
    optimizer=OptimizerConfig(name="came", learning_rate=1e-4, warmup_steps=2000, clip_norm=0.1),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=5000),
    preview=PreviewConfig(every=5000),
)
