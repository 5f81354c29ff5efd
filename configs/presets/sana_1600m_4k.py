"""SANA 1.6B at 4096 px: the position table of 2K, stretched.

    python -m train.main sana_1600m_4k --encoders MODEL --data.path pictures/

The shape and the shift are those of the published model (Sana_1600M_4Kpx_BF16); the recipe is that of 1024 px with a
sixteenth of the batch: upstream's file for 4K is not among our sources. For 8 x 80 GB and several such hosts, four
pictures of 16384 tokens per GPU. Prepare the pictures with ``python -m train.precompute`` first: the autoencoder
needs more memory at this size than the training.
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
    preset="sana_1600m_4k",
    run_dir="runs/sana_1600m_4k",
    steps=20_000,
    transformer=SanaConfig.sana_1600m_4k(),
    data=ImageDataConfig(caption_choice="clipscore"),
    batch_size=32,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=6.0),
    optimizer=OptimizerConfig(name="came_8bit", learning_rate=1e-4, warmup_steps=2000, clip_norm=0.1),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=5000),
    preview=PreviewConfig(every=5000),
)
